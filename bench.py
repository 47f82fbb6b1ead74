"""Profile of the present train.py on the present machine: where the time of a step goes, and what fits.

    python bench.py        (or `make bench`)

Model, optimizer, schedule and step are those that train.py builds, batches and evaluation those of
prepare.py. Prints a table, and a line for each figure that moved by more than 5 % since the last
bench of this machine; archived in data/bench_*.json. Takes less than two minutes.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from functools import partial

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import prepare
from harness import batches, files, machine, model_state, project

if __name__ == "__main__":
    files.one_line_for("make bench")

import train  # noqa: E402

TIME_LIMIT = 105  # seconds; what is not measured by then is skipped

FIGURES = {  # name: (what it is, unit)
    "import_seconds": ("start-up: interpreter and imports", "s"),
    "data_seconds": ("start-up: tokenizer, token cache, first batches", "s"),
    "model_seconds": ("start-up: model and optimizer", "s"),
    "warm_up_seconds": ("start-up: compilation, one step on throw-away state", "s"),
    "step_ms": ("one step, as in training", "ms"),
    "data_ms": ("  of it waiting for batches", "ms"),
    "tok_sec": ("training", "tok/s"),
    "train_peak_mb": ("peak memory of training", "MB"),
    "forward_ms": ("part of a step: forward (loss_fn)", "ms"),
    "forward_backward_ms": ("part of a step: forward and backward", "ms"),
    "update_ms": ("part of a step: update", "ms"),
    "attention_ms": ("attention of a layer and row, forward and backward", "ms"),
    "plain_attention_ms": ("the same written out as softmax(q k) v", "ms"),
    "model_tflops": ("arithmetic of the model in training", "TFLOP/s"),
    "peak_tflops": ("matrix-product peak of this machine, measured", "TFLOP/s"),
    "peak_share": ("share of that peak", "%"),
    "packing_tok_sec": ("batches packed ahead, nothing else at work", "tok/s"),
    "eval_seconds": ("evaluation projected to full size, without checks", "s"),
    "eval_peak_mb": ("peak memory of evaluation", "MB"),
    "compiled_step_ms": ("one step, compiled", "ms"),
    "uncompiled_step_ms": ("one step, not compiled", "ms"),
}
DIGITS = {"s": 2, "ms": 2, "MB": 0, "tok/s": 0, "TFLOP/s": 3, "%": 1}


def seconds_of(work, seconds=2.0):
    """Median seconds of `work`, which evaluates all that it makes; called once before, to warm up."""
    work()
    marks = [time.perf_counter()]
    while len(marks) < 2 or (marks[-1] - marks[0] < seconds and len(marks) < 20):
        work()
        marks.append(time.perf_counter())
    return np.median(np.diff(marks))


class Training:
    """What train.py builds for `rows` rows at once, and the `figures` of its start and of steps for `seconds`.

    total: tokens a step, TOTAL_BATCH_SIZE unless given; options: for train.build.
    """

    def __init__(self, rows, seconds, total=None, **options):
        marks = [time.perf_counter()]
        self.dataset = prepare.get_dataset(train.DATASET)
        length = self.dataset.sequence_length
        self.tokenizer, self.cache = prepare.Tokenizer.load(self.dataset), prepare.TokenCache.load(self.dataset)
        self.batches = prepare.Batches(self.cache, rows, length, seed=42)
        self.total = total or train.TOTAL_BATCH_SIZE
        _, micro_batches = batches.cut_step(self.total, rows, length)
        self.micro_batches = [next(self.batches) for _ in range(micro_batches)]
        marks.append(time.perf_counter())
        mx.random.seed(42)
        self.config, self.trainer = train.build(self.tokenizer.vocab_size, length, **options)
        marks.append(time.perf_counter())
        with model_state.kept(self.trainer.state):
            mx.eval(self.trainer.step(self.micro_batches))
        mx.synchronize()
        marks.append(time.perf_counter())
        self.figures = dict(zip(("data_seconds", "model_seconds", "warm_up_seconds"), np.diff(marks), strict=True))
        pending, ends, waited = None, [], self.batches.wait_seconds  # a loss is read during the next step
        while len(ends) < 2 or (ends[-1] - ends[0] < seconds and len(ends) < 50):
            self.trainer.optimizer.schedule(len(ends), 0.0)
            loss = self.trainer.step([next(self.batches) for _ in self.micro_batches])
            if pending is not None:
                pending.item()
                ends.append(time.perf_counter())
            pending = loss
        mx.eval(pending, self.trainer.state)
        median, waited = np.median(np.diff(ends)), (self.batches.wait_seconds - waited) / (len(ends) + 1)
        self.figures |= {"step_ms": 1e3 * median, "data_ms": 1e3 * waited}
        self.figures |= {"tok_sec": self.total / median, "train_peak_mb": mx.get_peak_memory() / 2**20}

    def parts(self):
        """A step taken apart. Forward holds the head's gradient, which loss_fn takes along with the loss."""
        trainer, micro_batches, loss = self.trainer, self.micro_batches, partial(train.loss_fn, self.trainer.model)
        loss = mx.compile(loss, inputs=trainer.model.state) if trainer.compiled else loss

        def forward():
            losses = []
            for tokens in micro_batches:
                for part, stream in zip(trainer.split(tokens), trainer.streams, strict=False):
                    with mx.stream(stream):
                        losses.append(loss(part))
            mx.eval(losses)

        gradients = trainer.gradients(micro_batches)
        return {
            "forward_ms": 1e3 * seconds_of(forward),
            "forward_backward_ms": 1e3 * seconds_of(lambda: mx.eval(trainer.gradients(micro_batches))),
            "update_ms": 1e3 * seconds_of(lambda: mx.eval(trainer.update(gradients), trainer.state)),
        }

    def attention(self):
        """What MLX's attention costs a layer and row, and what it would unfused; prints which passes are fused."""
        config, shape = self.config, (1, self.config.n_head, self.config.sequence_length, self.config.head_dim)
        q, k, v = (mx.random.normal(shape).astype(train.COMPUTE_DTYPE) for _ in range(3))
        attend = partial(mx.fast.scaled_dot_product_attention, scale=config.head_dim**-0.5, mask="causal")

        def plain(q, k, v):
            places = mx.arange(shape[2])
            scores = (q @ k.swapaxes(2, 3)).astype(mx.float32) * config.head_dim**-0.5
            scores = mx.where(places[:, None] >= places, scores, -mx.inf)
            return mx.softmax(scores, axis=-1).astype(v.dtype) @ v

        def both_ways(function):
            mx.eval(mx.vjp(function, [q, k, v], [q]))

        mx.eval(q, k, v)
        fused = {"forward": True, "backward": True}
        try:
            mx.eval(attend(q, k, v, force_fused=True))
        except ValueError:
            fused["forward"] = False
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        both_ways(attend)  # scores that stand in memory betray the pass that is not fused
        fused["backward"] = fused["forward"] and mx.get_peak_memory() - before < 2 * shape[1] * shape[2] ** 2
        print("  attention:", *(f"{way} {'fused' if yes else 'not fused'}." for way, yes in fused.items()))
        times = {"attention_ms": attend, "plain_attention_ms": plain}
        return {name: 1e3 * seconds_of(partial(both_ways, function), 1.0) for name, function in times.items()}

    def packing(self, count=256):
        """Tokens a second that the batch thread packs when nothing else is at work."""
        taken = seconds_of(lambda: [next(self.batches) for _ in range(count)], 1.0)
        return {"packing_tok_sec": count * self.batches.batch_size * self.batches.sequence_length / taken}

    def evaluation(self, batches=4):
        """The evaluation, projected from some batches a stream; the checks of prepare.py come on top of it."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        rows, at_once = prepare.evaluation_rows(self.cache, self.dataset), train.EVAL_BATCH_SIZE
        packed, part = time.perf_counter() - start, rows[: batches * at_once * len(self.trainer.streams)]
        taken = seconds_of(lambda: prepare.score_rows(self.trainer.model, part, self.tokenizer, at_once))
        return {"eval_seconds": packed + taken * len(rows) / len(part), "eval_peak_mb": mx.get_peak_memory() / 2**20}

    def arithmetic(self):
        """The model's FLOP/s in training, and what large square products reach, all streams at work."""
        n = 8192 if train.CUDA else 4096 if train.GPU else 1024
        lanes = self.trainer.streams * max(2, 8 // len(self.trainer.streams))
        a = mx.random.normal((n, n)).astype(train.COMPUTE_DTYPE)
        taken = seconds_of(lambda: mx.eval([mx.matmul(a, a, stream=stream) for stream in lanes]), 1.0)
        peak = len(lanes) * 2 * n**3 / taken / 1e12
        model = self.figures["tok_sec"] * flops_per_token(self.config, self.trainer.model.parameters()) / 1e12
        return {"model_tflops": model, "peak_tflops": peak, "peak_share": 100 * model / peak}


def flops_per_token(config, parameters):
    """FLOPs of training on one token, as PaLM counts them (arXiv:2204.02311, appendix B).

    6 N + Σ 12 · width · window. N: parameters that take part in products, so all matrices but
    embedding tables, which are only looked up. Σ: over the layers, as if every query saw its whole window.
    A forward pass takes 2 of the 6 and 4 of the 12; work done a second time is not counted.
    """
    matrices = {path: p for path, p in tree_flatten(parameters) if p.ndim > 1}
    in_products = sum(p.size for path, p in matrices.items() if train.parameter_group(path, p) != "embeddings")
    return 6 * in_products + sum(12 * config.n_embd * config.window(layer) for layer in range(config.depth))


def in_child(left=None, **options):
    """The figures of `Training` from a process that may run out of memory or of time: then {"why": …}."""
    command = [sys.executable, __file__, "--only", json.dumps(options)]
    left = left or max(0.01, TIME_LIMIT - (time.monotonic() - prepare.PROCESS_START))
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"why": "skipped: no time left"}
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    return {"why": (child.stderr.splitlines() or [f"ended by signal {-child.returncode}, as when memory is short"])[-1]}


