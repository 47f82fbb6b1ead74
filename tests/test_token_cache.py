"""The token cache: what is prepared is whole, on the disk, and made anew where anything that decides it changed."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hub import Hub, fresh_login, parquet, refusal, serving

import prepare
from data_sources import DATASETS
from harness import corpus, files, token_cache, tokenizer
from harness.corpus import SPLITS, documents
from harness.token_cache import TokenCache
from harness.tokenizer import Tokenizer

ROOT = Path(prepare.__file__).parent


@pytest.fixture(autouse=True)
def a_fresh_login(tmp_path_factory, monkeypatch):
    fresh_login(monkeypatch, tmp_path_factory.mktemp("home"))


# --- the token cache -------------------------------------------------------------------------------


TWO = dataclasses.replace(DATASETS["climbmix"].source, train=2)  # shards for training


def stored_texts(small, split):
    tokens, offsets, tokenizer = *arrays(small, split), Tokenizer.load(small)
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(offsets)]


def arrays(small, split):
    cache = TokenCache.load(small)
    return cache.tokens(split), cache.offsets(split)


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_is_stored_whole_with_a_document_start(small, small_files, monkeypatch, split):
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    tokens, offsets = arrays(small, split)
    assert tokens.dtype == np.uint16 and offsets[0] == 0 and offsets[-1] == len(tokens)
    tokenizer = Tokenizer.load(small)
    assert np.flatnonzero(tokens == tokenizer.bos).tolist() == offsets[:-1].tolist()
    if split != "train":
        assert stored_texts(small, split) == list(dict.fromkeys(documents(small, split)))  # each once
        assert np.diff(offsets).max() > small.sequence_length + 1  # long ones stay whole
    else:  # pieces may cut a letter in two
        source = [len(tokenizer.encode(text)) for text in documents(small, split)]
        assert len(tokens) - (len(offsets) - 1) == sum(source)
        assert np.diff(offsets).max() == small.sequence_length + 1


def test_the_splits_share_no_document_and_no_piece(small):
    cache = TokenCache.load(small)
    train, val, test = (set(cache.hashes(split).tolist()) for split in SPLITS)
    assert len(val) > 20 and len(test) > 20 and len(train) > 1000
    assert not train & val and not train & test and not val & test
    found = {split: set(stored_texts(small, split)) for split in SPLITS}
    assert not found["val"] & found["test"] and not found["train"] & (found["val"] | found["test"])


def bytewise(dataset):
    """A tokenizer of the 256 bytes: a letter is a token."""
    return Tokenizer(dataset, {bytes([byte]): byte for byte in range(256)})


def split_texts(tokenizer, folder, split, texts, held_out):
    found = token_cache.write_split(tokenizer, texts, folder, split, held_out)
    tokens, offsets = np.load(folder / f"{split}_tokens.npy"), np.load(folder / f"{split}_offsets.npy")
    assert found == {"documents": len(offsets) - 1, "tokens": len(tokens)}
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(offsets)]


def test_training_gives_way_to_what_is_held_out_whole_or_in_pieces(small_files, tmp_path):
    tokenizer, held_out = bytewise(dataclasses.replace(small_files[0], sequence_length=8)), set()
    assert split_texts(tokenizer, tmp_path, "val", ["abcdefgh", "a long one held out", "x", "x", ""], held_out) == [
        "abcdefgh", "a long one held out", "x",
    ]  # fmt: skip
    assert split_texts(tokenizer, tmp_path, "test", ["x", "testtest", "abcdefgh"], held_out) == ["testtest"]
    train = ["x", "short", "12345678abcdefgh123", "a long one held out", "testtest", "testtest!", "short"]
    assert split_texts(tokenizer, tmp_path, "train", train, held_out) == ["short", "12345678", "123", "!", "short"]


def test_copies_in_the_source_never_reach_two_splits(cache, monkeypatch, tmp_path):
    """climbmix takes its splits from the hub's shards, which may hold anything."""
    dataset = dataclasses.replace(DATASETS["climbmix"], source=TWO, vocab_size=300, sequence_length=16)
    shared = [f"text number {i} that stands in every shard, whatever it is for" for i in range(20)]
    (cache / "shards").mkdir(parents=True)
    for i in (0, 1, 6541, 6542):
        own = [f"a text of shard {i} alone, number {j}" for j in range(20)]
        (cache / "shards" / f"shard_{i:05d}.parquet").write_bytes(parquet(own + shared + own))
    prepare.prepare(dataset)
    tokens = TokenCache.load(dataset)
    hashes = {split: set(tokens.hashes(split).tolist()) for split in SPLITS}
    assert tokens.meta["val"]["documents"] == 40 and tokens.meta["test"]["documents"] == 20
    assert not hashes["train"] & (hashes["val"] | hashes["test"]) and not hashes["val"] & hashes["test"]


