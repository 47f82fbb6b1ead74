"""Rows and batches: full, best-fit, the same for the same seed, and of training documents alone."""

import dataclasses
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import batches, token_cache
from harness.batches import Batches, packed_rows
from harness.files import file_hash
from harness.token_cache import TokenCache
from harness.tokenizer import Tokenizer

START = 9999  # the document start of the made-up documents here


def made_up(sizes):
    """Documents of these sizes: a start, then tokens that name the document. (tokens, offsets)"""
    documents = [np.array([START] + [i] * (size - 1), np.uint16) for i, size in enumerate(sizes)]
    return np.concatenate(documents), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def pieces(row):
    """The pieces of a row, each from a document start on."""
    starts = [*np.flatnonzero(row == START).tolist(), len(row)]
    return [row[a:b].tolist() for a, b in pairwise(starts)]


def naive_sizes(sizes, order, length, buffered):
    """Best-fit by scanning every buffered document each time: the size of each piece, row by row."""
    buffer, order, row = [], iter(order), []
    while True:
        buffer += [sizes[document] for document in islice(order, buffered - len(buffer))]
        if not buffer:
            return
        space = length - sum(row)
        fitting = [size for size in buffer if size <= space]
        size = max(fitting) if fitting else min(buffer)
        buffer.remove(size)
        row.append(min(size, space))
        if sum(row) == length:
            yield row
            row = []


document_sizes = st.lists(st.integers(2, 40), min_size=1, max_size=80)


@settings(max_examples=50, deadline=None)
@given(document_sizes, st.integers(2, 30), st.sampled_from([1, 2, 7, 1000]), st.randoms(use_true_random=False))
def test_rows_are_full_best_fit_and_lose_nothing_but_what_is_cropped(sizes, length, buffered, random):
    tokens, offsets = made_up(sizes)
    order = list(range(len(sizes)))
    random.shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "PACKING_BUFFER", buffered)
        rows = list(packed_rows(tokens, offsets, order, length))
    found, used = [pieces(row) for row, _ in rows], [document for _, documents in rows for document in documents]
    assert all(len(row) == length and row[0] == START and row.dtype == np.uint16 for row, _ in rows)
    assert [[len(piece) for piece in row] for row in found] == list(naive_sizes(sizes, order, length, buffered))
    assert len(used) == len(set(used)) <= len(order)  # each once; what fills no last row is dropped
    assert sum(sizes) - sum(sizes[i] for i in used) < length
    flat = [piece for row in found for piece in row]
    for piece, document in zip(flat, used, strict=True):
        whole = tokens[offsets[document] : offsets[document + 1]].tolist()
        assert piece == whole[: len(piece)]
    for row in found:  # only the last document of a row is ever cropped
        assert all(len(piece) == sizes[piece[1]] for piece in row[:-1])


def test_an_epoch_has_every_start_once_and_later_pieces_in_turn():
    pieces = np.array([0, 0, 1, 2, 3, 0, 1, *[0] * 43])  # document 1 has three later pieces, document 5 one
    order = list(islice(batches.training_order(pieces, seed=3), 48 * 3))
    epochs = [order[i : i + 48] for i in range(0, len(order), 48)]
    for epoch in epochs:
        assert sorted(i for i in epoch if pieces[i] == 0) == np.flatnonzero(pieces == 0).tolist()
        assert 6 in epoch and len({2, 3, 4} & set(epoch)) == 1
    assert {2, 3, 4} <= set(order)  # three epochs have served the whole text
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order == list(islice(batches.training_order(pieces, seed=3), len(order)))
    assert order != list(islice(batches.training_order(pieces, seed=4), len(order)))


# --- batches ---------------------------------------------------------------------------------------


def numbers(stream, count):
    return [np.array(batch) for batch in islice(stream, count)]


