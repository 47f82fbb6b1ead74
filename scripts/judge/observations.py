"""What the model of evidence takes from records: what disturbed each run, and which runs stood under the same load."""

import math

from harness import record
from scripts.judge.evidence import Observation

# How much of the cores others may use, by backend: a GPU's host needs few of them.
OTHERS = {"cpu": lambda cores: 0.05 * cores, "metal": lambda cores: 0.5 * cores, "cuda": lambda cores: cores - 2}
EVEN = 0.05  # share of the cores by which the use of others may vary up and down, and it is the same load
UNEVEN = 2.0  # times the median step: how long the slowest twentieth may take
SWAPPED = 256  # MB, moved to disk during the budget


def busy(run):
    """What disturbed a run, in words, or None. run: a record."""
    seen = run.get("machine") or {}
    others, cores, steps = seen.get("other_cores"), seen.get("cores") or 1, seen.get("step_ms")
    if (stood := seen.get("paused_seconds") or 0) > 0.01 * run["budget"]:
        return f"it stood still for {stood:.0f} s"
    if others is not None and others > max(0.05, OTHERS[run["device"].get("backend", "cpu")](cores)):
        return f"other processes used {others:.1f} of {cores} cores"
    if steps and steps[2] > UNEVEN * steps[1]:
        return f"steps were uneven: the slowest twentieth took over {steps[2] / steps[1]:.1f} times the median"
    if (seen.get("swapped_mb") or 0) > SWAPPED:
        return f"{seen['swapped_mb']} MB were swapped to disk"
    return None


def load(run):
    """The share of the cores that others used, where that disturbed a run; nan where something else did; else None."""
    why = busy(run)
    if not why:
        return None
    return run["machine"]["other_cores"] / run["machine"]["cores"] if why.startswith("other processes") else math.nan


def slots(loads, pairs):
    """The slot of each run, see `Observation`. loads: as `load` tells; pairs: what the runs of a pair share, or None.

    Disturbed runs one after another, beside a load that stays within EVEN, share a slot. So do the two of a pair, for
    they were made in turn.
    """
    found, first, ends = [], None, {}
    for i, (load, pair) in enumerate(zip(loads, pairs, strict=True)):
        if load is None:
            first = None
        elif first is None or not abs(load - loads[first]) <= EVEN:
            first = ends.get(pair, i)
        found.append(first)
        if load is not None and pair is not None:
            ends[pair] = first
    return found


def of_session(attempts, rows, like):
    """(records, observations) of all runs of a session that may be compared with the record `like`, oldest first.

    Runs of `make holdout` are left out: they measure anew what the session found. A row whose program has no record
    counts as one run with the row's figures, under the program's name or, without git, `row N`.
    """
    archive = {r["run_id"]: r for r in record.archived()} | ({like["run_id"]: like} if like else {})
    made = [a for a in attempts if a["status"] == "valid" and a["role"] != "holdout" and a.get("run_id") in archive]
    pairs = {a["run_id"]: a["pair"] for a in made}
    records = [archive[run_id] for run_id in pairs if like and not record.differences(archive[run_id], like)]
    records = records or ([like] if like else [])
    where = slots([load(r) for r in records], [pairs.get(r["run_id"]) for r in records])
    known = {r["train_blob"] for r in records}
    found = [Observation(row.blob or f"row {row.number}", -row.number, None, row.bpb, row.rate)
             for row in rows if row.status != "crash" and row.blob not in known]  # fmt: skip
    return records, found + [Observation(r["train_blob"], r["seed"], slot, record.bpb(r), record.tok_sec(r))
                             for r, slot in zip(records, where, strict=True)]  # fmt: skip