def test_preparing_again_does_nothing(small, cache, capsys):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    prepare.prepare(small)
    assert capsys.readouterr().out == f"files: prepared in {cache / 'files'}\n"
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_cache_that_was_deleted_is_said_and_prepared_the_same(small, small_files, cache, monkeypatch):
    before, loaded = TokenCache.load(small).hash, TokenCache.load(small)
    shutil.rmtree(cache)
    assert loaded.changed_file()
    assert "is not prepared; run: make prepare DATASET=files" in refusal(TokenCache.load, small)
    assert "FILES=dir" in refusal(prepare.prepare, small)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    prepare.prepare(small)
    assert TokenCache.load(small).hash == before
    assert TokenCache.load(small).changed_file() is None
    assert sorted(path.name for path in (cache / "files").iterdir()) == ["tokenizer.json", "tokens"]


def one_less(path):
    np.save(path, np.load(path)[:-1])


DAMAGES = {
    "missing": ("val_tokens.npy", Path.unlink),
    "cut short": ("train_tokens.npy", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "empty": ("train_offsets.npy", lambda path: path.write_bytes(b"")),
    **{f"{name} too few": (f"{name}.npy", one_less) for name in ("val_tokens", "train_offsets", "test_hashes")},
    "pieces too few": ("train_pieces.npy", one_less),
    **{f"meta {text}": ("meta.json", lambda path, text=text: path.write_bytes(text))
       for text in (b"", b"{", b"[]", b"{}", b'{"val": 1}', b"\xff")},
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_said_and_prepared_anew(small, small_files, cache, monkeypatch, name):
    file, damage = DAMAGES[name]
    before = TokenCache.load(small).hash
    damage(cache / "files" / "tokens" / file)
    line = refusal(TokenCache.load, small)
    assert "tokens is damaged" in line and "make prepare DATASET=files" in line
    assert not prepare.is_prepared(small)
    if name == "missing":  # once is enough
        monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
        prepare.prepare(small)
        assert TokenCache.load(small).hash == before


def test_a_changed_byte_is_found_and_prepared_anew(small, small_files, cache, monkeypatch, capsys):
    tokens, folder = TokenCache.load(small), cache / "files" / "tokens"
    before = tokens.hash
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    for path in (cache / "files" / "tokenizer.json", folder / "train_tokens.npy"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert tokens.changed_file() == path
        if path.name == "tokenizer.json":
            path.write_bytes(whole)
    prepare.prepare(small)
    assert "train_tokens.npy is not as it was prepared; preparing anew" in capsys.readouterr().out
    assert TokenCache.load(small).hash == before and path.read_bytes() == whole


def test_a_tokenizer_of_another_corpus_is_not_taken(small, cache):
    bytewise(small).save(cache / "files" / "tokenizer.json")
    assert "is damaged" in refusal(TokenCache.load, small)


def test_another_folder_or_other_sizes_are_prepared_anew(small, small_files, cache, tmp_path, monkeypatch):
    assert prepare.is_prepared(small)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    assert prepare.is_prepared(small)
    larger = dataclasses.replace(small, vocab_size=600)
    assert not prepare.is_prepared(larger)
    assert "is not prepared; run: make prepare" in refusal(TokenCache.load, larger)
    shutil.copytree(small_files[2], tmp_path / "other")
    with (tmp_path / "other" / "texts.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    monkeypatch.setenv("AUTORESEARCH_FILES", str(tmp_path / "other"))
    assert not prepare.is_prepared(small)
    before = TokenCache.load(small).hash
    prepare.prepare(small)
    assert TokenCache.load(small).hash != before


# An edit of what decides a token, each in a copy of the code: (file, what stood there, what stands there now).
EDITS = [
    ("harness/tokenizer.py", r"\p{N}{1,2}", r"\p{N}{1,3}"),
    ("harness/tokenizer.py", "<|reserved_1|>", "<|reserved_9|>"),
    ("harness/tokenizer.py", "DOCUMENT_CHARACTERS = 10_000", "DOCUMENT_CHARACTERS = 9_000"),
    ("harness/corpus.py", "found[-1] += block + separator", "found[-1] += block + separator + separator"),
    ("harness/token_cache.py", "len(document) > size + 1", "len(document) > size"),
    ("data_sources.py", "vocab_size=1024", "vocab_size=1000"),
]


def test_an_edit_of_whatever_decides_a_token_asks_for_new_tokens(cache, tmp_path):
    """... and a comment, or another dataset's entry, does not."""
    copy, said = tmp_path / "copy", "import data_sources as d; from harness import token_cache as t; "
    said += "print(t.identity(d.DATASETS['stdlib']), t.code())"

    def identity(file=None, old="", new=""):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(ROOT / "harness", copy / "harness")
        shutil.copy(ROOT / "data_sources.py", copy)
        if file:
            text = (copy / file).read_text()
            assert old in text
            (copy / file).write_text(text.replace(old, new))
        return subprocess.run([sys.executable, "-c", said], cwd=copy, capture_output=True, text=True, check=True).stdout

    today = identity()
    assert len({today, *(identity(*edit) for edit in EDITS)}) == 1 + len(EDITS)
    assert identity("harness/tokenizer.py", "# GPT-4's", "# That is GPT-4's") == today
    assert identity("data_sources.py", "eval_tokens=40 * EVAL_UNIT)", "eval_tokens=39 * EVAL_UNIT)") == today


def test_tokens_of_another_pattern_are_not_used_and_those_of_other_code_are_made_anew(
    small, small_files, cache, monkeypatch
):
    before = TokenCache.load(small).hash
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))
    monkeypatch.setattr(token_cache, "code", lambda: "edited")
    assert TokenCache.load(small).hash == before  # another clone that prepared the same ends no night here
    assert not prepare.is_prepared(small)
    prepare.prepare(small)
    assert TokenCache.load(small).meta["code"] == "edited" and TokenCache.load(small).hash == before
    monkeypatch.setattr(tokenizer, "SPLIT_PATTERN", r"\S+|\s+")
    assert "is not prepared; run: make prepare" in refusal(TokenCache.load, small)


def test_texts_are_encoded_in_order_and_few_are_in_memory(small, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(token_cache, "chunks", lambda texts: ([text] for text in texts))
    ours, texts, taken = Tokenizer.load(small), [f"{n} " * 500 for n in range(60)], []
    source = (taken.append(text) or text for text in texts)
    for number, ids in enumerate(token_cache.encoded(ours, source)):
        assert ours.decode(ids[1:].tolist()) == texts[number]
        assert len(taken) <= number + 2 * 3


def test_a_chunk_is_as_many_texts_as_make_its_size():
    texts = ["", "a" * 50, "b" * 500, *["c"] * 60]
    found = list(token_cache.chunks(texts, 100))
    assert [text for some in found for text in some] == texts
    assert [len(some) for some in found] == [3, 50, 10]


def test_another_column_is_prepared_anew(small, cache, tmp_path, monkeypatch):
    texts = [f"{i} is an ordinary text, one of many" for i in range(2000)]
    table = "".join(json.dumps({"text": text, "content": text.upper()}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(table)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(tmp_path))
    prepare.prepare(small)
    monkeypatch.setenv("AUTORESEARCH_COLUMN", "content")
    assert not prepare.is_prepared(small)
    prepare.prepare(small)
    assert all(text == text.upper() for text in stored_texts(small, "val"))
    monkeypatch.delenv("AUTORESEARCH_FILES")
    monkeypatch.delenv("AUTORESEARCH_COLUMN")
    assert prepare.is_prepared(small)  # training needs neither


def test_all_that_is_prepared_is_on_the_disk_before_it_has_its_name(small_files, cache, monkeypatch):
    dataset, _, folder = small_files
    synced, named = [], []

    def note(descriptor):
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))

    rename = Path.rename

    def note_name(path, target):
        named.append({file.name for file in path.iterdir() if (file.stat().st_ino, file.stat().st_size) not in synced})
        return rename(path, target)

    monkeypatch.setattr(files, "to_disk", note)
    monkeypatch.setattr(Path, "rename", note_name)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(folder))
    prepare.prepare(dataset)
    assert named == [set()]  # no file of it was not yet there
    root = cache / "files"
    assert synced[-1][0] == root.stat().st_ino  # and the name itself
    assert [inode for inode, _ in synced].count(root.stat().st_ino) == 2


# --- bad input -------------------------------------------------------------------------------------


def test_what_is_not_prepared_names_the_command(cache):
    for name, command in [("stdlib", "make prepare DATASET=stdlib"), ("files", "make prepare DATASET=files FILES=dir")]:
        for load in (Tokenizer.load, TokenCache.load, prepare.Run):
            line = refusal(load, name if load is prepare.Run else DATASETS[name])
            assert line == f"error: dataset '{name}' is not prepared; run: {command}"


@pytest.mark.parametrize("content", ["", "one line\n", "word " * 200])
def test_too_little_text_is_said_and_leaves_nothing(cache, tmp_path, monkeypatch, content):
    (tmp_path / "a.txt").write_text(content)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(tmp_path))
    assert "too little text" in refusal(prepare.prepare, DATASETS["files"])
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
    numpy_says = OSError("797250 requested and 767936 written")  # as tofile does, with no number of an error
    assert files.what_failed(numpy_says) == "the disk is full"


