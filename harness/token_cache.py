"""From text to tokens: the tokenizer of a dataset, and its token cache on disk.

`prepare` makes both once, in `make prepare`; everything later reads them. The cache is a flat
memory-mapped array a split, with the offsets and the content hashes of its documents.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

import data_sources
from data_sources import SPLITS, cache_dir
from harness.downloads import file_hash, printable, remove_leftovers
from harness.files import folder_to_disk, make_folder, one_at_a_time, read_json, to_disk, what_failed, write_atomically

# --- tokenizer ---------------------------------------------------------------------------------

# GPT-4's split pattern, but digits in groups of one or two: a small vocabulary has no room for
# a thousand three-digit numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|document|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")
TRAINING_CHARACTERS = 250_000_000  # enough for merges to settle; more only takes longer
DOCUMENT_CHARACTERS = 10_000  # of one document, so that none dominates
RUN = 10_000  # characters of one kind, after which a word ends in any case
ONE_KIND = re.compile(r"[^\W\d_]++|[\W_]++")  # what SPLIT_PATTERN may take for one word, and more


def without_long_runs(text):
    """The parts of `text`, in order, cut so that less than 2 RUN letters, or other characters, stand in a row.

    The engine of SPLIT_PATTERN notes a state for each blank of a run, to go back to, and panics after a million of
    them. Any run of 2 RUN fills one of the stretches that are looked at here; ordinary text fills none.
    """
    cuts = {0, len(text)}
    for first in range(0, len(text) - RUN + 1, RUN):
        if ONE_KIND.fullmatch(text, first, first + RUN):
            cuts |= {first, first + RUN}
    return [text[a:b] for a, b in pairwise(sorted(cuts))]


class Tokenizer:
    """Byte-level BPE of one dataset. Its special ids come last, the document start first of them.

    Attributes: `dataset`, `vocab_size`, `bos` (id of the document start), `token_bytes`
    (int32, (vocab_size,): UTF-8 length of each token, 0 for special ones).
    """

    def __init__(self, dataset, ranks, pattern=SPLIT_PATTERN):
        special = {text: len(ranks) + i for i, text in enumerate(SPECIAL_TOKENS)}
        self.dataset, self.ranks, self.pattern = dataset, ranks, pattern
        self.encoding = tiktoken.Encoding(
            name=dataset.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = len(ranks) + len(special)
        self.bos = special[SPECIAL_TOKENS[0]]
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for token, rank in ranks.items():
            self.token_bytes[rank] = len(token)

    @classmethod
    def train(cls, dataset, texts):
        """Learn the merges from `texts` (an iterable of str)."""

        def limited():
            seen = 0
            for text in texts:
                yield from without_long_runs(text[:DOCUMENT_CHARACTERS])
                seen += min(len(text), DOCUMENT_CHARACTERS)
                if seen >= TRAINING_CHARACTERS:
                    return

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(limited(), dataset.vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls(dataset, {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})

    def encode(self, text):
        """Token ids of `text`; special tokens written out in it are ordinary text."""
        return [i for part in without_long_runs(text) for i in self.encoding.encode_ordinary(part)]

    def encode_all(self, texts):
        """`encode` of each of a list of texts, on all cores."""
        parts = [without_long_runs(text) for text in texts]
        ids = iter(self.encoding.encode_ordinary_batch([*chain(*parts)], num_threads=os.cpu_count() or 1))
        return [[*chain.from_iterable(islice(ids, len(of_text)))] for of_text in parts]

    def decode(self, ids):
        """The text of `ids`."""
        return self.encoding.decode(ids)

    def save(self, path):
        """Write the tokenizer as JSON: data only, loading it runs nothing."""
        ordered = sorted(self.ranks, key=self.ranks.get)
        tokens = [base64.b64encode(token).decode() for token in ordered]
        write_atomically(path, json.dumps({"pattern": self.pattern, "tokens": tokens}))

    @classmethod
    def load(cls, dataset, path=None):
        """The dataset's prepared tokenizer; where there is none, one line says how to make it."""
        path = path or cache_dir(dataset) / "tokenizer.json"
        try:
            saved = json.loads(Path(path).read_text())
            tokens = [base64.b64decode(token, validate=True) for token in saved["tokens"]]
            ranks = {token: rank for rank, token in enumerate(tokens)}
            if len(ranks) < len(tokens) or not all(bytes([byte]) in ranks for byte in range(256)):
                raise ValueError("not the tokens of a byte-level tokenizer")
            return cls(dataset, ranks, saved["pattern"])
        except (FileNotFoundError, NotADirectoryError):
            sys.exit(not_prepared(dataset))
        except (OSError, ValueError, KeyError, TypeError):
            sys.exit(damaged(dataset, path))


