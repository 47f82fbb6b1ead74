"""Every dataset, from where its text comes to its splits; the hub is a server on this machine."""

import dataclasses
import gc
import hashlib
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
from hub import Hub, fresh_login, leftovers, listing, parquet, refusal, serving, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import data_sources
from data_sources import DATASETS
from harness import corpus, downloads
from harness.corpus import SPLITS, documents

ROOT = Path(data_sources.__file__).parent
CLIMBMIX, TINYSTORIES, FILES, STDLIB = (DATASETS[name] for name in ("climbmix", "tinystories", "files", "stdlib"))


def fetch(dataset):
    dataset.source.fetch(dataset)


OLD = parquet(20 * texts(0, 600))


@pytest.fixture(autouse=True)
def a_fresh_login(tmp_path_factory, monkeypatch):
    fresh_login(monkeypatch, tmp_path_factory.mktemp("home"))


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
        hub.files[f"/datasets/{CLIMBMIX.source.repo}/resolve/main/shard_{i:05d}.parquet"] = parquet(text_of(i))


def test_climbmix_is_ten_shards_and_the_last_two_fetched_several_at_once_and_only_once(hub, cache):
    climbmix_files(hub)
    hub.barrier = threading.Barrier(4)  # nobody is answered before four have asked
    fetch(CLIMBMIX)
    hub.barrier = None
    assert 4 <= hub.most_at_once <= downloads.WORKERS and len(hub.seen) == 12
    names = [f"shard_{i:05d}.parquet" for i in (*range(10), 6541, 6542)]
    assert sorted(path.name for path in (cache / "shards").iterdir()) == names
    assert list(documents(CLIMBMIX, "train")) == [t for i in range(10) for t in texts(100 * i, 40)]
    assert list(documents(CLIMBMIX, "val")) == texts(654200, 40)
    assert list(documents(CLIMBMIX, "test")) == texts(654100, 40)
    fetch(CLIMBMIX)
    assert len(hub.seen) == 12


def test_what_is_not_what_the_hub_promised_is_fetched_again(hub, cache):
    climbmix_files(hub)
    name = f"/datasets/{CLIMBMIX.source.repo}/resolve/main/shard_00004.parquet"
    body = hub.files["/elsewhere"] = hub.files[name]
    tag = f'"{hashlib.sha256(body).hexdigest()}"'
    hub.faults[name] = [lambda handler: handler.send(302, b"", X_Linked_ETag=tag, Location="/elsewhere")] * 2
    hub.faults["/elsewhere"] = [lambda handler: handler.send_file(body.replace(b"river", b"rover"))]  # as right a file
    fetch(CLIMBMIX)
    assert (cache / "shards" / "shard_00004.parquet").read_bytes() == body and len(hub.requests("/elsewhere")) == 2


def test_killed_in_the_middle_of_a_download_then_again(hub, cache):
    climbmix_files(hub, lambda i: 10 * texts(100 * i, 500))
    halfway, release = threading.Event(), threading.Event()

    def stuck(handler):
        body = hub.files[handler.path]
        handler.send(200, body[: len(body) // 2], len(body))
        halfway.set()
        release.wait(30)

    hub.faults[f"/datasets/{CLIMBMIX.source.repo}/resolve/main/shard_00004.parquet"] = [stuck]
    code = "import data_sources; d = data_sources.DATASETS['climbmix']; d.source.fetch(d)"
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
    assert all(
        path.read_bytes() == hub.files[f"/datasets/{CLIMBMIX.source.repo}/resolve/main/{path.name}"] for path in there
    )
    fetch(CLIMBMIX)
    assert len(list(documents(CLIMBMIX, "train"))) == 50000
    assert not leftovers(cache)


def tinystories_files(hub):
    stories = texts(0, 700)
    parts = [stories[:300], stories[200:500], stories[500:] + stories[:50]]  # some stand twice or thrice
    base = f"/api/datasets/{TINYSTORIES.source.repo}/parquet"
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
    hub.files[f"/api/datasets/{TINYSTORIES.source.repo}/parquet"] = answer
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


def test_files_reads_all_three_kinds_at_any_depth_and_nothing_else(folder, tmp_path, capsys):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a.parquet").write_bytes(parquet(texts(0, 300)))
    write_jsonl(folder / "deep" / "b.jsonl", [{"text": t, "id": 1} for t in texts(300, 300)])
    for i, t in enumerate(texts(600, 300)):
        (folder / f"{i}.{'txt' if i % 2 else 'TXT'}").write_text(t)
    (folder / "notes.md").write_text("of another kind")
    (folder / "._a.parquet").write_bytes(b"\x00\x05\x16\x07 what macOS leaves on foreign disks")
    for place in (".git", ".venv/lib", "sub/.cache", "elsewhere"):
        (folder / place).mkdir(parents=True)
        (folder / place / "a.txt").write_text(f"of {place}")
    (folder / "elsewhere").rename(tmp_path / "elsewhere")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    fetch(FILES)
    assert capsys.readouterr().out == "files: reading 1 .jsonl, 1 .parquet, 300 .txt\n"
    found = all_texts()
    assert Counter(t for split in SPLITS for t in found[split]) == Counter(texts(0, 900))
    assert all(20 <= len(found[split]) <= 80 for split in ("val", "test"))  # a twentieth each, about


def test_a_text_s_own_hash_decides_its_split_whatever_else_there_is(folder):
    write_jsonl(folder / "m.jsonl", [{"text": t} for t in texts(0, 1500)])
    before = all_texts()
    assert before == {split: by_hash(texts(0, 1500), split) for split in SPLITS}
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(1500, 300)])
    (folder / "b.parquet").write_bytes(parquet(texts(0, 500)[::-1]))  # copies
    after = all_texts()
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)
    assert not any(set(after[a]) & set(after[b]) for a, b in (("train", "val"), ("train", "test"), ("val", "test")))


