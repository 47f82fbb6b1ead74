"""The baseline model and its training step: causal, exact, and the same however the work is divided."""

import ast
import importlib.util
import inspect
import math
import re
import shutil
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import data_sources
import train
from harness import batches, fast, kernels, model_state, ngrams

VOCAB, T = 61, 24


@pytest.fixture(autouse=True)
def narrow_gates(monkeypatch):
    """So that models of 32 channels have channels for every gate."""
    monkeypatch.setattr(train, "GATE_CHANNELS", 8)


def small_config(pattern="SL", sequence_length=T, depth=2, **config):
    """Two heads of 16 channels, whatever the depth."""
    sizes = {"vocab_size": VOCAB, "sequence_length": sequence_length, "depth": depth, "windows": pattern}
    return train.GPTConfig(**{**sizes, "head_dim": 16, "aspect_ratio": 32 // depth, **config})


def tiny(pattern="SL", sequence_length=T, depth=2, seed=0, **config):
    """A model whose every weight matters: none is zero, as the real start has it."""
    mx.random.seed(seed)
    model = train.GPT(small_config(pattern, sequence_length, depth, **config))
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters()))
    return model


def step_of(model, streams=1, compiled=False):
    lanes = [mx.default_stream(mx.cpu)] if streams == 1 else [mx.new_stream(mx.cpu) for _ in range(streams)]
    return train.Trainer(model, train.GPTOptimizer(model, 32, lanes), train.loss_fn, lanes, compiled)


def tokens_of(rows, columns=T + 1, seed=0):
    return mx.array(np.random.default_rng(seed).integers(0, VOCAB, (rows, columns)), mx.int32)


def weights(model):
    return {path: np.array(p, np.float64) for path, p in tree_flatten(model.parameters())}


def assert_same(a, b, rtol):
    """Every array of two flat trees agrees to `rtol` of its largest element."""
    assert a.keys() == b.keys()
    for path in a:
        assert np.abs(a[path] - b[path]).max() <= rtol * max(np.abs(b[path]).max(), 1e-30), path


# --- an edited train.py ----------------------------------------------------------------------------

SOURCE = inspect.getsource(train).replace("\nNGRAM_ROWS = 0 ", "\nNGRAM_ROWS = 97 ")  # so that all of it is at work
ON_CUDA = SOURCE.replace("\nCUDA = GPU and mx.cuda.is_available()\n", "\nCUDA = True\n")


def loaded(folder, source):
    """train.py with another text, as a module of its own."""
    path = folder / "train.py"
    path.write_text(source)
    fast.functions_of.cache_clear()
    spec = importlib.util.spec_from_file_location("edited_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(module):
    """Losses of three steps of a small model, one layer with a shorter window; its logits are computed as well."""
    mx.random.seed(0)
    _, trainer = module.build(64, 32, compiled=False, depth=2)
    trainer.model.blocks[0].attention._window = 16
    tokens, losses = mx.random.randint(0, 64, (4, 33)), []
    for step in range(3):
        trainer.optimizer.schedule(step, 0.0)
        losses.append(trainer.step([tokens]).item())
    mx.eval(trainer.model(tokens))
    return np.array(losses)


def noting_calls(source):
    """train.py's text, each function and method of which adds its name to CALLED; and their names."""
    tree, names = ast.parse(source), []
    for node in tree.body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef) and function.name != "main":
                names.append(f"{node.name}.{function.name}" if function is not node else node.name)
                function.body.insert(0, ast.parse(f"CALLED.add({names[-1]!r})").body[0])
    tree.body.insert(1, ast.parse("CALLED = set()").body[0])
    return ast.unparse(tree), names


