"""Fit DEPTH, TOTAL_BATCH_SIZE and DEVICE_BATCH_SIZE of train.py to this machine, its dataset and the budget.

Called by scripts/tune.sh. It times steps of the real train.py at a few sizes (bench.py, each in a process of its own).
The ladder below says which depth and step the tokens of a budget can feed; docs/tuning.md holds the measurements
behind it.
"""

import json
import math
import re
import sys
import time
from datetime import datetime

import mlx.core as mx
import numpy as np
import psutil

from harness import files, project
from harness.project import ROOT

if __name__ == "__main__":
    files.one_line_for("make tune")

import bench  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402
from harness import machine  # noqa: E402

DEPTHS = (2, 3, 4, 6, 8, 10, 12)
TIME_LIMIT = 150  # seconds after which no further size is timed
BUSY = 0.25  # share of the processor that others may use; above it nothing is fitted
MEMORY_SHARE = 2 / 3  # of what is free now; the rest is the system's

# --- the ladder ------------------------------------------------------------------------------------


def tokens_needed(parameters):
    """Tokens that a model must see to be worth its size. parameters: those in matrix products.

    A power law through what was measured: 5 M parameters (depth 4) lead from 8 M tokens on, 29 M (depth 8) equal 14 M
    (depth 6) at 107 M tokens, 54 M (depth 10) lead at 252 M, not at 65 M, and lead 91 M (depth 12) just at 163 M.
    """
    return 66e6 * (parameters / 29.4e6) ** 1.3


def step_size(tokens, sequence_length):
    """Tokens an optimizer step, a power of two, where a budget holds `tokens`: grows with their root.

    Best were 2^14 at 8 and 16 M tokens, 2^15 at 36 M, 2^16 at 107 and 252 M; half of that for short contexts (2^12
    at 4 and 6 M tokens of 256 a row).
    """
    power = 14 + 0.5 * (math.log2(tokens) - 23.6) - (sequence_length < 1024)
    return max(sequence_length, 2 ** round(min(max(power, 11), 17)))


def best_depth(tokens_of):
    """The deepest that its tokens can feed, else the shallowest. tokens_of: {depth: (tokens, parameters)}."""
    fed = [depth for depth, (tokens, parameters) in tokens_of.items() if tokens >= tokens_needed(parameters)]
    return max(fed, default=min(tokens_of))


SEEN_ONCE = {"depth": 6, "aspect_ratio": 96, "ngram_rows": 2**19}  # width 640


def is_seen_once(tokens, passes):
    """Whether SEEN_ONCE pays: tables of n-grams learn by heart, and what they learn serves where no text comes again.

    Measured on an H200 alone, at 80 M tokens (60 s) and 401 M (300 s), each 0.9 times through the text: 0.040 and 0.054
    ahead, with steps of 2^17. Other sizes, and what comes of a second pass, were not.
    """
    return 60e6 <= tokens <= 600e6 and passes <= 1.2


# --- this machine ----------------------------------------------------------------------------------


def size_of(depth, vocab_size, sequence_length):
    """(parameters in matrix products, FLOPs a token of training) of train.py's model at some depth.

    The parameters are matrices of the blocks and the head; the FLOPs are bench.flops_per_token's without windows.
    """
    width = train.GPTConfig(vocab_size=vocab_size, sequence_length=sequence_length, depth=depth).n_embd
    parameters = depth * (4 + 2 * train.MLP_RATIO) * width**2 + vocab_size * width
    return parameters, 6 * parameters + 12 * depth * width * sequence_length


def timed(depth, total, rows, **sizes):
    """bench.py's figures of train.py at a size, or {"why": …}."""
    options = {"depth": depth, "total": total, "rows": rows, "seconds": 2.0, "compiled": train.GPU, **sizes}
    return {"depth": depth, "total": total, "rows": rows, **bench.in_child(**options)}


def fits(size, limit_mb):
    return "why" not in size and size["train_peak_mb"] <= limit_mb


