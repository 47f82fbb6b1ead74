"""One run: the clock of its budget, its log, its end."""

import gc
import json
import math
import os
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import psutil
from mlx.utils import tree_flatten

from data_sources import get_dataset
from harness import devices, files, machine, model_state, project, record, run_checks
from harness.batches import Batches, evaluation_rows
from harness.corpus import cache_dir
from harness.evaluation import evaluate_bpb
from harness.leak_checks import SECONDS, SHARE, LeakChecks
from harness.rehearsal import rehearse
from harness.run_checks import Refused, harness_reads
from harness.token_cache import TokenCache, Tokenizer, damaged


def process_start():
    """When this process began, by time.monotonic(): what it did before it imported this is start-up, too."""
    try:
        return time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())
    except (OSError, psutil.Error):  # a sandbox may hide it
        return time.monotonic()


PROCESS_START = process_start()
HARNESS = project.harness_hash()  # of the files as they are when this process begins
EXPLODED = 3.0  # times the loss of knowing nothing, ln(vocabulary)


def mode():
    """(what train.py is called for, a file or None): ("run", None), ("check", None), ("weights", FILE).

    Any other word ends the program, so that nothing misspelt trains for a whole budget.
    """
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
    if program in ("bench.py", "tune.py"):
        sys.exit("error: train.py trains when it is imported: below if __name__ == '__main__' is where a run begins")
    if program != "train.py":
        return "run", None
    match [part for word in sys.argv[1:] for part in word.split("=", 1)]:
        case []:
            return "run", None
        case ["--check"]:
            return "check", None
        case ["--holdout"]:  # of scripts/judge/holdout.py
            return "holdout", None
        case ["--weights", file]:
            return "weights", file
    sys.exit(f"error: train.py does not understand {' '.join(sys.argv[1:])}: it takes --check, or --weights FILE")


