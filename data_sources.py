"""Where text comes from: the datasets by name, their sizes, and how each is fetched.

A `Dataset` is a frozen value that is passed along. `fetch(dataset)` makes its source complete on
disk; `documents(dataset, split)` then yields its texts, always in the same order. No document is
in two splits. How text becomes tokens stands in token_cache.py, how files come from the hub in downloads.py.
"""

import codecs
import hashlib
import json
import os
import random
import re
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness.downloads import download_all, hub_endpoint, hub_listing, is_parquet, move_into_place, printable

SPLITS = ("train", "val", "test")
EVAL_UNIT = 524_288  # tokens; evaluation sizes are given as multiples of it


@dataclass(frozen=True)
class Dataset:
    """One corpus and the sizes that every experiment on it shares."""

    name: str
    vocab_size: int  # tokens, the special ones included
    sequence_length: int  # tokens of context in training and in evaluation
    eval_tokens: int  # validation tokens scored at the end of a run, at most
    eval_fraction: float = 1.0  # ... and at most this share of the corpus
    repo: str = ""  # Hugging Face dataset repository, where there is one
    train_shards: int = 0  # parquet shards used for training
    column: str = "text"  # of parquet, or field of a JSON line, that holds the text


DATASETS = {
    d.name: d
    for d in (
        # the running Python's own standard library; no network
        Dataset("stdlib", vocab_size=1024, sequence_length=256, eval_tokens=EVAL_UNIT // 2),
        # web text, 10 of 6543 shards
        Dataset("climbmix", vocab_size=8192, sequence_length=2048, eval_tokens=40 * EVAL_UNIT,
                repo="karpathy/climbmix-400b-shuffle", train_shards=10),
        # short children's stories
        Dataset("tinystories", vocab_size=2048, sequence_length=512, eval_tokens=3 * EVAL_UNIT,
                repo="karpathy/tinystories-gpt4-clean", train_shards=20),
        # a folder of your own: FILES=dir with .parquet, .jsonl or .txt
        Dataset("files", vocab_size=8192, sequence_length=2048, eval_tokens=40 * EVAL_UNIT, eval_fraction=1 / 20),
    )
}  # fmt: skip


def get_dataset(name):
    """The `Dataset` called `name`; an unknown name ends the program with the known ones."""
    if name not in DATASETS:
        sys.exit(f"error: unknown dataset '{name}'; known: {', '.join(DATASETS)}")
    return DATASETS[name]


def cache_dir(dataset):
    """Where the dataset's shards, tokenizer and tokens live (AUTORESEARCH_CACHE moves it)."""
    root = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
    return root if dataset.name == "climbmix" else root / dataset.name


def fetch(dataset):
    """Make the dataset's source complete on disk; does nothing where it is."""
    if dataset.name == "climbmix":
        url = f"{hub_endpoint()}/datasets/{dataset.repo}/resolve/main"
        download_all([(f"{url}/{path.name}", path) for path in chain(*shard_paths(dataset).values())])
    elif dataset.name == "tinystories":
        fetch_tinystories(dataset)
    elif dataset.name == "files":
        tell_files(dataset)
    elif not stdlib_files():
        sys.exit(f"error: this Python ({sys.executable}) ships no standard library sources; use another one")


def documents(dataset, split):
    """The texts of one split (`train`, `val` or `test`), in a fixed order: an iterator of str."""
    return (text for _, text in located(dataset, split))


def located(dataset, split):
    """`documents`, each with its place: an iterator of ((file, number of its row or passage), text)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
    sys.audit("data_sources.documents", dataset.name, split)  # see checks.HeldOutWatch
    if dataset.name == "stdlib":
        groups = ((key, [((key, i), text) for i, text in enumerate(part, 1)]) for key, part in stdlib_documents())
        return split_by_content(groups, split, share=0.05)
    if dataset.name == "files":
        return files_documents(dataset, split)
    paths = shard_paths(dataset)[split]
    return (((path, row), text) for path in paths for row, text in parquet_rows(path, dataset.column) if text)


def fingerprint(dataset):
    """A value that changes when the source does, so that an outdated token cache is noticed."""
    if dataset.name != "files" or not os.environ.get("AUTORESEARCH_FILES"):
        return None  # training from a finished cache needs no source
    folder = files_folder()
    listing = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in text_files(folder)]
    return hashlib.sha256(json.dumps([column_of(dataset), *listing]).encode()).hexdigest()


# --- splits and passages -----------------------------------------------------------------------


def text_hash(text):
    """16 bytes that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def split_by_content(groups, split, share):
    """The texts of `split` from (key, [text, …]) groups, an iterator; a group is never divided.

    The key's hash decides, `share` of the groups going to `val` and as many to `test`, so a
    group's split does not depend on what else is in the corpus.
    """
    sys.audit("data_sources.documents", "", split)  # see checks.HeldOutWatch
    return by_hash(groups, split, share)


def by_hash(groups, split, share):
    """`split_by_content`, for those who look at held-out text only to find the training split."""
    for key, texts in groups:
        where = int.from_bytes(text_hash(key)[:8], "big") / 2**64
        if split == ("val" if where < share else "test" if where < 2 * share else "train"):
            yield from texts


def passages(text, limit, separators=("\n\n",)):
    """Cut `text` at blank lines into passages of about `limit` characters; nothing but blanks is dropped.

    A document longer than a training row loses its tail to the packing's cropping rule, so long
    files are cut beforehand, where a reader would cut them. A passage that is still longer than
    `limit` is cut at the next of `separators`, where there is one; the empty one is between any two letters.
    """
    separator, *finer = separators
    if not separator:
        return [text[first : first + limit] for first in range(0, len(text), limit)]
    pieces, piece, size = [], [], 0
    for block in text.split(separator):
        if piece and size + len(block) > limit:
            pieces.append(separator.join(piece) + separator)
            piece, size = [], 0
        piece.append(block)
        size += len(block) + len(separator)
    pieces.append(separator.join(piece))
    if finer:
        most = limit if finer[0] else limit + len(separator)  # words keep the blank behind them
        pieces = [p for long in pieces for p in (passages(long, limit, finer) if len(long) > most else [long])]
    return [p for p in pieces if p.strip()]


# --- stdlib ------------------------------------------------------------------------------------


def stdlib_files():
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts))


