"""One run: the clock of its budget, its log, its end."""

import gc
import json
import math
import os
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import psutil
from mlx.utils import tree_flatten

from data_sources import get_dataset
from harness import devices, files, machine, model_state, project, record, run_checks
from harness.batches import Batches, evaluation_rows
from harness.corpus import cache_dir
from harness.evaluation import evaluate_bpb, select_rows
from harness.leak_checks import LeakChecks
from harness.rehearsal import rehearse
from harness.run_checks import Refused, harness_reads
from harness.token_cache import TokenCache, Tokenizer

# When this process began, by time.monotonic(): what it did before it imported this is start-up, too.
BEGAN = machine.allowed(lambda: psutil.Process().create_time()) or time.time()
PROCESS_START = time.monotonic() - max(0.0, time.time() - BEGAN)
HARNESS = project.harness_hash()  # of the files as they are when this process begins
CHECK_SECONDS, CHECK_SHARE = 3.0, 0.05  # of the budget: what leak checks may take, the more of both
EXPLODED = 3.0  # times the loss of knowing nothing, ln(vocabulary)
SAMPLED = 200  # tokens of a sample, at most
TEMPERATURE = 0.8  # of the model's own distribution; below 1 it says what it is surer of


def mode():
    """(what train.py is called for, its words): ("run", []), ("check", []), ("holdout", []), ("weights", [FILE]), or
    ("sample", [FILE, PROMPT]).

    Any other word ends the program, so that nothing misspelt trains for a whole budget.
    """
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    if program in ("bench.py", "tune.py"):
        sys.exit("error: train.py trains when it is imported: below if __name__ == '__main__' is where a run begins")
    if program != "train.py" or not words:
        return "run", []
    match words:  # --holdout is of scripts/judge/holdout.py, --sample of scripts/show/sample.py
        case ["--check" | "--holdout"] | ["--weights", _] | ["--sample", _, _]:
            return words[0][2:], words[1:]
    sys.exit(f"error: train.py does not understand {' '.join(words)}: it takes --check, or --weights FILE")


def refuse_unusable(model, batch_size):
    """End the program where what train.py hands over cannot be asked at all."""
    if not isinstance(model, nn.Module):  # else its arrays would be unknown
        sys.exit(f"error: the model is a {type(model).__name__}, expected an mlx.nn.Module")
    if batch_size < 1:
        sys.exit(f"error: the evaluation needs batches of at least one row, not {batch_size}")