class Run:
    """One experiment: its dataset, the clock of its budget, its log and its record."""

    def __init__(self, dataset_name):
        self.mode, self._weights = mode()
        self.dataset = get_dataset(dataset_name)
        self.budget, self.seed = project.settings()
        self._load()
        self.train_blob = project.blob_hash(project.ROOT / "train.py")
        self.warm_up_seconds = self.rehearsal_seconds = 0.0
        self._stream = self._start = self._pending = None
        self._curve = []  # of each step: seconds at its end, loss, tokens so far, memory in MB
        self._ends = []  # of each step: seconds at its end, in a group by rank 0's clock
        self._watch = machine.Watch()
        self._startup = None  # seconds, peak memory, tokens taken before the clock started
        self._changed_file = None
        self._verifier = threading.Thread(target=self._verify_cache, daemon=True)
        self._verifier.start()
        self.device = machine.describe()
        same = {"harness": HARNESS, "token cache": self.cache.hash, "version of MLX": self.device["mlx"]}
        self.group = devices.describe(self.device["name"], **same)
        record.tell_device(self.device)

    def _load(self):
        with harness_reads():
            self.tokenizer, self.cache = Tokenizer.load(self.dataset), TokenCache.load(self.dataset)

    def _verify_cache(self):
        with harness_reads():
            self._changed_file = self.cache.changed_file()

    # --- before the clock ---

    def batches(self, batch_size, sequence_length=None):
        """The training stream; one a run. See `Batches`."""
        if self._stream:
            raise RuntimeError("a run has one training stream")
        length = sequence_length or self.dataset.sequence_length
        with harness_reads():
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

        model, batch_size: as `finish` gets them. See rehearsal.py; its time counts neither as start-up nor as budget.
        Exits with 2, after an invalid record, where a check refuses the model. The program ends here, without a record,
        under `train.py --check`, and under `train.py --weights FILE` when it has told what these weights score.
        """
        if self.mode == "weights":
            self._score_weights(model, batch_size)
        if self.mode == "check":
            self._verifier.join()
        start, reason = time.monotonic(), None
        with harness_reads():
            tokens = self.cache.tokens("train")
        try:
            with devices.agreement(Refused):
                rehearse(model, tokens, self.tokenizer, batch_size, max(SECONDS, SHARE * self.budget))
        except Refused as refused:
            reason = f"{refused} (Found in the dress rehearsal, before training.)"
        self.rehearsal_seconds = time.monotonic() - start
        if self._changed_file:  # found now, it costs no budget; a run does not wait for it
            sys.exit(damaged(self.dataset, self._changed_file))
        if reason and self.mode == "check":
            print(f"error: this model is not valid. {reason}", file=sys.stderr)
            sys.exit(2)
        if reason:
            self._end(reason, model={"depth": 0, "dmodel_scale": 0.0, "num_params": 0}, machine={}, training={})
        if self.mode == "check":
            batch, took = f"{batch_size} x {self.dataset.sequence_length}", f"{self.rehearsal_seconds:.1f} s"
            print(f"check: evaluation at {batch}, causality, rows and state of the model: passed in {took}")
            sys.exit(0)

    def _score_weights(self, model, batch_size):
        """Print what `model` scores with the weights of a file, and exit."""
        try:
            model.load_weights(self._weights)
        except (AttributeError, OSError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())
            sys.exit(f"error: {self._weights} does not hold the weights of this train.py's model: {why}")
        try:
            evaluation, _ = self._evaluate(model, batch_size)
        except Refused as refused:
            sys.exit(f"error: this model is not valid. {refused}")
        print(f"val_bpb: {evaluation.bpb:.6f} (± {evaluation.stderr:.6f} over rows)")
        sys.exit(0)

    def start_clock(self):
        """Begin the budget. Everything before was start-up: loading, building, compiling."""
        if self.mode in ("check", "weights"):
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
        self._start = time.monotonic()

    # --- the clock ---

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
        return self._ends[-1] + self._step_seconds() if self._ends else 0.0

    def _step_seconds(self):
        """Mean of the newest steps."""
        ends = self._ends[-10:]
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0

    def training(self):
        """Whether another step may begin.

        The newest step is still in flight, so the time of one step counts as used.
        """
        return self._now() + self._step_seconds() < self.budget

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
        loss, clock = loss if devices.SIZE > 1 else (loss, None)
        loss, now, step = float(loss.item()), self.elapsed(), len(self._curve)
        self._ends.append(now if clock is None else clock.item())
        if not -math.inf < loss < EXPLODED * math.log(self.tokenizer.vocab_size):
            sys.exit(f"error: the loss is {loss} at step {step}: lower the learning rates or mend the change")
        self._curve.append((now, loss, tokens, mx.get_peak_memory() / 2**20))
        if not devices.RANK:
            record.tell_step(self._curve, self.budget)

    # --- the end ---

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
        mx.eval(parameters, list(model_state.arrays_of(model).values()))
        mx.synchronize()
        seconds, peak = self.elapsed(), mx.get_peak_memory()
        seen = self._watch.stop([end for end, *_ in self._curve[:-1]])
        mx.clear_cache()
        if not devices.RANK:
            save_weights(parameters, self.train_blob)
        same_weights = devices.same_weights(parameters)
        evaluation, times, reason = None, {}, None
        self._load()  # anew, since train.py had them in its hands
        try:
            with devices.agreement(Refused):
                self._check_training(seconds, seen["paused_seconds"])
                run_checks.one_model(same_weights)
            evaluation, times = self._evaluate(model, batch_size)
            self._verifier.join()
            with devices.agreement(Refused):
                texts = os.environ.get("AUTORESEARCH_FILES") if self.dataset.name == "files" else None
                opened = run_checks.opened_text(filter(None, [cache_dir(self.dataset), texts]))
                run_checks.text(self._changed_file, opened, self._tokens())
        except Refused as refused:
            evaluation, times, reason = None, {}, str(refused)
        if self.mode == "holdout" and not reason:
            self._score_test(model, batch_size)
        scale, size = (config["n_embd"] / 768) ** -0.5, sum(p.size for _, p in tree_flatten(parameters))
        model = {**config, "dmodel_scale": scale, "num_params": size}
        times |= {"seconds": seconds, "training_peak_mb": peak / 2**20}
        self._end(reason, model, seen, times, evaluation)

    def _tokens(self):
        return self._curve[-1][2] if self._curve else 0

    def _check_training(self, seconds, paused_seconds):
        run_checks.paused(paused_seconds, self.budget)
        total, _, taken = self._startup
        startup = total - self.warm_up_seconds - self.rehearsal_seconds
        run_checks.start_up(startup, taken * len(self._curve) / max(self._tokens(), 1))
        run_checks.budget(self.budget, seconds, [end for end, *_ in self._curve])

    def _rows(self, split):
        with harness_reads():
            return evaluation_rows(self.cache, self.dataset, split)

    def _evaluate(self, model, batch_size):
        """(`Evaluation` of the validation rows, {what it took}). Raises `Refused` where a leak check fails."""
        start, rows = time.monotonic(), self._rows("val")
        questions = LeakChecks(model, rows, self.tokenizer, batch_size)
        evaluation = evaluate_bpb(model, rows, self.tokenizer, batch_size)
        scored = time.monotonic()
        with devices.agreement(Refused):
            questions.ask(evaluation.nats, scored - start)
        end = time.monotonic()
        return evaluation, {"eval_seconds": end - start, "check_seconds": end - scored}

    def _score_test(self, model, batch_size):
        """The score of the test split, for `make holdout`."""
        found = evaluate_bpb(model, self._rows("test"), self.tokenizer, batch_size)
        if not devices.RANK:
            text = json.dumps({"bpb": found.bpb, "stderr": found.stderr})
            files.write_atomically(project.DATA / "holdout.json", text)

    def _end(self, reason, model, machine, training, evaluation=None):
        """Write the record and print the end of the output; exits with 2 where there is a reason to refuse the run.

        training: what it took, as far as it came. evaluation: None where there is a reason.
        """
        if devices.RANK:  # what a run leaves behind, rank 0 writes
            sys.exit(2 if reason else 0)
        startup, startup_peak, _ = self._startup or (time.monotonic() - PROCESS_START, 0, 0)
        steps, tokens = len(self._curve), self._tokens()
        training = {
            "seconds": 0.0,
            "training_peak_mb": 0.0,
            "eval_seconds": None,
            "check_seconds": None,
            **training,
            "total_steps": steps,
            "total_tokens": tokens,
            "tokens_per_step": tokens // max(steps, 1),
            "avg_tok_sec": tokens / training["seconds"] if steps else 0.0,
            "peak_memory_mb": max(startup_peak, mx.get_peak_memory()) / 2**20,
            "startup_seconds": startup,
            "total_seconds": time.monotonic() - PROCESS_START,
            "warm_up_seconds": self.warm_up_seconds,
            "rehearsal_seconds": self.rehearsal_seconds,
            "sequence_length": self._stream.sequence_length if self._stream else None,
            "data_wait_seconds": self._stream.wait_seconds if self._stream else 0.0,
            "epochs": self._stream.epochs if self._stream else 0.0,
        }
        result = {
            "val_bpb": evaluation and evaluation.bpb,
            "val_bpb_stderr": evaluation and evaluation.stderr,
            "eval_bytes": evaluation and int(evaluation.row_bytes.sum()),
            "row_bits": evaluation and record.packed(evaluation.row_bits),
        }
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
            training=training,
            machine=machine,
            result=result,
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
        files.move_into_place(path.with_name(".part.safetensors"), path)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"note: the weights were not kept: {error}")
