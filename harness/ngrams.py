"""Tables of n-grams: how a step reads and writes the few rows of them that it looks up, and what gates do with them.

The second part has fast forms for CUDA, as kernels.py explains them.

On an H200, six layers of 640, 131,072 tokens a step, 12 tables of 2^19 rows of 320, writing takes 6 of some 97 ms.
"""

import mlx.core as mx
import mlx.nn as nn

from harness import kernels


class Table(nn.Module):
    """Two tables (2, rows, c), in `weight`; its call gives the rows for tokens (B, T) side by side: (B, T, 2 c).

    A gradient as large as they are is never made. Trainer looks the rows of a batch up beforehand, differentiates by
    them, and `update` writes them. A subclass has slots(tokens): uint32 (2, B, T), the row of either table.
    rule(weight, squares, slots, gradient, rate): new weight and squares (2, rows), of slots (2, N) and the gradient
    (N, 2 c) of the rows in them.
    """

    def __init__(self, weight, rule):
        super().__init__()
        self.weight, self._squares, self._rule, self._given = weight, mx.zeros(weight.shape[:2]), rule, None
        self.freeze()

    def __call__(self, tokens):
        if self._given is not None:
            return self._given
        slots = self.slots(tokens)
        if kernels.CUDA and self.weight.shape[2] % 8 == 0:
            return rows_at(self.weight, slots)
        return mx.concatenate([part[at] for part, at in zip(self.weight, slots, strict=True)], axis=-1)


def give(tables, rows):
    """From here on calls of tables give these rows; None: those that they look up."""
    for table, row in zip(tables, rows, strict=True):
        table._given = row


def update(tables, looked_up, rate):
    """Write rows. looked_up: [(tokens (B, T), [gradient (B, T, 2 c) for each table]), …], all parts of a step."""
    for i, table in enumerate(tables):
        slots = mx.concatenate([table.slots(tokens).reshape(2, -1) for tokens, _ in looked_up], axis=1)
        gradient = mx.concatenate([rows[i].reshape(-1, rows[i].shape[-1]) for _, rows in looked_up])
        table.weight, table._squares = table._rule(table.weight, table._squares, slots, gradient, rate)


# --- CUDA ------------------------------------------------------------------------------------------

# One thread for eight channels of a token.
ROWS_AT = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, n = i / (2 * C / 8), channel = i % (2 * C / 8) * 8;
    if (n >= N) return;
    const size_t half = channel / C, row = half * ROWS + slots[half * N + n];
    store(out + n * 2 * C + channel, load<8>(tables + row * C + channel % C));
"""


def rows_at(tables, slots):
    """Rows (B, T, 2 c) of two tables (2, rows, c), side by side, without a gradient. slots: (2, B, T)."""
    (_, rows, C), (_, B, T) = tables.shape, slots.shape
    constants = {"N": B * T, "C": C, "ROWS": rows}
    inputs, outputs = {"tables": tables, "slots": slots}, {"out": ((B, T, 2 * C), tables.dtype)}
    return kernels.launch("rows_at", ROWS_AT, B * T * C // 4, inputs, outputs, constants)[0]


# Of the tokens that looked up one row, the last owns it: there the others' gradients are added. One thread for
# a token; one for four channels of a token; one warp for a row of the tables.
OWNERS = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < 2 * N) atomicMax(owner + i / N * ROWS + slots[i], (unsigned)(i % N + 1));
"""
SUMS_OF_ROWS = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, n = i / (2 * C / 4), channel = i % (2 * C / 4) * 4;
    if (n >= N) return;
    const size_t half = channel / C, to = half * N + owner[half * ROWS + slots[half * N + n]] - 1;
    auto x = load<4>(g + n * 2 * C + channel);
    add4(sums + to * C + channel % C, (float)x.x[0], (float)x.x[1], (float)x.x[2], (float)x.x[3]);
"""
ADAGRAD = """
    const size_t row = WARP;
    if (row >= 2 * ROWS) return;
    const unsigned own = owner[row];
    const float* g = sums + (row / ROWS * N + own - 1) * C;
    float square = 0;
    for (int j = 4 * LANE; own && j < C; j += 128) {
        auto x = load<4>(g + j);
        for (int m = 0; m < 4; ++m) square += x.x[m] * x.x[m];
    }
    square = squares[row] + sum_over(square, 32) / C;
    if (LANE == 0) new_squares[row] = square;
    const float step = rate[0] * rsqrtf(square + 1e-20f);
    for (int j = 4 * LANE; j < C; j += 128) {
        auto x = load<4>(tables + row * C + j);
        if (own) {
            auto y = load<4>(g + j);
            for (int m = 0; m < 4; ++m) x.x[m] = (T)((float)x.x[m] - step * y.x[m]);
        }
        store(new_tables + row * C + j, x);
    }
