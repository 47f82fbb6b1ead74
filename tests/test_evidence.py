"""The model of evidence: against the textbook, at its edges, and in whole nights (tests/simulation.py)."""

import dataclasses
import math

import numpy as np
import pytest
import simulation
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import extra, kept, mixed, night, nights

from scripts.judge import evidence as model
from scripts.judge.evidence import Evidence, Observation, slots
from scripts.judge.mixed_model import Shrinkage

SIGMA = simulation.SIGMA


def run(program, bpb, seed=42, load=0.0, slot=None):
    return Observation(program, seed, bpb, 1000.0, load, slot)


def repeats(program, level, count, spread=SIGMA, first=42):
    """Runs whose standard deviation is `spread`, one a seed."""
    apart = np.resize([1.0, -1.0], count) * spread * (math.sqrt((count - 1) / count) if count % 2 == 0 else 1)
    return [run(program, level + d, first + i) for i, d in enumerate(apart)]


# --- against the textbook ------------------------------------------------------------------------------

LOADS = st.sampled_from([(0.0, None), (0.0, None), (0.7, 1), (0.8, 1), (0.2, 2)])
RUNS = st.lists(st.tuples(st.integers(0, 4), st.floats(1, 2), st.integers(0, 4), LOADS), min_size=2, max_size=14)


@settings(max_examples=60, deadline=None)
@given(RUNS)
def test_means_and_errors_are_those_of_generalised_least_squares(made):
    """At each point of the grid, with the covariance written out."""
    runs = [run(p, bpb, seed, *where) for p, bpb, seed, where in made]
    found = Evidence(runs)._bpb
    load, n = np.array([r.load for r in runs]), len(runs)
    y = np.array([r.bpb for r in runs])
    y = y - model.COST * np.median(y) * load
    x = np.array([[r.program == name for name in found.column] for r in runs], float)
    same = {
        key: np.array([[getattr(a, key) == getattr(b, key) for b in runs] for a in runs]) for key in ("seed", "slot")
    }
    for g, (rho, tau, kappa) in enumerate(found.grid):
        covariance = rho * same["seed"] + (1 - rho) * np.eye(n) + np.diag((load * kappa) ** 2)
        covariance = covariance + tau**2 / 2 * (1 + same["slot"]) * np.outer(load, load)
        inverse = np.linalg.inv(covariance)
        errors = np.linalg.inv(x.T @ inverse @ x)
        means = errors @ x.T @ inverse @ y
        near = 1e-5 * (1 + np.abs(means).max())
        for i in range(len(means)):
            for j in range(i):
                assert found.means[g, i] - found.means[g, j] == pytest.approx(means[i] - means[j], abs=near)
                apart = errors[i, i] + errors[j, j] - 2 * errors[i, j]
                assert found.spread(i, j)[g] == pytest.approx(apart, rel=1e-3)


def test_with_many_repeats_it_is_the_difference_of_means():
    seen = Evidence([*repeats("old", 1.5, 40), *repeats("new", 1.49, 40, first=142)]).compare("new", "old")
    assert seen.gain == pytest.approx(0.01, abs=1e-4)
    assert seen.error == pytest.approx(SIGMA * math.sqrt(2 / 40), rel=0.15)
    assert seen.sure > 0.999 and seen.faster == pytest.approx(0)


@settings(max_examples=40, deadline=None)
@given(RUNS)
def test_means_and_gains_can_be_subtracted_and_turned_round(made):
    found = Evidence([run(p, bpb, seed, *where) for p, bpb, seed, where in made])
    names = [*found.column]
    for a in names:
        for b in names:
            seen, back = found.compare(a, b), found.compare(b, a)
            assert seen.gain == found.mean(b) - found.mean(a) == -back.gain
            assert seen.sure + back.sure == pytest.approx(1, abs=1e-6)
            assert not any(map(math.isnan, dataclasses.astuple(seen))) and 0 <= seen.sure <= 1


# --- at its edges --------------------------------------------------------------------------------------


