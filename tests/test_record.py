"""The record of a run: whole at any moment, sealed, and never lost; and what ends a run before it has one."""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import prepare
from harness import project, record, run, run_checks

ROOT = Path(prepare.__file__).parent


def refusal(work, *arguments):
    """The one line that `work` ends the program with."""
    with pytest.raises(SystemExit) as ended:
        work(*arguments)
    line = ended.value.code
    assert line.startswith("error: ") and "\n" not in line
    return line


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data/ of this test's own."""
    monkeypatch.setattr(record, "DATA", tmp_path / "data")
    monkeypatch.setattr(record, "STORE", tmp_path / "data")
    return tmp_path / "data"


def write(**content):
    return record.write("b" * 40, None, **content)


# A process that forks: each child writes records until it is killed, at a moment that a seed decides.
# Meanwhile, and afterwards, whatever stands under the record's name is read.
KILLED = """
import json, os, pathlib, random, signal, sys, time
from harness import record

record.DATA = record.STORE = pathlib.Path(sys.argv[1])
last, chance, seen, rounds = record.DATA / "last_run.json", random.Random(0), [], 40
curve = {"step": list(range(200)), "loss": [chance.random() for _ in range(200)]}

def read():
    found = json.loads(last.read_text())
    assert record.seal_fits(found) and len(found["curve"]["loss"]) == 200
    return found["number"]

for i in range(rounds):
    child = os.fork()
    if not child:
        for number in range(i * 10**6, (i + 1) * 10**6):
            record.write("b" * 40, None, number=number, curve=curve)
    end = time.monotonic() + chance.uniform(0.005, 0.08)
    while time.monotonic() < end:
        if last.exists():
            seen.append(read())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if last.exists():
        seen.append(read())
assert seen == sorted(seen)  # the old one or the new one: never an older one
for archive in record.STORE.glob("run_*.json"):
    assert record.seal_fits(json.loads(archive.read_text()))
print(len({number // 10**6 for number in seen}), len(set(seen)))
"""


def test_a_record_is_whole_whenever_the_run_is_killed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "data"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rounds, records = map(int, done.stdout.split())
    assert rounds > 5 and records > 5  # kills in the middle of many different writes


def test_a_record_has_a_twin_and_none_is_overwritten(data):
    for number in range(4):  # within the same second, mostly
        write(number=number)
        assert json.loads((data / "last_run.json").read_text())["number"] == number
    archives = [json.loads(path.read_text())["number"] for path in data.glob("run_*.json")]
    assert sorted(archives) == [0, 1, 2, 3]
    assert len(list(data.iterdir())) == 5  # and nothing temporary


def test_the_seal_fits_this_record_alone(data):
    written = write(val_bpb=1.25, curve={"loss": [3.0, 2.0]}, dataset="stdlib")
    assert record.seal_fits(written) and record.seal_fits(json.loads(json.dumps(written, indent=1)))
    assert not record.seal_fits({**written, "val_bpb": 1.24}) and not record.seal_fits({**written, "more": None})


def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_record(data, tmp_path, monkeypatch):
    write(number=1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "the disk is full" in refusal(lambda: write(number=2))
    assert json.loads((data / "last_run.json").read_text())["number"] == 1
    assert len(list(data.iterdir())) == 2


def test_a_file_in_the_place_of_data_is_said(data):
    data.write_text("in the way")
    assert "data" in refusal(lambda: write(number=1))
    assert data.read_text() == "in the way"


# --- what ends a run -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [*(("BUDGET", x) for x in ("abc", "nan", "0", "1e999")), ("SEED", "-1")])
def test_a_budget_or_seed_that_is_no_such_number_is_refused(cache, monkeypatch, name, value):
    monkeypatch.setenv(f"AUTORESEARCH_{name}", value)
    assert refusal(prepare.Run, "stdlib").startswith(f"error: {name}={value} is not a ")


def test_budget_and_seed_are_taken_as_they_are_given(small, monkeypatch):
    begun = prepare.Run("files")
    assert (begun.budget, begun.seed) == (300, 42)
    monkeypatch.setenv("AUTORESEARCH_BUDGET", "0.5")
    monkeypatch.setenv("AUTORESEARCH_SEED", "0")
    begun = prepare.Run("files")
    assert (begun.budget, begun.seed) == (0.5, 0)


@pytest.mark.parametrize("loss", [float("nan"), 1e4])
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_no_record(small, data, loss):
    run = prepare.Run("files")
    run.start_clock()
    run.log_step(mx.array(3.0))
    run.log_step(mx.array(loss))
    line = refusal(run.log_step, mx.array(3.0))  # a step later, so that the device never waits
    assert f"the loss is {loss}" in line and "step 1" in line
    assert not data.exists()


def test_a_last_loss_that_is_no_number_is_noticed_too(small, data):
    run = prepare.Run("files")
    run.start_clock()
    run.log_step(mx.array(float("nan")))
    assert "the loss is nan" in refusal(run.finish, nn.Embedding(9, 9), 1, {"depth": 1, "n_embd": 64})
    assert not data.exists()


def test_what_a_warm_up_changes_is_put_back(small):
    run = prepare.Run("files")
    optimizer = {"step": mx.array(0, mx.uint64), "rate": mx.array(0.1)}
    weight = mx.zeros((3, 4), mx.bfloat16)
    state = {"weight": weight, "optimizer": [optimizer], "name": "adam"}

    def change():
        weight[1, 2] = 5.0  # in place
        optimizer.update(step=optimizer["step"] + 1, rate=mx.array(0.2))

    for action in (lambda: None, change, lambda: state.update(weight=weight - 1e-6), change):
        run.warm_up(action, state)
        assert state["optimizer"][0] is optimizer and optimizer["step"].item() == 0
        assert optimizer["rate"].item() == pytest.approx(0.1)
        assert state["weight"].dtype == mx.bfloat16 and not state["weight"].any() and state["name"] == "adam"


def test_a_batch_size_that_does_not_divide_is_refused_before_anything_is_trained(small, data, monkeypatch):
    import train

    monkeypatch.setattr(train, "DATASET", "files")
    monkeypatch.setattr(train, "SEQUENCE_LENGTH", 64)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 8)
    for total in (8 * 64 + 1, 8 * 32, 8 * 64 * 3 - 64):
        monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", total)
        line = refusal(train.main)
        assert str(total) in line and "not a multiple of" in line and "8 x 64" in line
    assert not data.exists()


