"""Fast forms of functions of train.py: each computes, rounding aside, what the function of its name does there.

On every backend relu_squared, whose gradient keeps less; on a CPU the loss by hand; on CUDA kernels. Arguments are
those of the plain functions, in any 2- or 4-byte float type; the CUDA kernels take head_dim 64 or 128. Figures: one
H100, depth 8, forward and backward of 32,768 tokens.
"""

import ctypes
from functools import cache
from zlib import crc32

import mlx.core as mx

CUDA = mx.default_device().type == mx.gpu and mx.cuda.is_available()

# --- every backend ---------------------------------------------------------------------------------


def relu_squared(x):
    """The gradient needs only the result, so x is not kept: 134 MB less a layer."""

    @mx.custom_function
    def forward(x):
        return mx.square(mx.maximum(x, 0))

    @forward.vjp
    def backward(x, g, out):
        return 2 * mx.sqrt(out) * g

    return forward(x)


def loss_and_gradients(hidden, head, targets, *, SOFTCAP):
    """On CUDA 840 -> 140 us for 8,192 rows; on a CPU a step of two layers of 192 takes 24 % less processor time."""
    if not CUDA:
        return cpu_loss_and_gradients(hidden, head, targets, SOFTCAP)
    (n, _), vocab = hidden.shape, len(head)
    inputs = {"logits": hidden @ head.T, "targets": targets}
    outputs = {"loss": ((n,), mx.float32), "gradient": ((n, vocab), hidden.dtype)}
    constants = {"T": hidden.dtype, "V": vocab, "P": 8 if vocab % 8 == 0 else 1, "SOFTCAP": float(SOFTCAP)}
    loss, gradient = launch("loss_and_gradients", LOSS, 512 * n, inputs, outputs, constants, block=512)
    return loss.sum(), (gradient @ head, gradient.T @ hidden)


# --- CPU -------------------------------------------------------------------------------------------


def exp(x):
    """e^x for |x| < 80: 2^i times a polynomial for 2^f, i + f = x / ln 2; relative error 4e-6."""
    x = x * 1.4426950408889634
    i = mx.round(x)
    f = x - i
    power = 1 + f * (0.6931472 + f * (0.2402265 + f * (0.0555041 + f * (0.0096181 + f * 0.0013333))))
    return power * mx.view((i.astype(mx.int32) + 127) << 23, mx.float32)


def cpu_loss_and_gradients(hidden, head, targets, cap):
    """Without MLX's own exp and tanh, which take four times as long as `exp` above."""
    logits, target = (hidden @ head.T).astype(mx.float32), targets[:, None]
    t = 1 - 2 / (1 + exp(mx.clip(logits * (2 / cap), -20, 20)))  # tanh
    e = exp(cap * t)  # logits are bounded, so no maximum needs to be subtracted
    total, at_target = e.sum(axis=1, keepdims=True), mx.take_along_axis(t, target, axis=1)
    gradient = e / total * (1 - t * t)
    hit = mx.take_along_axis(gradient, target, axis=1) - (1 - at_target * at_target)
    gradient = mx.put_along_axis(gradient, target, hit, axis=1).astype(hidden.dtype)
    return (mx.log(total) - cap * at_target).sum(), (gradient @ head, gradient.T @ hidden)


# --- CUDA ------------------------------------------------------------------------------------------

