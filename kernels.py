"""CUDA kernels in place of four functions of train.py, which say what these compute: rows_of, mix, heads and
chunk_loss_and_gradients. Each goes once over memory where a chain of MLX's operations goes several times.

On other backends nothing here is used. Arrays are as train.py's functions have them, in any 2- or 4-byte float
type; head_dim is 64 or 128. Figures: one H100, depth 8, forward and backward of 32,768 tokens.
"""

import mlx.core as mx

HEADER = """
#define LANE (threadIdx.x % 32)
#define WARP ((blockIdx.x * (size_t)blockDim.x + threadIdx.x) / 32)

template <typename T, int n> struct alignas(n * sizeof(T)) Pack { T x[n]; };  // read and written as one
template <int n, typename T> __device__ Pack<T, n> load(const T* x) { return *(const Pack<T, n>*)x; }
template <int n, typename T> __device__ void store(T* x, Pack<T, n> y) { *(Pack<T, n>*)x = y; }

__device__ float twice_sigmoid(float x) { return 2 / (1 + __expf(-x)); }

__device__ void add4(float* x, float a, float b, float c, float d) {
    #if __CUDA_ARCH__ >= 900
    atomicAdd((float4*)x, make_float4(a, b, c, d));
    #else
    atomicAdd(x, a), atomicAdd(x + 1, b), atomicAdd(x + 2, c), atomicAdd(x + 3, d);
    #endif
}

__device__ float sum_over(float x, int lanes) {
    for (int i = lanes / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
    return x;
}
"""


