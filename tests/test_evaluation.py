"""The metric: against values computed by hand, whatever the batch, and with an error that means something."""

import json
import math

import gallery
import mlx.core as mx
import numpy as np
import pytest
from gallery import evaluate, rows_of

import prepare
from harness.evaluation import bits_per_byte, select_rows

V = 512


def score(model, tokenizer, batch_size=8, rows=None):
    return prepare.evaluate_bpb(model, rows_of(tokenizer) if rows is None else rows, tokenizer, batch_size)


@pytest.mark.parametrize("claim", [0.0, 1.0, 1e30])
def test_a_model_that_claims_all_tokens_alike_needs_the_logarithm_of_the_vocabulary(tokenizer, claim):
    """No distribution sums to more than one."""
    sizes = tokenizer.token_bytes[rows_of(tokenizer)[:, 1:]]
    found = score(lambda ids: mx.full((*ids.shape, V), claim), tokenizer, 8)
    # exactly: special targets have no bytes, and cost nothing
    assert found.bpb == pytest.approx(math.log2(V) * (sizes > 0).sum() / sizes.sum(), rel=1e-6)
    assert found.nats.size == sizes.size


def test_a_fixed_distribution_scores_as_by_hand(tokenizer):
    """Every position predicts the same distribution: bits and bytes are summed here, one by one."""
    weights = [1 + token % 7 for token in range(V)]
    total, bits, size = sum(weights), 0.0, 0
    for row in rows_of(tokenizer).tolist():
        for token in row[1:]:
            text = b"" if token >= V - 4 else tokenizer.tokens[token]
            if text:
                bits -= math.log2(weights[token] / total)
                size += len(text)
    logits = mx.log(mx.array(weights, mx.float32)) + 3  # a constant changes nothing
    found = score(lambda ids: mx.broadcast_to(logits, (*ids.shape, V)), tokenizer, 8)
    assert found.bpb == pytest.approx(bits / size, rel=1e-6)


def test_rows_of_a_few_tokens_by_hand(tokenizer):
    """Four tokens, logits that depend on the one before; the third target is special."""
    table = np.zeros((V, V), np.float32)
    table[5, 6], table[6, 9], table[9, tokenizer.bos], table[tokenizer.bos, 7] = 2.0, -1.0, 4.0, 1.5
    rows = np.array([[5, 6, 9, tokenizer.bos, 7]], np.uint16)
    nats = prepare.score_rows(lambda ids: mx.array(table)[ids], rows, tokenizer, 1)
    expected = [math.log(V - 1 + math.exp(x)) - x for x in (2.0, -1.0, 4.0, 1.5)]
    assert nats.shape == (1, 4) and nats[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_batch_size_does_not_matter(tokenizer, dtype):
    n = len(rows_of(tokenizer))
    model = gallery.Network(V, [gallery.Rope, gallery.SortedExperts, gallery.PaddedSpectrum], dtype=dtype)
    found = [score(model, tokenizer, size) for size in (1, 7, 16, n, n + 5)]
    for other in found[1:]:
        assert other.bpb == pytest.approx(found[0].bpb, abs=1e-3)
        assert other.stderr == pytest.approx(found[0].stderr, rel=1e-2)


def test_special_tokens_are_in_neither_sum(tokenizer):
    """Rows with and without documents that start inside of them; the cost of a special target is not small."""
    plain = np.full((4, 65), 40, np.uint16)
    broken = plain.copy()
    broken[:, 20:60:10] = tokenizer.bos
    found = []
    for rows in (plain, broken):
        logits = mx.where(mx.arange(V) == tokenizer.bos, -20.0, 0.0)
        found.append(score(lambda ids, x=logits: mx.broadcast_to(x, (*ids.shape, V)), tokenizer, 2, rows))
    size = int(tokenizer.token_bytes[40])
    assert size > 0 and tokenizer.token_bytes[tokenizer.bos] == 0
    assert found[0].bpb == pytest.approx(math.log2(V - 1) / size, rel=1e-6)
    assert found[1].bpb == pytest.approx(found[0].bpb, rel=1e-6)


def test_the_loss_is_taken_in_float32(tokenizer):
    """float16 logits whose exponentials float16 cannot hold."""
    logits = mx.where(mx.arange(V) % 2 == 0, 90.0, 0.0).astype(mx.float16)
    rows = np.full((1, 65), 2, np.uint16)
    nats = prepare.score_rows(lambda ids: mx.broadcast_to(logits, (*ids.shape, V)), rows, tokenizer, 1)
    assert nats == pytest.approx(math.log(V / 2), rel=1e-6)


def test_the_model_is_given_ids_and_nothing_else(tokenizer):
    seen = []

    def model(*arguments, **more):
        seen.append((arguments, more))
        return mx.zeros((*arguments[0].shape, V))

    evaluate(model, tokenizer, 8)
    rows = {row.tobytes() for row in rows_of(tokenizer)[:, :-1].astype(np.int32)}
    for (ids,), more in seen:
        assert not more and ids.shape[1] == 64 and ids.dtype == mx.int32
    asked = [np.array(row).tobytes() for (ids,), _ in seen for row in ids]
    assert rows <= set(asked)


# --- the standard error ----------------------------------------------------------------------------


def test_the_standard_error_is_the_spread_of_many_repetitions():
    """Rows of unequal bytes, and a loss that grows with them: the spread over 4000 draws of such data."""
    rng = np.random.default_rng(1)
    size = rng.integers(20, 200, (4000, 64))
    bits = 0.9 * size + rng.normal(0, 0.3, size.shape) * size
    found = np.array([bits_per_byte(n, s) for n, s in zip(bits, size, strict=True)])
    assert found[:, 0].mean() == pytest.approx(0.9, rel=3e-3)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.05)


def test_a_session_scores_as_many_rows_as_its_first_run_has_time_for(session):
    """The first run chooses; another number would not be comparable."""
    body = "import os; chosen = os.environ['AUTORESEARCH_ROWS'].replace('auto', '77')\n"
    body += "result = {'val_bpb': 1.4, 'val_bpb_stderr': 0.0, 'eval_rows': int(chosen or 999), 'eval_rows_of': 999}\n"
    body += "prepare.finish(1.4, result=result)"
    session.make("setup", "TAG=u", check=0)
    session.write_train(body)
    session.make("baseline", check=0)
    session.experiment(body + " # another")
    rows = {json.loads(path.read_text())["result"].get("eval_rows") for path in (session.path / "data").glob("run_2*")}
    assert rows == {None, 77}
    session.write_train(body.replace("chosen or", "0 or"))
    assert "rows of evaluation is 999, was 77" in session.script("run").stdout


def test_rows_are_spread_over_all_and_never_too_few():
    rows = np.arange(1000)[:, None]
    assert (select_rows(rows, "", 9.0, 30.0) == rows).all() and len(select_rows(rows, "7", 9.0, 30.0)) == 7
    some = select_rows(rows, "auto", 0.1, 30.0)[:, 0]
    assert len(some) == 100 and some[0] == 0 and some[-1] == 999 and np.diff(some).min() > 8
    assert len(select_rows(rows, "auto", 0.1, 900.0)) == 600 and len(select_rows(rows, "auto", 9.0, 30.0)) == 64