# The compiler knows neither half type without heavy headers, with which a kernel takes more than a second.
HEADER = """
#define LANE (threadIdx.x % 32)
#define WARP ((blockIdx.x * (size_t)blockDim.x + threadIdx.x) / 32)

#define HALF(name, to_float, from_float) struct name { \\
    unsigned short x; \\
    name() = default; \\
    __device__ name(float f) { asm(from_float : "=h"(x) : "f"(f)); } \\
    __device__ operator float() const { float f; asm(to_float : "=f"(f) : "h"(x)); return f; } };
HALF(half, "cvt.f32.f16 %0, %1;", "cvt.rn.f16.f32 %0, %1;")
HALF(bfloat, "{.reg .b16 zero; mov.b16 zero, 0; mov.b32 %0, {zero, %1};}", "cvt.rn.bf16.f32 %0, %1;")

template <typename X, int n> struct alignas(n * sizeof(X)) Pack { X x[n]; };  // read and written as one
template <int n, typename X> __device__ Pack<X, n> load(const X* x) { return *(const Pack<X, n>*)x; }
template <int n, typename X> __device__ void store(X* x, Pack<X, n> y) { *(Pack<X, n>*)x = y; }

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
NAMES = {mx.float32: "float", mx.bfloat16: "bfloat", mx.float16: "half", mx.int32: "int", mx.uint32: "unsigned"}


@cache
def machine_code(name, source):
    """`source`, which defines the kernel `name`, compiled for this GPU by the compiler that MLX has loaded (NVRTC).

    mx.fast.cuda_kernel would take 1.3 s for each kernel at each start: its headers are large, and it keeps no result.
    """
    nvrtc, program, size = ctypes.CDLL("libnvrtc.so.13"), ctypes.c_void_p(), ctypes.c_size_t()

    def result(kind):
        getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
        return buffer.raw

    options = [f"--gpu-architecture={mx.device_info()['architecture']}".encode()]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    if nvrtc.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(*options)):
        raise RuntimeError(f"kernel {name} does not compile: {result('ProgramLog').decode()}")
    return result("CUBIN")


def launch(name, body, threads, inputs, outputs, constants, block=256, init_value=None):
    """Run a kernel whose body names what it gets; returns the list of its outputs.

    threads: rounded up to whole blocks, so a body checks its bounds. inputs: {name: array}; outputs: {name: (shape,
    dtype)}; constants: {name: a type or a number}, compiled in.
    """
    types = {n: f"const {NAMES[x.dtype]}" for n, x in inputs.items()} | {n: NAMES[t] for n, (_, t) in outputs.items()}
    signature = ", ".join(f"{kind}* {n}" for n, kind in types.items())
    numbers = {n: f"{value}f" if isinstance(value, float) else value for n, value in constants.items()}
    defines = "".join(f"#define {n} {NAMES.get(value, value)}\n" for n, value in numbers.items())
    source = f'{HEADER}{defines}extern "C" __global__ void NAME({signature}) {{{body}}}'
    name = f"{name}_{crc32(source.encode()):08x}"
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=machine_code(name, source.replace("NAME", name)),
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        scalars=[],
        grid=(threads, 1, 1),
        threadgroup=(block, 1, 1),
        init_value=init_value,
        ensure_row_contiguous=True,
    )


# One thread for four channels of a token.
EMBED = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, n = i / (C / 4), channel = i % (C / 4) * 4;
    if (n >= N) return;
    auto row = load<4>(table + tokens[n] * (size_t)C + channel);
    Pack<T, 4> x;
    for (int m = 0; m < 4; ++m) x.x[m] = (T)row.x[m];
    store(out + n * C + channel, x);
"""
EMBED_VJP = """
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, n = i / (C / 4), channel = i % (C / 4) * 4;
    if (n >= N) return;
    auto x = load<4>(g + n * C + channel);
    add4(out + tokens[n] * (size_t)C + channel, (float)x.x[0], (float)x.x[1], (float)x.x[2], (float)x.x[3]);
"""


def embed(table, tokens, *, COMPUTE_DTYPE):
    """The gradient is added up four channels at a time: 440 -> 80 us."""
    constants = {"N": tokens.size, "C": table.shape[1], "T": COMPUTE_DTYPE}
    threads = tokens.size * table.shape[1] // 4

    @mx.custom_function
    def forward(table):
        inputs, outputs = {"table": table, "tokens": tokens}, {"out": ((*tokens.shape, table.shape[1]), COMPUTE_DTYPE)}
        return launch("embed", EMBED, threads, inputs, outputs, constants)[0]

    @forward.vjp
    def backward(table, g, _):
        inputs, outputs = {"g": g, "tokens": tokens}, {"out": (table.shape, table.dtype)}
        return launch("embed_vjp", EMBED_VJP, threads, inputs, outputs, constants, init_value=0)[0]

    return forward(table)


