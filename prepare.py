"""The fixed harness: tokenizer, token cache, batches, the budget's clock, the metric, the record.

Nothing here changes during a session, so that every experiment is measured the same way.

    python prepare.py [--dataset NAME]     fetch, train the tokenizer, write the token cache

train.py uses, in this order: `Run(dataset)`, `run.batches(…)`, `run.start_clock()`,
`run.training()` and `run.log_step(…)` in its loop, and `run.finish(…)`, which evaluates and
writes data/last_run.json.
"""

import argparse
import base64
import bisect
import functools
import gc
import hashlib
import json
import math
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

PROCESS_START = time.monotonic()

import mlx.core as mx  # noqa: E402  (loading it takes time, and that counts as start-up)
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
import rustbpe  # noqa: E402
import tiktoken  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

import checks  # noqa: E402
import data_sources  # noqa: E402
from data_sources import SPLITS, cache_dir, get_dataset  # noqa: E402

HERE = Path(__file__).resolve().parent
DATA_DIR = HERE / "data"
HARNESS_FILES = ("prepare.py", "checks.py", "data_sources.py")
FORMAT_VERSION = 1


def harness_hash():
    """SHA-256 over the harness files, by name and content."""
    digest = hashlib.sha256()
    for name in HARNESS_FILES:
        digest.update(name.encode() + b"\0" + (HERE / name).read_bytes() + b"\0")
    return digest.hexdigest()


HARNESS = harness_hash()  # of the files that this process loaded, whatever happens to them later


def positive(name, text):
    """`text` as a positive finite number, or the program ends with one line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        sys.exit(f"error: {name}={text} is not a positive number")
    return value


def whole(name, text):
    """`text` as a whole number, 0 or more, or the program ends with one line."""
    if not text.isdecimal():
        sys.exit(f"error: {name}={text} is not a whole number")
    return int(text)


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
                yield text[:DOCUMENT_CHARACTERS]
                seen += min(len(text), DOCUMENT_CHARACTERS)
                if seen >= TRAINING_CHARACTERS:
                    return

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(limited(), dataset.vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls(dataset, {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})

    def encode(self, text):
        """Token ids of `text`; special tokens written out in it are ordinary text."""
        return self.encoding.encode_ordinary(text)

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


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_prepared(dataset):
    """Whether the cache is whole and made from today's definition and source of the dataset."""
    cache = TokenCache.read(cache_dir(dataset) / "tokens")
    if cache is None or cache.meta["dataset"] != asdict(dataset):
        return False
    return data_sources.fingerprint(dataset) in (None, cache.meta["source"])


def prepare(dataset):
    """Fetch the dataset, train its tokenizer, write its token cache; nothing where all is there."""
    start, root = time.monotonic(), cache_dir(dataset)
    data_sources.remove_leftovers(root)
    if is_prepared(dataset):
        print(f"{dataset.name}: prepared in {root}")
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        data_sources.fetch(dataset)
        temporary = root / f"tokens.{os.getpid()}.part"
        temporary.mkdir()
        try:
            meta = write_token_cache(dataset, temporary)
            # First the old cache goes, whole: at no time does one stand beside a tokenizer that is not its own.
            if (root / "tokens").exists():
                (root / "tokens").rename(temporary / "old")
            (temporary / "tokenizer.json").replace(root / "tokenizer.json")
            (temporary / "tokens").rename(root / "tokens")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        sys.exit(f"error: {root}: {error.strerror or error}; AUTORESEARCH_CACHE moves the cache elsewhere")
    for split in SPLITS:
        print("{}: {} {documents:,} documents, {tokens:,} tokens".format(dataset.name, split, **meta[split]))
    print(f"{dataset.name}: prepared in {time.monotonic() - start:.0f} s in {root}")


