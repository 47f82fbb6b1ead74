"""Fit sizes of train.py (see CONSTANTS) to this machine, its dataset and the budget.

Called by scripts/tune.sh. It times steps of the real train.py at a few sizes (bench.py, each in a process of its own).
The ladder below says which depth and step the tokens of a budget can feed; docs/tuning.md holds the measurements
behind it.
"""

import math
import re
import sys

import mlx.core as mx
import numpy as np
import psutil

import bench
import prepare
import train
from harness import files, machine, project
from harness.project import ROOT
from scripts.run.experiment import of_group

DEPTHS = (2, 3, 4, 6, 8, 10, 12)
BUSY = 0.25  # share of the processor that others may use; above it nothing is fitted, but on CUDA
MEMORY_SHARE = 2 / 3  # of what is free now; the rest is the system's

# --- the ladder ------------------------------------------------------------------------------------


def tokens_needed(parameters):
    """Tokens that a model must see to be worth its size. parameters: those in matrix products."""
    return 66e6 * (parameters / 29.4e6) ** 1.3


def step_size(tokens, sequence_length):
    """Tokens an optimizer step, a power of two, where a budget holds `tokens`: grows with their root."""
    power = 14 + 0.5 * (math.log2(tokens) - 23.6) - (sequence_length < 1024)
    return max(sequence_length, 2 ** round(min(max(power, 11), 17)))


def best_depth(tokens_of):
    """The deepest that its tokens can feed, else the shallowest. tokens_of: {depth: (tokens, parameters)}."""
    fed = [depth for depth, (tokens, parameters) in tokens_of.items() if tokens >= tokens_needed(parameters)]
    return max(fed, default=min(tokens_of))


ONCE = 1.2  # epochs: tables of n-grams learn by heart, and that serves where no text comes again
PAYS = 0.8  # share of throughput that they must leave: they are worth a quarter more tokens


def with_tables(choice, tokens):
    """Sizes with tables of n-grams, to be tried in turn, where a budget holds `tokens`. choice: the ladder's."""
    if not train.GPU or of_group() or choice["epochs"] > ONCE or not 5e6 <= tokens <= 600e6:
        return []
    large = {"depth": 6, "aspect_ratio": 96, "total": 2**17, "rows": 64, "ngram_rows": 2**19}  # width 640
    small = {key: choice[key] for key in ("depth", "total", "rows")} | {"ngram_rows": 2**17 if tokens < 12e6 else 2**18}
    return [large, small] if train.CUDA and tokens >= 60e6 else [small]


# --- this machine ----------------------------------------------------------------------------------


def size_of(depth, vocab_size, sequence_length):
    """(parameters in matrix products, FLOPs a token of training) of train.py's model at some depth.

    The parameters are matrices of the blocks and the head; the FLOPs are as PaLM counts them (arXiv:2204.02311,
    appendix B), with every layer over all its context.
    """
    width = train.GPTConfig(vocab_size=vocab_size, sequence_length=sequence_length, depth=depth).n_embd
    parameters = depth * (4 + 2 * train.MLP_RATIO) * width**2 + vocab_size * width
    return parameters, 6 * parameters + 12 * depth * width * sequence_length


def timed(measure, limit_mb, done, rows, **size):
    """A size, timed with as many rows at once as fit, at most `rows`, or None. All that was timed joins `done`."""
    while rows:
        done.append(measure(rows=rows, **size))
        if "why" not in done[-1] and done[-1]["train_peak_mb"] <= limit_mb:
            return done[-1]
        rows //= 2
    return None


