"""Simulated nights, judged by the code that judges real ones.

`python tests/simulation.py 20` prints the tables of docs/noise.md, from so many nights a line.
"""

import itertools
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.judge.evidence import Evidence, Observation, slots, unused  # noqa: E402
from scripts.judge.verdict import Facts, rule  # noqa: E402

SIGMA, SPEED = 0.004, 0.03  # of one run: val_bpb in bits per byte, throughput as a share
COST, SHARE = 0.1, 0.5  # what a load costs: bits per byte, and the share of the throughput that is left
APART = 0.25  # by how much, as a share, it costs more or less from stretch to stretch than the use of cores shows
TURNS = 1 / 12  # probability at each run that a load comes or goes, or changes
NEAR = 60  # of other programs the newest runs are looked at, here: it is fast, and hardly says less


@dataclass
class Machine:
    """Runs programs. seeds: the share of the variance that the seed explains.

    load: whether other work comes and goes. uneven: spread of its cost from run to run, as a share, which the use of
    cores tells where `told`; changing: the same from one stretch to the next. always: it never goes.
    """

    number: int
    seeds: float = 0.0
    load: bool = False
    uneven: float = 0.0
    changing: float = 0.0
    told: bool = True
    always: bool = False
    sigma: float = SIGMA
    runs: list = field(default_factory=list)  # as (program, seed, bpb, rate)
    loads: list = field(default_factory=list)  # see `evidence.load`

    def __post_init__(self):
        self.random, lots = np.random.default_rng(self.number), np.random.default_rng(self.number + 10**6)
        self.luck = lots.normal(0, self.sigma * self.seeds**0.5, 400)
        self.busy, self.level, self.dear = self.always or (self.load and self.random.random() < 0.5), 1.0, 1.0

    def run(self, program, truth):
        """A run of a program whose val_bpb truly is `truth`, with the next seed that it did not have."""
        if self.load and self.random.random() < TURNS:
            self.busy, self.level = self.always or not self.busy, max(0.2, self.random.normal(1, self.changing))
            self.dear = max(0.2, self.random.normal(1, APART))
        seed = unused([run[1] for run in self.runs if run[0] == program], 0)
        bpb = truth + self.luck[seed] + self.sigma * (1 - self.seeds) ** 0.5 * self.random.normal()
        rate = 1e5 * self.random.normal(1, SPEED)
        factor = max(0.0, self.level * self.random.normal(1, self.uneven)) if self.busy else 0.0
        self.runs.append((program, seed, bpb + COST * factor * self.dear, rate * SHARE ** (factor * self.dear)))
        share = (0.5 * factor if self.told else 0.5) if self.busy else 0.0
        self.loads.append(-math.log(1 - min(share, 0.95)))

    def observed(self):
        return [Observation(*run, *where) for run, *where in zip(self.runs, self.loads, slots(self.loads), strict=True)]


def night(effects, number, fewer_lines=False, first=3, **conditions):
    """(experiments as (effect, whether it was kept, extra runs), its observations, {program: reference}, truths).

    effects: how much better than the reference of its time each program truly is, in sigmas.
    """
    machine, reference, told, parents = Machine(number, **conditions), 0, [], {}
    truths = {0: 1.5}
    for _ in range(first):
        machine.run(0, 1.5)
    for program, effect in enumerate(effects, 1):
        truths[program], parents[program] = truths[reference] - effect * machine.sigma, reference
        before, following = len(machine.runs), "new"
        while following:
            end = {"new": program, "old": reference}[following]
            machine.run(end, truths[end])
            word, _, following = judged(machine, program, reference, fewer_lines)
        kept = word in ("keep", "judge")  # by chance slow: a gain that is seen is worth it
        told.append((effect, kept, len(machine.runs) - before - 1))
        reference = program if kept else reference
    return told, machine.observed(), parents, truths


def judged(machine, new, old, fewer_lines):
    runs = machine.observed()
    near = [run for i, run in enumerate(runs) if run.program in (new, old) or i >= len(runs) - NEAR]
    return rule(Facts.of(Evidence(near), new, old, fewer_lines=fewer_lines, unearned=("discard", "")))


def plain_night(effects, number):
    """The same by the plain rule: one run each, and what is lower is kept."""
    random, told, truth = np.random.default_rng(number), [], 0.0
    best = random.normal()
    for effect in effects:
        bpb = truth - effect + random.normal()
        told.append((effect, bpb < best, 0))
        if bpb < best:
            best, truth = bpb, truth - effect
    return told


def mixed(number):
    """A night as one may expect it: of 100 ideas 60 do nothing, 25 lose 2 sigma, 10 gain 2 and 5 gain 4."""
    effects = [0.0] * 60 + [-2.0] * 25 + [2.0] * 10 + [4.0] * 5
    random.Random(number).shuffle(effects)
    return effects


def short(number):
    """A first evening: of six ideas one does nothing, all others lose or gain much, and little is known of noise."""
    effects = [-50.0, -50.0, -15.0, 0.0, 15.0, 50.0]
    random.Random(number).shuffle(effects)
    return effects