def write_token_cache(dataset, folder):
    """Write `tokenizer.json` and `tokens/` of the fetched dataset into `folder`; returns the cache's meta."""
    print(f"{dataset.name}: training the tokenizer", flush=True)
    tokenizer = Tokenizer.train(dataset, data_sources.documents(dataset, "train"))
    tokenizer.save(folder / "tokenizer.json")
    tokens, held_out = folder / "tokens", set()
    tokens.mkdir()
    meta = {"dataset": asdict(dataset), "source": data_sources.fingerprint(dataset), "sha256": {}}
    for split in ("val", "test", "train"):  # held-out first: train gives way to them
        print(f"{dataset.name}: tokenizing {split}", flush=True)
        meta[split] = write_split(tokenizer, data_sources.documents(dataset, split), tokens, split, held_out)
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
        for texts_of_chunk in chunks(texts, 1024):
            for ids in tokenizer.encoding.encode_ordinary_batch(texts_of_chunk, num_threads=os.cpu_count() or 1):
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
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    tokens = np.memmap(raw, np.uint16, "r") if lengths else np.empty(0, np.uint16)
    np.save(folder / f"{split}_tokens.npy", tokens)
    np.save(folder / f"{split}_offsets.npy", offsets)
    np.save(folder / f"{split}_hashes.npy", np.array(hashes, np.uint64))
    np.save(folder / f"{split}_pieces.npy", np.array(numbers, np.int32))
    raw.unlink()
    return {"documents": len(lengths), "tokens": int(offsets[-1])}


def chunks(iterable, size):
    chunk = []
    for item in iterable:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# --- batches -----------------------------------------------------------------------------------

PACKING_BUFFER = 1000  # documents to choose from when a row is filled


def packed_rows(tokens, offsets, order, length, on_document=None):
    """Yield rows uint16 (length,), packed best-fit with documents in the given order.

    The longest buffered document that still fits goes next; where none fits, the shortest is
    cropped to the space left and its rest is dropped. Every row is full and starts a document.
    `on_document(i)` is called for each document used. Ends when the documents do; a last row
    that cannot be filled is dropped.
    """
    starts, sizes = offsets.tolist(), np.diff(offsets).tolist()
    order, buffer = iter(order), []  # buffer: (document size, document), sorted
    while True:
        row, filled = np.empty(length, np.uint16), 0
        while filled < length:
            while len(buffer) < PACKING_BUFFER and (document := next(order, None)) is not None:
                bisect.insort(buffer, (sizes[document], document))
            if not buffer:
                return
            space = length - filled
            fits = bisect.bisect_left(buffer, (space + 1,))
            size, document = buffer.pop(fits - 1 if fits else 0)
            size = min(size, space)
            start = starts[document]
            row[filled : filled + size] = tokens[start : start + size]
            filled += size
            if on_document:
                on_document(document)
        yield row


def training_order(pieces, seed):
    """Yield document numbers without end, each epoch in a new order that `seed` determines.

    An epoch holds every document's start, and of a document in several pieces one later piece, in
    turn: evaluation reads documents from their start, so training sees starts as often as all the
    rest together. pieces: int (documents,), see `TokenCache`.
    """
    starts = np.flatnonzero(pieces == 0)
    later = np.diff(np.append(starts, len(pieces))) - 1
    starts_of_long, later = starts[later > 0], later[later > 0]
    epoch = 0
    while True:
        turn = starts_of_long + 1 + (starts_of_long + epoch) % later
        yield from np.random.default_rng((seed, epoch)).permutation(np.concatenate([starts, turn])).tolist()
        epoch += 1


