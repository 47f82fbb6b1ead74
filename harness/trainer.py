"""How a step is carried out: its micro-batches, the streams and devices that share them, what is compiled.

What is learnt, and how, is train.py's: the loss, the optimizer, the schedules.
"""

import math
from functools import reduce

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from harness import devices


class Trainer:
    """One optimizer step over several micro-batches: a compiled gradient and a compiled update.

    The rows of a micro-batch are spread over `streams` (see prepare.compute_streams). On a CPU nothing is
    compiled: it gains nothing there and would need a C++ compiler.
    """

    def __init__(self, model, optimizer, loss_fn, streams, compiled):
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.streams, self.compiled = streams, compiled
        self.state = [model.state, optimizer.state]
        mx.eval(self.state)
        self.accumulate, self.update = self._accumulate, self._update
        if compiled:
            self.accumulate = mx.compile(self._accumulate, inputs=model.state, outputs=model.state)
            self.update = mx.compile(self._update, inputs=self.state, outputs=self.state)

    def _accumulate(self, tokens, share, *total):
        """The loss and the gradients of tokens (B, T + 1), times `share`, added to `total` where there is one."""

        def loss(model, tokens):
            return share * self.loss_fn(model, tokens)

        found = nn.value_and_grad(self.model, loss)(self.model, tokens)
        return tree_map(mx.add, *total, found) if total else found

    def _update(self, totals):
        """Apply the sum of the streams' gradients; returns that of their losses."""
        loss, gradients = tree_map(lambda *parts: reduce(mx.add, parts), *totals)
        self.optimizer.update(self.model, devices.averaged(gradients))
        return loss

    def split(self, tokens):
        """The rows of `tokens` in equal parts, one for each stream that gets any."""
        return mx.split(tokens, math.gcd(len(tokens), len(self.streams)))

    def gradients(self, micro_batches):
        """For each stream, its part of the mean loss of all micro-batches, and of the gradients."""
        totals = [[] for _ in self.split(micro_batches[0])]
        share = mx.array(1 / (len(totals) * len(micro_batches)))
        for tokens in micro_batches:
            for i, part in enumerate(self.split(tokens)):
                with mx.stream(self.streams[i]):
                    totals[i] = [self.accumulate(part, share, *totals[i])]
            mx.async_eval(totals)
        return [total for (total,) in totals]

    def step(self, micro_batches):
        loss = self.update(self.gradients(micro_batches))
        mx.async_eval(loss, self.state)
        return loss
