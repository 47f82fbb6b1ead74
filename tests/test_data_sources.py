"""Every dataset, from where its text comes to its splits; the hub is a server on this machine."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import hub_of_a_test, leftovers, listing, parquet, refusal, texts  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import data_sources
from data_sources import DATASETS
from harness import corpus
from harness.corpus import SPLITS

ROOT = Path(data_sources.__file__).parent
CLIMBMIX, TINYSTORIES, FILES, STDLIB = (DATASETS[name] for name in ("climbmix", "tinystories", "files", "stdlib"))


def fetch(dataset):
    dataset.source.fetch(dataset)


# --- the hub's ---------------------------------------------------------------------------------------


def climbmix_files(hub, text_of=lambda i: texts(100 * i, 40)):
    """Put shards on the hub: {name of a shard: where it is}."""
    found = {}
    for i in (*range(12), 6541, 6542):
        name = f"shard_{i:05d}.parquet"
        found[name] = f"/datasets/{CLIMBMIX.source.repo}/resolve/main/{name}"
        hub.files[found[name]] = parquet(text_of(i))
    return found


def test_climbmix_is_ten_shards_and_the_last_two_fetched_several_at_once_and_only_once(hub, cache):
    climbmix_files(hub)
    hub.barrier = threading.Barrier(4)  # nobody is answered before four have asked
    fetch(CLIMBMIX)
    hub.barrier = None
    names = [f"shard_{i:05d}.parquet" for i in (*range(10), 6541, 6542)]
    assert sorted(path.name for path in (cache / "shards").iterdir()) == names
    assert list(CLIMBMIX.source.texts(CLIMBMIX, "train")) == [t for i in range(10) for t in texts(100 * i, 40)]
    assert list(CLIMBMIX.source.texts(CLIMBMIX, "val")) == texts(654200, 40)
    assert list(CLIMBMIX.source.texts(CLIMBMIX, "test")) == texts(654100, 40)
    fetch(CLIMBMIX)
    assert len(hub.seen) == 12
    shard = cache / "shards" / names[3]
    shard.write_bytes(shard.read_bytes()[:-10])
    fetch(CLIMBMIX)  # what has no footer is fetched again
    assert len(hub.seen) == 13 and len(list(CLIMBMIX.source.texts(CLIMBMIX, "train"))) == 400


def test_what_is_not_what_the_hub_promised_is_fetched_again(hub, cache):
    name = climbmix_files(hub)["shard_00004.parquet"]
    body = hub.files["/elsewhere"] = hub.files[name]
    tag = f'"{hashlib.sha256(body).hexdigest()}"'
    hub.faults[name] = [lambda handler: handler.send(302, b"", X_Linked_ETag=tag, Location="/elsewhere")] * 2
    hub.faults["/elsewhere"] = [lambda handler: handler.send_file(body.replace(b"river", b"rover"))]  # as right a file
    fetch(CLIMBMIX)
    assert (cache / "shards" / "shard_00004.parquet").read_bytes() == body and not hub.faults["/elsewhere"]


def test_killed_in_the_middle_of_a_download_then_again(hub, cache):
    places, release = climbmix_files(hub, lambda i: 10 * texts(100 * i, 500)), threading.Event()

    def stuck(handler):
        body = hub.files[handler.path]
        handler.send(200, body[: len(body) // 2], len(body))
        release.wait(30)

    hub.faults[places["shard_00004.parquet"]] = [stuck]
    code = "import data_sources; d = data_sources.DATASETS['climbmix']; d.source.fetch(d)"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in cache.rglob("shard_00004.*.part")):
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    release.set()
    assert leftovers(cache)
    assert all(path.read_bytes() == hub.files[places[path.name]] for path in (cache / "shards").glob("*.parquet"))
    fetch(CLIMBMIX)
    assert len(list(CLIMBMIX.source.texts(CLIMBMIX, "train"))) == 50000
    assert not leftovers(cache)


def test_tinystories_is_resharded_into_twenty_one_and_one(hub, cache):
    stories = texts(0, 700)
    parts = [stories[:300], stories[200:500], stories[500:] + stories[:50]]  # some stand twice or thrice
    base = f"/api/datasets/{TINYSTORIES.source.repo}/parquet"
    names = [f"{base}/default/train/{i}.parquet" for i in range(len(parts))]
    hub.files |= {name: parquet(part) for name, part in zip(names, parts, strict=True)}
    hub.files[base] = listing(*("https://huggingface.co" + name for name in names))
    fetch(TINYSTORIES)
    shards = sorted((cache / "tinystories" / "shards").iterdir())
    assert [path.name for path in shards] == [f"shard_{i:05d}.parquet" for i in range(22)]
    sizes = [pq.read_metadata(path).num_rows for path in shards]
    assert sum(sizes) == 700 and max(sizes) - min(sizes) <= 1
    train, val, test = (list(TINYSTORIES.source.texts(TINYSTORIES, split)) for split in SPLITS)
    assert len(val) == sizes[20] and len(test) == sizes[21]
    assert Counter(train + val + test) == Counter(stories)  # each once, though the hub had some twice
    assert train != stories[: len(train)]  # shuffled
    seen, before = len(hub.seen), [path.read_bytes() for path in shards]
    fetch(TINYSTORIES)
    assert len(hub.seen) == seen
    shards[5].unlink()  # and from the start again it is the same
    fetch(TINYSTORIES)
    assert [path.read_bytes() for path in shards] == before


@pytest.mark.parametrize(
    ("answer", "words"), [(b'{"a": {"b": null}}', "lists no parquet files"), (b"<html>", "HF_ENDPOINT")]
)
def test_a_listing_that_lists_nothing_is_said(hub, cache, answer, words):
    hub.files[f"/api/datasets/{TINYSTORIES.source.repo}/parquet"] = answer
    assert words in refusal(fetch, TINYSTORIES)
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
    return {split: list(dataset.source.texts(dataset, split)) for split in SPLITS}


def flat(found):
    return sorted(text for part in found.values() for text in part)


def test_files_reads_all_three_kinds_at_any_depth_and_nothing_else(folder, tmp_path, monkeypatch):
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
    found = all_texts()
    assert Counter(flat(found)) == Counter(texts(0, 900))
    assert all(20 <= len(found[split]) <= 80 for split in ("val", "test"))  # a twentieth each, about
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("my texts", "~/my texts"):
        monkeypatch.setenv("AUTORESEARCH_FILES", name)
        assert all_texts() == found


def by_hash(found, split):
    shares = ((t, int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 2**64) for t in found)
    return [t for t, share in shares if split == ("val" if share < 0.05 else "test" if share < 0.1 else "train")]


def test_a_text_s_own_hash_decides_its_split_whatever_else_there_is(folder):
    write_jsonl(folder / "m.jsonl", [{"text": t} for t in texts(0, 1500)])
    before = all_texts()
    assert before == {split: by_hash(texts(0, 1500), split) for split in SPLITS}
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(1500, 300)])
    (folder / "b.parquet").write_bytes(parquet(texts(0, 500)[::-1]))  # copies
    after = all_texts()
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)
    assert not any(set(after[a]) & set(after[b]) for a, b in (("train", "val"), ("train", "test"), ("val", "test")))
    little = all_texts(dataclasses.replace(FILES, eval_tokens=256))  # where evaluation needs less, less is held out
    assert 1 <= len(little["val"]) < len(after["val"]) / 2


def test_odd_text_is_taken_where_it_is_text(folder):
    huge = "word " * 1000
    (folder / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a byte order mark"}\n\n'
        + b'{"text": "half a pair \\ud800 and a whole \\ud83d\\ude00"}\r\n'
        + b'{"text": null}\n{"text": ["no"]}\n{"text": ""}\n{"text": " "}\n'
        + json.dumps({"text": huge}).encode()
    )
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfmark\r\n\r\n" + "天地🙂".encode())
    found = ["a byte order mark", "half a pair ? and a whole 😀", huge, "mark\n\n天地🙂"]
    assert flat(all_texts()) == sorted(found)


UNREADABLE = {  # what stands in a file, and what is said of it
    "a.txt": ("große Füße".encode("latin-1"), "'utf-8' codec"),
    "b.jsonl": ('{"text": "ä"}'.encode("utf-16"), "'utf-8' codec"),
    "c.jsonl": (b'{"text": "fine"}\n\n{"text": "a"', "line 3 is no JSON object with 'text'"),
    "d.jsonl": (b'{"text": "fine"}\n[1]', "line 2 is no JSON object with 'text': [1]"),
    "f.jsonl": (b'{"a\x1b[2Jb": 1}', "line 1 is no JSON object with 'text': {\"a [2Jb\": 1}"),
    "g.parquet": (parquet(texts(0, 50))[:-10], "Parquet"),
    "h.parquet": (parquet(texts(0, 50)).replace(b"river", b"\xff\xfe\xfdxx"), "'utf-8' codec"),
    "j.parquet": (parquet(["x"], "body"), "no text in column 'text', but in ['body']"),
    "k\nl\x1b[2J\u202e'$(touch x)`.txt": (b"\xff", "'utf-8' codec"),
}


@pytest.mark.parametrize("name", UNREADABLE, ids=ascii)
def test_what_cannot_be_read_is_named_in_one_line(folder, name):
    content, why = UNREADABLE[name]
    (folder / name).write_bytes(content)
    line = refusal(FILES.source.texts, FILES, "train")
    assert corpus.printable(name) in line and f"cannot be read: {why}" in line and "choose COLUMN" in line


def test_a_shard_of_any_size_is_read_a_little_at_a_time(folder):
    pq.write_table(pa.table({"text": ["x" * 10_000] * 10_000}), folder / "a.parquet", row_group_size=10_000)
    before, most = pa.total_allocated_bytes(), 0
    for _ in corpus.parquet_texts(folder / "a.parquet", "text"):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 40e6  # of 100 MB


@pytest.mark.parametrize(("name", "kind"), [("content", pa.string()), ("тело.a", pa.large_string())])
def test_another_column_of_any_kind_of_string_can_be_chosen(folder, monkeypatch, name, kind):
    pq.write_table(pa.table({name: pa.array([*texts(0, 50), None]).cast(kind)}), folder / "a.parquet")
    write_jsonl(folder / "b.jsonl", [{name: t, "id": 7} for t in texts(50, 50)])
    before = FILES.source.fingerprint()
    monkeypatch.setenv("AUTORESEARCH_COLUMN", name)
    assert flat(all_texts()) == sorted(texts(0, 100))
    assert FILES.source.fingerprint() != before


def test_a_folder_that_holds_nothing_is_said(folder, monkeypatch):
    (folder / "dir.txt").mkdir()
    for place in (folder, folder / "nowhere"):
        monkeypatch.setenv("AUTORESEARCH_FILES", str(place))
        assert f"FILES={place} holds no .parquet, .jsonl or .txt file" in refusal(FILES.source.texts, FILES, "train")
    monkeypatch.delenv("AUTORESEARCH_FILES")
    assert "make prepare DATASET=files FILES=dir" in refusal(FILES.source.texts, FILES, "train")


def test_the_fingerprint_notices_another_content_and_another_folder(folder, monkeypatch):
    def fingerprint(place, name, text, time):
        monkeypatch.setenv("AUTORESEARCH_FILES", str(place))
        place.mkdir(exist_ok=True)
        (place / name).write_text(text)
        os.utime(place / name, ns=(time, time))
        return FILES.source.fingerprint()

    found = [fingerprint(folder, "a.txt", "here", 1), fingerprint(folder, "b.txt", "more", 1)]
    found += [fingerprint(folder, "b.txt", "else", 2), fingerprint(folder.parent / "other", "a.txt", "here", 1)]
    assert len(set(found)) == 4 and FILES.source.fingerprint() == found[-1]
    monkeypatch.delenv("AUTORESEARCH_FILES")
    assert FILES.source.fingerprint() is None  # training needs no source


# --- passages and splits ---------------------------------------------------------------------------

prose = st.text(alphabet="ab \n", max_size=400)


def without_blanks(pieces):
    return "".join("".join(pieces).split())


@settings(max_examples=50, deadline=None)
@given(prose, st.integers(1, 60))
def test_passages_lose_nothing_and_keep_the_order(tmp_path_factory, text, limit):
    pieces = corpus.passages(text, limit)
    assert without_blanks(pieces) == without_blanks([text])
    assert all(piece in text and piece.strip() for piece in pieces)
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PASSAGE", limit)
        pieces = list(corpus.text_passages(path, None))
    assert "".join(pieces) == text and max(map(len, pieces), default=0) <= limit * 9 / 8


@pytest.mark.parametrize("separator", ["\n", ""])
def test_one_large_text_file_is_enough_for_three_splits(folder, separator):
    (folder / "book.txt").write_text(separator.join(texts(0, 5000)))
    found = all_texts()
    assert all(found.values())
    assert separator == "" or sum(not text.endswith("\n") for text in flat(found)) == 1  # the last one
    assert len("".join(flat(found))) > 0.99 * (folder / "book.txt").stat().st_size


def test_stdlib_is_split_by_file_and_always_the_same(cache):
    groups = list(STDLIB.source.documents())
    assert len(groups) > 500 and sum(len(t) for _, part in groups for t in part) > 10e6
    assert not any("site-packages" in name or name.startswith("/") for name, _ in groups)
    names = {split: set(by_hash([name for name, _ in groups], split)) for split in SPLITS}
    held_out = {split: [text for name, part in groups if name in names[split] for text in part] for split in SPLITS}
    assert list(STDLIB.source.texts(STDLIB, "val")) == held_out["val"]
    assert list(islice(STDLIB.source.texts(STDLIB, "train"), 5000)) == held_out["train"][:5000]
    assert all(sum(map(len, held_out[split])) > 100_000 for split in ("val", "test"))


def test_the_cache_is_where_one_says(cache, tmp_path, monkeypatch):
    assert corpus.cache_dir(CLIMBMIX) == cache
    assert corpus.cache_dir(STDLIB) == cache / "stdlib"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AUTORESEARCH_CACHE", "~/elsewhere")
    assert corpus.cache_dir(CLIMBMIX) == tmp_path / "elsewhere"
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    assert corpus.cache_dir(TINYSTORIES) == tmp_path / ".cache" / "autoresearch" / "tinystories"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where HOME is unset and nobody knows the user
    with pytest.raises(SystemExit, match="there is no home folder; set HOME, or AUTORESEARCH_CACHE"):
        corpus.cache_dir(TINYSTORIES)
