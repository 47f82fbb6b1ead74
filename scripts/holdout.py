"""The night's gain, measured anew, on text that nobody selected on.

usage: holdout.py --tag TAG --head COMMIT [--runs N]

Baseline and best kept program, N times in turn with equal seeds that neither has had, each in a worktree of its own,
scored on the validation split and on the test split. Every look at the test split is noted in the session.
"""

import math
import sys

import numpy as np
import run
import session
import summary
import verdict
from night import Night
from notify import notify
from session import Refused, Session, counted, options, record, run_command, tell


def interval(differences):
    """(mean, half the width of its 95 % interval) of paired differences; nan where there is one alone."""
    n, half = len(differences), math.nan
    if n > 1:
        half = verdict.in_t(1.96, n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return float(np.mean(differences)), half


def main(args):
    sitting = Session(args.tag)
    sitting.link()
    run.clear_up(sitting)
    if not args.head:
        raise Refused("holdout needs git: it runs commits in worktrees of their own")
    night = Night(args.tag)
    first, best, (seen, _) = night.first, night.best, night.gain
    if not best:
        raise Refused("nothing was kept yet: make baseline")
    if first is best:
        raise Refused("the baseline is the best kept program: there is no gain to measure")
    run.take_charge()
    used, looks = [*run.seeds_of(sitting, first.blob), *run.seeds_of(sitting, best.blob)], []
    before = sum(event["event"] == "holdout" for event in sitting.events())
    for number in range(args.runs or 3):
        seed, found = run.unused(used), {}
        used.append(seed)
        for row in (first, best) if number % 2 == 0 else (best, first):
            attempt = run.run_once(sitting, "holdout", row.commit, args.head, seed)
            if attempt["status"] != "valid":
                print("\n".join(summary.failure(attempt)[:-1]))
                sys.exit(128 + run.stopped_by[0] if run.stopped_by else run.EXIT[attempt["status"]])
            found[row.commit] = record.bpb(session.record_of(attempt)), attempt["test"]["bpb"]
        looks.append([a - b for a, b in zip(found[first.commit], found[best.commit], strict=True)])
        words = f"gain {looks[-1][0]:+.6f} on validation, {looks[-1][1]:+.6f} on test"
        tell(f"pair {number + 1}  seed {seed}: {words}")
    fresh, test = (interval(column) for column in zip(*looks, strict=True))
    pair = {"baseline": first.commit, "best": best.commit, "pairs": len(looks)}
    sitting.note("holdout", **pair, night=seen, fresh=fresh, test=test)
    told = [f"baseline {first.commit} against best {best.commit}, bits per byte, 95 % intervals:",
            f"  as the night saw it, on validation  {seen:+.6f}"]  # fmt: skip
    for where, (gain, half) in (("fresh runs, on validation", fresh), ("fresh runs, on test", test)):
        width = "(one pair: no interval)" if math.isnan(half) else f"± {half:.6f}"
        told.append(f"  {where:34}  {gain:+.6f} {width}")
    told.append(f"the test split was looked at {counted(before + 1, 'time')} in this session")
    print("\n".join(told), flush=True)
    notify("\n".join(told))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--head", default="", help="the checked-out commit")
    parser.add_argument("--runs", type=int, default=0, help="pairs of runs")
    run_command(main, parser.parse_args())
