"""What a gain is worth after the winner's curse: shrunk by the noise, and by how the night's other ideas fared.

What is kept was chosen for coming out low, so its measured gain is flattered: E[gain seen | kept] > gain. A Bayesian
mean is not: given the right prior it is the same whether or not one selected (Dawid 1994, "Selection paradoxes of
Bayesian inference"; Efron 2011, "Tweedie's formula and selection bias"). The prior is learnt from all comparisons of
the night, as in Stephens 2017 ("False discovery rates: a new deal"): true effects are exactly 0, or lie in one of many
half-uniform pieces [0, a] and [-a, 0], whose weights are fitted by EM. So the number of comparisons counts by itself:
a hundred ideas that did nothing move the weight to 0, and with it the one that seemed to do something.

For a gain x with standard error s and a piece [0, a]:  p(x | piece) = (Φ((a - x) / s) - Φ(-x / s)) / a, and the
effect is then distributed as a normal N(x, s²) cut to [0, a], of known mean and variance.
"""

import math

import numpy as np

NULL = 10.0  # ideas without effect that the prior holds to have been seen before the night (Stephens's penalty)
ROUNDS = 200  # of EM
_erf = np.vectorize(math.erf, otypes=[float])


def cdf(z):
    return 0.5 * (1 + _erf(z / math.sqrt(2)))


def pdf(z):
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def shrunk(gains, errors):
    """(expected true gains, their standard deviations) of comparisons that were made in one night.

    gains: (n,), bits per byte, of every idea that was tried, the bad ones too; errors: their standard errors.
    """
    x, s = np.asarray(gains, float)[:, None], np.maximum(np.asarray(errors, float)[:, None], 1e-9)
    if not len(x):
        return np.zeros(0), np.zeros(0)
    smallest, largest = float(s.min()) / 2, 2 * float(max(np.abs(x).max(), s.max()))
    ends = smallest * 2 ** (0.5 * np.arange(math.ceil(2 * math.log2(largest / smallest)) + 1))
    low, high = np.concatenate([-ends, 0 * ends]), np.concatenate([0 * ends, ends])
    a, b = (low - x) / s, (high - x) / s
    mass = np.maximum(cdf(b) - cdf(a), 1e-300)
    likelihood = np.hstack([pdf(x / s) / s, mass / (high - low)])  # the first piece is 0 itself
    prior = np.full(likelihood.shape[1], 1.0 / likelihood.shape[1])
    for _ in range(ROUNDS):
        weight = likelihood * prior
        weight /= weight.sum(axis=1, keepdims=True)
        prior = weight.sum(axis=0) + np.eye(1, len(prior))[0] * (NULL - 1)
        prior /= prior.sum()
    weight = likelihood * prior
    weight /= weight.sum(axis=1, keepdims=True)
    # the mean and variance of a cut normal distribution; where it lies far outside, the nearer end
    slope = (pdf(a) - pdf(b)) / mass
    mean = np.clip(np.where(mass > 1e-12, x + s * slope, np.clip(x, low, high)), low, high)
    spread = np.where(mass > 1e-12, s**2 * (1 + (a * pdf(a) - b * pdf(b)) / mass - slope**2), 0.0).clip(0)
    first = (weight[:, 1:] * mean).sum(axis=1)
    second = (weight[:, 1:] * (mean**2 + spread)).sum(axis=1)
    return first, np.sqrt(np.maximum(second - first**2, 0.0))
