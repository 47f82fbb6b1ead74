"""Five optimizer groups and their schedules, against a reference in float64 that shares no code with them."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import train

# --- the reference: one matrix, one step, in float64 -------------------------------------------------

# The Polar Express for five steps, from arXiv:2505.16932 with a safety factor of 1.02, as published.
COEFFICIENTS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalized(matrix):
    """By singular values: each goes through the five polynomials, the directions stay."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / (1.02 * np.sqrt((s**2).sum()) + 1e-6)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ v


class MuonReference:
    """Of one matrix, or of several in one parameter, each by itself."""

    def __init__(self, weight, rate, beta2=0.95):
        self.matrices = [MuonReference(matrix, rate) for matrix in weight] if weight.ndim == 3 else []
        self.weight, self.rate, self.beta2 = weight, rate, beta2
        self.momentum = np.zeros_like(weight)
        self.axis = 1 if weight.shape[0] >= weight.shape[1] else 0
        self.second = np.zeros_like(weight.sum(self.axis, keepdims=True))

    def step(self, gradient, factor, momentum, decay):
        if self.matrices:
            for matrix, part in zip(self.matrices, gradient, strict=True):
                matrix.step(part, factor, momentum, decay)
            self.weight = np.stack([matrix.weight for matrix in self.matrices])
            return
        self.momentum += (1 - momentum) * (gradient - self.momentum)
        update = orthogonalized(gradient + momentum * (self.momentum - gradient))
        norm = np.linalg.norm(update)
        self.second += (1 - self.beta2) * ((update**2).mean(self.axis, keepdims=True) - self.second)
        update = update / np.sqrt(self.second)
        update *= norm / np.linalg.norm(update)
        rows, columns = update.shape
        rate = self.rate * factor * math.sqrt(max(1, rows / columns))
        agrees = np.sign(update) * np.sign(self.weight) >= 0
        self.weight = self.weight - rate * update - rate * decay * np.where(agrees, self.weight, 0)


class AdamReference:
    def __init__(self, weight, rate, beta1, beta2, decay=0.0):
        self.weight, self.rate, self.betas, self.decay = weight, rate, (beta1, beta2), decay
        self.moments, self.steps = [np.zeros_like(weight)] * 2, 0

    def step(self, gradient, factor, momentum, decay):
        self.steps += 1
        powers = gradient, gradient**2
        self.moments = [b * m + (1 - b) * g for b, m, g in zip(self.betas, self.moments, powers, strict=True)]
        first, second = (1 - b**self.steps for b in self.betas)  # the averages begin at zero
        root = (np.sqrt(self.moments[1]) + 1e-10) / np.sqrt(second)
        shrunk = self.weight * (1 - self.rate * factor * self.decay * np.sqrt(second) / first)
        self.weight = shrunk - self.rate * factor * (self.moments[0] / first) / root


def reference_of(path, weight, n_embd):
    """Which rule and which rates a parameter has, told once more."""
    width = math.sqrt(768 / n_embd)
    if "embedding" in path:
        return AdamReference(weight, train.EMBEDDING_LR * width, 0.8, 0.95, train.EMBEDDING_DECAY)
    if path == "head" or "value_gate" in path or "shift" in path:
        return AdamReference(weight, train.HEAD_LR * width, 0.8, 0.95, train.HEAD_DECAY)
    if path == "x0_lambdas":
        return AdamReference(weight, train.X0_LR, 0.8, 0.95)
    if path == "resid_lambdas":
        return AdamReference(weight, train.RESID_LR, 0.8, 0.95)
    return MuonReference(weight, train.MATRIX_LR)


def scheduled(step, progress):
    """(factor of the learning rates, momentum, weight decay)"""
    left = 1 - progress
    factor = 1.0 if progress <= 1 - train.WARMDOWN else left / train.WARMDOWN
    factor = train.FINAL_LR + (1 - train.FINAL_LR) * factor
    return factor, 0.85 + 0.1 * min(step, 300) / 300, train.WEIGHT_DECAY * left


# --- what is compared ------------------------------------------------------------------------------


