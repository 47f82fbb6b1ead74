"""Stands in for the one model of evidence until that is here: means of undisturbed runs, and their pooled noise."""

import math
from collections import namedtuple
from statistics import NormalDist

from harness import record
from scripts.judge.expected import Prior

Observation = namedtuple("Observation", "program seed slot bpb rate")
Comparison = namedtuple("Comparison", "gain error sure faster")


class Evidence:
    def __init__(self, observations, parents):
        programs = {}
        for run in observations:
            programs.setdefault(run.program, []).append(run)
        self.runs = {name: [r for r in runs if r.slot is None] or runs for name, runs in programs.items()}
        quiet = [run for runs in self.runs.values() for run in runs if run.slot is None]
        columns = [[getattr(run, name) for run in quiet] for name in ("program", "seed", "bpb", "rate")]
        noise = record.Noise.of(*columns) if quiet else None
        self.column = self.runs
        self.df = noise.df if noise else 0
        self.sigma = max(noise.bpb, 1e-6) if self.df else 0.003
        self.same_seed = noise.same_seed if self.df and noise.same_seed_df else self.sigma
        compared = [self.compare(new, old) for new, old in parents.items()]
        self.prior = Prior.of([c.gain for c in compared], [c.error for c in compared]) if compared else None

    def mean(self, program):
        return math.fsum(run.bpb for run in self.runs[program]) / len(self.runs[program])

    def best(self, programs):
        return min(programs, key=self.mean)

    def compare(self, new, old):
        gain = self.mean(old) - self.mean(new)
        error = self.sigma * math.sqrt(1 / len(self.runs[new]) + 1 / len(self.runs[old]))
        rates = [math.fsum(run.rate for run in self.runs[name]) / len(self.runs[name]) for name in (new, old)]
        return Comparison(gain, error, NormalDist().cdf(gain / error), rates[0] / max(rates[1], 1e-9) - 1)

    def shrunk(self, new, old):
        gain, error, _, faster = self.compare(new, old)
        mean, spread = (float(x[0]) for x in self.prior.expected([gain], [error]))
        return Comparison(mean, spread, NormalDist().cdf(mean / max(spread, 1e-9)), faster)
