"""The experiment: model, optimizer, schedules and training loop. This is the file to edit.

    python train.py        (or `make run`, which also watches over it)

Data, the budget's clock, the metric and the record are the same for every experiment: prepare.py is the door to them.
The model follows karpathy/nanochat's GPT; each idea names its source where it stands. Read from the top:
constants, model, tables of n-grams, loss, optimizer, schedules, training. How a step is carried out stands in harness/.

`@fast(form)` runs `form`, a faster way to compute the same, in place of the function below it, as long as that
function, and what it calls in this file, is unedited. Edit it, and your text is what runs.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial

import prepare  # isort: skip  (first of all, so that start-up is timed from the beginning)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from harness import kernels, ngrams
from harness.batches import cut_step
from harness.fast import fast
from harness.trainer import StackedOptimizer, Trainer, mean_in_chunks

GPU = mx.default_device().type == mx.gpu
CUDA = GPU and mx.cuda.is_available()

# --- constants -----------------------------------------------------------------------------------
# Presets by backend: CUDA, else Metal, else a CPU, which sees a hundredth of the tokens. `make setup` writes
# DATASET; `make tune` writes DEPTH and the batch sizes, and on a GPU NGRAM_ROWS (and ASPECT_RATIO) where these pay.

DATASET = "stdlib"  # one of data_sources.DATASETS
SEQUENCE_LENGTH = prepare.get_dataset(DATASET).sequence_length  # tokens of context in training
DEPTH = 8 if CUDA else 4 if GPU else 2  # layers; a deeper model learns more from each token and sees fewer tokens
TOTAL_BATCH_SIZE = 2**16 if CUDA else 2**14 if GPU else 2**12  # tokens an optimizer step; fewer buy more steps
DEVICE_BATCH_SIZE = max(1, (2**16 if CUDA else 2**14 if GPU else 2**12) // SEQUENCE_LENGTH)  # rows at once: memory
EVAL_BATCH_SIZE = max(1, DEVICE_BATCH_SIZE // 2)  # rows; all their logits exist

ASPECT_RATIO = 64 if GPU else 96  # width = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = 128 if GPU else 64  # channels of a head; fewer, larger heads are faster
WINDOWS = "SL" if CUDA else "L"  # block-local, not sliding; a letter a layer, repeated: L all the context, S two halves
MLP_RATIO = 4  # hidden channels of an MLP, in widths
GATE_CHANNELS = 32  # channels of a layer's normed input that a gate reads; a table's gate the next as many
GATE_MAX = 2.0  # a gate lies between 0 and this, and starts at half of it
NGRAM_ROWS = 0  # rows of a table of hashed n-grams, where text is seen about once; 0: no tables, and no gated_norm
NGRAMS = (2, 3)  # tokens of an n-gram; two tables for each of these in every layer with a value embedding
ROPE_BASE = 10000.0  # longest wavelength of the positions / 2π
SOFTCAP = 15.0  # logits are bounded to ±SOFTCAP
MATRIX_INIT = 0.4  # standard deviation of matrices and value embeddings at the start, times width^-0.5
HEAD_INIT = 0.001  # standard deviation of the head at the start: it begins by predicting all tokens alike
X0_INIT = 0.1  # share of the token embedding that each layer adds at the start

MATRIX_LR = 0.02 if CUDA else 0.03  # Muon: matrices of the blocks
EMBEDDING_LR = 0.3  # AdamW: token and value embeddings; scaled by (width / 768)^-0.5, as HEAD_LR
HEAD_LR = 0.008  # AdamW: output head, gates and shifts
NGRAM_LR = 9.5  # Adagrad: tables of n-grams, scaled likewise; rises as (1 - NGRAM_WARMUP^step)^0.5 and never falls
NGRAM_WARMUP = 0.999
X0_LR = 0.5  # AdamW: x0_lambdas
RESID_LR = 0.005  # AdamW: resid_lambdas
ADAM_BETAS = (0.8, 0.95)  # AdamW; the second one also for Muon's second moment
MOMENTUM = (0.85, 0.95, 300)  # Muon: from, to, over so many steps
WEIGHT_DECAY = 0.1  # Muon; falls linearly to 0 over the budget
EMBEDDING_DECAY = 0.002 if CUDA else 0.0  # AdamW, times the rate; helps where a budget sees its text several times
HEAD_DECAY = 0.01 if CUDA else 0.0
WARMUP = 0.0  # first share of the budget, in which learning rates rise linearly
WARMDOWN = 0.5  # last share of the budget, in which they fall linearly
FINAL_LR = 0.0  # ... to this share of their value

COMPUTE_DTYPE = mx.bfloat16 if GPU else mx.float32  # activations and products; weights stay float32
LOGITS_AT_ONCE = 2**26 if CUDA else 2**24 if GPU else 2**19  # elements of the logits that exist at once in training
KERNELS = CUDA and HEAD_DIM in (64, 128)  # those of heads, mix, embed and gates know these sizes

# --- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    sequence_length: int
    depth: int = DEPTH
    aspect_ratio: int = ASPECT_RATIO
    head_dim: int = HEAD_DIM
    windows: str = WINDOWS
    ngram_rows: int = NGRAM_ROWS

    @property
    def n_head(self):
        return math.ceil(self.depth * self.aspect_ratio / self.head_dim)

    @property
    def n_embd(self):
        return self.n_head * self.head_dim

    def window(self, layer):
        """Positions of a chunk, within which a query attends; the last layer's holds all the context."""
        short = self.windows[layer % len(self.windows)] == "S" and layer < self.depth - 1
        return math.ceil(self.sequence_length / 2) if short else self.sequence_length


