"""Profile of the present train.py on the present machine: throughput, memory, and where the time of a step goes.

    python bench.py        (or `make bench`)

It measures train.py's own model, optimizer and step, and prepare.py's own batches and evaluation. It prints a line for
each figure, with its change since the last bench of this machine and dataset; identical runs differ by 3 to 5 %. The
profile is archived in data/bench_*.json. It takes one to two minutes.
"""

import json
import subprocess
import sys
import time
from datetime import datetime

import mlx.core as mx
import numpy as np
import psutil

import prepare
import train
from harness import batches, files, machine, model_state, project

CHILD_LIMIT = 120  # seconds for a size that `make tune` tries

FIGURES = {  # name: (label, unit, decimals)
    "step_ms": ("one step, as in training", "ms", 2),
    "data_ms": ("  of it stalled, waiting for batches", "ms", 2),
    "gradients_ms": ("  of it loss and gradients", "ms", 2),
    "update_ms": ("  of it the update", "ms", 2),
    "tok_sec": ("throughput of training", "tok/s", 0),
    "train_peak_mb": ("peak memory of training", "MB", 0),
    "eval_seconds": ("evaluation, projected to all its rows, without checks", "s", 2),
    "eval_peak_mb": ("peak memory of evaluation", "MB", 0),
}


def median_seconds(work, seconds=2.0):
    """Of `work`, which evaluates all that it makes; called once before, to warm up."""
    work()
    marks = [time.perf_counter()]
    while len(marks) < 3 or (marks[-1] - marks[0] < seconds and len(marks) < 50):
        work()
        marks.append(time.perf_counter())
    return float(np.median(np.diff(marks)))


def training(rows, seconds, total=None, **options):
    """(train.py's trainer, the micro-batches of one step, figures of steps made for `seconds`), `rows` rows at once.

    total: tokens a step, TOTAL_BATCH_SIZE unless given; options: for train.build.
    """
    dataset, total = prepare.get_dataset(train.DATASET), total or train.TOTAL_BATCH_SIZE
    stream = prepare.Batches(prepare.TokenCache.load(dataset), rows, dataset.sequence_length, seed=42)
    micro_batches = [next(stream) for _ in range(batches.cut_step(total, rows, dataset.sequence_length)[1])]
    mx.random.seed(42)
    _, trainer = train.build(prepare.Tokenizer.load(dataset).vocab_size, dataset.sequence_length, **options)
    with model_state.kept(trainer.state):  # compile, as a run does before its clock starts
        mx.eval(trainer.step(micro_batches))
    trainer.optimizer.schedule(0, 0.0)
    waited, losses = stream.wait_seconds, []

    def step():  # a loss is read during the next step, as in a run
        losses.append(trainer.step([next(stream) for _ in micro_batches]))
        mx.eval(losses[-2:-1])

    taken = median_seconds(step, seconds)
    mx.eval(trainer.state)
    figures = {"step_ms": 1e3 * taken, "data_ms": 1e3 * (stream.wait_seconds - waited) / len(losses)}
    figures |= {"tok_sec": total / taken, "train_peak_mb": mx.get_peak_memory() / 2**20}
    return trainer, micro_batches, figures


def evaluation(trainer):
    """Projected from four batches a stream; the checks of prepare.py come on top of it."""
    dataset, at_once, start = prepare.get_dataset(train.DATASET), train.EVAL_BATCH_SIZE, time.perf_counter()
    rows = prepare.evaluation_rows(prepare.TokenCache.load(dataset), dataset)
    packing, part = time.perf_counter() - start, rows[: 4 * at_once * len(trainer.streams)]
    tokenizer = prepare.Tokenizer.load(dataset)
    mx.reset_peak_memory()
    taken = median_seconds(lambda: prepare.score_rows(trainer.model, part, tokenizer, at_once))
    return {"eval_seconds": packing + taken * len(rows) / len(part), "eval_peak_mb": mx.get_peak_memory() / 2**20}


def in_child(**options):
    """Figures of `training` from a process of its own, which may run out of memory or time: then {"why": …}."""
    command = [sys.executable, __file__, json.dumps(options)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_LIMIT)
    except subprocess.TimeoutExpired:
        return {"why": f"skipped after {CHILD_LIMIT} s"}
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    return {"why": (child.stderr.splitlines() or [f"ended by signal {-child.returncode}, as when memory is short"])[-1]}


def archive(kind, **content):
    """Write data/KIND_*.json; returns its name."""
    path, now = files.free_name(project.STORE, kind, ".json"), datetime.now().astimezone()
    content = {"timestamp": now.isoformat(timespec="seconds"), "device": machine.describe(), **content}
    files.write_atomically(path, json.dumps({"format_version": 1, **content}, indent=1))
    return path.name


def last_archive(kind, **same):
    """(name, content) of the newest archive of a kind and of this machine that agrees with `same`; (None, {})."""
    device = machine.describe()
    same_device = {key: device[key] for key in ("name", "memory_gb", "backend")}
    for path in sorted(project.STORE.glob(f"{kind}_*.json"), reverse=True):
        content = files.read_json(path)
        if content and content.items() >= same.items() and content["device"].items() >= same_device.items():
            return path.name, content
    return None, {}


def main():
    if options := sys.argv[1:]:  # of in_child
        print(json.dumps(training(**json.loads(options[0]))[-1]))
        return
    dataset, device = prepare.get_dataset(train.DATASET), machine.describe()
    load, *_ = machine.allowed(psutil.getloadavg) or [0.0]
    prepare.TokenCache.load(dataset)  # or it ends here
    _, before = last_archive("bench", dataset=dataset.name)
    print("train.py on {name} ({backend}, BLAS: {blas}, mlx {mlx}), load {load:.1f}".format(**device, load=load))
    print(f"last column: the change since the bench of {before['timestamp']}" if before else "the first bench here")
    trainer, micro_batches, figures = training(train.DEVICE_BATCH_SIZE, 5.0)
    gradients = trainer.gradients(micro_batches)
    figures["gradients_ms"] = 1e3 * median_seconds(lambda: mx.eval(trainer.gradients(micro_batches)))
    figures["update_ms"] = 1e3 * median_seconds(lambda: mx.eval(trainer.update(*gradients), trainer.state))
    figures |= evaluation(trainer)
    for name, (label, unit, decimals) in FIGURES.items():
        old = before.get("figures", {}).get(name)
        change = f"{100 * (figures[name] / old - 1):+9.1f} %" if old else ""
        print(f"  {label:<54}{figures[name]:12,.{decimals}f} {unit:<5}{change}".rstrip())
    facts = {"dataset": dataset.name, "commit": project.git("rev-parse", "HEAD"), "load": load, "figures": figures}
    print(f"archived in data/{archive('bench', train_blob=project.blob_hash(project.ROOT / 'train.py'), **facts)}")


if __name__ == "__main__":
    main()
