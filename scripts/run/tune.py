"""Fit DEPTH, TOTAL_BATCH_SIZE and DEVICE_BATCH_SIZE of train.py to this machine, its dataset and the budget.

Called by scripts/tune.sh. Steps of the real train.py are timed at a few depths (bench.py, each in a process of its
own); the ladder below says which depth and which step the tokens of a budget can feed. docs/tuning.md holds the
measurements that it stands on.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import mlx.core as mx

from harness import files, project
from harness.project import ROOT

if __name__ == "__main__":
    files.one_line_for("make tune")

import bench  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402
from harness import machine  # noqa: E402

DEPTHS = (2, 3, 4, 6, 8, 10, 12)
TIME_LIMIT = 150  # seconds; no further size is timed after it
BUSY = 0.4  # load per core above which nothing is fitted
MEMORY_SHARE = 2 / 3  # of what is free now; the rest is the system's


# --- the ladder ------------------------------------------------------------------------------------


def tokens_needed(parameters):
    """Tokens that a model must see to be worth its size. parameters: those that take part in products.

    A power law that keeps what was measured: 5 M parameters (depth 4) are ahead of fewer from 8 M tokens on, 29 M
    (depth 8) level with 14 M (depth 6) at 107 M tokens, 54 M (depth 10) ahead of them at 252 M, not at 65 M, and
    just ahead of 91 M (depth 12) at 163 M.
    """
    return 66e6 * (parameters / 29.4e6) ** 1.3


def step_size(tokens, sequence_length):
    """Tokens an optimizer step, a power of two, where a budget holds `tokens`: about its root.

    Best were 2^14 at 8 and 16 M tokens, 2^15 at 36 M, 2^16 at 107 and 252 M. For short contexts half of that (2^12
    at 4 and 6 M tokens of 256 a row).
    """
    power = 14 + 0.5 * (math.log2(tokens) - 23.6) - (sequence_length < 1024)
    return 2 ** round(min(max(power, 11), 17))


def best_depth(tokens_of):
    """The deepest that its tokens can feed, else the shallowest. tokens_of: {depth: (tokens, parameters)}."""
    fed = [depth for depth, (tokens, parameters) in tokens_of.items() if tokens >= tokens_needed(parameters)]
    return max(fed, default=min(tokens_of))


# --- this machine ----------------------------------------------------------------------------------


def size_of(depth, vocab_size, sequence_length):
    """Of train.py's model at some depth: its parameters that take part in products (matrices of the blocks and the
    head, without lookups and scalars), and the FLOPs of training on one token, as bench.flops_per_token counts them if
    every layer looks over all its context.
    """
    width = train.GPTConfig(vocab_size=vocab_size, sequence_length=sequence_length, depth=depth).n_embd
    parameters = depth * (4 + 2 * train.MLP_RATIO) * width**2 + vocab_size * width
    return parameters, 6 * parameters + 12 * depth * width * sequence_length


def free_memory():
    """Bytes that may be used without taking them from other programs, or None where it cannot be told."""
    info = mx.device_info()
    if "free_memory" in info:  # CUDA
        return info["free_memory"]
    if sys.platform == "darwin":
        text = subprocess.run(["vm_stat"], capture_output=True, text=True).stdout
        page = re.search(r"page size of (\d+) bytes", text)
        kinds = re.findall(r"Pages (?:free|inactive|speculative|purgeable): +(\d+)", text)
        return int(page.group(1)) * sum(map(int, kinds)) if page and kinds else None
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        return 1024 * int(found.group(1)) if found else None
    except OSError:
        return None


def timed(depth, total, rows):
    """bench.py's figures of train.py at a size, or {"why": …}."""
    options = {"depth": depth, "total": total, "rows": rows, "seconds": 2.0, "compiled": train.GPU}
    return {"depth": depth, "total": total, "rows": rows, **bench.in_child(left=120, **options)}