def sweep(figures, compiled):
    """DEVICE_BATCH_SIZE in powers of two around the present one: yields {"rows": n, **figures or "why": …}."""
    present, length = train.DEVICE_BATCH_SIZE, prepare.get_dataset(train.DATASET).sequence_length
    memory_mb, largest = 1024 * (machine.describe()["memory_gb"] or 2**20), {"rows": present, **figures}
    yield largest
    powers = [n for i in (1, 2, 3) for n in (present * 2**i, present // 2**i)]  # the nearest first
    for n in [n for n in powers if n and train.TOTAL_BATCH_SIZE % (n * length) == 0]:
        needed = largest["train_peak_mb"] * n / largest["rows"]
        swaps = {"why": f"does not fit: would take about {needed:,.0f} MB"}  # where a GPU would refuse
        found = {"rows": n, **(swaps if needed > memory_mb else in_child(rows=n, compiled=compiled))}
        largest = max(largest, found, key=lambda size: 0 if "why" in size else size["rows"])
        yield found


def shown(name, value):
    label, unit = FIGURES[name]
    return f"  {label:<52}{'-':>12}" if value is None else f"  {label:<52}{value:12,.{DIGITS[unit]}f} {unit}"


def moved(before, after):
    """A line for each figure of two benches that moved by more than 5 %; a tenth of a millisecond is noise."""
    for name, (_, unit) in FIGURES.items():
        old, new = before.get(name), after.get(name)
        if old and new is not None and abs(new - old) > max(0.05 * old, 0.1 if unit == "ms" else 0):
            way, better = "up" if new > old else "down", (new > old) == (unit in ("tok/s", "TFLOP/s", "%"))
            yield f"{shown(name, new)}, {way} {100 * abs(new / old - 1):.1f} %, {'better' if better else 'worse'}"


def last_bench(profile):
    """The newest archived bench of the same machine and dataset, or None."""
    for path in sorted(project.STORE.glob("bench_*.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or not ours
            old = json.loads(path.read_text())
            same = [old["device"][key] == profile["device"][key] for key in ("name", "backend")]
            if all(same) and old["dataset"] == profile["dataset"] and isinstance(old["figures"], dict):
                return old
    return None


def main():
    parser = argparse.ArgumentParser(description="Profile the present train.py on this machine.")
    parser.add_argument("--only", type=json.loads, metavar="OPTIONS", help="steps alone; options of Training, as JSON")
    if only := parser.parse_args().only:
        training = Training(**{"seconds": 3.0, **only})
        print(json.dumps(training.figures))
        return
    figures, sizes, rows = {}, [], train.DEVICE_BATCH_SIZE

    def note(found):
        figures.update(found)
        print(*(shown(name, value) for name, value in found.items()), sep="\n", flush=True)

    dataset, device, load = prepare.get_dataset(train.DATASET), machine.describe(), os.getloadavg()[0]
    prepare.is_prepared(dataset) or sys.exit(prepare.not_prepared(dataset))
    print("train.py on {name} ({backend}, BLAS: {blas}, mlx {mlx}), load {load:.1f}".format(**device, load=load))
    training = Training(rows, 5.0)
    present, compiled = training.figures, training.trainer.compiled
    start = [sys.executable, "-c", "import train"]
    note({"import_seconds": seconds_of(lambda: subprocess.run(start, cwd=project.ROOT, check=True), 0.0)} | present)
    note(training.parts() | training.arithmetic())
    note(training.attention())
    note(training.packing() | training.evaluation())
    del training  # the children need the memory
    gc.collect()
    mx.clear_cache()
    names = ("uncompiled_step_ms", "compiled_step_ms")
    other = in_child(rows=rows, compiled=not compiled).get("step_ms")
    note({names[compiled]: present["step_ms"], names[not compiled]: other})
    print(f"  {'DEVICE_BATCH_SIZE':<20}{'tok/s':>12}{'peak MB':>12}")
    for size in sweep(present, compiled):
        sizes.append(size)
        told = size.get("why") or "{tok_sec:12,.0f}{train_peak_mb:12,.0f}".format(**size)
        print(f"  {size['rows']:<20}{told}", flush=True)
    fastest = max(sizes, key=lambda size: size.get("tok_sec", 0))["rows"]
    print(f"fastest that fits: DEVICE_BATCH_SIZE = {fastest}")
    now, seconds = datetime.now().astimezone(), time.monotonic() - prepare.PROCESS_START
    profile = {"format_version": 1, "timestamp": now.isoformat(timespec="seconds"), "seconds": seconds}
    profile |= {"commit": project.git("rev-parse", "HEAD"), "train_blob": project.blob_hash(project.ROOT / "train.py")}
    profile |= {"device": device, "load": load, "dataset": dataset.name, "total_batch_size": train.TOTAL_BATCH_SIZE}
    profile |= {"device_batch_size": rows, "fastest": fastest, "figures": figures, "sweep": sizes}
    if before := last_bench(profile):
        print(f"since the bench of {before.get('timestamp')} (machines are noisy: identical runs differ by 3 to 5 %)")
        print(*(list(moved(before["figures"], figures)) or ["  nothing moved by more than 5 %"]), sep="\n")
    archive = project.STORE / f"bench_{now:%Y%m%d_%H%M%S}.json"
    files.write_atomically(archive, json.dumps(profile, indent=1))
    print(f"archived in data/{archive.name} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
