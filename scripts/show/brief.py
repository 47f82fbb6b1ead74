"""Tell an agent that lost the thread where the session stands, in at most 60 lines.

usage: brief.py --tag TAG
"""

from harness import files
from scripts import session
from scripts.judge.evidence import gain_words
from scripts.session import PROGRESS, Session, counted, cut, one_line, options, run_command
from scripts.show.night import Night, clock

WIDTH = 125
KEPT, NEAR, DEAD, OPEN, NOTES = 12, 6, 14, 8, 3  # of each at most: with titles and all that stands alone 54 lines


def lines(night):
    if not night.experiments:
        return [f"{night.tag}: no results yet: make baseline", *newest_run(night)]
    found = [f"{night.tag}: {counted(len(night.experiments), 'experiment')} in {clock(night.seconds)}; {night.counts}"]
    found += standing(night)
    for title, entries in {
        "kept, the oldest first:": [entry(e) for e in night.chain[1:][-KEPT:]],
        "put back, though probably better:": [entry(e) for e in night.near_misses[:NEAR]],
        "dead ends, the newest first:": [entry(e) for e in night.dead_ends[:DEAD]],
        "open questions, the newest first:": [f"{e.number:3}  {text}" for e, text in night.questions[:OPEN]],
    }.items():
        if entries:
            found += [title, *(f"  {text}" for text in entries)]
    found += [night.foresight] if night.foresight else []
    found += [f"note: {words}" for words in night.missing[:NOTES]]
    return [cut(line, WIDTH) for line in [*found, *newest_run(night)]]


def standing(night):
    """Baseline, best, noise and held-out gain, a line each; the table and the screen have them, too."""
    if not night.best:
        return ["nothing was kept yet"]
    first, best = night.first, night.best
    found = [f"baseline {first.bpb:.6f}  {first.commit}, {counted(len(first.runs), 'run')}"]
    if night.gain:
        found.append(f"best     {best.bpb:.6f}  {best.commit}, {counted(len(best.runs), 'run')}; gain "
                     f"{gain_words(night.gain)}; after the winner's curse {gain_words(night.left)}")  # fmt: skip
    found.append(noise(night.evidence))
    if night.held_out:
        found.append(f"held out {night.held_out[0]}, {night.look['best']} against the baseline")
    elif night.gain:
        found.append("held out not measured: make holdout does that")
    found += [f"held out {gain} with {there}: {words}" for there, (gain, words) in night.elsewhere.items()]
    return found


def noise(evidence):
    """How far one run is off, in a line."""
    known = f"by {counted(evidence.df, 'repeat')}" if evidence.df else "a guess: make run REFERENCE=1 N=4 measures it"
    return f"noise    of one run ± {evidence.sigma:.4f}, ± {evidence.same_seed:.4f} between equal seeds; {known}"


def entry(e):
    """An experiment in a line."""
    gain = f"{gain_words(e.gain)}  " if e.gain else ""
    return f"{e.number:3}  {gain}{e.trust or e.status}  {one_line(e.description)}"


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
    status = {e.blob: e.status for e in night.experiments}.get(session.git("rev-parse", "HEAD:train.py"), "keep")
    due = "change train.py" if status == "keep" else "make discard"
    if newest and not newest.get("logged"):
        due = "make verdict"
    return [f"last run {name}: {last['status']}; next: {due}"]


def show(args):
    print("\n".join(lines(Night(args.tag))))


if __name__ == "__main__":
    run_command(show, options(__doc__).parse_args())
