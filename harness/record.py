"""A run's record: one JSON object, written once, found again, and compared only with its like.

Everything here works without MLX, so that a question about finished runs costs no start-up.
"""

import base64
import functools
import hashlib
import json
import os
import sys
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import numpy as np

from harness.files import make_folder, read_json, what_failed, write_atomically
from harness.project import DATA, STORE


def seal(record):
    """SHA-256 over a record's content (without its seal), by which a hand-made one is noticed."""
    content = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(("autoresearch" + json.dumps(content, sort_keys=True)).encode()).hexdigest()


def seal_fits(record):
    return record.get("seal") == seal(record)


def write(train_blob, commit, **content):
    """Complete a run's record, archive it, and make it data/last_run.json; returns it.

    A reader of data/last_run.json sees the old record or the new one, whole.
    train_blob: the hash of the program that ran. commit: what was checked out, or None. content: see `Run._end`;
    megabytes and gigabytes in it are 2^20 and 2^30 bytes.
    """
    now = datetime.now().astimezone()
    record = {
        "format_version": 2,
        "run_id": f"{now:%Y%m%d_%H%M%S}-{uuid.uuid4().hex[:12]}",
        "attempt": os.environ.get("AUTORESEARCH_ATTEMPT", ""),  # whose record this is, see experiment.py
        "timestamp": now.isoformat(timespec="seconds"),
        "commit": commit,
        "train_blob": train_blob,
        **content,
    }
    record["seal"] = seal(record)
    text = json.dumps(record, indent=1)
    try:
        make_folder(STORE)
        write_atomically(STORE / f"run_{record['run_id']}.json", text)
        write_atomically(DATA / "last_run.json", text)
    except OSError as error:
        sys.exit(f"error: the record could not be written to {STORE}: {what_failed(error)}")
    return record