def stdlib_documents():
    """(path, passages) of every distinct source file, in an order that mixes the packages."""
    root, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    paths = stdlib_files()
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # the test suite holds files that are broken on purpose
        name = text_hash(text)
        if text.strip() and name not in seen:
            seen.add(name)
            yield path.relative_to(root).as_posix(), passages(text, limit=800)


# --- parquet -------------------------------------------------------------------------------------


class Damaged(SystemExit):
    """A file of text that cannot be read. Attributes: `path`, and `code`, the line that the program ends with."""

    def __init__(self, path, reason):
        super().__init__(f"error: {printable(path)} cannot be read: {printable(reason)}")
        self.path = Path(path)


def parquet_rows(path, column):
    """Yield (row, text or None), rows counted from 1, with one row group in memory at a time.

    Raises `Damaged` where the file cannot be read; a column that is missing or no text ends the program.
    """
    row = 0
    try:
        with path.open("rb") as source, pq.ParquetFile(source) as file:  # any name: Arrow's own takes UTF-8 alone
            check_column(path, file.schema_arrow, column)
            for group in range(file.num_row_groups):
                texts = file.read_row_group(group, columns=[column]).column(0)
                for row, text in enumerate(texts.cast(pa.large_string()).to_pylist(), row + 1):  # noqa: B020
                    yield row, text
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise Damaged(path, f"{error} (after row {row})") from None


def check_column(path, schema, column):
    """End the program where a file with the Arrow `schema` holds no texts in one column of this name."""
    found = [field.type for field in schema if field.name == column]
    if not found:
        sys.exit(
            f"error: {printable(path)} has no column '{printable(column)}', but {told_names(schema.names)}; {CHOOSE}"
        )
    if len(found) > 1:
        sys.exit(
            f"error: {printable(path)} has {len(found)} columns '{printable(column)}'; one of them needs another name"
        )
    kind = getattr(found[0], "value_type", found[0]) if pa.types.is_dictionary(found[0]) else found[0]
    if not any(test(kind) for test in TEXT_TYPES):
        names = told_names([name for name in schema.names if name != column])
        told = f"column '{printable(column)}' holds {printable(kind)}, no text, beside {names}"
        sys.exit(f"error: {printable(path)}: {told}; {CHOOSE}")


CHOOSE = "COLUMN=name chooses (make prepare DATASET=files)"
TEXT_TYPES = [getattr(pa.types, f"is_{name}") for name in ("string", "large_string", "string_view", "null")]
TEXT_TYPES += [getattr(pa.types, f"is_{name}") for name in ("binary", "large_binary", "binary_view")]


