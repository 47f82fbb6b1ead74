"""From tokens to batches: packing documents into rows, the training stream, the rows that a run is scored on."""

import bisect
import itertools
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import mlx.core
import numpy as np

from harness import devices
from harness.corpus import SPLITS

PACKING_BUFFER = 1000  # documents to choose from when a row is filled


def packed_rows(tokens, offsets, order, length):
    """Yield (row, the documents in it), packed best-fit with documents in the given order. row: uint16 (length,).

    The longest buffered document that still fits goes next; where none fits, the shortest is cropped to the space left
    and its rest is dropped. Every row is full and begins with the start of a document, or of a piece of one. Ends when
    the documents do; a last row that cannot be filled is dropped.
    """
    starts, sizes = offsets.tolist(), np.diff(offsets).tolist()
    order, buffer = iter(order), []  # buffer: (document size, document), sorted
    while True:
        row, filled, documents = np.empty(length, np.uint16), 0, []
        while filled < length:
            while len(buffer) < PACKING_BUFFER and (document := next(order, None)) is not None:
                bisect.insort(buffer, (sizes[document], document))
            if not buffer:
                return
            space = length - filled
            fits = bisect.bisect_left(buffer, (space + 1,))
            size, document = buffer.pop(fits - 1 if fits else 0)
            size, start = min(size, space), starts[document]
            row[filled : filled + size] = tokens[start : start + size]
            filled += size
            documents.append(document)
        yield row, documents


def cut_step(total, rows, length):
    """How an optimizer step of `total` tokens is cut: (rows at once on each device, micro-batches).

    rows: as many at once as memory allows; fewer where the devices of a group would together take more than a step.
    """
    if devices.SIZE > 1:
        if total % length == 0 and total // length % devices.SIZE:
            devices.refuse(f"a step has {total // length} rows, which {devices.SIZE} devices cannot share: lower NPROC")
        rows = min(rows, max(1, total // (length * devices.SIZE)))
    at_once = rows * length * devices.SIZE
    if rows < 1 or total % at_once:
        product = f"DEVICE_BATCH_SIZE x sequence length x devices = {rows} x {length} x {devices.SIZE}"
        sys.exit(f"error: TOTAL_BATCH_SIZE = {total} is not a multiple of {product}")
    return rows, total // at_once


def training_order(pieces, seed):
    """Yield document numbers without end, each epoch in a new order that `seed` determines.

    An epoch holds the start of every document, and one later piece of a document in several, in turn: evaluation
    reads documents from their start, so training sees starts as often as all the rest together. pieces: int
    (documents,), see `TokenCache`.
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

    Column t + 1 holds the target of column t. A thread packs batches ahead; `wait_seconds` is how long the training
    loop had to wait for it.

    Every rank packs the whole stream and takes its own rows of it, so all together train on the rows that a single
    device would, and see no document twice in an epoch. `tokens` and `epochs` count those of all ranks.
    """

    AHEAD = 8  # batches

    def __init__(self, cache, batch_size, sequence_length, seed):
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.wait_seconds, self.tokens = 0.0, 0
        self._documents, self._pieces = 0, cache.pieces("train")
        order = training_order(self._pieces, seed)
        self._rows = packed_rows(cache.tokens("train"), cache.offsets("train"), order, sequence_length + 1)
        self._thread = ThreadPoolExecutor(1)
        self._ahead = deque(self._thread.submit(self._pack) for _ in range(self.AHEAD))

    def _pack(self):
        batch, used = zip(*itertools.islice(self._rows, devices.SIZE * self.batch_size), strict=True)
        mine = batch[devices.RANK * self.batch_size :][: self.batch_size]
        return np.stack(mine).astype(np.int32), sum(map(len, used))

    def __iter__(self):
        return self

    def __next__(self):
        start = time.monotonic()
        batch, used = self._ahead.popleft().result()
        self._ahead.append(self._thread.submit(self._pack))
        self.wait_seconds += time.monotonic() - start
        self._documents += used
        self.tokens += devices.SIZE * self.batch_size * self.sequence_length
        return mlx.core.array(batch)

    @property
    def epochs(self):
        """How often the training split was gone through, in the sense of `training_order`."""
        return self._documents / np.isin(self._pieces, (0, 1)).sum()


def evaluation_rows(cache, dataset, split="val"):
    """The rows uint16 (n, sequence_length + 1) that a run is scored on: the same for every run."""
    order = range(cache.meta[split]["documents"])
    corpus = sum(cache.meta[s]["tokens"] for s in SPLITS)
    wanted = max(1, int(min(dataset.eval_tokens, dataset.eval_fraction * corpus)) // dataset.sequence_length)
    rows = packed_rows(cache.tokens(split), cache.offsets(split), order, dataset.sequence_length + 1)
    return np.stack([row for row, _ in itertools.islice(rows, wanted)])
