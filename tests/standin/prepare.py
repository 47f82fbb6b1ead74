"""A stand-in for the harness: the same record, written by record.py, and nothing learnt.

For tests of what surrounds a run. tests/test_night.py uses the real one.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from harness import files, project, record

START = time.monotonic()
DATA = Path(__file__).resolve().parent / "data"


def get_dataset(name):
    if name not in ("stdlib", "tinystories"):
        sys.exit(f"error: unknown dataset '{name}'; known: stdlib, tinystories")
    return SimpleNamespace(name=name)


def is_prepared(dataset):
    return dataset.name in ("stdlib", os.environ.get("ALSO_PREPARED"))


class TokenCache:
    def load(dataset):
        if not is_prepared(dataset):
            sys.exit(f"error: dataset '{dataset.name}' is not prepared; run: make prepare DATASET={dataset.name}")


def finish(val_bpb=1.5, tok_sec=1000.0, machine=None, curve=None, steps=10, **changes):
    """Write the record of a run that took no time. `changes` replace top-level fields."""
    budget, seed = project.settings()
    content = {
        "status": "valid",
        "reason": None,
        "harness": "h" * 64,
        "dataset": project.dataset_of_train(),
        "token_cache": "t" * 64,
        "seed": seed,
        "budget": budget,
        "device": {"name": "abacus", "memory_gb": 1, "mlx": "0", "backend": "cpu"},
        "model": {"depth": 1, "dmodel_scale": 1.0, "num_params": 1000},
        "training": {
            "seconds": 1.0,
            "total_seconds": time.monotonic() - START,
            "startup_seconds": 0.0,
            "total_steps": steps,
            "total_tokens": 10,
            "tokens_per_step": 1,
            "sequence_length": 1,
            "avg_tok_sec": tok_sec,
            "training_peak_mb": 100.0,
            "peak_memory_mb": 1536.0,
            "eval_seconds": 0.5,
            "epochs": 0.1,
        },
        "machine": machine or {"load": [0.0, 0.0], "cores": 2, "other_cores": 0.0, "paused_seconds": 0.0},
        "result": {"val_bpb": val_bpb, "val_bpb_stderr": 0.0},
        "curve": curve or {},
        **changes,
    }
    if content["status"] != "valid":
        content["result"] = {"val_bpb": None, "val_bpb_stderr": None}
    if "--holdout" in sys.argv:
        files.write_atomically(DATA / "holdout.json", json.dumps({"bpb": val_bpb + 0.25, "stderr": 0.0}))
    by_hand = content.pop("seal", None)
    train = content.pop("train_blob", project.blob_hash(project.ROOT / "train.py"))
    commit = content.pop("commit", project.git("rev-parse", "-q", "--verify", "HEAD"))
    head = json.dumps({"__metadata__": {"train_blob": train}}).encode()  # a safetensors file of no arrays
    files.make_folder(DATA)
    (DATA / "last_run.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    written = record.write(train, commit, **content)
    if by_hand:
        files.write_atomically(DATA / "last_run.json", json.dumps({**written, "seal": by_hand}))
    record.tell(written)
    if content["status"] != "valid":
        sys.exit(2)


if __name__ == "__main__":
    print("stdlib: prepared")