# One warp for R tokens in turn: each lane holds P neighbouring channels of every 32 * P. `before`: the norm of the
# previous token, for the token shift.
MIX = """
    const int first = WARP * R;
    float z[C / 32], before[C / 32] = {};
    for (int t = first - (SHIFTED && first % LENGTH); t < first + R && t < N; ++t) {
        const size_t row = (size_t)t * C + P * LANE;
        float square = 0;
        #pragma unroll
        for (int j = 0; j < C / 32; j += P) {
            auto xs = load<P>(x + row + 32 * j), ys = load<P>(y + row + 32 * j), zero = xs;
            if (MIXED) zero = load<P>(x0 + row + 32 * j);
            for (int k = 0; k < P; ++k) {
                float sum = (float)xs.x[k] + (float)ys.x[k];
                if (MIXED) sum = a[0] * sum + b[0] * (float)zero.x[k];
                xs.x[k] = (T)sum;
                z[j + k] = (float)xs.x[k];
                square += z[j + k] * z[j + k];
            }
            if (t >= first) store(out + row + 32 * j, xs);
        }
        float scale = rsqrtf(sum_over(square, 32) / C + 1e-6f);
        #pragma unroll
        for (int j = 0; j < C / 32; j += P) {
            Pack<T, P> ns;
            for (int k = 0; k < P; ++k) {
                float n = scale * z[j + k], share = SHIFTED && t % LENGTH ? shift[P * LANE + 32 * j + k] : 0;
                ns.x[k] = (T)(n + share * before[j + k]);
                before[j + k] = n;
            }
            if (t >= first) store(normed + row + 32 * j, ns);
        }
    }
"""

# The stream's gradient has two parts: g, and that through its norm, of which the next token takes a share. The
# gradients of a, b and shift are sums over tokens of g . (x + y), g . x0 and norm * the next token's; x + y is computed
# back from the result. The gradient of x0 is added to gafter, which its later uses gave.
MIX_VJP = """
    __shared__ float sums[SHIFTED ? C : 1];
    for (int i = threadIdx.x; SHIFTED && i < C; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    const int first = WARP * R;
    float along_sum = 0, along_first = 0, along_next[C / 32] = {};
    for (int t = first; t < first + R && t < N; ++t) {
        const size_t row = (size_t)t * C + P * LANE;
        const bool shared = SHIFTED && (t + 1) % LENGTH;
        float z[C / 32], n[C / 32], next[C / 32] = {}, square = 0, dot = 0;
        #pragma unroll
        for (int j = 0; j < C / 32; j += P) {
            auto zs = load<P>(out + row + 32 * j), ns = load<P>(gn + row + 32 * j), nexts = ns;
            if (shared) nexts = load<P>(gn + row + C + 32 * j);
            for (int k = 0; k < P; ++k) {
                z[j + k] = (float)zs.x[k];
                n[j + k] = (float)ns.x[k];
                if (shared) next[j + k] = (float)nexts.x[k], n[j + k] += shift[P * LANE + 32 * j + k] * next[j + k];
                square += z[j + k] * z[j + k];
                dot += z[j + k] * n[j + k];
            }
        }
        float scale = rsqrtf(sum_over(square, 32) / C + 1e-6f);
        float pull = sum_over(dot, 32) / C * scale * scale * scale;
        #pragma unroll
        for (int j = 0; j < C / 32; j += P) {
            auto gs = load<P>(g + row + 32 * j), zero = gs, gzero = gs;
            if (MIXED) zero = load<P>(x0 + row + 32 * j), gzero = load<P>(gafter + row + 32 * j);
            for (int k = 0; k < P; ++k) {
                float whole = (float)gs.x[k] + scale * n[j + k] - pull * z[j + k];
                along_next[j + k] += scale * z[j + k] * next[j + k];
                if (MIXED) {
                    along_sum += whole * (z[j + k] - b[0] * (float)zero.x[k]) / a[0];
                    along_first += whole * (float)zero.x[k];
                    gzero.x[k] = (T)((float)gzero.x[k] + b[0] * whole);
                    whole *= a[0];
                }
                gs.x[k] = (T)whole;
            }
            store(gx + row + 32 * j, gs);
            if (MIXED) store(gx0 + row + 32 * j, gzero);
        }
    }
    if (MIXED) {
        along_sum = sum_over(along_sum, 32);
        along_first = sum_over(along_first, 32);
        if (LANE == 0 && first < N) { gab[2 * WARP] = along_sum; gab[2 * WARP + 1] = along_first; }
    }
    for (int i = 0; SHIFTED && i < C / 32; ++i) atomicAdd(sums + P * LANE + i / P * P * 32 + i % P, along_next[i]);
    __syncthreads();
    for (int i = threadIdx.x; SHIFTED && i < C; i += blockDim.x) gshift[blockIdx.x * C + i] = sums[i];
"""