def by_hash(found, split):
    shares = ((t, int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 2**64) for t in found)
    return [t for t, share in shares if split == ("val" if share < 0.05 else "test" if share < 0.1 else "train")]


def test_the_held_out_share_shrinks_where_evaluation_needs_less(folder):
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(0, 3000)])
    little = dataclasses.replace(FILES, eval_tokens=256)
    assert 1 <= len(all_texts(little)["val"]) < len(all_texts(FILES)["val"]) / 4


def test_odd_text_is_taken_where_it_is_text(folder):
    huge = "word " * 1000
    (folder / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a byte order mark"}\n\n'
        + b'{"text": "half a pair \\ud800 and a whole \\ud83d\\ude00"}\r\n'
        + b'{"text": null}\n{"text": ["no"]}\n{"text": ""}\n{"text": " "}\n'
        + json.dumps({"text": huge}).encode()
    )
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfmark\r\n\r\n" + "天地🙂".encode())
    found = [t for part in all_texts().values() for t in part]
    assert sorted(found) == sorted(["a byte order mark", "half a pair ? and a whole 😀", huge, "mark\n\n天地🙂"])


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("codec", ["latin-1", "utf-16"])
def test_what_is_not_utf_8_is_named(folder, kind, codec):
    text = "Die Füße sind so groß wie die Hände. " * 50
    (folder / f"a.{kind}").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding=codec)
    line = refusal(documents, FILES, "train")
    assert f"a.{kind} cannot be read: 'utf-8'" in line and "convert it to UTF-8 (iconv), or take it out" in line


@pytest.mark.parametrize("line", ['{"text": "a"', '"a"', "[1]", "[" * 100_000])
def test_a_line_that_is_no_document_is_named(folder, line):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    gc.disable()  # or pytest's and hypothesis's own hooks may run at the very end of the stack
    try:
        assert "a.jsonl, line 2: no text in 'text', but no JSON object" in refusal(documents, FILES, "train")
    finally:
        gc.enable()


def test_parquet_that_does_not_serve_is_named(folder):
    for damage in (OLD[:-10], OLD.replace(b"river", b"\xff\xfe\xfdxx")):
        (folder / "a.parquet").write_bytes(damage)
        assert "a.parquet cannot be read" in refusal(documents, FILES, "train")
    for odd in ([["a", "list"]], [1, 2], [{"text": "x"}], [None]):
        pq.write_table(pa.table({"text": odd, "n": [0] * len(odd)}), folder / "a.parquet")
        line = refusal(documents, FILES, "train")
        assert "a.parquet: no text in 'text', but text (" in line and "n (int64); COLUMN=name chooses" in line


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_text_is_read_from_a_column_of_any_kind_of_string(folder, kind):
    pq.write_table(pa.table({"text": pa.array([*texts(0, 3000), None]).cast(kind)}), folder / "a.parquet")
    assert sorted(t for part in all_texts().values() for t in part) == sorted(texts(0, 3000))


def test_a_shard_of_any_size_is_read_a_little_at_a_time(folder):
    pq.write_table(pa.table({"text": ["x" * 10_000] * 20_000}), folder / "a.parquet", row_group_size=20_000)
    before, most = pa.total_allocated_bytes(), 0
    for _ in corpus.parquet_texts(folder / "a.parquet", "text"):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 40e6  # of 200 MB


@pytest.mark.parametrize("name", ["content", "a.b", "тело"])
def test_another_column_can_be_chosen_and_is_named_where_text_is_missing(folder, monkeypatch, name):
    (folder / "a.parquet").write_bytes(parquet(texts(0, 50), column=name))
    write_jsonl(folder / "b.jsonl", [{name: t, "id": 7} for t in texts(50, 50)])
    line = refusal(documents, FILES, "train")
    assert f"a.parquet: no text in 'text', but {name} (string); COLUMN=name" in line
    before = corpus.fingerprint(FILES)
    monkeypatch.setenv("AUTORESEARCH_COLUMN", name)
    assert sorted(t for part in all_texts().values() for t in part) == sorted(texts(0, 100))
    assert corpus.fingerprint(FILES) != before
    (folder / "a.parquet").unlink()
    monkeypatch.delenv("AUTORESEARCH_COLUMN")
    assert f"b.jsonl, line 1: no text in 'text', but {name}, id; " in refusal(documents, FILES, "train")