def build(seed=0, depth=2):
    mx.random.seed(seed)
    config = train.GPTConfig(vocab_size=61, sequence_length=16, depth=depth, head_dim=16, aspect_ratio=32 // depth)
    model = train.GPT(config)
    return model, optimizer_of(model)


def optimizer_of(model):
    return train.GPTOptimizer(model, 32, [mx.default_stream(mx.cpu)])


def float64(tree):
    return {path: np.array(array, np.float64) for path, array in tree_flatten(tree)}


def random_gradients(model, seed):
    """Gradients of very different sizes, some exactly zero, as unseen tokens have them."""
    generator, gradients = np.random.default_rng(seed), []
    for path, p in tree_flatten(model.parameters()):
        gradient = generator.normal(size=p.shape) * 10.0 ** generator.uniform(-4, 1)
        if "embedding" in path:
            gradient[generator.uniform(size=len(gradient)) < 0.5] = 0
        gradients.append((path, mx.array(gradient.astype(np.float32))))
    return tree_unflatten(gradients)


def assert_close(found, expected, path, rtol=1e-4):
    assert np.abs(found - expected).max() <= rtol * np.abs(expected).max(), path


@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.02, 0.1)])
def test_every_group_follows_its_reference_through_a_whole_schedule(monkeypatch, decays):
    monkeypatch.setattr(train, "EMBEDDING_DECAY", decays[0])
    monkeypatch.setattr(train, "HEAD_DECAY", decays[1])
    model, optimizer = build()
    references = {path: reference_of(path, weight, 32) for path, weight in float64(model.parameters()).items()}
    shapes = {r.weight.shape for r in references.values() if not isinstance(r, AdamReference)}
    assert shapes == {(32, 32), (3, 32, 32), (128, 32), (32, 128)}  # square, three of them, tall, wide
    for step, progress in enumerate((0.0, 0.2, 0.49, 0.51, 0.7, 0.9, 0.99)):
        gradients = random_gradients(model, seed=1000 + step)  # with no update so near 0 that rounding gives its sign
        optimizer.schedule(step, progress)
        optimizer.update(model, gradients)
        for path, gradient in float64(gradients).items():
            references[path].step(gradient, *scheduled(step, progress))
        for path, weight in float64(model.parameters()).items():
            assert_close(weight, references[path].weight, (step, path))
    start = float64(build()[0].parameters())
    assert all(np.abs(r.weight - start[path]).max() > 1e-3 for path, r in references.items())


@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (24, 24), (40, 39), (1, 20), (20, 1)])
def test_muon_follows_its_reference_for_any_shape(shape):
    """Three matrices of one shape, one stack; strong decay, and rows of very different sizes."""
    mx.random.seed(0)
    muon = train.Muon(0.05)
    muon.state["decay"] = mx.array(0.5)
    matrices = [mx.random.normal(shape) for _ in range(3)]
    muon.init(matrices)
    references = [MuonReference(np.array(m, np.float64), 0.05) for m in matrices]
    sizes = mx.array(10.0 ** np.random.default_rng(1).uniform(-1, 1, (shape[0], 1)))
    for step in range(6):
        muon.state["momentum"] = mx.array(0.85 + 0.02 * step)
        gradients = [mx.random.normal(shape) * sizes for _ in range(3)]
        matrices = muon.apply_gradients(gradients, matrices)
        for reference, gradient, matrix in zip(references, gradients, matrices, strict=True):
            reference.step(np.array(gradient, np.float64), 1.0, 0.85 + 0.02 * step, 0.5)
            assert_close(np.array(matrix, np.float64), reference.weight, (shape, step))


def test_a_zero_gradient_moves_nothing_and_gives_no_nan():
    model, optimizer = build()
    before = float64(model.parameters())
    optimizer.groups["matrices"].state["decay"] = mx.array(0.0)
    optimizer.update(model, tree_map(mx.zeros_like, model.parameters()))
    after = float64(model.parameters())
    assert all((after[path] == before[path]).all() for path in before)


# --- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "name", "parameter"),
    [
        (lambda model: model, "extra", (3,)),
        (lambda model: model, "extra", (8, 8)),
        (lambda model: model.blocks[0], "scale", (32,)),
        (lambda model: model.blocks[1].mlp, "experts", (2, 4, 8, 8)),
        (lambda model: model, "x0_lambdas_2", (2,)),
    ],
)
def test_a_parameter_of_no_group_is_an_error_that_names_it(place, name, parameter):
    model, _ = build()
    place(model)[name] = mx.zeros(parameter)
    with pytest.raises(ValueError, match=f"{name}.*no optimizer group"):
        optimizer_of(model)


# --- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_the_schedules_are_what_the_constants_say(monkeypatch, warmup):
    monkeypatch.setattr(train, "WARMUP", warmup)
    _, optimizer = build()
    width = math.sqrt(768 / 32)
    start = {"matrices": train.MATRIX_LR, "embeddings": train.EMBEDDING_LR * width, "head": train.HEAD_LR * width,
             "x0": train.X0_LR, "resid": train.RESID_LR, "ngrams": train.NGRAM_LR * width}  # fmt: skip
    betas = {"embeddings": (0.8, 0.95), "head": (0.8, 0.95), "x0": (0.8, 0.95), "resid": (0.8, 0.95)}
    for step, progress in [(0, 0.0), (10, 0.1), (10, 0.3), (30, 0.5), (100, 0.6), (299, 0.75), (300, 0.9), (999, 1.0)]:
        optimizer.schedule(step, progress)
        factor, momentum, decay = scheduled(step, progress)
        factor *= min(1, progress / warmup) if warmup else 1
        for name, o in optimizer.groups.items():  # Adam's averages begin at zero: their correction is in the rate
            first, second = (1 - beta ** (step + 1) for beta in betas.get(name, (0, 0)))
            share = factor
            if name == "ngrams":
                share, second = 1, 1 - train.NGRAM_WARMUP ** (step + 1)
            assert o.learning_rate.item() == pytest.approx(start[name] * share * math.sqrt(second) / first, rel=1e-5)
        muon = optimizer.groups["matrices"].state
        assert muon["momentum"].item() == pytest.approx(momentum, rel=1e-6)
        assert muon["decay"].item() == pytest.approx(decay, rel=1e-5, abs=1e-9)
    assert [scheduled(0, 0)[0], scheduled(0, 1)[0]] == [1, train.FINAL_LR]