# --- attention -------------------------------------------------------------------------------------


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def heads_by_hand(qkv, gate, rows):
    """In float64, from the definitions: unit root mean square, each pair of channels turned by its own angle."""
    qkv, gate, rows = (np.array(x, np.float64) for x in (qkv, gate, rows))
    B, length, _, H, D = qkv.shape
    angle = np.arange(length)[:, None, None] * train.ROPE_BASE ** (-np.arange(D // 2) / (D // 2))
    turned = []
    for x in (qkv[:, :, 0], qkv[:, :, 1]):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        pairs = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * angle)
        turned.append(np.concatenate([pairs.real, pairs.imag], -1))
    v = qkv[:, :, 2] + (2 / (1 + np.exp(-gate)))[..., None] * rows.reshape(B, length, H, D)
    return [x.transpose(0, 2, 1, 3) for x in (*turned, v)]


def test_queries_keys_and_values_are_what_their_definition_says():
    qkv, gate, rows = (mx.random.normal(shape) for shape in ((2, 11, 3, 3, 16), (2, 11, 3), (2, 11, 48)))
    q, k, v = train.heads(qkv)
    for found, expected in zip((q, k, train.add_gated(v, [gate], [rows])), heads_by_hand(qkv, gate, rows), strict=True):
        assert np.abs(np.array(found) - expected).max() < 1e-5


WINDOWS = {  # by pattern and depth: the last layer's is whole whatever the pattern says
    ("SSSL", 8): [12, 12, 12, 24, 12, 12, 12, 24],
    ("SSSL", 6): [12, 12, 12, 24, 12, 24],
    ("S", 3): [12, 12, 24],
    ("L", 3): [24, 24, 24],
}


def test_windows_are_as_the_pattern_says():
    for (pattern, depth), expected in WINDOWS.items():
        assert [small_config(pattern, T, depth).window(layer) for layer in range(depth)] == expected
    assert small_config("S", 9).window(0) == 5


@pytest.mark.parametrize("pattern", ["S", "L"])
@pytest.mark.parametrize("length", [1, T // 2 + 1, T, 2 * T + 5])
def test_a_layer_sees_what_is_before_it_in_its_piece_of_the_context(pattern, length):
    mx.random.seed(0)
    layer = train.Attention(small_config(pattern), 0)
    layer.out = mx.random.normal(layer.out.shape)
    x, tokens, window = mx.random.normal((1, length, 32)), tokens_of(1, length), T // 2 if pattern == "S" else T
    for j in {0, length // 3, T // 2 - 1, T // 2, length - 1} & set(range(length)):
        changed = x + mx.array(np.where(np.arange(length)[:, None] == j, 1.0, 0.0))
        moved = mx.abs(layer(changed, tokens) - layer(x, tokens)).max(axis=(0, 2))
        end = min(length, (j // window + 1) * window)
        assert np.flatnonzero(np.array(moved) > 1e-6).tolist() == list(range(j, end)), (length, j)


@pytest.mark.parametrize("ngram_rows", [0, 40])
@pytest.mark.parametrize("pattern", ["L", "SSSL"])
def test_the_future_and_other_rows_do_not_move_the_past(pattern, ngram_rows):
    model = tiny(pattern, depth=3, ngram_rows=ngram_rows)
    for length in (2, T // 2 + 1, T):
        tokens, cut = tokens_of(2, length), max(1, length // 2)
        logits = model(tokens)
        assert logits.shape == (2, length, VOCAB) and logits.dtype == mx.float32
        other = mx.concatenate([tokens[:1, :cut], (tokens[:1, cut:] + 1) % VOCAB], axis=1)
        moved = mx.abs(model(mx.concatenate([other, (tokens[1:] + 1) % VOCAB])) - logits)[0].max(axis=1)
        assert moved[:cut].max().item() < 1e-4 and moved[cut:].min().item() > 1e-3


# --- n-grams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 97, 2**19])
def test_an_n_gram_has_a_row_that_its_tokens_alone_decide(n, rows):
    table, again = (train.NGrams(small_config(ngram_rows=rows), 1, n) for _ in range(2))
    tokens = np.array(tokens_of(3, 50))
    slots = np.array(table.slots(mx.array(tokens)))
    assert slots.shape == (2, 3, 50) and slots.dtype == np.uint32 and slots.max() < rows
    assert (slots == np.array(again.slots(mx.array(tokens)))).all()
    changed = tokens.copy()
    changed[:, 20] = (changed[:, 20] + 1) % VOCAB
    moved = (slots != np.array(table.slots(mx.array(changed)))).any(axis=(0, 1))
    assert set(np.flatnonzero(moved)) <= set(range(20, 20 + n)), "no later token, and none too far back"
    assert rows == 1 or moved[20 : 20 + n].all()


def test_hashes_spread_n_grams_and_collide_in_one_table_at_a_time():
    pairs = np.stack(np.meshgrid(np.arange(1, 257), np.arange(256)), -1).reshape(-1, 2)
    others = [train.NGrams(small_config(ngram_rows=2**16), layer, 2) for layer in (1, 3)]
    slots = np.concatenate([np.array(table.slots(mx.array(pairs, mx.int32)))[:, :, 1] for table in others])  # (4, 2^16)
    for one in slots:  # as many rows are in use as if each pair drew its own: 1 - 1 / e of them
        assert len(np.unique(one)) == pytest.approx(2**16 * (1 - math.exp(-1)), rel=0.02)
    for i, one in enumerate(slots):
        for other in slots[:i]:
            assert len(np.unique(one.astype(np.uint64) << 32 | other)) > 0.999 * 2**16


def test_the_gradient_of_rows_is_that_of_the_whole_tables():
    """Summed over all places that looked a row up."""
    trainer, tokens = step_of(tiny(depth=3, ngram_rows=11)), tokens_of(4)
    tables = trainer.tables
    assert len(tables) == 4
    _, [(seen, gradients)] = trainer.gradients([tokens])
    trainer.model.unfreeze()
    whole = dict(tree_flatten(nn.value_and_grad(trainer.model, train.loss_fn)(trainer.model, tokens)[1]))
    names = {id(module): name for name, module in trainer.model.named_modules()}
    for table, gradient in zip(tables, gradients, strict=True):
        expected, summed = np.array(whole[f"{names[id(table)]}.weight"]), np.zeros(table.weight.shape)
        for half, part in enumerate(np.split(np.array(gradient), 2, axis=-1)):
            np.add.at(summed[half], np.array(table.slots(seen)[half]), part)
        assert np.abs(expected).max() > 0 and np.abs(summed - expected).max() < 1e-5 * np.abs(expected).max()


def test_rows_follow_adagrad_with_one_sum_of_squares_each():
    generator = np.random.default_rng(0)
    tables, squares = mx.array(generator.normal(size=(2, 9, 4)).astype(np.float32)), mx.zeros((2, 9))
    expected, sums = np.array(tables, np.float64), np.zeros((2, 9))
    for step in range(4):
        slots, gradient = generator.integers(0, 7, (2, 20)), generator.normal(size=(20, 8)) * 10.0**-step
        tables, squares = train.adagrad(tables, squares, mx.array(slots, mx.uint32), mx.array(gradient), mx.array(0.3))
        for half in range(2):
            whole = np.zeros((9, 4))
            np.add.at(whole, slots[half], gradient[:, 4 * half : 4 * half + 4])
            sums[half] += (whole**2).mean(-1)
            used = whole.any(-1)
            expected[half][used] -= 0.3 * whole[used] / np.sqrt(sums[half][used])[:, None]
        assert np.abs(np.array(tables) - expected).max() < 1e-5
    assert (np.array(squares)[:, 7:] == 0).all()  # rows that nothing looked up


# --- the loss --------------------------------------------------------------------------------------


def plain(name):
    """A function of train.py as it is written, without its fast form."""
    return inspect.unwrap(getattr(train, name))


def plain_loss(hidden, weight, targets):
    logits = train.SOFTCAP * mx.tanh(hidden @ weight.T / train.SOFTCAP)
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


LOSSES = [plain("loss_and_gradients"), partial(kernels.loss_and_gradients, SOFTCAP=train.SOFTCAP)]


@pytest.mark.parametrize("form", LOSSES, ids=["plain", "cpu"])
@pytest.mark.parametrize("rows", [1, 7, 16, 50, 1000])  # of 50: several chunks, a ragged last one, one alone
def test_the_loss_in_chunks_and_its_gradients_are_those_of_a_plain_cross_entropy(rows, form):
    mx.random.seed(1)
    hidden, weight = mx.random.normal((50, 16)), 3 * mx.random.normal((VOCAB, 16))
    targets = mx.random.randint(0, VOCAB, (50,))

    def in_chunks(hidden, weight):  # what follows the loss scales its gradient
        return 3 * train.mean_in_chunks(form, hidden, weight, targets, rows)

    def expected(hidden, weight):
        return 3 * plain_loss(hidden, weight, targets)

    a, b = (mx.value_and_grad(loss, argnums=(0, 1))(hidden, weight) for loss in (in_chunks, expected))
    assert a[0].item() == pytest.approx(b[0].item(), rel=1e-5)
    for x, y in zip(a[1], b[1], strict=True):
        assert mx.abs(x - y).max().item() < 1e-5 * mx.abs(y).max().item()


@pytest.mark.parametrize("form", LOSSES, ids=["plain", "cpu"])
def test_the_logits_never_stand_whole(form):
    n, vocab = 2048, 512
    hidden, weight, targets = mx.random.normal((n, 8)), mx.random.normal((vocab, 8)), mx.random.randint(0, vocab, (n,))
    loss = partial(train.mean_in_chunks, form, targets=targets, at_once=n // 64)
    mx.eval(hidden, weight, targets)
    limit = mx.set_memory_limit(1)  # nothing is begun before what went before has ended
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(lambda h, w: loss(h, w), argnums=(0, 1))(hidden, weight))
        assert mx.get_peak_memory() - before < 4 * n * vocab / 4
    finally:
        mx.set_memory_limit(limit)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-5), (mx.bfloat16, 0.02)])
def test_the_stream_is_mixed_in_full_precision_and_its_norm_takes_along_that_of_the_token_before(dtype, tolerance):
    x, y, x0 = (mx.random.normal((2, 5, 8)).astype(dtype) for _ in range(3))
    shift = mx.random.normal((8,))
    mixed, normed, same = train.mix(x, y, x0, mx.array([0.7]), mx.array([-0.2]), shift)
    expected = 0.7 * (np.array((x + y).astype(mx.float32))) - 0.2 * np.array(x0.astype(mx.float32))
    assert mixed.dtype == normed.dtype == dtype and same is x0
    np.testing.assert_allclose(np.array(mixed.astype(mx.float32)), expected, rtol=tolerance, atol=tolerance)
    expected /= np.sqrt((expected**2).mean(-1, keepdims=True))
    expected[:, 1:] += np.array(shift) * expected[:, :-1]
    np.testing.assert_allclose(np.array(normed.astype(mx.float32)), expected, rtol=2 * tolerance, atol=2 * tolerance)


def test_the_loss_is_the_mean_of_what_the_logits_say():
    model, tokens = tiny(), tokens_of(3)
    logits = np.array(model(tokens[:, :-1]), np.float64)
    picked = np.take_along_axis(softmax(logits), np.array(tokens[:, 1:])[..., None], -1)
    assert train.loss_fn(model, tokens).item() == pytest.approx(-np.log(picked).mean(), rel=1e-5)
    assert np.abs(logits).max() < train.SOFTCAP


@pytest.mark.parametrize("where", ["hidden", "head"])
def test_a_nan_reaches_the_loss(where):
    arrays = {"hidden": mx.ones((4, 16)), "head": mx.ones((VOCAB, 16))}
    arrays[where][2, 3] = math.nan
    assert math.isnan(train.loss_and_gradients(**arrays, targets=mx.array([0, 1, 2, 3]))[0].item())


def test_the_gradients_are_those_of_finite_differences():
    """The whole model, every kind of parameter: a step along the gradient changes the loss as it promises."""
    model, tokens = tiny(), tokens_of(4)
    _, gradients = nn.value_and_grad(model, train.loss_fn)(model, tokens)
    parameters = dict(tree_flatten(model.parameters()))
    for path, gradient in tree_flatten(gradients):
        norm = mx.sqrt(mx.square(gradient).sum()).item()
        step = 0.02 * max(1, mx.sqrt(mx.square(parameters[path]).sum()).item())
        losses = []
        for steps in (1, -1, 2, -2):  # large steps, since losses are float32; two sizes, to cancel their curvature
            moved = {**parameters, path: parameters[path] + steps * step / norm * gradient}
            other = tiny()
            other.load_weights(list(moved.items()))
            losses.append(train.loss_fn(other, tokens).item())
        slope = (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / (12 * step)
        assert slope == pytest.approx(norm, rel=0.01, abs=1e-4), path


def test_in_half_precision_the_residual_stream_stays_so_and_the_weights_do_not(monkeypatch):
    tokens = tokens_of(2)
    full = train.loss_fn(tiny(), tokens).item()
    monkeypatch.setattr(train, "COMPUTE_DTYPE", mx.bfloat16)
    model = tiny()
    seen, linear = [], train.linear
    monkeypatch.setattr(train, "linear", lambda x, weight: seen.append(x.dtype) or linear(x, weight))
    assert model.hidden(tokens[:, :-1]).dtype == mx.bfloat16
    assert set(seen) == {mx.bfloat16}
    assert model(tokens[:, :-1]).dtype == mx.float32
    assert train.loss_fn(model, tokens).item() == pytest.approx(full, rel=0.02)
    step_of(model).step([tokens])
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {mx.float32}


# --- training --------------------------------------------------------------------------------------


def test_the_loss_falls_when_it_overfits_one_batch():
    mx.random.seed(0)
    trainer, tokens = step_of(train.GPT(small_config())), tokens_of(2)
    losses = []
    for n in range(40):
        trainer.optimizer.schedule(n, 0.0)
        losses.append(trainer.step([tokens]).item())
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.01)  # it starts knowing nothing
    assert losses[-1] < 0.2


@pytest.mark.parametrize("ngram_rows", [0, 40])
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_accumulated_gradients_are_those_of_one_large_batch(streams, ngram_rows):
    tokens = tokens_of(12)
    large, parts = step_of(tiny(ngram_rows=ngram_rows)), step_of(tiny(ngram_rows=ngram_rows), streams)
    micro_batches = [tokens[i : i + 6] for i in range(0, 12, 6)]
    lanes, looked_up = parts.gradients(micro_batches)
    assert len(lanes) == streams and len(looked_up) == (2 * streams if ngram_rows else 0)
    loss = sum(loss.item() for loss, _ in lanes)
    assert loss == pytest.approx(large.gradients([tokens])[0][0][0].item(), rel=1e-5)
    mean = [dict(tree_flatten(gradients)) for _, gradients in lanes]
    mean = {path: sum(np.array(lane[path], np.float64) for lane in mean) for path in mean[0]}
    whole = dict(tree_flatten(large.gradients([tokens])[0][0][1]))
    assert_same(mean, {path: np.array(g, np.float64) for path, g in whole.items()}, 1e-5)
    for _ in range(3):
        assert parts.step(micro_batches).item() == pytest.approx(large.step([tokens]).item(), rel=1e-4)
    # In the mean: AdamW makes much of single gradients that are mere rounding, Muon of small singular values.
    a, b = weights(parts.model), weights(large.model)
    for path in a:
        assert np.sqrt(np.square(a[path] - b[path]).mean()) <= 5e-4 * np.sqrt(np.square(b[path]).mean()), path


@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU, MLX compiles with g++, which is not here")
@pytest.mark.slow
@pytest.mark.parametrize("ngram_rows", [0, 40])
def test_a_compiled_step_is_the_uncompiled_one(ngram_rows):
    plain, compiled = (step_of(tiny(depth=1, ngram_rows=ngram_rows), compiled=c) for c in (False, True))
    batches = [[tokens_of(2, seed=n), tokens_of(2, seed=10 + n)] for n in range(4)]
    for n, batch in enumerate(batches):
        for trainer in (plain, compiled):
            trainer.optimizer.schedule(n, n / 4)  # rates that change need no new compilation, and take effect
        assert compiled.step(batch).item() == pytest.approx(plain.step(batch).item(), rel=1e-4)
    assert_same(weights(compiled.model), weights(plain.model), 1e-3)


def states(step):
    return [(path, np.array(array)) for path, array in tree_flatten(step.state)]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_warm_up_leaves_no_trace(steps_before):
    warm, cold = (step_of(tiny(ngram_rows=40), 2) for _ in range(2))
    for step in (warm, cold):
        for n in range(steps_before):
            step.step([tokens_of(2, seed=n)])
    before = states(warm)
    with model_state.kept(warm.state):
        mx.eval(warm.step([tokens_of(2, seed=9), tokens_of(2, seed=8)]))
    after = states(warm)
    assert [path for path, _ in before] == [path for path, _ in after] and "_squares" in str(before)
    assert all((a == b).all() for (_, a), (_, b) in zip(before, after, strict=True))
    assert warm.step([tokens_of(2)]).item() == cold.step([tokens_of(2)]).item()
    assert all((a == b).all() for (_, a), (_, b) in zip(states(warm), states(cold), strict=True))


@pytest.mark.parametrize(("rows", "length", "total"), [(8, 64, 8 * 64 + 1), (8, 64, 8 * 32), (3, 10, 100)])
def test_a_total_batch_that_does_not_divide_is_refused(rows, length, total):
    with pytest.raises(SystemExit, match=f"error: .*{total} is not a multiple of .*{rows} x {length}"):
        batches.cut_step(total, rows, length)
    assert batches.cut_step(6 * rows * length, rows, length) == (rows, 6)


@pytest.mark.parametrize("name", data_sources.DATASETS)
def test_the_preset_serves_every_dataset(tmp_path, name):
    """What `make setup` does: only the line with DATASET changes."""
    other = loaded(tmp_path, re.sub(r'^DATASET = ".*?"', f'DATASET = "{name}"', SOURCE, flags=re.MULTILINE))
    assert other.DATASET == name
    length = data_sources.DATASETS[name].sequence_length
    assert batches.cut_step(other.TOTAL_BATCH_SIZE, other.DEVICE_BATCH_SIZE, length)[1] >= 1


# --- fast forms ------------------------------------------------------------------------------------

CHANGED = {  # each function with a fast form, or called by one: an edit, and the forms that it puts out of use
    "norm": ("x, None, 1e-6", "x + 0.1, None, 1e-6", ["gated_norm", "heads", "mix"]),
    "rope": ("scale=1.0", "scale=0.5", ["heads"]),
    "mix": ("x = x + y", "x = x + 2 * y", ["mix"]),
    "heads": ("return rope(q), rope(k), v", "return rope(q), rope(k), 2 * v", ["heads"]),
    "embed": ("return table[tokens]", "return (1 - table[tokens])", ["embed"]),
    "relu_squared": ("mx.square(mx.maximum(x, 0))", "mx.maximum(x, 0) ** 3", ["relu_squared"]),
    "add_gated": ("v = v + GATE_MAX", "v = v - GATE_MAX", ["add_gated"]),
    "gated_norm": ("* norm(y)", "* norm(y + 2)", ["gated_norm"]),
    "adagrad": ("rate * whole", "2 * rate * whole", ["adagrad"]),
    "linear": (".astype(x.dtype).T", ".astype(x.dtype).T / 2", ["loss_and_gradients"]),
    "softcap": ("mx.tanh(", "mx.sin(", ["loss_and_gradients"]),
    "logits_of": ("softcap(linear", "1.1 * softcap(linear", ["loss_and_gradients"]),
    "summed_loss": (".sum()", ".max()", ["loss_and_gradients"]),
    "loss_and_gradients": ("grad(summed_loss", "grad(lambda *a: 2 * summed_loss(*a)", ["loss_and_gradients"]),
}
# kernels: those with the name of their fast form, and others
FORWARD = {"embed", "mix", "heads", "add_gated", "gated_norm", "loss_and_gradients"}
BACKWARD = {"embed_vjp", "mix_vjp", "heads_vjp", "add_gated_vjp", "gated_norm_vjp"}
BACKWARD |= {"rows_at", "owners", "sums_of_rows", "adagrad"}
FORMS = {form for _, _, forms in CHANGED.values() for form in forms}


def form_of(name):
    return getattr(ngrams if hasattr(ngrams, name) else kernels, name)


def edited(name, source=SOURCE):
    old, new, _ = CHANGED[name]
    assert source.count(old) == 1, old
    return source.replace(old, new)


def out_of_use(module):
    """The fast forms that were made for other functions than the module's."""
    plain = {name: inspect.unwrap(getattr(module, name)) for name in FORMS}
    return sorted(name for name in FORMS if fast.source_hash(plain[name]) != fast.MADE_FOR[name])


def notes(forms):
    words = "or what it calls, was edited: it runs as it is written, without its fast form"
    return [f"note: {form}, {words}" for form in forms]


def test_every_fast_form_is_made_for_the_function_that_it_stands_at():
    pairs = re.findall(r"^@fast\((?:kernels|ngrams)\.(\w+).*\ndef (\w+)\(", SOURCE, re.MULTILINE)
    assert [form for form, _ in pairs] == [name for _, name in pairs] and len(pairs) == SOURCE.count("\n@fast(")
    assert {name for _, name in pairs} == FORMS
    for name in FORMS:
        form, source = form_of(name), fast.source_hash(plain(name))
        assert fast.MADE_FOR[name] == source, f"does the form of {name} still compute the same? then: {source!r}"
        named = {p.name for p in inspect.signature(form).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert named <= set(vars(train)), name


@pytest.mark.parametrize("name", CHANGED)
def test_an_edit_puts_the_forms_that_it_touches_out_of_use(tmp_path, name):
    assert out_of_use(loaded(tmp_path, edited(name))) == CHANGED[name][2]


@pytest.mark.parametrize("way", ["norm = nn.RMSNorm(1)", "norm = lambda x: x", "def norm(x):\n    return x"])
def test_a_function_that_is_bound_anew_is_an_edit(tmp_path, way):
    module = loaded(tmp_path, SOURCE.replace("\n# --- optimizer", f"\n{way}\n\n\n# --- optimizer", 1))
    assert "mix" in out_of_use(module)


def test_words_layout_and_constants_are_no_edit(tmp_path, capfd):
    other = re.sub('"""max.*"""\n', "# the same\n\n", SOURCE).replace("SOFTCAP = 15.0", "SOFTCAP = 0.5")
    module = loaded(tmp_path, other)
    inputs = mx.random.normal((5, 8)), mx.random.normal((64, 8)), mx.arange(5)
    found, expected = (f(*inputs)[0] for f in (module.loss_and_gradients, inspect.unwrap(module.loss_and_gradients)))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert other.count("# the same") == 1 and not out_of_use(module) and not capfd.readouterr().err


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    return trained(loaded(tmp_path_factory.mktemp("unedited"), SOURCE))


@pytest.mark.parametrize("name", ["relu_squared", "softcap"])
def test_an_edit_changes_the_training_loss(tmp_path, capfd, unedited, name):
    assert np.abs(trained(loaded(tmp_path, edited(name))) - unedited).max() > 1e-4
    assert capfd.readouterr().err.splitlines() == notes(CHANGED[name][2])  # once, in many calls


@pytest.fixture
def launches(monkeypatch):
    """{kernel: its constants} of all that is launched: where there is no CUDA, a launch that computes nothing."""
    launched = {}

    def launch(name, body, threads, inputs, outputs, constants, block=256, init_value=None):
        types = [*(x.dtype for x in inputs.values()), *(kind for _, kind in outputs.values())]
        assert threads > 0 and {*types} <= {*kernels.NAMES}
        assert not [word for word in (*inputs, *outputs) if not re.search(rf"\b{word}\b", body)]
        launched[name] = constants
        return [mx.full(shape, 0.01, kind) for shape, kind in outputs.values()]

    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(kernels, "CUDA", True)
    return launched


@pytest.mark.parametrize("source", [SOURCE, ON_CUDA], ids=["cpu", "cuda"])
def test_no_function_of_train_is_without_effect(tmp_path, launches, monkeypatch, source):
    """Whatever is edited, the text of it runs."""
    monkeypatch.setattr(kernels, "CUDA", source == ON_CUDA)
    source, names = noting_calls(source)
    module = loaded(tmp_path, source)
    trained(module)
    assert sorted(module.CALLED) == sorted(names) and set(launches) <= {"rows_at"}  # the harness's own


def test_a_step_on_cuda_hands_the_kernels_what_their_sources_name(tmp_path, capfd, launches):
    module = loaded(tmp_path, ON_CUDA)
    module.ROPE_BASE, module.SOFTCAP, module.GATE_MAX = 500.0, 7.0, 3.0
    _, trainer = module.build(64, 32, compiled=False, depth=2)
    totals, looked_up = trainer.gradients([mx.random.randint(0, 64, (4, 33))])
    gradients = totals[0][1]
    mx.eval(gradients, trainer.update(totals, looked_up), trainer.state)
    shapes = [{path: x.shape for path, x in tree_flatten(t)} for t in (gradients, trainer.model.trainable_parameters())]
    assert shapes[0] == shapes[1] and set(launches) == FORWARD | BACKWARD and not capfd.readouterr().err
    assert launches["heads"]["ROPE_BASE"] == launches["heads_vjp"]["ROPE_BASE"] == 500.0
    assert launches["gated_norm"]["GATE_MAX"] == 3.0 and launches["loss_and_gradients"]["SOFTCAP"] == 7.0


def test_an_edit_takes_the_place_of_its_kernels_on_cuda(tmp_path, capfd, launches):
    trained(loaded(tmp_path, edited("norm", ON_CUDA)))
    assert FORWARD - set(launches) == {"gated_norm", "heads", "mix"}
    assert sorted(capfd.readouterr().err.splitlines()) == notes(CHANGED["norm"][2])


@pytest.mark.skipif(not mx.cuda.is_available(), reason="kernels for CUDA")
@pytest.mark.parametrize("dtype, limit", [(mx.float32, 1e-4), (mx.bfloat16, 0.03)])
@pytest.mark.parametrize("B, length, H, D", [(2, 256, 4, 128), (1, 200, 3, 64), (3, 37, 5, 64)])
def test_the_kernels_compute_what_the_plain_functions_do(dtype, limit, B, length, H, D):
    """Results and gradients, the plain ones in float32."""

    def compare(kernel, plain_form, inputs):
        full = [x.astype(mx.float32) for x in inputs]
        weights = [mx.random.normal(x.shape) for x in plain_form(*full)]
        found, expected = (
            sum(mx.vjp(f, x, [w.astype(o.dtype) for w, o in zip(weights, f(*x), strict=True)]), [])
            for f, x in ((kernel, inputs), (plain_form, full))
        )
        for a, b in zip(found, expected, strict=True):
            apart, size = (mx.sqrt(mx.square(y).sum()).item() for y in (a.astype(mx.float32) - b, b))
            # One number is a sum over all of x, in which much cancels.
            assert apart <= limit * max(size, inputs[0].size ** 0.5 if b.size == 1 else 1e-4)

    with mx.stream(mx.gpu):
        x, y, x0 = (mx.random.normal((B, length, H * D)).astype(dtype) for _ in range(3))
        mixed, shift = [x, y, x0, mx.array([0.8]), mx.array([-0.3])], mx.random.normal((H * D,))
        for inputs in ([x, y], mixed, [*mixed, shift]):
            compare(kernels.mix, plain("mix"), inputs)
        compare(*(lambda x, y, s, f=f: f(x, y, shift=s) for f in (kernels.mix, plain("mix"))), [x, y, shift])
        compare(lambda x: [kernels.relu_squared(x)], lambda x: [plain("relu_squared")(x)], [x])
        qkv, tokens = mx.random.normal((B, length, 3, H, D)).astype(dtype), tokens_of(B, length)
        compare(partial(kernels.heads, ROPE_BASE=train.ROPE_BASE), plain("heads"), [qkv])
        table = mx.random.normal((VOCAB, H * D))
        compare(lambda t: [kernels.embed(t, tokens, COMPUTE_DTYPE=dtype)], lambda t: [t[tokens]], [table])
        y, gate = x.reshape(B, length, H, D), mx.random.normal((B, length, H)).astype(dtype)
        forms = partial(ngrams.gated_norm, GATE_MAX=train.GATE_MAX), plain("gated_norm")
        compare(*(lambda y, g, f=f: [f(y, g)] for f in forms), [y, gate])
        v, gates, rows = mx.swapaxes(y, 1, 2), [gate, 2 * gate], [x0.astype(dtype), x]
        forms = partial(ngrams.add_gated, GATE_MAX=train.GATE_MAX), plain("add_gated")
        compare(*(lambda v, *o, f=f: [f(v, o[:2], o[2:])] for f in forms), [v, *gates, *rows])
        tables, slots = mx.random.normal((2, 300, H * D // 2)).astype(dtype), mx.random.randint(0, 200, (2, B * length))
        slots = slots.astype(mx.uint32)
        looked_up = ngrams.rows_at(tables, slots.reshape(2, B, length)).reshape(B * length, -1)
        assert mx.array_equal(looked_up, mx.concatenate([tables[0][slots[0]], tables[1][slots[1]]], axis=-1))
        step = tables, mx.random.uniform(shape=(2, 300)), slots, x.reshape(-1, H * D), mx.array(0.1)
        for a, b in zip(ngrams.adagrad(*step), plain("adagrad")(*step), strict=True):
            assert mx.allclose(a.astype(mx.float32), b.astype(mx.float32), rtol=limit, atol=limit)
        for vocab in (VOCAB, 8192):
            h, w = mx.random.normal((50, 64)).astype(dtype), mx.random.normal((vocab, 64)).astype(dtype)
            targets = mx.random.randint(0, vocab, (50,))
            computed = kernels.loss_and_gradients(h, w, targets, SOFTCAP=train.SOFTCAP)
            expected = plain("loss_and_gradients")(h.astype(mx.float32), w.astype(mx.float32), targets)
            for a, b in zip((computed[0], *computed[1]), (expected[0], *expected[1]), strict=True):
                apart = mx.sqrt(mx.square(a.astype(mx.float32) - b).sum())
                assert apart.item() <= limit * mx.sqrt(mx.square(b).sum()).item()