def uniform(*shape):
    """Initial weights (…, out, in) of standard deviation MATRIX_INIT * in^-0.5."""
    bound = MATRIX_INIT * (3 / shape[-1]) ** 0.5
    return mx.random.uniform(-bound, bound, shape)


def linear(x, weight):
    """x @ weight.T with a float32 weight (…, out, in), in the precision of x."""
    return x @ weight.reshape(-1, x.shape[-1]).astype(x.dtype).T


@fast(kernels.embed, when=KERNELS)
def embed(table, tokens):
    """Rows (…, channels) of a float32 table (vocab, channels), in COMPUTE_DTYPE."""
    return table[tokens].astype(COMPUTE_DTYPE)


def norm(x):
    """RMS norm over the last axis, without weights (arXiv:1910.07467)."""
    return mx.fast.rms_norm(x, None, 1e-6)


def rope(x):
    """Rotary positions (arXiv:2104.09864). x: (B, heads, T, head_dim)."""
    return mx.fast.rope(x, dims=x.shape[-1], traditional=False, base=ROPE_BASE, scale=1.0, offset=0)


@fast(kernels.mix, when=KERNELS)
def mix(x, y, x0=None, a=None, b=None, shift=None):
    """Between two parts of a block: (new stream, its norm for the next part, x0 where it was given).

    The stream x gains y, the output of the last part. Given the token embedding x0, it becomes a * x + b * x0
    (per-layer scalars, as in nanochat); x0 is returned so that all layers share one sum of its gradients. The norm
    gains a share of the previous token's, channel by channel (token shift, arXiv:2305.13048). x, y, x0: (B, T, n_embd);
    a, b: (1,), float32; shift: (n_embd,), float32.
    """
    x = x + y
    if x0 is not None:
        x = (a * x + b * x0).astype(x.dtype)
    h = norm(x)
    if shift is not None:
        h = h + shift.astype(h.dtype) * mx.pad(h[:, :-1], [(0, 0), (1, 0), (0, 0)])
    return (x, h) if x0 is None else (x, h, x0)


@fast(kernels.heads, when=KERNELS)
def heads(qkv):
    """Queries, keys and values, each (B, heads, T, head_dim), of qkv (B, T, 3, heads, head_dim).

    Queries and keys are normalised (QK-norm, arXiv:2010.04245), then rotated by their positions.
    """
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (norm(q), norm(k), v))
    return rope(q), rope(k), v


@fast(ngrams.add_gated, when=KERNELS)
def add_gated(v, gates, rows):
    """Values v (B, heads, T, head_dim) plus the rows (B, T, n_embd) of tables, each times its gates (B, T, heads)."""
    v = v.transpose(0, 2, 1, 3)
    for gate, row in zip(gates, rows, strict=True):
        v = v + GATE_MAX * mx.sigmoid(gate)[..., None] * row.reshape(v.shape)
    return v.transpose(0, 2, 1, 3)


@fast(ngrams.gated_norm, when=KERNELS)
def gated_norm(y, gate):
    """Output y (B, T, heads, head_dim) of each head, normed (arXiv:2410.05258) and gated (arXiv:2505.06708)."""
    return GATE_MAX * mx.sigmoid(gate)[..., None] * norm(y)


@fast(kernels.relu_squared)
def relu_squared(x):
    """max(x, 0)² (Primer, arXiv:2109.08668)."""
    return mx.square(mx.maximum(x, 0))


