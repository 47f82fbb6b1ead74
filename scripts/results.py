"""Show a session's table: its rows with runs, spread and gain, and where it stands by all runs of each program.

usage: results.py --tag TAG
"""

import argparse
import math

import numpy as np
import session
import verdict
from session import Session, record, run_command, say


def show(args):
    sitting = Session(args.tag)
    sitting.link()
    rows, problems = sitting.rows()
    for problem in problems:
        say(f"note: {problem}")
    if not rows:
        print("no results yet: make baseline")
        return
    logged, like = sitting.logged(), newest_record(rows)
    sides = {row.number: verdict.side(row.blob, like) for row in rows if like and row.blob and row.status != "crash"}
    kept = [row for row in rows if row.status == "keep"]

    def mean(row):
        side = sides.get(row.number)
        return side[0].bpb if side and side[0].runs else row.bpb

    best = min(kept, key=mean) if kept else None
    print(f"{'':5} {'commit':8}{'val_bpb':>9} {'gain':>9} {'runs':>4} {'± run':>8} {'GB':>5} {'tok/s':>9} {'steps':>6}"
          f" {'+/-':>8}  {'status':8}description")  # fmt: skip
    before = None
    for row in rows:
        side, runs = sides.get(row.number) or (None, [])
        many = side is not None and side.runs > 1
        gain = f"{mean(before) - mean(row):+.6f}" if before and row.status != "crash" else ""
        spread = f"{np.std([side.bpbs[i] for i in side.used], ddof=1):.6f}" if many else ""
        steps = str(round(np.mean([r["training"]["total_steps"] for r in runs]))) if runs else ""
        event = logged.get(row.number) or {}
        overruled = event.get("verdict") in ("keep", "discard", "rerun") and event["verdict"] != row.status
        marks = ("*" if row is best else " ") + ("!" if overruled else " ") + ("b" if side and side.disturbed else " ")
        count = side.runs if side else ""
        figures = f"{mean(row):>9.6f} {gain:>9} {count:>4} {spread:>8} {row.memory:>5} {row.rate:>9}"
        print(f"{row.number:3}{marks:3}{row.commit:8}{figures} {steps:>6} {lines(row, before):>8}  {row.status:8}"
              f"{row.description}")  # fmt: skip
        if row.status == "keep":
            before = row
    if best:
        print(f"* best of {len(kept)} kept, {len(rows)} tried; ! the verdict was overruled; b the machine was shared")
        print(standing(kept[0], best, sides, like, mean))


def newest_record(rows):
    """The newest record of the last kept program that has any: what the others are compared with."""
    runs, blobs = list(record.archived()), [row.blob for row in rows if row.status == "keep" and row.blob]
    return next((run for blob in reversed(blobs) for run in reversed(runs) if run["train_blob"] == blob), None)


def lines(row, before):
    """Lines of code added and removed against the reference, as `+12/-3`."""
    if not before or not before.blob or not row.blob:
        return ""
    counted = (session.git("diff", "--numstat", before.blob, row.blob) or "").split()
    return f"+{counted[0]}/-{counted[1]}" if len(counted) > 1 else "+0/-0"


def standing(first, best, sides, like, mean):
    """The baseline against the best, by all runs of each."""
    words = f"standing: baseline {mean(first):.6f}, best {mean(best):.6f}, gain {mean(first) - mean(best):+.6f}"
    noise = record.noise(like, lambda run: not verdict.busy(run)) if like else None
    counts = [max(1, sides[row.number][0].runs) if row.number in sides else 1 for row in (first, best)]
    if noise and noise.df and first is not best:
        error = noise.bpb * math.sqrt(sum(1 / n for n in counts))
        return f"{words} ± {error:.6f} ({counts[0]} and {counts[1]} runs; noise of a run {noise.bpb:.6f})"
    return words + ("" if first is best else " (noise is unknown: make run REFERENCE=1 N=4)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", default="none")
    run_command(show, parser.parse_args())