def launch(name, source, threads, inputs, outputs, constants, block=256, init_value=None):
    """The outputs of a kernel.

    inputs: {name: array}; outputs: {name: (shape, dtype)}; constants: {name: a type, an int or a float}, known when
    it is compiled.
    """
    floats = {n: value for n, value in constants.items() if isinstance(value, float)}
    defines = "".join(f"#define {n} {value}f\n" for n, value in floats.items())
    names = {"input_names": list(inputs), "output_names": list(outputs)}
    kernel = mx.fast.cuda_kernel(name=name, **names, header=defines + HEADER, source=source)
    return kernel(
        inputs=list(inputs.values()),
        template=[item for item in constants.items() if item[0] not in floats],
        grid=(threads, 1, 1),
        threadgroup=(block, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        init_value=init_value,
    )


# A thread four channels of a token.
ROWS = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, n = i / (C / 4), channel = i % (C / 4) * 4;
    if (n >= tokens_shape[0] * tokens_shape[1]) return;
    auto from = load<4>(table + tokens[n] * (size_t)C + channel);
    Pack<T, 4> to;
    for (int m = 0; m < 4; ++m) to.x[m] = (T)from.x[m];
    store(out + n * C + channel, to);
"""
ROWS_VJP = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, n = i / (C / 4), channel = i % (C / 4) * 4;
    if (n >= tokens_shape[0] * tokens_shape[1]) return;
    auto x = load<4>(g + n * C + channel);
    add4(out + tokens[n] * (size_t)C + channel, (float)x.x[0], (float)x.x[1], (float)x.x[2], (float)x.x[3]);
"""


def rows_of(table, tokens, dtype):
    """train.rows_of, whose gradient is added up four channels at a time: 440 -> 80 us."""
    (B, T), C = tokens.shape, table.shape[1]
    threads, constants = B * T * C // 4, {"T": dtype, "C": C}

    @mx.custom_function
    def forward(table):
        outputs = {"out": ((B, T, C), dtype)}
        return launch("rows", ROWS, threads, {"table": table, "tokens": tokens}, outputs, constants)[0]

    @forward.vjp
    def backward(table, cotangent, output):
        inputs, outputs = {"g": cotangent, "tokens": tokens}, {"out": (table.shape, table.dtype)}
        return launch("rows_vjp", ROWS_VJP, threads, inputs, outputs, constants, init_value=0)[0]

    return forward(table)


# A warp a token: each lane holds P neighbouring channels of every 32 * P.
MIX = """
    if (WARP >= x_shape[0] * x_shape[1]) return;
    const size_t row = WARP * C + P * LANE;
    float z[C / 32], square = 0;
    #pragma unroll
    for (int j = 0; j < C / 32; j += P) {
        auto xs = load<P>(x + row + 32 * j), ys = load<P>(y + row + 32 * j), first = xs;
        if (x0_ndim > 1) first = load<P>(x0 + row + 32 * j);
        for (int k = 0; k < P; ++k) {
            float sum = (float)xs.x[k] + (float)ys.x[k];
            if (x0_ndim > 1) sum = a[0] * sum + b[0] * (float)first.x[k];
            xs.x[k] = (T)sum;
            z[j + k] = (float)xs.x[k];
            square += z[j + k] * z[j + k];
        }
        store(out + row + 32 * j, xs);
    }
    float scale = rsqrtf(sum_over(square, 32) / C + 1e-6f);
    #pragma unroll
    for (int j = 0; j < C / 32; j += P) {
        Pack<T, P> ns;
        for (int k = 0; k < P; ++k) ns.x[k] = (T)(scale * z[j + k]);
        store(normed + row + 32 * j, ns);
    }
"""

# The gradient of the stream, g, is that of its sum and that of its norm. Those of a and b are sums over rows of
# g . (x + y) and g . x0; x + y is had back from the result.
MIX_VJP = """
    if (WARP >= out_shape[0] * out_shape[1]) return;
    const size_t row = WARP * C + P * LANE;
    float z[C / 32], n[C / 32], square = 0, dot = 0;
    #pragma unroll
    for (int j = 0; j < C / 32; j += P) {
        auto zs = load<P>(out + row + 32 * j), ns = load<P>(gn + row + 32 * j);
        for (int k = 0; k < P; ++k) {
            z[j + k] = (float)zs.x[k];
            n[j + k] = (float)ns.x[k];
            square += z[j + k] * z[j + k];
            dot += z[j + k] * n[j + k];
        }
    }
    float scale = rsqrtf(sum_over(square, 32) / C + 1e-6f);
    float pull = sum_over(dot, 32) / C * scale * scale * scale, along_sum = 0, along_first = 0;
    #pragma unroll
    for (int j = 0; j < C / 32; j += P) {
        auto gs = load<P>(g + row + 32 * j), first = gs, gfirst = gs;
        if (x0_ndim > 1) first = load<P>(x0 + row + 32 * j);
        for (int k = 0; k < P; ++k) {
            float whole = (float)gs.x[k] + scale * n[j + k] - pull * z[j + k];
            if (x0_ndim > 1) {
                along_sum += whole * (z[j + k] - b[0] * (float)first.x[k]) / a[0];
                along_first += whole * (float)first.x[k];
                gfirst.x[k] = (T)(b[0] * whole);
                whole *= a[0];
            }
            gs.x[k] = (T)whole;
        }
        store(gx + row + 32 * j, gs);
        if (x0_ndim > 1) store(gx0 + row + 32 * j, gfirst);
    }
    if (x0_ndim > 1) {
        along_sum = sum_over(along_sum, 32);
        along_first = sum_over(along_first, 32);
        if (LANE == 0) { gab[2 * WARP] = along_sum; gab[2 * WARP + 1] = along_first; }
    }
"""


def mix(x, y, x0=None, a=None, b=None):
    """train.mix in one pass, and in another backward: 490 -> 110 us where it mixes."""
    (B, T, C), none, one = x.shape, mx.zeros(1, x.dtype), mx.ones(1)
    constants = {"T": x.dtype, "C": C, "P": 4 if C % 128 == 0 else 2}

    @mx.custom_function
    def forward(x, y, x0, a, b):
        inputs = {"x": x, "y": y, "x0": x0, "a": a, "b": b}
        outputs = {"out": (x.shape, x.dtype), "normed": (x.shape, x.dtype)}
        return launch("mix", MIX, 32 * B * T, inputs, outputs, constants)

    @forward.vjp
    def backward(primals, cotangents, outputs):
        _, _, x0, a, b = primals
        inputs = {"out": outputs[0], "g": cotangents[0], "gn": cotangents[1], "x0": x0, "a": a, "b": b}
        shapes = [(x.shape, x.dtype), (x0.shape, x0.dtype), ((B * T if x0.ndim > 1 else 1, 2), mx.float32)]
        outputs = dict(zip(("gx", "gx0", "gab"), shapes, strict=True))
        gx, gx0, gab = launch("mix_vjp", MIX_VJP, 32 * B * T, inputs, outputs, constants)
        return gx, gx, gx0, *mx.split(gab.sum(axis=0), 2)

    return forward(x, y, *((none, one, one) if x0 is None else (x0, a, b)))


# A warp a token: each lane holds channels LANE + 32 j of the first half of a head and, turned with them, of the second.
ANGLES = """
    if (WARP >= tokens_shape[0] * tokens_shape[1]) return;
    float c[D / 64], s[D / 64];
    for (int j = 0; j < D / 64; ++j)
        sincosf((WARP % tokens_shape[1]) * exp2f(-(float)(LANE + 32 * j) / (D / 2) * log2f(ROPE_BASE)), s + j, c + j);
"""
HEADS = (
    ANGLES
    + """
    for (int h = 0; h < 2 * H; ++h) {
        const T* x = qkv + (WARP * 3 * H + h) * D + LANE;
        T* y = (h < H ? q : k) + (WARP * H + h % H) * D + LANE;
        float u[D / 64], v[D / 64], square = 0;
        for (int j = 0; j < D / 64; ++j) {
            u[j] = (float)x[32 * j];
            v[j] = (float)x[32 * j + D / 2];
            square += u[j] * u[j] + v[j] * v[j];
        }
        float scale = rsqrtf(sum_over(square, 32) / D + 1e-6f);
        if (LANE == 0) scales[WARP * 2 * H + h] = scale;
        for (int j = 0; j < D / 64; ++j) {
            y[32 * j] = (T)(scale * (u[j] * c[j] - v[j] * s[j]));
            y[32 * j + D / 2] = (T)(scale * (u[j] * s[j] + v[j] * c[j]));
        }
    }
    for (int i = 4 * LANE; i < H * D; i += 128) {
        auto x = load<4>(qkv + (WARP * 3 + 2) * H * D + i);
        if (table_ndim > 1) {
            auto e = load<4>(table + tokens[WARP] * (size_t)(H * D) + i);
            float w = twice_sigmoid(gate[WARP * H + i / D]);
            for (int m = 0; m < 4; ++m) x.x[m] = (T)((float)x.x[m] + w * e.x[m]);
        }
        store(v + WARP * H * D + i, x);
    }
"""
)

# The norm's gradient needs the rotated result alone: a rotation keeps lengths and angles.
HEADS_VJP = (
    ANGLES
    + """
    for (int h = 0; h < 2 * H; ++h) {
        const size_t at = (WARP * H + h % H) * D + LANE;
        const T* y = (h < H ? q : k) + at;
        const T* g = (h < H ? gq : gk) + at;
        T* x = gqkv + (WARP * 3 * H + h) * D + LANE;
        float u[D / 64], v[D / 64], dot = 0;
        for (int j = 0; j < D / 64; ++j) {
            u[j] = (float)g[32 * j];
            v[j] = (float)g[32 * j + D / 2];
            dot += u[j] * (float)y[32 * j] + v[j] * (float)y[32 * j + D / 2];
        }
        dot = sum_over(dot, 32) / D;
        float scale = scales[WARP * 2 * H + h];
        for (int j = 0; j < D / 64; ++j) {
            u[j] = scale * (u[j] - dot * (float)y[32 * j]);
            v[j] = scale * (v[j] - dot * (float)y[32 * j + D / 2]);
            x[32 * j] = (T)(u[j] * c[j] + v[j] * s[j]);
            x[32 * j + D / 2] = (T)(v[j] * c[j] - u[j] * s[j]);
        }
    }
    for (int i = 4 * LANE; i < H * D; i += 128)
        store(gqkv + (WARP * 3 + 2) * H * D + i, load<4>(gv + WARP * H * D + i));
"""
)

# A thread four channels of a token: D / 4 lanes share a head and its gate.
EMBEDDING_VJP = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, n = i / (H * D / 4);
    if (n >= tokens_shape[0] * tokens_shape[1]) return;
    const int channel = i % (H * D / 4) * 4;
    const size_t at = tokens[n] * (size_t)(H * D) + channel;
    auto g = load<4>(gv + n * H * D + channel);
    auto e = load<4>(table + at);
    float w = twice_sigmoid(gate[n * H + channel / D]), dot = 0;
    for (int m = 0; m < 4; ++m) dot += (float)g.x[m] * e.x[m];
    dot = sum_over(dot, D / 4);
    if (channel % D == 0) ggate[n * H + channel / D] = (T)(dot * w * (1 - w / 2));
    add4(gtable + at, w * (float)g.x[0], w * (float)g.x[1], w * (float)g.x[2], w * (float)g.x[3]);
"""


def heads(qkv, gate, table, tokens, rope_base):
    """train.heads in one pass, and in two backward: 1.1 -> 0.25 ms a layer with an embedding."""
    B, T, _, H, D = qkv.shape
    narrow, embedded = ((B, T, H, D), qkv.dtype), gate is not None
    constants = {"T": qkv.dtype, "H": H, "D": D, "ROPE_BASE": float(rope_base)}

    @mx.custom_function
    def forward(qkv, gate, table):
        inputs = {"qkv": qkv, "gate": gate, "table": table, "tokens": tokens}
        outputs = {"q": narrow, "k": narrow, "v": narrow, "scales": ((B, T, 2 * H), mx.float32)}
        return launch("heads", HEADS, 32 * B * T, inputs, outputs, constants)

    @forward.vjp
    def backward(primals, cotangents, outputs):
        (qkv, gate, table), (q, k, _, scales), (gq, gk, gv, _) = primals, outputs, cotangents
        inputs = {"q": q, "k": k, "scales": scales, "gq": gq, "gk": gk, "gv": gv, "tokens": tokens}
        outputs = {"gqkv": (qkv.shape, qkv.dtype)}
        (gqkv,) = launch("heads_vjp", HEADS_VJP, 32 * B * T, inputs, outputs, constants)
        if not embedded:
            return gqkv, gate, table
        inputs = {"gv": gv, "gate": gate, "table": table, "tokens": tokens}
        outputs = {"ggate": (gate.shape, gate.dtype), "gtable": (table.shape, table.dtype)}
        threads = B * T * H * D // 4
        rest = launch("embedding_vjp", EMBEDDING_VJP, threads, inputs, outputs, constants, init_value=0)
        return gqkv, *rest

    q, k, v, _ = forward(qkv, *((gate, table) if embedded else (mx.zeros(1, qkv.dtype), mx.zeros(1))))
    return tuple(x.transpose(0, 2, 1, 3) for x in (q, k, v))


# A block a row. The soft cap bounds the logits, so no maximum needs to be subtracted before the exponential.
LOSS = """
    const int row = blockIdx.x, target = targets[row];
    constexpr int SHARE = (V + 512 * P - 1) / (512 * P) * P;
    float e[SHARE], t[SHARE], total = 0;
    __shared__ float parts[16];
    #pragma unroll
    for (int j = 0; j < SHARE; j += P) {
        const int i = P * threadIdx.x + 512 * j;
        if (i >= V) continue;
        auto x = load<P>(logits + (size_t)row * V + i);
        for (int k = 0; k < P; ++k) {
            t[j + k] = 1 - __fdividef(2, 1 + __expf((float)x.x[k] * (2 / CAP)));  // tanh
            e[j + k] = __expf(CAP * t[j + k]);
            total += e[j + k];
        }
    }
    total = sum_over(total, 32);
    if (LANE == 0) parts[threadIdx.x / 32] = total;
    __syncthreads();
    total = sum_over(parts[LANE % 16], 16);
    #pragma unroll
    for (int j = 0; j < SHARE; j += P) {
        const int i = P * threadIdx.x + 512 * j;
        if (i >= V) continue;
        Pack<T, P> g;
        for (int k = 0; k < P; ++k) {
            if (i + k == target) loss[row] = logf(total) - CAP * t[j + k];
            g.x[k] = (T)((e[j + k] / total - (i + k == target)) * (1 - t[j + k] * t[j + k]));
        }
        store(gradient + (size_t)row * V + i, g);
    }
"""


def chunk_loss_and_gradients(hidden, weight, targets, cap):
    """train.chunk_loss_and_gradients with one pass over the logits: 840 -> 140 us for 8,192 rows."""
    (n, _), vocab = hidden.shape, len(weight)
    inputs = {"logits": hidden @ weight.T, "targets": targets}
    outputs = {"loss": ((n,), mx.float32), "gradient": ((n, vocab), hidden.dtype)}
    constants = {"T": hidden.dtype, "V": vocab, "P": 8 if vocab % 8 == 0 else 1, "CAP": float(cap)}
    loss, gradient = launch("loss", LOSS, 512 * n, inputs, outputs, constants, block=512)
    return loss.sum(), (gradient @ weight, gradient.T @ hidden)
