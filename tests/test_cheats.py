"""Models and loops that would score better than they are: each is caught by the check that is meant for it."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gallery
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import HARNESS, sampled
from gallery import WIDTH, Mix, Network, later

import data_sources
import prepare
from harness import batches, corpus, leak_checks, run_checks
from harness import record as records

V = 512
ROOT = Path(prepare.__file__).parent


def refused(check, model, tokenizer, batch_size=8):
    with pytest.raises(run_checks.Refused, match=rf"^{check}: ") as refusal:
        prepare.evaluate_bpb(model, tokenizer, batch_size)
    return str(refusal.value)


# --- models that see what comes later --------------------------------------------------------------


class NoMask(Mix):
    def __call__(self, x, ids):
        return self.attend(x, None)  # not causal in mx.fast


class OneTooMany(Mix):
    def __call__(self, x, ids):
        T = x.shape[1]
        return self.attend(x, mx.arange(T) <= mx.arange(T)[:, None] + 1)


class WindowOnBothSides(Mix):
    def __call__(self, x, ids):
        T = x.shape[1]
        return self.attend(x, mx.abs(mx.arange(T) - mx.arange(T)[:, None]) < 4)


class Beyond1024(Mix):
    """Causal at every length that is tried out by hand."""

    def __call__(self, x, ids):
        following = mx.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)])
        return mx.where(mx.arange(x.shape[1])[:, None] >= 1024, following, x) @ self.wo


class Prefix(Mix):
    """The first quarter sees itself whole, as the prompt of a prefix language model does."""

    def __call__(self, x, ids):
        T = x.shape[1]
        return self.attend(x, ~later(T) | (mx.maximum(mx.arange(T), mx.arange(T)[:, None]) < T // 4))


class BlockAverage(Mix):
    size = 16

    def __call__(self, x, ids):
        B, T, C = x.shape
        means = x.reshape(B, T // self.size, self.size, C).mean(axis=2, keepdims=True)
        return mx.broadcast_to(means, (B, T // self.size, self.size, C)).reshape(x.shape) @ self.wo


class BlockAverage64(BlockAverage):
    size = 64


class BlockAveragesInAttention(Mix):
    """q, k and v are averages over blocks of 4; the mask is causal."""

    def __call__(self, x, ids):
        B, T, C = x.shape
        means = x.reshape(B, T // 4, 4, C).mean(axis=2, keepdims=True)
        return self.attend((x.reshape(B, T // 4, 4, C) + means).reshape(x.shape), "causal")


class ChunkedState(Mix):
    """A state for every chunk of 32, which holds the chunk itself when the chunk is decoded."""

    def __call__(self, x, ids):
        B, T, C = x.shape
        states = mx.cumsum(mx.tanh(x @ self.wv).reshape(B, T // 32, 32, C).sum(axis=2), axis=1)
        return mx.repeat(states, 32, axis=1) @ self.wo


class ChunkEnds(Mix):
    """Only the last position of a chunk sees one token too many."""

    size = 16

    def __call__(self, x, ids):
        following = mx.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)])
        return mx.where(mx.arange(1, x.shape[1] + 1)[:, None] % self.size == 0, following, x) @ self.wo


class CircularSpectrum(gallery.PaddedSpectrum):
    """No padding: what is filtered at the end comes round to the beginning."""

    def __call__(self, x, ids):
        spectra = [mx.fft.rfft(y, axis=-2) for y in (x, self.filter(x.shape[1]))]
        return mx.fft.irfft(spectra[0] * spectra[1], n=x.shape[1], axis=-2) @ self.wo


class ShiftByMinusOne(Mix):
    def __call__(self, x, ids):
        return mx.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)]) @ self.wo


class FarAhead(Mix):
    """Sees one token, 20 positions ahead."""

    def __call__(self, x, ids):
        return mx.pad(x[:, 20:], [(0, 0), (0, 20), (0, 0)]) @ self.wo


class NormOverTime(Mix):
    def __call__(self, x, ids):
        return (x - x.mean(axis=1, keepdims=True)) * mx.rsqrt(x.var(axis=1, keepdims=True) + 1e-5) @ self.wo


class ScaleOverTime(Mix):
    """The largest value of all positions is the unit, as when activations are quantised row by row."""

    def __call__(self, x, ids):
        return x / mx.abs(x).max(axis=1, keepdims=True) @ self.wo


class SoftmaxOverTime(Mix):
    """Linear attention whose keys are normalised over all of time."""

    def __call__(self, x, ids):
        k = mx.softmax(x @ self.wk, axis=1) * x.shape[1]
        return mx.cumsum(k * (x @ self.wv), axis=1) / mx.arange(1, x.shape[1] + 1)[:, None] @ self.wo


class SamePadding(Mix):
    def __call__(self, x, ids):
        return mx.conv1d(x, self.wk[:, :3, None], padding=1, groups=WIDTH) @ self.wo


class BothWays(Mix):
    def __call__(self, x, ids):
        return mx.cumsum(x, axis=1, reverse=True) / x.shape[1] @ self.wo


class WholeRow(Mix):
    def __call__(self, x, ids):
        return mx.broadcast_to(x.mean(axis=1, keepdims=True), x.shape) @ self.wo


class LastToken(Mix):
    """All positions see the row's last token, so that whatever is exchanged, they move as much."""

    def __call__(self, x, ids):
        return mx.broadcast_to(x[:, -1:], x.shape) @ self.wo


