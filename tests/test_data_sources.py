"""Every dataset, from where its text comes to its splits; the hub is a server on this machine."""

import dataclasses
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub, leftovers, listing, parquet, refusal, serving, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import data_sources
import downloads
from data_sources import DATASETS, SPLITS, documents, fetch

ROOT = Path(data_sources.__file__).parent
CLIMBMIX, TINYSTORIES, FILES, STDLIB = (DATASETS[name] for name in ("climbmix", "tinystories", "files", "stdlib"))


OLD = parquet(20 * texts(0, 600))


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub that HF_ENDPOINT names, and no waiting between tries."""
    monkeypatch.setattr(downloads, "BACK_OFF", 0.0)
    hub = Hub()
    with serving(hub) as hub.address:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


# --- many files ----------------------------------------------------------------------------------


def climbmix_files(hub, text_of=lambda i: texts(100 * i, 40)):
    for i in (*range(12), 6541, 6542):
        hub.files[f"/datasets/{CLIMBMIX.repo}/resolve/main/shard_{i:05d}.parquet"] = parquet(text_of(i))


def test_climbmix_is_ten_shards_and_the_last_two(hub, cache):
    climbmix_files(hub)
    fetch(CLIMBMIX)
    names = [f"shard_{i:05d}.parquet" for i in (*range(10), 6541, 6542)]
    assert sorted(path.name for path in (cache / "shards").iterdir()) == names
    assert list(documents(CLIMBMIX, "train")) == [t for i in range(10) for t in texts(100 * i, 40)]
    assert list(documents(CLIMBMIX, "val")) == texts(654200, 40)
    assert list(documents(CLIMBMIX, "test")) == texts(654100, 40)


def test_files_come_several_at_once_and_only_once(hub):
    climbmix_files(hub)
    hub.barrier = threading.Barrier(4)  # nobody is answered before four have asked
    fetch(CLIMBMIX)
    hub.barrier = None
    assert 4 <= hub.most_at_once <= downloads.WORKERS
    seen = len(hub.seen)
    assert seen == 12
    fetch(CLIMBMIX)
    assert len(hub.seen) == seen


def test_a_damaged_shard_is_fetched_again(hub, cache):
    climbmix_files(hub)
    fetch(CLIMBMIX)
    shard = cache / "shards" / "shard_00003.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    fetch(CLIMBMIX)
    assert shard.read_bytes() == whole
    assert len(hub.seen) == 13


def test_killed_in_the_middle_of_a_download_then_again(hub, cache):
    climbmix_files(hub, lambda i: 10 * texts(100 * i, 500))
    halfway, release = threading.Event(), threading.Event()

    def stuck(handler):
        body = hub.files[handler.path]
        handler.send(200, body[: len(body) // 2], len(body))
        halfway.set()
        release.wait(30)

    hub.faults[f"/datasets/{CLIMBMIX.repo}/resolve/main/shard_00004.parquet"] = [stuck]
    code = "import data_sources as d; d.fetch(d.DATASETS['climbmix'])"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert halfway.wait(30)
    while not any(path.stat().st_size for path in cache.rglob("shard_00004.*.part")):
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    release.set()
    assert leftovers(cache)
    there = sorted((cache / "shards").glob("*.parquet"))
    assert all(path.read_bytes() == hub.files[f"/datasets/{CLIMBMIX.repo}/resolve/main/{path.name}"] for path in there)
    fetch(CLIMBMIX)
    assert len(list(documents(CLIMBMIX, "train"))) == 50000
    assert not leftovers(cache)


def tinystories_files(hub):
    stories = texts(0, 700)
    parts = [stories[:300], stories[200:500], stories[500:] + stories[:50]]  # some stand twice or thrice
    base = f"/api/datasets/{TINYSTORIES.repo}/parquet"
    names = [f"{base}/default/train/{i}.parquet" for i in range(len(parts))]
    hub.files[base] = listing(*("https://huggingface.co" + name for name in names))
    hub.files |= {name: parquet(part) for name, part in zip(names, parts, strict=True)}
    return stories, base


def test_tinystories_is_resharded_into_twenty_one_and_one(hub, cache):
    stories, _ = tinystories_files(hub)
    fetch(TINYSTORIES)
    shards = sorted((cache / "tinystories" / "shards").iterdir())
    assert [path.name for path in shards] == [f"shard_{i:05d}.parquet" for i in range(22)]
    sizes = [pq.read_metadata(path).num_rows for path in shards]
    assert sum(sizes) == 700 and max(sizes) - min(sizes) <= 1
    train, val, test = (list(documents(TINYSTORIES, split)) for split in SPLITS)
    assert len(val) == sizes[20] and len(test) == sizes[21]
    assert Counter(train + val + test) == Counter(stories)  # each once, though the hub had some twice
    assert train != stories[: len(train)]  # shuffled
    seen, before = len(hub.seen), [path.read_bytes() for path in shards]
    fetch(TINYSTORIES)
    assert len(hub.seen) == seen
    shards[5].unlink()  # and from the start again it is the same
    fetch(TINYSTORIES)
    assert [path.read_bytes() for path in shards] == before


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"<html>", b'{"default": {"train": [1]}}', b'"x"'])
def test_a_listing_that_lists_nothing_is_said(hub, cache, answer):
    hub.files[f"/api/datasets/{TINYSTORIES.repo}/parquet"] = answer
    assert "parquet file" in refusal(fetch, TINYSTORIES)
    assert not list(cache.rglob("*.parquet"))


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(cache, tmp_path, monkeypatch):
    """FILES, an empty folder."""
    monkeypatch.setenv("AUTORESEARCH_FILES", str(tmp_path / "my texts"))
    (tmp_path / "my texts").mkdir()
    return tmp_path / "my texts"


def write_jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def all_texts(dataset=FILES):
    return {split: list(documents(dataset, split)) for split in SPLITS}


def test_files_reads_all_three_kinds_at_any_depth(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a.parquet").write_bytes(parquet(texts(0, 300)))
    write_jsonl(folder / "deep" / "b.jsonl", [{"text": t, "id": 1} for t in texts(300, 300)])
    for i, t in enumerate(texts(600, 300)):
        (folder / f"{i}.txt").write_text(t)
    (folder / "notes.md").write_text("not asked for")
    (folder / "._0.txt").write_bytes(b"\x00\x05\x16\x07 what macOS leaves on foreign disks")
    (folder / "._a.parquet").write_bytes(b"\x00\x05\x16\x07")
    found = all_texts()
    assert Counter(t for split in SPLITS for t in found[split]) == Counter(texts(0, 900))
    assert all(20 <= len(found[split]) <= 80 for split in ("val", "test"))  # a twentieth each, about


def test_copies_of_a_text_are_in_one_split_and_once(folder):
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(0, 500)])
    (folder / "b.parquet").write_bytes(parquet(texts(0, 500)[::-1]))
    found = all_texts()
    assert Counter(t for split in SPLITS for t in found[split]) == Counter(texts(0, 500))


def test_a_text_stays_in_its_split_when_others_come(folder):
    write_jsonl(folder / "m.jsonl", [{"text": t} for t in texts(0, 300)])
    before = all_texts()
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(300, 300)])
    after = all_texts()
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)


def test_the_held_out_share_shrinks_where_evaluation_needs_less(folder):
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(0, 3000)])
    little = dataclasses.replace(FILES, eval_tokens=256)
    assert 1 <= len(all_texts(little)["val"]) < len(all_texts(FILES)["val"]) / 4


def test_odd_text_is_taken_as_far_as_it_is_text(folder):
    huge = "word " * 1_000_000
    (folder / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a byte order mark"}\n\n'
        + b'{"text": "bad \xff byte"}\r\n'
        + b'{"text": "half a pair \\ud800 and a whole \\ud83d\\ude00"}\n'
        + b'{"text": null}\n{"text": ["no"]}\n{"text": ""}\n'
        + json.dumps({"text": huge}).encode()
    )
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfmark\r\n\r\nbad \xff byte")
    found = [t for part in all_texts().values() for t in part]
    wanted = ["a byte order mark", "bad � byte", "half a pair ? and a whole 😀", huge, "mark\n\nbad � byte"]
    assert sorted(found) == sorted(wanted)
    assert all(t.encode() for t in found)


@pytest.mark.parametrize("line", ['{"text": "a"', '{"body": "a"}', '"a"', "[1]", "[" * 100_000])
def test_a_line_that_is_no_document_is_named(folder, line):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    gc.disable()  # or pytest's and hypothesis's own hooks may run at the very end of the stack
    try:
        assert "a.jsonl, line 2: not a JSON object with a 'text'" in refusal(documents, FILES, "train")
    finally:
        gc.enable()


def test_parquet_that_does_not_serve_is_named(folder):
    (folder / "a.parquet").write_bytes(parquet(["x"], column="body"))
    assert "a.parquet has no column 'text'" in refusal(documents, FILES, "train")
    (folder / "a.parquet").write_bytes(OLD[:-10])
    assert "a.parquet cannot be read" in refusal(documents, FILES, "train")
    (folder / "a.parquet").write_bytes(OLD.replace(b"river", b"\xff\xfe\xfdxx"))
    assert "a.parquet cannot be read" in refusal(documents, FILES, "train")
    pq.write_table(pa.table({"text": [["a", "list"]]}), folder / "a.parquet")
    assert "a.parquet cannot be read" in refusal(documents, FILES, "train")


@pytest.mark.skipif(not os.path.isfile("/proc/self/mem"), reason="needs a file that even root cannot read")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_cannot_be_read_is_named(folder, name):
    (folder / name).symlink_to("/proc/self/mem")
    assert f"{name} cannot be read" in refusal(documents, FILES, "train")


def test_a_folder_that_holds_nothing_is_said(folder, monkeypatch):
    assert "holds no .parquet, .jsonl or .txt file" in refusal(fetch, FILES)
    (folder / "dir.txt").mkdir()
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    assert "holds no" in refusal(fetch, FILES)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(folder / "nowhere"))
    assert "is not a folder" in refusal(fetch, FILES)
    monkeypatch.delenv("AUTORESEARCH_FILES")
    assert "make prepare DATASET=files FILES=dir" in refusal(fetch, FILES)


def test_files_is_relative_to_where_one_stands(folder, monkeypatch):
    (folder / "a.txt").write_text("here")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("AUTORESEARCH_FILES", "my texts")
    assert ["here"] in all_texts().values()
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("AUTORESEARCH_FILES", "~/my texts")
    assert ["here"] in all_texts().values()


def test_the_fingerprint_notices_another_folder_and_another_content(folder, monkeypatch):
    (folder / "a.txt").write_text("here")
    first = data_sources.fingerprint(FILES)
    assert data_sources.fingerprint(FILES) == first
    (folder / "b.txt").write_text("more")
    second = data_sources.fingerprint(FILES)
    (folder / "b.txt").write_text("else")  # as long as before
    os.utime(folder / "b.txt", ns=(1, 1))
    third = data_sources.fingerprint(FILES)
    other = folder.parent / "other"
    other.mkdir()
    (other / "a.txt").write_text("there")
    monkeypatch.setenv("AUTORESEARCH_FILES", str(other))
    assert len({first, second, third, data_sources.fingerprint(FILES)}) == 4
    monkeypatch.delenv("AUTORESEARCH_FILES")
    assert data_sources.fingerprint(FILES) is None  # training needs no source


# --- passages and splits ---------------------------------------------------------------------------

prose = st.text(alphabet="ab \n", max_size=400)


def without_blanks(pieces):
    return "".join("".join(pieces).split())


@settings(max_examples=50, deadline=None)
@given(prose, st.integers(1, 60), st.sampled_from([("\n\n",), ("\n\n", "\n", " ")]))
def test_passages_lose_nothing_and_keep_the_order(text, limit, separators):
    pieces = data_sources.passages(text, limit, separators)
    assert without_blanks(pieces) == without_blanks([text])
    assert all(piece in text and piece.strip() for piece in pieces)
    if len(separators) == 3:
        assert all(len(piece.split()) == 1 for piece in pieces if len(piece.strip()) > limit)


@settings(max_examples=50, deadline=None)
@given(prose, st.integers(1, 50))
def test_a_text_file_is_the_same_text_however_it_is_read(tmp_path_factory, text, at_once):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text(text)
    assert without_blanks(data_sources.txt_texts(path, at_once)) == without_blanks([text])


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_one_large_text_file_is_enough_for_three_splits(folder, separator):
    (folder / "book.txt").write_text(separator.join(texts(0, 10_000)))
    found = all_texts()
    assert all(found.values())
    assert max(len(t) for part in found.values() for t in part) <= 9000


def test_groups_are_never_divided_and_do_not_depend_on_each_other():
    groups = [(f"file {i}", [f"{i}.{j}" for j in range(3)]) for i in range(2000)]
    found = {split: list(data_sources.split_by_content(groups, split, 0.05)) for split in SPLITS}
    assert sorted(itertools.chain(*found.values())) == sorted(t for _, part in groups for t in part)
    files = {split: {t.split(".")[0] for t in found[split]} for split in SPLITS}
    assert sum(len(files[split]) for split in SPLITS) == 2000
    assert all(60 <= len(files[split]) <= 140 for split in ("val", "test"))
    fewer = list(data_sources.split_by_content(groups[::7], "val", 0.05))
    assert fewer == [t for t in found["val"] if int(t.split(".")[0]) % 7 == 0]


def test_stdlib_is_split_by_file_and_always_the_same(cache):
    fetch(STDLIB)
    groups = list(data_sources.stdlib_documents())
    assert len(groups) > 500
    assert not any("site-packages" in key or key.startswith("/") for key, _ in groups)
    assert sum(len(t) for _, part in groups for t in part) > 10e6
    for split in ("val", "test"):
        found = list(documents(STDLIB, split))
        assert found == list(data_sources.split_by_content(groups, split, 0.05))
        assert sum(map(len, found)) > 100_000


# --- names and places ------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones():
    line = refusal(data_sources.get_dataset, "wikipedia")
    assert "wikipedia" in line and all(name in line for name in DATASETS)
    with pytest.raises(ValueError, match="train, val, test"):
        documents(STDLIB, "valid")


def test_the_cache_is_where_one_says(cache, tmp_path, monkeypatch):
    assert data_sources.cache_dir(CLIMBMIX) == cache
    assert data_sources.cache_dir(STDLIB) == cache / "stdlib"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AUTORESEARCH_CACHE", "~/elsewhere")
    assert data_sources.cache_dir(CLIMBMIX) == tmp_path / "elsewhere"
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    assert data_sources.cache_dir(TINYSTORIES) == tmp_path / ".cache" / "autoresearch" / "tinystories"
