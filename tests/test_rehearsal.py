"""The dress rehearsal: what is wired wrongly costs seconds, not the budget, and nothing of it stays behind."""

import json
import os
import shutil
import subprocess
import sys

import gallery
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import test_honest
from conftest import HARNESS, ROOT, SIZES, sampled
from gallery import OTHERS, SEES_LATER, Answers, Network

import prepare
import train
from harness import model_state, record, rehearsal, run_checks

V = 512


def rehearse(model, tokenizer, batch_size=8):
    tokens = prepare.TokenCache.load(tokenizer.dataset).tokens("train")
    rehearsal.rehearse(model, tokens, tokenizer, batch_size)


def begins_at_zero(mixes):
    """The outputs of every part and of the whole are zero, as many models begin."""
    network = Network(V, mixes)
    for mix in network.mixes:
        mix.wo = mx.zeros_like(mix.wo)
    network.mlps = [[up, mx.zeros_like(down)] for up, down in network.mlps]
    network.head = mx.zeros_like(network.head)
    return network


@pytest.mark.slow
@pytest.mark.parametrize("name", SEES_LATER)
def test_a_model_that_sees_later_tokens_is_refused_before_it_is_trained(tokenizer, name):
    for make in (lambda mixes: Network(V, mixes), begins_at_zero):
        with pytest.raises(run_checks.Refused, match="^causality: .*Look for"):
            rehearse(make(SEES_LATER[name]), tokenizer)


@pytest.mark.parametrize("name", sampled(OTHERS))
def test_what_knows_more_than_its_row_is_refused_as_well(tokenizer, name):
    with pytest.raises(run_checks.Refused, match="^(rows|state): "):
        rehearse(OTHERS[name][1](V), tokenizer)


@pytest.mark.slow  # the same models pass more questions in test_honest.py
@pytest.mark.parametrize("name", sorted(set(test_honest.NAMED) - {"counts of pairs"}))  # which knows text
def test_an_honest_model_passes(tokenizer, name):
    rehearse(test_honest.NAMED[name](tokenizer), tokenizer)


@pytest.mark.parametrize("mix", sampled(gallery.HONEST))
def test_so_does_one_whose_outputs_begin_at_zero(tokenizer, mix):
    rehearse(begins_at_zero([mix, mix]), tokenizer)


class Parts(nn.Module):
    """Frozen, private, nested and shared arrays, of several types; and something that must stay positive."""

    def __init__(self):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(V, 16), nn.Dropout(0.5)
        self.out = mx.zeros((V, 16))
        self.layers = [{"gain": mx.zeros(16), "half": mx.zeros((16, 16), mx.bfloat16)} for _ in range(2)]
        self.width = mx.full((16,), 1e-3)
        self.shared, self._table, self.steps = self.out, mx.zeros((3, 3)), mx.array(7)
        self.pair, self.negative_zero = (mx.zeros(2), mx.zeros(2)), mx.array([-0.0, 0.0])

    def __call__(self, ids):
        x = self.dropout(self.embedding(ids) * mx.log(self.width) * mx.sqrt(self.width))
        for layer in self.layers:
            x = x + layer["gain"] * (x @ layer["half"].astype(mx.float32))
        return x @ self.out.T


def contents(model):
    arrays = nn.utils.tree_flatten(model)
    return {name: (a.dtype, np.array(mx.view(mx.atleast_1d(a), mx.uint8)).tobytes()) for name, a in arrays}


def test_all_is_put_back_bit_for_bit(tokenizer, monkeypatch):
    mx.random.seed(11)
    model, asked, shake = Parts().train(), [], model_state.shake
    before, random = contents(model), mx.random.state[0].tolist()
    monkeypatch.setattr(model_state, "shake", lambda model: asked.append((shake(model), contents(model))[1]))
    rehearse(model, tokenizer)
    moved = {name for name in before if asked[0][name] != before[name]}
    assert {"out", "layers.0.gain", "layers.1.half", "width", "shared"} <= moved and "_table" not in moved
    assert contents(model) == before
    assert model.training and model.dropout.training
    assert mx.random.state[0].tolist() == random


def test_a_refused_model_is_put_back_too(tokenizer):
    model = begins_at_zero([gallery.NoMask])
    with pytest.raises(run_checks.Refused):
        rehearse(model, tokenizer)
    assert not mx.any(model.head) and not mx.any(model.mixes[0].wo)


def test_training_goes_on_as_if_nothing_had_been_asked(tokenizer):
    def losses(asked):
        mx.random.seed(3)
        _, trainer = train.build(V, 64)
        if asked:
            rehearse(trainer.model, tokenizer)
        batch = mx.random.randint(0, V, (4, 65))
        found = []
        for n in range(3):
            trainer.optimizer.schedule(n, n / 3)
            found.append(trainer.step([batch]).item())
        return found

    assert losses(asked=True) == losses(asked=False)


def test_a_model_that_knows_text_before_the_clock_is_refused(tokenizer):
    counts = np.bincount(prepare.TokenCache.load(tokenizer.dataset).tokens("train"), minlength=V) + 1.0
    frequent = mx.array(np.log(counts), mx.float32)
    for model in (gallery.bigram(tokenizer), Answers(lambda ids: mx.broadcast_to(frequent, (*ids.shape, V)))):
        with pytest.raises(run_checks.Refused, match="^start-up: .*predicts tokens of the training text"):
            rehearse(model, tokenizer)


