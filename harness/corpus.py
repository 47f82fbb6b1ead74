"""The text of a dataset: how it is fetched, read and split. The datasets by name stand in data_sources.py.

A source is a frozen value with two methods: `fetch(dataset)` makes its files complete on disk, and
`texts(dataset, split)` yields the documents of a split, always in the same order. No document is in two splits.
"""

import hashlib
import json
import os
import random
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness.downloads import download_all, hub_endpoint, hub_listing, is_parquet
from harness.files import move_into_place, printable

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    """One corpus, and the sizes that every experiment on it shares."""

    name: str
    source: "StandardLibrary | HubShards | Folder"
    vocab_size: int  # tokens, the special ones included
    sequence_length: int  # tokens of context in training and in evaluation
    eval_tokens: int  # validation tokens scored at the end of a run, at most
    eval_fraction: float = 1.0  # ... and at most this share of the corpus


def cache_dir(dataset):
    """Where the dataset's shards, tokenizer and tokens are kept (AUTORESEARCH_CACHE moves it)."""
    root = os.path.expanduser(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch")
    if root.startswith("~"):  # it stays where nobody knows the user
        sys.exit(f"error: there is no home folder for {printable(root)}; set HOME, or AUTORESEARCH_CACHE to a folder")
    return Path(root) if dataset.name == "climbmix" else Path(root) / dataset.name


def not_prepared(dataset):
    return f"error: dataset '{dataset.name}' is not prepared; run: {prepare_command(dataset)}"


def damaged(dataset, path):
    return f"error: {path} is damaged; run: {prepare_command(dataset)}"


def prepare_command(dataset):
    return f"make prepare DATASET={dataset.name}" + (" FILES=dir" if dataset.name == "files" else "")


def shards(dataset):
    """The files that were fetched from the hub for a dataset, as far as they are here."""
    return sorted((cache_dir(dataset) / "shards").glob("shard_*.parquet"))


def fingerprint(dataset):
    """A value that changes when a person's own folder does; None where the text is always the same, or not known."""
    return dataset.source.fingerprint() if isinstance(dataset.source, Folder) else None


def documents(dataset, split):
    """The texts of one split (`train`, `val` or `test`), in a fixed order: an iterator of str."""
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
    return dataset.source.texts(dataset, split)


# --- splits and passages -----------------------------------------------------------------------


def split_of(text, share):
    """The split of a text by its own hash, `share` of all to val and as much to test: others do not change it."""
    place = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return "val" if place < share else "test" if place < 2 * share else "train"


def passages(text, limit, separators=("\n\n",)):
    """Cut `text` at blank lines into passages of about `limit` characters; only blanks are dropped.

    Packing crops a document that is longer than a row, so long files are cut beforehand, where a reader would cut
    them. A passage that is still too long is cut at the next of `separators`; the empty one is between any two letters.
    """
    separator, *finer = separators
    if not separator:
        return [text[first : first + limit] for first in range(0, len(text), limit)]
    found = [""]
    for block in text.split(separator):
        if found[-1] and len(found[-1]) + len(block) > limit:
            found.append("")
        found[-1] += block + separator
    found[-1] = found[-1].removesuffix(separator)
    if finer:
        found = [piece for long in found for piece in (passages(long, limit, finer) if len(long) > limit else [long])]
    return [piece for piece in found if piece.strip()]


# --- parquet -------------------------------------------------------------------------------------


class Damaged(SystemExit):
    """A file that cannot be read. Attributes: `path`, and `code`, the line that the program ends with."""

    def __init__(self, path, reason):
        super().__init__(f"error: {printable(path)} cannot be read: {printable(reason)}")
        self.path = Path(path)


def parquet_texts(path, column):
    """Yield the texts of a parquet file, empty ones as None, a few at a time in memory.

    Raises `Damaged` where the file cannot be read; a column that is missing or holds no text ends the program.
    """
    try:
        with path.open("rb") as source, pq.ParquetFile(source, pre_buffer=False, buffer_size=2**20) as file:
            schema = file.schema_arrow  # by our own `open`: Arrow's takes names in UTF-8 alone
            if column not in [field.name for field in schema if field.type in TEXT_TYPES]:
                no_text(path, column, [f"{field.name} ({field.type})" for field in schema])
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise Damaged(path, error) from None


TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view())


def no_text(place, column, found):
    """End the program: `place` has the columns or fields `found`, and none of them holds text by the name `column`."""
    names = printable(", ".join(found))[:300] or "no JSON object"
    sys.exit(f"error: {printable(place)}: no text in '{printable(column)}', but {names}; COLUMN=name chooses")


# --- the sources -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StandardLibrary:
    """The running Python's own standard library, split by file. No network."""

    share: float = 0.05  # of the files for each of val and test
    passage: int = 800  # characters

    def fetch(self, dataset):
        """Nothing to do: it is here."""

    def texts(self, dataset, split):
        for name, parts in self.documents():
            if split_of(name, self.share) == split:
                yield from parts

    @staticmethod
    def files():
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        return sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts))

    def documents(self):
        """(name, passages) of every distinct source file, in an order that mixes the packages."""
        root, paths, seen = Path(sysconfig.get_paths()["stdlib"]), self.files(), set()
        random.Random(0).shuffle(paths)
        for path in paths:
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # the test suite holds files that are broken on purpose
            if text.strip() and text not in seen:
                seen.add(text)
                yield path.relative_to(root).as_posix(), passages(text, self.passage)


