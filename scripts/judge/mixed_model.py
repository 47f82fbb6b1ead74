"""A linear mixed model of one figure of all runs: generalised least squares, with what is unknown averaged over a grid.

    figure of a run = program (fixed) + seed (random) + slot (fixed, beside a load) + noise of its own

RHO, KAPPA and sigma are averaged by their restricted likelihood (REML; Harville 1977) and, for sigma, by a weak
lognormal prior. With few repeats that widens every error as Student's t does; with none the prior alone speaks.
"""

import math

import numpy as np

RHO = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97, 0.99)  # share of a quiet run's variance that its seed explains
KAPPA = (2.0, 5.0, 15.0)  # further noise of a disturbed run, in sigmas: no load is quite even
SLOT = 1e3  # sigmas: what a load costs is anything, so that only differences within a slot count
UNSURE = 1.0  # standard deviation of the prior of log sigma: a factor of 7 either way is in its 95 %
CHANGED = 4.0  # nats by which two noises must fit better than one: BIC of a change point and a second variance
KNOWN = 4  # degrees of freedom on either side of such a change


def below(z):
    """The normal distribution function, to 1e-7 (Abramowitz and Stegun 7.1.26)."""
    t = 1 / (1 + 0.3275911 * np.abs(z) / math.sqrt(2))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = series * np.exp(-(z**2) / 2) / 2
    return np.where(z > 0, 1 - tail, tail)


class MixedModel:
    """The posterior of all programs' means.

    At G points of the grid, for p programs, m random effects (seeds and shared slots) and S values of sigma: `weight`
    and `logs` (log sigma) (G, S), `means` (G, p); and `parts`, in sigma², of the covariance of the programs' means:
    1 / (G, p) on the diagonal + share (G, p, m) @ inverse (G, m, m) @ share'.
    """

    def __init__(self, runs, column, y, noise, rhos=RHO):
        """runs: of each its `program`, `seed` and `slot`, in their order. column: {program: number}. y: their figure.

        noise: prior median of sigma, in the unit of y.
        """
        self.column, y = column, np.asarray(y, float)
        self.level = float(np.median(y))
        disturbed = any(run.slot is not None for run in runs)
        self.grid = np.array([(rho, kappa) for rho in rhos for kappa in (KAPPA if disturbed else (0.0,))])
        self.scale = noise_of_its_time(runs, column, y)
        likelihood, squares, self.means, self.parts = self._solve(runs, y - self.level)
        self._average(likelihood, squares, len(runs) - rank(runs), math.log(noise))

    def _solve(self, runs, y):
        """Henderson's mixed model equations (1975) at each point of the grid; programs, diagonal, are absorbed."""
        slots = [run.slot for run in runs]
        effects = dict.fromkeys(("seed", run.seed) for run in runs)
        effects |= dict.fromkeys(("slot", slot) for slot in slots if slot is not None and slots.count(slot) > 1)
        effects = {name: i for i, name in enumerate(effects)}
        x, z, kind = (np.zeros((len(runs), width)) for width in (len(self.column), len(effects), 3))
        for i, run in enumerate(runs):
            shared = effects.get(("slot", run.slot))
            x[i, self.column[run.program]] = z[i, effects["seed", run.seed]] = 1
            kind[i, 0 if run.slot is None else 1 if shared is None else 2] = 1
            if shared is not None:
                z[i, shared] = 1
        rho, kappa = self.grid.T
        own = 1 - rho + np.array([0 * kappa, SLOT**2 + 0 * kappa, kappa**2])  # a quiet run's, a lone one's, another's
        seeds = sum(name == "seed" for name, _ in effects)
        spread = np.repeat(np.stack([rho**0.5, SLOT + 0 * rho], 1), [seeds, len(effects) - seeds], axis=1)
        scale = np.append(self.scale, np.ones(len(runs) - len(self.scale)))  # runs that are not made yet: 1
        kinds = [(chosen / scale)[:, None] for chosen in kind.T]

        def summed(a, b):  # a' b at each point of the grid
            return np.tensordot(1 / own.T, np.stack([(a * one).T @ b for one in kinds]), 1)

        ones, y = np.ones((len(runs), 1)), y[:, None]
        per_run, total = summed(x, ones), summed(x, y)
        cross = summed(x, z) * spread[:, None]
        share = cross / per_run
        inner = summed(z, z) * spread[:, None] * spread[:, :, None] + np.eye(len(effects))
        inner -= np.swapaxes(cross, 1, 2) @ share
        right = summed(z, y) * spread[:, :, None] - np.swapaxes(share, 1, 2) @ total
        inverse = np.linalg.inv(inner)
        found = inverse @ right
        squares = (summed(y, y) - (total**2 / per_run).sum(1, keepdims=True))[:, 0, 0] - (right * found).sum((1, 2))
        likelihood = np.log(own).T @ kind.sum(0) + np.log(per_run).sum((1, 2)) + np.linalg.slogdet(inner)[1]
        means = (total - cross @ found) / per_run
        return -likelihood / 2, squares, means[:, :, 0], (per_run[:, :, 0], share, inverse)

    def _average(self, likelihood, squares, df, prior):
        """Weigh the grid, and 13 values of sigma at each of its points; the points that do not count go."""
        squares, precision = np.maximum(squares, 1e-24), UNSURE**-2 + 2 * df
        middle = (prior / UNSURE**2 + df * np.log(squares / max(df, 1))) / precision
        logs = middle[:, None] + precision**-0.5 * np.linspace(-4, 5, 13)
        weight = likelihood[:, None] - df * logs - squares[:, None] / 2 * np.exp(-2 * logs)
        weight -= (logs - prior) ** 2 / 2 / UNSURE**2
        weight = np.exp(weight - weight.max())
        counts = weight.sum(1) > 1e-3 * weight.sum(1).max()
        self.weight, self.logs = weight[counts] / weight[counts].sum(), logs[counts]
        self.grid, self.means, self.parts = self.grid[counts], self.means[counts], [p[counts] for p in self.parts]
        self.points = self.weight.sum(1)
        self.variance = np.exp(2 * (self.weight * self.logs).sum(1) / self.points)  # of a run, at each point
        self.mean = self.level + self.points @ self.means
        self.sigma = math.exp((self.weight * self.logs).sum())
        self.same_seed = math.sqrt(self.points @ (self.variance * (1 - self.grid[:, 0])))

    def spread(self, i, j, runs=None):
        """Variance of the difference of two programs at each point, in sigma²; with `runs` as it would be with these.

        runs: those of now, and after them some that are not made yet.
        """
        per_run, share, inverse = self._solve(runs, np.zeros(len(runs)))[3] if runs else self.parts
        apart = share[:, i] - share[:, j]
        return 1 / per_run[:, i] + 1 / per_run[:, j] + np.einsum("gi,gij,gj->g", apart, inverse, apart)

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
        return min(1.0, float((self.weight * below(np.clip(z, -30, 30))).sum()))

    @property
    def covariance(self):
        """Of all programs' means, (p, p)."""
        per_run, share, inverse = self.parts
        found = share @ inverse @ np.swapaxes(share, 1, 2)
        np.einsum("gii->gi", found)[:] += 1 / per_run
        apart = self.means - (self.mean - self.level)
        return np.einsum("g,gij->ij", self.points * self.variance, found) + (self.points * apart.T) @ apart


