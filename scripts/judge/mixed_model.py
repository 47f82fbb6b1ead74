"""The linear mixed model of docs/noise.md: least squares, with what is unknown averaged over a grid.

Each program and seed is a column; seeds are shrunk towards 0 (Henderson 1975). A load's effect is what such a load
usually costs, and beyond that one part that all loads of the session share and one of its slot, in proportion to the
load. How wide seeds, loads and noise are (rho, tau, kappa, sigma) is not known: every combination on a grid counts by
its restricted likelihood (Harville 1977) and a prior.
"""

import math
from statistics import NormalDist

import numpy as np

RHO = np.array([0.0, 0.3, 0.6, 0.85, 0.95, 0.99])  # share of a quiet run's variance that its seed explains
# In sigmas, beside a load of 1: tau, how far what loads cost is from the usual; kappa, further noise, for none is even.
LOADS = np.array([(6, 1), (6, 4), (30, 1), (30, 4), (30, 15), (150, 4), (150, 15), (150, 60)])
SIGMA = np.linspace(-3.5, 3.5, 51)  # log sigma over its prior median; the prior's standard deviation is 1
NULL, OTHER = 10.0, 1.0  # ideas without effect, and with one, that the prior takes as seen before the session
SWEEPS = 20  # of coordinate ascent

below = np.vectorize(NormalDist().cdf, otypes=[float])  # the normal distribution function


class MixedModel:
    """The posterior of all programs' effects, at each of G points of the grid of rho and loads, and S values of sigma.

    weight: of the grid, (G, S), sums to 1; points: (G,), summed over sigma. means: of the p programs, (G, p).
    inverse: covariance of all k effects, the programs first, in sigma², (G, k, k). variance: sigma², (G,).
    """

    def __init__(self, runs, column, y, noise, cost, rhos=RHO, alike=False):
        """runs: see `Observation`. column: {program: number}. y: the runs' figure.

        noise: prior median of sigma, in the unit of y. cost: what a load of 1 usually costs, and may cost more or less.
        alike: whether all runs are as noisy, or each `run.noise` sigma, seeds as well.
        """
        self.runs, self.column, self.alike, p = runs, column, alike, len(column)
        loads = LOADS if any(run.load for run in runs) else LOADS[:1]
        self.grid = np.column_stack([np.repeat(rhos, len(loads)), np.tile(loads, (len(rhos), 1))])
        is_seed, design, own, prior, precision = self._equations(runs)
        self.inverse, level = np.linalg.inv(precision), float(np.median(y))
        y = np.asarray(y, float) - level - cost * np.array([run.load for run in runs])
        right = (y / own) @ design
        effects = np.einsum("gij,gj->gi", self.inverse, right)
        squares = np.maximum((y**2 / own).sum(1) - (right * effects).sum(1), 1e-24)[:, None]
        taken = 1 - prior * np.einsum("gii->gi", self.inverse)  # degrees of freedom, by effect; seeds are of the noise
        df = len(y) - taken[:, ~is_seed].sum(1)[:, None]
        likelihood = np.log(prior[:, p:]).sum(1) - np.log(own).sum(1) - np.linalg.slogdet(precision)[1]
        likelihood += 2 * np.log(np.diff([0.0, *(rhos[1:] + rhos[:-1]) / 2, 1.0])).repeat(len(loads))
        self.logs = math.log(noise) + SIGMA
        weight = (likelihood[:, None] - squares * np.exp(-2 * self.logs) - SIGMA**2) / 2 - df * self.logs
        if len(loads) > 1:  # tau, in the unit of y, is near `cost`, a factor of 2 more or less
            weight -= (np.log(self.grid[:, 1] / abs(cost))[:, None] + self.logs) ** 2
        weight = np.exp(weight - weight.max())
        counts = weight.sum(1) > 1e-3 * weight.sum(1).max()  # the other points go
        self.grid, self.inverse = self.grid[counts], self.inverse[counts]
        self.weight, self.means = weight[counts] / weight[counts].sum(), level + effects[counts, :p]
        self.points = self.weight.sum(1)
        self.variance = np.exp(2 * (self.weight @ self.logs) / self.points)
        self.mean = self.points @ self.means
        self.sigma = math.exp((self.weight @ self.logs).sum())
        self.same_seed = math.sqrt(self.points @ (self.variance * (1 - self.grid[:, 0])))

    def _equations(self, runs):
        """What least squares needs of these runs; the effects are programs, seeds, slots and load, in units of sigma.

        Which effects are seeds, (k,); which effects a run has, (n, k); variance of each run's own noise, (G, n); prior
        precision of the effects, (G, k); their posterior precision, (G, k, k).
        """
        names = [*(("program", name) for name in self.column), *dict.fromkeys(("seed", run.seed) for run in runs)]
        names += dict.fromkeys(("slot", run.slot) for run in runs if run.load)
        names += [("load", None)] * any(run.load for run in runs)
        number, design = {name: i for i, name in enumerate(names)}, np.zeros((len(runs), len(names)))
        for i, run in enumerate(runs):
            design[i, [number["program", run.program], number["seed", run.seed]]] = 1, 1 if self.alike else run.noise
            if run.load:
                design[i, [number["slot", run.slot], number["load", None]]] = run.load
        kind, (rho, tau, kappa) = np.array([name[0] for name in names]), self.grid.T[:, :, None]
        prior = (kind == "seed") / np.maximum(rho, 1e-6) + 2 * ((kind == "load") + (kind == "slot")) / tau**2
        own = 1 - rho + (kappa * [run.load for run in runs]) ** 2
        own *= [1 if self.alike else run.noise**2 for run in runs]
        precision = (design.T / own[:, None, :]) @ design
        precision[:, range(len(names)), range(len(names))] += prior
        return kind == "seed", design, own, prior, precision

    def spread(self, i, j, more=()):
        """Variance of the difference of two programs at each point, in sigma²; `more`: with these runs, it would be."""
        inverse = np.linalg.inv(self._equations([*self.runs, *more])[-1]) if more else self.inverse
        return inverse[:, i, i] + inverse[:, j, j] - 2 * inverse[:, i, j]

    def difference(self, i, j):
        """(how much lower the first program's mean is, its standard error)."""
        gains, gain, spread = self.means[:, j] - self.means[:, i], float(self.mean[j] - self.mean[i]), self.spread(i, j)
        return gain, math.sqrt(self.points @ (self.variance * spread + (gains - gain) ** 2))

    def probability(self, gains, spread, bar=0.0):
        """That a quantity with these means and, in sigma², variances is above 0 (or `bar` sigmas); each (G,)."""
        sigma = np.exp(self.logs)
        z = (gains[:, None] / sigma - np.reshape(bar, (-1, 1))) / np.sqrt(np.maximum(spread, 1e-12))[:, None]
        return min(1.0, float((self.weight * below(z)).sum()))

    @property
    def covariance(self):
        """Of all programs' means, (p, p)."""
        p, apart = len(self.column), self.means - self.mean
        return np.tensordot(self.points * self.variance, self.inverse[:, :p, :p], 1) + (self.points * apart.T) @ apart


