"""A session in a terminal: the brief for an agent that lost the thread, the table, and a screen that follows a run."""

import os
import shutil
import sys
import time

from harness import files
from harness.files import printable
from scripts import session
from scripts.judge.evidence import gain_words
from scripts.session import PROGRESS, Session, counted, cut, one_line, options, run_command, tags
from scripts.show.night import Night

WIDTH = 125
KEPT, NEAR, DEAD, OPEN, NOTES = 12, 6, 14, 8, 3  # in a brief at most: with titles and what stands alone 54 lines
COLUMNS = ("", "commit", "val_bpb", "gain", "runs", "GB", "tok/s", "+/-", "status", "description")
LOOK = "{:>5} {:8}{:>8}  {:26}{:>4} {:>5} {:>8} {:>8}  {:14}{}"
EVERY = 1.0  # seconds between two looks of `watch`
ROWS = 12  # of the newest experiments on its screen


def brief(night):
    """Where the session stands, as at most 60 lines."""
    found = [f"{night.tag}: {night.circumstances}", *standing(night)]
    for title, entries in {
        "kept, the oldest first:": [entry(e) for e in night.chain[1:][-KEPT:]],
        "put back, though probably better:": [entry(e) for e in night.near_misses[:NEAR]],
        "dead ends, the newest first:": [entry(e) for e in night.dead_ends[:DEAD]],
        "open questions, the newest first:": [f"{e.number:3}  {text}" for e, text in night.questions[:OPEN]],
    }.items():
        if entries:
            found += [title, *(f"  {text}" for text in entries)]
    return [cut(line, WIDTH) for line in [*found, *newest_run(night)]]


def figures(night):
    """[(name, value, what it rests on)] of the whole night, for all views."""
    if not night.best:
        return []
    ends = [night.first, night.best] if night.gain else [night.first]
    runs = [f"{counted(len(e.runs), 'run')} of {e.commit}" for e in ends]
    found = [("val_bpb", " to ".join(f"{e.bpb:.6f}" for e in ends), ", ".join(runs))]
    if night.gain:
        found.append(("gain", gain_words(night.gain), f"after the winner's curse {gain_words(night.left)}"))
    for where, (gain, *words) in night.held_out.items():
        found.append((f"held out {where}".strip(), gain, ", ".join(words)))
    if night.gain and "" not in night.held_out:
        found.append(("held out", "not measured", "make holdout measures it on text that nothing selected on"))
    if night.foresight:
        found.append(("expected gains", *night.foresight.split(", ", 1)))
    if shared := sum(bool(run.load) for run in night.evidence.runs):
        found.append(("shared", f"{counted(shared, 'run')} beside other work", "counted for less"))
    return [*found, ("noise", *noise(night.evidence))]


def standing(night):
    """What is missing, and the night's figures, a line each."""
    lines = [f"{name:8} {value}; {why}" for name, value, why in figures(night)]
    return [*(f"note: {words}" for words in night.missing[:NOTES]), *(lines or ["nothing was kept yet: make baseline"])]


def noise(evidence):
    """(how far one run is off, by what that is known)."""
    repeats = len(evidence.runs) - len(evidence.column)
    known = f"by {counted(evidence.df or repeats, 'repeat')}{'' if evidence.df else ' beside other work'}"
    quiet = not any(run.load for run in evidence.runs)
    known = known if repeats else "a guess" + ": make run REFERENCE=1 N=4 measures it" * quiet
    return f"± {evidence.sigma:.4f} of one run, ± {evidence.same_seed:.4f} between equal seeds", known


def entry(e):
    """An experiment in a line."""
    gain = f"{gain_words(e.gain)}  " if e.gain else ""
    return f"{e.number:3}  {gain}{e.trust or e.status}: {one_line(e.description)}"


def newest_run(night):
    """How far the run is that goes on; or how the newest one ended, and what is to be typed next."""
    if not night.attempts:
        return ["no run yet"]
    last = night.attempts[-1]
    name = f"{(last['commit'] or 'none')[:7]} {last['role']}, seed {last['seed']}"
    if last["status"] == "running":
        now = files.read_json(PROGRESS) or {}
        if now.get("attempt") != last["id"]:
            return [f"running  {name}: starting"]
        left, step = now["budget"] - now["seconds"], f"step {now['step']}, loss {now['loss']:.4f}"
        state = f"{100 * now['seconds'] / now['budget']:.0f} %, {left:.0f} s left" if left > 0 else "evaluating"
        return [f"running  {name}: {state}; {step}, {now['tok_sec']:,.0f} tok/s"]
    newest = Session(night.tag).newest()
    here = session.git("rev-parse", "HEAD:train.py")
    status = {e.blob: e.status for e in night.experiments}.get(here, "new" if here else "keep")
    due = {"keep": "change train.py", "new": "make run"}.get(status, "make discard")
    if newest and not newest.get("logged"):
        due = "make verdict"
    return [f"last run {name}: {last['status']}; next: {due}"]


def table(night):
    """The rows with all runs and the gain of each, and where the session stands."""
    found = [LOOK.format(*COLUMNS)]
    for e in night.experiments:
        gain, number = gain_words(e.gain) if e.gain else "", f"{e.number}{'*' if e is night.best else ' '}"
        found.append(LOOK.format(number, e.commit, f"{e.bpb:.6f}", gain, len(e.runs) or "", e.memory, f"{e.rate:.0f}",
                                 e.changed, f"{e.status} {e.trust}", e.description))  # fmt: skip
    return [*found, "* the best; a kept gain is safe, doubtful or unproven", *standing(night)]


def watch(tag):
    """Follow a session. It reads files, and the whole session only when that has changed: a run does not notice it."""
    this_session, seen, night = Session(tag), None, None
    while True:
        now = [path.stat().st_mtime_ns for path in (this_session.log, this_session.table) if path.exists()]
        if now != seen:
            seen, night = now, Night(tag)
        width, height = shutil.get_terminal_size((100, 40))
        head = f"{tag}: load {os.getloadavg()[0]:.1f} of {os.cpu_count()}; {night.circumstances}"
        lines = [head, *standing(night), "", *newest_run(night), "", *map(entry, night.experiments[: -1 - ROWS : -1])]
        shown = [cut(printable(line), width) for line in lines[: height - 1]]
        if not sys.stdout.isatty():
            return print("\n".join(shown))
        # home, each line with its rest wiped, and all below
        print("\x1b[H" + "".join(line + "\x1b[K\n" for line in shown) + "\x1b[J", end="", flush=True)
        time.sleep(EVERY)


def show(args):
    if args.view == "watch":
        return watch(args.tag)
    if args.view == "brief":
        return print("\n".join(brief(Night(args.tag))))
    Session(args.tag).link()
    for tag in tags() if args.all else [args.tag]:
        print("\n".join([*([f"\n{tag}"] if args.all else []), *table(Night(tag))]))


if __name__ == "__main__":
    run_command(show, options(__doc__, view="brief", all=False).parse_args())