def binned(curve, points=256):
    """A run's curve as means over bins of 2^k steps, so that any two runs can be laid upon each other.

    curve: a (seconds at its end, loss, tokens so far, memory in MB) for each step. k is the least for which `points`
    bins suffice; the steps of a last bin that is not full are left out.
    """
    size = 1
    while len(curve) > points * size:
        size *= 2
    bins = np.array(curve[: len(curve) // size * size], np.float64).reshape(-1, size, 4)
    seconds, _, tokens, memory = bins[:, -1].T
    took, trained = (np.diff(x, prepend=0.0) for x in (seconds, tokens))
    columns = {
        "seconds": np.round(seconds, 3),
        "loss": np.round(bins[:, :, 1].mean(axis=1), 5),
        "tok_sec": np.round(trained / np.maximum(took, 1e-9)),
        "memory_mb": np.round(memory),
    }
    return {"steps_per_bin": size, **{name: column.tolist() for name, column in columns.items()}}


def packed(values):
    """A float array as compact text: little-endian float32 in base64."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def tell_device(device):
    memory = f", {device['memory_gb']} GB" if device["memory_gb"] else ""
    print(f"backend: {device['backend']} ({device['name']}{memory}), mlx {device['mlx']}, BLAS: {device['blas']}")
    if device["backend"] == "cpu" and device["blas"] == "reference":
        print("note: without OpenBLAS a CPU is ten times slower; `make run` preloads it")


def tell_step(curve, budget):
    """On a terminal, one line that is overwritten; once a second a note for `make watch`. curve: see `binned`."""
    (before, _, fewer, _), (now, loss, tokens, _) = curve[-2] if len(curve) > 1 else (0.0, 0.0, 0, 0.0), curve[-1]
    share, rate, left = 100 * now / budget, (tokens - fewer) / max(now - before, 1e-9), max(0.0, budget - now)
    note, attempt = (os.environ.get(f"AUTORESEARCH_{name}") for name in ("PROGRESS", "ATTEMPT"))
    if note and int(now) > int(before):
        figures = {"step": len(curve) - 1, "seconds": now, "budget": budget, "loss": loss, "tok_sec": rate}
        with suppress(OSError):  # a reader takes what is not whole for nothing
            Path(note).write_text(json.dumps({"attempt": attempt, **figures}))
    if sys.stdout.isatty() or os.environ.get("AUTORESEARCH_TERMINAL"):
        line = f"\rstep {len(curve) - 1}  {share:5.1f} %  loss {loss:.4f}  {rate:,.0f} tok/s  {left:.0f} s left  "
        print(line, end="", flush=True)


def tell(record):
    """The end of a run's output, a `name: value` a line."""
    training, model = record["training"], record["model"]
    bpb, eval_seconds = record["result"]["val_bpb"], training["eval_seconds"]
    lines = {
        "val_bpb": "invalid" if bpb is None else f"{bpb:.6f}",
        "training_seconds": f"{training['seconds']:.1f}",
        "total_seconds": f"{training['total_seconds']:.1f}",
        "train_peak_mb": f"{training['training_peak_mb']:.1f}",
        "peak_memory_mb": f"{training['peak_memory_mb']:.1f}",
        "eval_seconds": "-" if eval_seconds is None else f"{eval_seconds:.1f}",
        "total_tokens_M": f"{training['total_tokens'] / 1e6:.2f}",
        "avg_tok_sec": f"{training['avg_tok_sec']:.0f}",
        "num_steps": training["total_steps"],
        "num_params_M": f"{model['num_params'] / 1e6:.2f}",
        "depth": model["depth"],
        "dmodel_scale": f"{model['dmodel_scale']:.4f}",
    }
    print("\n---" if sys.stdout.isatty() else "---")
    for name, value in lines.items():
        print(f"{name}: {value}")
    if record["reason"]:
        print(f"error: this run is not valid. {record['reason']}", file=sys.stderr)


def archived():
    """Every valid record of the archive as the harness wrote it, the oldest first; what is damaged is passed over."""
    for path in sorted(STORE.glob("run_*.json")):
        record = _read_sealed(path, path.stat().st_mtime_ns)
        if record and record.get("status") == "valid":
            yield record


@functools.cache
def _read_sealed(path, changed):
    record = read_json(path)
    return record if record and seal_fits(record) else None


def differences(new, old):
    """Why two records may not be compared, a phrase for each reason; empty where they may."""
    a, b = ({key: r.get(key) for key in ("dataset", "token_cache", "budget", "harness", "group")} for r in (new, old))
    for facts, record in ((a, new), (b, old)):
        facts["rows of evaluation"] = (record.get("result") or {}).get("eval_rows")
        facts |= {f"device.{name}": value for name, value in (record.get("device") or {}).items()}
    unlike = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return [f"{key} is {str(a.get(key))[:60]}, was {str(b.get(key))[:60]}" for key in unlike]


def at_equal_steps(new, old):
    """(difference of training loss in nats per token, its standard error) at the same steps, or None.

    Two runs of one seed that take as many tokens a step see the same text at the same step, so the difference of their
    losses is nearly free of noise, and does not know how fast the machine was. Of the steps that count the later half
    is taken. The error is that of the mean of correlated bins, by the batch means of four stretches.
    """
    change = _apart_at_equal_steps(new, old)
    change = change[len(change) // 2 :]
    if len(change) < 8:
        return None
    return change.mean(), np.std([part.mean() for part in np.array_split(change, 4)], ddof=1) / 2


def same_losses(new, old):
    """Whether two runs of one seed had the same training loss at every step that they share, as far as records tell.

    Then the second program computes what the first does, and only the clock may tell them apart.
    """
    change = _apart_at_equal_steps(new, old)
    return len(change) >= 8 and bool(np.abs(change).max() < 2e-5)  # losses are written to five decimals


def _apart_at_equal_steps(new, old):
    """How much higher the first one's losses are at the same steps, a value for each bin; empty where none are.

    Only the first half of the budget counts, in which the presets do not lower their rates yet.
    """
    text = [(r["seed"], *map(r["training"].get, ("tokens_per_step", "sequence_length"))) for r in (new, old)]
    curves = [r.get("curve") or {} for r in (new, old)]
    if text[0] != text[1] or None in text[0] or not all(curve.get("loss") for curve in curves):
        return np.empty(0)
    size, losses = max(curve["steps_per_bin"] for curve in curves), []
    for record, curve in zip((new, old), curves, strict=True):
        times = size // curve["steps_per_bin"]
        early = int(np.searchsorted(curve["seconds"], record["budget"] / 2)) // times * times
        losses.append(np.reshape(curve["loss"][:early], (-1, times)).mean(axis=1))
    shared = min(map(len, losses))
    return losses[0][:shared] - losses[1][:shared]
