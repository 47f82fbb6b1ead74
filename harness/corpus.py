"""The text of a dataset, fetched, read and split: no document is in two splits. data_sources.py names the datasets."""

import hashlib
import json
import os
import random
import sys
import sysconfig
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness.downloads import download_all, hub_endpoint, hub_listing, is_parquet
from harness.files import printable
from harness.processes import UNFIT

SPLITS = ("train", "val", "test")
TEXT_READ = "autoresearch.text"  # an event for sys.audit: see run_checks.py
PASSAGE = 8000  # characters of a .txt file that make a document, about a row of 2048 tokens


@dataclass(frozen=True)
class Dataset:
    """One corpus, and the sizes that every experiment on it shares."""

    name: str
    source: "Source"
    vocab_size: int  # tokens, the special ones included
    sequence_length: int  # tokens of context in training and in evaluation
    eval_tokens: int  # validation tokens scored at the end of a run, at most
    eval_fraction: float = 1.0  # ... and at most this share of the corpus


def cache_dir(dataset):
    """Where the dataset's files, tokenizer and tokens are kept (AUTORESEARCH_CACHE moves it)."""
    root = Path(os.path.expanduser(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"))
    if str(root)[0] == "~":  # it stays where nobody knows the user
        sys.exit("error: there is no home folder; set HOME, or AUTORESEARCH_CACHE to a folder")
    return root if dataset.name == "climbmix" else root / dataset.name


def refuse_cache(name, damaged=None):
    """End who needs a dataset's cache that is not there, or has a damaged file: no experiment is at fault."""
    fault = f"{damaged} is damaged" if damaged else f"dataset '{name}' is not prepared"
    print(f"error: {fault}; run: make prepare DATASET={name}{' FILES=dir' * (name == 'files')}", file=sys.stderr)
    sys.exit(UNFIT)


def split_of(key, share):
    """The split of what `key` stands for, its text or its name, by the hash of that: others do not change it.

    share: of all to val, and as much to test.
    """
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "val" if place < share else "test" if place < 2 * share else "train"


def passages(text, limit):
    """Cut `text` at blank lines, as a reader would, into passages of about `limit` characters; only blanks go."""
    found = [""]
    for block in text.split("\n\n"):
        if found[-1] and len(found[-1]) + len(block) > limit:
            found.append("")
        found[-1] += block + "\n\n"
    found[-1] = found[-1].removesuffix("\n\n")
    return [piece for piece in found if piece.strip()]


def parquet_texts(path, column):
    """Yield the rows of a column that holds text."""
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        columns = [field.name for field in file.schema_arrow if str(field.type) in ("string", "large_string")]
        if column not in columns:
            raise ValueError(f"no text in column '{column}', but in {columns}")
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            yield from batch.column(0).to_pylist()


def json_texts(path, field):
    """Yield the text in a field of each line of JSON; lines in which it is no string are left out."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)[field] if line.strip() else None
            except (ValueError, LookupError, TypeError, RecursionError):
                raise ValueError(f"line {number} is no JSON object with '{field}': {line[:100]}") from None
            if isinstance(text, str):
                yield text.encode("utf-8", "replace").decode()  # JSON can hold half of a surrogate pair


def text_passages(path, _):
    """Yield a text file in passages, each up to the end of a line where that is not far."""
    with path.open(encoding="utf-8-sig") as file:
        while passage := file.read(PASSAGE) + file.readline(PASSAGE // 8):
            yield passage


READERS = {".parquet": parquet_texts, ".jsonl": json_texts, ".txt": text_passages}


def texts_of(path, column):
    """Yield the texts of a file, a few at a time in memory. column: that of parquet, or the field of JSON lines."""
    sys.audit(TEXT_READ, str(path))
    try:
        yield from filter(None, READERS[path.suffix.lower()](path, column))
    except (OSError, ValueError, pa.ArrowException) as error:
        sys.exit(f"error: {printable(path)} cannot be read: {printable(error)}; mend it, take it out, or choose COLUMN")


class Source:
    """Where text comes from: also `texts(dataset, split)`, which yields the documents of a split in a fixed order."""

    def fetch(self, dataset):
        """Make the files of the dataset complete on disk."""

    def fingerprint(self):
        """A value that changes when a person's own text does; None where it is always the same, or not known."""


@dataclass(frozen=True)
class StandardLibrary(Source):
    """The running Python's own standard library, split by file. No network."""

    share: float = 0.05  # of the files for each of val and test
    passage: int = 800  # characters

    def texts(self, dataset, split):
        sys.audit(TEXT_READ, f"the {split} split")
        for name, parts in self.documents():
            if split_of(name, self.share) == split:
                yield from parts

    def documents(self):
        """(name, passages) of every distinct source file, in an order that mixes the packages."""
        root, skipped = Path(sysconfig.get_paths()["stdlib"]), {"site-packages", "dist-packages", "__pycache__"}
        paths = sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts))
        random.Random(0).shuffle(paths)
        seen = set()
        for path in paths:
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # the test suite holds files that are broken on purpose
            if text.strip() and text not in seen:
                seen.add(text)
                yield path.relative_to(root).as_posix(), passages(text, self.passage)


