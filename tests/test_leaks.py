"""Models that would score better than they are: each is refused by the check that is meant for it."""

import math
from dataclasses import replace

import gallery
import mlx.core as mx
import numpy as np
import pytest
from conftest import sampled
from gallery import OTHERS, SEES_LATER, Network, evaluate, rows_of

import prepare
from harness import leak_checks
from harness.run_checks import Refused

V = 512


def refused(check, model, tokenizer, batch_size=8):
    with pytest.raises(Refused, match=rf"^{check}: ") as refusal:
        evaluate(model, tokenizer, batch_size)
    return str(refusal.value)


# --- models that see what comes later --------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(SEES_LATER))
def test_what_sees_later_tokens_is_refused(tokenizer, name):
    text = refused("causality", Network(V, SEES_LATER[name]), tokenizer)
    assert "Look for" in text and "at position" in text and "\n" not in text


@pytest.mark.parametrize("batch_size", sampled([1, 3, 8, 40]))
def test_it_is_refused_whatever_the_batch_size(tokenizer, batch_size):
    refused("causality", Network(V, [gallery.NoMask]), tokenizer, batch_size)


class ChunkEnds1024(gallery.ChunkEnds):
    """... which is one position in 1024, but trained, it could be worth 0.001 bits per byte."""

    size = 1024


@pytest.mark.slow
def test_leaks_that_only_long_rows_show_are_refused(small_files, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    dataset = replace(small_files[0], sequence_length=2048, vocab_size=300, eval_tokens=2048 * 3)
    prepare.prepare(dataset)
    tokenizer = prepare.Tokenizer.load(dataset)
    for mix in (gallery.Beyond1024, ChunkEnds1024):
        text = refused("causality", Network(300, [mix], width=16), tokenizer, 4)
        at = int(text.split("at position ")[1].split()[0])
        assert at >= 1024 if mix is gallery.Beyond1024 else at == 1023


class LittleOfTheRow(gallery.Mix):
    """So little of the row's mean that random tokens, whose mean is much the same, do not show it."""

    def __call__(self, x, ids):
        return mx.broadcast_to(0.22 * x.mean(axis=1, keepdims=True), x.shape) @ self.wo


def test_little_of_a_mean_shows_when_one_token_is_put_throughout(tokenizer):
    refused("causality", Network(V, [gallery.Attention, LittleOfTheRow], logit_scale=0.1), tokenizer)


def test_an_untrained_leak_is_refused_before_it_pays(tokenizer):
    """Logits near zero, so that the score hardly moves yet."""
    refused("causality", Network(V, [gallery.Attention, gallery.ShiftByMinusOne], logit_scale=1e-4), tokenizer)


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
    return prepare.evaluate_bpb(model, rows_of(tokenizer), tokenizer, 16).bpb


def leaking_by(leak, worth, model, tokenizer, dtype):
    """`model` with a leak whose strength lowers val_bpb by `worth`."""

    def leaking(strength):
        return lambda ids: leak(model(ids), ids, strength).astype(dtype)

    honest, low, high = unchecked(leaking(0.0), tokenizer), 1e-7, 4.0
    for _ in range(11):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if unchecked(leaking(middle), tokenizer) > honest - worth else (low, middle)
    assert honest - unchecked(leaking(high), tokenizer) == pytest.approx(worth, rel=0.4)
    return leaking(high)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("leak, worth", [
    (hint, 0.001), (rare_hint, 0.001), (late_hint, 0.001), (mixed_in, 0.001), (kind_of_next, 0.001),
    (words_to_come, 0.001), (overheard, 0.008),
])  # fmt: skip
def test_a_leak_of_a_thousandth_of_a_bit_is_refused(tokenizer, leak, worth, dtype):
    """A model that has learnt pairs, and of what it must not see just so much that val_bpb falls by `worth`."""
    model = gallery.bigram(tokenizer)
    evaluate(lambda ids: model(ids).astype(dtype), tokenizer, 16)
    refused("causality", leaking_by(leak, worth, model, tokenizer, dtype), tokenizer, 16)


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
    model, rng = gallery.bigram(tokenizer), np.random.default_rng(seed)
    rows = rows_of(tokenizer)
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


@pytest.mark.parametrize("name", OTHERS)
def test_what_knows_more_than_its_row_is_refused(tokenizer, name):
    check, make = OTHERS[name]
    refused(check, make(V), tokenizer)


def test_it_is_told_what_would_be_right(tokenizer):
    assert "before run.finish" in refused("state", gallery.SnapshotEnsemble(V), tokenizer)
    assert "running" in refused("state", gallery.RunningMean(V), tokenizer)


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
    "the last position only": ("shape", lambda ids: mx.zeros((len(ids), V))),
    "one row for all": ("shape", lambda ids: mx.zeros((1, ids.shape[1], V))),
    "a token too many": ("shape", lambda ids: mx.zeros((*ids.shape, V + 1))),
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

    with pytest.raises(Refused, match="^finite: .*position 10, row 2"):
        prepare.score_rows(model, rows, tokenizer, 4)


# --- how it is asked -------------------------------------------------------------------------------


def test_noise_of_any_shape_that_is_as_likely_up_as_down_passes():
    """20,000 samples each: of normal noise, of noise that is mostly zero, of noise without a variance."""
    rng = np.random.default_rng(0)
    for noise in (
        rng.normal(size=(20_000, 100)),
        rng.normal(size=(20_000, 100)) * (rng.random((20_000, 100)) < 0.02),
        rng.standard_cauchy((20_000, 100)),
    ):
        assert max(map(leak_checks.t_of, noise)) < leak_checks.SURE
    assert leak_checks.t_of(np.full(100, 1e-3)) == pytest.approx(10)


@pytest.mark.parametrize("length", [2, 3, 17, 64, 2048])
def test_cuts_are_inside_and_between_blocks_of_any_size(length):
    cuts = leak_checks.cut_points(length, 2000, np.random.default_rng(0))
    assert len(cuts) == 2000 and min(cuts) >= 1 and max(cuts) < length
    for block in (2**i for i in range((length - 1).bit_length())):
        assert (cuts % block == 0).sum() > 60 and (block < 4 or (cuts % block > 0).sum() > 150)


def test_an_exchange_leaves_what_is_before_and_puts_another_token_after(tokenizer):
    rows, asked = rows_of(tokenizer), []

    def model(ids):
        asked.append(np.array(ids))
        return mx.zeros((*ids.shape, V))

    cuts = np.array([1, 2, 20, 40, 60, 61, 62, 63])
    leak_checks.LeakChecks(model, rows, tokenizer, 8)._exchange(np.arange(8), cuts)
    for old, new, cut in zip(rows[:8, :-1], np.concatenate(asked)[:8], cuts, strict=True):
        assert (new[:cut] == old[:cut]).all() and new[cut] != old[cut] and len({*new[cut:]}) == 1


def test_the_questions_cost_some_hundred_rows(tokenizer):
    asked = []

    def model(ids):
        asked.append(len(ids))
        return mx.zeros((*ids.shape, V))

    rows = rows_of(tokenizer)
    leak_checks.LeakChecks(model, rows, tokenizer, 16).ask(np.full((len(rows), 64), math.log(V), np.float32))
    assert sum(asked) == 2 * (leak_checks.PLACES + leak_checks.EXCHANGES[1]) + 5 * 8
