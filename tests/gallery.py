"""Small models made of parts, to be asked by the leak checks: honest ones and leaking ones.

A `Mix` makes states (B, T, C) of states of the same shape. A model is made of mixes, each
followed by a small MLP, between an embedding and a head.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import prepare
from harness.leak_checks import LeakChecks

WIDTH = 32


def evaluate(model, tokenizer, batch_size=8, rows=None):
    """The `Evaluation` of a model on the validation rows, with all leak checks."""
    if rows is None:
        rows = rows_of(tokenizer)
    questions = LeakChecks(model, rows, tokenizer, batch_size)
    found = prepare.evaluate_bpb(model, rows, tokenizer, batch_size)
    questions.ask(found.nats)
    return found


def rows_of(tokenizer):
    return prepare.evaluation_rows(prepare.TokenCache.load(tokenizer.dataset), tokenizer.dataset)


def norm(x):
    return mx.fast.rms_norm(x, None, 1e-6)


def matrix(*shape, scale=1.0):
    return mx.random.normal(shape) * scale / math.sqrt(shape[-2])


class Answers(nn.Module):
    """A function from ids to logits, as the model that a run is handed."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def __call__(self, ids):
        return self.answer(ids)


class Network(nn.Module):
    """Embedding, mixes, head.

    mixes: kinds of `Mix`. Weights are random; `logit_scale` is about
    the standard deviation of the logits. All is computed in `dtype`.
    """

    def __init__(self, vocab_size, mixes, width=WIDTH, dtype=mx.float32, logit_scale=2.0, tied=False, seed=0):
        super().__init__()
        mx.random.seed(seed)
        self.embedding = mx.random.normal((vocab_size, width)).astype(dtype)
        self.mixes = [mix(width, dtype) for mix in mixes]
        self.mlps = [[matrix(width, 2 * width).astype(dtype), matrix(2 * width, width).astype(dtype)] for _ in mixes]
        self.head = self.embedding.T / math.sqrt(width) if tied else matrix(width, vocab_size).astype(dtype)
        self.head = (self.head * logit_scale).astype(dtype)

    def __call__(self, ids):
        x = self.embedding[ids]
        for mix, (up, down) in zip(self.mixes, self.mlps, strict=True):
            x = x + mix(norm(x), ids).astype(x.dtype)
            x = x + mx.maximum(norm(x) @ up, 0) @ down
        return norm(x) @ self.head


def later(T):
    """(T, T), whether the key's position is after the query's."""
    return mx.arange(T) > mx.arange(T)[:, None]


