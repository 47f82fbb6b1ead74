"""Show a session's table: its rows with runs, spread and gain, and where it stands by all runs of each program.

usage: results.py --tag TAG [--all]
"""

import numpy as np

from scripts.judge import verdict
from scripts.session import Session, options, run_command, say, tags
from scripts.show.night import Night


def show(args):
    for number, tag in enumerate(tags() if args.all else [args.tag]):
        if args.all:
            print("\n" * (number > 0) + tag)
        else:
            Session(tag).link()
        table(Night(tag))


def table(night):
    for problem in night.problems:
        say(f"note: {problem}")
    if not night.experiments:
        print("no results yet: make baseline")
        return
    print(f"{'':6} {'commit':8}{'val_bpb':>9} {'gain':>9} {'runs':>4} {'± run':>8} {'GB':>5} {'tok/s':>9} {'steps':>6}"
          f" {'+/-':>8}  {'status':8}description")  # fmt: skip
    for e in night.experiments:
        gain = f"{e.gain:+.6f}" if e.before and e.status != "crash" else ""
        spread = f"{e.spread:.6f}" if e.count > 1 else ""
        steps = [r["training"]["total_steps"] for r in (e.runs[i] for i in e.side.used)] if e.runs else []
        steps = str(round(np.mean(steps))) if steps else ""
        changed = f"+{e.added}/-{e.removed}" if e.before and e.blob in night.texts else ""
        shared = e.runs and all(map(verdict.busy, e.runs))
        how = "p" if e.event.get("pairs") else "b" if shared else " "
        marks = ("*" if e is night.best else " ") + (e.mark or " ") + how
        figures = f"{e.bpb:>9.6f} {gain:>9} {e.count or '':>4} {spread:>8} {e.memory:>5} {e.rate:>9.0f}"
        print(f"{e.number:3}{marks:4}{e.commit:8}{figures} {steps:>6} {changed:>8}  {e.status:8}{e.description}")
    if night.best:
        tried = len(night.experiments)
        print(f"* best of {len(night.kept)} kept, {tried} tried; ! verdict overruled; ? undecided; b shared machine; "
              "p gain by pairs")  # fmt: skip
        print(standing(night))


def standing(night):
    """The baseline against the best, by all runs of each."""
    first, best = night.first, night.best
    gain, half = night.gain
    words = f"standing: baseline {first.bpb:.6f}, best {best.bpb:.6f}, gain {gain:+.6f}"
    if night.noise.df and first is not best:
        runs = f"{max(1, first.count)} and {max(1, best.count)} runs, 95 %; noise of a run {night.noise.bpb:.6f}"
        return f"{words} ± {half:.6f} ({runs})"
    return words + ("" if first is best else night.typed(" (noise is unknown: make run REFERENCE=1 N=4)"))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--all", action="store_true", help="of every session of this clone")
    run_command(show, parser.parse_args())
