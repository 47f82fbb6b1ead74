"""Tables of n-grams: how a step reads and writes the few rows of them that it looks up, and fast forms for CUDA.

The fast forms are as those of kernels.py; figures of an H200, six layers of 640, 131,072 tokens a step, 12 tables of
2^19 rows of 320: tables and gates take a step from 87 to 97 ms, six of them the update.
"""

from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from harness import kernels
from harness.fast import made_for


class Table(nn.Module):
    """Two tables (2, rows, c), in `weight`; its call gives the rows for tokens (B, T) side by side: (B, T, 2 c).

    A gradient as large as they are is never made. Trainer looks the rows of a batch up beforehand and differentiates by
    them; RowOptimizer writes them. A subclass has slots(tokens): uint32 (2, B, T), the row of either table.
    look_up(weight, slots): the rows.
    """

    def __init__(self, weight, look_up):
        super().__init__()
        self.weight, self._look_up, self._given = weight, look_up, None
        self.freeze()

    def __call__(self, tokens):
        return self._look_up(self.weight, self.slots(tokens)) if self._given is None else self._given


def tables_of(model):
    return [module for module in model.modules() if isinstance(module, Table)]


@contextmanager
def given(tables, rows):
    """Within it the calls of tables give these rows."""
    for table, row in zip(tables, rows, strict=True):
        table._given = row
    try:
        yield
    finally:
        for table in tables:
            table._given = None


class RowOptimizer(optim.Optimizer):
    """Updates the rows of tables that a step looked up.

    rule(weight, squares, slots, gradient, rate) returns a table's new weight and squares (2, rows). slots: (2, N);
    gradient: (N, 2 c), of the rows in them.
    """

    def __init__(self, learning_rate, rule, model):
        super().__init__()
        self.rule, squares = rule, [mx.zeros(table.weight.shape[:2]) for table in tables_of(model)]
        self.state |= {"learning_rate": mx.array(learning_rate), "squares": squares}

    def update_tables(self, tables, looked_up):
        """looked_up: [(tokens (B, T), [gradient (B, T, 2 c) for each table]), …], all parts of a step."""
        squares = self.state["squares"]
        for i, table in enumerate(tables):
            slots = mx.concatenate([table.slots(tokens).reshape(2, -1) for tokens, _ in looked_up], axis=1)
            gradient = mx.concatenate([rows[i].reshape(-1, rows[i].shape[-1]) for _, rows in looked_up])
            table.weight, squares[i] = self.rule(table.weight, squares[i], slots, gradient, self.learning_rate)


# --- CUDA ------------------------------------------------------------------------------------------

# One thread for P channels of one head of a token.
GATED = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, at = i * P, head = at / D;
    if (at >= N) return;
"""


@made_for("8888d082")
def add_gated(v, gates, rows, *, GATE_MAX):
    """In one pass, and in another backward, for any number of rows."""
    width, n = 8, range(len(rows))
    constants = {"N": v.size, "T": v.dtype, "D": v.shape[-1], "P": width, "GATE_MAX": f"{float(GATE_MAX)}f"}
    forth = "".join(ADD_GATED.replace("#", str(k)) for k in n)
    back = "".join(ADD_GATED_VJP.replace("#", str(k)) for k in n)

    def named(gates_and_rows):
        return {f"{kind}{k}": gates_and_rows[2 * k + j] for k in n for j, kind in enumerate(("gate", "row"))}

    @mx.custom_function
    def forward(v, *others):
        body, outputs = f"{GATED} auto x = load<P>(v + at); {forth} store(out + at, x);", {"out": (v.shape, v.dtype)}
        return kernels.launch("add_gated", body, v.size // width, {"v": v, **named(others)}, outputs, constants)[0]

    @forward.vjp
    def backward(primals, cotangent, output):
        inputs, body = {"g": cotangent, **named(primals[1:])}, f"{GATED} auto gs = load<P>(g + at); {back}"
        outputs = {f"g{name}": (x.shape, x.dtype) for name, x in named(primals[1:]).items()}
        return cotangent, *kernels.launch("add_gated_vjp", body, v.size // width, inputs, outputs, constants)

    return forward(v, *(x for pair in zip(gates, rows, strict=True) for x in pair))


ADD_GATED = """{
    auto row = load<P>(row# + at);
    float w = GATE_MAX / (1 + __expf(-(float)gate#[head]));
    for (int m = 0; m < P; ++m) x.x[m] = (T)((float)x.x[m] + w * (float)row.x[m]);
}"""
ADD_GATED_VJP = """{
    auto row = load<P>(row# + at);
    float w = GATE_MAX / (1 + __expf(-(float)gate#[head])), dot = 0;
    for (int m = 0; m < P; ++m) dot += (float)gs.x[m] * (float)row.x[m], row.x[m] = (T)(w * (float)gs.x[m]);
    store(grow# + at, row);
    dot = sum_over(dot, D / P);
    if (at % D == 0) ggate#[head] = (T)(dot * w * (1 - w / GATE_MAX));
}"""

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


@made_for("ec04984d")
def gated_norm(y, gate, *, GATE_MAX):
    """In one pass, and in another backward, which takes the norm anew."""
    width = 8
    constants = {"N": y.size, "T": y.dtype, "D": y.shape[-1], "P": width, "GATE_MAX": f"{float(GATE_MAX)}f"}

    @mx.custom_function
    def forward(y, gate):
        body, inputs, outputs = GATED + NORM_OF_HEAD + GATED_NORM, {"y": y, "gate": gate}, {"out": (y.shape, y.dtype)}
        return kernels.launch("gated_norm", body, y.size // width, inputs, outputs, constants)[0]

    @forward.vjp
    def backward(primals, cotangent, output):
        body, inputs = GATED + NORM_OF_HEAD + GATED_NORM_VJP, {"g": cotangent, "y": y, "gate": gate}
        outputs = {"gy": (y.shape, y.dtype), "ggate": (gate.shape, gate.dtype)}
        return kernels.launch("gated_norm_vjp", body, y.size // width, inputs, outputs, constants)

    return forward(y, gate)


# One thread for P channels of a token's row in one of the two tables.
ROWS_AT = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, n = i / (2 * C / P), channel = i % (2 * C / P) * P;
    if (n >= N) return;
    const size_t half = channel / C, row = half * ROWS + slots[half * N + n];
    store(out + n * 2 * C + channel, load<P>(tables + row * C + channel % C));
"""


@made_for("2e7d03b2")
def rows_at(tables, slots):
    """No gradient comes back through it."""
    (_, rows, C), (_, B, T) = tables.shape, slots.shape
    constants = {"N": B * T, "C": C, "ROWS": rows, "P": 8 if C % 8 == 0 else 1}
    inputs, outputs = {"tables": tables, "slots": slots}, {"out": ((B, T, 2 * C), tables.dtype)}
    return kernels.launch("rows_at", ROWS_AT, 2 * B * T * C // constants["P"], inputs, outputs, constants)[0]


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


@made_for("0e3a68a2")
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