def prepare_command(dataset):
    return f"make prepare DATASET={dataset.name}" + (" FILES=dir" if dataset.name == "files" else "")


def not_prepared(dataset):
    return f"error: dataset '{dataset.name}' is not prepared; run: {prepare_command(dataset)}"


def damaged(dataset, path):
    return f"error: {path} is damaged; run: {prepare_command(dataset)}"


# --- token cache -------------------------------------------------------------------------------


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
        if cache.meta["dataset"] != asdict(dataset):
            sys.exit(not_prepared(dataset))  # it was, with other sizes
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
            tokenizer = folder.parent / "tokenizer.json"
            return cache if file_hash(tokenizer) == cache.meta["sha256"]["tokenizer.json"] else None
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


def write_token_cache(dataset, folder):
    """Write `tokenizer.json` and `tokens/` of the fetched dataset into `folder`; returns the cache's meta."""
    print(f"{dataset.name}: training the tokenizer", flush=True)
    try:
        tokenizer = Tokenizer.train(dataset, data_sources.documents(dataset, "train"))
    except BaseException as error:
        end_with_its_text(error, dataset, "train", lambda text: Tokenizer.train(dataset, [text]))
    tokenizer.save(folder / "tokenizer.json")
    tokens, held_out = folder / "tokens", set()
    tokens.mkdir()
    meta = {"dataset": asdict(dataset), "source": data_sources.fingerprint(dataset), "sha256": {}}
    meta["shards"] = {path.name: file_hash(path) for path in data_sources.shards(dataset)}
    for split in ("val", "test", "train"):  # held-out first: train gives way to them
        print(f"{dataset.name}: tokenizing {split}", flush=True)
        try:
            meta[split] = write_split(tokenizer, data_sources.documents(dataset, split), tokens, split, held_out)
        except BaseException as error:
            end_with_its_text(error, dataset, split, tokenizer.encode)
        needed = 0 if split == "train" else dataset.sequence_length  # training rows may repeat a document
        if meta[split]["tokens"] <= needed:
            sys.exit(
                f"error: dataset '{dataset.name}' has too little text: "
                f"{meta[split]['tokens']} tokens for {split}, which needs more than {needed}"
            )
    for path in [*sorted(tokens.glob("*.npy")), folder / "tokenizer.json"]:
        meta["sha256"][path.name] = file_hash(path)
    write_atomically(tokens / "meta.json", json.dumps(meta, indent=1))
    return meta


def end_with_its_text(error, dataset, split, work):
    """Raise `error`; where a text of the split broke `work`, end with one line that names file and row instead.

    A panic in the tokenizer's library is no Exception, and says nothing of the text.
    """
    if isinstance(error, OSError) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
        raise error
    for (path, row), text in data_sources.located(dataset, split):
        try:
            work(text)
        except BaseException as again:
            if type(again) is type(error):
                reason = printable(f"{type(again).__name__}: {again}")[:120]
                sys.exit(f"error: {printable(path)}, row {row}: the tokenizer fails here, take it out ({reason})")
            raise
    raise error


