"""What gains are worth after the winner's curse: shrunk by a prior that is learnt from all comparisons of the session.

What is kept was chosen for coming out low, so its measured gain is too large: E[gain seen | kept] > gain. A posterior
mean is not, given the right prior: it is the same whether or not one selected (Dawid 1994; Efron 2011). The prior is
adaptive shrinkage (Stephens 2017): true effects are exactly 0, or half-normal of many widths on either side, and the
weights are fitted to all effects at once, the bad ideas too. So a hundred ideas that did nothing move the weight to 0.

The effects are steps from each program to its reference. They share noise (a lucky reference makes the step before it
too large and the one after it too small), so they are fitted together, as a regression: mr.ash, coordinate ascent on a
mean-field posterior (Kim, Wang, Carbonetto and Stephens 2024).
"""

import math

import numpy as np

NULL = 10.0  # ideas without effect that the prior takes as seen before the session: Stephens's penalty
ROUNDS, SWEEPS = 100, 12  # of EM on the steps one by one; then of coordinate ascent on all together

_below = np.frompyfunc(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)), 1, 1)


class Shrinkage:
    """Of all programs of a session, the first of which is what all descend from."""

    def __init__(self, mean, covariance, parents):
        """mean, covariance: of the programs' val_bpb, (p,), (p, p). parents: each one's reference, by number."""
        self.paths = np.array([_path(i, parents) for i in range(len(mean))])[:, 1:]  # (p, steps): steps down to it
        if not self.paths.size:
            return
        apart = np.hstack([np.ones((len(mean) - 1, 1)), -np.eye(len(mean) - 1)])  # gains over the first program
        to_steps = np.linalg.solve(self.paths[1:], apart)
        steps = to_steps @ mean
        self.information = np.linalg.inv(to_steps @ covariance @ to_steps.T)
        self._fit(steps, np.diag(self.information) ** -0.5)

    def _fit(self, steps, errors):
        smallest, largest = errors.min() / 4, 2 * max(np.abs(steps).max(), errors.min())
        widths = smallest * 2.0 ** np.arange(math.ceil(math.log2(largest / smallest)) + 1)
        self.side, self.width = np.repeat([0, 1, -1], [1, len(widths), len(widths)]), np.append(0, [*widths, *widths])
        weight, count = np.full(len(self.width), 1 / len(self.width)), len(steps)
        pieces = self._pieces(steps, np.diag(np.linalg.inv(self.information)))
        for _ in range(ROUNDS):
            weight = self._weights(self._mixed(weight, *pieces)[0])
        seen, self.steps, s2 = self.information @ steps, self._mixed(weight, *pieces)[1], errors**2
        share, self.variance = np.zeros((count, len(weight))), np.zeros(count)
        for _ in range(SWEEPS):
            for k in range(count):
                x = self.steps[k] + (seen[k] - self.information[k] @ self.steps) * s2[k]  # as the other steps leave it
                share[k], self.steps[k], self.variance[k] = self._mixed(weight, *self._pieces(x, s2[k]))
            weight = self._weights(share)
        self.above, self.below = share[:, self.side > 0].sum(1), share[:, self.side < 0].sum(1)
        prior = np.maximum(1 / np.maximum(self.variance, 1e-12 * s2) - 1 / s2, 0.0)  # as if it were normal, each step's
        self.covariance = np.linalg.inv(self.information + np.diag(prior))

    def _weights(self, share):
        counts = share.sum(axis=0)
        counts[0] += NULL
        return counts / counts.sum()

    def _pieces(self, x, s2):
        """Of effects seen as x with variance s2, by piece of the prior: log likelihood, mean, second moment."""
        x, s2 = np.asarray(x)[..., None], np.asarray(s2)[..., None]
        total = s2 + self.width**2
        middle, spread = x * self.width**2 / total, np.sqrt(s2 * self.width**2 / total)
        z = middle / np.maximum(spread, 1e-150)
        mass = np.where(self.side, np.maximum(2 * _below(self.side * z).astype(float), 1e-290), 1.0)
        bend = self.side * spread * 2 * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / mass  # of a normal cut at 0
        return np.log(mass) - (x**2 / total + np.log(total)) / 2, middle + bend, middle**2 + spread**2 + middle * bend

    def _mixed(self, weight, likelihood, first, second):
        """(share of each piece, mean, variance) of effects."""
        share = weight * np.exp(likelihood - likelihood.max(axis=-1, keepdims=True)) + 1e-300
        share /= share.sum(axis=-1, keepdims=True)
        mean = (share * first).sum(-1)
        return share, mean, np.maximum((share * second).sum(-1) - mean**2, 0.0)

    def difference(self, i, j):
        """(expected gain of program i over j, its standard deviation, probability that it is above 0)."""
        if i == j or not self.paths.size:
            return 0.0, 0.0, 0.5
        contrast = self.paths[i] - self.paths[j]
        gain, error = float(contrast @ self.steps), math.sqrt(contrast @ self.covariance @ contrast)
        moved = np.flatnonzero(contrast)
        if len(moved) == 1:  # one idea: the pieces of the prior tell it, exactly 0 among them
            return gain, error, float((self.above if contrast[moved[0]] > 0 else self.below)[moved[0]])
        return gain, error, float(_below(gain / max(error, 1e-12)))


def _path(program, parents):
    """Which steps lead from the first program to this one, as 0 and 1 by program."""
    found = np.zeros(len(parents))
    while program and not found[program]:
        found[program], program = 1, parents[program]
    return found
