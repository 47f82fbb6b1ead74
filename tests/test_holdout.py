"""Holdout: the night's gain by fresh pairs, on a split that no other command reads."""

import json

import pytest

from scripts.judge import evidence, holdout


def test_the_sessions_noise_is_known_where_one_pair_is_all_there_is():
    known = [evidence.Observation("a", 42 + i, 1.5 + luck, 1e4) for i, luck in enumerate((5e-4, -5e-4, 3e-4, -3e-4))]
    alone, pooled = (holdout.measured_anew(k, (1.0, 1.0), [(50, (0.0, 0.0), (1.3, 1.28))]) for k in ((), known))
    assert pooled.error < alone.error / 2 and pooled.gain == pytest.approx(0.02, abs=1e-3)


@pytest.mark.slow
def test_baseline_against_best_in_turn_with_fresh_seeds(session):
    session.experiment("prepare.finish(1.4)", "keep", "better")
    session.experiment("prepare.finish(1.45)", "discard", "worse")
    head, text = session.git("rev-parse", "HEAD"), (session.path / "train.py").read_text()
    done = session.make("holdout", "N=2", check=0)
    assert "as the night saw it, on validation  +0.1000 ± " in done.stdout
    assert "fresh runs, on test                 +0.1000 ± " in done.stdout
    assert "look 1 at the test split" in done.stdout and "beyond its noise" not in done.stdout
    begun = [event for event in session.events if event["event"] == "begin" and event["role"] == "holdout"]
    assert [event["seed"] for event in begun] == [43, 43, 44, 44]
    first, best = (row[0] for row in session.rows[:2])
    assert [event["commit"] for event in begun] == [first, best, best, first]  # in turn
    assert (session.git("rev-parse", "HEAD"), (session.path / "train.py").read_text()) == (head, text)
    assert session.git("worktree", "list").count("\n") == 0 and len(session.rows) == 3
    assert "look 2 at the test split" in session.make("holdout", "N=1", check=0).stdout


@pytest.mark.slow
def test_a_night_that_saw_more_than_fresh_runs_show_is_told_so(session):
    lucky = "from harness import project\nprepare.finish(1.3 if project.settings()[1] == 42 else 1.49)"
    session.experiment(lucky, "keep")
    told = session.make("holdout", "N=1", check=0).stdout
    assert "fresh runs show 0.1900 less than it saw, beyond its noise" in told


# What the budget and the text make of a change: at four times the budget it loses, on other text it gains twice.
MOVED = """
from harness import project
gain = 0.1 * {on} * (-1 if project.settings()[0] > 300 else 2 if DATASET == "tinystories" else 1)
prepare.finish(1.5 - gain)
"""
SAMPLE = "import sys\nif '--sample' in sys.argv:\n    sys.exit(print('\\nsample:\\nOnce </pre><b>upon</b> a time'))\n"


def test_another_budget_and_another_text_tell_what_is_left_and_move_nothing_else(session):
    """The report of a night with all that a morning has: ablation, expectations, looks elsewhere, a sample."""
    session.write_train(SAMPLE + MOVED.format(on=1), commit="better\n\nExpect: 0.05 to 0.2")
    session.script("run", check=0)
    session.make("log-result", "STATUS=keep", "DESC=better", check=0)
    standing = session.make("brief", check=0).stdout.splitlines()
    assert "this session has BUDGET=300" in session.script("run", BUDGET="1200", check=1).stderr

    done = session.make("holdout", "N=1", "BUDGET=1200", check=0).stdout
    assert "run 1 of 2: baseline, seed 43 BUDGET=1200\n" in done and "run 2 of 2: best" in done
    assert "with BUDGET=1200 the baseline wins, nothing of the night's gain is left" in done
    assert session.attempt["budget"] == 1200 and session.attempt["role"] == "holdout"
    refused = session.script("holdout", N="1", DATASET="tinystories", check=1).stderr
    assert refused == "error: dataset 'tinystories' is not prepared; run: make prepare DATASET=tinystories\n"
    done = session.make("holdout", "N=1", "DATASET=tinystories", ALSO_PREPARED="tinystories", check=0).stdout
    assert "with DATASET=tinystories the best wins, 200 % of the night's gain is left" in done

    told = session.make("brief", check=0).stdout.splitlines()
    looks = [line for line in told if line.startswith("held out ") and "=" in line]
    assert len(looks) == 2 and [x for x in told if x not in looks][1:-1] == standing[1:-1]  # the rest is as it was
    session.script("run", REFERENCE="1", check=0)
    assert (session.attempt["budget"], session.attempt["seed"]) == (300, 43)

    session.make("holdout", "N=1", check=0)
    session.make("ablate", check=0)
    session.make("sample", "PROMPT=Once", check=0)
    assert session.make("report", check=0).stderr == ""
    page = (session.path / "data" / "report.html").read_text()
    words = ("on held-out text the best wins: +0.1000", "held out BUDGET=1200", "the baseline wins",
             "<i>worth now </i>", "expected 0.05 to 0.2", "right in 1 of 1",
             "Once &lt;/pre&gt;&lt;b&gt;upon&lt;/b&gt; a time")  # fmt: skip
    assert [w for w in words if w not in page] == []


def test_the_figure_on_the_test_split_is_in_no_record(session):
    session.experiment("prepare.finish(1.4)", "keep", "better")
    session.make("holdout", "N=1", check=0)
    for path in (session.path / "data").glob("*run*.json"):
        assert "1.65" not in path.read_text() and not {"test", "test_bpb"} & set(json.loads(path.read_text())["result"])
    assert not (session.path / "data" / "holdout.json").exists()


def test_without_a_gain_there_is_nothing_to_measure(session):
    assert "no gain to measure" in session.make("holdout").stderr
