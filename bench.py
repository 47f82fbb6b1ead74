"""Profile of the present train.py on the present machine: throughput, memory, and where the time of a step goes.

    python bench.py        (or `make bench`)

It measures train.py's own model, optimizer and step, and prepare.py's own batches and evaluation. It prints a table,
and a line for each figure that moved by more than 5 % since the last bench of this machine and dataset. The profile
is archived in data/bench_*.json. It takes less than a minute, and longer on a slow machine.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from datetime import datetime
from functools import partial

import mlx.core as mx
import numpy as np
import psutil
from mlx.utils import tree_flatten

import prepare
from harness import batches, files, machine, model_state, project

if __name__ == "__main__":
    files.one_line_for("make bench")

import train  # noqa: E402

CHILD_LIMIT = 120  # seconds for a size that `make tune` tries

FIGURES = {  # name: (label, unit, decimals)
    "step_ms": ("one step, as in training", "ms", 2),
    "data_ms": ("  of it stalled, waiting for batches", "ms", 2),
    "gradients_ms": ("  of it loss and gradients", "ms", 2),
    "update_ms": ("  of it the update", "ms", 2),
    "tok_sec": ("throughput of training", "tok/s", 0),
    "train_peak_mb": ("peak memory of training", "MB", 0),
    "model_tflops": ("arithmetic of the model in training", "TFLOP/s", 3),
    "peak_tflops": ("matrix products of this machine, measured", "TFLOP/s", 3),
    "peak_share": ("share of that peak", "%", 1),
    "eval_seconds": ("evaluation, projected to all its rows, without checks", "s", 2),
    "eval_peak_mb": ("peak memory of evaluation", "MB", 0),
}


def median_seconds(work, seconds=2.0):
    """Of `work`, which evaluates all that it makes; called once before, to warm up."""
    work()
    marks = [time.perf_counter()]
    while len(marks) < 2 or (marks[-1] - marks[0] < seconds and len(marks) < 20):
        work()
        marks.append(time.perf_counter())
    return np.median(np.diff(marks))


class Training:
    """train.py's model and trainer with `rows` rows at once, and `figures` of steps made for `seconds`.

    total: tokens a step, TOTAL_BATCH_SIZE unless given; options: for train.build.
    """

    def __init__(self, rows, seconds, total=None, **options):
        self.dataset = prepare.get_dataset(train.DATASET)
        length, total = self.dataset.sequence_length, total or train.TOTAL_BATCH_SIZE
        self.tokenizer, self.cache = prepare.Tokenizer.load(self.dataset), prepare.TokenCache.load(self.dataset)
        stream = prepare.Batches(self.cache, rows, length, seed=42)
        self.micro_batches = [next(stream) for _ in range(batches.cut_step(total, rows, length)[1])]
        mx.random.seed(42)
        self.config, self.trainer = train.build(self.tokenizer.vocab_size, length, **options)
        with model_state.kept(self.trainer.state):  # compile, as a run does before its clock starts
            mx.eval(self.trainer.step(self.micro_batches))
        pending, ends, waited = None, [], stream.wait_seconds  # a loss is read during the next step, as in a run
        while len(ends) < 2 or (ends[-1] - ends[0] < seconds and len(ends) < 50):
            self.trainer.optimizer.schedule(len(ends), 0.0)
            loss = self.trainer.step([next(stream) for _ in self.micro_batches])
            if pending is not None:
                pending.item()
                ends.append(time.perf_counter())
            pending = loss
        mx.eval(pending, self.trainer.state)
        step, waited = np.median(np.diff(ends)), (stream.wait_seconds - waited) / (len(ends) + 1)
        self.figures = {"step_ms": 1e3 * step, "data_ms": 1e3 * waited, "tok_sec": total / step}
        self.figures["train_peak_mb"] = mx.get_peak_memory() / 2**20

    def parts(self):
        trainer, gradients = self.trainer, self.trainer.gradients(self.micro_batches)
        return {
            "gradients_ms": 1e3 * median_seconds(lambda: mx.eval(trainer.gradients(self.micro_batches))),
            "update_ms": 1e3 * median_seconds(lambda: mx.eval(trainer.update(*gradients), trainer.state)),
        }

    def attention(self):
        """Which passes of MLX's attention are fused, in words: the others hold the scores of all pairs of positions."""
        config, shape = self.config, (1, self.config.n_head, self.config.sequence_length, self.config.head_dim)
        q, k, v = (mx.random.normal(shape).astype(train.COMPUTE_DTYPE) for _ in range(3))
        attend = partial(mx.fast.scaled_dot_product_attention, scale=config.head_dim**-0.5, mask="causal")
        fused = {"forward": True, "backward": True}
        try:
            mx.eval(q, k, v, attend(q, k, v, force_fused=True))
        except ValueError:
            fused["forward"] = False
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.vjp(attend, [q, k, v], [q]))
        fused["backward"] = fused["forward"] and mx.get_peak_memory() - before < 2 * shape[1] * shape[2] ** 2
        return ", ".join(f"{way} {'fused' if yes else 'not fused'}" for way, yes in fused.items())

    def evaluation(self, batches=4):
        """Projected from some batches a stream; the checks of prepare.py come on top of it."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        rows, at_once = prepare.evaluation_rows(self.cache, self.dataset), train.EVAL_BATCH_SIZE
        packing, part = time.perf_counter() - start, rows[: batches * at_once * len(self.trainer.streams)]
        taken = median_seconds(lambda: prepare.score_rows(self.trainer.model, part, self.tokenizer, at_once))
        return {"eval_seconds": packing + taken * len(rows) / len(part), "eval_peak_mb": mx.get_peak_memory() / 2**20}

    def arithmetic(self):
        """The model's FLOP/s in training, and what large square products reach with all streams at work."""
        n = 8192 if train.CUDA else 4096 if train.GPU else 1024
        lanes = self.trainer.streams * max(2, 8 // len(self.trainer.streams))
        a = mx.random.normal((n, n)).astype(train.COMPUTE_DTYPE)
        taken = median_seconds(lambda: mx.eval([mx.matmul(a, a, stream=stream) for stream in lanes]), 1.0)
        peak = len(lanes) * 2 * n**3 / taken / 1e12
        model = self.figures["tok_sec"] * flops_per_token(self.config, self.trainer.model.parameters()) / 1e12
        return {"model_tflops": model, "peak_tflops": peak, "peak_share": 100 * model / peak}


def flops_per_token(config, parameters):
    """FLOPs of training on one token, as PaLM counts them (arXiv:2204.02311, appendix B): 6 N + Σ 12 · width · window.

    N: parameters in matrix products, which is all matrices but embeddings. Σ: over layers, as if each query saw the
    whole window. Work done a second time is not counted.
    """
    matrices = {path: p for path, p in tree_flatten(parameters) if p.ndim > 1}
    looked_up = "embeddings", "ngrams"
    in_products = sum(p.size for path, p in matrices.items() if train.parameter_group(path, p) not in looked_up)
    return 6 * in_products + sum(12 * config.n_embd * config.window(layer) for layer in range(config.depth))


def in_child(**options):
    """Figures of `Training` from a process of its own, which may run out of memory or time: then {"why": …}."""
    command = [sys.executable, __file__, "--only", json.dumps(options)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_LIMIT)
    except subprocess.TimeoutExpired:
        return {"why": f"skipped after {CHILD_LIMIT} s"}
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    return {"why": (child.stderr.splitlines() or [f"ended by signal {-child.returncode}, as when memory is short"])[-1]}


def shown(name, value):
    label, unit, decimals = FIGURES[name]
    return f"  {label:<54}{value:12,.{decimals}f} {unit}"


def moved(before, after):
    """A line for each figure of two benches that moved by more than 5 %; a tenth of a millisecond is noise."""
    for name, (_, unit, _) in FIGURES.items():
        old, new = before.get(name), after.get(name)
        if old and new is not None and abs(new - old) > max(0.05 * old, 0.1 if unit == "ms" else 0):
            way, better = "up" if new > old else "down", (new > old) == (unit in ("tok/s", "TFLOP/s", "%"))
            yield f"{shown(name, new)}, {way} {100 * abs(new / old - 1):.1f} %, {'better' if better else 'worse'}"


def last_bench(profile):
    """The newest archived bench of the same machine and dataset, or None."""
    for path in sorted(project.STORE.glob("bench_*.json"), reverse=True):
        with contextlib.suppress(KeyError, TypeError):  # not one of ours
            old = files.read_json(path) or {}
            same = [old["device"][key] == profile["device"][key] for key in ("name", "backend")]
            if all(same) and old["dataset"] == profile["dataset"] and isinstance(old["figures"], dict):
                return old
    return None


def main():
    parser = argparse.ArgumentParser(description="Profile the present train.py on this machine.")
    parser.add_argument("--only", type=json.loads, metavar="OPTIONS", help="steps alone; options of Training, as JSON")
    if only := parser.parse_args().only:
        print(json.dumps(Training(**only).figures))
        return
    dataset, device, load = prepare.get_dataset(train.DATASET), machine.describe(), psutil.getloadavg()[0]
    prepare.is_prepared(dataset) or sys.exit(prepare.not_prepared(dataset))
    print("train.py on {name} ({backend}, BLAS: {blas}, mlx {mlx}), load {load:.1f}".format(**device, load=load))
    training, figures = Training(train.DEVICE_BATCH_SIZE, 5.0), {}
    for measure in (lambda: training.figures, training.parts, training.arithmetic, training.evaluation):
        measured = measure()
        figures |= measured
        print(*(shown(name, value) for name, value in measured.items()), sep="\n", flush=True)
    print(f"  attention: {training.attention()}")
    now, seconds = datetime.now().astimezone(), time.monotonic() - prepare.PROCESS_START
    profile = {"format_version": 1, "timestamp": now.isoformat(timespec="seconds"), "seconds": seconds}
    profile |= {"commit": project.git("rev-parse", "HEAD"), "train_blob": project.blob_hash(project.ROOT / "train.py")}
    profile |= {"device": device, "load": load, "dataset": dataset.name, "total_batch_size": train.TOTAL_BATCH_SIZE}
    profile |= {"device_batch_size": train.DEVICE_BATCH_SIZE, "figures": figures}
    if before := last_bench(profile):
        print(f"since the bench of {before.get('timestamp')} (identical runs differ by 3 to 5 %)")
        print(*(list(moved(before["figures"], figures)) or ["  nothing moved by more than 5 %"]), sep="\n")
    archive = project.STORE / f"bench_{now:%Y%m%d_%H%M%S}.json"
    files.write_atomically(archive, json.dumps(profile, indent=1))
    print(f"archived in data/{archive.name} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
