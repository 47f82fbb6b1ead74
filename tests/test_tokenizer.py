"""The tokenizer: text goes in and comes out, and what is loaded is what was saved."""

import base64
import json
from itertools import pairwise

import numpy as np
import pytest
import regex
from hub import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from harness import tokenizer as module
from harness.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(small_files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(small_files[1]))
        return Tokenizer.load(small_files[0])


def encode(tokenizer, text):
    """Token ids, without the document start."""
    ids = tokenizer.encode_documents([text])[0].tolist()
    assert ids[0] == tokenizer.bos
    return ids[1:]


# --- text in, text out -----------------------------------------------------------------------------

any_text = st.text(max_size=200) | st.text(alphabet=" \n\r\t09aZß東🙂\u0301'<|>document", max_size=200)


def own_bpe(ranks, pattern, text):
    """Byte-pair encoding as the papers tell it: always the pair of the lowest rank, the leftmost first."""
    ids = []
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@settings(max_examples=50, deadline=None)
@given(any_text | st.sampled_from(["def f(self):\n        return self._x['a'] + 12345\n", "  \n\n  don't DON'T\r\n"]))
def test_any_text_comes_back_and_the_saved_ranks_mean_what_the_papers_say(small_files, tokenizer, text):
    saved = json.loads((small_files[1] / "files" / "tokens" / "tokenizer.json").read_text())
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved)}
    ids = encode(tokenizer, text)
    assert ids == own_bpe(ranks, module.SPLIT_PATTERN, text)
    assert tokenizer.encoding.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert max(ids, default=0) < tokenizer.bos  # no special token, whatever is written


@pytest.mark.parametrize("unit", [" ", "\r\n", "\u3000 ", "a"], ids=ascii)
def test_a_million_of_anything_is_encoded_whole(tokenizer, unit):
    text = "before" + unit * (1_050_000 // len(unit)) + "after"
    assert tokenizer.encoding.decode(encode(tokenizer, text)) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(any_text | st.sampled_from([*SPECIAL_TOKENS, "a<|document|>b", "long " * 9]), min_size=1, max_size=8))
def test_documents_encoded_together_are_what_each_is_alone(tokenizer, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STRETCH", 30)
        found = tokenizer.encode_documents(texts)
        assert [ids.tolist()[1:] for ids in found] == [encode(tokenizer, text) for text in texts]
    assert all(ids.dtype == np.uint16 for ids in found)


def test_digits_go_in_ones_and_twos_and_special_tokens_have_no_bytes(small_files, tokenizer):
    assert regex.findall(module.SPLIT_PATTERN, "in 1984567 days") == ["in", " ", "19", "84", "56", "7", " days"]
    assert not any(regex.search(rb"\d{3}", token) for token in tokenizer.tokens)
    assert tokenizer.vocab_size == small_files[0].vocab_size == len(tokenizer.tokens) + 4
    assert tokenizer.bos == tokenizer.vocab_size - 4  # they come last
    assert tokenizer.token_bytes[-4:].tolist() == [0, 0, 0, 0] and tokenizer.token_bytes[:-4].min() == 1


def test_it_learns_from_the_training_split_alone_and_is_loaded_as_it_was_saved(small_files, tokenizer, monkeypatch):
    dataset, _, folder = small_files
    monkeypatch.setenv("AUTORESEARCH_FILES", str(folder))
    assert Tokenizer.train(dataset, dataset.source.texts(dataset, "train")).tokens == tokenizer.tokens


def test_a_long_document_does_not_dominate(small_files, monkeypatch):
    monkeypatch.setattr(module, "DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(module, "TRAINING_CHARACTERS", 300)
    texts = iter(["ab" * 50 + "xyz" * 1000, "cd" * 50, "ef" * 50, "gh" * 50, "never asked for"])
    tokens = Tokenizer.train(small_files[0], texts).tokens
    assert b"ab" in tokens and b"ef" in tokens and b"xyz" not in tokens and b"gh" not in tokens
    assert next(texts) == "gh" * 50


DAMAGE = {
    "cut short": lambda saved: saved[: len(saved) // 2],
    "numbers": lambda saved: json.dumps([*range(508)]).encode(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_tokenizer_is_said_in_a_line(small, cache, damage):
    path = cache / "files" / "tokens" / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    for load in (Tokenizer.load, prepare.TokenCache.load):
        assert "is not prepared; run: make prepare DATASET=files FILES=dir" in refusal(load, small)