class Mix(nn.Module):
    """Random projections that a mix may use."""

    def __init__(self, width, dtype):
        super().__init__()
        self.width = width
        self.wq, self.wk, self.wv, self.wo = (matrix(width, width).astype(dtype) for _ in range(4))

    def qkv(self, x, heads=2):
        B, T, C = x.shape
        return [(x @ w).reshape(B, T, heads, C // heads).swapaxes(1, 2) for w in (self.wq, self.wk, self.wv)]

    def attend(self, x, mask, heads=2):
        """Attention with `mask`, as mx.fast.scaled_dot_product_attention takes it."""
        q, k, v = self.qkv(x, heads)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return y.swapaxes(1, 2).reshape(x.shape) @ self.wo


# --- honest mixes ----------------------------------------------------------------------------------


class Attention(Mix):
    def __call__(self, x, ids):
        return self.attend(x, "causal")


class Rope(Mix):
    """Rotary positions and QK-norm."""

    def __call__(self, x, ids):
        q, k, v = self.qkv(x)
        q, k = (mx.fast.rope(y, q.shape[-1], traditional=False, base=10000.0, scale=1.0, offset=0) for y in (q, k))
        y = mx.fast.scaled_dot_product_attention(norm(q), norm(k), v, scale=1.0, mask="causal")
        return y.swapaxes(1, 2).reshape(x.shape) @ self.wo


class SinkWindow(Mix):
    """A window of 8 positions and the very first one."""

    def __call__(self, x, ids):
        behind = mx.arange(x.shape[1])[:, None] - mx.arange(x.shape[1])
        return self.attend(x, (behind >= 0) & ((behind < 8) | (mx.arange(x.shape[1]) == 0)))


class Scan(Mix):
    """A state-space model: h = a h + b x, by doubling strides, as a parallel scan has it."""

    def __call__(self, x, ids):
        decay, state, stride = mx.sigmoid(x @ self.wk), x @ self.wv, 1
        while stride < x.shape[1]:
            earlier = [mx.pad(y[:, :-stride], [(0, 0), (stride, 0), (0, 0)]) for y in (decay, state)]
            state = state + decay * earlier[1]
            decay, stride = decay * earlier[0], 2 * stride
        return state @ self.wo


class CausalConvolution(Mix):
    """Each channel over the last four positions, padded on the left."""

    def __call__(self, x, ids):
        return mx.conv1d(mx.pad(x, [(0, 0), (3, 0), (0, 0)]), self.wk[:, :4, None], groups=self.width) @ self.wo


class PaddedSpectrum(Mix):
    """A filter as long as the row, by an FFT of twice the length. Rounding spreads over all of time."""

    def filter(self, T):
        return mx.exp(-mx.arange(T)[:, None] / (2 + 4 * mx.arange(self.width))) * self.wk[:1].astype(mx.float32)

    def __call__(self, x, ids):
        T = x.shape[1]
        spectra = [mx.fft.rfft(y, n=2 * T, axis=-2) for y in (x.astype(mx.float32), self.filter(T))]
        return mx.fft.irfft(spectra[0] * spectra[1], n=2 * T, axis=-2)[:, :T].astype(x.dtype) @ self.wo


class Experts(Mix):
    """Four experts, of which each token takes the one that its own state points to."""

    def __call__(self, x, ids):
        scores = mx.softmax((x @ self.wq)[..., :4].astype(mx.float32), axis=-1)
        choice, outputs = mx.argmax(scores, axis=-1), [x @ w for w in (self.wk, self.wv, self.wo, self.wq)]
        weight = mx.where(mx.arange(4) == choice[..., None], scores, 0).astype(x.dtype)
        return sum(weight[..., i : i + 1] * y for i, y in enumerate(outputs))


class SortedExperts(Mix):
    """The same, computed for the tokens of all rows sorted by expert, and sorted back."""

    def __call__(self, x, ids):
        tokens = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        choice = mx.argmax((tokens @ self.wq)[:, :4], axis=-1).astype(mx.uint32)
        order = mx.argsort(choice)
        experts = mx.stack([self.wk, self.wv, self.wo, self.wq]).astype(mx.float32)
        # Not tokens[order][:, None]: from such a view MLX 0.32 on CUDA takes wrong rows, and `rows` refuses it.
        each = tokens[order].reshape(-1, 1, x.shape[-1])
        y = mx.gather_mm(each, experts, rhs_indices=choice[order], sorted_indices=True)
        return y.reshape(tokens.shape)[mx.argsort(order)].reshape(x.shape)


class MeanSoFar(Mix):
    """Normalised by mean and variance of all positions so far."""

    def __call__(self, x, ids):
        count, x32 = mx.arange(1, x.shape[1] + 1)[:, None], x.astype(mx.float32)
        mean, square = (mx.cumsum(y, axis=1) / count for y in (x32, x32 * x32))
        return ((x32 - mean) * mx.rsqrt(square - mean * mean + 0.01)).astype(x.dtype) @ self.wo


class BlocksSoFar(Mix):
    """The mean of the last block of 8 that is complete."""

    def __call__(self, x, ids):
        B, T, C = x.shape
        blocks = T // 8
        means = x[:, : 8 * blocks].reshape(B, blocks, 8, C).mean(axis=2)
        before = mx.concatenate([mx.zeros((B, 1, C), x.dtype), means], axis=1)
        return before[:, mx.arange(T) // 8] @ self.wo


class GatedChunks(Mix):
    """Gated linear attention in chunks of 16. Decays are taken from its end: they cancel, but for rounding."""

    def __call__(self, x, ids):
        B, T, C = x.shape
        q, k, decay = ((x @ w)[..., :8].reshape(B, -1, 16, 8) for w in (self.wk, self.wq, self.wo))
        v, total = (x @ self.wv).reshape(B, -1, 16, C), mx.cumsum(-0.3 * mx.sigmoid(decay), axis=2)
        end, state, chunks = total[:, :, -1:], 0, []
        scores = (q * mx.exp(total - end)) @ (k * mx.exp(end - total)).swapaxes(2, 3)
        inner = mx.where(later(16), 0, scores) @ v
        for i in range(T // 16):
            outer = (q[:, i] * mx.exp(total[:, i])) @ state if i else 0
            chunks.append(inner[:, i] + outer)
            added = (k * mx.exp(end - total))[:, i].swapaxes(1, 2) @ v[:, i]
            state = mx.exp(end[:, i]).swapaxes(1, 2) * state + added
        return mx.concatenate(chunks, axis=1) / 4 @ self.wo


HONEST = [
    Attention, Rope, SinkWindow, Scan, CausalConvolution, PaddedSpectrum, Experts, SortedExperts,
    MeanSoFar, BlocksSoFar, GatedChunks,
]  # fmt: skip


# --- a model that has learnt something -------------------------------------------------------------


def bigram(tokenizer):
    """Logits from counts of pairs in the training split: a model whose probabilities mean something."""
    vocab_size, tokens = tokenizer.vocab_size, prepare.TokenCache.load(tokenizer.dataset).tokens("train").astype(int)
    counts = np.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2).reshape(vocab_size, -1)
    unigram = (np.bincount(tokens, minlength=vocab_size) + 0.1) / len(tokens)
    table = mx.array(np.log(counts + 4 * unigram), mx.float32)
    return Answers(lambda ids: table[ids])


# --- mixes that see later tokens ----------------------------------------------------------------------


class NoMask(Mix):
    def __call__(self, x, ids):
        return self.attend(x, None)  # not causal in mx.fast


class OneTooMany(Mix):
    def __call__(self, x, ids):
        T = x.shape[1]
        return self.attend(x, mx.arange(T) <= mx.arange(T)[:, None] + 1)


class Beyond1024(Mix):
    """Causal at every length that is tried out by hand."""

    def __call__(self, x, ids):
        following = mx.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)])
        return mx.where(mx.arange(x.shape[1])[:, None] >= 1024, following, x) @ self.wo