class Batches:
    """The training stream: an endless iterator of int32 arrays (batch_size, sequence_length + 1).

    Column t + 1 holds the target of column t. A thread packs batches ahead, so that the training
    loop finds them ready; `wait_seconds` is how long it did not. The stream keeps the content
    hash of every document it served.
    """

    AHEAD = 8  # batches

    def __init__(self, cache, batch_size, sequence_length, seed):
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.wait_seconds, self.tokens = 0.0, 0
        self._cache, self._seed = cache, seed
        self._documents, self._served, self._pieces = 0, set(), cache.pieces("train")
        self._queue = queue.Queue(self.AHEAD)
        self._failure = None
        threading.Thread(target=self._fill, daemon=True, name="batches").start()

    def _fill(self):
        try:
            tokens, offsets = self._cache.tokens("train"), self._cache.offsets("train")
            served = []

            def note(document):
                served.append(document_hash(tokens[offsets[document] : offsets[document + 1]]))

            order = training_order(self._pieces, self._seed)
            rows = packed_rows(tokens, offsets, order, self.sequence_length + 1, note)
            while True:
                batch = np.stack([next(rows) for _ in range(self.batch_size)]).astype(np.int32)
                self._queue.put((batch, served.copy()))
                served.clear()
        except BaseException as error:  # handed to the training loop, which would wait forever
            self._failure = error
            self._queue.put(None)

    def __iter__(self):
        return self

    def __next__(self):
        start = time.monotonic()
        item = self._queue.get()
        self.wait_seconds += time.monotonic() - start
        if item is None:
            self._queue.put(None)  # for whoever asks again
            raise RuntimeError("the batch thread failed") from self._failure
        batch, served = item
        self._documents += len(served)
        self._served.update(served)
        self.tokens += self.batch_size * self.sequence_length
        return mx.array(batch)

    @property
    def epochs(self):
        """How often the training split was gone through, in the sense of `training_order`."""
        return self._documents / np.isin(self._pieces, (0, 1)).sum()

    def served(self):
        """Content hashes, uint64 (n,), sorted, of the documents handed out so far."""
        return np.sort(np.fromiter(self._served, np.uint64, len(self._served)))


