"""What gains are worth after the winner's curse: shrunk by a prior that is learnt from all comparisons of the session.

What is kept was chosen for coming out low, so its measured gain is too large: E[gain seen | kept] > gain. A posterior
mean is not, given the right prior: it is the same whether or not one selected (Dawid 1994; Efron 2011). The prior is
adaptive shrinkage (Stephens 2017): true effects are exactly 0, or normal around 0 with one of many widths, and how
often each is so is fitted to all effects, the bad ideas too. So a hundred ideas that did nothing move the weight to 0.

The effects are steps from each program to its reference. They share noise (a lucky reference makes the step before it
too large and the one after it too small), so they are fitted together, as a regression: mr.ash, coordinate ascent on a
mean-field posterior (Kim, Wang, Carbonetto and Stephens 2024).
"""

import math

import numpy as np

from scripts.judge.mixed_model import below

NULL, OTHER = 10.0, 1.0  # ideas without effect, and with one, that the prior takes as seen before the session
SWEEPS = 20  # of coordinate ascent


class Shrinkage:
    """Of all programs of a session, the first of which is what all descend from."""

    def __init__(self, mean, covariance, parents):
        """mean, covariance: of the programs' val_bpb, (p,), (p, p). parents: each one's reference, by number."""
        self.paths = np.array([path(i, parents) for i in range(len(mean))])[:, 1:]  # (p, steps): steps down to it
        if not self.paths.size:
            return
        to_steps = np.linalg.solve(self.paths[1:], np.eye(len(mean))[:1] - np.eye(len(mean))[1:])
        seen = to_steps @ mean
        information = np.linalg.inv(to_steps @ covariance @ to_steps.T)
        s2 = 1 / np.diag(information)  # variance of a step, were the others known
        smallest, largest = s2.min() ** 0.5 / 4, 2 * max(np.abs(seen).max(), s2.min() ** 0.5)
        width = np.append(0.0, smallest * 2.0 ** np.arange(math.ceil(math.log2(largest / smallest)) + 1))
        before = np.where(width == 0, NULL, OTHER / (len(width) - 1))
        weight, share = before / before.sum(), np.zeros((len(seen), len(width)))
        self.steps, self.better, variance = seen.copy(), np.zeros(len(seen)), np.zeros(len(seen))
        kept = width**2 / (s2[:, None] + width**2)  # what each width leaves of a step
        for _ in range(SWEEPS):
            for k, left in enumerate(kept):
                x = self.steps[k] + information[k] @ (seen - self.steps) * s2[k]  # as the other steps leave it
                likelihood = np.log1p(-left) / 2 + left * x**2 / s2[k] / 2
                share[k] = weight * np.exp(likelihood - likelihood.max())
                share[k] /= share[k].sum()
                self.steps[k] = share[k] @ left * x
                variance[k] = share[k] @ (left * s2[k] + (left * x) ** 2) - self.steps[k] ** 2
                z = np.sqrt(left[1:] / s2[k]) * x
                self.better[k] = share[k, 1:] @ below(z)
            weight = (before + share.sum(0)) / (before.sum() + len(seen))
        prior = np.maximum(1 / np.maximum(variance, 1e-12 * s2) - 1 / s2, 0.0)  # as if it were normal, each step's
        self.covariance = np.linalg.inv(information + np.diag(prior))

    def difference(self, i, j):
        """(expected gain of program i over j, its standard deviation, probability that it is above 0)."""
        if i == j or not self.paths.size:
            return 0.0, 0.0, 0.5
        contrast = self.paths[i] - self.paths[j]
        gain, error = float(contrast @ self.steps), math.sqrt(contrast @ self.covariance @ contrast)
        moved = np.flatnonzero(contrast)
        if len(moved) > 1:
            return gain, error, float(below(gain / max(error, 1e-12)))
        better = self.better[moved[0]]  # one idea: exactly 0 is neither better nor worse
        return gain, error, float(better)


def path(program, parents):
    """Which steps lead from the first program to this one, as 0 and 1 by program."""
    found = np.zeros(len(parents))
    while program and not found[program]:
        found[program], program = 1, parents[program]
    return found
