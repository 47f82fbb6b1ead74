"""How a step is carried out: micro-batches, chunks of the loss, streams, what is compiled, stacks of matrices.

What is learnt, and how, is train.py's: the loss, the update rule, the schedules.
"""

import math
import os
from functools import reduce

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from harness import devices, ngrams

GPU = mx.default_device().type == mx.gpu
# MLX reads these once, at its first computation. On CUDA it frees memory only with a whole command buffer: with buffers
# of its own size a step takes twice the memory. On a GPU it walks graphs depth first, so that what is not needed any
# more is freed early; on a CPU breadth first, so that every stream has work from the beginning.
if GPU and mx.cuda.is_available():
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "80")
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1" if GPU else "1000")


class Trainer:
    """One optimizer step over several micro-batches: a compiled gradient and a compiled update.

    The rows of a micro-batch are spread over `streams` (see prepare.compute_streams). On a CPU nothing is
    compiled: it gains nothing there and would need a C++ compiler.
    """

    def __init__(self, model, optimizer, loss_fn, streams, compiled):
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.streams, self.state = streams, [model.state, optimizer.state]
        self.tables = [module for module in model.modules() if isinstance(module, ngrams.Table)]
        mx.eval(self.state)
        self.accumulate, self.update = self._accumulate, self._update
        if compiled:
            self.accumulate = mx.compile(self._accumulate, inputs=model.state, outputs=model.state)
            self.update = mx.compile(self._update, inputs=self.state, outputs=self.state)

    def step(self, micro_batches):
        """Train on micro-batches of tokens (B, T + 1); returns the mean loss, which is not computed yet."""
        loss = self.update(*self.gradients(micro_batches))
        mx.async_eval(loss, self.state)
        return loss

    def gradients(self, micro_batches):
        """[(loss, gradients), …], a stream each, whose sum is the mean; and what ngrams.update needs of tables."""
        parts = math.gcd(len(micro_batches[0]), len(self.streams))
        totals, looked_up, share = [None] * parts, [], mx.array(1 / (parts * len(micro_batches)))
        for tokens in micro_batches:
            for i, part in enumerate(mx.split(tokens, parts)):
                with mx.stream(self.streams[i]):
                    totals[i], of_rows = self.accumulate(part, share, totals[i])
                    looked_up += [[part[:, :-1], of_rows]] if of_rows else []
            mx.async_eval(totals, looked_up)
        return totals, looked_up

    def _accumulate(self, tokens, share, total):
        """(loss, gradients) of tokens (B, T + 1), times `share`, added to `total` unless that is None.

        And the gradient of what each table of n-grams has for these tokens alone.
        """

        def loss(parameters, rows):  # the tables answer with these rows, so that a gradient reaches them
            self.model.update(parameters)
            ngrams.give(self.tables, rows)
            return share * self.loss_fn(self.model, tokens)

        rows = [table(tokens[:, :-1]) for table in self.tables]
        value, (gradients, of_rows) = mx.value_and_grad(loss, argnums=(0, 1))(self.model.trainable_parameters(), rows)
        ngrams.give(self.tables, [None] * len(rows))
        part = value, gradients
        return part if total is None else tree_map(mx.add, total, part), of_rows

    def _update(self, totals, looked_up):
        """Apply the sum of the streams' gradients; returns the sum of their losses. looked_up: see ngrams.update."""
        loss, gradients = tree_map(lambda *parts: reduce(mx.add, parts), *totals)
        self.optimizer.update(self.model, devices.average_gradients(gradients))
        if looked_up:
            ngrams.update(self.tables, devices.gathered(looked_up), self.optimizer.groups["ngrams"].learning_rate)
        return loss


def mean_in_chunks(loss_and_gradients, hidden, head, targets, at_once):
    """The mean over N positions of a loss of hidden (N, n) and head (vocab, n), computed for some of them at once.

    loss_and_gradients(hidden, head, targets) returns the summed loss of its positions and its two gradients. They are
    taken together with the loss, so the logits of one chunk are freed before those of the next are made.
    """
    n = len(targets)
    at_once = max(1, min(n, at_once))

    @mx.custom_function
    def mean(hidden, head):
        narrow, head_gradient = head.astype(hidden.dtype), mx.zeros(head.shape)
        losses, hidden_gradients = [], []
        for start in range(0, n, at_once):
            # A chunk waits for all results of the one before.
            h = mx.depends(hidden[start : start + at_once], [head_gradient, *losses[-1:], *hidden_gradients[-1:]])
            loss, gradients = loss_and_gradients(h, narrow, targets[start : start + at_once])
            losses.append(loss)
            hidden_gradients.append(gradients[0])
            head_gradient = head_gradient + gradients[1]
        return mx.stack(losses).sum() / n, mx.concatenate(hidden_gradients), head_gradient  # of the sum; see backward

    @mean.vjp
    def backward(primals, cotangents, outputs):
        return tuple((cotangents[0] * (1 / n) * x).astype(x.dtype) for x in outputs[1:])

    return mean(hidden, head)[0]


class StackedOptimizer(optim.Optimizer):
    """Updates all matrices of one shape together, as one stack (n, rows, columns); stacks are spread over `streams`.

    A parameter is a matrix or a stack of them. In the update tall and square ones are transposed: rows <= columns.
    A subclass has init_stack(n, rows, columns), which returns a stack's state, and update_stack(gradient, weight,
    aspect, state), which returns its new weights; aspect: float (n, 1, 1), rows over columns before transposing.
    """

    def __init__(self, learning_rate, streams=None):
        super().__init__()
        self.streams = streams or [mx.default_stream(mx.default_device())]
        self.state["learning_rate"] = mx.array(learning_rate)

    def init(self, parameters):
        parameters = dict(tree_flatten(parameters))
        for name, paths in by_shape(parameters).items():
            self.state[name] = self.init_stack(*stacked([parameters[path] for path in paths]).shape)

    def apply_gradients(self, gradients, parameters):
        """The tree of new parameters, of a tree of gradients and one of parameters, which may hold others as well."""
        gradients, parameters, updated = dict(tree_flatten(gradients)), dict(tree_flatten(parameters)), []
        for i, (name, paths) in enumerate(by_shape(gradients).items()):
            with mx.stream(self.streams[i % len(self.streams)]):
                old = [parameters[path] for path in paths]
                counts = [math.prod(p.shape[:-2]) for p in old]
                aspect = np.repeat([p.shape[-2] / p.shape[-1] for p in old], counts)[:, None, None]
                gradient = stacked([gradients[path] for path in paths])
                new = self.update_stack(gradient, stacked(old), aspect, self.state[name])
                parts = mx.split(new, np.cumsum(counts)[:-1].tolist())
                for path, p, x in zip(paths, old, parts, strict=True):
                    updated.append((path, (x.swapaxes(1, 2) if is_tall(p) else x).reshape(p.shape)))
        return tree_unflatten(updated)


def by_shape(parameters):
    """{"rows x columns": [path, …]} of {path: parameter}, rows <= columns."""
    stacks = {}
    for path, parameter in parameters.items():
        stacks.setdefault("x".join(map(str, sorted(parameter.shape[-2:]))), []).append(path)
    return stacks


def is_tall(parameter):
    return parameter.shape[-2] >= parameter.shape[-1]


def stacked(parameters):
    """All their matrices in one stack (n, rows, columns), rows <= columns."""
    wide = [p.swapaxes(-1, -2) if is_tall(p) else p for p in parameters]
    return mx.concatenate([p.reshape(-1, *p.shape[-2:]) for p in wide])