class ExpertsChoose(Mix):
    """Each expert takes the quarter of the row's tokens that it likes best."""

    def __call__(self, x, ids):
        scores = (x @ self.wq)[..., :2]
        bound = mx.sort(scores, axis=1)[:, -x.shape[1] // 4]
        taken = (scores >= bound[:, None]) * mx.sigmoid(scores)
        return taken[..., :1] * (x @ self.wk) + taken[..., 1:] * (x @ self.wv)


class MergedTokens(Mix):
    """Token pairs share the state of the second."""

    def __call__(self, x, ids):
        return mx.repeat(x[:, 1::2], 2, axis=1) @ self.wo


SEES_LATER = {
    "attention without a mask": [NoMask],
    "a mask that is one too wide": [OneTooMany],
    "a window on both sides": [WindowOnBothSides],
    "one layer of three without a mask": [gallery.Attention, NoMask, gallery.Attention],
    "the last layer without a mask": [gallery.Rope, gallery.Attention, NoMask],
    "a prefix that sees itself": [Prefix],
    "averages over blocks of 16": [BlockAverage],
    "averages over blocks of 64": [BlockAverage64],
    "block averages in q, k and v": [BlockAveragesInAttention],
    "a recurrent state over the whole chunk": [ChunkedState],
    "one token more at the ends of chunks": [gallery.Attention, ChunkEnds],
    "a circular spectral filter": [CircularSpectrum],
    "a token shift by minus one": [ShiftByMinusOne],
    "a token far ahead": [FarAhead],
    "normalised over time": [NormOverTime],
    "scaled by the largest of all times": [ScaleOverTime],
    "keys normalised over time": [SoftmaxOverTime],
    "a convolution padded on both sides": [SamePadding],
    "a sum from behind": [gallery.Attention, BothWays],
    "the mean of the row": [WholeRow],
    "the last token of the row": [LastToken],
    "experts that choose tokens": [gallery.Attention, ExpertsChoose],
    "pairs of tokens merged": [gallery.Attention, MergedTokens],
}


@pytest.mark.parametrize("name", sampled(SEES_LATER))
def test_what_sees_later_tokens_is_refused(tokenizer, name):
    text = refused("causality", Network(V, SEES_LATER[name]), tokenizer)
    assert "Look for" in text and "validation row" in text and "\n" not in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["attention without a mask", "averages over blocks of 64", "normalised over time"])
def test_it_is_refused_in_half_precision_too(tokenizer, name, dtype):
    noisy = [gallery.PaddedSpectrum, *SEES_LATER[name]]
    refused("causality", Network(V, noisy, dtype=dtype), tokenizer)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 40])
def test_it_is_refused_whatever_the_batch_size(tokenizer, batch_size):
    refused("causality", Network(V, [NoMask]), tokenizer, batch_size)


class ChunkEnds1024(ChunkEnds):
    """... which is one position in 1024, but trained, it could be worth 0.001 bits per byte."""

    size = 1024


