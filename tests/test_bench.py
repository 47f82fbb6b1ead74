"""The profile: a whole one on a tiny model, and its pieces. No test looks at how long anything took."""

import json
import re
import shutil
import sys

import pytest
from conftest import Checkout, clean_environment, small_laboratory

import bench
import train
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
    assert record["figures"]["eval_peak_mb"] < 1000 and record["figures"]["peak_share"] < 100
    assert record["train_blob"] == blob_hash(tiny.path / "train.py")
    assert record["device"]["mlx"] and record["dataset"] == "files"
    assert "attention: forward not fused, backward not fused\n" in done.stdout  # of a CPU
    for label, *_ in bench.FIGURES.values():
        assert label in done.stdout
    moved = done.stdout.split("since the bench of yesterday")[1].splitlines()[1:-1]
    assert len(moved) == 1 and re.search(r"peak memory of training .* down 100\.0 %, better", moved[0])


@pytest.mark.parametrize("piece", ["heads", "loss_fn", "orthogonalize"])
def test_it_measures_what_train_has(tiny, tmp_path, piece):
    broken = shutil.copytree(tiny.path, tmp_path / "broken")
    body, main = (broken / "train.py").read_text().rsplit("\nif __name__", 1)
    body += f"\ndef {piece}(*arguments):\n    raise RuntimeError('broken {piece}')\n"
    (broken / "train.py").write_text(f"{body}\nif __name__{main}")
    done = Checkout(broken, tiny.env).run(sys.executable, "bench.py", check=1)
    assert done.stderr.startswith("error: make bench does not work with this train.py")
    assert done.stderr.endswith(f": RuntimeError: broken {piece}\n") and done.stderr.count("\n") == 1
    assert "archived" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "said"), [
    ("def build(", "def make(", "has no attribute 'build'"),
    ("\nif __name__", "\nif True or __name__", "when it is imported"),
    ("DEPTH = ", "DEPTH = = ", "SyntaxError"),
])  # fmt: skip
def test_a_train_py_of_another_shape_is_told_in_one_line(tiny, tmp_path, old, new, said):
    other = shutil.copytree(tiny.path, tmp_path / "other")
    text = (other / "train.py").read_text()
    assert old in text
    (other / "train.py").write_text(text.replace(old, new, 1))
    tune = other / "scripts" / "run" / "tune.py"
    tune.write_text(tune.read_text().replace("\nBUSY = 0.25", "\nBUSY = 1e9"))
    for tool in (["bench.py"], ["-m", "scripts.run.tune"]):
        done = Checkout(other, tiny.env).run(sys.executable, *tool)
        assert done.stderr.count("\n") == 1 and said in done.stderr and done.stderr.startswith("error: "), done.stderr


def test_a_dataset_that_is_not_prepared(tiny, tmp_path):
    (tmp_path / "home").mkdir()
    done = Checkout(tiny.path, clean_environment(tmp_path / "home")).script("bench", check=1)
    assert done.stderr == "error: dataset 'files' is not prepared; run: make prepare DATASET=files FILES=dir\n"
    assert done.stdout == ""


def test_a_line_for_each_figure_that_moved():
    before = {"step_ms": 100.0, "tok_sec": 1000.0, "eval_seconds": 10.0, "train_peak_mb": 500.0, "data_ms": 0.01}
    assert list(bench.moved(before, before)) == []
    assert list(bench.moved(before, {name: 1.049 * value for name, value in before.items()})) == []
    more = list(bench.moved(before, {name: 1.2 * value for name, value in before.items()}))
    assert [re.search(r"^ +(.*?)  +(.*)$", line).groups() for line in more] == [
        ("one step, as in training", "120.00 ms, up 20.0 %, worse"),
        ("throughput of training", "1,200 tok/s, up 20.0 %, better"),
        ("peak memory of training", "600 MB, up 20.0 %, worse"),
        ("evaluation, projected to all its rows, without checks", "12.00 s, up 20.0 %, worse"),
    ]  # and 0.002 ms more of waiting is noise
    assert list(bench.moved({"tok_sec": 1000.0}, {"tok_sec": 900.0}))[0].endswith("900 tok/s, down 10.0 %, worse")
    assert list(bench.moved({"gone": 1.0}, {"step_ms": 1.0})) == []


def test_only_the_same_machine_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.project, "STORE", tmp_path)
    record = {"device": {"name": "abacus", "backend": "cpu"}, "dataset": "stdlib", "figures": {"tok_sec": 1.0}}
    assert bench.last_bench(record) is None

    def archive(day, **changes):
        (tmp_path / f"bench_202001{day}_000000.json").write_text(json.dumps({**record, "day": day, **changes}))

    archive("01")
    archive("02")
    archive("03", device={"name": "slide rule", "backend": "cpu"})
    archive("04", device={"name": "abacus", "backend": "cuda"})
    archive("05", dataset="climbmix")
    archive("06", figures=None)
    archive("07", device="abacus")
    (tmp_path / "bench_20200108_000000.json").write_text('{"device": {"na')
    (tmp_path / "bench_20200109_000000.json").write_bytes(b"\xff\xfe")
    assert bench.last_bench(record)["day"] == "02"


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


def test_the_count_of_flops():
    config = train.GPTConfig(
        vocab_size=50, sequence_length=16, depth=2, aspect_ratio=32, head_dim=32, windows="SL"
    )  # fmt: skip
    width = 64
    blocks = 2 * (4 * width * width + 2 * 4 * width * width)  # q, k, v, out; up, down
    gate = train.GATE_CHANNELS * 2  # of the second layer, which has a value embedding
    in_products = blocks + gate + 50 * width  # the head last
    attention = 12 * width * 8 + 12 * width * 16  # half the context, then all of it
    assert bench.flops_per_token(config, train.GPT(config).parameters()) == 6 * in_products + attention