def chunks_of(x, length):
    """x (B, heads, T, head_dim) cut along T, padded with zeros: (B * n, heads, length, head_dim)."""
    x = x.transpose(0, 2, 1, 3)
    if x.shape[1] % length:
        x = mx.pad(x, [(0, 0), (0, -x.shape[1] % length), (0, 0), (0, 0)])
    return x.reshape(-1, length, *x.shape[2:]).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Causal, across the documents of a row. In every other layer value embeddings add to values (arXiv:2410.17897)."""

    def __init__(self, config, layer):
        super().__init__()
        n, gate = config.n_embd, (config.n_head, GATE_CHANNELS)
        self.qkv, self.out = uniform(3, n, n), mx.zeros((n, n))
        self.shift = mx.zeros(n)  # of the mix before this
        if layer % 2 == (config.depth - 1) % 2:  # in every other layer, the last one always
            self.value_embedding = uniform(config.vocab_size, n)
            self.ngrams = [NGrams(config, layer, size) for size in NGRAMS if config.ngram_rows]
            self.value_gates = [mx.zeros(gate) for _ in [self.value_embedding, *self.ngrams]]
        if config.ngram_rows:
            self.out_gate = mx.zeros(gate)
        self._heads, self._scale, self._window = config.n_head, config.head_dim**-0.5, config.window(layer)

    def __call__(self, h, tokens):
        B, T, C = h.shape
        q, k, v = heads(linear(h, self.qkv).reshape(B, T, 3, self._heads, -1))
        if "value_embedding" in self:
            rows = [embed(self.value_embedding, tokens), *(table(tokens) for table in self.ngrams)]
            parts = mx.split(h[..., : len(rows) * GATE_CHANNELS], len(rows), axis=-1)
            v = add_gated(v, [linear(*pair) for pair in zip(parts, self.value_gates, strict=True)], rows)
        if T > self._window:  # block-local attention (arXiv:1801.10198): a query sees what precedes it in its chunk
            q, k, v = (chunks_of(z, self._window) for z in (q, k, v))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._scale, mask="causal")
        y = y.transpose(0, 2, 1, 3).reshape(B, -1, self._heads, C // self._heads)[:, :T]
        if "out_gate" in self:
            y = gated_norm(y, linear(h[..., :GATE_CHANNELS], self.out_gate))
        return linear(y.reshape(B, T, C), self.out)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        n = config.n_embd
        self.up, self.down = uniform(MLP_RATIO * n, n), mx.zeros((n, MLP_RATIO * n))
        self.shift = mx.zeros(n)  # of the mix before this

    def __call__(self, x):
        return linear(relu_squared(linear(x, self.up)), self.down)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention, self.mlp = Attention(config, layer), MLP(config)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        n, vocab = config.n_embd, config.vocab_size
        # These two first: MLX computes gradients in this order, and with them last a step takes 2 to 4 % more memory.
        self.resid_lambdas = mx.ones(config.depth)
        self.x0_lambdas = mx.full(config.depth, X0_INIT)
        self.token_embedding = mx.random.normal((vocab, n))
        self.blocks = [Block(config, layer) for layer in range(config.depth)]
        self.head = mx.random.normal((vocab, n), scale=HEAD_INIT)

    def hidden(self, tokens):
        """Final normalised states (B, T, n_embd) for token ids (B, T)."""
        x = x0 = norm(embed(self.token_embedding, tokens))
        y = mx.zeros_like(x)  # of the part before; the next mix adds it
        lambdas = (mx.split(scalars, len(self.blocks)) for scalars in (self.resid_lambdas, self.x0_lambdas))
        for block, a, b in zip(self.blocks, *lambdas, strict=True):
            x, h, x0 = mix(x, y, x0, a, b, block.attention.shift)
            y = block.attention(h, tokens)
            x, h = mix(x, y, shift=block.mlp.shift)
            y = block.mlp(h)
        return mix(x, y)[1]

    def __call__(self, tokens):
        """Logits (B, T, vocab_size), float32, for token ids (B, T)."""
        return logits_of(self.hidden(tokens), self.head)


# --- n-gram value embeddings ---------------------------------------------------------------------


class NGrams(ngrams.Table):
    """Value embeddings of the n tokens that end at each position: a look-up, no arithmetic (Engram, arXiv:2601.07372).

    Two half-width tables, hashed differently: n-grams that share a row in one seldom do in both (arXiv:1709.03933).
    Trainer differentiates by the rows of a batch and updates these alone, by `adagrad`.
    """

    def __init__(self, config, layer, n):
        shape, bound = (2, config.ngram_rows, config.n_embd // 2), (3 / config.n_embd) ** 0.5
        super().__init__(mx.random.uniform(-bound, bound, shape, COMPUTE_DTYPE), adagrad)
        self._factors = 2 * np.random.default_rng((layer, n)).integers(2**31, size=(n, 2, 1, 1), dtype=np.uint32) + 1

    def slots(self, tokens):
        """The row of either table for tokens (B, T): uint32 (2, B, T)."""
        mixed, length = mx.zeros((2, *tokens.shape), mx.uint32), tokens.shape[1]
        for back, factors in enumerate(self._factors):
            mixed = mixed ^ (mx.pad(tokens, [(0, 0), (back, 0)])[:, :length].astype(mx.uint32) * mx.array(factors))
        mixed = (mixed ^ (mixed >> 15)) * mx.array(2654435769, mx.uint32)  # Fibonacci hashing: 2^32 / golden ratio
        return (mixed >> 7) % self.weight.shape[1]


@fast(ngrams.adagrad, when=KERNELS)
def adagrad(tables, squares, slots, gradient, rate):
    """New tables (2, rows, c) and squares (2, rows): Adagrad (JMLR 12:2121) with one sum of squares a row.

    slots: (2, N), the rows that were looked up; gradient: (N, 2 c), theirs. A row's rate falls with its own use.
    """
    parts = zip(slots, mx.split(gradient.astype(mx.float32), 2, axis=-1), strict=True)
    whole = mx.stack([mx.zeros(tables.shape[1:]).at[rows].add(part) for rows, part in parts])
    squares = squares + mx.square(whole).mean(axis=-1)
    return (tables - rate * whole * mx.rsqrt(squares + 1e-20)[..., None]).astype(tables.dtype), squares


# --- loss ----------------------------------------------------------------------------------------


def softcap(logits):
    """Bounded to ±SOFTCAP (Gemma 2, arXiv:2408.00118), float32."""
    return SOFTCAP * mx.tanh(logits.astype(mx.float32) / SOFTCAP)


def logits_of(hidden, head):
    """What training and evaluation score: (…, vocab_size), of hidden (…, n_embd) and head (vocab_size, n_embd)."""
    return softcap(linear(hidden, head))


def summed_loss(hidden, head, targets):
    """Summed cross-entropy in nats. hidden: (positions, n_embd); head: (vocab_size, n_embd); targets: (positions,)."""
    return mx.fast.cross_entropy(logits_of(hidden, head), targets).sum()


@fast(kernels.loss_and_gradients, when=(CUDA or not GPU) and SOFTCAP < 60)  # it takes exp(SOFTCAP), in float32
def loss_and_gradients(hidden, head, targets):
    return mx.value_and_grad(summed_loss, argnums=(0, 1))(hidden, head, targets)


def loss_fn(model, tokens):
    """Mean cross-entropy in nats. tokens: (B, T + 1); column t + 1 is the target of column t.

    Plain: summed_loss(hidden, model.head, targets) / len(targets). Here logits and their gradient exist for
    LOGITS_AT_ONCE elements at a time: in bfloat16 those of 65,536 positions and 8,192 tokens would take 2 GB.
    """
    hidden, targets = model.hidden(tokens[:, :-1]), tokens[:, 1:].reshape(-1)
    hidden = hidden.reshape(len(targets), -1)
    return mean_in_chunks(loss_and_gradients, hidden, model.head, targets, LOGITS_AT_ONCE // len(model.head))


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


class Muon(StackedOptimizer):
    """Momentum, orthogonalised (kellerjordan.github.io/posts/muon), as karpathy/autoresearch has it for PyTorch."""

    def __init__(self, learning_rate, streams=None):
        super().__init__(learning_rate, streams)
        self.state |= {"momentum": mx.array(0.0), "decay": mx.array(0.0)}

    def init_stack(self, n, rows, columns):
        return {"average": mx.zeros((n, rows, columns)), "second_moment": mx.zeros((n, 1, columns))}

    def update_stack(self, gradient, weight, aspect, state):
        """New weights of a stack (n, rows, columns), rows <= columns; aspect (n, 1, 1): see StackedOptimizer."""
        # 1. momentum, looking one step ahead (Nesterov)
        beta = self.state["momentum"]
        state["average"] = beta * state["average"] + (1 - beta) * gradient
        update = beta * state["average"] + (1 - beta) * gradient
        # 2. every direction equally far
        update = orthogonalize(update)
        # 3. every column equally far, by its running second moment, at the same norm in all (NorMuon, arXiv:2510.05491)
        square = mx.square(update).sum(axis=1, keepdims=True)
        state["second_moment"] = ADAM_BETAS[1] * state["second_moment"] + (1 - ADAM_BETAS[1]) * square
        second_moment = mx.maximum(state["second_moment"], 1e-10)
        before, after = (mx.sqrt(m.sum(axis=(1, 2), keepdims=True)) for m in (square, square / second_moment))
        update = update * mx.rsqrt(second_moment) * (before / mx.maximum(after, 1e-10))
        # 4. cautious decay: only where it pulls the same way as the update (arXiv:2510.12402)
        decay = self.state["decay"] * weight * (update * weight >= 0)
        # 5. tall matrices further, by the root of rows over columns
        return weight - self.learning_rate * mx.array(np.maximum(1, aspect) ** 0.5) * (update + decay)


def parameter_group(path, parameter):
    """Which of GPTOptimizer's optimizers updates a parameter; an error where none is meant to."""
    if path.endswith("_embedding"):
        return "embeddings"
    if ".ngrams." in path:
        return "ngrams"
    if path == "head" or "_gate" in path or path.endswith(".shift"):
        return "head"
    if path in ("x0_lambdas", "resid_lambdas"):
        return path.split("_")[0]
    if path.startswith("blocks.") and parameter.ndim in (2, 3):
        return "matrices"
    raise ValueError(f"parameter {path} {parameter.shape} is in no optimizer group: see parameter_group in train.py")


