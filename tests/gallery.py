"""Small models made of parts, to be examined: the honest parts here, the cheating ones in test_cheats.py.

A `mix` is a function from states (B, T, C) to states of the same shape. A model is made of mixes, each
followed by a small MLP, between an embedding and a head.
"""

import math

import mlx.core as mx
import numpy as np

WIDTH = 32


def norm(x):
    return mx.fast.rms_norm(x, None, 1e-6)


def matrix(*shape, scale=1.0):
    return mx.random.normal(shape) * scale / math.sqrt(shape[-2])


class Network:
    """A callable and no more: embedding, mixes, head.

    mixes: functions mix(x, ids) of states (B, T, width). Weights are random; `logit_scale` is about
    the standard deviation of the logits. All is computed in `dtype`.
    """

    def __init__(self, vocab_size, mixes, width=WIDTH, dtype=mx.float32, logit_scale=2.0, tied=False, seed=0):
        mx.random.seed(seed)
        self.embedding = mx.random.normal((vocab_size, width)).astype(dtype)
        self.mixes = [mix(width, dtype) if isinstance(mix, type) else mix for mix in mixes]
        self.mlps = [(matrix(width, 2 * width).astype(dtype), matrix(2 * width, width).astype(dtype)) for _ in mixes]
        self.head = self.embedding.T / math.sqrt(width) if tied else matrix(width, vocab_size).astype(dtype)
        self.head = (self.head * logit_scale).astype(dtype)

    def parameters(self):
        return {"embedding": self.embedding, "mlps": self.mlps, "head": self.head}

    def hidden(self, ids):
        x = self.embedding[ids]
        for mix, (up, down) in zip(self.mixes, self.mlps, strict=True):
            x = x + mix(norm(x), ids).astype(x.dtype)
            x = x + mx.maximum(norm(x) @ up, 0) @ down
        return norm(x)

    def __call__(self, ids):
        return self.hidden(ids) @ self.head


def later(T):
    """(T, T), whether the key's position is after the query's."""
    return mx.arange(T) > mx.arange(T)[:, None]


class Mix:
    """Random projections that a mix may use."""

    def __init__(self, width=WIDTH, dtype=mx.float32):
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


class GroupedHeads(Mix):
    """Two query heads share one head of keys and values."""

    def __call__(self, x, ids):
        q, k, v = self.qkv(x, 4)
        y = mx.fast.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], scale=0.3, mask="causal")
        return y.swapaxes(1, 2).reshape(x.shape) @ self.wo


class SinkWindow(Mix):
    """A window of 8 positions and the very first one."""

    def __call__(self, x, ids):
        behind = mx.arange(x.shape[1])[:, None] - mx.arange(x.shape[1])
        return self.attend(x, (behind >= 0) & ((behind < 8) | (mx.arange(x.shape[1]) == 0)))


class LinearAttention(Mix):
    """Running sums of keys times values, no softmax."""

    def __call__(self, x, ids):
        q, k, v = (mx.maximum(x @ w, 0) + 0.01 for w in (self.wq, self.wk, self.wv))
        kv = mx.cumsum(k[..., :8, None] * v[..., None, :], axis=1)
        return (q[..., None, :8] @ kv)[..., 0, :] / (q[..., :8] * mx.cumsum(k[..., :8], axis=1)).sum(-1, keepdims=True)


class Scan(Mix):
    """A state-space model: h = a h + b x, by doubling strides, as a parallel scan has it."""

    def __call__(self, x, ids):
        decay, state, stride = mx.sigmoid(x @ self.wk), x @ self.wv, 1
        while stride < x.shape[1]:
            earlier = [mx.pad(y[:, :-stride], [(0, 0), (stride, 0), (0, 0)]) for y in (decay, state)]
            state = state + decay * earlier[1]
            decay, stride = decay * earlier[0], 2 * stride
        return state @ self.wo


class Recurrence(Mix):
    """The same, one position after the other."""

    def __call__(self, x, ids):
        decay, inner, state, states = mx.sigmoid(x @ self.wk), x @ self.wv, 0, []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + (1 - decay[:, t]) * mx.tanh(inner[:, t])
            states.append(state)
        return mx.stack(states, axis=1) @ self.wo


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


class TokenShift(Mix):
    """Half of the channels come from the position before."""

    def __call__(self, x, ids):
        before = mx.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)])
        return mx.concatenate([before[..., : self.width // 2], x[..., self.width // 2 :]], axis=-1) @ self.wo


class RunningMean(Mix):
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


class BlockSpectrum(PaddedSpectrum):
    """A filter of 16 by FFTs of 32, block by block; what hangs over is added to the next block."""

    def __call__(self, x, ids):
        blocks = x.astype(mx.float32).reshape(len(x), -1, 16, self.width)
        spectra = [mx.fft.rfft(y, n=32, axis=-2) for y in (blocks, self.filter(16))]
        y = mx.fft.irfft(spectra[0] * spectra[1], n=32, axis=-2)
        y = y[:, :, :16] + mx.pad(y[:, :-1, 16:], [(0, 0), (1, 0), (0, 0), (0, 0)])
        return y.reshape(x.shape).astype(x.dtype) @ self.wo


class Gate(Mix):
    """No mixing over time at all."""

    def __call__(self, x, ids):
        return mx.sigmoid(x @ self.wk) * (x @ self.wv)


HONEST = [
    Attention, Rope, GroupedHeads, SinkWindow, LinearAttention, Scan, CausalConvolution, PaddedSpectrum, Experts,
    SortedExperts, TokenShift, RunningMean, BlocksSoFar, GatedChunks, BlockSpectrum, Gate,
]  # fmt: skip


# --- a model that has learnt something -------------------------------------------------------------


def bigram(cache, vocab_size, dtype=mx.float32):
    """Logits from counts of pairs in the training split: a model whose probabilities mean something."""
    tokens = cache.tokens("train").astype(np.int64)
    counts = np.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2).reshape(vocab_size, -1)
    unigram = (np.bincount(tokens, minlength=vocab_size) + 0.1) / len(tokens)
    table = mx.array(np.log(counts + 4 * unigram), dtype)
    return lambda ids: table[ids]