def write_split(tokenizer, texts, folder, split, held_out):
    """Tokenize one split. Documents whose hash is in `held_out` are left out; val and test add theirs.

    A training document that is longer than a row is stored as pieces that fill one each: whole, it
    would lose all that the packing crops. A piece gives way to a held-out document as well.
    Held-out documents stay whole.
    """
    lengths, hashes, numbers, raw = [], [], [], folder / f"{split}.raw"

    def stored(ids):
        document = np.array([tokenizer.bos, *ids], np.uint16)
        return document, document_hash(document)

    with raw.open("wb") as out:
        for some in chunks(texts):
            for ids in tokenizer.encode_all(some):
                whole, name = stored(ids)
                if name in held_out or len(ids) == 0:
                    continue
                pieces, size = [(whole, name)], tokenizer.dataset.sequence_length
                if split != "train":
                    held_out.add(name)
                elif len(ids) > size:
                    pieces = [stored(ids[first : first + size]) for first in range(0, len(ids), size)]
                if split == "train":
                    pieces = [piece for piece in pieces if piece[1] not in held_out]
                for number, (document, name) in enumerate(pieces):
                    out.write(document.tobytes())
                    lengths.append(len(document))
                    hashes.append(name)
                    numbers.append(number)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.memmap(raw, np.uint16, "r") if lengths else np.empty(0, np.uint16)
    arrays = {"tokens": tokens, "offsets": offsets}
    arrays |= {"hashes": np.array(hashes, np.uint64), "pieces": np.array(numbers, np.int32)}
    for kind, array in arrays.items():
        with (folder / f"{split}_{kind}.npy").open("wb") as file:
            np.save(file, array)
            file.flush()
            to_disk(file.fileno())
    raw.unlink()
    return {"documents": len(lengths), "tokens": int(offsets[-1])}


def chunks(texts, most=1024, characters=2**24):
    """Yield `texts` in lists of at most so many, or of so many characters that one more text goes beyond them."""
    some, size = [], 0
    for text in texts:
        some.append(text)
        size += len(text)
        if len(some) == most or size >= characters:
            yield some
            some, size = [], 0
    if some:
        yield some


# --- the dataset, made ready ---------------------------------------------------------------------


def is_prepared(dataset):
    """Whether the cache is whole and made from today's definition and source of the dataset."""
    cache = TokenCache.read(cache_dir(dataset) / "tokens")
    if cache is None or cache.meta["dataset"] != asdict(dataset):
        return False
    return data_sources.fingerprint(dataset) in (None, cache.meta["source"])


def prepare(dataset):
    """Fetch the dataset, train its tokenizer, write its token cache; nothing where all is there and whole."""
    start, root = time.monotonic(), cache_dir(dataset)
    try:
        make_folder(root)
        with one_at_a_time(root):  # who waits finds all ready
            meta = prepare_where_needed(dataset, root)
    except OSError as error:
        sys.exit(f"error: {root}: {what_failed(error)}; AUTORESEARCH_CACHE moves the cache elsewhere")
    if meta is None:
        print(f"{dataset.name}: prepared in {root}")
        return
    for split in SPLITS:
        print("{}: {} {documents:,} documents, {tokens:,} tokens".format(dataset.name, split, **meta[split]))
    print(f"{dataset.name}: prepared in {time.monotonic() - start:.0f} s in {root}")


def prepare_where_needed(dataset, root):
    """The cache's meta where something had to be made, else None."""
    remove_leftovers(root)
    known = (read_json(root / "tokens" / "meta.json") or {}).get("shards", {})
    bad = [path for path in data_sources.shards(dataset) if known.get(path.name) not in (None, file_hash(path))]
    for path in bad:
        print(f"{dataset.name}: {path} is not as it was fetched; fetching it anew", flush=True)
        path.unlink()
    if bad:
        data_sources.fetch(dataset)
    if is_prepared(dataset):
        changed = TokenCache.load(dataset).changed_file()
        if not changed:
            return None
        print(f"{dataset.name}: {changed} is not as it was prepared; preparing anew", flush=True)
    try:
        return prepare_anew(dataset, root)
    except data_sources.Damaged as error:
        if not dataset.repo:
            raise  # a person's own file
        print(f"{error.code.removeprefix('error: ')}; fetching it anew", flush=True)
        error.path.unlink()
        return prepare_anew(dataset, root)


def prepare_anew(dataset, root):
    """Fetch, make tokenizer and tokens in a temporary folder, move them to `root`; returns the cache's meta."""
    data_sources.fetch(dataset)
    temporary = root / f"tokens.{os.getpid()}.part"
    temporary.mkdir()
    try:
        meta = write_token_cache(dataset, temporary)
        # First the old cache goes, whole: at no time does one stand beside a tokenizer that is not its own.
        if (root / "tokens").exists():
            (root / "tokens").rename(temporary / "old")
            folder_to_disk(root)
        folder_to_disk(temporary / "tokens")
        (temporary / "tokenizer.json").replace(root / "tokenizer.json")
        folder_to_disk(root)
        (temporary / "tokens").rename(root / "tokens")
        folder_to_disk(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta
