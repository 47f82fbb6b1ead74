"""The experiment: model, optimizer, schedules and training loop. This is the file to edit.

    python train.py        (or `make run`, which also watches over it)

Data, the budget's clock, the metric and the record belong to prepare.py and are the same for every
experiment. The model follows karpathy/nanochat's GPT; the sources of single ideas are named where they stand.
Read it from the top: constants, model, optimizer, schedules; what only serves memory and speed comes after them.
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
from mlx.utils import tree_flatten, tree_unflatten

from harness import kernels
from harness.batches import cut_step
from harness.trainer import Trainer

GPU = mx.default_device().type == mx.gpu
CUDA = GPU and mx.cuda.is_available()

# --- constants -----------------------------------------------------------------------------------
# Presets by backend: CUDA, else Metal, else a CPU, which sees a hundredth of the tokens. `make setup` writes
# DATASET, `make tune` writes DEPTH, TOTAL_BATCH_SIZE and DEVICE_BATCH_SIZE: what this machine's budget can feed.

DATASET = "stdlib"  # one of data_sources.DATASETS
SEQUENCE_LENGTH = prepare.get_dataset(DATASET).sequence_length  # tokens of context in training
DEPTH = 8 if CUDA else 4 if GPU else 2  # layers; more learn more a token and see fewer tokens
TOTAL_BATCH_SIZE = 2**16 if CUDA else 2**14 if GPU else 2**12  # tokens an optimizer step; fewer buy more steps
DEVICE_BATCH_SIZE = max(1, (2**16 if CUDA else 2**14 if GPU else 2**12) // SEQUENCE_LENGTH)  # rows at once: memory
EVAL_BATCH_SIZE = max(1, DEVICE_BATCH_SIZE // 4 if CUDA else DEVICE_BATCH_SIZE // 2)  # rows whose logits stand whole

ASPECT_RATIO = 64 if GPU else 96  # width = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128 if GPU else 64  # channels of a head; fewer, larger heads are faster
WINDOWS = "SL" if CUDA else "L"  # a layer each, repeated: L sees all before it, S what its half of the context holds
MLP_RATIO = 4  # hidden channels of an MLP, in widths
GATE_CHANNELS = 32  # leading channels of the stream that a value gate looks at
ROPE_BASE = 10000.0  # longest wavelength of the positions, over 2 pi
SOFTCAP = 15.0  # logits are bounded to ±SOFTCAP
MATRIX_INIT = 0.4  # standard deviation of matrices and value embeddings at the start, times width^-0.5
HEAD_INIT = 0.001  # standard deviation of the head at the start: it begins by knowing nothing
X0_INIT = 0.1  # share of the first embedding that each layer begins by adding

MATRIX_LR = 0.02 if CUDA else 0.03  # Muon, all matrices of the blocks
EMBEDDING_LR = 0.3  # AdamW, token and value embeddings (scaled with width^-0.5, as the next)
HEAD_LR = 0.008  # AdamW, output head, value gates and shifts
X0_LR = 0.5  # AdamW, x0_lambdas
RESID_LR = 0.005  # AdamW, resid_lambdas
ADAM_BETAS = (0.8, 0.95)  # AdamW; the second is Muon's second moment too
MOMENTUM = (0.85, 0.95, 300)  # Muon: from, to, over so many steps
WEIGHT_DECAY = 0.1  # Muon; falls linearly to 0 over the budget
EMBEDDING_DECAY = 0.002 if CUDA else 0.0  # AdamW, as a share of the rate; where a budget sees its text several times
HEAD_DECAY = 0.01 if CUDA else 0.0
WARMUP = 0.0  # first share of the budget, in which learning rates rise linearly
WARMDOWN = 0.5  # last share of the budget, in which they fall linearly
FINAL_LR = 0.0  # ... to this share of their value

COMPUTE_DTYPE = mx.bfloat16 if GPU else mx.float32  # activations and products; weights stay float32
LOGITS_AT_ONCE = 2**26 if CUDA else 2**24 if GPU else 2**19  # elements of the logits that exist at one time in training

# --- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    sequence_length: int
    depth: int = DEPTH
    aspect_ratio: int = ASPECT_RATIO
    head_dim: int = HEAD_DIM
    windows: str = WINDOWS

    @property
    def n_head(self):
        return math.ceil(self.depth * self.aspect_ratio / self.head_dim)

    @property
    def n_embd(self):
        return self.n_head * self.head_dim

    def window(self, layer):
        """Into pieces of how many positions the context of a layer is cut; the last layer's is whole."""
        short = self.windows[layer % len(self.windows)] == "S" and layer < self.depth - 1
        return math.ceil(self.sequence_length / 2) if short else self.sequence_length

    def has_value_embedding(self, layer):
        """Every other layer, the last one always."""
        return layer % 2 == (self.depth - 1) % 2


def uniform(*shape):
    """Initial weights (…, out, in) of standard deviation MATRIX_INIT * in^-0.5."""
    bound = MATRIX_INIT * (3 / shape[-1]) ** 0.5
    return mx.random.uniform(-bound, bound, shape)


class Linear(nn.Module):
    """x @ weight.T with a float32 weight (out, in), in the precision of x."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def __call__(self, x):
        return x @ self.weight.reshape(-1, x.shape[-1]).astype(x.dtype).T


class Embedding(nn.Module):
    """Rows of a float32 weight (vocab, channels), in COMPUTE_DTYPE."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def __call__(self, tokens):
        return rows_of(self.weight, tokens)


def rows_of(table, tokens):
    return table[tokens].astype(COMPUTE_DTYPE)


def norm(x):
    """RMS norm over the last axis, without weights (arXiv:1910.07467)."""
    return mx.fast.rms_norm(x, None, 1e-6)


def rope(x):
    """Rotary positions (arXiv:2104.09864). x: (B, heads, T, head_dim)."""
    return mx.fast.rope(x, dims=x.shape[-1], traditional=False, base=ROPE_BASE, scale=1.0, offset=0)


def mix(x, y, x0=None, a=None, b=None, shift=None):
    """The stream x with y added to it, scaled and mixed with the first embedding x0; its norm; x0 as it was, if any.

    To the norm comes a share of that of the token before, channel by channel (token shift, arXiv:2305.13048).
    x, y, x0: (B, T, n_embd); a, b: (1,), float32; shift: (n_embd,), float32.
    """
    x = x + y
    if x0 is not None:
        x = (a * x + b * x0).astype(x.dtype)
    h = norm(x)
    if shift is not None:
        h = h + shift.astype(h.dtype) * mx.pad(h[:, :-1], [(0, 0), (1, 0), (0, 0)])
    return (x, h) if x0 is None else (x, h, x0)


def heads(qkv, gate, table, tokens):
    """Queries, keys and values, each (B, heads, T, head_dim), of qkv (B, T, 3, heads, head_dim).

    Queries and keys are normalised (QK-norm, arXiv:2010.04245) and know their positions. Values gain an
    embedding of their token, gated per head (arXiv:2410.17897), where there is one.
    gate: (B, T, heads) or None; table: (vocab, heads * head_dim), float32.
    """
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if gate is not None:
        v = v + 2 * mx.sigmoid(gate)[..., None] * table[tokens].astype(v.dtype).reshape(v.shape)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (norm(q), norm(k), v))
    return rope(q), rope(k), v


def relu_squared(x):
    """max(x, 0)² (arXiv:2109.08668). As the fast forms below: an edit here needs one there."""
    return mx.square(mx.maximum(x, 0))


def pieces(x, length):
    """The positions of x (B, heads, T, head_dim) in pieces, each a row of its own: (B * n, heads, length, head_dim)."""
    x = x.transpose(0, 2, 1, 3)
    if x.shape[1] % length:
        x = mx.pad(x, [(0, 0), (0, -x.shape[1] % length), (0, 0), (0, 0)])
    return x.reshape(-1, length, *x.shape[2:]).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        n = config.n_embd
        self.qkv = Linear(uniform(3, n, n))
        self.out = Linear(mx.zeros((n, n)))
        self.shift = mx.zeros(n)
        if config.has_value_embedding(layer):
            self.value_embedding = Embedding(uniform(config.vocab_size, n))
            self.value_gate = Linear(mx.zeros((config.n_head, GATE_CHANNELS)))
        self._heads, self._scale, self._window = config.n_head, config.head_dim**-0.5, config.window(layer)

    def __call__(self, x, tokens):
        B, T, C = x.shape
        gate = table = None
        if "value_embedding" in self:
            gate, table = self.value_gate(x[..., :GATE_CHANNELS]), self.value_embedding.weight
        q, k, v = heads(self.qkv(x).reshape(B, T, 3, self._heads, -1), gate, table, tokens)
        if T > self._window:
            q, k, v = (pieces(x, self._window) for x in (q, k, v))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._scale, mask="causal")
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, -1, C)[:, :T])


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        n = config.n_embd
        self.up, self.down = Linear(uniform(MLP_RATIO * n, n)), Linear(mx.zeros((n, MLP_RATIO * n)))
        self.shift = mx.zeros(n)

    def __call__(self, x):
        return self.down(relu_squared(self.up(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention, self.mlp = Attention(config, layer), MLP(config)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        n, vocab = config.n_embd, config.vocab_size
        # MLX works towards the gradients in this order: with these two last, a step takes 2 to 4 % more memory.
        self.resid_lambdas = mx.ones(config.depth)
        self.x0_lambdas = mx.full(config.depth, X0_INIT)
        self.token_embedding = Embedding(mx.random.normal((vocab, n)))
        self.blocks = [Block(config, layer) for layer in range(config.depth)]
        self.head = Linear(mx.random.normal((vocab, n), scale=HEAD_INIT))

    def hidden(self, tokens):
        """Final normalised states (B, T, n_embd) for token ids (B, T)."""
        x = x0 = norm(self.token_embedding(tokens))
        y = mx.zeros_like(x)
        lambdas = (mx.split(scalars, len(self.blocks)) for scalars in (self.resid_lambdas, self.x0_lambdas))
        for block, a, b in zip(self.blocks, *lambdas, strict=True):
            x, h, x0 = mix(x, y, x0, a, b, block.attention.shift)
            y = block.attention(h, tokens)
            x, h = mix(x, y, shift=block.mlp.shift)
            y = block.mlp(h)
        return mix(x, y)[1]

    def __call__(self, tokens):
        """Logits (B, T, vocab_size), float32, for token ids (B, T)."""
        return softcap(self.head(self.hidden(tokens)))


def softcap(logits):
    """Bounded to ±SOFTCAP (Gemma 2, arXiv:2408.00118), float32."""
    return SOFTCAP * mx.tanh(logits.astype(mx.float32) / SOFTCAP)


def loss_fn(model, tokens):
    """Mean cross-entropy in nats. tokens: (B, T + 1); column t + 1 is the target of column t."""
    hidden = model.hidden(tokens[:, :-1])
    return head_loss(hidden.reshape(-1, hidden.shape[-1]), model.head.weight, tokens[:, 1:].reshape(-1))


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


class Muon(optim.Optimizer):
    """Momentum, orthogonalised (kellerjordan.github.io/posts/muon), as karpathy/autoresearch has it for PyTorch.

    A parameter is a matrix (rows, columns) or a stack of them (n, rows, columns). Matrices of one shape, tall
    ones on their side, are updated together as one stack, and the stacks are spread over `streams`.
    """

    def __init__(self, learning_rate, streams=None):
        super().__init__()
        self.streams = streams or [mx.default_stream(mx.default_device())]
        self.state |= {"learning_rate": mx.array(learning_rate), "momentum": mx.array(0.0), "decay": mx.array(0.0)}

    def init(self, parameters):
        for name, paths in self.stacks(parameters).items():
            n, rows, columns = stacked([parameters[path] for path in paths]).shape
            self.state[name] = {"momentum": mx.zeros((n, rows, columns)), "second_moment": mx.zeros((n, 1, columns))}
        self._initialized = True

    @staticmethod
    def stacks(parameters):
        """{"rows x columns": [path, …]} of {path: parameter}, rows <= columns."""
        stacks = {}
        for path, parameter in parameters.items():
            stacks.setdefault("x".join(map(str, sorted(parameter.shape[-2:]))), []).append(path)
        return stacks

    def apply_gradients(self, gradients, parameters):
        """{path: new parameter} of {path: gradient} and {path: parameter}."""
        if not self._initialized:
            self.init(gradients)
        self.state["step"] = self.step + 1
        updated = {}
        for i, (name, paths) in enumerate(self.stacks(gradients).items()):
            with mx.stream(self.streams[i % len(self.streams)]):
                old = [parameters[path] for path in paths]
                # Tall matrices move further, by the root of rows over columns.
                far = [max(1, p.shape[-2] / p.shape[-1]) ** 0.5 for p in old for _ in range(math.prod(p.shape[:-2]))]
                gradient, far = stacked([gradients[path] for path in paths]), mx.array(far)[:, None, None]
                new = self.update_stack(gradient, stacked(old), far, self.state[name])
                updated |= zip(paths, unstacked(new, old), strict=True)
        return updated

    def update_stack(self, gradient, weight, far, state):
        """New weights. gradient, weight: (n, rows, columns), rows <= columns; far, which scales the rate: (n, 1, 1)."""
        # 1. momentum, looking one step ahead (Nesterov)
        momentum = self.state["momentum"]
        state["momentum"] = momentum * state["momentum"] + (1 - momentum) * gradient
        update = momentum * state["momentum"] + (1 - momentum) * gradient
        # 2. every direction equally far
        update = orthogonalize(update)
        # 3. every column equally far, by its running second moment, as far as before in all (NorMuon, arXiv:2510.05491)
        square = mx.square(update).sum(axis=1, keepdims=True)
        state["second_moment"] = ADAM_BETAS[1] * state["second_moment"] + (1 - ADAM_BETAS[1]) * square
        second_moment = mx.maximum(state["second_moment"], 1e-10)
        before, after = (mx.sqrt(m.sum(axis=(1, 2), keepdims=True)) for m in (square, square / second_moment))
        update = update * mx.rsqrt(second_moment) * (before / mx.maximum(after, 1e-10))
        # 4. cautious decay: only where it pulls the way of the update (arXiv:2510.12402)
        decay = self.state["decay"] * weight * (update * weight >= 0)
        return weight - self.learning_rate * far * (update + decay)


def stacked(parameters):
    """All matrices of some parameters, (rows, columns) or (n, rows, columns), in one (n, rows, columns), none tall."""
    wide = [p.swapaxes(-1, -2) if p.shape[-2] >= p.shape[-1] else p for p in parameters]
    return mx.concatenate([p.reshape(-1, *p.shape[-2:]) for p in wide])


def unstacked(stack, parameters):
    """The matrices of a stack in the shapes of the parameters that it was made of."""
    ends = np.cumsum([math.prod(p.shape[:-2]) for p in parameters]).tolist()
    parts = zip(mx.split(stack, ends[:-1]), parameters, strict=True)
    return [(x.swapaxes(1, 2) if p.shape[-2] >= p.shape[-1] else x).reshape(p.shape) for x, p in parts]


def parameter_group(path, parameter):
    """Which optimizer of GPTOptimizer a parameter has. One that fits none is an error, not a fallback."""
    if path.startswith("token_embedding.") or ".value_embedding." in path:
        return "embeddings"
    if path.startswith("head.") or ".value_gate." in path or path.endswith(".shift"):
        return "head"
    if path in ("x0_lambdas", "resid_lambdas"):
        return path.split("_")[0]
    if path.startswith("blocks.") and parameter.ndim in (2, 3):
        return "matrices"
    raise ValueError(f"parameter {path} {parameter.shape} is in no optimizer group: see parameter_group in train.py")


class AdamW(optim.Adam):
    """Adam with weight decay (arXiv:1711.05101), which is an array, so that all groups share their kernels."""

    def __init__(self, learning_rate, decay=0.0):
        super().__init__(learning_rate, ADAM_BETAS, eps=1e-10)  # its bias is corrected by the rate, see schedule
        self.state["decay"] = mx.array(decay)

    def apply_single(self, gradient, parameter, state):
        return super().apply_single(gradient, parameter * (1 - self.learning_rate * self.state["decay"]), state)


class GPTOptimizer:
    """An optimizer for each group of parameters, and the schedules that move all of them."""

    def __init__(self, model, n_embd, streams):
        width = (n_embd / 768) ** -0.5
        self.groups = {
            "matrices": Muon(MATRIX_LR, streams),
            "embeddings": AdamW(EMBEDDING_LR * width, EMBEDDING_DECAY),
            "head": AdamW(HEAD_LR * width, HEAD_DECAY),
            "x0": AdamW(X0_LR),
            "resid": AdamW(RESID_LR),
        }
        self.rates = {name: optimizer.learning_rate.item() for name, optimizer in self.groups.items()}
        for name, parameters in self.by_group(model.trainable_parameters()).items():
            self.groups[name].init(parameters)
        self.schedule(0, 0.0)

    @property
    def state(self):
        return {name: optimizer.state for name, optimizer in self.groups.items()}

    def by_group(self, tree):
        """{group: {path: array}} of a parameter tree."""
        found = {name: {} for name in self.groups}
        for path, array in tree_flatten(tree):
            found[parameter_group(path, array)][path] = array
        return found

    def update(self, model, gradients):
        parameters, new = self.by_group(model.trainable_parameters()), {}
        for name, of_group in self.by_group(gradients).items():
            new |= self.groups[name].apply_gradients(of_group, parameters[name])
        model.update(tree_unflatten(list(new.items())))

    def schedule(self, step, progress):
        """Set rates, momentum and decay for step number `step`, when `progress` (0 to 1) of the budget is used.

        They are arrays in the optimizers' state: a compiled update sees the new values.
        """
        for name, optimizer in self.groups.items():
            optimizer.learning_rate = self.rates[name] * learning_rate_factor(progress)
            if isinstance(optimizer, AdamW):  # its averages begin at zero
                first, second = (1 - beta ** (step + 1) for beta in optimizer.betas)
                optimizer.learning_rate *= second**0.5 / first
        muon = self.groups["matrices"].state
        muon["momentum"], muon["decay"] = mx.array(momentum(step)), mx.array(weight_decay(progress))


# --- schedules -----------------------------------------------------------------------------------


def learning_rate_factor(progress):
    """Up over WARMUP, 1, down over WARMDOWN to FINAL_LR."""
    up = progress / WARMUP if WARMUP else 1.0
    down = (1 - progress) / WARMDOWN if WARMDOWN else 1.0
    return min(up, FINAL_LR + (1 - FINAL_LR) * min(1.0, down))


def momentum(step):
    start, end, steps = MOMENTUM
    return start + (end - start) * min(1.0, step / steps)


def weight_decay(progress):
    return WEIGHT_DECAY * (1 - progress)


# --- memory and speed ----------------------------------------------------------------------------
# Nothing here changes what is computed, rounding aside. Figures: one H100, depth 8, 2^17 tokens a step.

# What MLX sends to the GPU at once is freed at once. With its own setting, a step takes twice the memory.
if CUDA:
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "80")
# MLX walks a graph depth first, so that what nothing needs any more goes early; on a CPU breadth first, so that
# each stream has work from the beginning.
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1" if GPU else "1000")


def head_loss(hidden, weight, targets):
    """The mean cross-entropy of softcap(hidden @ weight.T).

    Plain: nn.losses.cross_entropy(softcap(hidden @ weight.T), targets, reduction="mean"). Here logits and their
    gradient exist for LOGITS_AT_ONCE elements at a time; whole they are 2 GB for 65,536 rows, in float32 4.
    hidden: (N, n_embd); weight: (vocab_size, n_embd); targets: (N,).
    """
    return kernels.mean_in_chunks(chunk_loss_and_gradients, hidden, weight, targets, LOGITS_AT_ONCE // len(weight))


def chunk_loss_and_gradients(hidden, weight, targets):
    """Summed loss of some rows, and its gradients with respect to hidden and weight."""

    def loss(hidden, weight):
        return mx.fast.cross_entropy(softcap(hidden @ weight.T), targets).sum()

    return mx.value_and_grad(loss, argnums=(0, 1))(hidden, weight)


# Fast forms of five functions above: each goes once over memory where a chain of MLX's operations goes several times.
# For another form of one of them, leave it out here: the one above is then used.
PLAIN = {f.__name__: f for f in (rows_of, mix, heads, relu_squared, chunk_loss_and_gradients)}
relu_squared = kernels.relu_squared
if CUDA and HEAD_DIM in (64, 128):
    rows_of, mix = partial(kernels.rows_of, dtype=COMPUTE_DTYPE), kernels.mix
    heads = partial(kernels.heads, rope_base=ROPE_BASE)
    chunk_loss_and_gradients = partial(kernels.chunk_loss_and_gradients, cap=SOFTCAP)
if not GPU:
    chunk_loss_and_gradients = partial(kernels.cpu_chunk_loss_and_gradients, cap=SOFTCAP)

# --- training ------------------------------------------------------------------------------------


def build(vocab_size, sequence_length, compiled=GPU, depth=DEPTH):
    """What is trained and what trains it, all new: (GPTConfig, Trainer). bench.py uses it too."""
    config = GPTConfig(vocab_size=vocab_size, sequence_length=sequence_length, depth=depth)
    model, streams = GPT(config), prepare.compute_streams()
    return config, Trainer(model, GPTOptimizer(model, config.n_embd, streams), loss_fn, streams, compiled)


def main():
    run = prepare.Run(DATASET)
    mx.random.seed(run.seed)
    rows, micro_batches = cut_step(TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE, SEQUENCE_LENGTH)
    batches = run.batches(rows, SEQUENCE_LENGTH)
    config, trainer = build(run.tokenizer.vocab_size, SEQUENCE_LENGTH)
    example = [mx.random.randint(0, config.vocab_size, (rows, SEQUENCE_LENGTH + 1)) for _ in range(micro_batches)]
    run.warm_up(lambda: mx.eval(trainer.step(example)), trainer.state)
    run.rehearse(trainer.model, EVAL_BATCH_SIZE)

    run.start_clock()
    step = 0
    while run.training():
        trainer.optimizer.schedule(step, run.progress())
        run.log_step(trainer.step([next(batches) for _ in range(micro_batches)]))
        step += 1
    run.finish(trainer.model, EVAL_BATCH_SIZE, {**asdict(config), "n_head": config.n_head, "n_embd": config.n_embd})


if __name__ == "__main__":
    main()