class Run:
    """One experiment: its dataset, the clock of its budget, its log and its record."""

    def __init__(self, dataset_name):
        self.mode, self._words = mode()
        self.dataset = get_dataset(dataset_name)
        self.budget, self.seed = project.settings()
        self._load()
        self.train_blob = project.blob_hash(project.ROOT / "train.py")
        self._stream = self._start = self._pending = None
        self._check_seconds = max(CHECK_SECONDS, CHECK_SHARE * self.budget)
        self._row_seconds = 0.0  # that scoring takes
        self._aside = 0.0  # seconds of warm-up and rehearsal, which count neither as start-up nor as budget
        self._curve = []  # of each step: seconds at its end, loss, tokens so far, memory in MB
        self._ends = []  # of each step: seconds at its end, in a group by rank 0's clock
        self._early_tokens = 0  # taken before the clock started
        # What the record gets, filled in as the run goes on.
        self._training = {"seconds": 0.0, "training_peak_mb": 0.0, "peak_memory_mb": 0.0, "eval_seconds": None}
        self._model, self._machine = {"depth": 0, "dmodel_scale": 0.0, "num_params": 0}, {}
        self.device = machine.describe()
        same = {"harness": HARNESS, "token cache": self.cache.hash, "version of MLX": self.device["mlx"]}
        self.group = devices.describe(self.device["name"], **same)
        record.tell_device(self.device)

    def _load(self):
        with harness_reads():
            self.tokenizer, self.cache = Tokenizer.load(self.dataset), TokenCache.load(self.dataset)

    # --- before the clock ---

    def batches(self, batch_size, sequence_length=None):
        """The training stream; one a run. See `Batches`."""
        length = sequence_length or self.dataset.sequence_length
        if self._stream:
            sys.exit("error: run.batches() was called twice, and what is drawn is counted of one stream")
        with harness_reads():
            self._stream = Batches(self.cache, batch_size, length, self.seed)
        return self._stream

    def warm_up(self, action, state):
        """Run `action`, which compiles; its time does not count as start-up.

        state: the arrays that it changes, a tree of dictionaries and lists. They are put back: nothing is learnt here.
        """
        start = time.monotonic()
        with model_state.kept(state):
            action()
        self._aside += time.monotonic() - start

    def rehearse(self, model, batch_size):
        """Before the clock: ask the built model what it will be asked at the end, so that a fault costs seconds.

        model, batch_size: as `finish` gets them. Its time counts neither as start-up nor as budget. Exits with 2, after
        an invalid record, where a check refuses the model. `train.py --check` and `--weights FILE` end here, without a
        record.
        """
        refuse_unusable(model, batch_size)
        if self.mode in ("weights", "sample"):
            self._use_weights(model, batch_size)
        start = time.monotonic()
        with harness_reads():
            tokens = self.cache.tokens("train")
        try:
            with devices.agreement(Refused):
                seconds = rehearse(model, tokens, self.tokenizer, batch_size, self._check_seconds)
        except Refused as refused:
            if self.mode != "check":
                self._end(f"{refused} (Found in the dress rehearsal, before training.)")
            print(f"error: this model is not valid. {refused}", file=sys.stderr)
            sys.exit(2)
        self._row_seconds = max(map(float, devices.all_gather(str(seconds))))
        took = time.monotonic() - start
        self._aside += took
        if self.mode == "check":
            print(f"check: causality, rows and state of the model, {batch_size} rows at once: passed in {took:.1f} s")
            sys.exit(0)

    def _use_weights(self, model, batch_size):
        """Print what `model` scores with the weights of a file, or how it goes on from a prompt, and exit."""
        try:
            model.load_weights(self._words[0])
            if self.mode == "sample":
                print(f"sample:\n{sample(model, self.tokenizer, self._words[1], self.seed)}")
                sys.exit(0)
            evaluation = self._evaluate(model, batch_size)
        except (OSError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())
            sys.exit(f"error: {self._words[0]} does not hold the weights of this train.py's model: {why}")
        except Refused as refused:
            sys.exit(f"error: this model is not valid. {refused}")
        print(f"val_bpb: {evaluation.bpb:.6f} (± {evaluation.stderr:.6f} over rows)")
        sys.exit(0)

    def start_clock(self):
        """Begin the budget. Everything before was start-up: loading, building, compiling."""
        if self.mode in ("check", "weights", "sample"):
            sys.exit("error: train.py does not call run.rehearse(model, batch_size) before run.start_clock()")
        if self._start is not None:
            raise RuntimeError("the clock runs already")
        gc.collect()
        gc.freeze()  # long-lived objects need no further scanning
        mx.synchronize()
        devices.all_gather("ready")  # all begin together
        if self._stream:
            self._early_tokens, self._stream.tokens, self._stream.wait_seconds = self._stream.tokens, 0, 0.0
        self._training["startup_seconds"] = time.monotonic() - PROCESS_START - self._aside
        self._training["peak_memory_mb"] = mx.get_peak_memory() / 2**20
        mx.clear_cache()
        mx.reset_peak_memory()
        self._watch = machine.Watch()
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
        """Whether another step may begin. The newest is still in flight, so the time of one counts as used."""
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
        (loss, tokens), self._pending = self._pending, None
        loss, *clock = loss.tolist() if devices.SIZE > 1 else [loss.item()]
        now, step = self.elapsed(), len(self._curve)
        if not -math.inf < loss < EXPLODED * math.log(self.tokenizer.vocab_size):
            sys.exit(f"error: the loss is {loss} at step {step}: lower the learning rates or mend the change")
        self._ends += clock or [now]
        self._curve.append((now, loss, tokens, mx.get_peak_memory() / 2**20))
        if not devices.RANK:
            record.tell_step(self._curve, self.budget)

    # --- the end ---

    def finish(self, model, batch_size, config):
        """Evaluate, write the record, print its figures. Exits with 2 where a check refuses the run.

        model: an `nn.Module`, see `evaluate_bpb`. batch_size: rows at once in evaluation. config: dict of plain values
        for the record's `model`; holds at least `depth` and `n_embd`.
        """
        if self._start is None:
            sys.exit("error: train.py never called run.start_clock(), so there is no budget to check")
        refuse_unusable(model, batch_size)
        self._read_loss()
        mx.eval(model)  # what is pending belongs into the budget: MLX is lazy, and would train while it is evaluated
        mx.synchronize()
        self._training |= {"seconds": self.elapsed(), "training_peak_mb": mx.get_peak_memory() / 2**20}
        self._machine = self._watch.stop([end for end, *_ in self._curve[:-1]])
        mx.clear_cache()
        weights = dict(tree_flatten(model.parameters()))
        size = sum(array.size for array in weights.values())
        self._model = {**config, "dmodel_scale": (config["n_embd"] / 768) ** -0.5, "num_params": size}
        if not devices.RANK:
            save_weights(weights, self.train_blob)
        same_weights = devices.same_weights(weights)
        self._load()  # anew, since train.py had them in its hands
        try:
            with devices.agreement(Refused):
                run_checks.paused(self._machine["paused_seconds"], self.budget)
                early_steps = self._early_tokens * len(self._curve) / max(self._tokens(), 1)
                run_checks.start_up(self._training["startup_seconds"], early_steps)
                run_checks.budget(self.budget, self._training["seconds"], [end for end, *_ in self._curve])
                run_checks.one_model(same_weights)
            evaluation = self._evaluate(model, batch_size)
            with devices.agreement(Refused):
                own = ("FILES", "OWN") if self.dataset.name == "files" else ()
                own = [os.environ.get(f"AUTORESEARCH_{name}") for name in own]
                run_checks.text([cache_dir(self.dataset), *own], self._tokens())
        except Refused as refused:
            self._end(str(refused))
        if self.mode == "holdout":
            test = evaluate_bpb(model, self._rows("test"), self.tokenizer, batch_size)
            text = json.dumps({"bpb": test.bpb, "stderr": test.stderr})
            if not devices.RANK:
                files.write_atomically(project.DATA / "holdout.json", text)
        self._end(None, evaluation)

    def _tokens(self):
        return self._curve[-1][2] if self._curve else 0

    def _rows(self, split):
        if self.mode in ("run", "holdout") and not self._machine:  # before finish()
            sys.exit("error: the rows of evaluation are the harness's alone, at the end of the run")
        with harness_reads():
            rows = evaluation_rows(self.cache, self.dataset, split)
        self._all_rows = len(rows) if split == "val" else self._all_rows
        return select_rows(rows, os.environ.get("AUTORESEARCH_ROWS"), self._row_seconds, self.budget)

    def _evaluate(self, model, batch_size):
        """The `Evaluation` of the validation rows. Raises `Refused` where a leak check fails."""
        start, rows = time.monotonic(), self._rows("val")
        questions = LeakChecks(model, rows, self.tokenizer, batch_size)
        evaluation = evaluate_bpb(model, rows, self.tokenizer, batch_size)
        with devices.agreement(Refused):
            questions.ask(evaluation.nats, self._check_seconds)
        self._training["eval_seconds"] = time.monotonic() - start
        return evaluation

    def _end(self, reason, evaluation=None):
        """Write the record and print the end of the output; exits with 2 where there is a reason to refuse the run."""
        if devices.RANK:  # what a run leaves behind, rank 0 writes
            sys.exit(2 if reason else 0)
        steps, tokens, total = len(self._curve), self._tokens(), time.monotonic() - PROCESS_START
        training = {
            "startup_seconds": total,  # where the clock never started
            **self._training,
            "total_seconds": total,
            "total_steps": steps,
            "total_tokens": tokens,
            "tokens_per_step": tokens // max(steps, 1),
            "avg_tok_sec": tokens / self._training["seconds"] if steps else 0.0,
            "peak_memory_mb": max(self._training["peak_memory_mb"], mx.get_peak_memory() / 2**20),
            "sequence_length": getattr(self._stream, "sequence_length", None),
            "data_wait_seconds": getattr(self._stream, "wait_seconds", 0.0),
            "epochs": getattr(self._stream, "epochs", 0.0),
        }
        result = {"val_bpb": None}
        if evaluation:
            result = {
                "val_bpb": evaluation.bpb,
                "val_bpb_stderr": evaluation.stderr,
                "eval_bytes": int(evaluation.row_bytes.sum()),
                "eval_rows": len(evaluation.row_bits),
                "eval_rows_of": self._all_rows,
                "row_bits": record.packed(evaluation.row_bits),
            }
        written = record.write(
            train_blob=self.train_blob,
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
            model=self._model,
            training=training,
            machine=self._machine,
            result=result,
            curve=record.binned(self._curve[:-1] or self._curve),  # finish() read the last end, no next step
        )
        record.tell(written)
        if reason:
            sys.exit(2)