class GPTOptimizer(optim.MultiOptimizer):
    """An optimizer for each group of parameters, and the schedules that move all of them."""

    def __init__(self, model, n_embd, streams):
        scale, adamw = (n_embd / 768) ** -0.5, partial(optim.AdamW, betas=ADAM_BETAS, eps=1e-10)
        self.groups = {
            "matrices": Muon(MATRIX_LR, streams),
            "embeddings": adamw(EMBEDDING_LR * scale, weight_decay=EMBEDDING_DECAY),
            "head": adamw(HEAD_LR * scale, weight_decay=HEAD_DECAY),
            "ngrams": optim.SGD(NGRAM_LR * scale),  # holds the rate; Trainer applies adagrad to the tables
            "x0": adamw(X0_LR, weight_decay=0.0),
            "resid": adamw(RESID_LR, weight_decay=0.0),
        }
        filters = [lambda path, p, name=name: parameter_group(path, p) == name for name in self.groups]
        super().__init__(list(self.groups.values()), filters[:-1])  # the last one gets the rest
        self.rates = {name: optimizer.learning_rate.item() for name, optimizer in self.groups.items()}
        self.init(model.trainable_parameters())
        self.schedule(0, 0.0)

    def schedule(self, step, progress):
        """Set rates, momentum and decay for step number `step`, when `progress` (0 to 1) of the budget is used.

        They are arrays in the optimizers' state, so a compiled update sees the new values.
        """
        for name, optimizer in self.groups.items():
            factor = (1 - NGRAM_WARMUP ** (step + 1)) ** 0.5 if name == "ngrams" else learning_rate_factor(progress)
            optimizer.learning_rate = self.rates[name] * factor
            if isinstance(optimizer, optim.AdamW):  # bias correction, which MLX leaves out by default
                first, second = (1 - beta ** (step + 1) for beta in optimizer.betas)
                optimizer.learning_rate *= second**0.5 / first
        muon = self.groups["matrices"].state
        start, end, steps = MOMENTUM
        muon["momentum"] = mx.array(start + (end - start) * min(1.0, step / steps))
        muon["decay"] = mx.array(WEIGHT_DECAY * (1 - progress))


