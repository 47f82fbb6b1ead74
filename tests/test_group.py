"""Several devices: ranks that train one model together, and runs side by side, one on each device."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import HARNESS, ROOT, new_checkout
from test_run import alive, started, wait_for

import checks
import prepare

SMALL = {"DATASET": '"files"', "DEPTH": 1, "HEAD_DIM": 32, "ASPECT_RATIO": 32, "DEVICE_BATCH_SIZE": 4}
SMALL |= {"TOTAL_BATCH_SIZE": 512, "WEIGHT_DECAY": 0.0, "WARMDOWN": 0.0}  # as it is, the rate hangs on the clock


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A clone with the real harness, a small dataset and a small model; one run of one device made."""
    folder = tmp_path_factory.mktemp("group")
    checkout = new_checkout(folder / "clone", folder / "home", HARNESS)
    with (checkout.path / "data_sources.py").open("a") as out:
        out.write('DATASETS["files"] = Dataset("files", "", 400, 128, 4096, 1 / 20)\n')
    text = (ROOT / "train.py").read_text()
    for name, value in SMALL.items():
        text, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", text, flags=re.MULTILINE)
        assert count == 1, name
    (checkout.path / "train.py").write_text(text)
    checkout.git("add", "-A")
    checkout.git("commit", "-q", "-m", "start")
    (folder / "texts").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        (folder / "texts" / f"{path.stem}.txt").write_bytes(path.read_bytes())
    checkout.env["AUTORESEARCH_CACHE"] = str(folder / "cache")
    checkout.make("prepare", f"FILES={folder / 'texts'}", check=0)
    checkout.make("run", "BUDGET=1.5", check=0)
    return checkout


def last_run(checkout):
    return json.loads((checkout.path / "data" / "last_run.json").read_text())


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_as_one_device_does(lab, ranks):
    one = last_run(lab)
    before = len(list((lab.path / "data").glob("run_*.json")))
    lab.make("run", "BUDGET=1.5", "AGAIN=1", "SEED=42", f"NPROC={ranks}", check=0)
    several = last_run(lab)
    assert len(list((lab.path / "data").glob("run_*.json"))) == before + 1
    assert (several["group"]["backend"], several["group"]["size"], len(several["group"]["devices"])) == ("ring", ranks, ranks)
    steps = min(len(one["curve"]["loss"]), len(several["curve"]["loss"]))
    assert steps > 5 and one["curve"]["steps_per_bin"] == several["curve"]["steps_per_bin"] == 1
    np.testing.assert_allclose(several["curve"]["loss"][:steps], one["curve"]["loss"][:steps], atol=1e-3)
    assert several["training"]["tokens_per_step"] == one["training"]["tokens_per_step"]
    assert several["status"] == "valid"
    shutil.copy(lab.path / "data" / "last_run.json", lab.path / "several.json")
    (lab.path / "data" / "last_run.json").write_text(json.dumps(one))  # for whoever comes next


PROGRAM = """
import prepare, group, hashlib, json, os, sys
import mlx.core as mx, numpy as np, train
tokenizer = prepare.Tokenizer.load(prepare.get_dataset("files"))
mx.random.seed(1)
_, trainer = train.build(tokenizer.vocab_size, 128)
found = prepare.evaluate_bpb(trainer.model, tokenizer, 3)
cache = prepare.TokenCache.load(tokenizer.dataset)
stream = prepare.Batches(cache, 8 // group.SIZE, 128, 1, (group.RANK, group.SIZE))
rows = [hashlib.sha1(np.array(row)).hexdigest() for _ in range(20) for row in next(stream)]
rows = sum(map(json.loads, group.told(json.dumps([r[:8] for r in rows]))), [])
if group.RANK == 0:
    told = [found.bpb, found.stderr, found.row_bits.tolist(), sorted(rows), len(stream.served()), stream.epochs]
    open(sys.argv[1], "w").write(json.dumps(told))
"""


def test_the_figure_and_the_rows_are_those_of_one_device(lab):
    (lab.path / "program.py").write_text(PROGRAM)
    found = []
    for ranks, words in ((1, []), (2, ["scripts/launch.py"])):
        lab.run(sys.executable, *words, "program.py", f"found{ranks}", check=0, NPROC=str(ranks), PYTHONPATH=str(ROOT))
        found.append(json.loads((lab.path / f"found{ranks}").read_text()))
    assert found[0] == found[1]


def test_ranks_that_trained_models_of_their_own_are_refused():
    sketches = np.ones((2, 3, 2), np.float32)
    checks.one_model(sketches)
    sketches[1, 2, 1] += 0.03
    with pytest.raises(checks.Refused, match="ranks: the ranks' weights differ"):
        checks.one_model(sketches)