def climb(budget, vocab_size, sequence_length, limit_mb, measure):
    """Time sizes until the ladder's choice is one that was timed. Returns (the choice or None, all that was timed).

    A size that was not timed counts as fast as its arithmetic makes it beside the last one that was. limit_mb: memory
    that training may take; where not even one row fits, or the step fails, only shallower models are tried.
    measure(depth, total, rows): those and bench.py's figures, or "why" there are none.
    """
    done, fitting, depths = [], [], DEPTHS
    sizes = {d: size_of(d, vocab_size, sequence_length) for d in DEPTHS}
    depth, tokens = min(DEPTHS, key=lambda d: abs(d - train.DEPTH)), 2**24
    while depths:
        total = step_size(tokens, sequence_length)
        rows = max(1, min(total, 2**16 if train.CUDA else 2**14) // sequence_length)
        size = timed(measure, limit_mb, done, rows, depth=depth, total=total)
        if not size:
            depths = [d for d in depths if d < depth]
            depth = max(depths, default=None)
            continue
        fitting.append(size)
        rates = {d: size["tok_sec"] * sizes[depth][1] / sizes[d][1] for d in depths}
        rates |= {s["depth"]: s["tok_sec"] for s in fitting}
        depth = best_depth({d: (budget * rates[d], sizes[d][0]) for d in depths})
        tokens = budget * rates[depth]
        chosen = [s for s in fitting if s["depth"] == depth]
        wanted = step_size(tokens, sequence_length)
        if any(s["total"] == wanted for s in chosen) or len(chosen) > 1:
            return max(chosen, key=lambda s: (s["total"] == wanted, s["tok_sec"])), done
    return None, done


# --- train.py and the record -----------------------------------------------------------------------

CONSTANTS = {"DEPTH": "depth", "TOTAL_BATCH_SIZE": "total", "DEVICE_BATCH_SIZE": "rows"}
CONSTANTS |= {"ASPECT_RATIO": "aspect_ratio", "NGRAM_ROWS": "ngram_rows"}  # where tables of n-grams pay


def written(text, constants):
    """train.py's text with {name: value} in place of its own lines; each must be there once."""
    for name, value in constants.items():
        shown = f"2**{value.bit_length() - 1}" if value >= 2**11 and value & (value - 1) == 0 else value
        text, count = re.subn(rf"^({name} = )[^#\n]*?( *#.*)?$", rf"\g<1>{shown}\g<2>", text, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"error: train.py has {count} lines of the form {name} = …, so nothing was written")
    return text


def in_words(constants):
    return ", ".join(f"{name} = {value}" for name, value in constants.items())


def fit(budget, dataset, epoch):
    """Time sizes, in a table; returns (the choice, all that was timed). Exits where none can be had."""
    others = (machine.allowed(lambda: psutil.cpu_percent(interval=2.0)) or 0.0) / 100  # now: what just ran is over
    if others > BUSY and not train.CUDA:
        presets = in_words({name: getattr(train, name) for name in list(CONSTANTS)[:3]})
        sys.exit(f"error: this machine is busy (others use {100 * others:.0f} % of its processor), so steps timed "
                 f"would fit the load. Go on with {presets}, or make tune when it is quiet")  # fmt: skip
    free = mx.device_info().get("free_memory") or machine.allowed(lambda: psutil.virtual_memory().available) or 2**32
    limit_mb = MEMORY_SHARE * free / 2**20
    print(f"{dataset.name}, {budget:g} s; training may take {limit_mb:,.0f} MB")
    print("  DEPTH  TOTAL_BATCH_SIZE  DEVICE_BATCH_SIZE        tok/s   peak MB   epochs", flush=True)

    def measure(**size):
        size |= bench.in_child(**size, seconds=2.0, compiled=train.GPU)
        if "why" not in size:
            size["epochs"] = budget * size["tok_sec"] / epoch
        figures = size.get("why") or "{tok_sec:12,.0f} {train_peak_mb:9,.0f} {epochs:8.2f}".format(**size)
        tables = "  with tables of n-grams" if "ngram_rows" in size else ""
        print("  {depth:5} {total:17} {rows:18} {0}{1}".format(figures, tables, **size), flush=True)
        return size

    choice, done = climb(budget, dataset.vocab_size, dataset.sequence_length, limit_mb, measure)
    if choice is None:
        why = done[-1].get("why", "not one row fits into this machine's free memory").removeprefix("error: ")
        sys.exit(f"error: {why}; train.py keeps its constants")
    for tried in with_tables(choice, budget * choice["tok_sec"]):
        size = timed(measure, limit_mb, done, **tried)
        if size and size["epochs"] <= ONCE and size["tok_sec"] >= PAYS * choice["tok_sec"]:
            return size, done
    return choice, done


def main():
    budget, dataset, path = project.settings()[0], prepare.get_dataset(train.DATASET), ROOT / "train.py"
    if getattr(train, "NGRAM_ROWS", 0):
        sys.exit("error: train.py has tables of n-grams already, and sizes are fitted without: NGRAM_ROWS = 0 and "
                 "ASPECT_RATIO as it was, then make tune")  # fmt: skip
    cache = prepare.TokenCache.load(dataset)
    epoch = int(np.diff(cache.offsets("train"))[cache.pieces("train") <= 1].sum())  # see batches.training_order
    name, tuning = bench.last_archive("tune", dataset=dataset.name, budget=budget, epoch=epoch)
    if "--known" in sys.argv and tuning:
        files.write_atomically(path, written(path.read_text(), tuning["constants"]))
        print(f"tune     as found before, data/{name}: {tuning['why']}")
        return
    choice, done = fit(budget, dataset, epoch)
    constants = {constant: choice[key] for constant, key in CONSTANTS.items() if key in choice}
    tokens = budget * choice["tok_sec"]
    why = (
        f"{budget:g} s are {tokens / 1e6:,.1f} M tokens in {tokens / choice['total']:,.0f} steps and "
        f"{choice['epochs']:.2f} epochs (docs/tuning.md)"
    )
    text = written(path.read_text(), constants)
    same = {"dataset": dataset.name, "budget": budget, "epoch": epoch}
    archive = bench.archive("tune", **same, constants=constants, why=why, timed=done)
    files.write_atomically(path, text)
    print(f"{why}\n{in_words(constants)} written to train.py; archived in data/{archive}")


if __name__ == "__main__":
    main()
