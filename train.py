"""The experiment: model, optimizer, schedules and training loop. This is the file to edit.

    python train.py        (or `make run`, which also watches over it)

Data, the budget's clock, the metric and the record belong to prepare.py and are the same for
every experiment. The model follows karpathy/nanochat's GPT; the sources of single ideas are
named where they stand.
"""

import math
import os
from dataclasses import asdict, dataclass
from functools import partial

import prepare  # isort: skip  (first of all, so that start-up is timed from the beginning)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

GPU = mx.default_device().type == mx.gpu
CUDA = GPU and mx.cuda.is_available()
# MLX hands work to the GPU in pieces, and what a piece used is free again when all of it is done.
# With its own setting, a step that takes 2.7 GB on an H200 takes 6.2.
if CUDA:
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100")
# How MLX orders a graph: depth first, so that what nothing needs any more goes early; on a CPU breadth
# first, so that each of its streams has work from the beginning.
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1" if GPU else "1000")

# --- hyperparameters -----------------------------------------------------------------------------
# `a if GPU else b`: a for Metal and CUDA, b for a CPU, which sees a hundredth of the tokens.

DATASET = "stdlib"  # one of data_sources.DATASETS
SEQUENCE_LENGTH = prepare.get_dataset(DATASET).sequence_length  # tokens of context in training

DEPTH = 4 if GPU else 2  # layers
ASPECT_RATIO = 64 if GPU else 96  # width = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128 if GPU else 64
WINDOW_PATTERN = "SSSL" if GPU and not CUDA else "L"  # a layer each, repeated: S sees half the context, L all