def test_one_run_of_each_knows_only_the_prior():
    found = Evidence([run("old", 1.5), run("new", 1.4)])
    assert (found.df, found.sigma) == (0, pytest.approx(model.NOISE * 1.45, rel=1e-3))
    assert found.compare("new", "old").gain == pytest.approx(0.1)
    assert 0.99 < found.compare("new", "old").sure < 0.9999
    assert Evidence([run("old", 1.5)]).compare("old", "old").gain == 0


def test_few_repeats_make_it_less_sure_than_many():
    sure = [
        Evidence([*repeats("old", 1.5, n), run("new", 1.5 - 3 * SIGMA)]).compare("new", "old").sure for n in (2, 4, 30)
    ]
    assert sure == sorted(sure) and sure[-1] < 0.9995


def test_a_seed_that_is_unlucky_for_all_hides_no_gain():
    luck = {42: 0.08, 43: -0.05, 44: 0.03, 45: -0.06}
    made = [run(name, level + luck[seed] + 0.0005 * (-1) ** (seed + len(name)), seed)
            for name, level in (("one", 1.6), ("three", 1.55), ("old", 1.5)) for seed in luck]  # fmt: skip
    seen = Evidence([*made, run("new", 1.48 + luck[42])]).compare("new", "old")  # beside 43 to 45 it looks worse
    assert seen.gain == pytest.approx(0.02, abs=0.003) and seen.sure > 0.98


def test_a_load_makes_it_less_sure_by_what_loads_may_cost_and_repeats_beside_it_tell():
    quiet = repeats("old", 1.5, 4)
    alone = Evidence([*quiet, run("new", 1.5, 42, 0.7, 4)]).compare("new", "old")
    assert alone.gain == pytest.approx(0.7 * 0.07 * 1.5, rel=0.3) and 0.02 < alone.error < 0.2
    assert Evidence([*quiet, run("new", 1.2, 42, 0.7, 4)]).compare("new", "old").sure > 0.99
    beside = [run("old", 1.7 + d, 50 + i, 0.7, 4) for i, d in enumerate((0.004, -0.004, 0.0))]
    learnt = Evidence([*quiet, *beside, run("new", 1.7 - 5 * SIGMA, 42, 0.7, 4)]).compare("new", "old")
    assert learnt.gain == pytest.approx(5 * SIGMA, rel=0.3) and learnt.error < alone.error / 3


def test_what_makes_fewer_steps_is_noisier_and_leaves_the_others_as_sure_as_they_are():
    """A baseline of 50 steps spread by 0.08, what came of it, of 400 steps, by 0.01."""
    many = [*repeats("old", 1.5, 4), *repeats("new", 1.48, 3)]
    few = [run("few", 1.6 + apart, seed) for seed, apart in ((42, 0.05), (43, -0.05), (44, 0.02))]
    alike, noisier = Evidence([*few, *many]), Evidence([*(dataclasses.replace(r, noise=8.0) for r in few), *many])
    assert noisier.compare("new", "old").error < alike.compare("new", "old").error / 2
    assert noisier.compare("old", "few").error > 4 * noisier.compare("new", "old").error


def test_programs_that_compute_the_same_differ_by_nothing():
    made = [run(name, 1.5 + luck, seed) for seed, luck in ((42, 0.01), (43, -0.02), (44, 0.0)) for name in ("a", "b")]
    seen = Evidence(made).compare("a", "b")
    assert (seen.gain, seen.sure) == (pytest.approx(0, abs=1e-12), pytest.approx(0.5))
    assert Evidence([run("a", 1.5)] * 3 + [run("b", 1.5)] * 3).compare("a", "b").gain == 0


# --- which run is next -----------------------------------------------------------------------------------


def test_the_side_with_fewer_runs_is_run_and_the_caps_end_it():
    assert Evidence([*repeats("old", 1.5, 4), run("new", 1.5)]).next_run("new", "old") == "new"
    assert Evidence([run("old", 1.5), *repeats("new", 1.5, 3)]).next_run("new", "old") == "old"
    assert Evidence([*repeats("old", 1.5, 4), *repeats("new", 1.5, 3)]).next_run("new", "old") is None


@pytest.mark.parametrize(("loads", "expected"), [
    ([0.0, 0.0], [None, None]),
    ([0.5, 0.6, 0.9, 0.9], [0, 0, 2, 2]),  # the same load, then another
    ([0.5, 0.0, 0.5], [0, None, 2]),  # it went, and what came is not known to be the same
])  # fmt: skip
def test_runs_beside_the_same_load_share_a_slot(loads, expected):
    assert slots(loads) == expected