@pytest.mark.parametrize("name", ["a\nb.{}", "a\x1b[2J.{}", "a\udcff.{}", "-a '$(touch x)`.{}", "a\u202eb.{}"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_file_s_odd_name_is_told_in_one_line(folder, name, kind):
    path = folder / name.format(kind)
    path.write_bytes(b'{"a\x1b[2Jb": 1}' if kind == "jsonl" else b"\xff\xfe no text")
    refusal(documents, FILES, "train")  # which sees that it is one line, and printable


@pytest.mark.skipif(not os.path.isfile("/proc/self/mem"), reason="needs a file that even root cannot read")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_cannot_be_read_is_named(folder, name):
    (folder / name).symlink_to("/proc/self/mem")
    assert f"{name} cannot be read" in refusal(documents, FILES, "train")


def test_a_folder_that_holds_nothing_is_said(folder, monkeypatch):
    assert "holds no .parquet, .jsonl or .txt file" in refusal(fetch, FILES)
    (folder / "dir.txt").mkdir()
    assert "holds no" in refusal(fetch, FILES)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(folder / "nowhere"))
    assert "nowhere cannot be read: No such file or directory" in refusal(fetch, FILES)
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


def test_the_fingerprint_notices_another_content_and_another_folder(folder, monkeypatch):
    def fingerprint(place, name, text, time):
        monkeypatch.setenv("AUTORESEARCH_FILES", str(place))
        place.mkdir(exist_ok=True)
        (place / name).write_text(text)
        os.utime(place / name, ns=(time, time))
        return corpus.fingerprint(FILES)

    found = [fingerprint(folder, "a.txt", "here", 1), fingerprint(folder, "b.txt", "more", 1)]
    found += [fingerprint(folder, "b.txt", "else", 2), fingerprint(folder.parent / "other", "a.txt", "here", 1)]
    assert len(set(found)) == 4 and corpus.fingerprint(FILES) == found[-1]
    monkeypatch.delenv("AUTORESEARCH_FILES")
    assert corpus.fingerprint(FILES) is None  # training needs no source


# --- passages and splits ---------------------------------------------------------------------------

prose = st.text(alphabet="ab \n", max_size=400)


def without_blanks(pieces):
    return "".join("".join(pieces).split())


@settings(max_examples=50, deadline=None)
@given(prose, st.integers(1, 60), st.sampled_from([("\n\n",), corpus.Folder.SEPARATORS]))
def test_passages_lose_nothing_and_keep_the_order(text, limit, separators):
    pieces = corpus.passages(text, limit, separators)
    assert without_blanks(pieces) == without_blanks([text])
    assert all(piece in text and piece.strip() for piece in pieces)
    if len(separators) > 1:
        assert max(map(len, pieces), default=0) <= limit


@settings(max_examples=50, deadline=None)
@given(prose, st.integers(1, 50))
def test_a_text_file_is_the_same_text_however_it_is_read(tmp_path_factory, text, at_once):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text(text)
    assert without_blanks(corpus.Folder().passages(path, at_once)) == without_blanks([text])


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
def test_one_large_text_file_is_enough_for_three_splits(folder, separator):
    (folder / "book.txt").write_text(separator.join(texts(0, 10_000)))
    found = all_texts()
    assert all(found.values())
    assert max(len(t) for part in found.values() for t in part) <= FILES.source.passage
    assert len("".join("".join(part) for part in found.values())) > 0.99 * (folder / "book.txt").stat().st_size


def test_stdlib_is_split_by_file_and_always_the_same(cache):
    fetch(STDLIB)
    groups = list(STDLIB.source.documents())
    assert len(groups) > 500 and sum(len(t) for _, part in groups for t in part) > 10e6
    assert not any("site-packages" in name or name.startswith("/") for name, _ in groups)
    found = {split: list(documents(STDLIB, split)) for split in SPLITS}
    for split, names in ((split, by_hash([name for name, _ in groups], split)) for split in SPLITS):
        assert found[split] == [text for name, part in groups if name in set(names) for text in part]
    assert all(sum(map(len, found[split])) > 100_000 for split in ("val", "test"))


# --- names and places ------------------------------------------------------------------------------


def test_the_cache_is_where_one_says(cache, tmp_path, monkeypatch):
    assert corpus.cache_dir(CLIMBMIX) == cache
    assert corpus.cache_dir(STDLIB) == cache / "stdlib"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AUTORESEARCH_CACHE", "~/elsewhere")
    assert corpus.cache_dir(CLIMBMIX) == tmp_path / "elsewhere"
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    assert corpus.cache_dir(TINYSTORIES) == tmp_path / ".cache" / "autoresearch" / "tinystories"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where HOME is unset and nobody knows the user
    line = refusal(corpus.cache_dir, TINYSTORIES)
    assert "there is no home folder" in line and "AUTORESEARCH_CACHE" in line
