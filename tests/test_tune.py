"""make tune: the ladder against what was measured, the climb on machines that are told, and what is written."""

import json
import re

import pytest
from conftest import ROOT, small_laboratory
from mlx.utils import tree_flatten

import train


@pytest.fixture(scope="module")
def tune():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from scripts.run import tune

        yield tune


@pytest.fixture
def gpu(monkeypatch):
    """train.py's sizes on a GPU."""
    monkeypatch.setattr(train, "HEAD_DIM", 128)
    config = train.GPTConfig
    monkeypatch.setattr(train, "GPTConfig", lambda **sizes: config(**{"head_dim": 128, "aspect_ratio": 64, **sizes}))


def measured():
    """{machine: {(depth, step): (tokens, val_bpb)}} of the table in docs/tuning.md."""
    row = r"^\| ([\w ,]+) \| (\d+) \| 2\^(\d+) \| ([\d.]+) \| \**([\d.]+)\** \|$"
    found = {}
    for machine, depth, step, tokens, bpb in re.findall(row, (ROOT / "docs" / "tuning.md").read_text(), re.MULTILINE):
        found.setdefault(machine, {})[int(depth), 2 ** int(step)] = (float(tokens) * 1e6, float(bpb))
    return found


@pytest.mark.parametrize("machine", measured())
def test_the_ladder_chooses_within_3_thousandths_of_the_best_that_was_measured(tune, gpu, machine):
    runs = measured()[machine]
    tokens = {depth: tokens for (depth, _), (tokens, _) in runs.items()}
    depth = tune.best_depth({d: (n, tune.size_of(d, 8192, 2048)[0]) for d, n in tokens.items()})
    choice = depth, tune.step_size(tokens[depth], 2048)
    assert runs[choice][1] <= min(bpb for _, bpb in runs.values()) + 0.003


def test_the_size_of_a_model_is_that_of_the_model(tune):
    for depth in (1, 2, 5):
        config = train.GPTConfig(vocab_size=50, sequence_length=16, depth=depth, windows="L")
        groups = [(train.parameter_group(path, p), p) for path, p in tree_flatten(train.GPT(config).parameters())]
        in_products = sum(p.size for group, p in groups if group == "matrices") + 50 * config.n_embd  # the head last
        attention = 12 * depth * config.n_embd * 16
        assert tune.size_of(depth, 50, 16) == (in_products, 6 * in_products + attention)


def machine(speed, memory=lambda depth, rows: 100.0, asked=None):
    """Steps as a machine of `speed` FLOP/s would take them."""

    def measure(depth, total, rows):
        if asked is not None:
            asked.append((depth, total, rows))
        from scripts.run import tune

        figures = {"tok_sec": speed / tune.size_of(depth, 8192, 2048)[1], "train_peak_mb": memory(depth, rows)}
        return {"depth": depth, "total": total, "rows": rows, **figures}

    return measure


def climb(tune, measure, budget=300, limit=1000.0):
    return tune.climb(budget, 8192, 2048, limit, measure)


def test_a_faster_machine_and_a_longer_budget_get_no_smaller_model(tune, gpu):
    for budget in (60, 300):
        chosen = [climb(tune, machine(10.0**power), budget)[0] for power in (10, 11, 12, 13, 14, 15, 16)]
        depths, steps = ([choice[key] for choice in chosen] for key in ("depth", "total"))
        assert depths == sorted(depths) and depths[0] == 2 and depths[-1] == 12
        assert steps == sorted(steps) and steps[-1] == 2**17
    assert climb(tune, machine(1e13), 60)[0]["depth"] <= climb(tune, machine(1e13), 300)[0]["depth"]


def test_what_is_chosen_was_timed_and_divides_the_step(tune, gpu):
    for power in range(10, 17):
        choice, done = climb(tune, machine(10.0**power))
        assert choice in done and choice["total"] % (choice["rows"] * 2048) == 0
        assert len(done) <= 4  # a size more would cost half a minute of compilation


def test_memory_bounds_the_rows_and_then_the_depth(tune, gpu):
    small = climb(tune, machine(1e15, lambda depth, rows: 100.0 * rows), limit=450.0)[0]
    large = climb(tune, machine(1e15, lambda depth, rows: 10.0 * rows), limit=1e6)[0]
    assert small["rows"] == 4 and large["rows"] > 4 and small["depth"] == large["depth"]
    shallow = climb(tune, machine(1e15, lambda depth, rows: 100.0 * depth), limit=500.0)[0]
    assert shallow["depth"] == 4
    assert climb(tune, machine(1e15, lambda depth, rows: 2000.0))[0] is None


def test_a_size_that_fails_is_passed_over(tune, gpu):
    def measure(depth, total, rows):
        size = machine(1e15)(depth, total, rows)
        return size if depth <= 2 else {"depth": depth, "total": total, "rows": rows, "why": "killed"}

    assert climb(tune, measure)[0]["depth"] == 2


