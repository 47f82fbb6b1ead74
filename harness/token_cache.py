"""The token cache: the text of a dataset as tokens on disk, made once and read by every run.

A split is a flat memory-mapped array of tokens, with the offsets and the content hashes of its documents.
"""

import hashlib
import json
import os
import shutil
import sys
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from harness import corpus, files, project, tokenizer
from harness.corpus import SPLITS, Damaged, cache_dir, damaged, documents, fingerprint, not_prepared, shards
from harness.downloads import file_hash
from harness.tokenizer import Tokenizer


def identity(dataset):
    """What decides the tokens, apart from the text and the code: a run uses no tokens of another identity."""
    return {**asdict(dataset), "split_pattern": tokenizer.SPLIT_PATTERN, "special_tokens": [*tokenizer.SPECIAL_TOKENS]}


def code():
    """A hash of the code that reads, splits, encodes and stores text: where it changed, `prepare` makes new tokens."""
    return project.code_hash(Path(module.__file__) for module in (corpus, tokenizer, sys.modules[__name__]))


@dataclass(frozen=True)
class TokenCache:
    """The prepared tokens of one dataset.

    `meta` names the hash of every file. A split is a flat memory-mapped uint16 array, its
    document offsets int64 (documents + 1,), their content hashes uint64 (documents,), and for each
    which piece of its source it is, int32 (documents,), 0 for a whole one or a start.
    """

    folder: Path
    meta: dict

    @classmethod
    def load(cls, dataset):
        """The dataset's prepared tokens; where there are none, one line says how to make them."""
        folder = cache_dir(dataset) / "tokens"
        if not os.path.exists(folder / "meta.json"):
            sys.exit(not_prepared(dataset))
        cache = cls.read(folder)
        if cache is None:
            sys.exit(damaged(dataset, folder))
        if cache.meta.get("identity") != identity(dataset):
            sys.exit(not_prepared(dataset))  # it was, otherwise
        return cache

    @classmethod
    def read(cls, folder):
        """The cache in `folder`, or None where files are missing or do not fit each other.

        The tokens themselves are not read: see `changed_file`.
        """
        try:
            cache = cls(folder, json.loads((folder / "meta.json").read_text()))
            for split in SPLITS:
                kinds, meta = ("tokens", "offsets", "hashes", "pieces"), cache.meta[split]
                tokens, offsets, hashes, pieces = (cache._array(split, kind) for kind in kinds)
                if len(tokens) != meta["tokens"] or offsets[-1] != meta["tokens"]:
                    return None
                if not (len(offsets) - 1 == len(hashes) == len(pieces) == meta["documents"]):
                    return None
            tokenizer_file = folder.parent / "tokenizer.json"
            return cache if file_hash(tokenizer_file) == cache.meta["sha256"]["tokenizer.json"] else None
        except (OSError, EOFError, ValueError, LookupError, TypeError):
            return None

    @property
    def hash(self):
        """SHA-256 over the hashes of all files of the cache and of the tokenizer."""
        return hashlib.sha256(json.dumps(self.meta["sha256"], sort_keys=True).encode()).hexdigest()

    def tokens(self, split):
        return self._array(split, "tokens")

    def offsets(self, split):
        return np.array(self._array(split, "offsets"))

    def files(self, split):
        return sorted(self.folder.glob(f"{split}_*.npy"))

    def hashes(self, split):
        return np.array(self._array(split, "hashes"))

    def pieces(self, split):
        return np.array(self._array(split, "pieces"))

    def _array(self, split, kind):
        return np.load(self.folder / f"{split}_{kind}.npy", mmap_mode="r")

    def changed_file(self):
        """The first file that is not as it was prepared, or None. Reads all of it."""
        for name, expected in self.meta["sha256"].items():
            path = self.folder.parent / name if name == "tokenizer.json" else self.folder / name
            if not path.exists() or file_hash(path) != expected:
                return path
        return None


