"""What makes a run invalid, its model aside: the clock, the start-up, the budget, the text that was read.

What the model itself is asked stands in leak_checks.py. A check that fails raises `Refused`. The checks stop mistakes
and casual shortcuts; an agent with a shell can forge anything.
"""

import contextvars
import os
import sys
from contextlib import contextmanager

import numpy as np

from harness.corpus import TEXT_READ


class Refused(Exception):
    """A check failed. The text names the check, says what was seen, and what to look for."""


STARTUP = 120  # seconds, at most
OVERSHOOT = 0.02  # of the budget, or one step
SLACK = 2  # seconds that a busy machine may hold up a step: they matter to short budgets alone
UNKNOWN_STEP = 10  # seconds that a step may take where there are no others to compare it with
WARM_UP_STEPS = 4  # steps' worth of training batches that may be taken before the clock starts


def paused(seconds, budget):
    """The process was at work throughout. seconds: for which it stood still."""
    if seconds > max(OVERSHOOT * budget, SLACK):
        raise Refused(f"paused: for {seconds:.0f} s the process stood still: it slept, or was stopped. Run it again.")


def start_up(seconds, steps):
    """Nothing was trained before the clock started. steps: how many steps' worth of batches were taken before."""
    if seconds > STARTUP:
        raise Refused(
            f"start-up: {seconds:.0f} s passed before run.start_clock(), {STARTUP} are allowed. Look for work that "
            "belongs into the budget; where kernels were compiled for the first time, run it again."
        )
    if steps > WARM_UP_STEPS:
        raise Refused(
            f"start-up: batches for {steps:.1f} steps were taken before run.start_clock(). Look for training before "
            "the clock starts."
        )


def budget(budget, seconds, step_ends):
    """Training ended with the budget. step_ends: seconds at which each logged step ended."""
    if not step_ends:
        raise Refused("budget: no step was logged. Look for a loop without run.log_step(loss).")
    steps = np.diff([0.0, *step_ends])
    # The newest two do not count: the last step may hold the excess itself, and it delays the end of the one before.
    longest = steps[:-2].max() if len(steps) > 2 else min(steps.max(), UNKNOWN_STEP)
    if seconds - budget > max(OVERSHOOT * budget, longest, SLACK):
        raise Refused(
            f"budget: training took {seconds:.1f} s of {budget:g} s: over by more than one step ({longest:.1f} s). "
            "Look for a loop that does not ask run.training() before each step, steps that are not logged, work before "
            "run.finish(). Where the machine held up a step: make run AGAIN=1."
        )


def one_model(same_weights):
    """All ranks hold the same weights: `devices.same_weights`."""
    if not same_weights:
        raise Refused(
            "ranks: the ranks' weights differ, so they trained models of their own. Look for gradients that are not "
            "averaged over the group before the update, random numbers or a schedule that a rank draws for itself."
        )


# Text reaches train.py by run.batches() alone. The harness opens the token cache inside of `harness_reads`; whatever
# else Python opens of it from `import prepare` on is noted, and that corpus.py was asked for texts.

_harness_reads = contextvars.ContextVar("_harness_reads", default=False)
_opened = []  # (event, path)
TEXTS = ".npy", ".jsonl", ".txt", ".parquet"


@contextmanager
def harness_reads():
    """Within it, this thread may open the dataset's files: the harness does. A thread started in it must be told."""
    token = _harness_reads.set(True)
    try:
        yield
    finally:
        _harness_reads.reset(token)


def _note(event, args):
    if (event == TEXT_READ or (event == "open" and str(args[0]).endswith(TEXTS))) and not _harness_reads.get():
        _opened.append((event, str(args[0])))


sys.addaudithook(_note)


def text(folders, tokens):
    """What was trained on came by the stream. folders: where the dataset's files lie. tokens: that it handed out."""
    folders = tuple(os.path.realpath(folder) + os.sep for folder in folders if folder)
    read = (path for event, path in _opened if event == TEXT_READ or os.path.realpath(path).startswith(folders))
    if opened := next(read, None):
        raise Refused(
            f"data: {os.path.basename(opened)} was opened during the run. Text reaches train.py by run.batches() "
            "alone. Look for code that reads a split, the texts, or calls the evaluation."
        )
    if not tokens:
        raise Refused("data: no batch was taken from run.batches(). Look for a loop that trains on other data.")