def rank(runs):
    """Of the fixed effects: programs, and slots among which the quiet machine is one; less one for each that they
    fall into without a common run."""
    group = {}
    for run in runs:
        a, b = (group.setdefault(node, {node}) for node in (("program", run.program), ("slot", run.slot)))
        if a is not b:
            a |= b
            group.update(dict.fromkeys(b, a))
    return len(group) - len({id(nodes) for nodes in group.values()})


def noise_of_its_time(runs, column, y):
    """Each run's variance in that of the newest programs: 1, or another where the noise changed during the session.

    One change point among the programs in their order, by likelihood ratio (Hinkley 1970), from quiet repeats.
    """
    quiet, program = np.array([run.slot is None for run in runs]), np.array([column[run.program] for run in runs])
    count = np.bincount(program[quiet], minlength=len(column))
    mean = np.bincount(program[quiet], y[quiet], len(column)) / np.maximum(count, 1)
    squares = np.cumsum(np.bincount(program[quiet], (y - mean[program])[quiet] ** 2, len(column))) + 1e-24
    df = np.cumsum(np.maximum(count - 1, 0))
    before, after = df[:-1], df[-1] - df[:-1]
    a, b = squares[:-1] / np.maximum(before, 1), (squares[-1] - squares[:-1] + 1e-24) / np.maximum(after, 1)
    better = (df[-1] * np.log(squares[-1] / max(df[-1], 1)) - before * np.log(a) - after * np.log(b)) / 2
    better[(before < KNOWN) | (after < KNOWN)] = 0.0
    at = int(better.argmax()) if better.size else 0
    if not better.size or better[at] < CHANGED:
        return np.ones(len(runs))
    return np.where(program <= at, a[at] / b[at], 1.0)