@pytest.mark.slow
def test_leaks_that_only_long_rows_show_are_refused(small_files, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    dataset = replace(small_files[0], sequence_length=2048, vocab_size=300, eval_tokens=2048 * 3)
    prepare.prepare(dataset)
    tokenizer = prepare.Tokenizer.load(dataset)
    for mix in (Beyond1024, ChunkEnds1024):
        text = refused("causality", Network(300, [mix], width=16), tokenizer, 4)
        at = int(text.split("at position ")[1].split()[0])
        assert at >= 1024 if mix is Beyond1024 else at == 1023


class LittleOfTheRow(Mix):
    """So little of the row's mean that random tokens, whose mean is much the same, do not show it."""

    def __call__(self, x, ids):
        return mx.broadcast_to(0.22 * x.mean(axis=1, keepdims=True), x.shape) @ self.wo


def test_little_of_a_mean_shows_when_one_token_is_put_throughout(tokenizer):
    refused("causality", Network(V, [gallery.Attention, LittleOfTheRow], logit_scale=0.1), tokenizer)


def test_an_untrained_leak_is_refused_before_it_pays(tokenizer):
    """Logits near zero, so that the score hardly moves yet."""
    refused("causality", Network(V, [gallery.Attention, ShiftByMinusOne], logit_scale=1e-4), tokenizer)


# --- leaks that are worth 0.001 bits per byte ------------------------------------------------------
#
# Each adds to the logits of an honest model something of what comes next, `strength` times.


def is_next(ids):
    return (mx.arange(V) == mx.pad(ids[:, 1:], [(0, 0), (0, 1)])[..., None]).astype(mx.float32)


def hint(logits, ids, strength):
    """The next token's logit is raised."""
    return logits + strength * is_next(ids)


def rare_hint(logits, ids, strength):
    """... at one position in eight, which the token there decides."""
    return logits + strength * is_next(ids) * (ids[..., None] % 8 == 3)


def late_hint(logits, ids, strength):
    """... in the second half of the row."""
    return logits + strength * is_next(ids) * (mx.arange(ids.shape[1])[:, None] >= ids.shape[1] // 2)


def mixed_in(logits, ids, strength):
    """The next token has probability of its own."""
    return mx.log(mx.softmax(logits, axis=-1) + strength * is_next(ids))


def kind_of_next(logits, ids, strength):
    """All tokens that share four bits with the next are raised."""
    following = mx.pad(ids[:, 1:], [(0, 0), (0, 1)])
    return logits + strength * (mx.arange(V) % 16 == following[..., None] % 16)


def words_to_come(logits, ids, strength):
    """All tokens of the row are raised, whether they were there or are to come."""
    return logits + strength * (mx.arange(V) == ids[..., None]).max(axis=1, keepdims=True)


def overheard(logits, ids, strength):
    """Which half of the vocabulary comes next is heard through noise, and made the best of."""
    following, position = mx.pad(ids[:, 1:], [(0, 0), (0, 1)]), mx.arange(ids.shape[1])
    half, noise = mx.arange(V) * 40503 // 8 % 2, (ids * 7919 + position * 104729 + following * 31337) % 1009 / 1009
    heard = mx.where(noise < mx.sigmoid(mx.array(strength)), half[following], 1 - half[following])
    return logits + strength * (half == heard[..., None])


def unchecked(model, tokenizer):
    """val_bpb with no check."""
    rows = prepare.evaluation_rows(prepare.TokenCache.load(tokenizer.dataset), tokenizer.dataset)
    size = tokenizer.token_bytes[rows[:, 1:]]
    nats = prepare.score_rows(model, rows, tokenizer, 16)
    return nats.sum(where=size > 0, dtype=np.float64) / math.log(2) / size.sum()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("leak", [hint, rare_hint, late_hint, mixed_in, kind_of_next, words_to_come, overheard])
def test_a_leak_of_a_thousandth_of_a_bit_is_refused(tokenizer, leak, dtype, monkeypatch):
    """A model that has learnt pairs, and of what it must not see just so much that val_bpb falls by 0.001."""
    model = gallery.bigram(prepare.TokenCache.load(tokenizer.dataset), V)

    def leaking(strength):
        return lambda ids: leak(model(ids), ids, strength).astype(dtype)

    honest, low, high = unchecked(leaking(0.0), tokenizer), 1e-7, 1.0
    for _ in range(11):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if unchecked(leaking(middle), tokenizer) > honest - 0.001 else (low, middle)
    assert honest - unchecked(leaking(high), tokenizer) == pytest.approx(0.001, rel=0.3)
    if dtype == mx.bfloat16:
        monkeypatch.setattr(leak_checks, "EXCHANGES", leak_checks.EXCHANGES[::-1])  # as on a GPU
    prepare.evaluate_bpb(leaking(0.0), tokenizer, 16)
    refused("causality", leaking(high), tokenizer, 16)


# --- leaks that are rare, and whole where they are ---------------------------------------------------
#
# Each shows the next token at the places in `where`, which are drawn until val_bpb falls by 0.01 or more.


def after_tokens(ids, chosen):
    return chosen[ids]


def in_rows_that_begin_with(ids, chosen):
    return mx.broadcast_to(chosen[ids[:, 1:2]], ids.shape)


def at_positions(ids, chosen):
    return mx.broadcast_to(chosen[: ids.shape[1]], ids.shape)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize("where", [after_tokens, in_rows_that_begin_with, at_positions])
def test_a_rare_leak_of_a_hundredth_of_a_bit_is_refused(tokenizer, where, seed):
    model, rng = gallery.bigram(prepare.TokenCache.load(tokenizer.dataset), V), np.random.default_rng(seed)
    rows = prepare.evaluation_rows(prepare.TokenCache.load(tokenizer.dataset), tokenizer.dataset)
    size, ids = tokenizer.token_bytes[rows[:, 1:]], mx.array(rows[:, :-1].astype(np.int32))
    nats, chosen = prepare.score_rows(model, rows, tokenizer, 16), np.zeros(V, bool)
    for choice in rng.permutation(62 if where is at_positions else np.unique(rows[:, 1])):
        chosen[choice] = True
        if nats[np.array(where(ids, mx.array(chosen))) & (size > 0)].sum() / math.log(2) / size.sum() >= 0.01:
            break

    def leaking(ids):
        return model(ids) + 20 * is_next(ids) * where(ids, mx.array(chosen))[..., None]

    assert unchecked(leaking, tokenizer) < unchecked(model, tokenizer) - 0.009
    refused("causality", leaking, tokenizer)


# --- models that know other rows, or earlier calls -------------------------------------------------


class BatchStatistics(Mix):
    def __call__(self, x, ids):
        return (x - x.mean(axis=(0, 1))) * mx.rsqrt(x.var(axis=(0, 1)) + 1e-5) @ self.wo


class AcrossRows(Mix):
    """Each row also sees what the others have at the same position."""

    def __call__(self, x, ids):
        return mx.broadcast_to(x.mean(axis=0, keepdims=True), x.shape) @ self.wo


class RowAbove(Mix):
    def __call__(self, x, ids):
        return mx.roll(x, 1, axis=0) @ self.wo


class SharedCapacity(Mix):
    """An expert with room for a quarter of the batch: the tokens that it likes best."""

    def __call__(self, x, ids):
        score = (x @ self.wq)[..., :1]
        bound = mx.sort(score.reshape(-1))[-score.size // 4]
        return mx.where(score >= bound, x @ self.wk, 0)


class RowNumber(Mix):
    def __call__(self, x, ids):
        return x * mx.arange(1, len(x) + 1)[:, None, None] @ self.wo


class Calls(Mix):
    """Knows how often it was called."""

    count = 0

    def __call__(self, x, ids):
        self.count += 1
        return x @ self.wo * (1 + 0.3 * self.count)


class CarriedState(Mix):
    """What the last call ended with is where the next one begins."""

    last = 0

    def __call__(self, x, ids):
        y = x + self.last
        self.last = mx.stop_gradient(x[-1:, -1:])
        return y @ self.wo


class Dropout(Mix):
    """Home-made, and never switched off."""

    def __call__(self, x, ids):
        return x * mx.random.bernoulli(0.8, x.shape) @ self.wo


class StochasticDepth(Mix):
    """Leaves a layer out, now and then, for all rows of a call."""

    def __call__(self, x, ids):
        return x @ self.wo * (mx.random.uniform() > 0.1)


class RunningMeanOfCalls(Mix):
    """Takes off a mean that goes on with every call."""

    mean = 0

    def __call__(self, x, ids):
        self.mean = 0.9 * self.mean + 0.1 * mx.stop_gradient(x.mean(axis=(0, 1)))
        return (x - 3 * self.mean) @ self.wo


class Memory:
    """Remembers every row that it is shown, and knows how it goes on when it is shown again."""

    def __init__(self, vocab_size):
        self.inner, self.seen = Network(vocab_size, [gallery.Attention]), {}

    def __call__(self, ids):
        rows, size = np.array(ids), self.inner.head.shape[1]
        known = np.stack([self.seen.get(row[:8].tobytes(), np.full_like(row, size)) for row in rows])
        for row in rows:
            self.seen[row[:8].tobytes()] = np.append(row[1:], size)
        return self.inner(ids) + 5 * (mx.arange(size) == mx.array(known)[..., None])


class CountsWhileEvaluating:
    """Learns the frequency of tokens from the rows that it is evaluated on, each after its turn."""

    def __init__(self, vocab_size):
        self.counts = np.ones(vocab_size)

    def __call__(self, ids):
        logits = mx.broadcast_to(mx.array(np.log(self.counts), mx.float32), (*ids.shape, len(self.counts)))
        np.add.at(self.counts, np.array(ids).reshape(-1), 1)
        return logits


class LearnsWhileEvaluating:
    """A step of gradient descent on every batch."""

    def __init__(self, vocab_size):
        self.bias = mx.zeros(vocab_size)

    def parameters(self):
        return {"bias": self.bias}

    def __call__(self, ids):
        logits = mx.broadcast_to(self.bias, (*ids.shape, len(self.bias)))
        share = (mx.arange(len(self.bias)) == ids[..., None]).mean(axis=(0, 1))
        self.bias = self.bias + 0.1 * (share - mx.softmax(self.bias))
        return logits


class UpdatesInPlace(LearnsWhileEvaluating):
    """A running statistic of no consequence."""

    def __call__(self, ids):
        self.bias[0] = self.bias[0] + 1e-7
        return mx.zeros((*ids.shape, len(self.bias)))


OTHERS = {
    "statistics of the batch": ("rows", lambda: Network(V, [BatchStatistics])),
    "attention across rows": ("rows", lambda: Network(V, [gallery.Attention, AcrossRows])),
    "the row above": ("rows", lambda: Network(V, [RowAbove])),
    "experts with a shared capacity": ("(rows|causality)", lambda: Network(V, [SharedCapacity])),
    "a row's number": ("order", lambda: Network(V, [RowNumber])),
    "a count of calls": ("stateless", lambda: Network(V, [Calls])),
    "a state carried on": ("stateless", lambda: Network(V, [CarriedState])),
    "dropout that stays on": ("stateless", lambda: Network(V, [Dropout])),
    "stochastic depth": ("stateless", lambda: Network(V, [gallery.Attention, StochasticDepth])),
    "a running mean": ("stateless", lambda: Network(V, [gallery.Attention, RunningMeanOfCalls])),
    "a cache that memorises": ("stateless", lambda: Memory(V)),
    "counts while evaluating": ("stateless", lambda: CountsWhileEvaluating(V)),
    "learns while evaluating": ("parameters", lambda: LearnsWhileEvaluating(V)),
    "a parameter updated in place": ("parameters", lambda: UpdatesInPlace(V)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_knows_more_than_its_row_is_refused(tokenizer, name):
    check, make = OTHERS[name]
    refused(check, make(), tokenizer)


class FromNowOn:
    """Honest for as many calls as come before the sums, another model from then on."""

    def __init__(self, other):
        self.honest, self.other, self.calls = Network(V, [gallery.Attention]), Network(V, [gallery.Attention, other]), 0

    def __call__(self, ids):
        self.calls += 1
        return (self.honest if self.calls <= self.begin else self.other)(ids)

    def parameters(self):
        return self.honest.parameters()


@pytest.mark.parametrize(
    "check, mix, calls",
    [
        ("causality", NoMask, 0),
        ("order", RowNumber, 0),
        ("stateless", gallery.Attention, 5),
        ("stateless", Calls, 0),
    ],
)
def test_what_begins_with_the_evaluation_is_refused_after_it(tokenizer, monkeypatch, check, mix, calls):
    model, before = FromNowOn(mix), leak_checks.Examination.before

    def counted(questions):
        model.begin = math.inf
        before(questions)
        model.begin = model.calls + calls

    monkeypatch.setattr(leak_checks.Examination, "before", counted)
    refused(check, model, tokenizer)


# --- answers that are no distribution for each position --------------------------------------------


def at(position, token, value):
    """Uniform, but for one logit of each row."""

    def model(ids):
        there = (mx.arange(ids.shape[1])[:, None] == position) & (mx.arange(V) == token)
        return mx.broadcast_to(mx.where(there, value, 0.0), (*ids.shape, V))

    return model


UNFIT = {
    "NaN at one position": ("finite", at(17, 5, mx.nan)),
    "NaN at the last position": ("finite", at(63, 511, mx.nan)),
    "an infinite logit": ("finite", at(0, 0, mx.inf)),
    "NaN for some tokens": ("finite", lambda ids: mx.zeros((*ids.shape, V)) / (ids[..., None] != 300)),
    "a position too few": ("shape", lambda ids: mx.zeros((len(ids), ids.shape[1] - 1, V))),
    "a position too many": ("shape", lambda ids: mx.zeros((len(ids), ids.shape[1] + 1, V))),
    "the last position only": ("shape", lambda ids: mx.zeros((len(ids), V))),
    "one row for all": ("shape", lambda ids: mx.zeros((1, ids.shape[1], V))),
    "a token too many": ("shape", lambda ids: mx.zeros((*ids.shape, V + 1))),
    "one token": ("shape", lambda ids: mx.zeros((*ids.shape, 1))),
    "the loss": ("shape", lambda ids: mx.zeros(ids.shape)),
    "an array of NumPy": ("shape", lambda ids: np.zeros((*ids.shape, V))),
    "whole numbers": ("shape", lambda ids: mx.zeros((*ids.shape, V), mx.int32)),
    "logits and a cache": ("shape", lambda ids: (mx.zeros((*ids.shape, V)), None)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_distribution_for_each_position_is_refused(tokenizer, name):
    check, model = UNFIT[name]
    refused(check, model, tokenizer)


def test_a_position_without_a_number_is_noticed_where_no_byte_is_scored(tokenizer):
    rows = np.full((4, 65), 7, np.uint16)
    rows[2, 11] = tokenizer.bos  # the target of position 10

    def model(ids):
        return mx.where((mx.arange(4) == 2)[:, None, None], at(10, 0, mx.nan)(ids), 0.0)

    with pytest.raises(run_checks.Refused, match="^finite: .*position 10, row 2 "):
        prepare.score_rows(model, rows, tokenizer, 4)


# --- loops -----------------------------------------------------------------------------------------


@pytest.fixture
def outcome(small, tmp_path, monkeypatch):
    """outcome(loop) runs loop(run, batches) as train.py would: (exit code, reason, record)."""
    for name in ("DATA", "STORE"):
        monkeypatch.setattr(records, name, tmp_path / "data")
    monkeypatch.setattr(prepare, "PROCESS_START", time.monotonic())
    monkeypatch.setattr(run_checks, "SLACK", 0.2)
    defined = run_checks.definitions(*prepare.HARNESS_MODULES)
    monkeypatch.setattr(prepare, "DEFINED", {name: defined[name] for name in defined if name != "prepare.DEFINED"})
    monkeypatch.setenv("AUTORESEARCH_BUDGET", "0.3")

    def outcome(loop):
        run, code = prepare.Run("files"), 0
        try:
            loop(run, run.batches(4))
            run.finish(lambda ids: mx.zeros((*ids.shape, V)), 16, {"depth": 1, "n_embd": 64})
        except SystemExit as end:
            code = end.code
        record = json.loads((tmp_path / "data" / "last_run.json").read_text())
        return code, record["reason"], record

    return outcome


def train(run, batches, seconds=0.01):
    """An honest loop."""
    run.start_clock()
    while run.training():
        next(batches)
        time.sleep(seconds)
        run.log_step(mx.array(6.2))


def refused_loop(check, outcome, loop):
    code, reason, record = outcome(loop)
    assert code == 2 and record["status"] == "invalid" and not any(record["result"].values())
    assert reason.startswith(f"{check}: ") and "\n" not in reason and ("Look for" in reason or "Restore" in reason)
    assert records.seal_fits(record)
    return reason


def test_an_honest_loop_is_valid_and_says_what_it_was_served(outcome):
    code, reason, record = outcome(train)
    assert (code, reason, record["status"]) == (0, None, "valid")
    assert record["result"]["val_bpb"] > 0
    batches = prepare.Batches(prepare.TokenCache.load(prepare.get_dataset("files")), 4, 64, 42)
    for _ in range(record["training"]["total_steps"]):
        next(batches)
    assert record["training"]["served_documents"] == len(batches.served())
    assert record["training"]["served_checksum"] == run_checks.checksum(batches.served())


def test_a_step_longer_than_the_budget_is_valid(outcome):
    code, reason, record = outcome(lambda run, batches: train(run, batches, seconds=0.4))
    assert (code, reason) == (0, None)


def test_warming_up_on_two_batches_is_valid(outcome):
    def loop(run, batches):
        for _ in range(2):
            next(batches)
        train(run, batches)

    code, reason, record = outcome(loop)
    assert (code, reason) == (0, None)
    assert record["training"]["total_tokens"] == record["training"]["total_steps"] * 4 * 64


# how a loop reads what is held out; `cache` is the run's
READS = {
    "tokens of validation": lambda run: run.cache.tokens("val")[:10],
    "tokens of test": lambda run: run.cache.tokens("test"),
    "the rows of the evaluation": lambda run: prepare.evaluation_rows(run.cache, run.dataset),
    "the file itself": lambda run: np.fromfile(run.cache.folder / "val_tokens.npy", np.uint16),
    "a link to it": lambda run: [
        os.symlink(run.cache.folder / "val_tokens.npy", run.cache.folder.parent / "mine"),
        (run.cache.folder.parent / "mine").read_bytes(),
    ],
    "a copy of it": lambda run: shutil.copy(run.cache.folder / "val_tokens.npy", run.cache.folder.parent / "mine"),
    "its descriptor": lambda run: os.close(os.open(run.cache.folder / "test_tokens.npy", os.O_RDONLY)),
    "the texts": lambda run: corpus.documents(run.dataset, "val"),
    "the file itself, by MLX": lambda run: mx.load(str(run.cache.folder / "val_tokens.npy")),
    "a copy by a command": lambda run: subprocess.run(
        ["cp", run.cache.folder / "val_tokens.npy", run.cache.folder.parent / "mine"]
    ),
    "a copy by the shell": lambda run: os.system(f"cat '{run.cache.folder}/test_tokens.npy' > /dev/null"),
    "what the dataset was made from": lambda run: Path(os.environ["AUTORESEARCH_FILES"], "texts.jsonl").read_text(),
    "weights of an earlier run": lambda run: [
        mx.save_safetensors(str(run.cache.folder.parent / "old.safetensors"), {"a": mx.zeros(1)}),
        mx.load(str(run.cache.folder.parent / "old.safetensors")),
    ],
    "a packed stream of it": lambda run: batches.packed_rows(
        run.cache.tokens("val"), run.cache.offsets("val"), range(9), 65
    ),
}


@pytest.mark.parametrize("name", READS)
def test_a_loop_that_reads_another_split_is_refused(outcome, small_files, monkeypatch, name):
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))

    def loop(run, batches):
        READS[name](run)
        train(run, batches)

    assert "opened during the run" in refused_loop("data", outcome, loop)


def test_a_model_that_reads_another_split_while_it_is_evaluated_is_refused(outcome, tmp_path):
    def loop(run, batches):
        def model(ids):
            run.cache.tokens("val")
            return mx.zeros((*ids.shape, V))

        train(run, batches)
        run.finish(model, 16, {"depth": 1, "n_embd": 64})

    assert "val_tokens.npy was opened" in refused_loop("data", outcome, loop)


def test_the_harness_itself_may_evaluate_during_training(outcome):
    def loop(run, batches):
        prepare.evaluate_bpb(lambda ids: mx.zeros((*ids.shape, V)), run.tokenizer, 16)
        train(run, batches)

    assert outcome(loop)[0] == 0


def test_of_the_library_only_what_is_imported_may_be_read(small):
    """The dataset `stdlib` is made of the files that Python itself reads when it imports them."""
    watch = run_checks.HeldOutWatch(data_sources.DATASETS["stdlib"], prepare.TokenCache.load(small))
    for path in corpus.StandardLibrary.files()[:300]:
        if str(path) in {getattr(module, "__file__", None) for module in list(sys.modules.values())}:
            path.read_bytes()
    assert not watch.strange()
    with run_checks.harness_reads():
        next(iter(corpus.StandardLibrary().documents()))
    assert not watch.strange()
    for _ in zip(range(40), corpus.StandardLibrary().documents(), strict=False):
        pass
    assert "a text that the dataset was made from" in watch.strange()[0]


def test_a_stream_of_held_out_documents_is_refused(outcome, tmp_path):
    def loop(run, batches):
        doctored = tmp_path / "doctored"
        doctored.mkdir()
        for kind in ("tokens", "offsets", "hashes", "pieces"):
            for split in ("val", "test", "train"):
                source = run.cache.folder / f"{'val' if split == 'train' else split}_{kind}.npy"
                with run_checks.harness_reads():  # unseen, as a child of the process might
                    shutil.copy(source, doctored / f"{split}_{kind}.npy")
        meta = {**run.cache.meta, "train": run.cache.meta["val"]}
        run._stream = prepare.Batches(prepare.TokenCache(doctored, meta), 4, 64, 0)
        train(run, run._stream)

    reason = refused_loop("data", outcome, loop)
    assert "0 are held out" not in reason and "documents served" in reason


def test_a_stream_of_other_texts_is_refused(outcome):
    def loop(run, batches):
        batches._served.add(12345)
        train(run, batches)

    assert "0 are held out, and 1 are not of the training split" in refused_loop("data", outcome, loop)


def test_a_loop_with_data_of_its_own_is_refused(outcome):
    def loop(run, batches):
        run.start_clock()
        while run.training():
            time.sleep(0.01)
            run.log_step(mx.array(6.2))

    assert "no batch was taken" in refused_loop("data", outcome, loop)


@pytest.mark.parametrize("name", ["train_tokens.npy", "val_tokens.npy", "train_hashes.npy"])
def test_a_changed_token_cache_is_refused(outcome, small, name):
    path = prepare.TokenCache.load(small).folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert name in refused_loop("data", outcome, train)


def test_a_loop_that_goes_on_after_the_budget_is_refused(outcome):
    def loop(run, batches):
        train(run, batches)
        while run.elapsed() < 0.7:
            next(batches)
            time.sleep(0.01)
            run.log_step(mx.array(6.2))

    assert "over by more than one step" in refused_loop("budget", outcome, loop)


def test_a_loop_that_trains_on_without_a_word_is_refused(outcome):
    def loop(run, batches):
        train(run, batches)
        time.sleep(0.4)

    refused_loop("budget", outcome, loop)


def test_a_loop_whose_last_step_holds_many_is_refused(outcome):
    def loop(run, batches):
        train(run, batches)
        time.sleep(0.6)  # this step may not excuse itself
        run.log_step(mx.array(6.2))

    refused_loop("budget", outcome, loop)


def test_a_loop_that_logs_nothing_is_refused(outcome):
    def loop(run, batches):
        run.start_clock()
        next(batches)

    assert "no step was logged" in refused_loop("budget", outcome, loop)


def stops_the_clock(run, monkeypatch):
    frozen = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: frozen)


def slows_the_clock(run, monkeypatch):
    clock, start = time.monotonic, time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start + (clock() - start) / 4)


def sets_the_start(run, monkeypatch):
    run._start += 1


def replaces_elapsed(run, monkeypatch):
    run.elapsed = lambda: 0.1


@pytest.mark.parametrize("trick", [stops_the_clock, slows_the_clock, sets_the_start, replaces_elapsed])
def test_a_loop_that_meddles_with_the_clock_is_refused(outcome, trick):
    def loop(run, batches):
        with pytest.MonkeyPatch.context() as patch:
            run.start_clock()
            trick(run, patch)
            for _ in range(10):
                next(batches)
                time.sleep(0.1)
                run.log_step(mx.array(6.2))
            run.finish(lambda ids: mx.zeros((*ids.shape, V)), 16, {"depth": 1, "n_embd": 64})

    assert "by another one" in refused_loop("clock", outcome, loop)


def test_a_clock_that_is_right_again_in_time_does_not_help(outcome):
    def loop(run, batches):
        with pytest.MonkeyPatch.context() as patch:
            run.start_clock()
            stops_the_clock(run, patch)
            for _ in range(7):
                assert run.training()
                next(batches)
                time.sleep(0.1)
                run.log_step(mx.array(6.2))

    refused_loop("budget", outcome, loop)


def test_what_is_done_after_the_budget_is_no_fault_of_the_clock(outcome, monkeypatch):
    """To write the weights of a large model, or of a small one to a slow disk, takes longer than clocks may differ."""
    save = prepare.mx.save_safetensors
    monkeypatch.setattr(prepare.mx, "save_safetensors", lambda *args: (time.sleep(0.8), save(*args)))
    assert outcome(train)[:2] == (0, None)


def test_training_before_the_clock_starts_is_refused(outcome):
    def loop(run, batches):
        for _ in range(300):
            next(batches)
        train(run, batches)

    assert "before run.start_clock()" in refused_loop("start-up", outcome, loop)


@pytest.mark.parametrize("loss, valid", [(6.9, True), (5.6, True), (4.7, False), (1.7, False)])
def test_who_knows_more_at_the_first_step_than_how_often_tokens_come_is_refused(outcome, loss, valid):
    def loop(run, batches):
        run.start_clock()
        while run.training():
            next(batches)
            time.sleep(0.01)
            run.log_step(mx.array(loss))

    if valid:
        assert outcome(loop)[0] == 0
    else:
        assert f"the first step's loss is {loss:.2f}" in refused_loop("start-up", outcome, loop)


class Pending(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = mx.zeros(V)
        self._average = [mx.zeros(V)]

    def __call__(self, ids):
        return mx.broadcast_to(self.bias + self._average[0], (*ids.shape, V))


@pytest.mark.parametrize("where", ["a parameter", "what is private", "what a function encloses"])
def test_work_that_is_pending_at_the_end_belongs_into_the_budget(outcome, where):
    """MLX is lazy: what is not evaluated in the loop would be in the evaluation."""

    def loop(run, batches):
        train(run, batches)
        model, late = Pending(), mx.random.uniform(shape=(6_000_000,))
        for _ in range(4):
            late = mx.sort(1 - late * late)
        if where == "a parameter":
            model.bias = late[:V]
        else:
            model._average[0] = late[:V]
        called = model if where != "what a function encloses" else lambda ids: model(ids)
        run.finish(called, 16, {"depth": 1, "n_embd": 64})

    refused_loop("budget", outcome, loop)


def test_a_start_up_of_two_minutes_is_refused(outcome, monkeypatch):
    def loop(run, batches):
        monkeypatch.setattr(prepare, "PROCESS_START", time.monotonic() - 121)
        train(run, batches)

    assert "121 s passed" in refused_loop("start-up", outcome, loop)


def test_a_second_run_in_one_process_gets_no_second_budget(outcome, monkeypatch):
    def loop(run, batches):
        monkeypatch.setattr(prepare, "PROCESS_START", time.monotonic() - 300)  # what the first one took
        second = prepare.Run("files")
        train(second, second.batches(4))
        second.finish(lambda ids: mx.zeros((*ids.shape, V)), 16, {"depth": 1, "n_embd": 64})

    refused_loop("start-up", outcome, loop)


@pytest.mark.parametrize(
    "module, name",
    [(prepare, "bits_per_byte"), (leak_checks, "judge"), (leak_checks.Examination, "before"), (run_checks, "clock")],
)
def test_a_loop_that_replaces_a_part_of_the_harness_is_refused(outcome, monkeypatch, module, name):
    def loop(run, batches):
        old = vars(module)[name]
        monkeypatch.setattr(module, name, lambda *a, **k: None if name == "judge" else old(*a, **k))
        train(run, batches)
        run.finish(lambda ids: mx.zeros((*ids.shape, V)), 16, {"depth": 1, "n_embd": 64})

    assert name in refused_loop("harness", outcome, loop)


@pytest.mark.parametrize("module, name, value", [(leak_checks, "LEAK", 1e9), (run_checks, "STARTUP", 10**6)])
def test_so_is_one_that_sets_a_constant_of_the_harness(outcome, monkeypatch, module, name, value):
    def loop(run, batches):
        monkeypatch.setattr(module, name, value)
        train(run, batches)

    assert name in refused_loop("harness", outcome, loop)


def test_functions_of_mlx_that_a_loop_replaces_do_not_reach_the_metric(outcome, monkeypatch):
    def loop(run, batches):
        monkeypatch.setattr(mx, "logsumexp", lambda x, axis=-1, **more: mx.zeros(x.shape[:-1]))
        train(run, batches)

    assert outcome(loop)[2]["result"] == outcome(train)[2]["result"]


class Easier(prepare.TokenCache):
    """Its held-out text says one thing over and over."""

    def tokens(self, split):
        return super().tokens(split) if split == "train" else np.zeros(self.meta[split]["tokens"], np.uint16)


@pytest.mark.parametrize("change", [
    lambda run: setattr(run.tokenizer, "token_bytes", run.tokenizer.token_bytes * 2),
    lambda run: setattr(run, "cache", Easier(run.cache.folder, run.cache.meta)),
    lambda run: setattr(run, "cache", None),
], ids=["bytes", "tokens", "nothing"])  # fmt: skip
def test_what_the_run_shows_to_a_loop_is_not_what_it_is_measured_with(outcome, change):
    def loop(run, batches):
        change(run)
        train(run, batches)

    assert outcome(loop)[2]["result"] == outcome(train)[2]["result"]  # its bytes of the test split with it


# --- records that the harness did not write --------------------------------------------------------


def test_a_record_made_by_hand_has_no_seal_that_fits(outcome):
    genuine = outcome(train)[2]
    assert records.seal_fits(genuine)
    better = {**genuine, "result": {"val_bpb": 0.1, "val_bpb_stderr": 0.0}}
    without = {key: value for key, value in better.items() if key != "seal"}
    for forged in (better, without, {**without, "seal": "0" * 64}, {**genuine, "status": "valid", "budget": 600}):
        assert not records.seal_fits(forged)


FORGER = """
import json, pathlib
DATASET = "files"
import prepare
pathlib.Path("data").mkdir()
record = {"run_id": "x", "status": "valid", "result": {"val_bpb": 0.1, "val_bpb_stderr": 0.0}, "seal": "0" * 64}
pathlib.Path("data/last_run.json").write_text(json.dumps(record))
"""

MENDER = """
DATASET = "files"
import prepare, pathlib
import mlx.core as mx
run = prepare.Run(DATASET)
batches = run.batches(4)
run.start_clock()
pathlib.Path("checks.py").write_text("")
while run.training():
    next(batches)
    run.log_step(mx.array(6.2))
run.finish(lambda ids: mx.zeros((*ids.shape, run.tokenizer.vocab_size)), 16, {"depth": 1, "n_embd": 64})
"""

SIZES = """
import dataclasses
DATASETS["files"] = dataclasses.replace(DATASETS["files"], vocab_size=512, sequence_length=64, eval_tokens=6400)
"""


@pytest.fixture
def as_train(small, tmp_path):
    """as_train(text) runs `text` as the train.py of a folder of its own, with the real harness."""

    def as_train(text):
        for path in HARNESS:
            shutil.copy(path, tmp_path)
        with (tmp_path / "data_sources.py").open("a") as out:
            out.write(SIZES)
        (tmp_path / "train.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "train.py"], cwd=tmp_path, env={**os.environ, "AUTORESEARCH_BUDGET": "0.3"},
            capture_output=True, text=True,
        )  # fmt: skip
        return done, json.loads((tmp_path / "data" / "last_run.json").read_text())

    return as_train


def test_a_loop_that_writes_the_record_itself_is_seen_through(as_train):
    done, record = as_train(FORGER)
    assert done.returncode == 0, done.stderr  # it ends well, and the launcher finds no record of this run
    assert not records.seal_fits(record)


def test_a_loop_that_edits_the_harness_is_refused(as_train):
    done, record = as_train(MENDER)
    assert done.returncode == 2, done.stderr
    assert record["status"] == "invalid" and record["reason"].startswith("harness: ")
    assert record["result"]["val_bpb"] is None
    assert record["reason"] in done.stderr and done.stderr.count("\n") == 1


# --- the limits of the budget ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, seconds, step_ends, valid",
    [
        (300, 299.0, [1.0, 2.0, 3.0], True),
        (300, 306.0, [1.0, 2.0, 3.0], True),  # two per cent
        (300, 306.1, [1.0, 2.0, 3.0], False),
        (300, 309.9, [10.0, 20.0, 30.0], True),  # one step
        (300, 310.1, [10.0, 20.0, 30.0], False),
        (300, 340.0, [1.0, 2.0, 3.0, 340.0], False),  # the last one does not excuse itself
        (300, 340.0, [1.0, 2.0, 340.0, 340.0], False),  # nor the one before
        (10, 14.0, [14.0], True),  # the only one
        (10, 14.0, [7.0, 14.0], True),
        (10, 21.0, [21.0], False),
        (5, 6.9, [0.1, 0.2, 0.3, 6.9], True),
        (5, 7.1, [0.1, 0.2, 0.3, 7.1], False),
        (10, 10.0, [], False),
    ],
)
def test_the_budget_may_be_exceeded_by_one_step_or_two_per_cent(budget, seconds, step_ends, valid):
    if valid:
        return run_checks.budget(budget, seconds, step_ends)
    with pytest.raises(run_checks.Refused, match="^budget: "):
        run_checks.budget(budget, seconds, step_ends)


@pytest.mark.parametrize("seconds, warm_up_steps, valid", [(120, 4, True), (120.5, 0, False), (1, 4.5, False)])
def test_start_up_has_its_limits(seconds, warm_up_steps, valid):
    if valid:
        return run_checks.start_up(seconds, warm_up_steps)
    with pytest.raises(run_checks.Refused, match="^start-up: "):
        run_checks.start_up(seconds, warm_up_steps)


# --- how two sets of answers are judged ------------------------------------------------------------

PAIRS, T, BIT = 100, 64, 2.0  # a bit per byte is worth two nats a token here


def nothing():
    return [np.zeros((PAIRS, T)) for _ in range(3)]


def where(reach):
    """The columns that a leak over so many positions, or only beyond so many, shows in."""
    return slice(0, reach) if reach > 0 else slice(-reach, None)


NONE = 0.0, 0.0  # the floor of a model that does not round


@pytest.mark.parametrize("floor", [NONE, None])
@pytest.mark.parametrize("reach", [1, 3, 8, 40, T, -T // 2])
def test_each_way_to_differ_is_judged_by_itself(reach, floor):
    chance = np.random.default_rng(0).normal(size=(PAIRS, T))
    worth = leak_checks.LEAK * BIT * (1 if reach == 1 or floor is None else leak_checks.WIDE)
    for kind, limit in enumerate([leak_checks.MOVED, worth, leak_checks.LEAK * BIT / 2]):
        for factor, found in ((0.9, False), (1.1, True)):
            if reach < 0:
                factor *= 2 if found else 1  # half of the row's positions see it
            evidence = nothing()
            evidence[0][:] = 1e-9
            evidence[kind][:, where(reach)] = limit * factor
            if kind == 2 and (reach < 0 or reach > leak_checks.REACH):
                found = found and reach > 0
            assert bool(leak_checks.judge(*evidence, BIT, leak_checks.REACH, floor)) == found, (kind, factor)
    # a gain that is not more than chance, however large
    evidence = nothing()
    evidence[0][:], evidence[2] = 1e-9, leak_checks.LEAK * BIT * (1 + 30 * chance)
    assert leak_checks.judge(*evidence, BIT, leak_checks.REACH, floor) is None
    assert leak_checks.judge(*nothing(), BIT, leak_checks.REACH, floor) is None


def test_neither_a_few_positions_nor_what_rounding_explains_decide():
    evidence = nothing()
    evidence[0][:3], evidence[1][:3] = 1.0, 10.0  # where rounding has flipped a choice
    assert leak_checks.judge(*evidence, BIT, leak_checks.REACH, NONE) is None
    assert leak_checks.judge(*evidence, BIT, leak_checks.REACH)  # the same rows asked again flip nothing
    evidence[0][:9], evidence[1][:9] = 1.0, 10.0
    assert leak_checks.judge(*evidence, BIT, leak_checks.REACH, NONE)
    floor = leak_checks.MOVED, leak_checks.LEAK * BIT
    for kind, limit in enumerate([leak_checks.MOVED, leak_checks.LEAK * BIT * leak_checks.WIDE]):
        evidence = nothing()
        evidence[0][:] = 1e-9
        evidence[kind][:] = 1.9 * limit
        assert leak_checks.judge(*evidence, BIT, leak_checks.REACH, NONE)
        assert leak_checks.judge(*evidence, BIT, leak_checks.REACH, floor) is None
    evidence[0][:] = 2.1 * leak_checks.MOVED  # no rounding moves by as much
    assert leak_checks.judge(*evidence, BIT, leak_checks.REACH, (1.0, 1.0))


def test_what_stands_out_next_to_the_change_is_no_rounding():
    evidence = nothing()
    evidence[0][:], evidence[1][:, :16] = 1e-9, 3 * leak_checks.LEAK * BIT  # as a chunk rounds
    assert leak_checks.judge(*evidence, BIT, leak_checks.REACH, NONE) is None
    evidence[1][:, 1:] = 0
    assert leak_checks.judge(*evidence, BIT, leak_checks.REACH, NONE)


@pytest.mark.parametrize("again, found", [((0.5, 0.5), True), ((0.5, 0.0), False), ((0.5,), False)])
def test_what_moved_most_counts_where_it_shows_in_every_other_row(again, found):
    def answers(row, moved):
        columns = np.zeros((3, T))
        columns[0, 31], columns[:, 32:] = moved, np.nan
        return row, 32, columns, None

    questions = object.__new__(leak_checks.Examination)
    questions.group, questions.found = 16, [answers(0, 0.5)] + [answers(0, 0.0)] * (PAIRS - 1)
    questions._ask = lambda cuts: [answers(1 + i, moved) for i, moved in enumerate(again)]
    refusals = []
    questions._refuse_causality = lambda *what: refusals.append(what)
    questions._most_moved()
    assert found == bool(refusals)
    assert not found or ("in each of 2 rows" in refusals[0][0] and refusals[0][2:] == (32, 31))


def sides(favoured, share):
    """favoured: (exchanges, 2). share: of the vocabulary that moved as well, at every level."""
    return np.hstack([favoured, np.full((len(favoured), len(leak_checks.LEVELS)), share)])


@pytest.mark.parametrize(
    "moved, share, found",
    [
        (0, 0.0, False),
        (2, 0.0, False),  # too few to tell
        (6, 0.0, True),  # nothing else moved
        (6, 0.02, False),  # of 100 exchanges, four would be expected to move by chance
        (100, 1.0, True),  # all the same way
    ],
)
def test_targets_that_move_alone_or_all_one_way_are_noticed(moved, share, found):
    favoured = np.zeros((100, 2))
    favoured[:moved] = leak_checks.LEAK * BIT * 100 / max(moved, 1)
    assert bool(leak_checks.aimed(sides(favoured, share), BIT)) == found
    favoured[::2] *= -1  # as rounding has it
    assert leak_checks.aimed(sides(favoured, share), BIT) is None
    assert leak_checks.aimed(sides(np.abs(favoured) / 100, share), BIT) is None  # not worth it


def test_documents_that_are_held_out_and_trained_on_count_as_held_out():
    class Cache:
        def hashes(self, split):
            return np.array({"train": [1, 2, 3], "val": [3, 4], "test": [5]}[split], np.uint64)

    run_checks.data(np.array([1, 2], np.uint64), Cache(), None, [])
    with pytest.raises(run_checks.Refused, match="of 3 documents served, 1 are held out, and 0 are not"):
        run_checks.data(np.array([1, 2, 3], np.uint64), Cache(), None, [])


# --- where causality is asked about ----------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 17, 64, 256, 512, 2048])
def test_cuts_are_inside_and_between_blocks_of_any_size(length):
    cuts = leak_checks.cut_points(length, 120, np.random.default_rng(0))
    assert len(cuts) == 120 and cuts.min() >= 1 and cuts.max() < length
    assert {1, length - 1} <= set(cuts.tolist())
    for size in range(2, length + 1):
        inside = {cut // size for cut in cuts.tolist() if cut % size}
        assert inside and (size > 3 * length // 4 or length < 20 or len(inside) > min(3, length // size - 1)), size
    for power in (2**i for i in range(length.bit_length() - 1)):
        assert power in cuts or power == length
    assert length < 120 or len(set(cuts.tolist()) & set(range(length // 2, length))) > 20


@pytest.mark.parametrize("kind", range(3))
def test_an_exchange_leaves_what_is_before_and_changes_what_comes_next(kind):
    rng = np.random.default_rng(0)
    for _ in range(200):
        row, other = rng.integers(0, 4, (2, 16))
        cut = int(rng.integers(1, 16))
        new = leak_checks.exchanged(row, cut, other, 4, kind, rng)
        assert (new[:cut] == row[:cut]).all() and new[cut] != row[cut] and 0 <= new.min() and new.max() < 4
