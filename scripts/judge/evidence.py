"""One model of all runs of a session: which of two programs is better, by how much, and how sure that is.

docs/noise.md explains it, mixed_model.py fits it. Throughput goes through it as its logarithm, and without seeds.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import record
from harness.project import SEED
from scripts.judge.mixed_model import MixedModel, Shrinkage

NOISE = 0.003  # of val_bpb: prior median of a run's noise. Seen: 0.02 for 20 s on two cores, 0.0005 for 300 s on a GPU
SPEED = 0.01  # of throughput: the same
# A load of 1 leaves a run 1 / e of its steps. By the power laws of training that costs 7 % of val_bpb, from nothing to
# twice as much (Kaplan et al. 2020: loss falls as the -0.05th power of compute, and faster where budgets are small).
COST, STEPS = 0.07, -1.0  # of val_bpb; of the logarithm of throughput
MOST, MOST_OF_REFERENCE = 3, 4  # runs of a candidate; of a reference, which serves many and may have had luck
NOISES = 0.2, 5.0  # the least and the most of a run's noise by its steps, in sigmas
SAFE, DOUBTFUL = 0.975, 0.80  # how sure a kept gain is after the winner's curse: below the second it is unproven
CLOSE = 0.70  # how sure a gain was that was put back and is worth another look


@dataclass(frozen=True)
class Observation:
    """A run. load: 0 on a quiet machine, see `load`; slot: equal for runs beside the same load, else None."""

    program: str
    seed: int
    bpb: float  # bits per byte
    rate: float  # tokens a second
    load: float = 0.0
    slot: object = None
    noise: float = 1.0  # of its val_bpb, in sigmas: fewer steps are noisier, see `of_session`


@dataclass(frozen=True)
class Comparison:
    """Of a new program with an old one. Errors are standard errors."""

    gain: float  # bits per byte; above 0 the new one is better
    error: float
    sure: float  # probability that it is better
    faster: float = 0.0  # share of throughput won
    faster_error: float = 0.0


def gain_words(seen):
    """A comparison as everything says it: `+0.0123 ± 0.0040, 97 %`: bits per byte, standard error, probability."""
    return f"{round(seen.gain, 4) + 0.0:+.4f} ± {seen.error:.4f}, {percent(seen.sure)} %"  # no -0


def percent(sure):
    """A probability as `97`, `99.6`, `>99.9`; it never says more than is so."""
    sure *= 100
    return ">99.9" if sure > 99.9 else "<0.1" if sure < 0.1 else f"{int(sure)}" if 1 < sure < 99 else f"{sure:.1f}"


class Evidence:
    """Of the comparable runs of a session, in the order in which they were made.

    sigma: noise of one undisturbed run, bits per byte; same_seed: what is left of it between runs of equal seeds.
    """

    def __init__(self, observations, parents=None):
        """observations: at least one. parents: {program: what it was compared with}, for `shrunk` alone."""
        self.runs, self.parents = list(observations), parents or {}
        self.column = {name: i for i, name in enumerate(dict.fromkeys(run.program for run in self.runs))}
        bpbs = [run.bpb for run in self.runs]
        usual = abs(np.median(bpbs)) or 1.0
        self._bpb = MixedModel(self.runs, self.column, bpbs, NOISE * usual, COST * usual)
        self.sigma, self.same_seed = self._bpb.sigma, self._bpb.same_seed
        quiet = [run.program for run in self.runs if not run.load]
        self.df = len(quiet) - len(set(quiet))  # degrees of freedom by which sigma is known: undisturbed repeats

    @cached_property
    def _rate(self):
        logs = np.log([max(run.rate, 1e-9) for run in self.runs])
        return MixedModel(self.runs, self.column, logs, SPEED, STEPS, rhos=np.zeros(1), alike=True)

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
        return Comparison(*self._shrinkage.difference(self.column[new], self.column[old]))

    @cached_property
    def _shrinkage(self):
        parents = [self.column.get(self.parents.get(name), 0) for name in self.column]
        return Shrinkage(self._bpb.mean, self._bpb.covariance, parents)

    # --- another run ---

    def next_run(self, new, old):
        """Which run shrinks the error most: "new" or "old"; None where the caps end it."""
        i, j, model = self.column[new], self.column[old], self._bpb

        def error(kind):
            return model.points @ (model.variance * model.spread(i, j, self._planned({kind: 1}, new, old)))

        return min(self._left(new, old), key=error, default=None)

    def outlook(self, new, old, bar, least=0.0):
        """Probability that all runs which the caps still allow show a gain of `bar` standard errors above `least`.

        That is the predictive power (Spiegelhalter et al. 1986).
        """
        i, j, model = self.column[new], self.column[old], self._bpb
        now, then = model.spread(i, j), model.spread(i, j, self._planned(self._left(new, old), new, old))
        gains = model.means[:, j] - model.means[:, i] - least
        return float(model.probability(gains, now - then, bar * np.sqrt(then)))

    def _left(self, new, old):
        """How many runs the caps still allow, {kind: count}, on a machine as it was for the newest run."""
        slot, names = self.runs[-1].slot, [run.program for run in self.runs]
        like, since = sum(run.slot == slot for run in self.runs if run.program == old), names[names.index(new) :]
        left = {"old": min(MOST_OF_REFERENCE - like, MOST_OF_REFERENCE - 1 - since.count(old)),
                "new": MOST - names.count(new)}  # fmt: skip
        return {kind: count for kind, count in left.items() if count > 0}

    def _planned(self, counts, new, old):
        """The observations that so many runs of each kind would add; their figures are not looked at."""
        made, first = [], min((run.seed for run in self.runs if run.seed >= 0), default=0)
        for kind, count in counts.items():
            program = new if kind == "new" else old
            for _ in range(count):
                seed = unused([run.seed for run in [*self.runs, *made] if run.program == program], first)
                noise = next(run.noise for run in self.runs if run.program == program)
                made.append(replace(self.runs[-1], program=program, seed=seed, noise=noise))
        return made


def unused(seeds, first=SEED):
    """The seed that another run takes beside runs with these seeds: the first that none had, so work can be resumed."""
    return next(seed for seed in range(first, first + len(seeds) + 1) if seed not in seeds)


# --- from records: what disturbed each run, and which runs stood under the same load --------------------------------

# How much of the cores others may use, by backend: a GPU's host needs few of them.
OTHERS = {"cpu": lambda cores: 0.05 * cores, "metal": lambda cores: 0.5 * cores, "cuda": lambda cores: cores - 2}
EVEN = 0.2  # by how much a load may vary up and down, and it is the same
UNEVEN = 2.0  # times the median step: how long the slowest twentieth may take
SWAPPED = 256  # MB, moved to disk during the budget


def busy(run):
    """What disturbed a run, in words, or None. run: a record."""
    seen = run.get("machine") or {}
    others, cores, steps = seen.get("other_cores"), seen.get("cores") or 1, seen.get("step_ms")
    if (stood := seen.get("paused_seconds") or 0) > 0.01 * run["budget"]:
        return f"it stood still for {stood:.0f} s"
    if others is not None and others > max(0.05, OTHERS[run["device"].get("backend", "cpu")](cores)):
        return f"other processes used {others:.1f} of {cores} cores"
    if steps and steps[2] > UNEVEN * steps[1]:
        return f"steps were uneven: the slowest twentieth took over {steps[2] / steps[1]:.1f} times the median"
    if (seen.get("swapped_mb") or 0) > SWAPPED:
        return f"{seen['swapped_mb']} MB were swapped to disk"
    return None


def load(run):
    """How much a run lost to other work: minus the logarithm of the share of the machine that was left to it."""
    why, seen = busy(run), run["machine"] or {}
    share = seen["other_cores"] / seen["cores"] if why and why.startswith("other processes") else 0.5  # see `busy`
    return -math.log(1 - min(share, 0.95)) if why else 0.0


def slots(loads):
    """The slot of each run: disturbed runs one after another share one, while the load stays within EVEN."""
    found, first = [], None
    for i, load in enumerate(loads):
        if not load:
            first = None
        elif first is None or abs(load - loads[first]) > EVEN:
            first = i
        found.append(first)
    return found


def of_session(attempts, rows, like):
    """(records, observations) of all runs of a session that may be compared with the record `like`, oldest first.

    Runs of `make holdout` are left out: they measure anew what the session found. A row whose program has no record
    counts as one run with the row's figures, under the program's name or, without git, `row N`. Noise falls with the
    steps of a run (docs/noise.md).
    """
    archive = {r["run_id"]: r for r in record.archived()} | ({like["run_id"]: like} if like else {})
    made = [a for a in attempts if a["status"] == "valid" and a["role"] != "holdout" and a.get("run_id") in archive]
    made = dict.fromkeys(a["run_id"] for a in made)
    records = [archive[run_id] for run_id in made if like and not record.differences(archive[run_id], like)]
    records = records or ([like] if like else [])
    loads, steps = [load(r) for r in records], [r["training"]["total_steps"] for r in records]
    noises = np.clip(np.median(steps) / steps, *NOISES) if steps else ()
    known = {r["train_blob"] for r in records}
    found = [Observation(row.blob or f"row {row.number}", -row.number, row.bpb, row.rate)
             for row in rows if row.status != "crash" and row.blob not in known]  # fmt: skip
    found += [Observation(r["train_blob"], r["seed"], r["result"]["val_bpb"], r["training"]["avg_tok_sec"], *where)
              for r, *where in zip(records, loads, slots(loads), noises, strict=True)]  # fmt: skip
    return records, found