def climb(budget, vocab_size, sequence_length, limit_mb, deadline, measure=timed):
    """Time sizes until the ladder's choice is one that was timed. Returns (the choice or None, all that was timed).

    A size that was not timed counts as fast as its arithmetic makes it beside the last one that was. limit_mb: memory
    that training may take. Where not even one row fits, or the step fails, only shallower models are tried.
    """
    done, depths = [], DEPTHS
    sizes = {d: size_of(d, vocab_size, sequence_length) for d in DEPTHS}
    depth, tokens = min(DEPTHS, key=lambda d: abs(d - train.DEPTH)), 2**24
    while depths:
        total = step_size(tokens, sequence_length)
        rows = max(1, min(total, 2**16 if train.CUDA else 2**14) // sequence_length)
        done.append(size := measure(depth, total, rows))
        while not fits(size, limit_mb) and rows > 1:
            rows //= 2
            done.append(size := measure(depth, total, rows))
        if not fits(size, limit_mb):
            depths = [d for d in depths if d < depth]
            depth = max(depths, default=None)
            continue
        rates = {d: size["tok_sec"] * sizes[depth][1] / sizes[d][1] for d in depths}
        rates |= {other["depth"]: other["tok_sec"] for other in done if "tok_sec" in other and other["depth"] in depths}
        depth = best_depth({d: (budget * rates[d], sizes[d][0]) for d in depths})
        tokens = budget * rates[depth]
        chosen = [s for s in done if s["depth"] == depth and fits(s, limit_mb)]
        wanted = step_size(tokens, sequence_length)
        if any(s["total"] == wanted for s in chosen) or len(chosen) > 1 or time.monotonic() > deadline:
            return max(chosen or [size], key=lambda s: (s["total"] == wanted, s["tok_sec"])), done
    return None, done


# --- train.py and the record -----------------------------------------------------------------------


def epoch_tokens(dataset):
    """Tokens that an epoch serves: of a document in several pieces, its start and one more (batches.training_order)."""
    cache = prepare.TokenCache.load(dataset)
    return int(np.diff(cache.offsets("train"))[cache.pieces("train") <= 1].sum())


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
        tuning = files.read_json(path) or {}
        if (tuning.get("dataset"), tuning.get("budget")) == (dataset.name, budget):
            if all(tuning["device"].get(key) == device[key] for key in ("name", "memory_gb", "backend")):
                return path.name, tuning
    return None


def in_words(constants):
    return ", ".join(f"{name} = {value}" for name, value in constants.items())


def refuse_busy():
    """Exit with 2 where others use this machine now; what ran a moment ago, `make prepare` as well, does not count."""
    others = psutil.cpu_percent(interval=2.0) / 100
    if others > BUSY and not train.CUDA:
        presets = in_words({name: getattr(train, name) for name in ("DEPTH", "TOTAL_BATCH_SIZE", "DEVICE_BATCH_SIZE")})
        print(f"error: this machine is busy (others use {100 * others:.0f} % of its processor), so steps timed would "
              f"fit the load. Go on with {presets}, as train.py has them, or make tune when it is quiet",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)


def main():
    budget = project.settings()[0]
    dataset, device = prepare.get_dataset(train.DATASET), machine.describe()
    prepare.is_prepared(dataset) or sys.exit(prepare.not_prepared(dataset))
    path = ROOT / "train.py"
    if "--known" in sys.argv and (tuning := known(device, dataset, budget)):
        files.write_atomically(path, written(path.read_text(), tuning[1]["constants"]))
        print(f"tune     as found before, data/{tuning[0]}: {tuning[1]['why']}")
        return
    refuse_busy()
    free = mx.device_info().get("free_memory") or psutil.virtual_memory().available  # of a CUDA device, of the machine
    limit_mb = MEMORY_SHARE * free / 2**20
    vocab, length = dataset.vocab_size, dataset.sequence_length
    text_tokens = prepare.TokenCache.load(dataset).meta["train"]["tokens"]
    print(f"{device['name']} ({device['backend']}), {budget:g} s, {dataset.name} of {text_tokens / 1e6:,.1f} M tokens; "
          f"training may take {limit_mb:,.0f} MB")  # fmt: skip
    print("  DEPTH  TOTAL_BATCH_SIZE  DEVICE_BATCH_SIZE        tok/s   peak MB  text seen", flush=True)

    def measure(depth, total, rows, **sizes):
        size = timed(depth, total, rows, **sizes)
        if "why" not in size:
            size["passes"] = budget * size["tok_sec"] / text_tokens
        figures = size.get("why") or "{tok_sec:12,.0f} {train_peak_mb:9,.0f} {passes:8.2f} x".format(**size)
        print(f"  {depth:5} {total:17} {rows:18} {figures}", flush=True)
        return size

    start = time.monotonic()
    choice, done = climb(budget, vocab, length, limit_mb, start + TIME_LIMIT, measure)
    if choice is None:
        reasons = {str(size.get("why")).removeprefix("error: ") for size in done}
        why = reasons.pop() if len(reasons) == 1 else "no size fits this machine's free memory"
        sys.exit(f"error: {why}; train.py keeps its constants")
    more = {}
    if train.CUDA and is_seen_once(budget * choice["tok_sec"], budget * choice["tok_sec"] / epoch_tokens(dataset)):
        print("  with tables of n-grams, width 640:")
        rows = 64
        done.append(size := measure(total=2**17, rows=rows, **SEEN_ONCE))
        while not fits(size, limit_mb) and rows > 1:
            rows //= 2
            done.append(size := measure(total=2**17, rows=rows, **SEEN_ONCE))
        tokens = budget * size.get("tok_sec", 0)
        if fits(size, limit_mb) and is_seen_once(tokens, tokens / epoch_tokens(dataset)):
            choice, more = size, {"ASPECT_RATIO": SEEN_ONCE["aspect_ratio"], "NGRAM_ROWS": SEEN_ONCE["ngram_rows"]}
    constants = {"DEPTH": choice["depth"], "TOTAL_BATCH_SIZE": choice["total"], "DEVICE_BATCH_SIZE": choice["rows"]}
    constants |= more
    tokens, parameters = budget * choice["tok_sec"], size_of(choice["depth"], vocab, length)[0]
    why = (
        f"{budget:g} s are {tokens / 1e6:,.1f} M tokens in {tokens / choice['total']:,.0f} steps and see the text "
        f"{choice['passes']:.2f} times; depth {choice['depth']}, {parameters / 1e6:.1f} M parameters in products, "
        f"pays from {tokens_needed(parameters) / 1e6:,.1f} M tokens on"
    )
    if more:
        why = why.split("; depth")[0] + "; tables of n-grams pay where no text comes again, see docs/tuning.md"
    text, now = written(path.read_text(), constants), datetime.now().astimezone()
    tuning = {"format_version": 1, "timestamp": now.isoformat(timespec="seconds"), "device": device}
    tuning |= {"dataset": dataset.name, "budget": budget, "limit_mb": limit_mb, "text_tokens": text_tokens}
    tuning |= {"constants": constants, "why": why, "timed": done}
    archive = project.STORE / f"tune_{now:%Y%m%d_%H%M%S}.json"
    files.write_atomically(archive, json.dumps(tuning, indent=1))
    files.write_atomically(path, text)
    print(f"{why}\n{in_words(constants)} written to train.py; archived in data/{archive.name} "
          f"after {time.monotonic() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
