"""The fixed harness: the metric, and a run with its clock.

Nothing here changes during a session, so that every experiment is measured the same way.

    python prepare.py [--dataset NAME]     fetch, train the tokenizer, write the token cache

train.py uses, in this order: `Run(dataset)`, `run.batches(…)`, `run.warm_up(…)`, `run.rehearse(…)`,
`run.start_clock()`, `run.training()` and `run.log_step(…)` in its loop, and `run.finish(…)`, which evaluates
and leaves data/last_run.json. How text becomes tokens stands in token_cache.py, how those become batches in
batches.py, what a run leaves behind in record.py, what changes with more than one device in devices.py.
"""

import argparse
import functools
import gc
import json
import math
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PROCESS_START = time.monotonic()  # before MLX is loaded: that takes time, and counts as start-up
# ruff: noqa: E402

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import data_sources
from data_sources import get_dataset
from harness import batches, devices, files, leak_checks, machine, model_state, project, record, run_checks, token_cache
from harness.batches import Batches, evaluation_rows, sealed_rows
from harness.model_state import mx
from harness.project import dataset_of_train
from harness.token_cache import TokenCache, Tokenizer, damaged, is_prepared, not_prepared, prepare

HARNESS_MODULES = (  # what is measured, and how
    sys.modules[__name__], batches, devices, token_cache, token_cache.corpus, token_cache.tokenizer, run_checks,
    leak_checks, model_state,
    data_sources,
)  # fmt: skip
HARNESS_FILES = tuple(Path(module.__file__).resolve() for module in HARNESS_MODULES)
HARNESS = project.code_hash(HARNESS_FILES)  # of the files that this process loaded, whatever happens to them later

# --- the metric --------------------------------------------------------------------------------