def told_names(names, most=8, width=40):
    """Some names, `most` of `width` characters, for a line on a terminal."""
    names = [printable(name)[:width] for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


# --- files: a person's own folder ------------------------------------------------------------------

KINDS = (".parquet", ".jsonl", ".txt")
PASSAGE = 8000  # characters: about a row of 2048 tokens
SEPARATORS = ("\n\n", "\n", " ", "")
WIDE = {  # what a file in UTF-16 or UTF-32 begins with; the longer ones first, whose beginning is a shorter one
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
BAD = "\ufffd"  # what stands in a text for bytes that are none
NO_TEXT = re.compile(f"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f{BAD}]")  # characters that text has few of
MOST_BAD = 0.1  # share of them at the beginning of a file that is read
ENOUGH = (32, 4)  # documents, and rows, that val and test get at least where documents stay whole


def files_folder():
    name = os.environ.get("AUTORESEARCH_FILES")
    if not name:
        sys.exit("error: dataset 'files' needs a folder of text: make prepare DATASET=files FILES=dir")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        sys.exit(f"error: FILES={printable(name)} is not a folder")
    if not text_files(folder):
        sys.exit(f"error: FILES={printable(name)} holds no .parquet, .jsonl or .txt file")
    return folder


def column_of(dataset):
    """The column or field that holds the text of `files`."""
    return os.environ.get("AUTORESEARCH_COLUMN") or dataset.column


def text_files(folder):
    return walk(folder)[0]


def walk(folder):
    """(paths of the files of our kinds, sorted; how many others there are; names of the folders left out).

    Hidden ones are left out: a repository's or an environment's own files, and the `._name` that macOS leaves
    beside each file on foreign disks. A link to a folder is not followed; it may lead round in a circle.
    """

    def refuse(error):
        raise Damaged(error.filename, error.strerror)

    found, others, left_out = [], 0, []
    for place, folders, names in os.walk(folder, onerror=refuse):
        left_out += [f"{name} (hidden)" for name in folders if name[0] == "."]
        folders[:] = [name for name in folders if name[0] != "."]
        left_out += [f"{name} (a link)" for name in folders if os.path.islink(os.path.join(place, name))]
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() in KINDS and name[0] != "." and path.is_file():
                found.append(path)
            else:
                others += name[0] != "."
    return sorted(found), others, left_out


def encoding_of(path):
    """(name of the encoding, share of what is no text in the first 64 kB) of a file of text."""
    with path.open("rb") as file:
        head = file.read(2**16)
    codec = next((codec for mark, codec in WIDE.items() if head.startswith(mark)), "utf-8-sig")
    text = codecs.getincrementaldecoder(codec)("replace").decode(head)
    return codec, len(NO_TEXT.findall(text)) / max(len(text), 1)


def file_rows(path, column):
    """Yield (row or passage, text or None) of one file; nothing where it holds no text."""
    try:
        if path.suffix.lower() == ".parquet":
            yield from parquet_rows(path, column)
            return
        codec, bad = encoding_of(path)
        if bad > MOST_BAD:
            return
        if path.suffix.lower() == ".jsonl":
            yield from jsonl_rows(path, column, codec)
        else:
            yield from enumerate(txt_texts(path, codec=codec), 1)
    except OSError as error:
        raise Damaged(path, error.strerror or error) from None


def files_texts(folder, column):
    """Yield ((path, row), text) of every text below `folder`: parquet and jsonl rows as they are, .txt in passages."""
    for path in text_files(folder):
        for row, text in file_rows(path, column):
            if text and text.strip():
                yield (path, row), text


def jsonl_rows(path, column, codec):
    with path.open(encoding=codec, errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or column not in record:
                names = f", but with {told_names(record)}; {CHOOSE}" if isinstance(record, dict) else ""
                sys.exit(
                    f"error: {printable(path)}, line {number}: not a JSON object with a '{printable(column)}'{names}"
                )
            text = record[column]
            # JSON can hold half a surrogate pair
            yield number, text.encode("utf-8", "replace").decode() if isinstance(text, str) else None


def txt_texts(path, at_once=2**24, codec="utf-8-sig"):
    """Passages of a text file, read `at_once` characters at a time."""
    with path.open(encoding=codec, errors="replace") as file:
        rest = ""
        while block := file.read(at_once):
            pieces = passages(rest + block, PASSAGE, SEPARATORS)
            yield from pieces[:-1]
            rest = pieces[-1] if pieces else ""
        if rest:
            yield rest


def tell_files(dataset):
    """Read all of `files` once, and say what is read and what is not: before the work, not in the midst of it."""
    folder, column = files_folder(), column_of(dataset)
    paths, others, left_out = walk(folder)
    kinds, texts, size, empty, bad, shares, wide, skipped = Counter(), 0, 0, 0, 0, {}, [], []
    for path in paths:
        name, kind, size_before, bad_before = printable(path.relative_to(folder)), path.suffix.lower(), size, bad
        for _, text in file_rows(path, column):
            if text and text.strip():
                texts, size, bad = texts + 1, size + len(text), bad + text.count(BAD)
            else:
                empty += 1
        if kind != ".parquet":
            codec, share = encoding_of(path)
            if share > MOST_BAD:
                skipped.append(f"{name} ({share:.0%} bad characters at its beginning)")
                continue
            if codec in WIDE.values():
                wide.append(f"{name} ({codec.upper()})")
        kinds[kind] += 1
        shares[name] = (bad - bad_before) / max(size - size_before, 1)
    read = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items()) or "nothing"
    without = f"; {empty:,} rows without text" if empty else ""
    print(f"files: read {read}: {texts:,} texts, {size:,} characters{without}")
    if bad:
        worst = max(shares, key=shares.get)
        what = f"{bad:,} characters ({bad / size:.2%}) are bad (U+FFFD, most often of text that is not in UTF-8)"
        print(f"files: {what}; of {worst} {shares[worst]:.2%}")
    lists = {
        "decoded": wide,
        "skipped as no text, or not in UTF-8 (iconv converts):": skipped,
        "folders not read:": left_out,
    }
    for what, names in lists.items():
        if names:
            print(f"files: {what} {told_names(names, width=100)}")
    if others:
        print(f"files: not read for their kind: {others:,} files")
    if not texts:
        sys.exit(f"error: FILES={printable(folder)} has too little text: none in column or field '{printable(column)}'")


def files_documents(dataset, split):
    """((path, row), text) of one split, each text once. The text's own hash decides, so copies stay together.

    Documents stay whole where there are enough of them. A few long ones would leave next to nothing for `val`, or
    all that there is: they are cut into passages, and those with the smallest hashes are held out.
    """
    folder, column = files_folder(), column_of(dataset)
    total = sum(p.stat().st_size for p in text_files(folder))
    # Half as much again as evaluation can use, at about four bytes a token; a large corpus gives less.
    share = min(dataset.eval_fraction, 1.5 * 4 * dataset.eval_tokens / max(total, 1))

    def whole(split):
        groups = ((text, [(place, text)]) for place, text in files_texts(folder, column))
        return once(by_hash(groups, split, share))

    def cut():
        for place, text in files_texts(folder, column):
            yield from ((place, piece) for piece in passages(text, PASSAGE, SEPARATORS))

    if all(is_enough(whole(held_out), dataset) for held_out in ("val", "test")):
        yield from whole(split)
        return
    sizes = {text_hash(text): len(text) for _, text in cut()}
    order, places = sorted(sizes, reverse=True), {}
    for held_out in ("val", "test"):
        room = share * sum(sizes.values())
        while order and room > 0:
            places[order[-1]] = held_out
            room -= sizes[order.pop()]
    yield from ((place, text) for place, text in once(cut()) if places.get(text_hash(text), "train") == split)


def is_enough(located_texts, dataset):
    """Whether the texts of a split are as many, and as long in all, as ENOUGH asks for; reads no further than that."""
    documents, characters = 0, 0
    for _, text in located_texts:
        documents, characters = documents + 1, characters + len(text)
        if documents >= ENOUGH[0] and characters >= ENOUGH[1] * 4 * dataset.sequence_length:
            return True
    return False


def once(located_texts):
    """The (place, text) pairs without the repetitions of a text."""
    seen = set()
    for place, text in located_texts:
        name = text_hash(text)
        if name not in seen:
            seen.add(name)
            yield place, text


# --- climbmix and tinystories, from the hub ------------------------------------------------------


def shard_dir(dataset):
    return cache_dir(dataset) / "shards"


def shard_paths(dataset):
    """{split: [path of each of its shards, …]}."""
    n = dataset.train_shards
    val, test = (6542, 6541) if dataset.name == "climbmix" else (n, n + 1)  # climbmix: the hub's last two
    numbers = {"train": range(n), "val": [val], "test": [test]}
    return {split: [shard_dir(dataset) / f"shard_{i:05d}.parquet" for i in some] for split, some in numbers.items()}


def shards(dataset):
    """The files that were fetched for a dataset of the hub, as far as they are here."""
    return sorted(shard_dir(dataset).glob("shard_*.parquet")) if dataset.repo else []


def fetch_tinystories(dataset):
    """Download what the hub lists, shuffle with a fixed seed, write 20 + 1 + 1 shards."""
    shards = shard_dir(dataset)
    targets = [*chain(*shard_paths(dataset).values())]
    if not all(is_parquet(path) for path in targets):
        urls = hub_listing(dataset.repo)
        sources = [shards / f"source_{i:05d}.parquet" for i in range(len(urls))]
        download_all(list(zip(urls, sources, strict=True)))
        # Each story once: the hub's copies would otherwise stand in two splits.
        texts = list(dict.fromkeys(t for path in sources for _, t in parquet_rows(path, dataset.column) if t))
        random.Random(0).shuffle(texts)
        n = len(targets)
        for i, path in enumerate(targets):
            part = texts[i * len(texts) // n : (i + 1) * len(texts) // n]
            temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
            pq.write_table(pa.table({dataset.column: pa.array(part, pa.string())}), temporary, row_group_size=4096)
            move_into_place(temporary, path)
    for path in shards.glob("source_*.parquet"):
        path.unlink()