# --- a whole run -----------------------------------------------------------------------------------

RECORD = {
    "": "format_version run_id attempt timestamp status reason commit train_blob harness dataset token_cache seed "
    "budget device model training machine result curve seal",
    "device": "name memory_gb os python mlx backend blas",
    "model": "depth n_embd dmodel_scale num_params vocab_size sequence_length",
    "training": "seconds total_seconds startup_seconds total_steps total_tokens avg_tok_sec training_peak_mb "
    "peak_memory_mb eval_seconds data_wait_seconds epochs",
    "result": "val_bpb val_bpb_stderr eval_bytes row_bits",
    "curve": "steps_per_bin seconds loss tok_sec memory_mb",
}
SUMMARY = (
    "val_bpb training_seconds total_seconds train_peak_mb peak_memory_mb eval_seconds total_tokens_M avg_tok_sec "
    "num_steps num_params_M depth dmodel_scale"
)


def test_a_run_leaves_a_complete_record_and_prints_it(small, data, monkeypatch, capsys):
    import train

    monkeypatch.setenv("AUTORESEARCH_BUDGET", "1.5")
    monkeypatch.setattr(run, "PROCESS_START", time.monotonic())
    monkeypatch.setattr(run_checks, "_opened", [])
    monkeypatch.setattr(run_checks, "SLACK", 1000)  # beside other tests one step may take many seconds
    monkeypatch.setattr(train, "DATASET", "files")
    monkeypatch.setattr(train, "DEPTH", 1)
    monkeypatch.setattr(train, "SEQUENCE_LENGTH", 64)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 2 * 4 * 64)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 4)
    train.main()
    found = json.loads((data / "last_run.json").read_text())
    for part, names in RECORD.items():
        assert not set(names.split()) - set(found[part] if part else found), part
    assert found["status"] == "valid" and record.seal_fits(found)
    assert found["train_blob"] == project.blob_hash(ROOT / "train.py")
    training, result, curve = found["training"], found["result"], found["curve"]
    assert (found["budget"], found["seed"], found["dataset"]) == (1.5, 42, "files")
    assert training["total_tokens"] == training["total_steps"] * 2 * 4 * 64
    assert training["avg_tok_sec"] == pytest.approx(training["total_tokens"] / training["seconds"])
    assert training["seconds"] >= 1.5 - 0.5  # it ends where another step would pass the budget
    assert 1 < result["val_bpb"] < 9 and 0 < result["val_bpb_stderr"] < 1
    size = curve.pop("steps_per_bin")
    assert {len(values) for values in curve.values()} == {max(1, (training["total_steps"] - 1) // size)}
    rates = curve["tok_sec"]  # the last one is no artefact
    assert rates[-1] < 10 * sorted(rates)[len(rates) // 2]
    assert set(found["machine"]) >= set("cores other_cores step_ms paused_seconds".split())
    rows = np.frombuffer(base64.b64decode(result["row_bits"]), "<f4")
    assert rows.sum() / result["eval_bytes"] == pytest.approx(result["val_bpb"], rel=1e-5)
    printed = capsys.readouterr().out.split("---\n")[1].splitlines()
    assert [line.split(": ")[0] for line in printed] == SUMMARY.split()
    assert float(printed[0].split(": ")[1]) == pytest.approx(result["val_bpb"], abs=1e-6)