def sample(model, tokenizer, prompt, seed):
    """The prompt and how the model goes on, up to the end of a document, SAMPLED tokens or its context: text.

    model: from token ids int32 (1, T) to logits (1, T, vocabulary). Each call has one shape, so nothing is compiled
    twice: what stands behind the last token is not seen.
    """
    context, ids = tokenizer.dataset.sequence_length, [tokenizer.bos, *tokenizer.encoding.encode_ordinary(prompt)]
    ids = ids[: context // 2] if prompt else ids
    row = np.full((1, min(context, len(ids) + SAMPLED)), tokenizer.bos, np.int32)
    row[0, : len(ids)] = ids
    never = mx.array((tokenizer.token_bytes == 0) & (np.arange(tokenizer.vocab_size) != tokenizer.bos))
    mx.random.seed(seed)
    for at in range(len(ids), row.shape[1]):
        logits = model(mx.array(row))[0, at - 1].astype(mx.float32)
        token = mx.random.categorical(mx.where(never, -mx.inf, logits / TEMPERATURE)).item()
        if token == tokenizer.bos:
            return tokenizer.encoding.decode(row[0, 1:at].tolist())
        row[0, at] = token
    return tokenizer.encoding.decode(row[0, 1:].tolist())


def save_weights(weights, train_blob):
    """Keep what was trained, so that an evaluation which dies loses no training.

    The file names the program that it is of: after a pair data/last_run.json may be another's.
    """
    path = project.LAST_WEIGHTS
    try:
        files.make_folder(project.DATA)
        mx.save_safetensors(str(path.with_name(".part.safetensors")), weights, {"train_blob": train_blob})
        files.move_into_place(path.with_name(".part.safetensors"), path)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"note: the weights were not kept: {error}")