def mix(x, y, x0=None, a=None, b=None, shift=None):
    """One pass over memory, and one backward."""
    (B, T, C), none, one = x.shape, mx.zeros(1, x.dtype), mx.ones(1)
    mixed, shifted = x0 is not None, shift is not None
    R, block = 16 if shifted else 1, 256
    warps = -(-B * T // R)
    constants = {"N": B * T, "LENGTH": T, "T": x.dtype, "C": C, "P": 4 if C % 128 == 0 else 2}
    constants |= {"R": R, "MIXED": int(mixed), "SHIFTED": int(shifted)}

    @mx.custom_function
    def forward(x, y, x0, a, b, shift):
        inputs = {"x": x, "y": y, "x0": x0, "a": a, "b": b, "shift": shift}
        outputs = {"out": (x.shape, x.dtype), "normed": (x.shape, x.dtype)}
        return *launch("mix", MIX, 32 * warps, inputs, outputs, constants), x0

    @forward.vjp
    def backward(primals, cotangents, outputs):
        _, _, x0, a, b, shift = primals
        inputs = dict(zip(("g", "gn", "gafter"), cotangents, strict=True), out=outputs[0], x0=x0, a=a, b=b, shift=shift)
        outputs = {"gx": (x.shape, x.dtype), "gx0": (x0.shape, x0.dtype)}
        outputs["gab"] = (warps if mixed else 1, 2), mx.float32
        outputs["gshift"] = (-(-32 * warps // block) if shifted else 1, len(shift)), mx.float32
        gx, gx0, gab, gshift = launch("mix_vjp", MIX_VJP, 32 * warps, inputs, outputs, constants, block)
        return gx, gx, gx0, *mx.split(gab.sum(axis=0), 2), gshift.sum(axis=0)

    results = forward(x, y, *((x0, a, b) if mixed else (none, one, one)), shift if shifted else one)
    return results if mixed else results[:2]


# One warp for a token: each lane holds channels LANE + 32 j of the first half of a head, and those of the second half
# that are rotated with them.
ANGLES = """
    if (WARP >= N) return;
    float c[D / 64], s[D / 64];
    for (int j = 0; j < D / 64; ++j)
        sincosf((WARP % LENGTH) * exp2f(-(float)(LANE + 32 * j) / (D / 2) * log2f(ROPE_BASE)), s + j, c + j);
"""
HEADS = """
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
    for (int i = 4 * LANE; i < H * D; i += 128)
        store(v + WARP * H * D + i, load<4>(qkv + (WARP * 3 + 2) * H * D + i));
"""

# The norm's gradient needs the rotated result alone: a rotation keeps lengths and angles.
HEADS_VJP = """
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


def heads(qkv, *, ROPE_BASE):
    """One pass over memory, and one backward."""
    B, T, _, H, D = qkv.shape
    one = (B, T, H, D), qkv.dtype
    constants = {"N": B * T, "LENGTH": T, "T": qkv.dtype, "H": H, "D": D, "ROPE_BASE": float(ROPE_BASE)}

    @mx.custom_function
    def forward(qkv):
        outputs = {"q": one, "k": one, "v": one, "scales": ((B, T, 2 * H), mx.float32)}
        return launch("heads", ANGLES + HEADS, 32 * B * T, {"qkv": qkv}, outputs, constants)

    @forward.vjp
    def backward(qkv, cotangents, results):
        (gq, gk, gv, _), (q, k, _, scales) = cotangents, results
        inputs = {"q": q, "k": k, "scales": scales, "gq": gq, "gk": gk, "gv": gv}
        outputs = {"gqkv": (qkv.shape, qkv.dtype)}
        return launch("heads_vjp", ANGLES + HEADS_VJP, 32 * B * T, inputs, outputs, constants)[0]

    return tuple(x.transpose(0, 2, 1, 3) for x in forward(qkv)[:3])


# One block for a row. The soft cap bounds the logits, so no maximum needs to be subtracted before the exponential.
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
            t[j + k] = 1 - __fdividef(2, 1 + __expf((float)x.x[k] * (2 / SOFTCAP)));  // tanh
            e[j + k] = __expf(SOFTCAP * t[j + k]);
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
            if (i + k == target) loss[row] = logf(total) - SOFTCAP * t[j + k];
            g.x[k] = (T)((e[j + k] / total - (i + k == target)) * (1 - t[j + k] * t[j + k]));
        }
        store(gradient + (size_t)row * V + i, g);
    }
"""
