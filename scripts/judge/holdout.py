"""The night's gain, measured anew, on text that nobody selected on.

usage: holdout.py --tag TAG --head COMMIT [--runs N]

Baseline and best kept program, N times in turn with equal seeds that neither has had, each in a worktree of its own,
scored on the validation split and on the test split. Every look at the test split is noted in the session.
"""

import math
import sys

import numpy as np

from scripts import session
from scripts.judge import verdict
from scripts.run import experiment, plan, supervise
from scripts.run.notify import notify
from scripts.session import Refused, Session, counted, options, record, run_command, tell
from scripts.show import summary
from scripts.show.night import Night


def interval(differences):
    """(mean, half the width of its 95 % interval) of paired differences; nan where there is one alone."""
    n, half = len(differences), math.nan
    if n > 1:
        half = verdict.in_t(1.96, n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return float(np.mean(differences)), half


def main(args):
    sitting = Session(args.tag)
    held = experiment.begin(sitting)
    if not args.head:
        raise Refused("holdout needs git: it runs commits in worktrees of their own")
    night = Night(args.tag)
    first, best = night.first, night.best
    if not best:
        raise Refused("nothing was kept yet: make baseline")
    if first is best:
        raise Refused("the baseline is the best kept program: there is no gain to measure")
    seen = night.gain.gain
    used, looks = [*plan.seeds_of(sitting, first.blob), *plan.seeds_of(sitting, best.blob)], []
    before = sum(event["event"] == "holdout" for event in sitting.events())
    for number in range(args.runs or 3):
        seed, found = plan.unused(used), {}
        used.append(seed)
        for row in (first, best) if number % 2 == 0 else (best, first):
            attempt = experiment.run_once(sitting, held, "holdout", row.commit, args.head, seed)
            if attempt["status"] != "valid":
                print("\n".join(summary.failure(attempt)[:-1]))
                stopped = supervise.stopped_by
                sys.exit(128 + stopped[0] if stopped else experiment.EXIT[attempt["status"]])
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