# --- the command -----------------------------------------------------------------------------------


def command(*words, **env):
    return subprocess.run(
        [sys.executable, "prepare.py", *words], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_prepared_by_one_command(cache):
    dataset, hub = DATASETS["climbmix"], Hub()
    texts = (text for _, part in corpus.StandardLibrary().documents() for text in part)
    for i in (*range(10), 6541, 6542):
        path = f"/datasets/{dataset.source.repo}/resolve/main/shard_{i:05d}.parquet"
        hub.files[path] = parquet(list(itertools.islice(texts, 300)))
    with serving(hub) as address:
        done = command("--dataset", "climbmix", HF_ENDPOINT=address, HF_TOKEN="secret")
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    assert all(headers["Authorization"] == "Bearer secret" for _, headers, _ in hub.seen)
    tokenizer, tokens = Tokenizer.load(dataset), TokenCache.load(dataset)
    assert (tokenizer.vocab_size, tokens.changed_file()) == (dataset.vocab_size, None)
    assert prepare.evaluation_rows(tokens, dataset).shape[1] == dataset.sequence_length + 1
    again = command("--dataset", "climbmix")  # the hub is gone, and not needed
    assert (again.returncode, again.stdout) == (0, f"climbmix: prepared in {corpus.cache_dir(dataset)}\n")
    assert command("--check", "--dataset", "climbmix").returncode == 0


def four_shards():
    """climbmix in small: (dataset, where its shards are, the hub that has them)."""
    dataset = dataclasses.replace(DATASETS["climbmix"], source=TWO, vocab_size=300, sequence_length=16)
    base, hub = f"/datasets/{dataset.source.repo}/resolve/main/shard_", Hub()
    for i in (0, 1, 6541, 6542):
        hub.files[f"{base}{i:05d}.parquet"] = parquet([f"a text of shard {i} alone, number {j}" for j in range(300)])
    return dataset, base, hub


def test_a_shard_that_was_damaged_within_is_fetched_anew(cache, monkeypatch, capsys):
    dataset, base, hub = four_shards()
    with serving(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        dataset.source.fetch(dataset)
        for i in (1, 6541):  # its footer is right, what it holds is no text
            shard = cache / "shards" / f"shard_{i:05d}.parquet"
            shard.write_bytes(shard.read_bytes().replace(b"number 250", b"num\xff\xfe 250"))
            prepare.prepare(dataset)
            assert f"{shard} cannot be read: " in capsys.readouterr().out
            assert shard.read_bytes() == hub.files[f"{base}{i:05d}.parquet"]
            assert prepare.is_prepared(dataset) and len(hub.requests(f"{base}{i:05d}.parquet")) == 2
            shutil.rmtree(cache / "tokens")
    shard.write_bytes(shard.read_bytes().replace(b"number 250", b"num\xff\xfe 250"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in refusal(prepare.prepare, dataset)


def test_a_shard_with_a_changed_byte_is_fetched_anew_and_nothing_else(cache, monkeypatch, capsys):
    dataset, base, hub = four_shards()
    with serving(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        prepare.prepare(dataset)
        shard, tokens = cache / "shards" / "shard_00001.parquet", TokenCache.load(dataset).hash
        for damage in (lambda b: b.replace(b"number 250", b"number 251"), lambda b: b[:-1]):
            shard.write_bytes(damage(shard.read_bytes()))  # another text, and right as a file; then no file at all
            capsys.readouterr()
            prepare.prepare(dataset)
            assert f"{shard} is not as it was fetched" in capsys.readouterr().out
            assert shard.read_bytes() == hub.files[f"{base}00001.parquet"]
        assert TokenCache.load(dataset).hash == tokens and len(hub.seen) == 6
    prepare.prepare(dataset)  # the hub is gone, and not needed


def test_check_says_whether_it_is_prepared_and_changes_nothing(cache):
    done = command("--check", "--dataset", "tinystories")
    line = "error: dataset 'tinystories' is not prepared; run: make prepare DATASET=tinystories\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert not cache.exists()


def test_an_unknown_dataset_lists_the_known_ones(cache):
    done = command("--dataset", "nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: unknown dataset 'nope'; known: stdlib, climbmix, tinystories, files\n"


# A process that forks: child n prepares and is killed before its n-th change of the cache's names, until one comes
# through. A cache of another folder stands there before.
KILLED = """
import dataclasses, os, pathlib, shutil, signal, sys
import data_sources, prepare

cache, first, second = map(pathlib.Path, sys.argv[1:])
small = dataclasses.replace(data_sources.DATASETS["files"], vocab_size=270, sequence_length=8, eval_tokens=80)

def prepare_in_a_child(files, last):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    left = [last]
    def touch(event, arguments):
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(touch)
    os.environ["AUTORESEARCH_FILES"] = str(files)
    sys.stdout = open(os.devnull, "w")
    prepare.prepare(small)
    os._exit(0)

def hash_of_whole():
    found = prepare.TokenCache.read(cache / "files" / "tokens")
    assert found is None or found.changed_file() is None
    return found and found.hash

assert prepare_in_a_child(first, -1) == 0
old, deaths, seen = hash_of_whole(), 0, []
shutil.copytree(cache, cache.with_name("old"))
while True:
    deaths += 1
    status = prepare_in_a_child(second, deaths)
    seen.append(hash_of_whole())
    assert prepare_in_a_child(second, -1) == 0
    new = hash_of_whole()
    assert new not in (None, old)
    assert sorted(os.listdir(cache / "files")) == ["tokenizer.json", "tokens"]
    shutil.rmtree(cache)
    if status == 0:
        break
    shutil.copytree(cache.with_name("old"), cache)
assert [x for i, x in enumerate(seen) if not i or x != seen[i - 1]] == [old, None, new]
print(deaths)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_is_prepared_whole_or_not_at_all(cache, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("".join(f'{{"text": "{name} text {i}"}}\n' for i in range(200)))
    command = [sys.executable, "-c", KILLED, cache, tmp_path / "first", tmp_path / "second"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