class Prefix(Mix):
    """The first quarter sees itself whole, as the prompt of a prefix language model does."""

    def __call__(self, x, ids):
        T = x.shape[1]
        return self.attend(x, ~later(T) | (mx.maximum(mx.arange(T), mx.arange(T)[:, None]) < T // 4))


class BlockAverage(Mix):
    size = 16

    def __call__(self, x, ids):
        B, T, C = x.shape
        means = x.reshape(B, T // self.size, self.size, C).mean(axis=2, keepdims=True)
        return mx.broadcast_to(means, (B, T // self.size, self.size, C)).reshape(x.shape) @ self.wo


class ChunkedState(Mix):
    """A state for every chunk of 32, which holds the chunk itself when the chunk is decoded."""

    def __call__(self, x, ids):
        B, T, C = x.shape
        states = mx.cumsum(mx.tanh(x @ self.wv).reshape(B, T // 32, 32, C).sum(axis=2), axis=1)
        return mx.repeat(states, 32, axis=1) @ self.wo


class ChunkEnds(Mix):
    """Only the last position of a chunk sees one token too many."""

    size = 16

    def __call__(self, x, ids):
        following = mx.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)])
        return mx.where(mx.arange(1, x.shape[1] + 1)[:, None] % self.size == 0, following, x) @ self.wo


class CircularSpectrum(PaddedSpectrum):
    """No padding: what is filtered at the end comes round to the beginning."""

    def __call__(self, x, ids):
        spectra = [mx.fft.rfft(y, axis=-2) for y in (x, self.filter(x.shape[1]))]
        return mx.fft.irfft(spectra[0] * spectra[1], n=x.shape[1], axis=-2) @ self.wo


class ShiftByMinusOne(Mix):
    def __call__(self, x, ids):
        return mx.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)]) @ self.wo


class FarAhead(Mix):
    """Sees one token, 20 positions ahead."""

    def __call__(self, x, ids):
        return mx.pad(x[:, 20:], [(0, 0), (0, 20), (0, 0)]) @ self.wo


class NormOverTime(Mix):
    def __call__(self, x, ids):
        return (x - x.mean(axis=1, keepdims=True)) * mx.rsqrt(x.var(axis=1, keepdims=True) + 1e-5) @ self.wo


class ScaleOverTime(Mix):
    """The largest value of all positions is the unit, as when activations are quantised row by row."""

    def __call__(self, x, ids):
        return x / mx.abs(x).max(axis=1, keepdims=True) @ self.wo


class LastToken(Mix):
    """All positions see the row's last token, so that whatever is exchanged, they move as much."""

    def __call__(self, x, ids):
        return mx.broadcast_to(x[:, -1:], x.shape) @ self.wo


class ExpertsChoose(Mix):
    """Each expert takes the quarter of the row's tokens that it likes best."""

    def __call__(self, x, ids):
        scores = (x @ self.wq)[..., :2]
        bound = mx.sort(scores, axis=1)[:, -x.shape[1] // 4]
        taken = (scores >= bound[:, None]) * mx.sigmoid(scores)
        return taken[..., :1] * (x @ self.wk) + taken[..., 1:] * (x @ self.wv)


SEES_LATER = {  # name: the mixes of a `Network`
    "attention without a mask": [NoMask],
    "a mask that is one too wide": [OneTooMany],
    "one layer of three without a mask": [Attention, NoMask, Attention],
    "a prefix that sees itself": [Prefix],
    "averages over blocks of 16": [BlockAverage],
    "a recurrent state over the whole chunk": [ChunkedState],
    "one token more at the ends of chunks": [Attention, ChunkEnds],
    "a circular spectral filter": [CircularSpectrum],
    "a token shift by minus one": [ShiftByMinusOne],
    "a token far ahead": [FarAhead],
    "normalised over time": [NormOverTime],
    "scaled by the largest of all times": [ScaleOverTime],
    "the last token of the row": [LastToken],
    "experts that choose tokens": [Attention, ExpertsChoose],
}


# --- models that know other rows, or earlier calls ---------------------------------------------------------


class BatchStatistics(Mix):
    def __call__(self, x, ids):
        return (x - x.mean(axis=(0, 1))) * mx.rsqrt(x.var(axis=(0, 1)) + 1e-5) @ self.wo


class RowAbove(Mix):
    def __call__(self, x, ids):
        return mx.roll(x, 1, axis=0) @ self.wo


class SharedCapacity(Mix):
    """An expert with room for a quarter of the batch: the tokens that it likes best."""

    def __call__(self, x, ids):
        score = (x @ self.wq)[..., :1]
        bound = mx.sort(score.reshape(-1))[-score.size // 4]
        return mx.where(score >= bound, x @ self.wk, 0)


class RowNumber(Mix):
    def __call__(self, x, ids):
        return x * mx.arange(1, len(x) + 1)[:, None, None] @ self.wo


class Calls(Mix):
    """Knows how often it was called."""

    count = 0

    def __call__(self, x, ids):
        self.count += 1
        return x @ self.wo * (1 + 0.3 * self.count)


class CarriedState(Mix):
    """What the last call ended with is where the next one begins."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._last = mx.zeros(1)

    def __call__(self, x, ids):
        y, self._last = x + self._last, mx.stop_gradient(x[-1:, -1:])
        return y @ self.wo


class Dropout(Mix):
    """Home-made, and never switched off."""

    def __call__(self, x, ids):
        return x * mx.random.bernoulli(0.8, x.shape) @ self.wo


class StochasticDepth(Mix):
    """Leaves a layer out, now and then, for all rows of a call."""

    def __call__(self, x, ids):
        return x @ self.wo * (mx.random.uniform() > 0.2)


class Memory(nn.Module):
    """Remembers every row that it is shown, and knows how it goes on when it is shown again."""

    def __init__(self, vocab_size):
        super().__init__()
        self.inner, self._seen = Network(vocab_size, [Attention]), {}

    def __call__(self, ids):
        rows, size = np.array(ids), self.inner.head.shape[1]
        known = np.stack([self._seen.get(row[:8].tobytes(), np.full_like(row, size)) for row in rows])
        for row in rows:
            self._seen[row[:8].tobytes()] = np.append(row[1:], size)
        return self.inner(ids) + 5 * (mx.arange(size) == mx.array(known)[..., None])


class LearnsWhileEvaluating(nn.Module):
    """A step of gradient descent on every batch."""

    def __init__(self, vocab_size):
        super().__init__()
        self.bias = mx.zeros(vocab_size)

    def __call__(self, ids):
        logits = mx.broadcast_to(self.bias, (*ids.shape, len(self.bias)))
        share = (mx.arange(len(self.bias)) == ids[..., None]).mean(axis=(0, 1))
        self.bias = self.bias + 0.1 * (share - mx.softmax(self.bias))
        return logits


class UpdatesInPlace(LearnsWhileEvaluating):
    """A running statistic of no consequence."""

    def __call__(self, ids):
        self.bias[0] = self.bias[0] + 1e-7
        return mx.zeros((*ids.shape, len(self.bias)))


class SnapshotEnsemble(nn.Module):
    """Puts each member's weights in place, inside of the call; the last one's stay."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = mx.zeros((vocab_size, vocab_size))
        self._members = [mx.random.normal(self.table.shape, key=mx.random.key(n)) for n in range(3)]

    def __call__(self, ids):
        logits = 0
        for member in self._members:
            self.table = member
            logits = logits + self.table[ids]
        return logits


class RunningMean(nn.Module):
    """A running mean that is updated in evaluation, slowly."""

    def __init__(self, vocab_size):
        super().__init__()
        self.inner, self._mean = Network(vocab_size, [Attention]), mx.zeros(vocab_size)

    def __call__(self, ids):
        logits = self.inner(ids)
        self._mean = 0.99 * self._mean + 0.01 * mx.stop_gradient(logits.mean(axis=(0, 1)))
        return logits - self._mean


OTHERS = {  # name: (the check that refuses it, how to make it)
    "statistics of the batch": ("rows", lambda V: Network(V, [BatchStatistics])),
    "the row above": ("rows", lambda V: Network(V, [RowAbove])),
    "experts with a shared capacity": ("rows", lambda V: Network(V, [SharedCapacity])),
    "a row's number": ("rows", lambda V: Network(V, [RowNumber])),
    "a count of calls": ("state", lambda V: Network(V, [Calls])),
    "a state carried on": ("state", lambda V: Network(V, [CarriedState])),
    "dropout that stays on": ("state", lambda V: Network(V, [Dropout])),
    "stochastic depth": ("state", lambda V: Network(V, [Attention, StochasticDepth], seed=3)),
    "a running mean": ("state", RunningMean),
    "a snapshot ensemble": ("state", SnapshotEnsemble),
    "a cache that memorises": ("state", Memory),
    "learns while evaluating": ("state", LearnsWhileEvaluating),
    "a parameter updated in place": ("state", UpdatesInPlace),
}
