"""What must hold of the run around the evaluation: its clock, its data, its harness. Called by prepare.py alone.

What the model itself is asked stands in examination.py. A check that fails raises `Refused`, whose text names
the check and says what to look for. An agent with a shell can forge anything: this stops mistakes and
casual shortcuts.
"""

import contextvars
import functools
import hashlib
import inspect
import os
import sys
import sysconfig
import time
from contextlib import contextmanager
from functools import partial

import mlx.core
import numpy as np

from harness.leak_checks import Refused

# Bound here, so that whoever replaces time.monotonic later does not reach them.
CLOCKS = (
    time.monotonic,
    time.perf_counter,
    partial(time.clock_gettime, getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC)),
)

# --- its clock -------------------------------------------------------------------------------------

STARTUP = 120  # seconds, at most
OVERSHOOT = 0.02  # of the budget, or one step
SLACK = 2  # seconds, by which a busy machine may hold up a step: it matters to short budgets alone
UNKNOWN_STEP = 10  # seconds that a step may take where there are no others to compare it with
WARM_UP_STEPS = 4  # of training batches that may be used up before the clock starts


def read_clocks():
    return [clock() for clock in CLOCKS]


def clock(seconds, started, ended):
    """The run's clock went on. seconds: of training, by it. started, ended: `read_clocks()` then."""
    for now, then in zip(ended, started, strict=True):
        if abs(now - then - seconds) > 0.5 + 0.001 * seconds:
            raise Refused(
                f"clock: training took {seconds:.1f} s by the run's clock, {now - then:.1f} s by another one. Look for "
                "code that replaces or sets back a clock, or that assigns to attributes of the run."
            )


def paused(seconds, budget):
    """The process was at work throughout. seconds: for which it stood still."""
    if seconds > max(OVERSHOOT * budget, SLACK):
        raise Refused(
            f"paused: for {seconds:.0f} s of the budget the process stood still: the machine slept, or the process was "
            "stopped. That says nothing of the experiment: run it again."
        )


def start_up(seconds, warm_up_steps):
    """Nothing was trained before the clock started. warm_up_steps: batches taken before, in steps."""
    if seconds > STARTUP:
        raise Refused(
            f"start-up: {seconds:.0f} s passed before run.start_clock(), {STARTUP} are allowed. Look for work that "
            "belongs into the budget. Where kernels were compiled for the first time, run it again."
        )
    if warm_up_steps > WARM_UP_STEPS:
        raise Refused(
            f"start-up: batches for {warm_up_steps:.1f} steps were taken before run.start_clock(); a warm-up takes "
            "one or two. Look for training before the clock starts: no update from there may survive."
        )


def budget(budget, seconds, step_ends):
    """Training ended with the budget. step_ends: seconds at which each logged step ended."""
    if not step_ends:
        raise Refused("budget: no step was logged. Look for a loop without run.log_step(loss).")
    steps = np.diff([0.0, *step_ends])
    # The last one cannot excuse itself, nor the one before, whose end was noted when that was logged.
    longest = steps[:-2].max() if len(steps) > 2 else min(steps.max(), UNKNOWN_STEP)
    if seconds - budget > max(OVERSHOOT * budget, longest, SLACK):
        raise Refused(
            f"budget: training took {seconds:.1f} s of {budget:g} s: over by more than one step ({longest:.1f} s) and "
            f"more than {OVERSHOOT:.0%}. Look for a loop that does not ask run.training() before each step, for steps "
            "that are not logged, for work between the last step and run.finish(). On a busy machine one step may "
            "have stood still: then make run AGAIN=1."
        )


APART = 0.02  # of an array's norm, by which ranks may differ: unlike devices round otherwise


def one_model(sketches):
    """All ranks hold the same weights. sketches: `group.weight_sketches`."""
    norms = sketches[..., 0]
    if (np.ptp(sketches, axis=0) > APART * norms.max(axis=0)[:, None]).any():
        raise Refused(
            "ranks: the ranks' weights differ, so they trained models of their own. Look for gradients that are not "
            "averaged over the group before the update, random numbers or a schedule that a rank draws for itself."
        )


UNTRAINED = 0.9  # of the entropy of single tokens, which a model that has learnt nothing yet does not reach
COUNTED = 2**22  # tokens of the training split, by which that is known


def first_loss(loss, cache):
    """Training began at the beginning. loss: nats per token, of the first step."""
    counts = np.bincount(cache.tokens("train")[:COUNTED])
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    if loss < UNTRAINED * entropy:
        raise Refused(
            f"start-up: the first step's loss is {loss:.2f} nats per token; who knows how often each token comes, and "
            f"nothing else, has {entropy:.2f}. What is learnt from text is learnt within the budget, from this run's "
            "stream alone. Look for weights of an earlier run, tables counted at start-up, training before the clock "
            "starts, steps that are not logged; or for a loss in another unit."
        )


# --- its data ----------------------------------------------------------------------------------------

_harness_reads = contextvars.ContextVar("_harness_reads", default=False)


@contextmanager
def harness_reads():
    """Within it, this thread may open held-out data: it is the harness that does."""
    token = _harness_reads.set(True)
    try:
        yield
    finally:
        _harness_reads.reset(token)


MANY = 3  # sources of the library that may be read and not imported: a traceback shows some


