"""The winner's curse: what is kept looks better than it is, and the expected gain takes that back.

`python tests/test_expected.py 200` prints for nights of several kinds the gain as measured, as expected and as it was.
"""

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import nights  # noqa: E402

from scripts.judge.expected import Prior  # noqa: E402

BASE = "".join(f"{name} = 1.5\n" for name in nights.CONSTANTS)  # what the ideas look for in train.py
BASE += "".join(f"\n{place}:\n    def __call__:\n" for place in nights.LINES)


def gains(seed, count, share):
    """(measured, expected, true) gain of the last kept program of a night, in SIGMA."""
    told, _, last = nights.simulated(BASE, count, random.Random(seed), share)
    logged = [(p, facts["old"]) for what, p, facts in told if what == "log" and facts["old"] and p.runs]
    x = [mean(old) - mean(p) for p, old in logged]
    s = [nights.SIGMA * math.sqrt(1 / len(p.runs) + 1 / len(old.runs)) for p, old in logged]
    chain = [last]
    while chain[0].parent:
        chain.insert(0, chain[0].parent)
    means, errors = [mean(p) for p in chain], [nights.SIGMA / math.sqrt(len(p.runs)) for p in chain]
    worth = Prior.of(x, s).along(means, errors)[0]
    return np.array([means[0] - means[-1], worth[0] - worth[-1], 1.2 - last.truth]) / nights.SIGMA


def mean(program):
    return float(np.mean([bpb for bpb, _, busy in program.runs if not busy] or [bpb for bpb, _, _ in program.runs]))


KINDS = {"nothing works": (0.0, 0.0), "a few gains": (0.06, 0.03), "many gains": (0.2, 0.1), "small gains": (0.2, 0.0)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nothing works", "a few gains", "many gains"])
def test_the_expected_gain_is_nearer_to_the_truth_than_the_measured_one(kind):
    seen, worth, truth = np.mean([gains(seed, 40, KINDS[kind]) for seed in range(30)], axis=0)
    assert seen > truth  # the curse
    assert abs(worth - truth) < 0.6 * (seen - truth)


def first(gains):
    """What the first of a night's gains is worth; their errors are 1."""
    errors = [1.0] * len(gains)
    return Prior.of(gains, errors).expected(gains, errors)[0][0]


def test_the_more_was_tried_in_vain_the_less_a_gain_is_worth():
    draw = np.random.default_rng(1)
    worth = [first([2.5, *draw.normal(0, 1, n)]) for n in (1, 10, 100)]
    assert 2.5 > worth[0] > worth[1] > worth[2] > -0.01


def test_a_clear_gain_stays_and_bad_ideas_do_not_raise_a_small_one():
    others = [*[-80.0] * 20, *[0.1, -0.2] * 20]
    assert first([50.0, *others]) == pytest.approx(50.0, abs=1.0)
    assert abs(first([1.0, *others])) < 0.5


def test_a_chain_of_one_step_is_that_step():
    gains, errors = [2.0, 0.3, -1.0, -6.0], [math.sqrt(2)] * 4
    prior = Prior.of(gains, errors)
    before, after = prior.along([7.0, 5.0], [1.0, 1.0])[0]
    assert before - after == pytest.approx(prior.expected(gains, errors)[0][0], abs=0.05)


def test_nothing_compared_is_nothing_expected():
    assert [len(column) for column in Prior.of([], []).expected([], [])] == [0, 0]


if __name__ == "__main__":
    count = int((sys.argv[1:] or [100])[0])
    for kind, share in KINDS.items():
        figures = np.array([gains(seed, 60, share) for seed in range(count)])
        seen, worth, truth = figures.mean(axis=0)
        off = [math.sqrt(np.mean((figures[:, i] - figures[:, 2]) ** 2)) for i in (0, 1)]
        figures = f"measured {seen:6.2f} (off by {off[0]:.2f})  expected {worth:6.2f} (off by {off[1]:.2f})"
        print(f"{kind:14}  {figures}  true {truth:6.2f}, in standard deviations of a run")