def nights(effect, count, plain=False, **conditions):
    """All experiments of `count` nights. effect: of every experiment, or a function of the night's number."""
    plans = [effect(i) if callable(effect) else [float(effect)] * 100 for i in range(count)]
    one = plain_night if plain else lambda *arguments: night(*arguments, **conditions)[0]
    return list(itertools.chain(*(one(plan, i) for i, plan in enumerate(plans))))


def kept(told, effect=None):
    """Of 100 experiments with this true effect, how many were kept."""
    chosen = [t[1] for t in told if effect is None or t[0] == effect]
    return 100 * float(np.mean(chosen))


def extra(told):
    """Runs that are not the first of their program, of 100 experiments."""
    return 100 * float(np.mean([t[2] for t in told]))


LINES = (
    *((words, e, {}) for words, e in (("does nothing", 0), ("gains 1 σ", 1), ("gains 2 σ", 2), ("gains 4 σ", 4),
                                      ("loses 1 σ", -1), ("loses 2 σ", -2), ("a night of all sorts", mixed))),
    *((f"{words}, with fewer lines", e, {"fewer_lines": True})
      for words, e in (("does nothing", 0), ("loses 2 σ", -2), ("loses 4 σ", -4))),
    *((f"{words}, seeds explain {share}", e, {"seeds": seeds}) for share, seeds in (("half", 0.5), ("nine tenths", 0.9))
      for words, e in (("does nothing", 0), ("gains 1 σ", 1), ("gains 2 σ", 2), ("a night of all sorts", mixed))),
    *((f"{words}, {load}", e, {"load": True, **conditions})
      for load, conditions in (("beside a load", {}), ("beside an uneven load", {"uneven": 0.2}),
                               ("the same, unseen", {"uneven": 0.2, "told": False}),
                               ("beside a load that never goes, and changes", {"always": True, "changing": 0.3}),
                               ("the same, unseen", {"always": True, "changing": 0.3, "told": False}))
      for words, e in (("does nothing", 0), ("gains 4 σ", 4))),
    ("loses 2 σ, beside a load", -2, {"load": True}),
    *((f"loses 50 σ, {load}", -50, {"load": True, **conditions})
      for load, conditions in (("beside a load", {}), ("beside an uneven load", {"uneven": 0.2}))),
    *((f"six experiments, {load}", short, {"first": 1, **conditions})
      for load, conditions in (("quiet", {}), ("beside a load", {"load": True}),
                               ("beside a load that never goes, and changes",
                                {"load": True, "always": True, "changing": 0.3}),
                               ("beside an uneven load that never goes",
                                {"load": True, "always": True, "uneven": 0.3}))),
)  # fmt: skip


def after_the_curse(count, shares):
    """(measured, after the winner's curse, true) gain of the last kept program of nights of 60 ideas, in sigmas.

    shares: of the ideas that gain 2 and 4 sigma; two fifths lose, the rest do nothing. One row a night.
    """
    figures = []
    for number in range(count):
        draw = np.random.default_rng(number)
        effects = draw.choice([2.0, 4.0, -1.0, 0.0], 60, p=[*shares, 0.4, 0.6 - sum(shares)])
        effects = np.where(effects < 0, -np.abs(draw.normal(0, 4, 60)), effects)
        told, runs, parents, truths = night(list(effects), number)
        found, last = Evidence(runs, parents), max((i for i, t in enumerate(told, 1) if t[1]), default=0)
        pair = [found.compare(last, 0).gain, found.shrunk(last, 0).gain, truths[0] - truths[last]]
        figures.append(np.array(pair) / SIGMA)
    return np.array(figures)


def line(effect, count, **conditions):
    """(kept, by the plain rule, extra runs), of 100 experiments, in words."""
    told, plain = nights(effect, count, **conditions), nights(effect, 100, plain=True)

    def words(told, digits):
        shares = [f"{kept(told, e):.{digits}f}" for e in sorted({t[0] for t in told})]
        return " / ".join(shares)

    return words(told, 2), "–" if conditions else words(plain, 1), f"{extra(told):.0f}"


if __name__ == "__main__":
    COUNT, WANTED = int((sys.argv[1:] or [20])[0]), sys.argv[2:]
    print("| every change of the night | kept, of 100 | by the plain rule | extra runs, of 100 |\n|---|---|---|---|")
    for name, effect, conditions in LINES:
        if not WANTED or any(word in name for word in WANTED):
            print(f"| {' | '.join([name, *line(effect, COUNT, **conditions)])} |", flush=True)
    if not WANTED:
        print("\n| of the ideas gain 2 σ, 4 σ | measured gain of the night | after the winner's curse | true |")
        print("|---|---|---|---|")
        for name, shares in (("none, none", (0, 0)), ("6 %, 3 %", (0.06, 0.03)), ("20 %, 10 %", (0.2, 0.1))):
            figures = after_the_curse(COUNT, shares)
            off = np.sqrt(((figures - figures[:, 2:]) ** 2).mean(axis=0))
            words = (f"{mean:.2f} ({far:.2f})" for mean, far in zip(figures.mean(axis=0)[:2], off, strict=False))
            print(f"| {name} | {' | '.join(words)} | {figures[:, 2].mean():.2f} |", flush=True)