@dataclass(frozen=True)
class HubShards(Source):
    """Parquet shards of a dataset on the hub, taken as they are."""

    repo: str
    train: int  # the first so many shards
    val: int  # the number of the shard
    test: int

    def paths(self, dataset):
        """{split: [path of each of its shards, …]}."""
        numbers = {"train": range(self.train), "val": [self.val], "test": [self.test]}
        folder = cache_dir(dataset) / "shards"
        return {split: [folder / f"shard_{i:05d}.parquet" for i in some] for split, some in numbers.items()}

    def fetch(self, dataset):
        url = f"{hub_endpoint()}/datasets/{self.repo}/resolve/main"
        download_all([(f"{url}/{path.name}", path) for path in chain(*self.paths(dataset).values())])

    def texts(self, dataset, split):
        for path in self.paths(dataset)[split]:
            yield from texts_of(path, "text")


@dataclass(frozen=True)
class ShuffledShards(HubShards):
    """What the hub lists of a dataset, each text once, shuffled with a fixed seed into shards of our own."""

    def fetch(self, dataset):
        targets = [*chain(*self.paths(dataset).values())]
        if all(is_parquet(path) for path in targets):
            return
        urls, folder = hub_listing(self.repo), targets[0].parent
        sources = [folder / f"source_{i:05d}.parquet" for i in range(len(urls))]
        download_all(list(zip(urls, sources, strict=True)))
        # Each text once: copies would otherwise be in two splits.
        texts = list(dict.fromkeys(chain(*(texts_of(path, "text") for path in sources))))
        random.Random(0).shuffle(texts)
        for i, path in enumerate(targets):
            part = texts[i * len(texts) // len(targets) : (i + 1) * len(texts) // len(targets)]
            pq.write_table(pa.table({"text": pa.array(part, pa.string())}), path, row_group_size=4096)
        for path in sources:
            path.unlink()


@dataclass(frozen=True)
class Folder(Source):
    """A person's own folder (FILES=dir) of UTF-8 text. A document's own hash decides its split."""

    def fingerprint(self):
        if not os.environ.get("AUTORESEARCH_FILES"):
            return None  # a finished cache needs no source
        listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files()]
        return hashlib.sha256(json.dumps([os.environ.get("AUTORESEARCH_COLUMN"), *listing]).encode()).hexdigest()

    def files(self):
        """The files that are read, sorted. Hidden files and folders are not, nor links to folders."""
        name = os.environ.get("AUTORESEARCH_FILES")
        if not name:
            sys.exit("error: dataset 'files' needs a folder of text: make prepare DATASET=files FILES=dir")
        root = Path(os.path.expanduser(name)).absolute()
        found = (path for path in root.rglob("*") if path.suffix.lower() in READERS and path.is_file())
        found = sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(root).parts))
        return found or sys.exit(f"error: FILES={printable(name)} holds no .parquet, .jsonl or .txt file")

    def texts(self, dataset, split):
        paths, column = self.files(), os.environ.get("AUTORESEARCH_COLUMN") or "text"
        # Held out is half as much again as evaluation can use, at about four bytes a token; less of a small corpus.
        size = sum(path.stat().st_size for path in paths)
        share = min(dataset.eval_fraction, 1.5 * 4 * dataset.eval_tokens / max(size, 1))
        for path in paths:
            for text in texts_of(path, column):
                if text.strip() and split_of(text, share) == split:
                    yield text
