"""The token cache: what is prepared is whole, on the disk, and made anew where anything that decides it changed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hub import hub_of_a_test, parquet, refusal  # noqa: F401

import prepare
from data_sources import DATASETS
from harness import corpus, token_cache, tokenizer
from harness.token_cache import TokenCache
from harness.tokenizer import Tokenizer

ROOT = Path(prepare.__file__).parent


def stored_texts(dataset, split):
    cache, tokenizer = TokenCache.load(dataset), Tokenizer.load(dataset)
    tokens = cache.tokens(split)
    return [tokenizer.encoding.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(cache.offsets(split))]


def damaged(cache):
    """The names of files that are not as they were prepared."""
    return [name for name in cache.meta["sha256"] if not cache.is_whole(name)]


# --- what is stored ----------------------------------------------------------------------------------


def test_every_text_is_stored_whole_with_a_document_start(small, small_files, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    cache, tokenizer = TokenCache.load(small), Tokenizer.load(small)
    for split in ("val", "test", "train"):
        tokens, offsets = cache.tokens(split), cache.offsets(split)
        assert tokens.dtype == np.uint16 and offsets[0] == 0 and offsets[-1] == len(tokens)
        assert np.flatnonzero(tokens == tokenizer.bos).tolist() == offsets[:-1].tolist()
        if split != "train":
            assert stored_texts(small, split) == list(dict.fromkeys(small.source.texts(small, split)))  # each once
            assert np.diff(offsets).max() > small.sequence_length + 1  # long ones stay whole
    source = tokenizer.encode_documents([*small.source.texts(small, "train")])  # pieces may cut a letter in two
    assert len(tokens) - (len(offsets) - 1) == sum(len(ids) - 1 for ids in source)
    assert np.diff(offsets).max() == small.sequence_length + 1


def bytewise(dataset):
    """A tokenizer of the 256 bytes: a letter is a token."""
    return Tokenizer(dataset, [bytes([byte]) for byte in range(256)])


def split_texts(tokenizer, folder, split, texts, held_out):
    found = token_cache.write_split(tokenizer, texts, folder, split, held_out)
    tokens, offsets, pieces = (np.load(folder / f"{split}_{kind}.npy") for kind in ("tokens", "offsets", "pieces"))
    assert found == {"documents": len(offsets) - 1, "tokens": len(tokens)} and len(pieces) == found["documents"]
    assert (offsets.dtype, pieces.dtype) == (np.int64, np.int32)
    return [tokenizer.encoding.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(offsets)]


def test_training_gives_way_to_what_is_held_out_whole_or_in_pieces(small_files, tmp_path):
    tokenizer, held_out = bytewise(dataclasses.replace(small_files[0], sequence_length=8)), set()
    assert split_texts(tokenizer, tmp_path, "val", ["abcdefgh", "a long one held out", "x", "x", ""], held_out) == [
        "abcdefgh", "a long one held out", "x",
    ]  # fmt: skip
    assert split_texts(tokenizer, tmp_path, "test", ["x", "testtest", "abcdefgh"], held_out) == ["testtest"]
    train = ["x", "short", "12345678abcdefgh123", "a long one held out", "testtest", "testtest!", "short"]
    assert split_texts(tokenizer, tmp_path, "train", train, held_out) == ["short", "12345678", "123", "!", "short"]
    assert np.load(tmp_path / "train_pieces.npy").tolist() == [0, 0, 1, 0, 0]


TWO = dataclasses.replace(DATASETS["climbmix"].source, train=2)  # shards for training


def test_copies_in_the_source_never_reach_two_splits(hub, cache):
    """climbmix takes its splits from the hub's shards, which may hold anything."""
    dataset = dataclasses.replace(DATASETS["climbmix"], source=TWO, vocab_size=300, sequence_length=16)
    shared = [f"text number {i} that stands in every shard, whatever it is for" for i in range(20)]
    for i in (0, 1, 6541, 6542):
        own = [f"a text of shard {i} alone, number {j}" for j in range(20)]
        hub.files[f"/datasets/{TWO.repo}/resolve/main/shard_{i:05d}.parquet"] = parquet(own + shared + own)
    prepare.prepare(dataset)
    val, test, train = (stored_texts(dataset, split) for split in ("val", "test", "train"))
    assert len(val) == 40 and len(test) == 20 and not set(val) & set(test)
    assert not any("every shard" in text for text in train) and not set(train) & {*val, *test}
    shard = cache / "shards" / "shard_00001.parquet"
    shard.write_bytes(shard.read_bytes().replace(b"number 15", b"num\xff\xfe 15"))
    shutil.rmtree(cache / "tokens")
    assert f"{shard} cannot be read: " in refusal(prepare.prepare, dataset)
    shard.unlink()  # as it says
    prepare.prepare(dataset)
    assert stored_texts(dataset, "train") == train and len(hub.seen) == 5


