"""What a gain is worth after the winner's curse: shrunk by the noise, and by how the night's other ideas fared.

What is kept was chosen for coming out low, so its measured gain is flattered: E[gain seen | kept] > gain. A Bayesian
mean is not: given the right prior it is the same whether or not one selected (Dawid 1994, "Selection paradoxes of
Bayesian inference"; Efron 2011, "Tweedie's formula and selection bias"). The prior is learnt from all comparisons of
the night, as in Stephens 2017 ("False discovery rates: a new deal"): true effects are exactly 0, or lie in one of many
half-uniform pieces [0, a] and [-a, 0], whose weights are fitted by EM. So the number of comparisons counts by itself:
a hundred ideas that did nothing move the weight to 0, and with it the one that seemed to do something.

For a gain x with standard error s and a piece [0, a]:  p(x | piece) = (Φ((a - x) / s) - Φ(-x / s)) / a, and the
effect is then distributed as a normal N(x, s²) cut to [0, a], of known mean and variance.

The kept programs are a chain, and each one's noise is in two steps of it: a lucky reference makes the step before it
too large and the one after it too small. So they are judged together, by the forward and backward messages of a hidden
Markov chain: hidden are the true values, a step of which has that prior; seen are the means, with their errors.
`tests/test_expected.py` simulates it.
"""

import math
from dataclasses import dataclass

import numpy as np

NULL = 10.0  # ideas without effect that the prior holds to have been seen before the night (Stephens's penalty)
ROUNDS = 200  # of EM
POINTS = 2000  # of the grid on which a chain is followed
_erf = np.vectorize(math.erf, otypes=[float])


def cdf(z):
    return 0.5 * (1 + _erf(z / math.sqrt(2)))


def pdf(z):
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


@dataclass
class Prior:
    """Of true effects: weight[0] on exactly 0, the others on the intervals [low, high]."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, gains, errors):
        """Learnt from every comparison of a night, the bad ideas too. gains, errors: (n,), bits per byte."""
        x, s = np.asarray(gains, float), np.maximum(np.asarray(errors, float), 1e-9)
        smallest, largest = s.min(initial=1.0) / 2, 2 * max(np.abs(x).max(initial=0.0), s.max(initial=1e-9))
        ends = smallest * 2 ** (0.5 * np.arange(math.ceil(2 * math.log2(max(largest / smallest, 1))) + 1))
        prior = cls(np.append(-ends, 0 * ends), np.append(0 * ends, ends), np.full(1 + 2 * len(ends), 1.0))
        prior.weight /= len(prior.weight)
        likelihood = prior.pieces(x, s)[0]
        for _ in range(ROUNDS):
            share = likelihood * prior.weight
            counts = (share / share.sum(axis=1, keepdims=True)).sum(axis=0)
            counts[0] += NULL
            prior.weight = counts / counts.sum()
        return prior

    def pieces(self, x, s):
        """(likelihood of each gain by each piece, its mean there, its variance there); the first piece is 0 itself."""
        x, s = x[:, None], s[:, None]
        a, b = (self.low - x) / s, (self.high - x) / s
        mass = cdf(b) - cdf(a)
        likelihood = np.hstack([pdf(x / s) / s, mass / (self.high - self.low)])
        near, safe = mass > 1e-12, np.maximum(mass, 1e-12)
        slope = (pdf(a) - pdf(b)) / safe
        mean = np.clip(np.where(near, x + s * slope, x), self.low, self.high)  # far outside: the nearer end
        spread = np.where(near, s**2 * (1 + (a * pdf(a) - b * pdf(b)) / safe - slope**2), 0.0).clip(0)
        return np.maximum(likelihood, 1e-300), mean, spread

    def expected(self, gains, errors):
        """(expected true gains, their standard deviations), each judged by itself."""
        x, s = np.asarray(gains, float), np.maximum(np.asarray(errors, float), 1e-9)
        likelihood, mean, spread = self.pieces(x, s)
        share = likelihood * self.weight
        share /= share.sum(axis=1, keepdims=True)
        first = (share[:, 1:] * mean).sum(axis=1)
        second = (share[:, 1:] * (mean**2 + spread)).sum(axis=1)
        return first, np.sqrt(np.maximum(second - first**2, 0.0))

    def along(self, means, errors):
        """(expected true values, their standard deviations) of a chain of kept programs, the baseline first.

        means, errors: (n,), bits per byte; a gain is the value before less the value after.
        """
        m, s = np.asarray(means, float), np.maximum(np.asarray(errors, float), 1e-9)
        start, end = (m - 5 * s).min(), (m + 5 * s).max()
        h = max(s.min() / 5, (end - start) / POINTS)
        grid = np.arange(start, end + h, h)
        edges = (np.arange(-len(grid), len(grid)) + 0.5) * h  # of a step's cells; its middle one holds 0
        below = np.clip((edges[:, None] - self.low) / (self.high - self.low), 0, 1)
        step = np.diff(below @ self.weight[1:])
        step[len(step) // 2] += self.weight[0]
        seen = pdf((grid - m[:, None]) / s[:, None]) + 1e-300

        def messages(seen, step):
            found = [np.full(len(grid), 1.0)]
            for at in seen[:-1]:
                told = np.convolve(found[-1] * at, step)
                told = told[(len(step) - 1) // 2 :][: len(grid)].clip(1e-300)
                found.append(told / told.sum())
            return np.array(found)

        # forwards a value falls by a gain, backwards it rises by it
        share = messages(seen, step[::-1]) * seen * messages(seen[::-1], step)[::-1]
        share /= share.sum(axis=1, keepdims=True)
        first = share @ grid
        return first, np.sqrt(np.maximum(share @ grid**2 - first**2, 0.0))