def climb(budget, vocab_size, sequence_length, limit_mb, deadline, measure=timed):
    """Time sizes until the ladder's choice is one that was timed. Returns (the choice or None, all that was timed).

    A size that was not timed is taken to be as fast as arithmetic makes it beside one that was. limit_mb: memory
    that training may take; what takes more, or fails, is passed over for the next shallower.
    """
    done, barred, depth = [], len(DEPTHS), min(DEPTHS, key=lambda d: abs(d - train.DEPTH))
    sizes = {d: size_of(d, vocab_size, sequence_length) for d in DEPTHS}
    tokens = 2**24
    while True:
        total = max(step_size(tokens, sequence_length), sequence_length)
        rows = max(1, min(total, 2**16 if train.CUDA else 2**14) // sequence_length)
        found = measure(depth, total, rows)
        while not fits(found, limit_mb) and rows > 1:
            rows //= 2
            done.append(found)
            found = measure(depth, total, rows)
        done.append(found)
        if not fits(found, limit_mb):
            barred = DEPTHS.index(depth)
            if not barred:
                return None, done
            depth = DEPTHS[barred - 1]
            continue
        speed = budget * found["tok_sec"] * sizes[depth][1]
        tokens_of = {d: (speed / sizes[d][1], sizes[d][0]) for d in DEPTHS[:barred]}
        for other in done:
            if other["depth"] in tokens_of and "tok_sec" in other:
                tokens_of[other["depth"]] = (budget * other["tok_sec"], tokens_of[other["depth"]][1])
        best = best_depth(tokens_of)
        tokens = tokens_of[best][0]
        chosen = [f for f in done if f["depth"] == best and fits(f, limit_mb)]
        wanted = max(step_size(tokens, sequence_length), sequence_length)
        if any(f["total"] == wanted for f in chosen) or time.monotonic() > deadline or len(chosen) > 1:
            choice = max(chosen or [found], key=lambda f: (f["total"] == wanted, f["tok_sec"]))
            return choice, done
        depth = best


def fits(found, limit_mb):
    return "why" not in found and found["train_peak_mb"] <= limit_mb


# --- train.py and the record -----------------------------------------------------------------------


def written(text, constants):
    """train.py's text with {name: value} in place of its own lines; each must be there once."""
    for name, value in constants.items():
        shown = f"2**{value.bit_length() - 1}" if name == "TOTAL_BATCH_SIZE" and value & (value - 1) == 0 else value
        text, count = re.subn(rf"^({name} = )[^#\n]*?( *#.*)?$", rf"\g<1>{shown}\g<2>", text, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"error: train.py has {count} lines of the form {name} = …, so nothing was written")
    return text


def known(device, dataset, budget):
    """(file name, content) of the newest archived tuning of this machine, dataset and budget; None without one."""
    for path in sorted(project.STORE.glob("tune_*.json"), reverse=True):
        found = files.read_json(path) or {}
        if (found.get("dataset"), found.get("budget")) == (dataset.name, budget):
            if all(found["device"].get(key) == device[key] for key in ("name", "memory_gb", "backend")):
                return path.name, found
    return None


def main():
    budget = project.settings()[0]
    dataset, device = prepare.get_dataset(train.DATASET), machine.describe()
    prepare.is_prepared(dataset) or sys.exit(prepare.not_prepared(dataset))
    path = ROOT / "train.py"
    if "--known" in sys.argv and (found := known(device, dataset, budget)):
        files.write_atomically(path, written(path.read_text(), found[1]["constants"]))
        print(f"tune     as found before, data/{found[0]}: {found[1]['why']}")
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores and not train.CUDA:
        print(f"error: this machine is busy (load {load:.1f} on {cores} cores): what is timed now would fit the load, "
              "not the machine; make tune when it is quiet", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    free = free_memory()
    limit_mb = MEMORY_SHARE * free / 2**20 if free else math.inf
    vocab, length = dataset.vocab_size, dataset.sequence_length
    print("{name} ({backend}), {budget:g} s, {dataset}; training may take {limit:,.0f} MB".format(
        **device, budget=budget, dataset=dataset.name, limit=limit_mb))  # fmt: skip
    print(f"  {'DEPTH':>5} {'TOTAL_BATCH_SIZE':>17} {'DEVICE_BATCH_SIZE':>18} {'tok/s':>12} {'peak MB':>9}", flush=True)

    def measure(depth, total, rows):
        found = timed(depth, total, rows)
        told = found.get("why") or "{tok_sec:12,.0f} {train_peak_mb:9,.0f}".format(**found)
        print(f"  {depth:5} {total:17} {rows:18} {told}", flush=True)
        return found

    start = time.monotonic()
    choice, done = climb(budget, vocab, length, limit_mb, start + TIME_LIMIT, measure)
    if choice is None:
        why = {str(found.get("why")).removeprefix("error: ") for found in done}
        why = why.pop() if len(why) == 1 else "no size fits this machine's free memory"
        sys.exit(f"error: {why}; train.py keeps its constants")
    constants = {"DEPTH": choice["depth"], "TOTAL_BATCH_SIZE": choice["total"], "DEVICE_BATCH_SIZE": choice["rows"]}
    tokens, parameters = budget * choice["tok_sec"], size_of(choice["depth"], vocab, length)[0]
    needed = tokens_needed(parameters) / 1e6
    why = (
        f"{budget:g} s are {tokens / 1e6:,.1f} M tokens in {tokens / choice['total']:,.0f} steps; depth "
        f"{choice['depth']}, {parameters / 1e6:.1f} M parameters in products, pays from {needed:,.1f} M tokens on"
    )
    text = written(path.read_text(), constants)
    now = datetime.now().astimezone()
    found = {"format_version": 1, "timestamp": now.isoformat(timespec="seconds"), "device": device, "load": load}
    found |= {"dataset": dataset.name, "budget": budget, "limit_mb": limit_mb if free else None}
    found |= {"constants": constants, "why": why, "timed": done}
    archive = project.STORE / f"tune_{now:%Y%m%d_%H%M%S}.json"
    files.write_atomically(archive, json.dumps(found, indent=1))
    files.write_atomically(path, text)
    print(why)
    print(*(f"{name} = {value}" for name, value in constants.items()), sep=", ", end=" ")
    print(f"written to train.py; archived in data/{archive.name} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
