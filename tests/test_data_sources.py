"""Every dataset, from where its text comes to its splits; the hub is a server on this machine."""

import codecs
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub, fresh_login, leftovers, listing, parquet, refusal, serving, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import data_sources
from data_sources import DATASETS, SPLITS, documents, fetch
from harness import downloads

ROOT = Path(data_sources.__file__).parent
CLIMBMIX, TINYSTORIES, FILES, STDLIB = (DATASETS[name] for name in ("climbmix", "tinystories", "files", "stdlib"))


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


def test_what_is_not_what_the_hub_promised_is_fetched_again(hub, cache):
    climbmix_files(hub)
    name = f"/datasets/{CLIMBMIX.repo}/resolve/main/shard_00004.parquet"
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


@pytest.mark.slow
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
    small = dataclasses.replace(FILES, sequence_length=16)
    write_jsonl(folder / "m.jsonl", [{"text": t} for t in texts(0, 1500)])
    before = all_texts(small)
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(1500, 300)])
    after = all_texts(small)
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)
    assert before == {split: by_hash(texts(0, 1500), split) for split in SPLITS}


def by_hash(found, split):
    """What a text's own hash says of its split; a cache made long ago and one made today agree."""
    shares = ((t, int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 2**64) for t in found)
    return [t for t, share in shares if split == ("val" if share < 0.05 else "test" if share < 0.1 else "train")]


@pytest.mark.parametrize("long_ones", [1, 2, 3, 10])
@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
def test_a_few_long_documents_are_cut_into_passages_for_three_splits(folder, long_ones, separator):
    size = 400_000 // long_ones
    long = [separator.join(texts(size * i, 1 + size // 150))[:size] for i in range(long_ones)]
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in long[::2] + texts(0, 40)])
    (folder / "b.parquet").write_bytes(parquet([*long[1::2], long[0]]))
    found = all_texts()
    sizes = {split: sum(map(len, found[split])) for split in SPLITS}
    total = sum(sizes.values())
    assert total > 0.98 * 400_000
    for split in ("val", "test"):
        assert total / 20 <= sizes[split] <= total / 20 + 8001
        assert any(len(text) > 5000 for text in found[split])
    every = [text for split in SPLITS for text in found[split]]
    assert len(every) == len(set(every))  # no passage twice, and none in two splits
    assert Counter("".join(every)) - Counter("".join([*long, *texts(0, 40)])) == Counter()


def test_many_short_documents_beside_a_few_long_ones_do_not_hide_that_these_are_few(folder):
    long = "\n\n".join(texts(10_000, 4000))
    write_jsonl(folder / "a.jsonl", [{"text": f"{i} is short"} for i in range(1000)] + [{"text": long}] * 50)
    found = all_texts()
    assert all(sum(map(len, found[split])) > len(long) / 21 for split in ("val", "test"))


def test_the_held_out_share_shrinks_where_evaluation_needs_less(folder):
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(0, 3000)])
    little = dataclasses.replace(FILES, eval_tokens=256)
    assert 1 <= len(all_texts(little)["val"]) < len(all_texts(FILES)["val"]) / 4


def test_odd_text_is_taken_as_far_as_it_is_text(folder):
    huge = "word " * 1000
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
    for odd in ([["a", "list"]], [1, 2], [{"text": "x"}]):
        pq.write_table(pa.table({"text": odd, "n": [0] * len(odd)}), folder / "a.parquet")
        line = refusal(documents, FILES, "train")
        assert "a.parquet: column 'text' holds " in line and "no text, beside n;" in line
    two = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(two, folder / "a.parquet")
    assert "a.parquet has 2 columns 'text'" in refusal(documents, FILES, "train")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.null(),
                                  pa.dictionary(pa.int32(), pa.string())], ids=str)  # fmt: skip
def test_text_is_read_from_a_column_of_any_kind_of_text(folder, kind):
    wanted = [None] * 50 if kind == pa.null() else texts(0, 50)
    pq.write_table(pa.table({"text": pa.array(wanted).cast(kind)}), folder / "a.parquet")
    found = [t for part in all_texts().values() for t in part]
    assert sorted(found) == sorted(filter(None, wanted))