# --- schedules -----------------------------------------------------------------------------------


def learning_rate_factor(progress):
    """Up over WARMUP, 1, down over WARMDOWN to FINAL_LR."""
    up = progress / WARMUP if WARMUP else 1.0
    down = (1 - progress) / WARMDOWN if WARMDOWN else 1.0
    return min(up, FINAL_LR + (1 - FINAL_LR) * min(1.0, down))


# --- training ------------------------------------------------------------------------------------


def build(vocab_size, sequence_length, compiled=GPU, **sizes):
    """A new model with its optimizer: (GPTConfig, Trainer). bench.py uses it too, with other sizes."""
    config = GPTConfig(vocab_size=vocab_size, sequence_length=sequence_length, **sizes)
    model, streams = GPT(config), prepare.compute_streams()
    return config, Trainer(model, GPTOptimizer(model, config.n_embd, streams), loss_fn, streams, compiled)


def main():
    run = prepare.Run(DATASET)
    mx.random.seed(run.seed)
    rows, micro_batches = cut_step(TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE, SEQUENCE_LENGTH)
    batches = run.batches(rows, SEQUENCE_LENGTH)
    config, trainer = build(run.tokenizer.vocab_size, SEQUENCE_LENGTH)
    # not real batches: what is drawn before the clock counts as training
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
