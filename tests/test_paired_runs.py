"""Pairs that cost no run: two records of runs that saw the same text."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness import record


def run(bpb=1.5, rate=1000.0, blob="old", seed=42, curve=None, **more):
    """As much of a record as a verdict reads."""
    training = {
        "avg_tok_sec": rate,
        "total_steps": 100,
        "tokens_per_step": 2048,
        "sequence_length": 64,
        **more.pop("training", {}),
    }
    return {"run_id": f"{blob}-{seed}-{bpb}", "train_blob": blob, "seed": seed, "budget": 100.0, "dataset": "stdlib",
            "token_cache": "t", "harness": "h", "device": {"backend": "cpu"}, "training": training,
            "result": {"val_bpb": bpb}, "curve": curve, "machine": {"other_cores": 0.0, "cores": 2}} | more  # fmt: skip


# --- record.at_equal_steps -------------------------------------------------------------------------------


def trained(steps, gain=0.0, seed=42, noise=0.0005, **more):
    """A run of so many steps in a budget of 100 s. The text of a step makes its loss; noise is the run's own."""
    text = np.random.default_rng(7).normal(0, 0.15, 20000)[:steps]
    own = np.random.default_rng(steps).normal(0, noise, steps)
    loss = 3 + 5 / np.sqrt(np.arange(steps) + 4) + text + own - gain
    curve = [(100 * (i + 1) / steps, loss[i], 2048 * (i + 1), 100.0) for i in range(steps)]
    return run(seed=seed, curve=record.binned(curve), **more)


@pytest.mark.parametrize(("steps", "others"), [(1000, 1700), (900, 240), (257, 256)])
@pytest.mark.parametrize("gain", [0.0, 0.02, -0.01])
def test_a_planted_difference_is_found_at_equal_steps(steps, others, gain):
    new, old = trained(steps, gain), trained(others)
    change, error = record.at_equal_steps(new, old)
    assert abs(change + gain) < max(4 * error, 3e-4)
    assert error < 5e-4  # where the losses of single steps spread by 0.15
    back, same = record.at_equal_steps(old, new)
    assert back == pytest.approx(-change) and same == pytest.approx(error)


def test_what_did_not_see_the_same_text_is_no_pair():
    new = trained(1000)
    for other in (trained(1000, seed=43), trained(1000, training={"tokens_per_step": 4096}),
                  trained(1000, training={"sequence_length": 128}), trained(1000, training={"tokens_per_step": None}),
                  run(curve=None), run(curve={})):  # fmt: skip
        assert record.at_equal_steps(new, other) is None
    assert record.at_equal_steps(*[trained(1000, training={"tokens_per_step": None})] * 2) is None
    assert record.at_equal_steps(*[trained(12)] * 2) is None  # too few steps to say anything


def test_runs_that_compute_the_same_are_known_by_their_losses():
    assert record.same_losses(trained(1000, noise=0.0), trained(1100, noise=0.0))
    assert not record.same_losses(trained(1000, noise=0.0), trained(1000, 0.0001, noise=0.0))
    assert not record.same_losses(trained(1000, noise=0.0), trained(1000, noise=0.0, seed=43))
    assert not record.same_losses(run(), run())


def test_the_warm_down_is_left_out():
    """What two schedules make of the second half of the budget is no evidence."""
    new, old = trained(1000), trained(1000)
    half = len(new["curve"]["loss"]) // 2
    new["curve"]["loss"][half:] = [loss - 1 for loss in new["curve"]["loss"][half:]]
    change, error = record.at_equal_steps(new, old)
    assert abs(change) < max(4 * error, 1e-6)


# --- record.binned ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@example(256, 256, 0)
@example(513, 256, 0)
@given(st.integers(0, 3000), st.sampled_from([1, 4, 256]), st.integers(0, 2**32 - 1))
def test_bins_hold_means_of_whole_bins(steps, points, seed):
    random = np.random.default_rng(seed)
    ends, losses = np.cumsum(random.uniform(0.01, 0.02, steps)), random.uniform(1, 9, steps)
    memory = np.cumsum(random.uniform(0, 1, steps))
    curve = [(ends[i], losses[i], 512 * (i + 1), memory[i]) for i in range(steps)]
    found = record.binned(curve, points)
    size = found.pop("steps_per_bin")
    assert size & (size - 1) == 0 and steps <= points * size and (size == 1 or steps > points * size // 2)
    assert set(found) == {"seconds", "loss", "tok_sec", "memory_mb"}
    bins = [(a, a + size) for a in range(0, steps - size + 1, size)]
    assert {len(column) for column in found.values()} == {len(bins)}
    for i, (a, b) in enumerate(bins):
        assert found["loss"][i] == pytest.approx(losses[a:b].mean(), abs=1e-5)
        assert found["seconds"][i] == pytest.approx(ends[b - 1], abs=1e-3)
        assert found["memory_mb"][i] == pytest.approx(memory[b - 1], abs=0.5)
        assert found["tok_sec"][i] == pytest.approx(512 * (b - a) / (ends[b - 1] - (ends[a - 1] if a else 0)), abs=0.5)