"""


def adagrad(tables, squares, slots, gradient, rate):
    """Gradients are added up for the rows that were looked up alone; tables are read and written once."""
    (_, rows, C), N = tables.shape, slots.shape[1]
    constants = {"N": N, "T": tables.dtype, "C": C, "ROWS": rows}
    inputs, outputs = {"slots": slots}, {"owner": ((2, rows), mx.uint32)}
    (owner,) = kernels.launch("owners", OWNERS, 2 * N, inputs, outputs, constants, init_value=0)
    inputs, outputs = {"g": gradient, "slots": slots, "owner": owner}, {"sums": ((2, N, C), mx.float32)}
    (sums,) = kernels.launch("sums_of_rows", SUMS_OF_ROWS, N * 2 * C // 4, inputs, outputs, constants, init_value=0)
    inputs = {"tables": tables, "squares": squares, "owner": owner, "sums": sums, "rate": rate}
    outputs = {"new_tables": (tables.shape, tables.dtype), "new_squares": (squares.shape, squares.dtype)}
    return kernels.launch("adagrad", ADAGRAD, 32 * 2 * rows, inputs, outputs, constants)


# One thread for P channels of one head of a token.
OF_HEAD = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, at = i * P, head = at / D;
    if (at >= N) return;
"""
# Once for each table, whose number stands in the place of #.
ADD_GATED = """{
    auto row = load<P>(rows# + at);
    float w = GATE_MAX / (1 + __expf(-(float)gate#[head]));
    for (int m = 0; m < P; ++m) x.x[m] = (T)((float)x.x[m] + w * (float)row.x[m]);
}"""
ADD_GATED_VJP = """{
    auto row = load<P>(rows# + at);
    float w = GATE_MAX / (1 + __expf(-(float)gate#[head])), dot = 0;
    for (int m = 0; m < P; ++m) {
        dot += (float)gs.x[m] * (float)row.x[m];
        row.x[m] = (T)(w * (float)gs.x[m]);
    }
    store(grows# + at, row);
    dot = sum_over(dot, D / P);
    if (at % D == 0) ggate#[head] = (T)(dot * w * (1 - w / GATE_MAX));
}"""


def add_gated(v, gates, rows, *, GATE_MAX):
    """In one pass for all tables, and in another backward."""
    v, numbers = v.transpose(0, 2, 1, 3), range(len(rows))
    names = [f"{kind}{k}" for kind in ("gate", "rows") for k in numbers]
    constants = {"N": v.size, "T": v.dtype, "D": v.shape[-1], "P": 8, "GATE_MAX": float(GATE_MAX)}
    forth, back = ("".join(text.replace("#", str(k)) for k in numbers) for text in (ADD_GATED, ADD_GATED_VJP))

    @mx.custom_function
    def forward(v, *given):
        text = f"{OF_HEAD} auto x = load<P>(v + at); {forth} store(out + at, x);"
        inputs, outputs = {"v": v, **dict(zip(names, given, strict=True))}, {"out": (v.shape, v.dtype)}
        return kernels.launch("add_gated", text, v.size // 8, inputs, outputs, constants)[0]

    @forward.vjp
    def backward(primals, g, _):
        given = dict(zip(names, primals[1:], strict=True))
        outputs = {f"g{name}": (x.shape, x.dtype) for name, x in given.items()}
        text = f"{OF_HEAD} auto gs = load<P>(g + at); {back}"
        return g, *kernels.launch("add_gated_vjp", text, v.size // 8, {"g": g, **given}, outputs, constants)

    return forward(v, *gates, *rows).transpose(0, 2, 1, 3)


NORM_OF_HEAD = """
    auto x = load<P>(y + at);
    float square = 0, w = GATE_MAX / (1 + __expf(-(float)gate[head]));
    for (int m = 0; m < P; ++m) square += (float)x.x[m] * (float)x.x[m];
    float scale = rsqrtf(sum_over(square, D / P) / D + 1e-6f);
"""
GATED_NORM = """
    for (int m = 0; m < P; ++m) x.x[m] = (T)(w * scale * (float)x.x[m]);
    store(out + at, x);
"""
GATED_NORM_VJP = """
    auto gs = load<P>(g + at);
    float dot = 0;
    for (int m = 0; m < P; ++m) dot += (float)gs.x[m] * scale * (float)x.x[m];
    dot = sum_over(dot, D / P);
    if (at % D == 0) ggate[head] = (T)(dot * w * (1 - w / GATE_MAX));
    for (int m = 0; m < P; ++m) gs.x[m] = (T)(w * scale * ((float)gs.x[m] - scale * (float)x.x[m] * dot / D));
    store(gy + at, gs);
"""


def gated_norm(y, gate, *, GATE_MAX):
    """In one pass, and in another backward, which takes the norm anew."""
    source = OF_HEAD + NORM_OF_HEAD
    constants = {"N": y.size, "T": y.dtype, "D": y.shape[-1], "P": 8, "GATE_MAX": float(GATE_MAX)}

    @mx.custom_function
    def forward(y, gate):
        inputs, outputs = {"y": y, "gate": gate}, {"out": (y.shape, y.dtype)}
        return kernels.launch("gated_norm", source + GATED_NORM, y.size // 8, inputs, outputs, constants)[0]

    @forward.vjp
    def backward(primals, g, _):
        inputs = {"g": g, "y": primals[0], "gate": primals[1]}
        outputs = {"gy": (y.shape, y.dtype), "ggate": (gate.shape, gate.dtype)}
        return kernels.launch("gated_norm_vjp", source + GATED_NORM_VJP, y.size // 8, inputs, outputs, constants)

    return forward(y, gate)