TOTAL_BATCH_SIZE = 2**16 if GPU else 2**12  # tokens an optimizer step
DEVICE_BATCH_SIZE = (2**15 if GPU else 2**12) // SEQUENCE_LENGTH  # rows at once; lower it where memory is short
EVAL_BATCH_SIZE = max(1, DEVICE_BATCH_SIZE // 2)  # rows at once in evaluation, whose logits stand whole

MATRIX_LR = 0.03  # Muon, all matrices of the blocks
EMBEDDING_LR = 0.3  # AdamW, token and value embeddings (scaled with width, as the next)
HEAD_LR = 0.008  # AdamW, output head and value gates
X0_LR = 0.5  # AdamW, x0_lambdas
RESID_LR = 0.005  # AdamW, resid_lambdas
WEIGHT_DECAY = 0.1  # Muon; falls linearly to 0 over the budget
WARMDOWN = 0.5  # last share of the budget, in which learning rates fall linearly
FINAL_LR = 0.0  # ... to this share of their value

COMPUTE_DTYPE = mx.bfloat16 if GPU else mx.float32  # activations and products; weights stay float32
LOGITS_AT_ONCE = 2**26 if CUDA else 2**24 if GPU else 2**19  # elements of the logits that exist at one time in training
ATTENTION_BLOCK = None if CUDA else 512  # queries at once where attention has no fused backward

# --- model ---------------------------------------------------------------------------------------

SOFTCAP = 15.0  # logits are bounded to ±SOFTCAP (Gemma 2, arXiv:2408.00118)
GATE_CHANNELS = 32  # leading channels of the residual stream that the value gate looks at


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    sequence_length: int
    depth: int = DEPTH
    n_head: int = -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
    head_dim: int = HEAD_DIM
    window_pattern: str = WINDOW_PATTERN

    @property
    def n_embd(self):
        return self.n_head * self.head_dim

    def window(self, layer):
        """How many positions a query of this layer sees, its own included."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer < self.depth - 1
        return self.sequence_length // 2 if short else self.sequence_length

    def has_value_embedding(self, layer):
        """Every other layer, the last one always."""
        return layer % 2 == (self.depth - 1) % 2


def norm(x):
    """RMS norm over the last axis, without weights (arXiv:1910.07467)."""
    return mx.fast.rms_norm(x, None, 1e-6)


class Linear(nn.Module):
    """x @ weight.T with a float32 weight (out, in), in the precision of x.

    stack: so many matrices (stack, out, in) take one product; their outputs stand side by side.
    """

    def __init__(self, n_in, n_out, init=None, stack=None):
        super().__init__()
        shape = (stack, n_out, n_in) if stack else (n_out, n_in)
        bound = (3 / n_in) ** 0.5  # uniform of standard deviation n_in^-0.5
        self.weight = mx.random.uniform(-bound, bound, shape) if init is None else init(shape)

    def __call__(self, x):
        return x @ self.weight.reshape(-1, x.shape[-1]).astype(x.dtype).T


class Embedding(nn.Module):
    """Rows of a float32 weight (vocab, channels), in COMPUTE_DTYPE."""

    def __init__(self, vocab_size, n_embd, init):
        super().__init__()
        self.weight = init((vocab_size, n_embd))

    def __call__(self, tokens):
        return self.weight[tokens].astype(COMPUTE_DTYPE)


def attention(q, k, v, window):
    """Causal attention; a query sees the `window` latest positions, its own included.

    q, k, v: (B, heads, T, head_dim), returns the same. Where the backward pass is not fused, the
    T × T scores would stand in memory: queries then go in blocks, each with only the keys it
    sees, and a block's scores are computed anew in the backward pass instead of kept.
    """
    length, scale = q.shape[2], q.shape[3] ** -0.5
    attend = partial(mx.fast.scaled_dot_product_attention, scale=scale)
    block = ATTENTION_BLOCK or length
    if window >= length and length <= block:
        return attend(q, k, v, mask="causal")
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        first = max(0, start - window + 1)
        mask = "causal"  # aligned to the last key
        if end > window:
            behind = mx.arange(start, end)[:, None] - mx.arange(first, end)
            mask = (behind >= 0) & (behind < window)
        q_block, k_block, v_block = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        outputs.append(mx.checkpoint(partial(attend, mask=mask))(q_block, k_block, v_block))
    return mx.concatenate(outputs, axis=2)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        n = config.n_embd
        self.qk, self.v = Linear(n, n, stack=2), Linear(n, n)
        self.out = Linear(n, n, mx.zeros)
        if config.has_value_embedding(layer):
            bound = (3 / n) ** 0.5
            self.value_embedding = Embedding(config.vocab_size, n, partial(mx.random.uniform, -bound, bound))
            self.value_gate = Linear(GATE_CHANNELS, config.n_head, mx.zeros)
        self._heads, self._window = config.n_head, config.window(layer)

    def __call__(self, x, tokens):
        B, T, C = x.shape
        qk, v = (linear(x).reshape(B, T, -1, C // self._heads) for linear in (self.qk, self.v))
        if "value_embedding" in self:  # arXiv:2410.17897, gated per head
            gate = 2 * mx.sigmoid(self.value_gate(x[..., :GATE_CHANNELS]))
            v = v + gate[..., None] * self.value_embedding(tokens).reshape(v.shape)
        qk, v = norm(qk).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # QK-norm: arXiv:2010.04245
        qk = mx.fast.rope(qk, dims=qk.shape[-1], traditional=False, base=10000.0, scale=1.0, offset=0)
        y = attention(*mx.split(qk, 2, axis=1), v, self._window)
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, T, C))


@mx.custom_function
def relu_squared(x):
    """max(x, 0)² (arXiv:2109.08668). Its gradient needs only the result, so x need not be kept."""
    return mx.square(mx.maximum(x, 0))


@relu_squared.vjp
def relu_squared_vjp(x, cotangent, output):
    return 2 * mx.sqrt(output) * cotangent


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd, mx.zeros)

    def __call__(self, x):
        return self.down(relu_squared(self.up(x)))


@mx.custom_function
def mix(x, x0, a, b):
    """a * x + b * x0 for a and b of shape (1,): the sum is taken in float32, the result has the precision of x."""
    return (a * x + b * x0).astype(x.dtype)


@mix.vjp
def mix_vjp(primals, cotangent, output):
    x, x0, a, b = primals
    scalars = [(cotangent * y).astype(mx.float32).sum().reshape(1) for y in (x, x0)]
    # Derived automatically, these sums would come last and keep x in float32 until then.
    gradient = mx.depends(cotangent, scalars)
    return (a * gradient).astype(x.dtype), (b * gradient).astype(x.dtype), *scalars


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention, self.mlp = Attention(config, layer), MLP(config)

    def __call__(self, x, tokens):
        x = x + self.attention(norm(x), tokens)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        n, vocab = config.n_embd, config.vocab_size
        # MLX works towards the gradients in this order: with these two last, a step takes 2 to 4 % more memory.
        self.resid_lambdas = mx.ones(config.depth)
        self.x0_lambdas = mx.full(config.depth, 0.1)
        self.token_embedding = Embedding(vocab, n, mx.random.normal)
        self.blocks = [Block(config, layer) for layer in range(config.depth)]
        self.head = Linear(n, vocab, partial(mx.random.normal, scale=0.001))

    def hidden(self, tokens):
        """Final normalised states (B, T, n_embd) for token ids (B, T)."""
        x = x0 = norm(self.token_embedding(tokens))
        lambdas = (mx.split(y, len(self.blocks)) for y in (self.resid_lambdas, self.x0_lambdas))
        for block, resid_lambda, x0_lambda in zip(self.blocks, *lambdas, strict=True):
            x = block(mix(x, x0, resid_lambda, x0_lambda), tokens)
        return norm(x)

    def __call__(self, tokens):
        """Soft-capped logits (B, T, vocab_size), float32, for token ids (B, T)."""
        return capped(self.head(self.hidden(tokens)))[0]


def exp(x):
    """e^x for |x| < 80. MLX's own takes four times as long on a CPU, where it decides the speed of the
    head; this one (2^i times a polynomial for 2^f, i + f = x / ln 2) has a relative error of 4e-6.
    """
    if GPU:
        return mx.exp(x)
    x = x * 1.4426950408889634
    i = mx.round(x)
    f = x - i
    power = 1 + f * (0.6931472 + f * (0.2402265 + f * (0.0555041 + f * (0.0096181 + f * 0.0013333))))
    return power * mx.view((i.astype(mx.int32) + 127) << 23, mx.float32)


def sigmoid(x):
    if GPU:
        return mx.sigmoid(x)
    return 1 / (exp(mx.clip(-x, -16, 16)) + 1)


def capped(logits):
    """The logits softly capped, e to their power, and the slope of the cap; all float32.

    SOFTCAP * tanh(x / SOFTCAP) is SOFTCAP * (2 * s - 1) for s = sigmoid(2 * x / SOFTCAP).
    """
    s = sigmoid((2 / SOFTCAP) * logits.astype(mx.float32))
    cap = 2 * SOFTCAP * s - SOFTCAP
    return cap, exp(cap), 4 * s * (1 - s)


def loss_fn(model, tokens):
    """Mean cross-entropy in nats. tokens: (B, T + 1); column t + 1 is the target of column t."""
    hidden = model.hidden(tokens[:, :-1])
    return head_loss(hidden.reshape(-1, hidden.shape[-1]), model.head.weight, tokens[:, 1:].reshape(-1))


def head_loss(hidden, weight, targets):
    """Mean cross-entropy of the soft-capped logits hidden @ weight.T against targets.

    The logits are made, used and dropped a chunk at a time, and their gradient is taken at once,
    so they never stand whole in memory, and the backward pass repeats no product. The soft cap
    bounds them, so no maximum needs to be subtracted before the exponential.
    hidden: (N, n_embd); weight: (vocab_size, n_embd); targets: (N,).
    """
    n, vocab = len(targets), weight.shape[0]
    rows = max(1, min(n, LOGITS_AT_ONCE // vocab))

    @mx.custom_function
    def loss_and_gradients(hidden, weight):
        losses, hidden_gradients = [], []
        w, weight_gradient = weight.astype(hidden.dtype), mx.zeros(weight.shape)
        for start in range(0, n, rows):
            h, target = hidden[start : start + rows], targets[start : start + rows, None]
            # One chunk after the other: all that is taken from one comes before the next.
            h = mx.depends(h, [weight_gradient, *hidden_gradients[-1:]])
            logits = h @ w.T
            _, exps, slopes = capped(logits)
            if GPU:  # where to compute them twice costs less than to keep them: one kernel adds up a row's quarters
                quarters = mx.split(logits, math.gcd(vocab, 4), axis=1)
                total = sum(capped(quarter)[1] for quarter in quarters).sum(axis=1, keepdims=True)
            else:
                total = exps.sum(axis=1, keepdims=True)
            of_target, exp_of_target, slope = capped(mx.take_along_axis(logits, target, axis=1))
            losses.append(mx.log(total) - of_target)
            # The gradient times `total` (float16 could not hold it), by which the narrow arrays are divided instead.
            gradient, at_target = (exps * slopes).astype(h.dtype), ((exp_of_target - total) * slope).astype(h.dtype)
            gradient = mx.put_along_axis(gradient, target, at_target, axis=1)
            hidden_gradients.append((gradient @ w / total).astype(h.dtype))
            weight_gradient = weight_gradient + gradient.T @ (h / total).astype(h.dtype)
        return mx.concatenate(losses).mean(), mx.concatenate(hidden_gradients), weight_gradient

    @loss_and_gradients.vjp
    def loss_vjp(primals, cotangents, outputs):
        scale = cotangents[0] / n
        return (scale * outputs[1]).astype(outputs[1].dtype), scale * outputs[2]

    return loss_and_gradients(hidden, weight)[0]


# --- optimizer -----------------------------------------------------------------------------------

# Five steps of the Polar Express (arXiv:2505.16932), coefficients for a bound of 1.02 on the norm.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices):
    """The nearest semi-orthogonal matrix to each of a stack (n, rows, columns), rows <= columns, approximately."""
    x = matrices.astype(COMPUTE_DTYPE)
    x = x / (1.02 * mx.sqrt(mx.square(matrices).sum(axis=(1, 2), keepdims=True)) + 1e-6).astype(x.dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.swapaxes(1, 2)
        x = mx.addmm(x, mx.addmm(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x.astype(mx.float32)


def is_tall(parameter):
    """Whether a matrix, or each of a stack, has at least as many rows as columns."""
    return parameter.shape[-2] >= parameter.shape[-1]


class Muon(optim.Optimizer):
    """Momentum, orthogonalised, with normalised rows and cautious decay, as upstream has it.

    Muon (kellerjordan.github.io/posts/muon), a second moment for each row or column after
    orthogonalisation (NorMuon, arXiv:2510.05491), decoupled decay where update and weight agree
    in sign (arXiv:2510.12402). A parameter is a matrix (rows, columns) or a stack of them
    (n, rows, columns). Matrices of one shape, tall ones transposed, are updated together as one
    stack, and the stacks are spread over `streams`.
    """

    def __init__(self, learning_rate, weight_decay, momentum=0.95, beta2=0.95, streams=None):
        super().__init__()
        self.streams = streams or [mx.default_stream(mx.default_device())]
        self.state["learning_rate"] = mx.array(learning_rate)
        self.state["weight_decay"] = mx.array(weight_decay)
        self.state["momentum"] = mx.array(momentum)
        self.beta2 = beta2

    def init(self, parameters):
        for name, stack in self._stacks(parameters).items():
            n, rows, columns = self._wide([p for _, p in stack]).shape
            self.state[name] = {"momentum": mx.zeros((n, rows, columns)), "second_moment": mx.zeros((n, 1, columns))}
        self._initialized = True

    @staticmethod
    def _stacks(tree):
        """{"rows x columns": [(path, parameter), …]} of a parameter tree, rows <= columns."""
        stacks = {}
        for path, parameter in tree_flatten(tree):
            stacks.setdefault("x".join(map(str, sorted(parameter.shape[-2:]))), []).append((path, parameter))
        return stacks

    @staticmethod
    def _wide(parameters):
        """All matrices of some parameters in one array (n, rows, columns), rows <= columns."""
        wide = [p.swapaxes(-1, -2) if is_tall(p) else p for p in parameters]
        return mx.concatenate([p.reshape(-1, *p.shape[-2:]) for p in wide])

    def apply_gradients(self, gradients, parameters):
        if not self._initialized:
            self.init(gradients)
        self.state["step"] = self.step + 1
        weights, updated = dict(tree_flatten(parameters)), []
        for i, (name, stack) in enumerate(self._stacks(gradients).items()):
            with mx.stream(self.streams[i % len(self.streams)]):
                paths, gradient = [path for path, _ in stack], self._wide([g for _, g in stack])
                old = [weights[path] for path in paths]
                sizes = [math.prod(p.shape[:-2]) for p in old]
                scales = [max(1, p.shape[-2] / p.shape[-1]) ** 0.5 for p in old]
                rate = self.learning_rate * mx.array(np.repeat(scales, sizes))[:, None, None]
                new = self._update(gradient, self._wide(old), rate, self.state[name])
                new = mx.split(new, np.cumsum(sizes)[:-1].tolist())
                for path, p, w in zip(paths, old, new, strict=True):
                    updated.append((path, (w.swapaxes(1, 2) if is_tall(p) else w).reshape(p.shape)))
        return tree_unflatten(updated)

    def _update(self, gradient, weight, rate, state):
        """New weights. gradient, weight: (n, rows, columns), rows <= columns; rate: (n, 1, 1)."""
        momentum = self.state["momentum"]
        state["momentum"] = momentum * state["momentum"] + (1 - momentum) * gradient
        update = orthogonalize(momentum * state["momentum"] + (1 - momentum) * gradient)  # Nesterov
        mean_square = mx.square(update).mean(axis=1, keepdims=True)
        second = state["second_moment"] = self.beta2 * state["second_moment"] + (1 - self.beta2) * mean_square
        # Divide by the root of the second moment, then restore the norm that the update had.
        scale = mx.rsqrt(mx.maximum(second, 1e-10))
        norms = [mx.sqrt(m.sum(axis=(1, 2), keepdims=True)) for m in (mean_square, mean_square * mx.square(scale))]
        update = update * (scale * norms[0] / mx.maximum(norms[1], 1e-10))
        return weight - rate * update - rate * self.state["weight_decay"] * weight * (update * weight >= 0)


GROUPS = ("matrices", "embeddings", "head", "x0", "resid")


def parameter_group(path, parameter):
    """Which of GROUPS a parameter belongs to. One that fits none is an error, not a fallback."""
    if path.startswith("token_embedding.") or ".value_embedding." in path:
        return "embeddings"
    if path.startswith("head.") or ".value_gate." in path:
        return "head"
    if path in ("x0_lambdas", "resid_lambdas"):
        return path.split("_")[0]
    if path.startswith("blocks.") and parameter.ndim in (2, 3):
        return "matrices"
    raise ValueError(f"parameter {path} {parameter.shape} is in no optimizer group: see parameter_group in train.py")


def build_optimizer(model, n_embd, streams):
    """One optimizer a group, in the order of GROUPS, joined in a MultiOptimizer."""
    for path, parameter in tree_flatten(model.trainable_parameters()):
        parameter_group(path, parameter)
    width = (n_embd / 768) ** -0.5
    adam = partial(optim.AdamW, eps=1e-10, weight_decay=0.0, bias_correction=True)
    optimizer = optim.MultiOptimizer(
        [
            Muon(MATRIX_LR, WEIGHT_DECAY, streams=streams),
            adam(EMBEDDING_LR * width, betas=(0.8, 0.95)),
            adam(HEAD_LR * width, betas=(0.8, 0.95)),
            adam(X0_LR, betas=(0.96, 0.95)),
            adam(RESID_LR, betas=(0.8, 0.95)),
        ],
        [lambda path, p, name=name: parameter_group(path, p) == name for name in GROUPS[:-1]],
    )
    optimizer.init(model.trainable_parameters())
    return optimizer


class Schedule:
    """Learning rates, momentum and decay by the share of the budget used: arrays set between steps."""

    def __init__(self, optimizer):
        self.optimizers = optimizer.optimizers
        self.rates = [o.learning_rate.item() for o in self.optimizers]

    def set(self, step, progress):
        factor = min(1.0, (1 - progress) / WARMDOWN)
        factor = FINAL_LR + (1 - FINAL_LR) * factor
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.learning_rate = rate * factor
        muon = self.optimizers[0].state
        muon["momentum"] = mx.array(0.85 + 0.10 * min(1.0, step / 300))
        muon["weight_decay"] = mx.array(WEIGHT_DECAY * (1 - progress))


# --- training ------------------------------------------------------------------------------------


class TrainStep:
    """One optimizer step over several micro-batches: a compiled gradient and a compiled update.

    The rows of a micro-batch are spread over `streams` (see prepare.compute_streams). On a CPU
    nothing is compiled: it gains nothing there and would need a C++ compiler.
    """

    def __init__(self, model, optimizer, streams, compiled=GPU):
        self.model, self.optimizer, self.streams, self.compiled = model, optimizer, streams, compiled
        self.state = [model.state, [o.state for o in optimizer.optimizers]]
        self.zeros = (mx.array(0.0), tree_map(mx.zeros_like, model.trainable_parameters()))
        mx.eval(self.state, self.zeros)
        self.accumulate, self.update = self._accumulate, self._update
        if compiled:
            self.accumulate = mx.compile(self._accumulate, inputs=model.state, outputs=model.state)
            self.update = mx.compile(self._update, inputs=self.state, outputs=self.state)

    def _accumulate(self, tokens, total):
        """Add the loss and the gradients of tokens (B, T + 1) to `total`."""
        loss_and_gradients = nn.value_and_grad(self.model, loss_fn)(self.model, tokens)
        return tree_map(mx.add, total, loss_and_gradients)

    def _update(self, totals, count):
        """Apply the mean gradient of `count` micro-batches; returns their mean loss."""
        loss, gradients = tree_map(lambda *parts: sum(parts) / (count * len(parts)), *totals)
        self.optimizer.update(self.model, gradients)
        return loss

    def split(self, tokens):
        """The rows of `tokens` in equal parts, one for each stream that gets any."""
        return mx.split(tokens, math.gcd(len(tokens), len(self.streams)))

    def gradients(self, micro_batches):
        """For each stream, the loss and the gradients of its rows, summed over the micro-batches."""
        totals = [self.zeros for _ in self.split(micro_batches[0])]
        for tokens in micro_batches:
            for i, part in enumerate(self.split(tokens)):
                with mx.stream(self.streams[i]):
                    totals[i] = self.accumulate(part, totals[i])
            mx.async_eval(totals)
        return totals

    def __call__(self, micro_batches):
        totals = self.gradients(micro_batches)
        loss = self.update(totals, mx.array(float(len(micro_batches))))
        mx.async_eval(loss, self.state)
        return loss

    def warm_up(self, micro_batches):
        """Compile on throw-away state: afterwards weights and optimizer are as before."""
        parameters = tree_map(lambda p: p, self.model.parameters())
        states = [tree_map(lambda s: s, o.state) for o in self.optimizer.optimizers]
        mx.eval(self(micro_batches))
        self.model.update(parameters)
        for optimizer, state in zip(self.optimizer.optimizers, states, strict=True):
            optimizer.state.update(state)


def micro_batches_a_step(rows, sequence_length):
    """How many micro-batches of `rows` rows make TOTAL_BATCH_SIZE tokens."""
    if TOTAL_BATCH_SIZE % (rows * sequence_length):
        raise SystemExit(
            f"error: TOTAL_BATCH_SIZE = {TOTAL_BATCH_SIZE} is not a multiple of "
            f"DEVICE_BATCH_SIZE x sequence length = {rows} x {sequence_length}"
        )
    return TOTAL_BATCH_SIZE // (rows * sequence_length)


def build(vocab_size, sequence_length, compiled=GPU):
    """What is trained and what trains it, all new: (GPTConfig, Schedule, TrainStep). bench.py uses it too."""
    config = GPTConfig(vocab_size=vocab_size, sequence_length=sequence_length)
    model, streams = GPT(config), prepare.compute_streams()
    optimizer = build_optimizer(model, config.n_embd, streams)
    return config, Schedule(optimizer), TrainStep(model, optimizer, streams, compiled)


def main():
    run = prepare.Run(DATASET)
    mx.random.seed(run.seed)
    micro_batches = micro_batches_a_step(DEVICE_BATCH_SIZE, SEQUENCE_LENGTH)
    batches = run.batches(DEVICE_BATCH_SIZE, SEQUENCE_LENGTH)
    config, schedule, step = build(run.tokenizer.vocab_size, SEQUENCE_LENGTH)
    shape = (DEVICE_BATCH_SIZE, config.sequence_length + 1)
    example = [mx.random.randint(0, config.vocab_size, shape) for _ in range(micro_batches)]
    run.warm_up(partial(step.warm_up, example), step.state)
    run.rehearse(step.model, EVAL_BATCH_SIZE)

    run.start_clock()
    n = 0
    while run.training():
        schedule.set(n, run.progress())
        run.log_step(step([next(batches) for _ in range(micro_batches)]))
        n += 1
    run.finish(step.model, EVAL_BATCH_SIZE, {**asdict(config), "n_embd": config.n_embd})


if __name__ == "__main__":
    main()