def test_a_model_that_copies_knows_none(tokenizer):
    """It gives ten nats more to each token that followed this one earlier in the row."""

    def copies(ids):
        T = ids.shape[1]
        same = (ids[:, :, None] == ids[:, None, :]) & (mx.arange(T) < mx.arange(T)[:, None])
        follows = mx.pad(ids[:, 1:], [(0, 0), (0, 1)])[..., None] == mx.arange(V)
        return 10.0 * mx.minimum(same.astype(mx.float32) @ follows.astype(mx.float32), 1)

    rehearse(Answers(copies), tokenizer)


# --- in a run --------------------------------------------------------------------------------------

TRAIN = """
DATASET = "files"
import prepare
import time
import mlx.core as mx
import mlx.nn as nn
run = prepare.Run(DATASET)
mx.random.seed(1)
class Leaking(nn.Embedding):
    def __call__(self, ids): return super().__call__(mx.roll(ids, -1, axis=1))
class Slow(nn.Embedding):
    def __call__(self, ids): time.sleep(0.02); return super().__call__(ids)
honest, leaking, slow = (kind(512, 512) for kind in (nn.Embedding, Leaking, Slow))
honest.weight = mx.random.normal((512, 512))
batches = run.batches(4)
{rehearse}
run.start_clock()
print("trained")
while run.training():
    next(batches)
    run.log_step(mx.array(6.2))
run.finish(honest, 16, {{"depth": 1, "n_embd": 64}})
"""


@pytest.fixture
def program(small, tmp_path):
    """program(rehearse, *words): (result, record or None) of a train.py with that line, run with the real harness."""

    def program(rehearse, *words):
        for path in HARNESS:
            shutil.copy(path, tmp_path)
        shutil.copytree(ROOT / "harness", tmp_path / "harness", dirs_exist_ok=True)
        with (tmp_path / "data_sources.py").open("a") as out:
            out.write(SIZES)
        (tmp_path / "train.py").write_text(TRAIN.format(rehearse=rehearse))
        done = subprocess.run(
            [sys.executable, "train.py", *words], cwd=tmp_path, env={**os.environ, "AUTORESEARCH_BUDGET": "0.3"},
            capture_output=True, text=True,
        )  # fmt: skip
        left = tmp_path / "data" / "last_run.json"
        return done, json.loads(left.read_text()) if left.exists() else None

    return program


def test_a_leak_ends_the_run_before_it_trains_with_an_invalid_record(program):
    done, left = program("run.rehearse(leaking, 16)")
    assert done.returncode == 2 and "trained" not in done.stdout
    assert left["status"] == "invalid" and left["reason"].startswith("causality: ") and record.seal_fits(left)
    assert "before training" in left["reason"] and left["training"]["total_steps"] == 0
    assert done.stderr == f"error: this run is not valid. {left['reason']}\n"


def test_its_time_counts_neither_as_start_up_nor_as_budget(program):
    done, left = program("began = time.monotonic()\nrun.rehearse(slow, 16)\nprint('took', time.monotonic() - began)")
    assert done.returncode == 0, done.stderr
    took, training = float(done.stdout.split("took ")[1].split()[0]), left["training"]
    assert took > 0.1 and training["seconds"] < 0.3 + took
    assert training["startup_seconds"] < training["total_seconds"] - training["seconds"] - took


@pytest.mark.parametrize("model, batch_size, said", [
    ("lambda ids: ids", 16, "the model is a function, expected an mlx.nn.Module"), ("honest", 0, "at least one row"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_one_line(program, model, batch_size, said):
    done, left = program(f"run.rehearse({model}, {batch_size})")
    assert done.returncode == 1 and left is None and "trained" not in done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_check_alone_says_one_line_and_leaves_nothing(program):
    done, left = program("run.rehearse(honest, 16)", "--check")
    assert done.returncode == 0 and left is None and "trained" not in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("check: ") and " passed in " in line]
    done, left = program("run.rehearse(leaking, 16)", "--check")
    assert done.returncode == 2 and left is None
    assert done.stderr.startswith("error: this model is not valid. causality: ")
    done, left = program("", "--check")
    assert done.returncode == 1 and "does not call run.rehearse" in done.stderr and done.stderr.count("\n") == 1


MODULE = """honest.weight = mx.random.normal((512, 512), key=mx.random.key({key}))
run.rehearse(honest, 16)"""


@pytest.mark.slow
def test_saved_weights_are_evaluated_again(program, tmp_path):
    done, left = program(MODULE.format(key=1))
    assert done.returncode == 0, done.stderr
    (tmp_path / "data" / "last_run.json").unlink()
    done, again = program(MODULE.format(key=2), "--weights", "data/last_run.safetensors")
    assert done.returncode == 0 and again is None and "trained" not in done.stdout
    assert f"val_bpb: {left['result']['val_bpb']:.6f} " in done.stdout
    done, again = program("", "--weights", "data/last_run.safetensors")
    assert (done.returncode, again) == (1, None) and "does not call run.rehearse" in done.stderr
    for weights in ("absent.safetensors", "train.py"):
        done, again = program(MODULE.format(key=2), "--weights", weights)
        assert done.returncode == 1 and again is None
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {weights} does not hold")
