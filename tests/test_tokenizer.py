"""The tokenizer: text goes in and comes out, and what is loaded is what was saved."""

import base64
import json
import os
import pickle
from itertools import pairwise

import numpy as np
import pytest
import regex
import tiktoken
from hub import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from harness import tokenizer as module
from harness.corpus import documents
from harness.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(small_files):
    dataset, root, _ = small_files
    return Tokenizer.load(dataset, root / "files" / "tokenizer.json")


# --- text in, text out -----------------------------------------------------------------------------

any_text = st.text(max_size=200) | st.text(alphabet=" \n\r\t09aZß東🙂\u0301'<|>document", max_size=200)


@settings(max_examples=50, deadline=None)
@given(any_text)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert max(ids, default=0) < tokenizer.bos  # no special token, whatever is written


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
def test_the_saved_ranks_mean_what_tiktoken_makes_of_them(small_files, tokenizer, text):
    saved = json.loads((small_files[1] / "files" / "tokenizer.json").read_text())
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved["tokens"])}
    encoding = tiktoken.Encoding("own", pat_str=saved["pattern"], mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.encode(text) == encoding.encode_ordinary(text) == own_bpe(ranks, saved["pattern"], text)


BLANKS = (" ", "\t", " \t", "\u2028", "\u3000 ", "\n", "\r\n", " \n", "\x1c")
LETTERS = ("a", " a", "'s", "e\u0301", "\u0301", "東", "Ⅷ")
OTHERS = ("1", "_", "!\n", "\x00", "\u200b", "🙂", "\U0010ffff")


@pytest.mark.parametrize("unit", BLANKS + LETTERS + OTHERS, ids=ascii)
def test_a_million_of_anything_is_encoded_whole(tokenizer, unit):
    text = "before" + unit * (1_050_000 // len(unit)) + "after"
    (ids,) = tokenizer.encode_documents([text])
    assert tokenizer.decode(ids[1:].tolist()) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(any_text | st.sampled_from([*SPECIAL_TOKENS, "a<|document|>b", "long " * 9]), max_size=8))
def test_documents_encoded_together_are_what_each_is_alone(tokenizer, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STRETCH", 30)
        found = tokenizer.encode_documents(texts)
        alone = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
    assert [ids.tolist() for ids in found] == alone and all(ids.dtype == np.uint16 for ids in found)


def test_digits_go_in_ones_and_twos(tokenizer):
    assert regex.findall(tokenizer.pattern, "in 1984567 days") == ["in", " ", "19", "84", "56", "7", " days"]
    assert not any(regex.search(rb"\d{3}", token) for token in tokenizer.ranks)


def test_the_special_tokens_come_last_and_have_no_bytes(small_files, tokenizer):
    dataset = small_files[0]
    assert tokenizer.vocab_size == dataset.vocab_size == len(tokenizer.ranks) + 4
    assert tokenizer.bos == dataset.vocab_size - 4
    assert tokenizer.token_bytes[-4:].tolist() == [0, 0, 0, 0]
    assert tokenizer.token_bytes[:-4].min() == 1
    for name in SPECIAL_TOKENS:
        assert tokenizer.decode(tokenizer.encode(name)) == name
        assert len(tokenizer.encode(name)) > 1


def test_it_learns_from_the_training_split_alone_and_always_the_same(small_files, tokenizer, cache, monkeypatch):
    dataset, _, folder = small_files
    monkeypatch.setenv("AUTORESEARCH_FILES", str(folder))
    again = Tokenizer.train(dataset, documents(dataset, "train"))
    assert again.ranks == tokenizer.ranks


def test_a_long_document_does_not_dominate(small_files, monkeypatch):
    monkeypatch.setattr(module, "DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(module, "TRAINING_CHARACTERS", 300)
    texts = iter(["ab" * 50 + "xyz" * 1000, "cd" * 50, "ef" * 50, "gh" * 50, "never asked for"])
    tokens = Tokenizer.train(small_files[0], texts).ranks
    assert b"ab" in tokens and b"ef" in tokens and b"xyz" not in tokens and b"gh" not in tokens
    assert next(texts) == "gh" * 50


# --- the file --------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(small_files, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(small_files[0], tmp_path / "t.json")
    assert (loaded.ranks, loaded.pattern, loaded.bos) == (tokenizer.ranks, tokenizer.pattern, tokenizer.bos)
    assert (loaded.token_bytes == tokenizer.token_bytes).all()


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def altered(saved, **changes):
    return json.dumps({**json.loads(saved), **changes}).encode()


DAMAGE = {
    "empty": lambda saved: b"",
    "cut short": lambda saved: saved[: len(saved) // 2],
    "not JSON": lambda saved: b"\x80\x04 tokens",
    "a pickle": lambda saved: pickle.dumps(Trap()),
    "a list": lambda saved: b"[1, 2]",
    "no pattern": lambda saved: json.dumps({"tokens": json.loads(saved)["tokens"]}).encode(),
    "not base64": lambda saved: altered(saved, tokens=["!?"] + json.loads(saved)["tokens"][1:]),
    "a stray letter": lambda saved: saved.replace(b'["', b'["!', 1),
    "numbers": lambda saved: altered(saved, tokens=list(range(512))),
    "a token twice": lambda saved: altered(saved, tokens=json.loads(saved)["tokens"][:-1] + ["YQ=="]),
    "bytes missing": lambda saved: altered(saved, tokens=json.loads(saved)["tokens"][100:]),
    "no tokens": lambda saved: altered(saved, tokens=[]),
    "no regular expression": lambda saved: altered(saved, pattern="(((" ),
    "a number for a pattern": lambda saved: altered(saved, pattern=7),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_tokenizer_is_said_in_a_line_and_runs_nothing(small, cache, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("TRAP", str(tmp_path / "trapped"))
    path = cache / "files" / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    line = refusal(Tokenizer.load, small)
    assert f"{path} is damaged" in line and "make prepare DATASET=files FILES=dir" in line
    assert not (tmp_path / "trapped").exists()
    assert not prepare.is_prepared(small)