@pytest.mark.parametrize("name", ["content", "a.b", "Text", "тело"])
def test_another_column_can_be_chosen_and_is_named_where_text_is_missing(folder, monkeypatch, name):
    (folder / "a.parquet").write_bytes(parquet(texts(0, 50), column=name))
    write_jsonl(folder / "b.jsonl", [{name: t, "id": 7} for t in texts(50, 50)])
    line = refusal(documents, FILES, "train")
    assert f"a.parquet has no column 'text', but {name}; COLUMN=name" in line
    before = data_sources.fingerprint(FILES)
    monkeypatch.setenv("AUTORESEARCH_COLUMN", name)
    assert sorted(t for part in all_texts().values() for t in part) == sorted(texts(0, 100))
    assert data_sources.fingerprint(FILES) != before
    (folder / "a.parquet").unlink()
    monkeypatch.delenv("AUTORESEARCH_COLUMN")
    assert f"b.jsonl, line 1: not a JSON object with a 'text', but with {name}, id; " in refusal(
        documents, FILES, "train"
    )


def test_the_column_is_that_of_files_alone(cache, monkeypatch):
    (cache / "shards").mkdir(parents=True)
    for i in (*range(10), 6541, 6542):
        (cache / "shards" / f"shard_{i:05d}.parquet").write_bytes(parquet(["a text"]))
    monkeypatch.setenv("AUTORESEARCH_COLUMN", "content")
    assert list(documents(CLIMBMIX, "val")) == ["a text"]


NAMES = ["a\nb.{}", "a\x1b[2J.{}", "a\udcff.{}", "-a '$(touch x)`.{}", "a\u202eb.{}"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_file_s_odd_name_is_told_in_one_line(folder, capsys, name, kind):
    path = folder / name.format(kind)
    path.write_bytes(os.urandom(2000))  # no text
    if kind == "jsonl":
        path.write_text('{"a\x1b[2Jb": 1}')
    if kind == "txt":
        (folder / "b.txt").write_text("text")
        fetch(FILES)
    else:
        refusal(fetch, FILES)
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines()) and said.count("\n") <= 2


# --- what is text ----------------------------------------------------------------------------------

PROSE = "Die Füße sind so groß wie die Hände, und der Apfelbaum blüht. " * 50


def told(folder, capsys):
    fetch(FILES)
    return capsys.readouterr().out