@pytest.mark.parametrize(
    ("cuda", "speed", "left", "epoch", "rows"),
    [
        (True, 1.34e6, 1.0, 445e6, 2**19),  # H200
        (True, 1.34e6, 1.0, 100e6, 0),  # text comes again
        (True, 1.2e5, 1.0, 445e6, 2**18),  # a small card: as a Mac
        (False, 1.2e5, 0.9, 445e6, 2**18),  # M5 Max
        (False, 2.6e4, 0.9, 445e6, 2**17),  # M1 Pro
        (False, 2.6e4, 0.7, 445e6, 0),  # they cost more than they are worth
        (False, 1e4, 0.9, 445e6, 0),  # too few tokens
    ],
)
def test_text_that_is_seen_once_gets_tables_of_n_grams(tune, gpu, monkeypatch, cuda, speed, left, epoch, rows):
    def in_child(depth, total, rows, ngram_rows=0, **options):
        memory = 2000.0 * rows if ngram_rows == 2**19 else 100.0
        return {"tok_sec": speed * (left if ngram_rows else 1.0), "train_peak_mb": memory}

    monkeypatch.setattr(tune.bench, "in_child", in_child)
    monkeypatch.setattr(tune.mx, "device_info", lambda: {"free_memory": 100 * 2**30})
    for owner, name, value in ((tune, "BUSY", 1e9), (train, "CUDA", cuda), (train, "GPU", True)):
        monkeypatch.setattr(owner, name, value)
    choice, done = tune.fit(300, tune.prepare.get_dataset("climbmix"), epoch)
    assert choice in done and choice.get("ngram_rows", 0) == rows
    if rows == 2**19:  # 64 rows do not fit into two thirds of the memory
        assert {name: choice[key] for name, key in tune.CONSTANTS.items()} == {
            "DEPTH": 6, "TOTAL_BATCH_SIZE": 2**17, "DEVICE_BATCH_SIZE": 32, "ASPECT_RATIO": 96, "NGRAM_ROWS": 2**19
        }  # fmt: skip


def test_sizes_are_fitted_without_tables(tune, monkeypatch):
    monkeypatch.setattr(train, "NGRAM_ROWS", 2**18)
    with pytest.raises(SystemExit, match="error: train.py has tables of n-grams already"):
        tune.main()


def test_only_the_three_lines_change(tune):
    text = (ROOT / "train.py").read_text()
    new = tune.written(text, {"DEPTH": 6, "TOTAL_BATCH_SIZE": 2**15, "DEVICE_BATCH_SIZE": 4})
    changed = [(a, b) for a, b in zip(text.splitlines(), new.splitlines(), strict=True) if a != b]
    assert [b.split("#")[0].strip() for _, b in changed] == [
        "DEPTH = 6",
        "TOTAL_BATCH_SIZE = 2**15",
        "DEVICE_BATCH_SIZE = 4",
    ]
    assert all(a.split("#")[1] == b.split("#")[1] for a, b in changed)  # the comments stay
    with pytest.raises(SystemExit, match="error: train.py has 0 lines of the form DEPTH"):
        tune.written(text.replace("\nDEPTH = ", "\nLAYERS = "), {"DEPTH": 6})


@pytest.mark.slow
def test_a_whole_tuning(tmp_path):
    """The real scripts and train.py on a small dataset, on a machine that counts as busy, then as quiet."""
    checkout = small_laboratory(tmp_path)
    path, script = checkout.path / "train.py", checkout.path / "scripts" / "run" / "tune.py"
    text, quiet = path.read_text(), script.read_text()
    assert "\nBUSY = 0.25" in quiet
    script.write_text(quiet.replace("BUSY = 0.25", "BUSY = -1"))
    assert "not prepared" in checkout.script("tune", check=75, AUTORESEARCH_CACHE=str(tmp_path / "empty")).stderr
    done = checkout.script("tune", check=1)
    assert done.stderr.startswith("error: this machine is busy (others use ") and path.read_text() == text
    assert re.search(r"Go on with DEPTH = \d+, TOTAL_BATCH_SIZE = \d+, DEVICE_BATCH_SIZE = \d+, or", done.stderr)
    script.write_text(quiet.replace("BUSY = 0.25", "BUSY = 1e9"))
    checkout.git("commit", "-q", "-a", "-m", "start")
    done = checkout.make("setup", "TAG=t", "BUDGET=5", check=0)
    assert checkout.git("diff", "--name-only", "main", "autoresearch/t") == "train.py"
    assert checkout.git("rev-parse", "autoresearch/t") == checkout.refs("t")["start"]
    (archive,) = (checkout.path / "data").glob("tune_*.json")
    record, tuned = json.loads(archive.read_text()), path.read_text()
    assert record["budget"] == 5 and record["dataset"] == "files" and archive.name in done.stdout
    assert record["why"] in done.stdout and tuned != text
    for name, value in record["constants"].items():
        assert eval(re.search(rf"^{name} = ([^#\n]+)", tuned, re.MULTILINE).group(1)) == value
        assert f"{name} = {value}" in done.stdout
    assert any(f"{size.get('epochs', 0):.2f} epochs" in record["why"] for size in record["timed"])
    checkout.git("checkout", "-q", "main")
    done = checkout.make("setup", "TAG=u", "BUDGET=5", check=0)  # the same again is not timed again
    assert path.read_text() == tuned and f"as found before, data/{archive.name}" in done.stdout
    assert checkout.git("rev-list", "--count", "main..autoresearch/u") == "1"
    checkout.git("checkout", "-q", "main")
    checkout.make("setup", "TAG=v", "BUDGET=5", "TUNE=0", check=0)
    assert checkout.git("rev-parse", "autoresearch/v") == checkout.git("rev-parse", "main")
    assert list((checkout.path / "data").glob("tune_*.json")) == [archive]


def test_a_session_opens_where_nothing_can_be_fitted(checkout):
    """tune.sh refuses: the presets stay, it is said in a line, and the session is open."""
    script = checkout.path / "scripts" / "tune.sh"
    script.write_text("#!/usr/bin/env bash\necho 'error: this machine is busy' >&2\nexit 1\n")
    checkout.write_train("DEPTH = 2\nprepare.finish(1.5)", commit="")
    checkout.git("commit", "-q", "-a", "-m", "a train.py with sizes")
    done = checkout.script("setup", check=0, TAG="t")
    assert "tune     this machine is busy\ntune     nothing was fitted" in done.stdout
    assert checkout.git("rev-parse", "HEAD") == checkout.git("rev-parse", "main") == checkout.refs("t")["start"]