SCORED_AT_ONCE = 8192  # positions whose logits stand in float32 at one time


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_bpb` found. bpb and its standard error are in bits per byte."""

    bpb: float
    stderr: float
    tokens: int
    bytes: int
    row_bits: np.ndarray  # float (n,), of each row
    seconds: float  # of the sums and the checks together
    check_seconds: float
    asked: dict  # how many exchanges and looks, see leak_checks.py


@functools.cache
def compute_streams():
    """The MLX streams that independent pieces of work are spread over.

    One on a GPU. On a CPU one a core: MLX runs element-wise work on a single thread a stream. They
    work at one time only where it walks graphs breadth first: MLX_BFS_MAX_WIDTH, see train.py.
    """
    if mx.default_device().type == mx.gpu:
        return [mx.default_stream(mx.gpu)]
    return [mx.new_stream(mx.cpu) for _ in range(min(len(machine.cores()), 16))]


def evaluate_bpb(model, tokenizer, batch_size):
    """Bits per byte of `model` on the validation rows of the tokenizer's dataset.

    Args:
        model: callable from token ids int32 (B, T) to logits (B, T, vocab_size). It sees ids and
            nothing else; log-softmax and loss are computed here, in float32. An `nn.Module` is
            put into evaluation mode, and back.
        tokenizer: a prepared `Tokenizer`.
        batch_size: rows handed to the model at once.

    Returns an `Evaluation`: the summed bits of all targets over their summed UTF-8 bytes, special
    tokens in neither sum. Raises `run_checks.Refused` where the model fails a check.
    """
    if batch_size < 1:
        sys.exit(f"error: the evaluation needs batches of at least one row, not {batch_size}")
    start = time.monotonic()
    with run_checks.harness_reads():
        rows = evaluation_rows(TokenCache.load(tokenizer.dataset), tokenizer.dataset)
    questions = examine(model, rows, tokenizer, batch_size)
    with evaluation_mode(model):
        with devices.agreement(run_checks.Refused):
            questions.before()
        checked = time.monotonic() - start
        nats = score_together(model, rows, tokenizer, batch_size)
        resumed = time.monotonic()
        with devices.agreement(run_checks.Refused):
            questions.after(nats)
    row_bits, size = bits_and_bytes(nats, rows, tokenizer)
    bpb, stderr = bits_per_byte(row_bits, size)
    end = time.monotonic()
    return Evaluation(
        bpb, stderr, nats.size, int(size.sum()), row_bits, end - start, checked + end - resumed, questions.asked
    )


def examine(model, rows, tokenizer, batch_size, split="validation"):
    """What asks the model about rows uint16 (n, T + 1) of a split beside their sums: an `Examination`."""
    return leak_checks.Examination(
        model=model,
        rows=rows,
        # On a GPU kernels may be compiled for a shape, so questions come in the evaluation's own.
        batch_size=batch_size if mx.default_device().type == mx.gpu else min(batch_size, 8),
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=tokenizer.token_bytes[rows[:, 1:]].mean(),
        ask=partial(answers, model, tokenizer.vocab_size),
        score=lambda rows, size: score_rows(model, rows, tokenizer, size),
        split=split,
    )


REHEARSED = 256  # rows, at most, that the dress rehearsal chooses from


def rehearsal(model, tokenizer, batch_size, seconds):
    """Ask a model that is built and not trained yet what the evaluation will ask it, in about `seconds` at most.

    As many batches of the evaluation's size as it has in flight, on the weights as they are; then whether an
    answer depends on later tokens, on other rows or on earlier calls, on weights that are shaken, since an
    output that begins at zero hides a leak. All arrays are put back bit for bit, and MLX's random numbers.
    The rows are of the training split. Raises `run_checks.Refused`.
    """
    if batch_size < 1:
        sys.exit(f"error: the evaluation needs batches of at least one row, not {batch_size}")
    start, width = time.monotonic(), tokenizer.dataset.sequence_length + 1
    with run_checks.harness_reads():
        tokens = np.array(TokenCache.load(tokenizer.dataset).tokens("train")[: REHEARSED * width])
    rows = np.resize(tokens, (max(2, len(tokens) // width), width))
    first = np.resize(rows, (batch_size * len(compute_streams()), width))
    asked = partial(examine, model, tokenizer=tokenizer, batch_size=batch_size, split="training")
    with evaluation_mode(model), model_state.put_back(model) as parameters:
        try:
            built = score_rows(model, first, tokenizer, batch_size)
            for _ in range(2):  # what shows by little may pass once
                shaken = model_state.shake(parameters)
                left = start + seconds - time.monotonic()
                try:
                    asked(rows).before(left)
                except run_checks.Refused as refused:
                    if not (shaken and str(refused).startswith("finite: ")):
                        raise
                    model_state.restore(parameters)  # shaken too much for this model: as it was built, then
                    asked(rows).before(left)
                model_state.restore(parameters)
                if time.monotonic() - start > seconds / 2:
                    break
            asked(first).same_again(built)
        except (RuntimeError, MemoryError) as error:
            if not leak_checks.OUT_OF_MEMORY.search(str(error) or "memory"):
                error.add_note(f"(in the dress rehearsal, which calls the model with ids {(batch_size, width - 1)})")
                raise
            raise run_checks.Refused(
                f"memory: an evaluation of {batch_size} x {width - 1} tokens at once does not fit ({error}). Lower the "
                "batch size of the evaluation."
            ) from error


@contextmanager
def evaluation_mode(model):
    """Dropout and the like are off within it."""
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def answers(model, vocab_size, batches, function):
    """Yield function(logits, i), arrays, for each of `batches` of ids int32 (b, T), some in flight."""
    streams, ahead = compute_streams(), []
    for first in range(0, len(batches), len(streams)):
        results = []
        for i, stream in enumerate(streams[: len(batches) - first], first):
            with mx.stream(stream):
                results.append(function(leak_checks.logits_of(model, mx.array(batches[i]), vocab_size), i))
        mx.async_eval(results)  # together, or the streams would work one after the other
        yield from ahead
        ahead = results
    yield from ahead


def score_rows(model, rows, tokenizer, batch_size):
    """Nats float32 (n, T) of the targets of rows uint16 (n, T + 1), those of special tokens included."""
    n, positions = len(rows), rows.shape[1] - 1
    at_once = max(1, SCORED_AT_ONCE // positions)
    # The last batch is filled up with rows that are not counted: a new shape may mean new kernels.
    batches = np.resize(rows, (-(-n // batch_size) * batch_size, positions + 1)).astype(np.int32)
    batches = batches.reshape(-1, batch_size, positions + 1)

    def loss(logits, i):  # (b, T, vocab) -> nats (b, T)
        targets, pieces = mx.array(batches[i, :, 1:]), []
        for first in range(0, batch_size, at_once):
            piece = logits[first : first + at_once].astype(mx.float32)
            # The largest is 0, or the sum below would be rounded away beside large logits.
            piece = piece - piece.max(axis=-1, keepdims=True)
            pieces.append(mx.fast.cross_entropy(piece, targets[first : first + at_once]))
        return mx.concatenate(pieces)

    nats = []
    for batch in answers(model, tokenizer.vocab_size, batches[:, :, :-1], loss):
        nats.append(np.array(batch))
        leak_checks.finite(nats[-1])
    return np.concatenate(nats)[:n]


def score_together(model, rows, tokenizer, batch_size):
    """The same by all ranks of the group: every batch by one of them, and each rank gets all."""
    mine = np.arange(len(rows)) // batch_size % devices.SIZE == devices.RANK
    nats = np.zeros((len(rows), rows.shape[1] - 1), np.float32)
    with devices.agreement(run_checks.Refused):
        if mine.any():
            nats[mine] = score_rows(model, rows[mine], tokenizer, batch_size)
    return devices.all_sum(nats)


def bits_and_bytes(nats, rows, tokenizer):
    """Bits float (n,) and bytes int (n,) of each of rows (n, T + 1), special tokens in neither. nats: (n, T)."""
    counted = tokenizer.token_bytes[rows[:, 1:]]
    bits = nats.sum(axis=1, dtype=np.float64, where=counted > 0) / math.log(2)
    return bits, counted.sum(axis=1, dtype=np.int64)


def score_test(model, rows, tokenizer, batch_size):
    """`bits_and_bytes` of rows of the test split, for the sealed sample and for holdout.py."""
    with evaluation_mode(model):
        nats = score_rows(model, rows, tokenizer, batch_size)
    return bits_and_bytes(nats, rows, tokenizer)


def bits_per_byte(bits, size):
    """The ratio of sums and its standard error, rows as the independent unit (delta method).

    bits: float (n,), loss of each row. size: int (n,), bytes of each row.
    """
    bpb = bits.sum() / size.sum()
    residual = bits - bpb * size
    n = len(bits)
    stderr = math.sqrt(n / (n - 1) * (residual**2).sum()) / size.sum() if n > 1 else math.nan
    return float(bpb), float(stderr)


# --- one run: its clock, its log, its end ----------------------------------------------------------

HOLDOUT = "--holdout" in sys.argv[1:] and (project.DATA / ".holdout").exists()  # scripts/holdout.py's own worktrees
CHECK_ONLY = "--check" in sys.argv[1:]  # `train.py --check`: the dress rehearsal alone
WEIGHTS = sys.argv[2:] if sys.argv[1:2] == ["--weights"] else None  # `train.py --weights FILE`: score these alone
EXPLODED = 3.0  # times the loss of knowing nothing, ln(vocabulary)


class Run:
    """One experiment: its dataset, the clock of its budget, its log and its record."""

    def __init__(self, dataset_name):
        if Path(getattr(sys.modules["__main__"], "__file__", None) or "").name in ("bench.py", "tune.py"):
            sys.exit(
                "error: train.py trains when it is imported: what begins a run belongs below if __name__ == '__main__'"
            )
        self.dataset = get_dataset(dataset_name)
        self.budget, self.seed = project.settings()
        self.tokenizer = Tokenizer.load(self.dataset)
        self.cache = TokenCache.load(self.dataset)
        self.train_blob = project.blob_hash(project.ROOT / "train.py")
        self.warm_up_seconds = self.rehearsal_seconds = 0.0
        self._stream = self._start = self._pending = None
        self._curve = []  # of each step: seconds at its end, loss, tokens so far, memory in MB
        self._shared = []  # in a group: seconds by rank 0's clock, of each step that has ended
        self._watch = machine.Watch()
        self._startup = None  # seconds, peak memory, steps taken in the warm-up
        self._changed_file = None
        self._opened = run_checks.HeldOutWatch(self.dataset, self.cache)
        self._verifier = threading.Thread(target=self._verify_cache, daemon=True)
        self._verifier.start()
        self.device = machine.describe()
        same = {"harness": HARNESS, "token cache": self.cache.hash, "version of MLX": self.device["mlx"]}
        self.group = devices.describe(self.device["name"], **same)
        record.tell_device(self.device)

    def _verify_cache(self):
        with run_checks.harness_reads():
            self._changed_file = self.cache.changed_file()

    def batches(self, batch_size, sequence_length=None):
        """The training stream; one a run. See `Batches`."""
        if self._stream:
            raise RuntimeError("a run has one training stream")
        length = sequence_length or self.dataset.sequence_length
        self._stream = Batches(self.cache, batch_size, length, self.seed, (devices.RANK, devices.SIZE))
        return self._stream

    def warm_up(self, action, state):
        """Run `action`, which compiles. Its time does not count as start-up.

        state: the arrays that it changes, a tree of dictionaries and lists; they are put back, for nothing is
        learnt here.
        """
        start = time.monotonic()
        with model_state.kept(state):
            action()
        self.warm_up_seconds += time.monotonic() - start

    def rehearse(self, model, batch_size):
        """Before the clock: ask the built model what it will be asked at the end, so that a fault costs seconds.

        model, batch_size: as `finish` gets them. See `rehearsal`; its time counts neither as start-up nor as
        budget. Exits with 2, after an invalid record, where a check refuses the model. Under `train.py --check`
        the program ends here and leaves no record; under `train.py --weights FILE` as well, when it has told what a
        model with these saved weights scores.
        """
        if WEIGHTS is not None:
            score_weights(model, self.tokenizer, batch_size)
        start, reason = time.monotonic(), None
        try:
            with devices.agreement(run_checks.Refused):
                rehearsal(model, self.tokenizer, batch_size, max(leak_checks.SECONDS, leak_checks.SHARE * self.budget))
        except run_checks.Refused as refused:
            reason = f"{refused} (Found in the dress rehearsal, before training.)"
        took = time.monotonic() - start
        self.rehearsal_seconds += took
        if CHECK_ONLY:
            self._verifier.join()
        if self._changed_file:  # found now, it costs no budget; a run does not wait for it
            sys.exit(damaged(self.dataset, self._changed_file))
        if CHECK_ONLY:
            if reason:
                print(f"error: this model is not valid. {reason}", file=sys.stderr)
                sys.exit(2)
            batch = f"{batch_size} x {self.dataset.sequence_length}"
            print(f"check: evaluation at {batch}, causality, rows and state of the model: passed in {took:.1f} s")
            sys.exit(0)
        if reason:
            self._end(reason, model={"depth": 0, "dmodel_scale": 0.0, "num_params": 0}, machine={})

    def start_clock(self):
        """Begin the budget. Everything before was start-up: loading, building, compiling."""
        if CHECK_ONLY:
            sys.exit("error: train.py does not call run.rehearse(model, batch_size) before run.start_clock()")
        if self._start is not None:
            raise RuntimeError("the clock runs already")
        gc.collect()
        gc.freeze()  # long-lived objects need no further scanning
        mx.synchronize()
        devices.all_gather("ready")  # all begin together
        taken = 0
        if self._stream:
            taken, self._stream.tokens, self._stream.wait_seconds = self._stream.tokens, 0, 0.0
        self._startup = time.monotonic() - PROCESS_START, mx.get_peak_memory(), taken
        mx.clear_cache()
        mx.reset_peak_memory()
        self._watch.start()
        self._clocks = run_checks.read_clocks()
        self._start = time.monotonic()

    def elapsed(self):
        """Seconds since `start_clock`."""
        return time.monotonic() - self._start

    def progress(self):
        """The share of the budget that is used, 0 to 1."""
        return min(1.0, self._now() / self.budget)

    def _now(self):
        """Seconds used, in a group the same on every rank: what rank 0's clock told last, and a step more."""
        if devices.SIZE == 1:
            return self.elapsed()
        return self._shared[-1] + self._step_seconds(self._shared) if self._shared else 0.0

    @staticmethod
    def _step_seconds(ends):
        """Mean of the newest steps. ends: seconds at which each ended."""
        ends = ends[-10:]
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0

    def training(self):
        """Whether another step may begin.

        The newest step is still in flight, so the time of one step counts as used.
        """
        in_flight = self._step_seconds(self._shared or [end for end, *_ in self._curve[-10:]])
        return self._now() + in_flight < self.budget

    def log_step(self, loss):
        """Note one optimizer step. loss: scalar mx.array, mean nats per token of this rank's rows.

        The loss of the step before is read, not this one's, so that the device never waits.
        A loss that is not finite, or explodes, ends the run.
        """
        if devices.SIZE > 1:
            loss = devices.step_figures(loss, self.elapsed())
        mx.async_eval(loss)
        self._read_loss()
        self._pending = (loss, self._stream.tokens if self._stream else 0)

    def _read_loss(self):
        if self._pending is None:
            return
        loss, tokens = self._pending
        self._pending = None
        if devices.SIZE > 1:
            loss, clock = loss
            self._shared.append(clock.item())
        loss, now, step = float(loss.item()), self.elapsed(), len(self._curve)
        if not -math.inf < loss < EXPLODED * math.log(self.tokenizer.vocab_size):
            sys.exit(f"error: the loss is {loss} at step {step}: lower the learning rates or mend the change")
        self._curve.append((now, loss, tokens, mx.get_peak_memory() / 2**20))
        if not devices.RANK:
            record.tell_step(self._curve, self.budget)

    def finish(self, model, batch_size, config):
        """Evaluate, write the record, print the summary. Exits with 2 where a check refuses the run.

        Args:
            model: see `evaluate_bpb`; its parameters are counted where it has any.
            batch_size: rows at once in evaluation.
            config: dict of plain values for the record's `model`; holds at least `depth` and `n_embd`.
        """
        if self._start is None:
            sys.exit("error: train.py never called run.start_clock(), so there is no budget to check")
        self._read_loss()
        parameters = model.parameters() if hasattr(model, "parameters") else {}
        # What is pending belongs into the budget: MLX is lazy, and would train while it is evaluated.
        mx.eval(parameters, list(model_state.arrays_of(model)[0].values()))
        mx.synchronize()
        seconds, clocks, step_ends = self.elapsed(), run_checks.read_clocks(), [end for end, *_ in self._curve]
        seen = self._watch.stop(step_ends[:-1])
        train_peak = mx.get_peak_memory()
        mx.clear_cache()
        mx.reset_peak_memory()
        steps, tokens = len(self._curve), self._curve[-1][2] if self._curve else 0
        served = self._stream.served() if self._stream else np.empty(0, np.uint64)
        if not devices.RANK:
            save_weights(parameters, self.train_blob)
        sketches = devices.weight_sketches(parameters)
        evaluation, sealed, reason = None, None, None
        try:
            with run_checks.harness_reads():  # anew, since train.py had them in its hands
                self.tokenizer, self.cache = Tokenizer.load(self.dataset), TokenCache.load(self.dataset)
            with devices.agreement(run_checks.Refused):
                run_checks.paused(seen["paused_seconds"], self.budget)
                run_checks.clock(seconds, self._clocks, clocks)
                startup_seconds, _, taken = self._startup
                startup = startup_seconds - self.warm_up_seconds - self.rehearsal_seconds
                run_checks.start_up(startup, taken * steps / max(tokens, 1))
                run_checks.budget(self.budget, seconds, step_ends)
                run_checks.first_loss(self._curve[0][1], self.cache)
                run_checks.one_model(sketches)
            evaluation = evaluate_bpb(model, self.tokenizer, batch_size)
            self._verifier.join()
            with devices.agreement(run_checks.Refused):
                run_checks.data(served, self.cache, self._changed_file, self._opened.strange())
                now = run_checks.definitions(*HARNESS_MODULES)
                run_checks.harness(HARNESS, project.code_hash(HARNESS_FILES), DEFINED, now)
            with run_checks.harness_reads():
                rows = sealed_rows(self.cache, self.dataset, len(evaluation.row_bits))
            bits, size = score_test(model, rows, self.tokenizer, batch_size)
            mask = np.random.default_rng(int(self.cache.hash[:16], 16)).uniform(0, 2**12, len(bits))
            sealed = bits + mask, size  # differences of two runs are as they were, and no figure can be read off
        except run_checks.Refused as refused:
            evaluation, reason = None, str(refused)
        if devices.all_gather("holdout" * HOLDOUT)[0] and not reason:
            with run_checks.harness_reads():
                rows = evaluation_rows(self.cache, self.dataset, "test")
            bpb, stderr = bits_per_byte(*score_test(model, rows, self.tokenizer, batch_size))
            if not devices.RANK:
                files.write_atomically(project.DATA / "holdout.json", json.dumps({"bpb": bpb, "stderr": stderr}))
        self._end(
            reason,
            model={
                **config,
                "dmodel_scale": (config["n_embd"] / 768) ** -0.5,
                "num_params": sum(p.size for _, p in tree_flatten(parameters)),
            },
            machine=seen,
            steps=steps,
            tokens=tokens,
            seconds=seconds,
            train_peak=train_peak,
            evaluation=evaluation,
            sealed=sealed,
        )

    def _end(self, reason, model, machine, steps=0, tokens=0, seconds=0.0, train_peak=0, evaluation=None, sealed=None):
        """Write the record and print the end of the output; exits with 2 where there is a reason to refuse the run.

        steps, tokens, seconds, train_peak (bytes): of training, none where it never began.
        """
        if devices.RANK:  # what a run leaves behind, rank 0 writes
            sys.exit(2 if reason else 0)
        served = self._stream.served() if self._stream else np.empty(0, np.uint64)
        startup_seconds, startup_peak, _ = self._startup or (time.monotonic() - PROCESS_START, 0, 0)
        written = record.write(
            train=self.train_blob,
            commit=project.git("rev-parse", "--verify", "HEAD"),
            status="invalid" if reason else "valid",
            reason=reason,
            harness=HARNESS,
            dataset=self.dataset.name,
            token_cache=self.cache.hash,
            seed=self.seed,
            budget=self.budget,
            device=self.device,
            group=self.group,
            model=model,
            training={
                "seconds": seconds,
                "total_steps": steps,
                "total_tokens": tokens,
                "tokens_per_step": tokens // max(steps, 1),
                "avg_tok_sec": tokens / seconds if seconds else 0.0,
                "training_peak_mb": train_peak / 2**20,
                "peak_memory_mb": max(startup_peak, train_peak, mx.get_peak_memory()) / 2**20,
                "startup_seconds": startup_seconds,
                "total_seconds": time.monotonic() - PROCESS_START,
                "warm_up_seconds": self.warm_up_seconds,
                "rehearsal_seconds": self.rehearsal_seconds,
                "sequence_length": self._stream.sequence_length if self._stream else None,
                "eval_seconds": evaluation.seconds if evaluation else None,
                "check_seconds": evaluation.check_seconds if evaluation else None,
                "asked": evaluation.asked if evaluation else None,
                "data_wait_seconds": self._stream.wait_seconds if self._stream else 0.0,
                "epochs": self._stream.epochs if self._stream else 0.0,
                "served_documents": len(served),
                "served_checksum": run_checks.checksum(served),
            },
            machine=machine,
            result={
                "val_bpb": evaluation.bpb if evaluation else None,
                "val_bpb_stderr": evaluation.stderr if evaluation else None,
                "eval_bytes": evaluation.bytes if evaluation else None,
                "row_bits": record.packed(evaluation.row_bits) if evaluation else None,
                "sealed_bits": record.packed(sealed[0]) if sealed else None,
                "sealed_bytes": int(sealed[1].sum()) if sealed else None,
            },
            curve=record.binned(self._curve[:-1] or self._curve),  # the last end is noted otherwise
        )
        record.tell(written)
        if reason:
            sys.exit(2)


def save_weights(parameters, train_blob):
    """Keep what was trained in data/last_run.safetensors, so that an evaluation which dies loses no training.

    The file names the program that it is of: after a pair data/last_run.json may be another's.
    """
    path = project.DATA / "last_run.safetensors"
    try:
        files.make_folder(project.DATA)
        arrays, of = dict(tree_flatten(parameters)), {"train_blob": train_blob}
        mx.save_safetensors(str(path.with_name(".part.safetensors")), arrays, of)
        with run_checks.harness_reads():  # it opens them, to have them on the disk
            files.move_into_place(path.with_name(".part.safetensors"), path)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"note: the weights were not kept: {error}")


def score_weights(model, tokenizer, batch_size):
    """Print what `model` scores with the weights of the file that WEIGHTS names, and exit."""
    if len(WEIGHTS) != 1:
        sys.exit("error: --weights takes one file: train.py --weights data/last_run.safetensors")
    try:
        model.load_weights(WEIGHTS[0])
        evaluation = evaluate_bpb(model, tokenizer, batch_size)
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        sys.exit(
            f"error: {WEIGHTS[0]} does not hold the weights of this train.py's model: {' '.join(str(error).split())}"
        )
    except run_checks.Refused as refused:
        sys.exit(f"error: this model is not valid. {refused}")
    print(f"val_bpb: {evaluation.bpb:.6f} (± {evaluation.stderr:.6f} over rows)")
    sys.exit(0)


def main():
    parser = argparse.ArgumentParser(description="Fetch a dataset, train its tokenizer, write its token cache.")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(data_sources.DATASETS)} (default: train.py's)")
    parser.add_argument("--check", action="store_true", help="only say whether it is prepared (exit 0) or not (exit 1)")
    arguments = parser.parse_args()
    dataset = get_dataset(arguments.dataset or dataset_of_train())
    if not arguments.check:
        prepare(dataset)
    elif not is_prepared(dataset):
        sys.exit(not_prepared(dataset))


DEFINED = run_checks.definitions(*HARNESS_MODULES)  # as they are now; compared when the run ends

if __name__ == "__main__":
    main()
