"""Holdout: the night's gain by fresh pairs, on a split that no other command reads."""

import json

import pytest


@pytest.mark.slow
def test_baseline_against_best_in_turn_with_fresh_seeds(session):
    session.experiment("prepare.finish(1.4)", "keep", "better")
    session.experiment("prepare.finish(1.45)", "discard", "worse")
    head, text = session.git("rev-parse", "HEAD"), (session.path / "train.py").read_text()
    done = session.make("holdout", "N=2", check=0)
    assert "as the night saw it, on validation  +0.1000 ± " in done.stdout
    assert "fresh runs, on test                 +0.1000 ± " in done.stdout
    assert "looked at 1 time in" in done.stdout
    begun = [event for event in session.events if event["event"] == "begin" and event["role"] == "holdout"]
    assert [event["seed"] for event in begun] == [43, 43, 44, 44]
    first, best = (row[0] for row in session.rows[:2])
    assert [event["commit"] for event in begun] == [first, best, best, first]  # in turn
    assert (session.git("rev-parse", "HEAD"), (session.path / "train.py").read_text()) == (head, text)
    assert session.git("worktree", "list").count("\n") == 0 and len(session.rows) == 3
    assert "looked at 2 times in" in session.make("holdout", "N=1", check=0).stdout


def test_the_figure_on_the_test_split_is_in_no_record(session):
    session.experiment("prepare.finish(1.4)", "keep", "better")
    session.make("holdout", "N=1", check=0)
    for path in (session.path / "data").glob("*run*.json"):
        assert "1.65" not in path.read_text() and not {"test", "test_bpb"} & set(json.loads(path.read_text())["result"])
    assert not (session.path / "data" / "holdout.json").exists()


def test_without_a_gain_there_is_nothing_to_measure(session):
    assert "no gain to measure" in session.make("holdout").stderr