@dataclass(frozen=True)
class HubShards:
    """Parquet shards of a dataset on the hub, taken as they are."""

    repo: str
    train: int  # the first so many shards
    val: int  # the number of the shard
    test: int
    column: str = "text"

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
            yield from filter(None, parquet_texts(path, self.column))


@dataclass(frozen=True)
class ShuffledShards(HubShards):
    """What the hub lists of a dataset, each text once, shuffled with a fixed seed into shards of our own."""

    def fetch(self, dataset):
        targets = [*chain(*self.paths(dataset).values())]
        folder = targets[0].parent
        if not all(is_parquet(path) for path in targets):
            urls = hub_listing(self.repo)
            sources = [folder / f"source_{i:05d}.parquet" for i in range(len(urls))]
            download_all(list(zip(urls, sources, strict=True)))
            # Each text once: copies would otherwise be in two splits.
            texts = list(dict.fromkeys(filter(None, chain(*(parquet_texts(path, self.column) for path in sources)))))
            random.Random(0).shuffle(texts)
            for i, path in enumerate(targets):
                part = texts[i * len(texts) // len(targets) : (i + 1) * len(texts) // len(targets)]
                temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
                pq.write_table(pa.table({self.column: pa.array(part, pa.string())}), temporary, row_group_size=4096)
                move_into_place(temporary, path)
        for path in folder.glob("source_*.parquet"):
            path.unlink()


@dataclass(frozen=True)
class Folder:
    """A person's own folder (FILES=dir). A row of .parquet or .jsonl is a document; .txt is cut into passages.

    All text is UTF-8. A document's own hash decides its split.
    """

    passage: int = 8000  # characters, about a row of 2048 tokens

    KINDS = (".parquet", ".jsonl", ".txt")
    SEPARATORS = ("\n\n", "\n", " ", "")

    def column(self):
        """The column or field that holds the text."""
        return os.environ.get("AUTORESEARCH_COLUMN") or "text"

    def files(self):
        """The files that are read, sorted. Hidden files and folders are not, nor links to folders."""

        def refuse(error):
            raise Damaged(error.filename, error.strerror)

        name, found = os.environ.get("AUTORESEARCH_FILES"), []
        if not name:
            sys.exit("error: dataset 'files' needs a folder of text: make prepare DATASET=files FILES=dir")
        for place, folders, names in os.walk(os.path.abspath(os.path.expanduser(name)), onerror=refuse):
            folders[:] = [folder for folder in folders if folder[0] != "."]
            found += [Path(place, name) for name in names if name[0] != "."]
        found = sorted(path for path in found if path.suffix.lower() in self.KINDS and path.is_file())
        return found or sys.exit(f"error: FILES={printable(name)} holds no .parquet, .jsonl or .txt file")

    def fingerprint(self):
        """See above. Without FILES it is None: a finished cache needs no source."""
        if not os.environ.get("AUTORESEARCH_FILES"):
            return None
        listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files()]
        return hashlib.sha256(json.dumps([self.column(), *listing]).encode()).hexdigest()

    def fetch(self, dataset):
        kinds = Counter(path.suffix.lower() for path in self.files())
        print(f"files: reading {', '.join(f'{n:,} {kind}' for kind, n in sorted(kinds.items()))}")

    def texts(self, dataset, split):
        paths = self.files()
        # Held out is half as much again as evaluation can use, at about four bytes a token; less of a small corpus.
        size = sum(path.stat().st_size for path in paths)
        share = min(dataset.eval_fraction, 1.5 * 4 * dataset.eval_tokens / max(size, 1))
        for path in paths:
            yield from (text for text in self.texts_of(path) if split_of(text, share) == split)

    def texts_of(self, path):
        """Yield the texts of one file, without the empty ones."""
        try:
            if path.suffix.lower() == ".parquet":
                found = parquet_texts(path, self.column())
            else:
                found = self.lines(path) if path.suffix.lower() == ".jsonl" else self.passages(path)
            yield from (text for text in found if text and text.strip())
        except UnicodeDecodeError as error:
            raise Damaged(path, f"{error}; convert it to UTF-8 (iconv), or take it out") from None
        except OSError as error:
            raise Damaged(path, error.strerror or error) from None

    def lines(self, path):
        """Yield the text of each line of JSON; None where it is no string."""
        column = self.column()
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                fields = record if isinstance(record, dict) else {}
                if column not in fields:
                    no_text(f"{path}, line {number}", column, fields)
                text = fields[column]
                # JSON can hold half of a surrogate pair
                yield text.encode("utf-8", "replace").decode() if isinstance(text, str) else None

    def passages(self, path, at_once=2**24):
        """Yield the passages of a text file, read `at_once` characters at a time."""
        with path.open(encoding="utf-8-sig") as file:
            rest = ""
            while block := file.read(at_once):
                *found, rest = passages(rest + block, self.passage, self.SEPARATORS) or [""]
                yield from found
            yield rest
