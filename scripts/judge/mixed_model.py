"""A linear mixed model of one figure of all runs: least squares, with what is unknown averaged over a grid.

    figure of a run = its program + its seed + its slot + noise of its own

Each program, seed and slot is a column of zeros and ones. A program's effect may be anything. A seed's is drawn from a
normal distribution, so it is shrunk towards 0, as in ridge regression (Henderson 1975); a slot's from one so wide that
it may be anything, too. How wide seeds and noise are (rho, kappa, sigma) is not known: every combination on a grid
counts by its restricted likelihood (REML; Harville 1977) and a prior, by which all shares of a seed are equally
probable. With few repeats that widens every error, as Student's t does; with none the prior alone speaks.
"""

import math

import numpy as np

RHO = np.array([0.0, 0.3, 0.6, 0.85, 0.95, 0.99])  # share of a quiet run's variance that its seed explains
KAPPA = np.array([2.0, 5.0, 15.0])  # further noise of a disturbed run, in sigmas: no load is quite even
SIGMA = np.linspace(-3.5, 3.5, 51)  # log sigma over its prior median; the prior's standard deviation is 1
SLOT = 1e3  # sigmas: what a load may cost, so that only differences within a slot count

_erfc = np.vectorize(math.erfc, otypes=[float])


def below(z):
    """The normal distribution function."""
    return _erfc(-np.asarray(z) / math.sqrt(2)) / 2


class MixedModel:
    """The posterior of all programs' effects, at each of G points of the grid of rho and kappa, and S values of sigma.

    weight: of the grid, (G, S), sums to 1; points: (G,), summed over sigma. means: of the p programs, (G, p).
    inverse: covariance of all k effects, the programs first, in sigma², (G, k, k). variance: sigma², (G,).
    """

    def __init__(self, runs, column, y, noise, rhos=RHO):
        """runs: of each its `program`, `seed` and `slot`. column: {program: number}. y: their figure.

        noise: prior median of sigma, in the unit of y.
        """
        self.runs, self.column, p = runs, column, len(column)
        kappas = KAPPA if any(run.slot is not None for run in runs) else KAPPA[:1]
        self.rho, self.kappa = np.repeat(rhos, len(kappas)), np.tile(kappas, len(rhos))
        is_seed, design, own, prior, precision = self._equations(runs)
        self.inverse, level = np.linalg.inv(precision), float(np.median(y))
        y = np.asarray(y, float) - level
        right = (y / own) @ design
        effects = np.einsum("gij,gj->gi", self.inverse, right)
        squares = np.maximum((y**2 / own).sum(1) - (right * effects).sum(1), 1e-24)[:, None]
        taken = 1 - prior * np.einsum("gii->gi", self.inverse)  # degrees of freedom, by effect; seeds are of the noise
        df = len(y) - taken[:, ~is_seed].sum(1)[:, None]
        likelihood = np.log(prior[:, p:]).sum(1) - np.log(own).sum(1) - np.linalg.slogdet(precision)[1]
        likelihood += 2 * np.log(np.diff([0.0, *(rhos[1:] + rhos[:-1]) / 2, 1.0])).repeat(len(kappas))
        self.logs = math.log(noise) + SIGMA
        weight = (likelihood[:, None] - squares * np.exp(-2 * self.logs) - SIGMA**2) / 2 - df * self.logs
        weight = np.exp(weight - weight.max())
        counts = weight.sum(1) > 1e-3 * weight.sum(1).max()  # the other points go
        self.rho, self.kappa, self.inverse = self.rho[counts], self.kappa[counts], self.inverse[counts]
        self.weight, self.means = weight[counts] / weight[counts].sum(), level + effects[counts, :p]
        self.points = self.weight.sum(1)
        self.variance = np.exp(2 * (self.weight @ self.logs) / self.points)
        self.mean = self.points @ self.means
        self.sigma = math.exp((self.weight @ self.logs).sum())
        self.same_seed = math.sqrt(self.points @ (self.variance * (1 - self.rho)))

    def _equations(self, runs):
        """What least squares needs of these runs; the effects are programs, seeds and slots, in units of sigma.

        Which effects are seeds, (k,); which effects a run has, (n, k); variance of each run's own noise, (G, n); prior
        precision of the effects, (G, k); their posterior precision, (G, k, k).
        """
        names = [*(("program", name) for name in self.column), *dict.fromkeys(("seed", run.seed) for run in runs)]
        names += dict.fromkeys(("slot", run.slot) for run in runs if run.slot is not None)
        number, design = {name: i for i, name in enumerate(names)}, np.zeros((len(runs), len(names)))
        for i, run in enumerate(runs):
            effects = ("program", run.program), ("seed", run.seed), ("slot", run.slot)
            design[i, [number[effect] for effect in effects if effect in number]] = 1
        kind, disturbed = np.array([name[0] for name in names]), np.array([run.slot is not None for run in runs])
        rho, kappa = np.maximum(self.rho, 1e-6)[:, None], self.kappa[:, None]
        prior, precision = (kind == "seed") / rho + (kind == "slot") / SLOT**2, 0.0
        for which, own in ((~disturbed, 1 - rho), (disturbed, 1 - rho + kappa**2)):
            precision = precision + design[which].T @ design[which] / own[:, :, None]
        precision[:, range(len(names)), range(len(names))] += prior
        return kind == "seed", design, 1 - rho + disturbed * kappa**2, prior, precision

    def spread(self, i, j, more=()):
        """Variance of the difference of two programs at each point, in sigma²; `more`: with these runs, it would be."""
        inverse = np.linalg.inv(self._equations([*self.runs, *more])[-1]) if more else self.inverse
        return inverse[:, i, i] + inverse[:, j, j] - 2 * inverse[:, i, j]

    def difference(self, i, j):
        """(how much lower the first program's mean is, its standard error: inf where they never met)."""
        if i == j:
            return 0.0, 0.0
        gains, gain, spread = self.means[:, j] - self.means[:, i], float(self.mean[j] - self.mean[i]), self.spread(i, j)
        error = math.sqrt(self.points @ (self.variance * spread + (gains - gain) ** 2))
        return gain, error if self.points @ spread < 0.1 * SLOT**2 else math.inf

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