class Shrinkage:
    """What gains are worth after the winner's curse: shrunk by a prior learnt from all comparisons of the session.

    What is kept was chosen for coming out low, so its measured gain is too large. A posterior mean is not, given the
    right prior (Dawid 1994; Efron 2011). The prior is adaptive shrinkage (Stephens 2017): true effects are exactly 0,
    or normal around 0 with one of many widths, and how often each is so is fitted to all effects, bad ideas too.

    The effects are steps from each program to its reference. They share noise, so they are fitted together, as a
    regression: mr.ash, coordinate ascent on a mean-field posterior (Kim, Wang, Carbonetto and Stephens 2024).
    """

    def __init__(self, mean, covariance, parents):
        """mean, covariance: of the programs' val_bpb, (p,), (p, p), what all descend from first. parents: by number."""
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
        if not self.paths.size:
            return 0.0, 0.0, 0.5
        contrast = self.paths[i] - self.paths[j]
        gain, error = float(contrast @ self.steps), math.sqrt(contrast @ self.covariance @ contrast)
        moved = np.flatnonzero(contrast)  # of one idea, exactly 0 is neither better nor worse
        better = self.better[moved[0]] if len(moved) == 1 else below(gain / max(error, 1e-12))
        return gain, error, float(better)


def path(program, parents):
    """Which steps lead from the first program to this one, as 0 and 1 by program."""
    found = np.zeros(len(parents))
    while program and not found[program]:
        found[program], program = 1, parents[program]
    return found
