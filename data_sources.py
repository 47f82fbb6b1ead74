"""Where text comes from: the datasets by name, their sizes, and how each is fetched.

A `Dataset` is a frozen value that is passed along. `fetch(dataset)` makes its source complete on
disk; `documents(dataset, split)` then yields its texts, always in the same order. No document is
in two splits. Everything downstream (tokenizer, token cache, batches) is in prepare.py.
"""

import hashlib
import json
import os
import random
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from downloads import download_all, hub_endpoint, hub_listing, is_parquet

SPLITS = ("train", "val", "test")
EVAL_UNIT = 524_288  # tokens; evaluation sizes are given as multiples of it


@dataclass(frozen=True)
class Dataset:
    """One corpus and the sizes that every experiment on it shares."""

    name: str
    summary: str
    vocab_size: int  # tokens, the special ones included
    sequence_length: int  # tokens of context in training and in evaluation
    eval_tokens: int  # validation tokens scored at the end of a run, at most
    eval_fraction: float = 1.0  # ... and at most this share of the corpus
    repo: str = ""  # Hugging Face dataset repository, where there is one
    train_shards: int = 0  # parquet shards used for training


DATASETS = {
    d.name: d
    for d in (
        Dataset("stdlib", "the running Python's own standard library; no network",
                vocab_size=1024, sequence_length=256, eval_tokens=EVAL_UNIT // 2),
        Dataset("climbmix", "web text, 10 of 6543 shards",
                vocab_size=8192, sequence_length=2048, eval_tokens=40 * EVAL_UNIT,
                repo="karpathy/climbmix-400b-shuffle", train_shards=10),
        Dataset("tinystories", "short children's stories",
                vocab_size=2048, sequence_length=512, eval_tokens=3 * EVAL_UNIT,
                repo="karpathy/tinystories-gpt4-clean", train_shards=20),
        Dataset("files", "a folder of your own: FILES=dir with .parquet, .jsonl or .txt",
                vocab_size=8192, sequence_length=2048, eval_tokens=40 * EVAL_UNIT, eval_fraction=1 / 20),
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
        names = [climbmix_shard(i) for i in range(dataset.train_shards)]
        names += [climbmix_shard(CLIMBMIX_VAL), climbmix_shard(CLIMBMIX_TEST)]
        url = f"{hub_endpoint()}/datasets/{dataset.repo}/resolve/main"
        download_all([(f"{url}/{name}", shard_dir(dataset) / name) for name in names])
    elif dataset.name == "tinystories":
        fetch_tinystories(dataset)
    elif dataset.name == "files":
        files_folder()  # nothing to fetch; says at once where the folder is missing
    elif not stdlib_files():
        sys.exit(f"error: this Python ({sys.executable}) ships no standard library sources; use another one")


def documents(dataset, split):
    """Yield the texts of one split (`train`, `val` or `test`), in a fixed order."""
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
    sys.audit("data_sources.documents", dataset.name, split)  # see checks.HeldOutWatch
    if dataset.name == "stdlib":
        return split_by_content(stdlib_documents(), split, share=0.05)
    if dataset.name == "files":
        return files_documents(dataset, split)
    if dataset.name == "climbmix":
        numbers = {"train": range(dataset.train_shards), "val": [CLIMBMIX_VAL], "test": [CLIMBMIX_TEST]}
        return parquet_texts(shard_dir(dataset) / climbmix_shard(i) for i in numbers[split])
    n = dataset.train_shards
    numbers = {"train": range(n), "val": [n], "test": [n + 1]}
    return parquet_texts(shard_dir(dataset) / f"shard_{i:05d}.parquet" for i in numbers[split])


def fingerprint(dataset):
    """A value that changes when the source does, so that an outdated token cache is noticed."""
    if dataset.name != "files":
        return None
    if not os.environ.get("AUTORESEARCH_FILES"):
        return None  # training from a finished cache needs no source
    folder = files_folder()
    listing = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in text_files(folder)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


# --- splits and passages -----------------------------------------------------------------------


def split_by_content(groups, split, share):
    """Yield the texts of `split` from (key, [text, …]) groups; a group is never divided.

    The key's hash decides, `share` of the groups going to `val` and as many to `test`, so a
    group's split does not depend on what else is in the corpus.
    """
    for key, texts in groups:
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        where = int.from_bytes(digest[:8], "big") / 2**64
        if split == ("val" if where < share else "test" if where < 2 * share else "train"):
            yield from texts


def passages(text, limit, separators=("\n\n",)):
    """Cut `text` at blank lines into passages of about `limit` characters; nothing but blanks is dropped.

    A document longer than a training row loses its tail to the packing's cropping rule, so long
    files are cut beforehand, where a reader would cut them. A passage that is still longer than
    `limit` is cut at the next of `separators`, where there is one.
    """
    separator, *finer = separators
    pieces, piece, size = [], [], 0
    for block in text.split(separator):
        if piece and size + len(block) > limit:
            pieces.append(separator.join(piece) + separator)
            piece, size = [], 0
        piece.append(block)
        size += len(block) + len(separator)
    pieces.append(separator.join(piece))
    if finer:
        pieces = [p for long in pieces for p in (passages(long, limit, finer) if len(long) > limit else [long])]
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
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield path.relative_to(root).as_posix(), passages(text, limit=800)


# --- files -------------------------------------------------------------------------------------


def files_folder():
    name = os.environ.get("AUTORESEARCH_FILES")
    if not name:
        sys.exit("error: dataset 'files' needs a folder of text: make prepare DATASET=files FILES=dir")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        sys.exit(f"error: FILES={name} is not a folder")
    if not text_files(folder):
        sys.exit(f"error: FILES={name} holds no .parquet, .jsonl or .txt file")
    return folder


def text_files(folder):
    """The files that hold text, hidden ones aside: macOS leaves a `._name` beside each on foreign disks."""
    kinds = (".parquet", ".jsonl", ".txt")
    return sorted(p for p in folder.rglob("*") if p.suffix in kinds and p.name[0] != "." and p.is_file())


def files_texts(folder):
    """Yield every text below `folder`: parquet and jsonl rows as they are, .txt in passages."""
    for path in text_files(folder):
        try:
            if path.suffix == ".parquet":
                yield from parquet_texts([path])
            elif path.suffix == ".jsonl":
                yield from jsonl_texts(path)
            else:
                yield from txt_texts(path)
        except OSError as error:
            sys.exit(f"error: {path} cannot be read: {error.strerror or error}")


def jsonl_texts(path):
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                sys.exit(f"error: {path}, line {number}: not a JSON object with a 'text'")
            if isinstance(text, str):
                yield text.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair


def txt_texts(path, at_once=2**24):
    """Passages of a text file, read `at_once` characters at a time."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        rest = ""
        while block := file.read(at_once):
            pieces = passages(rest + block, 8000, ("\n\n", "\n", " "))
            yield from pieces[:-1]
            rest = pieces[-1] if pieces else ""
        if rest:
            yield rest


def files_documents(dataset, split):
    """The texts of one split, each once. The text's own hash decides, so copies stay together."""
    folder = files_folder()
    total = sum(p.stat().st_size for p in text_files(folder))
    # Half as much again as evaluation can use, at about four bytes a token; a large corpus gives less.
    share = min(dataset.eval_fraction, 1.5 * 4 * dataset.eval_tokens / max(total, 1))
    seen = set()
    for text in split_by_content(((text, [text]) for text in files_texts(folder)), split, share):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield text


# --- climbmix and tinystories, from the hub ------------------------------------------------------

CLIMBMIX_VAL, CLIMBMIX_TEST = 6542, 6541


def climbmix_shard(i):
    return f"shard_{i:05d}.parquet"


def shard_dir(dataset):
    return cache_dir(dataset) / "shards"


def parquet_texts(paths):
    """Yield column `text` of parquet files, one row group in memory at a time."""
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                if "text" not in file.schema_arrow.names:
                    sys.exit(f"error: {path} has no column 'text'")
                for group in range(file.num_row_groups):
                    column = file.read_row_group(group, columns=["text"])["text"]
                    for text in column.cast(pa.large_string()).to_pylist():
                        if text:
                            yield text
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            sys.exit(f"error: {path} cannot be read: {error}")


def fetch_tinystories(dataset):
    """Download what the hub lists, shuffle with a fixed seed, write 20 + 1 + 1 shards."""
    shards = shard_dir(dataset)
    targets = [shards / f"shard_{i:05d}.parquet" for i in range(dataset.train_shards + 2)]
    if not all(is_parquet(path) for path in targets):
        urls = hub_listing(dataset.repo)
        sources = [shards / f"source_{i:05d}.parquet" for i in range(len(urls))]
        download_all(list(zip(urls, sources, strict=True)))
        # Each story once: the hub's copies would otherwise stand in two splits.
        texts = list(dict.fromkeys(parquet_texts(sources)))
        random.Random(0).shuffle(texts)
        n = len(targets)
        for i, path in enumerate(targets):
            part = texts[i * len(texts) // n : (i + 1) * len(texts) // n]
            temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
            pq.write_table(pa.table({"text": pa.array(part, pa.string())}), temporary, row_group_size=4096)
            temporary.replace(path)
    for path in shards.glob("source_*.parquet"):
        path.unlink()
