"""The metric: bits per byte of a model on rows of tokens, with its error. The same code scores whatever is asked."""

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from harness import devices, machine
from harness.run_checks import Refused

SECONDS, SHARE = 60.0, 1 / 3  # of the budget: what scoring the validation rows may take, the less of both
LEAST_ROWS = 64


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_bpb` found. bpb and its standard error are in bits per byte.

    nats: float32 (n, T), of each target. row_bits, row_bytes: (n,), special tokens in neither.
    """

    bpb: float
    stderr: float
    nats: np.ndarray
    row_bits: np.ndarray
    row_bytes: np.ndarray


def select_rows(rows, chosen, row_seconds, budget):
    """The rows (n, T + 1) that are scored, spread evenly over all `rows`.

    chosen: "" for all; a number; or "auto": as many as are scored in time, where a row takes `row_seconds`, and at
    least LEAST_ROWS. The first run of a session chooses for all that come after it.
    """
    if chosen == "auto":
        chosen = max(LEAST_ROWS, min(SECONDS, SHARE * budget) / max(row_seconds, 1e-9))
    count = min(len(rows), int(chosen or len(rows)))
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]


def evaluate_bpb(model, rows, tokenizer, batch_size):
    """Bits per byte of `model` on rows uint16 (n, T + 1): the summed bits of all targets over their UTF-8 bytes.

    model: from token ids int32 (b, T) to logits (b, T, vocab_size). It sees ids and nothing else; log-softmax and loss
    are computed here, in float32. rows: see `select_rows`; every rank of a group scores its part.
    batch_size: rows handed to the model at once.

    Returns an `Evaluation`. Raises `Refused` where the answers are no distributions.
    """
    mine = np.arange(len(rows)) // batch_size % devices.SIZE == devices.RANK
    nats = np.zeros((len(rows), rows.shape[1] - 1), np.float32)
    with evaluation_mode(model), devices.agreement(Refused):
        if mine.any():
            nats[mine] = score_rows(model, rows[mine], tokenizer, batch_size)
    nats, counted = devices.all_sum(nats), tokenizer.token_bytes[rows[:, 1:]]
    row_bits = nats.sum(axis=1, dtype=np.float64, where=counted > 0) / math.log(2)
    row_bytes = counted.sum(axis=1, dtype=np.int64)
    return Evaluation(*bits_per_byte(row_bits, row_bytes), nats, row_bits, row_bytes)


def bits_per_byte(bits, size):
    """The ratio of sums and its standard error, rows as the independent unit (delta method).

    bits: float (n,), loss of each row. size: int (n,), bytes of each row.
    """
    bpb = bits.sum() / size.sum()
    residual = bits - bpb * size
    n = len(bits)
    stderr = math.sqrt(n / (n - 1) * (residual**2).sum()) / size.sum() if n > 1 else math.nan
    return float(bpb), float(stderr)


@functools.cache
def compute_streams():
    """The MLX streams that independent pieces of work are spread over.

    One on a GPU. On a CPU one a core: MLX runs element-wise work on a single thread a stream. They
    work at one time only where it walks graphs breadth first: MLX_BFS_MAX_WIDTH, see trainer.py.
    """
    if mx.default_device().type == mx.gpu:
        return [mx.default_stream(mx.gpu)]
    return [mx.new_stream(mx.cpu) for _ in range(min(len(machine.cores()), 16))]


@contextmanager
def evaluation_mode(model):
    """Dropout and the like are off within it."""
    training = getattr(model, "training", False)
    try:
        yield model.eval() if training else None
    finally:
        if training:
            model.train()


def score_rows(model, rows, tokenizer, batch_size):
    """Nats float32 (n, T) of the targets of rows uint16 (n, T + 1), those of special tokens included."""
    nats = nats_of(model, rows[:, :-1], rows[:, 1:, None], tokenizer.vocab_size, batch_size)[..., 0]
    finite(nats)
    return nats


def nats_of(model, ids, tokens, vocab_size, batch_size):
    """What some tokens cost at each position: -log p in nats, float32 (n, T, k).

    ids: (n, T). tokens: (n, T, k). Batches all have `batch_size` rows, the last one filled up with rows that are not
    counted: a new shape may mean new kernels. Raises `Refused` where a logit is not a number.
    """
    n, whole = len(ids), -(-len(ids) // batch_size) * batch_size
    ids, tokens = (np.resize(x, (whole, *x.shape[1:])).astype(np.int32) for x in (ids, tokens))
    streams, ahead, found = compute_streams(), [], []
    for first in range(0, whole, batch_size * len(streams)):
        results = []
        for i, stream in enumerate(streams):
            part = slice(first + i * batch_size, first + (i + 1) * batch_size)
            if part.start < whole:
                with mx.stream(stream):
                    results.append(nats_of_batch(model, mx.array(ids[part]), mx.array(tokens[part]), vocab_size))
        mx.async_eval(results)  # together, or the streams would work one after the other
        found += [np.array(batch) for batch in ahead]
        ahead = results
    found = np.concatenate(found + [np.array(batch) for batch in ahead])[:n]
    finite(np.where(np.isinf(found), 0, found))
    return found


def nats_of_batch(model, ids, tokens, vocab_size):
    """-log softmax of the model's logits (b, T, vocab_size) for ids (b, T), at tokens (b, T, k), in float32."""
    logits, expected = model(ids), (*ids.shape, vocab_size)
    array = isinstance(logits, mx.array)
    if not array or logits.shape != expected or not mx.issubdtype(logits.dtype, mx.floating):
        got = f"{tuple(logits.shape)}, {logits.dtype}" if array else type(logits).__name__
        raise Refused(
            f"shape: the model returned {got}, expected an mx.array of floating-point logits (batch, positions, "
            f"vocabulary) = {expected}: for every position one number for every token."
        )
    logits = logits.astype(mx.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)  # or the sum below would be rounded away beside large ones
    return mx.stack([mx.fast.cross_entropy(logits, tokens[..., j]) for j in range(tokens.shape[-1])], axis=-1)


def finite(nats):
    """nats: (n, T) or (n, T, k), computed from all logits of a position; not finite where one of those is not."""
    if not np.isfinite(nats).all():
        row, position = np.argwhere(~np.isfinite(nats))[0][:2]
        raise Refused(
            f"finite: logits are not finite (position {position}, row {row}). Look for a division by zero, a root or "
            "logarithm of a negative number, a softmax with every entry masked, an overflow in float16."
        )
