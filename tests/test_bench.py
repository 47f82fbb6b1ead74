"""The profile: a whole one on a tiny model, and its pieces. No test looks at how long anything took."""

import json
import re
import shutil
import sys

import pytest
from conftest import Checkout, clean_environment, small_laboratory

import bench
from harness import machine
from harness.project import blob_hash


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkout of the real files, with a small model and a small dataset, prepared."""
    return small_laboratory(tmp_path_factory.mktemp("bench"), DEVICE_BATCH_SIZE=2, EVAL_BATCH_SIZE=2)


@pytest.mark.slow
def test_a_whole_bench(tiny):
    data = tiny.path / "data"
    data.mkdir(exist_ok=True)
    before = {"timestamp": "yesterday", "device": machine.describe(), "dataset": "files",
              "figures": {"train_peak_mb": 1e6}}  # fmt: skip
    last = data / "bench_20200101_000000.json"
    last.write_text(json.dumps(before))
    done = tiny.make("bench", check=0)
    (archive,) = set(data.iterdir()) - {last}
    assert re.fullmatch(r"bench_\d{8}_\d{6}\.json", archive.name) and archive.name in done.stdout
    record = json.loads(archive.read_text())
    assert set(record["figures"]) == set(bench.FIGURES)
    assert all(value > 0 for name, value in record["figures"].items() if name != "data_ms"), record["figures"]
    assert record["figures"]["eval_peak_mb"] < 1000 and record["dataset"] == "files" and record["device"]["mlx"]
    assert record["train_blob"] == blob_hash(tiny.path / "train.py")
    assert "since the bench of yesterday" in done.stdout and done.stdout.count(" %") == 1
    lines = done.stdout.splitlines()
    for label, *_ in bench.FIGURES.values():
        (line,) = (line for line in lines if line.startswith(f"  {label}  "))
        assert line.endswith("-100.0 %") == (label == "peak memory of training")


def test_a_train_py_that_trains_when_it_is_imported_is_told(tiny, tmp_path):
    other = shutil.copytree(tiny.path, tmp_path / "other")
    text = (other / "train.py").read_text()
    (other / "train.py").write_text(text.replace("\nif __name__", "\nif True or __name__"))
    done = Checkout(other, tiny.env).run(sys.executable, "bench.py", check=1)
    assert "when it is imported" in done.stderr.splitlines()[-1] and "archived" not in done.stdout, done.stderr


def test_a_dataset_that_is_not_prepared(tiny, tmp_path):
    (tmp_path / "home").mkdir()
    done = Checkout(tiny.path, clean_environment(tmp_path / "home")).script("bench", check=75)
    assert done.stderr == "error: dataset 'files' is not prepared; run: make prepare DATASET=files FILES=dir\n"
    assert done.stdout == ""


def test_only_the_same_machine_and_dataset_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.project, "STORE", tmp_path)
    assert bench.last_archive("bench", dataset="stdlib") == (None, {})
    name = bench.archive("bench", dataset="stdlib", figures={})
    content = json.loads((tmp_path / name).read_text())
    for day, changes in enumerate([{}, {"device": {**machine.describe(), "name": "slide rule"}}, {"dataset": "x"}]):
        (tmp_path / f"bench_2999010{day}_000000.json").write_text(json.dumps({**content, "day": day, **changes}))
    (tmp_path / "bench_29990108_000000.json").write_text('{"device": {"na')
    assert bench.last_archive("bench", dataset="stdlib") == ("bench_29990100_000000.json", {**content, "day": 0})
    assert bench.last_archive("tune", dataset="stdlib") == (None, {})


@pytest.mark.parametrize(
    "script, expected",
    [
        ('echo "chatter of train.py"; echo "{\\"tok_sec\\": 7}"', {"tok_sec": 7}),
        ('echo "Traceback" >&2; echo "RuntimeError: too large" >&2; exit 1', {"why": "RuntimeError: too large"}),
        ("kill -9 $$", {"why": "ended by signal 9, as when memory is short"}),
        ("exec sleep 100", {"why": "skipped after 0 s"}),
    ],
)  # fmt: skip
def test_what_a_child_may_come_to(tmp_path, monkeypatch, script, expected):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(bench, "CHILD_LIMIT", 0 if "sleep" in script else 60)
    assert bench.in_child(rows=8, seconds=1.0) == expected