class HeldOutWatch:
    """Notes in `opened` who opens what a run must not read, and cannot be taken off again.

    That is held-out data, its files by any name or `data_sources.documents`; the texts that the dataset was made
    from, which hold it too; weights of earlier runs. It sees what Python opens, what `mx.load` does, and the words
    of a command that is started.
    """

    def __init__(self, dataset, cache):
        self.opened, self._sources, files = [], set(), cache.files("val") + cache.files("test")
        self._files = {(s.st_dev, s.st_ino) for s in map(os.stat, files)}
        texts = {"stdlib": sysconfig.get_paths()["stdlib"], "files": os.environ.get("AUTORESEARCH_FILES")}
        self._texts = os.path.realpath(texts.get(dataset.name) or cache.folder.parent) + os.sep
        self._suffixes = (".py",) if dataset.name == "stdlib" else (".parquet", ".jsonl", ".txt")
        self._words = tuple(path.name for path in files)
        sys.addaudithook(self._note)

    def _note(self, event, args):
        if event not in ("open", "data_sources.documents", "subprocess.Popen", "os.system", "os.posix_spawn"):
            return
        if _harness_reads.get():
            return
        try:
            if event == "open":
                self._note_file(args[0], os.stat(args[0]))
            elif event == "data_sources.documents":
                self.opened += [f"the documents of '{args[1]}'"] if args[1] != "train" else []
            else:
                words = " ".join(map(str, args[1])) if event != "os.system" else os.fsdecode(args[0])
                self.opened += [f"{name} (by a command)" for name in self._words if name in words][:1]
        except (OSError, TypeError, ValueError):
            return

    def _note_file(self, name, status):
        if (status.st_dev, status.st_ino) in self._files:
            self.opened.append(os.path.basename(os.fsdecode(name)))
            return
        path = name if isinstance(name, str) else os.fsdecode(name) if isinstance(name, (bytes, os.PathLike)) else ""
        if path.endswith(self._suffixes) and os.path.realpath(path).startswith(self._texts):
            self._sources.add(os.path.realpath(path))
        elif path.endswith((".safetensors", ".npz", ".gguf")):
            self.opened.append(f"{os.path.basename(path)}, weights that this run did not train,")

    def strange(self):
        """What was opened and may not be. Python itself reads the library's files when it imports them."""
        imported = {os.path.realpath(getattr(m, "__file__", None) or "") for m in list(sys.modules.values())}
        texts = [path for path in sorted(self._sources - imported) if "site-packages" not in path]
        if len(texts) > (MANY if self._suffixes == (".py",) else 0):
            return [*self.opened, f"{os.path.basename(texts[0])}, a text that the dataset was made from,"]
        return self.opened


def _audited(load):
    """`load`, whose file is read by C++, so that a `HeldOutWatch` sees it as what Python opens."""

    @functools.wraps(load)
    def audited(file, *args, **kwargs):
        if isinstance(file, (str, os.PathLike)):
            sys.audit("open", os.fspath(file), "r", 0)
        return load(file, *args, **kwargs)

    return audited


mlx.core.load = _audited(mlx.core.load)


def data(served, cache, changed_file, opened):
    """What was trained on is the training split as it was prepared, and nothing held out.

    served: content hashes uint64 (n,) of the documents that the run's stream handed out.
    changed_file: `cache.changed_file()`. opened: `HeldOutWatch.strange()`.
    """
    if changed_file:
        raise Refused(
            f"data: {changed_file} is not as it was prepared. Restore it, or run make prepare, which makes it anew."
        )
    if opened:
        raise Refused(
            f"data: {opened[0]} was opened during the run. Validation and test are the harness's alone, and what is "
            "learnt from text is learnt from this run's stream. Look for code that reads another split than 'train', "
            "other text, or weights of an earlier run."
        )
    if not len(served):
        raise Refused("data: no batch was taken from run.batches(). Look for a loop that trains on other data.")
    with harness_reads():
        held_out = np.isin(served, np.concatenate([cache.hashes("val"), cache.hashes("test")])).sum()
        strange = (~np.isin(served, cache.hashes("train"))).sum()
    if held_out or strange:
        raise Refused(
            f"data: of {len(served)} documents served, {held_out} are held out, and {strange} are not of the training "
            "split. Look for a changed stream or cache."
        )


def checksum(served):
    """SHA-256 over the content hashes of the documents served: uint64 (n,), sorted."""
    return hashlib.sha256(np.ascontiguousarray(served, "<u8").tobytes()).hexdigest()


def definitions(*modules):
    """{name: what it is} of every function and method that the modules define, and of their constants."""
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.isupper():
                found[f"{module.__name__}.{name}"] = repr(value)
        owners = {module.__name__: module}
        owners |= {f"{module.__name__}.{k}": v for k, v in vars(module).items() if inspect.isclass(v)}
        for prefix, owner in owners.items():
            for name, value in vars(owner).items():
                function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
                if inspect.isfunction(function):
                    found[f"{prefix}.{name}"] = (value, function.__code__)
    return found


def harness(loaded, now, defined, defined_now):
    """The harness is the one that the run began with. loaded, now: hashes of its code."""
    if loaded != now:
        raise Refused("harness: a file of the harness was changed while the run went on.")
    changed = [name for name in defined if defined[name] != defined_now.get(name)]
    if changed:
        raise Refused(f"harness: {min(changed)} was replaced during the run. Look for assignments to the harness.")