def test_texts_are_encoded_in_order_and_few_are_in_memory(small, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(token_cache, "AT_ONCE", 2000)  # characters: two texts
    ours, texts, taken = Tokenizer.load(small), [f"{n} " * 500 for n in range(61)], []
    source = (taken.append(text) or text for text in texts)
    for number, ids in enumerate(token_cache.encoded(ours, source)):
        assert ours.encoding.decode(ids[1:].tolist()) == texts[number]
        assert len(taken) <= number + 2 * 2 * 3
    assert number == 60


# --- made once, and anew where it must be --------------------------------------------------------------


def test_preparing_again_does_nothing(small, cache, capsys):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    prepare.prepare(small)
    assert capsys.readouterr().out == f"files: prepared in {cache / 'files'}\n"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_cache_that_was_deleted_is_said_and_prepared_the_same(small, small_files, cache, monkeypatch):
    loaded = TokenCache.load(small)
    shutil.rmtree(cache)
    assert damaged(loaded)
    assert "is not prepared; run: make prepare DATASET=files" in refusal(TokenCache.load, small)
    assert "FILES=dir" in refusal(prepare.prepare, small)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    prepare.prepare(small)
    assert TokenCache.load(small).hash == loaded.hash
    assert not damaged(TokenCache.load(small))
    assert [path.name for path in (cache / "files").iterdir()] == ["tokens"]


@pytest.mark.parametrize("meta", [b"", b"[]", b'{"sha256": {}}'])
def test_a_cache_whose_index_is_damaged_is_not_taken(small, cache, meta):
    (cache / "files" / "tokens" / "meta.json").write_bytes(meta)
    assert "is not prepared; run: make prepare DATASET=files" in refusal(TokenCache.load, small)
    assert not prepare.is_prepared(small)


def test_a_changed_byte_is_found_and_prepared_anew(small, small_files, cache, monkeypatch):
    tokens, folder = TokenCache.load(small), cache / "files" / "tokens"
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    for path in (folder / "tokenizer.json", folder / "val_tokens.npy"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert damaged(tokens) == [path.name]
        if path.name == "tokenizer.json":
            assert "is not prepared" in refusal(TokenCache.load, small)
            path.write_bytes(whole)
    line = f"error: {path} is damaged; run: make prepare DATASET=files FILES=dir"
    assert refusal(prepare.evaluation_rows, tokens, small) == line
    prepare.prepare(small)
    assert TokenCache.load(small).hash == tokens.hash and path.read_bytes() == whole


@pytest.mark.parametrize(("kind", "keep"), [("tokens", 0), ("offsets", 60), ("pieces", 1000)])
def test_a_file_that_was_cut_short_ends_a_run_in_one_line(small, cache, kind, keep):
    path = cache / "files" / "tokens" / f"train_{kind}.npy"
    path.write_bytes(path.read_bytes()[:keep])
    line = refusal(prepare.Batches, TokenCache.load(small), 2, 64, 1)
    assert line == f"error: {path} is damaged; run: make prepare DATASET=files FILES=dir"


def test_another_folder_column_size_or_code_is_prepared_anew(small, small_files, cache, tmp_path, monkeypatch):
    assert prepare.is_prepared(small)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    assert prepare.is_prepared(small)
    larger = dataclasses.replace(small, vocab_size=600)
    assert not prepare.is_prepared(larger)
    assert "is not prepared; run: make prepare" in refusal(TokenCache.load, larger)
    texts = [f"{i} is an ordinary text, one of many" for i in range(2000)]
    table = "".join(json.dumps({"text": text, "content": text.upper()}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(table)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(tmp_path))
    assert not prepare.is_prepared(small)
    prepare.prepare(small)
    assert prepare.is_prepared(small) and set(stored_texts(small, "val")) < set(texts)
    monkeypatch.setenv("AUTORESEARCH_COLUMN", "content")
    assert not prepare.is_prepared(small)
    monkeypatch.delenv("AUTORESEARCH_FILES")
    monkeypatch.delenv("AUTORESEARCH_COLUMN")
    assert prepare.is_prepared(small)  # training needs neither
    monkeypatch.setattr(token_cache, "code", lambda: "edited")
    assert not prepare.is_prepared(small)
    TokenCache.load(small)  # another clone that prepared the same ends no night here


EDITS = {
    tokenizer: (r"\p{N}{1,2}", r"\p{N}{1,3}"),
    corpus: ("PASSAGE = 8000", "PASSAGE = 9000"),
    token_cache: ("len(document) > size + 1", "len(document) > size"),
}


def test_an_edit_of_what_decides_a_token_asks_for_new_tokens(tmp_path, monkeypatch):
    today = token_cache.code()
    for module, (old, new) in EDITS.items():
        text, copy = Path(module.__file__).read_text(), tmp_path / Path(module.__file__).name
        assert old in text
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(copy))
            copy.write_text(text.replace(old, new))
            assert token_cache.code() != today
            copy.write_text(text.replace("\n\n\n", "\n\n\n# a comment\n"))
            assert token_cache.code() == today


# --- bad input -------------------------------------------------------------------------------------


def test_what_is_not_prepared_names_the_command(cache):
    for name, command in [("stdlib", "make prepare DATASET=stdlib"), ("files", "make prepare DATASET=files FILES=dir")]:
        for load in (Tokenizer.load, TokenCache.load, prepare.Run):
            line = refusal(load, name if load is prepare.Run else DATASETS[name])
            assert line == f"error: dataset '{name}' is not prepared; run: {command}"


@pytest.mark.parametrize("content", ["", "word " * 200])
def test_too_little_text_is_said_and_leaves_nothing(cache, tmp_path, monkeypatch, content):
    (tmp_path / "a.txt").write_text(content)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(tmp_path))
    assert "has too little text: val needs 2049 tokens; add documents" in refusal(prepare.prepare, DATASETS["files"])
    assert list((cache / "files").iterdir()) == []


@pytest.mark.parametrize("blocked", ["cache", "cache/files", "cache/files/tokens.part"])
def test_a_cache_that_cannot_be_written_is_said(small_files, cache, monkeypatch, blocked):
    dataset, _, folder = small_files
    monkeypatch.setenv("AUTORESEARCH_FILES", str(folder))
    path = cache.parent / blocked.replace("tokens.part", f"tokens.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    line = refusal(prepare.prepare, dataset)
    assert str(cache) in line and "AUTORESEARCH_CACHE moves the cache" in line
    assert path.read_text() == "in the way"
    assert "is not prepared" in refusal(Tokenizer.load, dataset)


def test_a_full_disk_is_said_and_leaves_nothing_half(small_files, full_disk, cache, monkeypatch):
    dataset, _, folder = small_files
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(full_disk))
    monkeypatch.setenv("AUTORESEARCH_FILES", str(folder))
    line = refusal(prepare.prepare, dataset)
    assert line == f"error: {full_disk / 'files'}: the disk is full; AUTORESEARCH_CACHE moves the cache elsewhere"
    assert list((full_disk / "files").iterdir()) == []


# --- the command -----------------------------------------------------------------------------------


def command(*words, **env):
    return subprocess.run(
        [sys.executable, "prepare.py", *words], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


def test_an_unknown_dataset_lists_the_known_ones(cache):
    done = command("--dataset", "nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: unknown dataset 'nope'; known: stdlib, climbmix, tinystories, files\n"