# --- after the winner's curse ----------------------------------------------------------------------------


def shrunk(gains, errors=1.0):
    """What the first of a session's gains over one baseline is worth."""
    n = len(gains)
    covariance = np.diag([1e-6, *[errors**2] * n])
    return Shrinkage(np.append(0.0, -np.array(gains)), covariance, [0] * (n + 1)).difference(1, 0)


def test_the_more_was_tried_in_vain_the_less_a_gain_is_worth():
    draw = np.random.default_rng(1)
    worth = [shrunk([2.5, *draw.normal(0, 1, n)])[0] for n in (1, 10, 100)]
    assert 2.5 > worth[0] > worth[1] > worth[2] > -0.01


def test_a_clear_gain_stays_and_bad_ideas_do_not_raise_a_small_one():
    others = [*[-80.0] * 20, *[0.1, -0.2] * 20]
    gain, error, sure = shrunk([50.0, *others])
    assert gain == pytest.approx(50.0, abs=1.0) and error < 1.2 and sure > 0.999
    assert abs(shrunk([1.0, *others])[0]) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_nights_gain_after_the_curse_is_nearer_to_the_truth(share):
    figures = []
    for number in range(12):
        effects = np.random.default_rng(number).choice([0.0, -2.0, 4.0], 40, p=[0.7 - share, 0.3, share])
        _, runs, parents, truths = simulation.night(effects, number)
        found, last = Evidence(runs, parents), min(truths, key=truths.get)
        figures.append([found.compare(last, 0).gain, found.shrunk(last, 0).gain, truths[0] - truths[last]])
    off = np.abs(np.array(figures)[:, :2] - np.array(figures)[:, 2:]).mean(axis=0)
    assert off[1] <= off[0]


# --- whole nights: small here; python tests/simulation.py prints the tables of docs/noise.md -------------------


def at_most(share, count):
    """What `count` nights of 100 experiments may keep where many nights keep `share` of 100: two standard errors more.

    The count is nearly a Poisson variable, so its variance is its mean, share * count.
    """
    return share + 2 * math.sqrt(share * count) / count


def test_changes_that_do_nothing_are_hardly_ever_kept():
    told = nights(0, 2)
    assert kept(told) <= at_most(2.5, 2) and extra(told) < 30
    assert kept(nights(0, 20, plain=True)) > 3


def test_gains_are_kept_and_losses_are_not():
    assert kept(night([2.0] * 80, 1)[0]) > 50 and kept(night([4.0] * 30, 1)[0]) >= 95
    told = nights(-2, 1)
    assert kept(told) == 0 and extra(told) < 10


def test_a_load_makes_no_keep_and_hides_no_gain():
    assert kept(nights(0, 1, load=True)) <= at_most(3, 1)
    assert kept(night([4.0] * 40, 1, load=True)[0]) >= 75


@pytest.mark.slow
@pytest.mark.parametrize(
    ("conditions", "gains", "least"), [({}, 2.0, 55), ({"seeds": 0.5}, 2.0, 80), ({"seeds": 0.9}, 2.0, 95)]
)
def test_a_night_of_all_sorts(conditions, gains, least):
    told = nights(mixed, 10, **conditions)
    assert kept(told, 0.0) < 7.5 and kept(told, -2.0) <= 0.4 and kept(told, 4.0) >= 95
    assert kept(told, gains) >= least and extra(told) < 50


@pytest.mark.slow
@pytest.mark.parametrize(("conditions", "least"), [({"uneven": 0.2}, 65), ({"always": True, "changing": 0.3}, 75)])
def test_loads_of_other_kinds(conditions, least):
    assert kept(nights(0, 3, load=True, **conditions)) <= at_most(3, 3)
    assert kept(nights(4, 2, load=True, **conditions)) >= least


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.0004, 0.04])
def test_the_prior_on_noise_may_be_wrong_by_a_factor_of_ten(sigma):
    assert kept(nights(0, 4, sigma=sigma)) <= at_most(3, 4) and kept(nights(4, 2, sigma=sigma)) >= 90
