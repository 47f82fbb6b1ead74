"""What each kept change is still worth: taken back alone from the best program, and run beside it.

A change is taken back by git's three-way merge of train.py. What is left is a program of its own, run N times with the
seeds of the best, in turn. What was run before is not run again: a command that was killed goes on where it was.
"""

import tempfile
from pathlib import Path

from scripts import session
from scripts.judge.evidence import busy, gain_words, unused
from scripts.run import experiment, plan
from scripts.session import Refused, Session, commit_with, options, run_command, tell
from scripts.show.night import Night

FAILED = ("crash", "invalid", "timeout", "stale")  # without a change: it is told, and not run again


def taken_back(night, change):
    """train.py of the program that is taken apart without one change; None where later changes stand on its lines."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("best", "change", "before")]
        for path, e in zip(paths, (night.apart, change, change.before), strict=True):
            path.write_text(e.text.strip() + "\n")
        text = session.git("merge-file", "-p", *map(str, paths))
    return text and text + "\n"


def note_programs(night, this_session):
    """Make a program without each kept change, note it, and name the changes that are left out."""
    noted, whole = {event["program"] for event in night.ablations}, night.apart
    for change in night.chain_of(whole)[1:]:
        text = taken_back(night, change) if change.diff else None
        if text is None or text.strip() == whole.text.strip():
            why = "later changes stand on its lines" if change.diff else "git does not know its program"
            tell(f"left out {change.number}: {'nothing of it is left' if text else why}")
            continue
        name, words = f"without-{change.number}-{whole.commit}", f"Without: {change.description}"
        commit, blob = commit_with(text, whole.commit, this_session.tag, name, words)
        if blob not in noted:
            this_session.note("ablation", change=change.number, of=whole.program, program=blob, commit=commit)


def is_due(this_session, blob, seed):
    """Whether a program lacks an undisturbed run with this seed, or one that was made here; none that failed is due."""
    for attempt in this_session.attempts():
        if attempt["train_blob"] == blob and attempt["role"] != "holdout":
            if attempt["role"] == "ablation" and attempt["status"] in FAILED:
                return False
            run = session.record_of(attempt) if (attempt["status"], attempt["seed"]) == ("valid", seed) else None
            if run and (attempt["role"] == "ablation" or not busy(run)):
                return False
    return True


def main(args):
    this_session = Session(args.tag)
    held, night = experiment.begin(this_session), Night(args.tag)
    if not (args.head and night.chain[1:] and night.apart.text):
        raise Refused("the best is the baseline, or git does not know it: there is no change to take back")
    note_programs(night, this_session)
    night = Night(args.tag)
    whole = night.apart
    seeds = plan.seeds_of(this_session, whole.blob)
    programs = {e["program"]: (e["commit"], f"without {e['change']}") for e in night.ablations}
    programs = {whole.blob: (whole.commit, "with all"), **programs}
    for number in range(args.runs or 1):
        seed = seeds[number] if number < len(seeds) else unused(seeds[:number])
        seeds[number:] = seeds[number:] or [seed]
        for blob, (commit, name) in programs.items():
            if is_due(this_session, blob, seed):
                pair = f"ablation {seed}"  # made in turn, as the two of a pair are
                attempt = experiment.run_once(this_session, held, "ablation", commit, args.head, seed, pair)
                tell(f"{name}, seed {seed}: {attempt['status']} {session.one_line(attempt['reason'])}".rstrip())
                if attempt["status"] not in ("valid", *FAILED):
                    experiment.exit_as(attempt)
    print("\n".join(table(Night(args.tag))))


def table(night):
    """What each change was worth when it was kept, and what it is worth now."""
    found = [f"worth in {night.apart.commit}, bits per byte, with standard error and how sure it is that it helps:"]
    look = "  {:>3}  {:28} {:28} {:>8}  {}"
    found.append(look.format("", "when it was kept", "now, taken back alone", "lines", ""))
    tried = {event["change"]: event for event in night.ablations}
    for e in night.chain_of(night.apart)[1:]:
        now = gain_words(e.worth) if e.worth else "no result without it" if e.number in tried else "left out"
        found.append(look.format(e.number, gain_words(e.gain), now, e.changed, e.description))
    for e in night.idle:
        found.append(f"{e.number} carries nothing, it seems. To try the best without it:")
        found.append(f"    git checkout {tried[e.number]['commit'][:7]} -- train.py && "
                     f"git commit -q -m 'without {e.number}' && make run AGAIN=1")  # fmt: skip
    return found


if __name__ == "__main__":
    run_command(main, options(__doc__, head="", runs=0).parse_args())
