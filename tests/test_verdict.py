"""The rule for keeping: its table, its order, and what it reads in records. Whole nights are in test_evidence.py."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paired_runs import run, trained

from harness import record
from scripts.judge import verdict
from scripts.judge.evidence import Comparison, busy, load
from scripts.judge.verdict import Facts, rule

SEEN, LOST, OPEN = 0.9999, 0.0001, 0.6


def facts(gain=0.0, faster=0.0, sure=OPEN, **more):
    """Of a comparison for which no run is left, unless `next` is given; a loss that matters is ruled out or not."""
    content = {"promise": 0.5, "matters": 0.005, "harmless": 0.99, "harmless_promise": 0.9, **more}
    error = content.pop("error", 0.002)
    return Facts(Comparison(gain, error, sure, faster, content.pop("faster_error", 0.001)), **content)


def word(*arguments, **more):
    return rule(facts(*arguments, **more))[0]


@pytest.mark.parametrize(("gain", "faster", "sure", "expected"), [
    (1e-6, -0.15, SEEN, "keep"), (1e-6, -0.150001, SEEN, "discard"),  # SLOWER
    (0.004999, -0.16, SEEN, "discard"), (0.005, -0.16, SEEN, "judge"), (0.005, -0.15, SEEN, "keep"),  # CLEAR
    (-0.002999, 0.2501, LOST, "keep"), (-0.003, 0.2501, LOST, "discard"), (-0.002999, 0.25, LOST, "discard"),  # SMALL
    (0.0, 0.1, OPEN, "discard"), (0.0, 0.100001, OPEN, "keep"), (-1e-6, 0.2, LOST, "discard"),  # FASTER
])  # fmt: skip
def test_edges_of_the_table(gain, faster, sure, expected):
    assert word(gain, faster, sure, harmless=0.99 if sure == OPEN else 0.0) == expected


@pytest.mark.parametrize(("faster", "harmless", "fewer_lines", "expected"), [
    (0.0, 0.96, True, "keep"), (-0.05, 0.96, True, "keep"), (-0.050001, 0.96, True, "discard"),
    (0.0, 0.96, False, "discard"), (0.0, 0.92, True, "discard"),  # a loss that matters is not ruled out
])  # fmt: skip
def test_simpler_code_at_its_edges(faster, harmless, fewer_lines, expected):
    assert word(0.0, faster, harmless=harmless, fewer_lines=fewer_lines) == expected


def test_no_difference_is_said_only_where_one_that_matters_is_ruled_out():
    assert rule(facts(0.0, error=0.002))[1].startswith("no difference seen: more than 0.0050 is ruled out")
    assert rule(facts(0.0, error=0.004))[1] == "not proven"
    assert rule(facts(0.003, error=0.002))[1] == "not proven"
    assert rule(facts(-0.02, sure=LOST, harmless=0.0))[1] == "val_bpb worse"


def test_another_run_is_made_while_it_may_settle_it():
    assert rule(facts(next="new")) == ("rerun", "another run of it may settle it", "new")
    assert "reference" in rule(facts(next="old"))[1]
    assert word(next="new", promise=0.1) == "discard"  # hopeless
    assert word(0.02, sure=SEEN, next="new") == "keep"  # settled
    assert word(0.02, sure=0.929, next="new") == "rerun" and word(0.02, sure=0.931, next="new") == "keep"
    almost = {"sure": 0.9, "harmless": 0.97, "next": "new"}
    assert word(0.004, faster=0.12, **almost) == "keep"  # whatever its gain turns out to be
    assert word(0.004, faster=0.12, unearned=("judge", "a step teaches less"), **almost) == "rerun"
    assert word(0.004, faster=0.12, **{**almost, "harmless": 0.92}) == "rerun"


def test_a_loss_that_matters_is_looked_at_where_the_code_is_shorter_or_faster():
    open_ = {"next": "new", "promise": 0.01, "harmless": 0.6}
    assert word(**open_, fewer_lines=True) == "rerun" and word(faster=0.12, **open_) == "rerun"
    assert word(**open_) == "discard" and word(**{**open_, "harmless_promise": 0.01}, fewer_lines=True) == "discard"


def test_what_computes_the_same_has_no_effect_but_fewer_lines_and_speed():
    found = rule(facts(0.0014, same=True, sure=SEEN))  # the clock had moved val_bpb
    assert found[0] == "again" and "the change has no effect" in found[1]
    assert word(same=True, fewer_lines=True, harmless=0.0, next="new") == "keep"
    assert word(faster=0.11, same=True, harmless=0.0, next="new") == "keep"
    assert word(faster=0.11, faster_error=0.1, same=True) == "again"  # beside a load, say


def test_speed_that_is_not_sure_keeps_nothing():
    assert word(faster=0.2, faster_error=0.02) == "keep" and word(faster=0.2, faster_error=0.2) == "discard"
    assert word(0.004, faster=-0.2, faster_error=0.2, sure=SEEN) == "keep"


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-0.14, 0.25), st.booleans())
def test_what_is_surer_is_never_judged_worse(one, other, promise, faster, fewer_lines):
    rank = {"discard": 0, "rerun": 1, "keep": 2, "judge": 2}
    words = [rank[word(0.01, faster, sure, promise=promise * sure, harmless=sure, next="new",
                       harmless_promise=sure, fewer_lines=fewer_lines)] for sure in sorted((one, other))]  # fmt: skip
    assert words == sorted(words)


# --- from records ----------------------------------------------------------------------------------------

LOAD = {"machine": {"other_cores": 1.0, "cores": 2}}
REPEATS = (0.004, -0.004, 0.003, -0.003)


class Sitting:
    """A session whose last kept row is the program `old`, with these runs in their order."""

    def __init__(self, runs):
        self.row = SimpleNamespace(blob="old", bpb=1.5, rate=1000, commit="c0ffee0", number=1, status="keep")
        self.made = [{"role": "candidate", "status": "valid", "run_id": r["run_id"]} for r in runs]

    def reference(self, rows, commit):
        return self.row

    def attempts(self):
        return self.made


@pytest.fixture
def judged(monkeypatch):
    """judged(new, old) is the verdict on the last of the runs `new` of a program against the runs `old`."""

    def judge(new, old, texts=None):
        texts = texts or {"old": "a = 1\n", "new": "a = 2\n"}
        monkeypatch.setattr(record, "archived", lambda: iter([*old, *new]))
        monkeypatch.setattr(verdict.session, "record_of", lambda attempt: new[-1])
        monkeypatch.setattr(verdict.session, "text_of", lambda blob: texts.get(blob))
        return verdict.of_attempt(Sitting([*old, *new]), {"commit": "abc"}, [])

    return judge


def test_first_comes_again_then_another_run_then_the_table(judged):
    old = [run(1.5 + d, seed=42 + i) for i, d in enumerate(REPEATS)]
    assert judged([run(1.2, seed=50, **LOAD)], old, texts={"other": ""}).word == "again"  # the reference's own text
    same = {"old": "a = 1", "new": "# more\nmx.random.seed(7)\na = 1"}
    assert judged([run(1.2, blob="new")], old, texts=same).word == "again"
    found = judged([run(1.495, blob="new", seed=50)], old)
    assert (found.word, found.next) == ("rerun", "make run AGAIN=1") and "sure; 93 % is asked" in verdict.reason(found)
    assert judged([run(1.4, blob="new")], old).word == "keep"
    assert judged([run(1.6, blob="new")], old).word == "discard"


def test_val_bpb_and_gain_can_be_subtracted_whatever_is_shown(judged):
    old = [run(1.5 + d, seed=42 + i) for i, d in enumerate(REPEATS)]
    found = judged([run(1.46, blob="new", seed=43), run(1.48, blob="new", seed=50, **LOAD)], old)
    assert found.old.bpb - found.new.bpb == pytest.approx(found.seen.gain, abs=1e-12)
    assert f"gain {found.seen.gain:+.4f} ± {found.seen.error:.4f}" in verdict.reason(found)


def beside(cores):
    return {"machine": {"other_cores": cores, "cores": 2}}


@pytest.mark.parametrize(("first", "now", "gain", "loss"), [
    (1.0, 1.0, 0.3, 0.3), (0.0, 1.0, 1.0, 0.5), (1.0, 1.5, 1.2, 0.7),
])  # fmt: skip
def test_beside_a_load_one_run_shows_what_is_large_and_the_rest_is_looked_at_again(judged, first, now, gain, loss):
    """Of a baseline that was run once, beside another load or none."""

    def word(gain):
        return judged([run(1.9 - gain, blob="new", **beside(now))], [run(1.9, **beside(first))]).word

    apart = load(run(**beside(now))) - load(run(**beside(first)))
    assert (word(gain), word(-loss), word(0.01 - 0.07 * 1.9 * apart)) == ("keep", "discard", "rerun")


def test_runs_beside_an_even_load_are_compared_as_quiet_ones_are(judged):
    old = [run(1.7 + d, seed=42 + i, **LOAD) for i, d in enumerate((0.004, -0.004, 0.004, -0.004))]
    assert judged([run(1.6, blob="new", **LOAD)], old).word == "keep"
    assert judged([run(1.71, blob="new", seed=50, **LOAD)], old).seen.error < 0.02


def test_a_reference_without_records_is_compared_by_its_row(judged, monkeypatch):
    new = run(1.2, blob="new")
    monkeypatch.setattr(Sitting, "reference", lambda self, rows, commit: self.row)
    real = verdict.of_session
    monkeypatch.setattr(verdict, "of_session", lambda attempts, rows, like: real(attempts, [Sitting([]).row], like))
    found = judged([new], [])
    assert found.seen.gain == pytest.approx(0.3) and any("is not in data/" in note for note in found.notes)


@pytest.mark.parametrize(("gain", "what", "expected"), [
    (0.0, {}, "keep"),  # the same learnt a step, in less time
    (-0.02, {}, "judge"),  # less learnt a step: a smaller model, or batches that were drawn and dropped
    (0.02, {"training": {"tokens_per_step": 8192}}, "discard"),  # four drawn for one, all of them "throughput"
    (0.02, {"training": {"sequence_length": 256}}, "discard"), (0.0, {"seed": 44}, "discard"),
])  # fmt: skip
@pytest.mark.parametrize("rate", [1120.0, 5590.0])
def test_throughput_keeps_no_run_by_what_was_drawn(judged, gain, what, expected, rate):
    """No difference in val_bpb, and more tokens a second."""
    olds = [trained(1000, seed=seed, bpb=1.5 + (seed - 42.5) * 1e-5 + i * 1e-6) for i, seed in enumerate((42, 43) * 2)]
    news = [trained(1500, gain, **{"bpb": 1.5 + x, "rate": rate, "blob": "new", **what}) for x in (-1e-5, 1e-5, 0)]
    found = judged(news, olds)
    assert found.word == expected, found.rule
    assert ("throughput keeps nothing here" in found.rule) == (expected != "keep")


def test_losses_that_are_the_references_step_by_step_are_no_change(judged):
    old = [trained(1000, noise=0.0, bpb=1.5), *(run(1.5 + d, seed=43 + i) for i, d in enumerate(REPEATS[:2]))]
    found = judged([trained(1003, noise=0.0, bpb=1.4986, blob="new")], old)
    assert found.word == "again" and "the change has no effect" in found.rule


@pytest.mark.parametrize(("backend", "seen", "expected"), [
    ("cpu", {"other_cores": 0.1}, None), ("cpu", {"other_cores": 0.11}, "other processes"),
    ("metal", {"other_cores": 0.9}, None), ("metal", {"other_cores": 1.1}, "other processes"),
    ("cpu", {"step_ms": [9, 10, 20]}, None), ("cpu", {"step_ms": [9, 10, 20.5]}, "uneven"),
    ("cpu", {"swapped_mb": 256}, None), ("cpu", {"swapped_mb": 257}, "swapped"),
    ("cpu", {"paused_seconds": 1.0}, None), ("cpu", {"paused_seconds": 1.1}, "stood still"),
    ("cpu", {}, None), ("cpu", None, None),
])  # fmt: skip
def test_what_disturbs_a_run(backend, seen, expected):
    found = busy(run(machine=seen and {"cores": 2, **seen}, device={"backend": backend}))
    assert found is None if expected is None else expected in found
