"""Loops that would score better than they are, or that were disturbed: each is refused by the check meant for it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import HARNESS, ROOT, SIZES, sampled
from gallery import Answers, evaluate

import data_sources
import prepare
from harness import project, run, run_checks
from harness import record as records

V = 512


uniform = Answers(lambda ids: mx.zeros((*ids.shape, V)))


@pytest.fixture
def outcome(small, tmp_path, monkeypatch):
    """outcome(loop) runs loop(run, batches) as train.py would: (exit code, reason, record)."""
    for name in ("DATA", "STORE"):
        monkeypatch.setattr(records, name, tmp_path / "data")
    monkeypatch.setattr(run, "PROCESS_START", time.monotonic())
    monkeypatch.setattr(run_checks, "SLACK", 0.2)
    monkeypatch.setattr(run_checks, "_opened", [])
    monkeypatch.setenv("AUTORESEARCH_BUDGET", "0.3")

    def outcome(loop):
        run, code = prepare.Run("files"), 0
        try:
            loop(run, run.batches(4))
            run.finish(uniform, 16, {"depth": 1, "n_embd": 64})
        except SystemExit as end:
            code = end.code
        record = json.loads((tmp_path / "data" / "last_run.json").read_text())
        return code, record["reason"], record

    return outcome


def train(run, batches, seconds=0.01):
    """An honest loop."""
    run.start_clock()
    while run.training():
        next(batches)
        time.sleep(seconds)
        run.log_step(mx.array(6.2))


def refused_loop(check, outcome, loop):
    code, reason, record = outcome(loop)
    assert code == 2 and record["status"] == "invalid" and not any(record["result"].values())
    assert reason.startswith(f"{check}: ") and "\n" not in reason and "Look for" in reason
    assert records.seal_fits(record)
    return reason


def test_an_honest_loop_is_valid(outcome):
    def loop(run, batches):
        for _ in range(2):  # to warm up
            next(batches)
        train(run, batches)

    code, reason, record = outcome(loop)
    assert (code, reason, record["status"]) == (0, None, "valid")
    assert record["result"]["val_bpb"] > 0
    assert record["training"]["total_tokens"] == record["training"]["total_steps"] * 4 * 64


def test_a_step_longer_than_the_budget_is_valid(outcome):
    code, reason, record = outcome(lambda run, batches: train(run, batches, seconds=0.4))
    assert (code, reason) == (0, None)


# --- its text ----------------------------------------------------------------------------------------

READS = {  # how a loop gets at text by another way than its stream
    "tokens of validation": lambda run: run.cache.tokens("val")[:10],
    "the rows of the evaluation": lambda run: prepare.evaluation_rows(run.cache, run.dataset),
    "a cache of its own": lambda run: prepare.TokenCache.load(run.dataset).tokens("train")[:10],
    "the file itself": lambda run: np.fromfile(run.cache.folder / "val_tokens.npy", np.uint16),
    "the texts": lambda run: next(iter(run.dataset.source.texts(run.dataset, "train"))),
    "texts that are program text": lambda run: next(data_sources.DATASETS["stdlib"].source.texts(None, "val")),
    "what the dataset was made from": lambda run: Path(os.environ["AUTORESEARCH_FILES"], "texts.jsonl").read_text(),
    "an evaluation of its own": lambda run: evaluate(uniform, run.tokenizer, 16),
}


@pytest.mark.parametrize("name", sampled(READS))
def test_a_loop_that_reads_text_by_another_way_is_refused(outcome, small_files, monkeypatch, name):
    monkeypatch.setenv("AUTORESEARCH_FILES", str(small_files[2]))

    def loop(run, batches):
        READS[name](run)
        train(run, batches)

    assert "opened during the run" in refused_loop("data", outcome, loop)


def test_there_is_one_stream_and_nobody_else_asks_for_the_rows_of_evaluation(small):
    run = prepare.Run("files")
    run.batches(4)
    for ask, said in ((lambda: run.batches(4), "called twice"), (lambda: run._rows("val"), "harness's alone")):
        with pytest.raises(SystemExit, match=said):
            ask()


def test_a_model_that_reads_while_it_is_evaluated_is_refused(outcome):
    def loop(run, batches):
        def model(ids):
            run.cache.tokens("val")
            return uniform(ids)

        train(run, batches)
        run.finish(Answers(model), 16, {"depth": 1, "n_embd": 64})

    assert "val_tokens.npy was opened" in refused_loop("data", outcome, loop)


def test_what_lies_elsewhere_may_be_read(outcome, tmp_path):
    def loop(run, batches):
        (tmp_path / "notes.txt").write_text("of my own")
        (tmp_path / "notes.txt").read_text()
        train(run, batches)

    assert outcome(loop)[0] == 0


def test_a_loop_with_data_of_its_own_is_refused(outcome):
    def loop(run, batches):
        run.start_clock()
        while run.training():
            time.sleep(0.01)
            run.log_step(mx.array(6.2))

    assert "no batch was taken" in refused_loop("data", outcome, loop)


def test_what_the_run_shows_to_a_loop_is_not_what_it_is_measured_with(outcome):
    def loop(run, batches):
        run.tokenizer.token_bytes = run.tokenizer.token_bytes * 2
        run.cache = None
        train(run, batches)

    assert outcome(loop)[2]["result"] == outcome(train)[2]["result"]


# --- its clock -------------------------------------------------------------------------------------


def goes_on(run, batches):
    train(run, batches)
    while run.elapsed() < 0.7:
        next(batches)
        time.sleep(0.01)
        run.log_step(mx.array(6.2))


def trains_on_without_a_word(run, batches):
    train(run, batches)
    time.sleep(0.4)


def ends_with_a_step_that_holds_many(run, batches):
    train(run, batches)
    time.sleep(0.6)  # this step may not excuse itself
    run.log_step(mx.array(6.2))


def logs_nothing(run, batches):
    run.start_clock()
    next(batches)


@pytest.mark.parametrize(
    "loop", [goes_on, trains_on_without_a_word, ends_with_a_step_that_holds_many, logs_nothing]
)  # fmt: skip
def test_a_loop_that_takes_more_than_its_budget_is_refused(outcome, loop):
    reason = refused_loop("budget", outcome, loop)
    assert ("no step was logged" if loop is logs_nothing else "over by more than one step") in reason


def test_what_is_done_after_the_budget_is_no_fault(outcome, monkeypatch):
    """To write the weights of a large model, or of a small one to a slow disk, takes a while."""
    save = mx.save_safetensors
    monkeypatch.setattr(mx, "save_safetensors", lambda *args: (time.sleep(0.8), save(*args)))
    assert outcome(train)[:2] == (0, None)


@pytest.mark.parametrize("name", ["bias", "_average"])
def test_work_that_is_pending_at_the_end_belongs_into_the_budget(outcome, name):
    """MLX is lazy: what is not evaluated in the loop would be in the evaluation."""

    def loop(run, batches):
        train(run, batches)
        model, late = Answers(uniform), mx.random.uniform(shape=(6_000_000,))
        for _ in range(4):
            late = mx.sort(1 - late * late)
        setattr(model, name, late)
        run.finish(model, 16, {"depth": 1, "n_embd": 64})

    refused_loop("budget", outcome, loop)


def draws_before_the_clock(run, batches):
    for _ in range(300):
        next(batches)
    train(run, batches)


def starts_late(run_, batches):
    run.PROCESS_START -= 121
    train(run_, batches)


@pytest.mark.parametrize("loop, seen", [(draws_before_the_clock, "steps were taken before"), (starts_late, "121 s")])
def test_what_begins_before_the_clock_is_refused(outcome, loop, seen):
    assert seen in refused_loop("start-up", outcome, loop)


def test_seconds_before_the_import_are_start_up():
    """A process that sleeps and then imports the harness."""
    words = "import time; time.sleep(1); from harness import run; print(time.monotonic() - run.PROCESS_START)"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.9


@pytest.mark.parametrize(
    "budget, seconds, step_ends, valid",
    [
        (300, 299.0, [1.0, 2.0, 3.0], True),
        (300, 306.0, [1.0, 2.0, 3.0], True),  # two per cent
        (300, 306.1, [1.0, 2.0, 3.0], False),
        (300, 309.9, [10.0, 20.0, 30.0], True),  # one step
        (300, 310.1, [10.0, 20.0, 30.0], False),
        (300, 340.0, [1.0, 2.0, 3.0, 340.0], False),  # the last one does not excuse itself
        (300, 340.0, [1.0, 2.0, 340.0, 340.0], False),  # nor the one before
        (10, 14.0, [14.0], True),  # the only one
        (10, 21.0, [21.0], False),
        (5, 7.1, [0.1, 0.2, 0.3, 7.1], False),
        (10, 10.0, [], False),
    ],
)
def test_the_budget_may_be_exceeded_by_one_step_or_two_per_cent(budget, seconds, step_ends, valid):
    if valid:
        return run_checks.budget(budget, seconds, step_ends)
    with pytest.raises(run_checks.Refused, match="^budget: "):
        run_checks.budget(budget, seconds, step_ends)


@pytest.mark.parametrize("seconds, steps, valid", [(120, 4, True), (120.5, 0, False), (1, 4.5, False)])
def test_start_up_has_its_limits(seconds, steps, valid):
    if valid:
        return run_checks.start_up(seconds, steps)
    with pytest.raises(run_checks.Refused, match="^start-up: "):
        run_checks.start_up(seconds, steps)


# --- which harness, which record -----------------------------------------------------------------------


def test_the_hash_of_the_harness_does_not_mind_comments(tmp_path, monkeypatch):
    for path in [*ROOT.glob("harness/*.py"), ROOT / "prepare.py", ROOT / "data_sources.py"]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(project, "ROOT", tmp_path)
    edited, before = tmp_path / "harness" / "leak_checks.py", project.harness_hash()
    text = edited.read_text()
    edited.write_text("# a comment\n" + text)
    assert project.harness_hash() == before
    edited.write_text(text.replace("SURE = 5.0", "SURE = 5.1"))
    assert project.harness_hash() != before


# --- as a program ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--weights", "a", "b"], ["--chekc"]])
def test_a_word_that_is_not_understood_never_trains(small, tmp_path, words):
    for path in HARNESS:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "harness", tmp_path / "harness")
    with (tmp_path / "data_sources.py").open("a") as out:
        out.write(SIZES)
    (tmp_path / "train.py").write_text('import prepare\nprepare.Run("files")\nprint("trained")\n')
    command = [sys.executable, "train.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "trained" not in done.stdout
    assert done.stderr.startswith(f"error: train.py does not understand {' '.join(words)}: it takes --check")
    assert done.stderr.count("\n") == 1