def test_a_batch_is_rows_of_the_training_split(small):
    cache, bos = TokenCache.load(small), Tokenizer.load(small).bos
    stream = Batches(cache, 8, 64, seed=1)
    tokens, offsets = cache.tokens("train"), cache.offsets("train")
    documents = {tokens[a:b].tobytes() for a, b in pairwise(offsets)}
    for batch in numbers(stream, 5):
        assert batch.shape == (8, 65) and batch.dtype == np.int32
        assert (batch[:, 0] == bos).all()
        for row in batch.astype(np.uint16):
            starts = [*np.flatnonzero(row == bos).tolist(), 65]
            whole = [row[a:b].tobytes() for a, b in pairwise(starts)]
            assert all(document in documents for document in whole[:-1])
            assert any(document.startswith(whole[-1]) for document in documents)
    assert stream.tokens == 5 * 8 * 64


def test_the_same_seed_gives_the_same_rows_whatever_the_batch_size(small):
    cache = TokenCache.load(small)
    streams = [Batches(cache, size, 64, seed) for size, seed in ((8, 7), (3, 7), (8, 8))]
    wide, narrow, other = (np.concatenate(numbers(stream, 48 // stream.batch_size)) for stream in streams)
    assert (wide == narrow).all() and not (wide == other).all()


def test_epochs_count_what_was_handed_out_not_what_was_packed_ahead(small):
    cache = TokenCache.load(small)
    stream = Batches(cache, 2, 64, seed=5)
    assert stream.epochs == 0
    rows, order = np.concatenate(numbers(stream, 3)), batches.training_order(cache.pieces("train"), 5)
    again = list(islice(packed_rows(cache.tokens("train"), cache.offsets("train"), order, 65), 6))
    assert (rows == np.stack([row for row, _ in again])).all()
    # An epoch is every start, and one later piece of each document that has any.
    assert stream.epochs == sum(len(used) for _, used in again) / (cache.pieces("train") <= 1).sum()


def test_a_corpus_smaller_than_a_row_is_repeated(small, tmp_path):
    tokenizer = Tokenizer.load(small)
    token_cache.write_split(tokenizer, ["a short one", "and another"], tmp_path, "train", set())
    cache = TokenCache(tmp_path, {"sha256": {path.name: file_hash(path) for path in tmp_path.glob("*.npy")}})
    (batch,) = numbers(Batches(cache, 2, 64, seed=0), 1)
    assert batch.shape == (2, 65) and (batch[:, 0] == tokenizer.bos).all()


def test_a_failure_while_packing_reaches_the_training_loop(small, monkeypatch):
    monkeypatch.setattr(batches, "packed_rows", lambda *_: iter(()))
    stream = Batches(TokenCache.load(small), 2, 64, seed=0)
    for _ in range(2):  # whoever asks again does not wait for ever
        with pytest.raises(ValueError):
            next(stream)


# --- the rows that a run is scored on --------------------------------------------------------------


def test_the_evaluation_rows_are_always_the_same_and_as_many_as_agreed(small):
    cache, bos = TokenCache.load(small), Tokenizer.load(small).bos
    rows = batches.evaluation_rows(cache, small)
    assert (rows[:, 0] == bos).all() and rows.shape[1] == 65
    assert (rows == batches.evaluation_rows(cache, small)).all()
    most = batches.evaluation_rows(cache, dataclasses.replace(small, eval_tokens=10**9, eval_fraction=1.0))
    assert len(rows) <= len(most) <= cache.meta["val"]["tokens"] // 65
    for wanted in (1, 64 * 3, 64 * 7 + 63):
        fewer = batches.evaluation_rows(cache, dataclasses.replace(small, eval_tokens=wanted))
        assert len(fewer) == max(1, wanted // 64) and (fewer == rows[: len(fewer)]).all()
    corpus = sum(cache.meta[split]["tokens"] for split in ("train", "val", "test"))
    share = batches.evaluation_rows(cache, dataclasses.replace(small, eval_fraction=0.002))
    assert len(share) == int(0.002 * corpus) // 64
    assert not (batches.evaluation_rows(cache, small, "test")[0] == rows[0]).all()
