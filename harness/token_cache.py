"""The token cache: the text of a dataset as tokens on disk, made once and read by every run."""

import hashlib
import json
import os
import shutil
import sys
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partialmethod
from pathlib import Path

import numpy as np

from harness import corpus, files, project, tokenizer
from harness.corpus import cache_dir, refuse_cache
from harness.tokenizer import Tokenizer

AT_ONCE = 2**17  # characters that a thread encodes in one call, about


def code():
    """A hash of the code that reads, splits, encodes and stores text: where it changed, `prepare` makes new tokens."""
    return project.code_hash(Path(module.__file__) for module in (corpus, tokenizer, sys.modules[__name__]))


@dataclass(frozen=True)
class TokenCache:
    """The prepared tokens of one dataset.

    `meta` names the hash of every file. A split is a flat memory-mapped uint16 array, its document offsets int64
    (documents + 1,), and for each document which piece of its source it is, int32 (documents,): 0 for the start.
    """

    folder: Path
    meta: dict

    @classmethod
    def read(cls, dataset):
        """The prepared tokens, unread; None where they are missing, damaged or of another definition of the dataset."""
        folder = cache_dir(dataset) / "tokens"
        try:
            cache = cls(folder, json.loads((folder / "meta.json").read_text()))
            fits = cache.is_whole("tokenizer.json") and cache.meta["dataset"] == asdict(dataset)
            return cache if fits else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    @classmethod
    def load(cls, dataset):
        """The same; where there is None, one line says how to prepare them."""
        return cls.read(dataset) or refuse_cache(dataset.name)

    @property
    def hash(self):
        """SHA-256 over the hashes of all files of the cache and of the tokenizer."""
        return hashlib.sha256(json.dumps(self.meta["sha256"], sort_keys=True).encode()).hexdigest()

    def _array(self, kind, split):
        name = f"{split}_{kind}.npy"
        try:
            found = np.load(self.folder / name, mmap_mode="r")  # refuses a file that was cut short
            if name == "train_tokens.npy" or self.is_whole(name):  # the one that takes seconds to hash
                return found
        except (OSError, ValueError, EOFError):
            pass
        refuse_cache(self.meta["dataset"]["name"], self.folder / name)

    tokens = partialmethod(_array, "tokens")
    offsets = partialmethod(_array, "offsets")
    pieces = partialmethod(_array, "pieces")

    def is_whole(self, name):
        """Whether a file is as it was prepared."""
        return (self.folder / name).exists() and files.file_hash(self.folder / name) == self.meta["sha256"][name]


def chunks(texts):
    """Yield lists of texts of `AT_ONCE` characters, about."""
    some, size = [], 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def encoded(tokenizer, texts):
    """Yield the token ids of each text, see `Tokenizer.encode_documents`, in order.

    A thread a core encodes ahead. In memory are the texts of two calls a core, however many there are.
    """
    cores, ahead = os.cpu_count() or 1, deque()
    with ThreadPoolExecutor(cores) as pool:
        for some in chunks(texts):
            ahead.append(pool.submit(tokenizer.encode_documents, some))
            if len(ahead) >= 2 * cores:
                yield from ahead.popleft().result()
        for future in ahead:
            yield from future.result()


def write_split(tokenizer, texts, folder, split, held_out):
    """Tokenize one split. Documents whose hash is in `held_out` are left out; val and test add theirs.

    A training document that is longer than a row is stored in pieces of one row: packing would crop it. A piece that is
    equal to a held-out document is left out, too. Held-out documents stay whole.
    """
    size, offsets, numbers = tokenizer.dataset.sequence_length, array("q", [0]), array("i")
    with (folder / f"{split}_tokens.npy").open("wb") as out:
        start = {"descr": "<u2", "fortran_order": False, "shape": (0,)}
        np.lib.format.write_array_header_1_0(out, start)  # which leaves room for any size
        for document in encoded(tokenizer, texts):
            name, pieces = content_hash(document), [document]
            if name in held_out or len(document) == 1:
                continue
            if split != "train":
                held_out.add(name)
            elif len(document) > size + 1:
                pieces = [np.insert(document[first : first + size], 0, tokenizer.bos)
                          for first in range(1, len(document), size)]  # fmt: skip
                pieces = [piece for piece in pieces if content_hash(piece) not in held_out]
            for number, piece in enumerate(pieces):
                out.write(piece.tobytes())
                offsets.append(offsets[-1] + len(piece))
                numbers.append(number)
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, start | {"shape": (offsets[-1],)})
    np.save(folder / f"{split}_offsets.npy", np.array(offsets, np.int64))
    np.save(folder / f"{split}_pieces.npy", np.array(numbers, np.int32))
    return {"documents": len(numbers), "tokens": offsets[-1]}


def content_hash(tokens):
    """128 bits that stand for a document's content. tokens: uint16 (n,)."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def is_prepared(dataset):
    """Whether the cache is whole, and made by today's code from today's definition and source of the dataset."""
    cache = TokenCache.read(dataset)
    made_now = cache and cache.meta["code"] == code()
    return bool(made_now) and dataset.source.fingerprint() in (None, cache.meta["source"])


def prepare(dataset):
    """Fetch the dataset, train its tokenizer, write its token cache; nothing where all is there and whole."""
    root = cache_dir(dataset)
    try:
        with files.one_at_a_time(root):  # who waits finds all ready
            files.remove_leftovers(root)
            cache = is_prepared(dataset) and TokenCache.load(dataset)
            if not cache or not all(map(cache.is_whole, cache.meta["sha256"])):
                prepare_anew(dataset, root)
    except OSError as error:
        sys.exit(f"error: {root}: {files.what_failed(error)}; AUTORESEARCH_CACHE moves the cache elsewhere")
    print(f"{dataset.name}: prepared in {root}")


def prepare_anew(dataset, root):
    """Fetch, write tokens and tokenizer into a temporary folder, and put it in place of the one in `root`."""
    dataset.source.fetch(dataset)
    new, held_out = root / f"tokens.{os.getpid()}.part", set()
    new.mkdir()
    try:
        print(f"{dataset.name}: training the tokenizer", flush=True)
        tokenizer = Tokenizer.train(dataset, dataset.source.texts(dataset, "train"))
        tokenizer.save(new / "tokenizer.json")
        meta = {"dataset": asdict(dataset), "code": code(), "source": dataset.source.fingerprint()}
        for split in ("val", "test", "train"):  # held-out first: train gives way to them
            meta[split] = write_split(tokenizer, dataset.source.texts(dataset, split), new, split, held_out)
            print("{}: {documents:,} documents, {tokens:,} tokens for {}".format(dataset.name, split, **meta[split]))
            needed = 1 if split == "train" else dataset.sequence_length + 1  # training rows may repeat a document
            if meta[split]["tokens"] < needed:
                mend = "add documents, or put long ones into .txt files, which are cut into passages"
                sys.exit(f"error: dataset '{dataset.name}' has too little text: {split} needs {needed} tokens; {mend}")
        meta["sha256"] = {path.name: files.file_hash(path) for path in sorted(new.iterdir())}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(root / "tokens", ignore_errors=True)
        new.rename(root / "tokens")
        files.to_disk(root)
    finally:
        shutil.rmtree(new, ignore_errors=True)
