"""One model of all runs of a session: which of two programs is better, by how much, and how sure that is.

    val_bpb of a run = its program + its seed + its slot + noise of its own

A seed is as lucky for one program as for another; a slot is what a load costs all runs beside it. So repeats, equal
seeds, pairs and loads are no regimes of their own but entries of one covariance, and one fit compares all programs
(judge/mixed_model.py). Throughput goes through the same model, as its logarithm, and without seeds.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.project import SEED
from scripts.judge.mixed_model import MixedModel
from scripts.judge.shrinkage import Shrinkage

NOISE = 0.003  # of val_bpb: prior median of a run's noise. Seen: 0.02 for 20 s on two cores, 0.0005 for 300 s on a GPU
SPEED = 0.01  # of throughput: the same
STEADY = 4  # runs in a slot before the next one is taken to fall into it
MOST, MOST_OF_REFERENCE = 3, 4  # runs under one condition; a reference had luck when it was kept, and many meet it


@dataclass(frozen=True)
class Observation:
    """A run. slot: None on a quiet machine; what runs beside the same load share; else one of its own."""

    program: str
    seed: int
    slot: object
    bpb: float  # bits per byte
    rate: float  # tokens a second


@dataclass(frozen=True)
class Comparison:
    """Of a new program with an old one. Errors are standard errors."""

    gain: float  # bits per byte; above 0 the new one is better
    error: float
    sure: float  # probability that it is better
    faster: float  # share of throughput won
    faster_error: float


def gain_words(seen):
    """A comparison as everything says it: `+0.0123 ± 0.0040, 97 %`: bits per byte, standard error, probability."""
    if not math.isfinite(seen.error):
        return "unknown, no common load"
    return f"{round(seen.gain, 4) + 0.0:+.4f} ± {seen.error:.4f}, {percent(seen.sure)} %"  # no -0


def percent(sure):
    """A probability as `97`, `99.6`, `>99.9`."""
    sure *= 100
    return ">99.9" if sure > 99.9 else "<0.1" if sure < 0.1 else f"{sure:.0f}" if 1 < sure < 99 else f"{sure:.1f}"


class Evidence:
    """Of the comparable runs of a session, in the order in which they were made.

    sigma: noise of one undisturbed run, bits per byte; same_seed: what is left of it between runs of equal seeds.
    """

    def __init__(self, observations, parents=None):
        """observations: at least one. parents: {program: what it was compared with}, for `shrunk` alone."""
        self.runs, self.parents = list(observations), parents or {}
        self.column = {name: i for i, name in enumerate(dict.fromkeys(run.program for run in self.runs))}
        bpbs = [run.bpb for run in self.runs]
        self._bpb = MixedModel(self.runs, self.column, bpbs, NOISE * (abs(np.median(bpbs)) or 1.0))
        self.sigma, self.same_seed = self._bpb.sigma, self._bpb.same_seed

    @cached_property
    def _rate(self):
        logs = np.log([max(run.rate, 1e-9) for run in self.runs])
        return MixedModel(self.runs, self.column, logs, SPEED, rhos=np.zeros(1))

    @property
    def df(self):
        """Degrees of freedom by which sigma is known: undisturbed runs that repeat a program."""
        quiet = [run.program for run in self.runs if run.slot is None]
        return len(quiet) - len(set(quiet))

    def mean(self, program):
        """val_bpb of a program by the model: mean(old) - mean(new) is the gain of compare(new, old)."""
        return float(self._bpb.mean[self.column[program]])

    def rate(self, program):
        """Tokens a second, likewise."""
        return float(math.exp(self._rate.mean[self.column[program]]))

    def compare(self, new, old):
        i, j = self.column[new], self.column[old]
        slower, slower_error = self._rate.difference(i, j)
        faster = math.exp(-slower) - 1
        return Comparison(*self._bpb.difference(i, j), self.chance(new, old), faster, (1 + faster) * slower_error)

    def chance(self, new, old, least=0.0):
        """Probability that the new program gains more than `least`, in bits per byte."""
        i, j, model = self.column[new], self.column[old], self._bpb
        return model.probability(model.means[:, j] - model.means[:, i] - least, model.spread(i, j)) if i != j else 0.5

    def shrunk(self, new, old):
        """`compare` with a prior on effects, learnt from all programs: what the winner's curse leaves."""
        seen = self.compare(new, old)
        found = self._shrinkage.difference(self.column[new], self.column[old])
        return Comparison(*found, seen.faster, seen.faster_error)

    @cached_property
    def _shrinkage(self):
        parents = [self.column.get(self.parents.get(name), 0) for name in self.column]
        return Shrinkage(self._bpb.mean, self._bpb.covariance, parents)

    # --- another run ---

    def next_run(self, new, old):
        """Which run shrinks the error most: "new", "old" or "pair"; None where the caps end it."""
        i, j, model = self.column[new], self.column[old], self._bpb

        def error(kind):
            return model.points @ (model.variance * model.spread(i, j, self._planned({kind: 1}, new, old)))

        return min(self._left(new, old), key=error, default=None)

    def outlook(self, new, old, bar, least=(0.0,)):
        """(share of the information so far, for each of `least` the probability that all runs that are left show it).

        These are the runs that the caps still allow; what they show is a gain of `bar` standard errors above `least`.
        The share is that of their squared error to the present one: the information time of group-sequential tests
        (Lan and DeMets 1983). The probability is the predictive power (Spiegelhalter et al. 1986).
        """
        i, j, model = self.column[new], self.column[old], self._bpb
        now, then = model.spread(i, j), model.spread(i, j, self._planned(self._left(new, old), new, old))
        gains = model.means[:, j] - model.means[:, i]
        share = model.points @ (model.variance * then) / (model.points @ (model.variance * now))
        promises = (model.probability(gains - one, now - then, bar * np.sqrt(then)) for one in least)
        return float(share), *promises

    def _left(self, new, old):
        """How many runs the caps still allow, {kind: count}, on a machine as it was for the newest run."""
        slot, names = self.runs[-1].slot, [run.program for run in self.runs]
        left = {"pair": MOST - names.count(new)}
        if slot is None or sum(run.slot == slot for run in self.runs) >= STEADY:
            like = sum(run.slot == slot for run in self.runs if run.program == old)
            since = names[names.index(new) :].count(old)
            left = {"old": min(MOST_OF_REFERENCE - like, MOST_OF_REFERENCE - 1 - since), "new": left["pair"]}
        return {kind: count for kind, count in left.items() if count > 0}

    def _planned(self, counts, new, old):
        """The observations that so many runs of each kind would add; their figures are not looked at."""
        made, first = [], min((run.seed for run in self.runs if run.seed >= 0), default=0)
        for kind, count in counts.items():
            programs = {"new": [new], "old": [old], "pair": [new, old]}[kind]
            for number in range(count):
                seed = unused([run.seed for run in [*self.runs, *made] if run.program in programs], first)
                slot = ("planned", number) if kind == "pair" else self.runs[-1].slot
                made += [Observation(program, seed, slot, 0.0, 1.0) for program in programs]
        return made


def unused(seeds, first=SEED):
    """The seed that another run takes beside runs with these seeds: the first one that none of them had."""
    return next(seed for seed in range(first, first + len(seeds) + 1) if seed not in seeds)