def evaluation_rows(cache, dataset, split="val"):
    """The rows uint16 (n, sequence_length + 1) that a run is scored on: the same for every run."""
    tokens, offsets = cache.tokens(split), cache.offsets(split)
    corpus = sum(cache.meta[s]["tokens"] for s in SPLITS)
    wanted = max(1, int(min(dataset.eval_tokens, dataset.eval_fraction * corpus)) // dataset.sequence_length)
    rows = []
    for row in packed_rows(tokens, offsets, range(len(offsets) - 1), dataset.sequence_length + 1):
        rows.append(row)
        if len(rows) == wanted:
            break
    if not rows:
        sys.exit(f"error: split '{split}' of '{dataset.name}' does not fill a row of {dataset.sequence_length} tokens")
    return np.stack(rows)


# --- the metric --------------------------------------------------------------------------------

SCORED_AT_ONCE = 8192  # positions whose logits stand in float32 at one time


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_bpb` found. bpb and its standard error are in bits per byte."""

    bpb: float
    stderr: float
    tokens: int
    seconds: float  # of the sums and the checks together
    check_seconds: float


@functools.cache
def compute_streams():
    """The MLX streams that independent pieces of work are spread over.

    One on a GPU. On a CPU one a core: MLX runs element-wise work on a single thread a stream. They
    work at one time only where it walks graphs breadth first: MLX_BFS_MAX_WIDTH, see train.py.
    """
    if mx.default_device().type == mx.gpu:
        return [mx.default_stream(mx.gpu)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [mx.new_stream(mx.cpu) for _ in range(min(cores or 1, 16))]


def evaluate_bpb(model, tokenizer, batch_size):
    """Bits per byte of `model` on the validation rows of the tokenizer's dataset.

    Args:
        model: callable from token ids int32 (B, T) to logits (B, T, vocab_size). It sees ids and
            nothing else; log-softmax and loss are computed here, in float32. An `nn.Module` is
            put into evaluation mode, and back.
        tokenizer: a prepared `Tokenizer`.
        batch_size: rows handed to the model at once.

    Returns an `Evaluation`: the summed bits of all targets over their summed UTF-8 bytes, special
    tokens in neither sum. Raises `checks.Refused` where the model fails a check.
    """
    if batch_size < 1:
        sys.exit(f"error: the evaluation needs batches of at least one row, not {batch_size}")
    start = time.monotonic()
    with checks.harness_reads():
        rows = evaluation_rows(TokenCache.load(tokenizer.dataset), tokenizer.dataset)
    counted = tokenizer.token_bytes[rows[:, 1:]]  # (n, T)
    examination = checks.Examination(
        model=model,
        rows=rows,
        # On a GPU kernels may be compiled for a shape, so questions come in the evaluation's own.
        batch_size=batch_size if mx.default_device().type == mx.gpu else min(batch_size, 8),
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=counted.mean(),
        ask=partial(answers, model, tokenizer.vocab_size),
        score=lambda rows, size: score_rows(model, rows, tokenizer, size),
    )
    with evaluation_mode(model):
        examination.before()
        checked = time.monotonic() - start
        nats = score_rows(model, rows, tokenizer, batch_size)
        resumed = time.monotonic()
        examination.after(nats)
    size = counted.sum(axis=1, dtype=np.int64)
    bpb, stderr = bits_per_byte(nats.sum(axis=1, dtype=np.float64, where=counted > 0), size)
    end = time.monotonic()
    return Evaluation(bpb, stderr, rows[:, 1:].size, end - start, checked + end - resumed)


@contextmanager
def evaluation_mode(model):
    """Dropout and the like are off within it."""
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def answers(model, vocab_size, batches, function):
    """Yield function(logits, i), arrays, for each of `batches` of ids int32 (b, T), some in flight."""
    streams, ahead = compute_streams(), []
    for first in range(0, len(batches), len(streams)):
        results = []
        for i, stream in enumerate(streams[: len(batches) - first], first):
            with mx.stream(stream):
                results.append(function(checks.logits_of(model, mx.array(batches[i]), vocab_size), i))
        mx.async_eval(results)  # together, or the streams would work one after the other
        yield from ahead
        ahead = results
    yield from ahead


def score_rows(model, rows, tokenizer, batch_size):
    """Nats float32 (n, T) of the targets of rows uint16 (n, T + 1), those of special tokens included."""
    n, positions = len(rows), rows.shape[1] - 1
    at_once = max(1, SCORED_AT_ONCE // positions)
    # The last batch is filled up with rows that are not counted: a new shape may mean new kernels.
    batches = np.resize(rows, (-(-n // batch_size) * batch_size, positions + 1)).astype(np.int32)
    batches = batches.reshape(-1, batch_size, positions + 1)

    def loss(logits, i):  # (b, T, vocab) -> nats (b, T)
        targets, pieces = mx.array(batches[i, :, 1:]), []
        for first in range(0, batch_size, at_once):
            piece = logits[first : first + at_once].astype(mx.float32)
            # The largest is 0, or the sum below would be rounded away beside large logits.
            piece = piece - piece.max(axis=-1, keepdims=True)
            picked = mx.take_along_axis(piece, targets[first : first + at_once, :, None], axis=-1)[..., 0]
            pieces.append(mx.logsumexp(piece, axis=-1) - picked)
        return mx.concatenate(pieces)

    nats = []
    for batch in answers(model, tokenizer.vocab_size, batches[:, :, :-1], loss):
        nats.append(np.array(batch))
        checks.finite(nats[-1])
    return np.concatenate(nats)[:n]


def bits_per_byte(nats, size):
    """The ratio of sums and its standard error, rows as the independent unit (delta method).

    nats: float (n,), loss of each row. size: int (n,), bytes of each row.
    """
    bits = nats / math.log(2)
    bpb = bits.sum() / size.sum()
    residual = bits - bpb * size
    n = len(bits)
    stderr = math.sqrt(n / (n - 1) * (residual**2).sum()) / size.sum() if n > 1 else math.nan
    return float(bpb), float(stderr)


# --- one run: clock, log, record -----------------------------------------------------------------

EXPLODED = 3.0  # times the loss of knowing nothing, ln(vocabulary)


class Run:
    """One experiment: its dataset, the clock of its budget, its log and its record."""

    def __init__(self, dataset_name):
        self.dataset = get_dataset(dataset_name)
        self.budget = positive("BUDGET", os.environ.get("AUTORESEARCH_BUDGET") or "300")
        self.seed = whole("SEED", os.environ.get("AUTORESEARCH_SEED") or "42")
        self.tokenizer = Tokenizer.load(self.dataset)
        self.cache = TokenCache.load(self.dataset)
        self.train_blob = git_blob_hash(HERE / "train.py")
        self._stream = self._start = self._pending = None
        self._curve, self._step_ends, self._tokens_logged = [], [], 0
        self._changed_file, self._warm_up_tokens = None, 0
        self._watch = checks.HeldOutWatch(self.cache.files("val") + self.cache.files("test"))
        self.warm_up_seconds = 0.0
        self._verifier = threading.Thread(target=self._verify_cache, daemon=True)
        self._verifier.start()
        device = describe_device()
        memory = f", {device['memory_gb']} GB" if device["memory_gb"] else ""
        print(f"backend: {device['backend']} ({device['name']}{memory}), mlx {device['mlx']}, BLAS: {device['blas']}")
        if device["blas"] == "reference":
            print("note: without OpenBLAS a CPU is ten times slower; `make run` preloads it")

    def _verify_cache(self):
        with checks.harness_reads():
            self._changed_file = self.cache.changed_file()

    def batches(self, batch_size, sequence_length=None):
        """The training stream; one a run. See `Batches`."""
        if self._stream:
            raise RuntimeError("a run has one training stream")
        length = sequence_length or self.dataset.sequence_length
        self._stream = Batches(self.cache, batch_size, length, self.seed)
        return self._stream

    def warm_up(self, action, state):
        """Run `action`, which compiles on throw-away state. Its time does not count as start-up.

        state: tree of arrays, which must be the same afterwards, bit for bit: nothing is learnt here.
        """
        before, start = tree_digest(state), time.monotonic()
        action()
        self.warm_up_seconds += time.monotonic() - start
        if tree_digest(state) != before:
            sys.exit("error: the warm-up changed weights or optimizer state; put them back before the clock starts")

    def start_clock(self):
        """Begin the budget. Everything before was start-up: loading, building, compiling."""
        if self._start is not None:
            raise RuntimeError("the clock runs already")
        gc.collect()
        gc.freeze()  # long-lived objects need no further scanning
        mx.synchronize()
        self._startup_peak = mx.get_peak_memory()
        mx.clear_cache()
        mx.reset_peak_memory()
        self.startup_seconds = time.monotonic() - PROCESS_START
        if self._stream:
            self._warm_up_tokens, self._stream.tokens = self._stream.tokens, 0
            self._stream.wait_seconds = 0.0
        self._clocks = checks.read_clocks()
        self._start = time.monotonic()

    def elapsed(self):
        """Seconds since `start_clock`."""
        return time.monotonic() - self._start

    def progress(self):
        """The share of the budget that is used, 0 to 1."""
        return min(1.0, self.elapsed() / self.budget)

    def training(self):
        """Whether another step may begin.

        The newest step is still in flight, so the time of one step counts as used.
        """
        in_flight = np.diff(self._step_ends[-10:]).mean() if len(self._step_ends) > 1 else 0.0
        return self.elapsed() + in_flight < self.budget

    def log_step(self, loss):
        """Note one optimizer step. loss: scalar mx.array, mean nats per token.

        The loss of the step before is read, not this one's, so that the device never waits.
        A loss that is not finite, or explodes, ends the run.
        """
        mx.async_eval(loss)
        self._read_loss()
        self._pending = (loss, self._stream.tokens if self._stream else 0)

    def _read_loss(self):
        if self._pending is None:
            return
        loss, tokens = self._pending
        self._pending = None
        loss, now, step = float(loss.item()), self.elapsed(), len(self._step_ends)
        if not -math.inf < loss < EXPLODED * math.log(self.tokenizer.vocab_size):
            sys.exit(f"error: the loss is {loss} at step {step}: lower the learning rates or mend the change")
        rate = (tokens - self._tokens_logged) / max(now - (self._step_ends[-1] if step else 0.0), 1e-9)
        self._tokens_logged = tokens
        self._step_ends.append(now)
        self._curve.append((step, now, loss, rate, mx.get_peak_memory() / 2**20))
        if sys.stdout.isatty():
            left = max(0.0, self.budget - now)
            share = 100 * now / self.budget
            line = f"\rstep {step}  {share:5.1f} %  loss {loss:.4f}  {rate:,.0f} tok/s  {left:.0f} s left  "
            print(line, end="", flush=True)

    def finish(self, model, batch_size, config):
        """Evaluate, write the record, print the summary. Exits with 2 where a check refuses the run.

        Args:
            model: see `evaluate_bpb`; its parameters are counted where it has any.
            batch_size: rows at once in evaluation.
            config: dict of plain values for the record's `model`; holds at least `depth` and `n_embd`.
        """
        if self._start is None:
            sys.exit("error: train.py never called run.start_clock(), so there is no budget to check")
        self._read_loss()
        mx.synchronize()
        seconds = self.elapsed()
        train_peak = mx.get_peak_memory()
        if sys.stdout.isatty():
            print()
        mx.clear_cache()
        mx.reset_peak_memory()
        tokens, steps = self._tokens_logged, len(self._step_ends)
        served = self._stream.served() if self._stream else np.empty(0, np.uint64)
        evaluation, reason = None, None
        try:
            checks.clock(seconds, self._clocks)
            warm_up_steps = self._warm_up_tokens * steps / max(tokens, 1)
            checks.start_up(self.startup_seconds - self.warm_up_seconds, warm_up_steps)
            checks.budget(self.budget, seconds, self._step_ends)
            evaluation = evaluate_bpb(model, Tokenizer.load(self.dataset), batch_size)
            self._verifier.join()
            checks.data(served, self.cache, self._changed_file, self._watch.opened)
            checks.harness(HARNESS, harness_hash(), DEFINED, checks.definitions(*HARNESS_MODULES))
        except checks.Refused as refused:
            reason = str(refused)
        parameters = model.parameters() if hasattr(model, "parameters") else {}
        num_params = sum(p.size for _, p in tree_flatten(parameters)) if parameters else 0
        record = {
            "format_version": FORMAT_VERSION,
            "run_id": f"{datetime.now():%Y%m%d_%H%M%S}-{os.getpid()}-{os.urandom(4).hex()}",
            "pid": os.getpid(),
            "ppid": os.getppid(),
            "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
            "status": "invalid" if reason else "valid",
            "reason": reason,
            "commit": git_commit(),
            "train_blob": self.train_blob,
            "harness": HARNESS,
            "dataset": self.dataset.name,
            "token_cache": self.cache.hash,
            "seed": self.seed,
            "budget": self.budget,
            "device": describe_device(),
            "model": {**config, "dmodel_scale": (config["n_embd"] / 768) ** -0.5, "num_params": num_params},
            "training": {
                "seconds": seconds,
                "total_seconds": time.monotonic() - PROCESS_START,
                "startup_seconds": self.startup_seconds,
                "warm_up_seconds": self.warm_up_seconds,
                "total_steps": steps,
                "total_tokens": tokens,
                "avg_tok_sec": tokens / seconds,
                "training_peak_mb": train_peak / 2**20,
                "peak_memory_mb": max(self._startup_peak, train_peak, mx.get_peak_memory()) / 2**20,
                "eval_seconds": evaluation.seconds if evaluation else None,
                "check_seconds": evaluation.check_seconds if evaluation else None,
                "data_wait_seconds": self._stream.wait_seconds if self._stream else 0.0,
                "epochs": self._stream.epochs if self._stream else 0.0,
                "served_documents": len(served),
                "served_checksum": checks.checksum(served),
            },
            "result": {
                "val_bpb": evaluation.bpb if evaluation and not reason else None,
                "val_bpb_stderr": evaluation.stderr if evaluation and not reason else None,
            },
            "curve": sampled(self._curve),
        }
        record["seal"] = seal(record)
        write_record(record)
        print_summary(record)
        if reason:
            print(f"error: this run is not valid. {reason}", file=sys.stderr)
            sys.exit(2)


def tree_digest(tree):
    """SHA-256 over every array of a tree."""
    digest = hashlib.sha256()
    for path, array in tree_flatten(tree):
        digest.update(path.encode() + bytes(memoryview(mx.view(mx.contiguous(mx.atleast_1d(array)), mx.uint8))))
    return digest.hexdigest()


def sampled(curve, points=200):
    """At most `points` + 1 of the curve's samples, evenly spaced, the last one always."""
    stride = max(1, math.ceil(len(curve) / points))
    kept = curve[::stride] + ([curve[-1]] if curve and (len(curve) - 1) % stride else [])
    names = ("step", "seconds", "loss", "tok_sec", "memory_mb")
    return {name: [round(sample[i], 4) for sample in kept] for i, name in enumerate(names)}


def seal(record):
    """SHA-256 over a record's content (without its seal), by which a hand-made one is noticed."""
    content = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(("autoresearch" + json.dumps(content, sort_keys=True)).encode()).hexdigest()


def write_record(record):
    """Archive the record and make it data/last_run.json; a reader sees the old one or the new one, whole."""
    text = json.dumps(record, indent=1)
    name, number = f"run_{datetime.now():%Y%m%d_%H%M%S}", 1
    try:
        DATA_DIR.mkdir(exist_ok=True)
        while (archive := DATA_DIR / (name + (f"_{number}" if number > 1 else "") + ".json")).exists():
            number += 1
        write_atomically(archive, text)
        write_atomically(DATA_DIR / "last_run.json", text)
    except OSError as error:
        sys.exit(f"error: the record could not be written to {DATA_DIR}: {error.strerror or error}")


def write_atomically(path, text):
    """Write a text file so that `path` holds the old content or the new, whatever happens."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def print_summary(record):
    training, model = record["training"], record["model"]
    bpb, eval_seconds = record["result"]["val_bpb"], training["eval_seconds"]
    lines = {
        "val_bpb": "invalid" if bpb is None else f"{bpb:.6f}",
        "training_seconds": f"{training['seconds']:.1f}",
        "total_seconds": f"{training['total_seconds']:.1f}",
        "train_peak_mb": f"{training['training_peak_mb']:.1f}",
        "peak_memory_mb": f"{training['peak_memory_mb']:.1f}",
        "eval_seconds": "-" if eval_seconds is None else f"{eval_seconds:.1f}",
        "total_tokens_M": f"{training['total_tokens'] / 1e6:.2f}",
        "avg_tok_sec": f"{training['avg_tok_sec']:.0f}",
        "num_steps": training["total_steps"],
        "num_params_M": f"{model['num_params'] / 1e6:.2f}",
        "depth": model["depth"],
        "dmodel_scale": f"{model['dmodel_scale']:.4f}",
    }
    print("---")
    for name, value in lines.items():
        print(f"{name}: {value}")


# --- where and what we run -----------------------------------------------------------------------


def describe_device():
    """Plain facts about the machine and the software, for the record."""
    info = mx.device_info()
    backend = "cpu"
    if mx.default_device().type == mx.gpu:
        backend = "metal" if mx.metal.is_available() else "cuda"
    memory = info.get("memory_size") or info.get("total_memory")
    if not memory and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "name": info.get("device_name", platform.machine()),
        "memory_gb": round(memory / 2**30) if memory else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "backend": backend,
        "blas": blas_library(),
    }


def blas_library():
    """Whose matrix product MLX's CPU backend calls in this process."""
    if platform.system() == "Darwin":
        return "Accelerate"
    try:
        return "OpenBLAS" if "libopenblas" in Path("/proc/self/maps").read_text() else "reference"
    except OSError:
        return "unknown"


def git_commit():
    """The checked-out commit (40 hex digits), or None without git, a repository or a commit."""
    try:
        result = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=HERE, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def git_blob_hash(path):
    """The hash that git gives a file's content, computed without git."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def dataset_of_train():
    """The constant DATASET of train.py, read without running it."""
    try:
        text = (HERE / "train.py").read_text("utf-8", "replace")
    except OSError as error:
        sys.exit(f"error: train.py cannot be read: {error.strerror}")
    found = re.search(r"^DATASET\s*=\s*[\"'](\w+)[\"']", text, re.MULTILINE)
    if not found:
        sys.exit('error: train.py has no line of the form DATASET = "name"')
    return found.group(1)


def main():
    parser = argparse.ArgumentParser(description="Fetch a dataset, train its tokenizer, write its token cache.")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(data_sources.DATASETS)} (default: train.py's)")
    parser.add_argument("--check", action="store_true", help="only say whether it is prepared (exit 0) or not (exit 1)")
    arguments = parser.parse_args()
    dataset = get_dataset(arguments.dataset or dataset_of_train())
    if not arguments.check:
        prepare(dataset)
    elif not is_prepared(dataset):
        sys.exit(not_prepared(dataset))


HARNESS_MODULES = (sys.modules[__name__], checks, data_sources)
DEFINED = checks.definitions(*HARNESS_MODULES)  # as they are now; compared when the run ends

if __name__ == "__main__":
    main()