def document_hash(tokens):
    """64 bits that stand for a document's content. tokens: uint16 (n,)."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


# --- writing ---------------------------------------------------------------------------------------


def chunks(texts, characters=2**20):
    """Yield `texts` in lists of about so many characters; a text is never divided."""
    some, size = [], 0
    for text in texts:
        some.append(text)
        size += len(text) + 1
        if size >= characters:
            yield some
            some, size = [], 0
    yield some


def encoded(tokenizer, texts):
    """Yield the token ids of each text, see `Tokenizer.encode_documents`, in order.

    A thread a core encodes ahead. Two chunks a core are in memory at most, however long the texts are in all.
    """
    cores, ahead = os.cpu_count() or 1, deque()
    with ThreadPoolExecutor(cores) as pool:
        for chunk in chunks(texts):
            ahead.append(pool.submit(tokenizer.encode_documents, chunk))
            if len(ahead) >= 2 * cores:
                yield from ahead.popleft().result()
        for future in ahead:
            yield from future.result()


def write_split(tokenizer, texts, folder, split, held_out):
    """Tokenize one split. Documents whose hash is in `held_out` are left out; val and test add theirs.

    A training document that is longer than a row is stored as pieces that fill one each: whole, it
    would lose all that the packing crops. A piece gives way to a held-out document as well.
    Held-out documents stay whole.
    """
    size, raw = tokenizer.dataset.sequence_length, folder / f"{split}.raw"
    lengths, hashes, numbers = array("q", [0]), array("Q"), array("i")
    with raw.open("wb") as out:
        for document in encoded(tokenizer, texts):
            name = document_hash(document)
            if name in held_out or len(document) == 1:
                continue
            pieces = [(document, name)]
            if split != "train":
                held_out.add(name)
            elif len(document) > size + 1:
                pieces = [np.insert(document[first : first + size], 0, tokenizer.bos)
                          for first in range(1, len(document), size)]  # fmt: skip
                pieces = [(piece, document_hash(piece)) for piece in pieces]
                pieces = [piece for piece in pieces if piece[1] not in held_out]
            for number, (piece, name) in enumerate(pieces):
                out.write(piece.tobytes())
                lengths.append(len(piece))
                hashes.append(name)
                numbers.append(number)
    offsets = np.cumsum(np.array(lengths, np.int64))
    tokens = np.memmap(raw, np.uint16, "r") if hashes else np.empty(0, np.uint16)
    arrays = {"tokens": tokens, "offsets": offsets}
    arrays |= {"hashes": np.array(hashes, np.uint64), "pieces": np.array(numbers, np.int32)}
    for kind, values in arrays.items():
        with (folder / f"{split}_{kind}.npy").open("wb") as file:
            np.save(file, values)
            file.flush()
            files.to_disk(file.fileno())
    raw.unlink()
    return {"documents": len(hashes), "tokens": int(offsets[-1])}


def write_token_cache(dataset, folder):
    """Write `tokenizer.json` and `tokens/` of the fetched dataset into `folder`."""
    print(f"{dataset.name}: training the tokenizer", flush=True)
    tokenizer = Tokenizer.train(dataset, documents(dataset, "train"))
    tokenizer.save(folder / "tokenizer.json")
    tokens, held_out = folder / "tokens", set()
    tokens.mkdir()
    meta = {"identity": identity(dataset), "code": code(), "source": fingerprint(dataset)}
    meta["shards"] = {path.name: file_hash(path) for path in shards(dataset)}
    for split in ("val", "test", "train"):  # held-out first: train gives way to them
        print(f"{dataset.name}: tokenizing {split}", flush=True)
        found = meta[split] = write_split(tokenizer, documents(dataset, split), tokens, split, held_out)
        print("{}: {documents:,} documents, {tokens:,} tokens".format(dataset.name, **found), flush=True)
        needed = 0 if split == "train" else dataset.sequence_length  # training rows may repeat a document
        if found["tokens"] <= needed:
            found = f"{found['tokens']} tokens for {split}, which needs more than {needed}"
            mend = "add documents, or put long ones into .txt files, which are cut into passages"
            sys.exit(f"error: dataset '{dataset.name}' has too little text: {found}; {mend}")
    written = [*sorted(tokens.glob("*.npy")), folder / "tokenizer.json"]
    meta["sha256"] = {path.name: file_hash(path) for path in written}
    files.write_atomically(tokens / "meta.json", json.dumps(meta, indent=1))


# --- the dataset, made ready ---------------------------------------------------------------------


def is_prepared(dataset):
    """Whether the cache is whole, and made by today's code from today's definition and source of the dataset."""
    cache = TokenCache.read(cache_dir(dataset) / "tokens")
    made = cache and (cache.meta.get("identity"), cache.meta.get("code"))
    if made != (identity(dataset), code()):
        return False
    return fingerprint(dataset) in (None, cache.meta["source"])


def prepare(dataset):
    """Fetch the dataset, train its tokenizer, write its token cache; nothing where all is there and whole."""
    root = cache_dir(dataset)
    try:
        files.make_folder(root)
        with files.one_at_a_time(root):  # who waits finds all ready
            prepare_where_needed(dataset, root)
    except OSError as error:
        sys.exit(f"error: {root}: {files.what_failed(error)}; AUTORESEARCH_CACHE moves the cache elsewhere")
    print(f"{dataset.name}: prepared in {root}")


def prepare_where_needed(dataset, root):
    files.remove_leftovers(root)
    known = (files.read_json(root / "tokens" / "meta.json") or {}).get("shards", {})
    bad = [path for path in shards(dataset) if known.get(path.name) not in (None, file_hash(path))]
    for path in bad:
        print(f"{dataset.name}: {path} is not as it was fetched; fetching it anew", flush=True)
        path.unlink()
    if bad:
        dataset.source.fetch(dataset)
    if is_prepared(dataset):
        changed = TokenCache.load(dataset).changed_file()
        if not changed:
            return
        print(f"{dataset.name}: {changed} is not as it was prepared; preparing anew", flush=True)
    try:
        prepare_anew(dataset, root)
    except Damaged as error:
        if error.path not in shards(dataset):
            raise  # a person's own file
        print(f"{error.code.removeprefix('error: ')}; fetching it anew", flush=True)
        error.path.unlink()
        prepare_anew(dataset, root)


def prepare_anew(dataset, root):
    """Fetch, make tokenizer and tokens in a temporary folder, move them to `root`."""
    dataset.source.fetch(dataset)
    temporary = root / f"tokens.{os.getpid()}.part"
    temporary.mkdir()
    try:
        write_token_cache(dataset, temporary)
        # First the old cache goes, whole: at no time does one stand beside a tokenizer that is not its own.
        if (root / "tokens").exists():
            (root / "tokens").rename(temporary / "old")
            files.folder_to_disk(root)
        files.folder_to_disk(temporary / "tokens")
        (temporary / "tokenizer.json").replace(root / "tokenizer.json")
        files.folder_to_disk(root)
        (temporary / "tokens").rename(root / "tokens")
        files.folder_to_disk(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