@pytest.mark.parametrize("codec", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_byte_order_mark_is_obeyed(folder, capsys, codec, kind):
    content = PROSE if kind == "txt" else json.dumps({"text": PROSE}, ensure_ascii=False) + "\n"
    (folder / f"a.{kind}").write_bytes(content.encode(codec))
    swapped = {"utf-16": codecs.BOM_UTF16_BE, "utf-32": codecs.BOM_UTF32_BE}.get(codec)
    if swapped:
        (folder / f"b.{kind}").write_bytes(swapped + content.encode(f"{codec}-be"))
    (folder / f"c.{kind}").write_text('{"text": "another"}')
    said = told(folder, capsys)
    assert ("decoded" in said and f"a.{kind} ({codec.upper()})" in said) == bool(swapped)
    assert " bad " not in said and "skipped" not in said
    assert PROSE in [t for part in all_texts().values() for t in part]


def test_latin_1_is_read_with_its_share_of_bad_characters(folder, capsys):
    (folder / "a.txt").write_bytes(PROSE.encode("latin-1"))
    (folder / "b.txt").write_text("b" + PROSE * 9)
    share = sum(character > "~" for character in PROSE) / len(PROSE)
    of_all = share * len(PROSE) / (10 * len(PROSE) + 1)
    said = told(folder, capsys)
    assert f"({of_all:.2%}) are bad" in said and f"; of a.txt {share:.2%}" in said


NO_TEXT = {
    "random": lambda: random.Random(1).randbytes(10_000),
    "a few random bytes": lambda: random.Random(2).randbytes(60),
    "UTF-16 without its mark": lambda: PROSE.encode("utf-16-le"),
    "another UTF-16": lambda: PROSE.encode("utf-16-be"),
    "Chinese in UTF-16": lambda: ("天地玄黃宇宙洪荒" * 50).encode("utf-16-le"),
    "Cyrillic in one byte": lambda: ("Широка страна моя родная " * 50).encode("koi8-r"),
    "Shift JIS": lambda: ("春はあけぼのやうやう白くなり行く" * 50).encode("shift-jis"),
    "compressed": lambda: zlib.compress(PROSE.encode() + random.Random(3).randbytes(500)),
    "NULs": lambda: bytes(5000),
    "a program": lambda: Path(sys.executable).resolve().read_bytes()[:200_000],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["txt", "jsonl", "TXT"])
@pytest.mark.parametrize("content", NO_TEXT.values(), ids=NO_TEXT.keys())
def test_what_is_no_text_is_skipped_and_named(folder, capsys, content, kind):
    (folder / f"a.{kind}").write_bytes(content())
    line = refusal(fetch, FILES)
    assert (
        "too little text" in line
        and f"skipped as no text, or not in UTF-8 (iconv converts): a.{kind} (" in capsys.readouterr().out
    )
    (folder / "b.txt").write_text(PROSE)
    said = told(folder, capsys)
    assert "read 1 .txt: 1 texts" in said and f"a.{kind} (" in said
    assert [t for part in all_texts().values() for t in part] == [PROSE]


@pytest.mark.parametrize(
    "text", ["天地玄黃宇宙洪荒" * 9000, "🙂" * 20_000, "Широка страна " * 9000, "a\tb\x0c\r\n\x1b[1m" * 99, ""]
)
def test_text_of_any_script_is_text(folder, text):
    (folder / "a.txt").write_text(text, newline="")  # 64 kB may end within a letter
    assert data_sources.encoding_of(folder / "a.txt") == ("utf-8-sig", pytest.approx(0, abs=1e-4))


def test_hidden_folders_and_links_to_folders_are_not_read_and_named(folder, tmp_path, capsys):
    for place in (".git", ".venv/lib", "sub/.cache", "elsewhere"):
        (folder / place).mkdir(parents=True)
        (folder / place / "a.txt").write_text(f"of {place}")
    (folder / "elsewhere").rename(tmp_path / "elsewhere")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "sub" / "B.TXT").write_text("read")
    (folder / "notes.md").write_text("of another kind")
    said = told(folder, capsys)
    assert [t for part in all_texts().values() for t in part] == ["read"]
    assert all(f"{name} (hidden)" in said for name in (".git", ".venv", ".cache"))
    assert "link (a link)" in said and "circle (a link)" in said and "1 files" in said
    hidden = folder / ".hidden"  # but where it is what was asked for
    hidden.mkdir()
    (hidden / "a.txt").write_text("of it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_FILES", str(hidden))
        assert [t for part in all_texts().values() for t in part] == ["of it"]


def test_rows_without_text_are_counted(folder, capsys):
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in ("one", None, "", " ", 7, ["x"], "two")])
    assert "read 1 .jsonl: 2 texts, 6 characters; 5 rows without text" in told(folder, capsys)


def test_what_cannot_be_read_is_said_before_any_work(folder, capsys):
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(0, 100)])
    (folder / "z.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert "z.jsonl, line 2" in refusal(fetch, FILES)


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


def test_who_asks_for_held_out_text_is_heard_and_who_asks_for_training_text_is_not(folder):
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(0, 200)])
    code = """if True:
        import sys, data_sources as d
        def note(event, words):
            if event == "data_sources.documents":
                print(*words)
        sys.addaudithook(note)
        list(d.documents(d.DATASETS["files"], "train"))
        list(d.documents(d.DATASETS["files"], "test"))
        d.split_by_content([], "val", 0.05)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "files train\nfiles test\n val\n"


@pytest.mark.slow
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
