"""The night's gain, measured anew, on text that nobody selected on.

usage: holdout.py --tag TAG --head COMMIT [--runs N]

Baseline and best kept program, N times in turn with equal seeds that neither has had, each in a worktree of its own,
scored on the validation split and on the test split. Every look at the test split is noted in the session.
"""

import sys

from scripts import session
from scripts.judge.evidence import Evidence, Observation, gain_words
from scripts.judge.observations import busy
from scripts.run import experiment, plan, supervise
from scripts.session import Refused, Session, counted, options, record, run_command, tell
from scripts.show import summary
from scripts.show.night import Night


def measured_anew(night, looks):
    """`Comparison` of best and baseline by fresh runs alone; how noisy runs are is known from the whole session.

    looks: of each pair (seed, whether the machine was shared, bits per byte of the baseline, of the best).
    """
    runs = list(night.evidence.runs)
    for number, (seed, shared, *bpbs) in enumerate(looks):
        slot = f"look {number}" if shared else None
        runs += [Observation(("anew", i), seed, slot, bpb, 1.0) for i, bpb in enumerate(bpbs)]
    return Evidence(runs).compare(("anew", 1), ("anew", 0))


def main(args):
    sitting = Session(args.tag)
    held = experiment.begin(sitting)
    night = Night(args.tag)
    first, best = night.first, night.best
    if not (args.head and best):
        raise Refused("nothing was kept yet, or not with git: make baseline")
    if first is best:
        raise Refused("the baseline is the best kept program: there is no gain to measure")
    used, looks = [*plan.seeds_of(sitting, first.blob), *plan.seeds_of(sitting, best.blob)], []
    for number in range(args.runs or 3):
        seed, bpbs, shared = plan.unused(used), {}, False
        used.append(seed)
        for row in (first, best) if number % 2 == 0 else (best, first):
            attempt = experiment.run_once(sitting, held, "holdout", row.commit, args.head, seed)
            if attempt["status"] != "valid":
                print("\n".join(summary.failure(attempt)[:-1]))
                stopped = supervise.stopped_by
                sys.exit(128 + stopped[0] if stopped else experiment.EXIT[attempt["status"]])
            run = session.record_of(attempt)
            bpbs[row.commit], shared = (record.bpb(run), attempt["test"]["bpb"]), shared or bool(busy(run))
        looks.append([(seed, shared, *both) for both in zip(bpbs[first.commit], bpbs[best.commit], strict=True)])
        validation, test = (a - b for a, b in zip(bpbs[first.commit], bpbs[best.commit], strict=True))
        tell(f"pair {number + 1}  seed {seed}: gain {validation:+.6f} on validation, {test:+.6f} on test")
    seen, (fresh, test) = night.gain, (measured_anew(night, column) for column in zip(*looks, strict=True))
    pair = {"baseline": first.commit, "best": best.commit, "pairs": len(looks)}
    sitting.note("holdout", **pair, night=seen.gain, fresh=[fresh.gain, fresh.error], test=[test.gain, test.error])
    told = [f"baseline {first.commit} against best {best.commit}, bits per byte, with standard errors:",
            f"  as the night saw it, on validation  {gain_words(seen)}",
            f"  fresh runs, on validation           {gain_words(fresh)}",
            f"  fresh runs, on test                 {gain_words(test)}",
            f"the test split was looked at {counted(len(night.looks) + 1, 'time')} in this session"]  # fmt: skip
    print("\n".join(told), flush=True)
    experiment.notify("\n".join(told))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--head", default="", help="the checked-out commit")
    parser.add_argument("--runs", type=int, default=0, help="pairs of runs")
    run_command(main, parser.parse_args())
