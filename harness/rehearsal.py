"""The dress rehearsal: what the model will be asked at the end, asked before it is trained."""

import math
import time

import numpy as np

from harness import model_state
from harness.evaluation import compute_streams, evaluation_mode, nats_of, score_rows
from harness.leak_checks import LeakChecks
from harness.run_checks import Refused

ROWS = 16  # at least; else as many batches of the evaluation's size as it has in flight
UNTRAINED = 0.92  # of ln(vocabulary), the nats of who knows nothing; who knows how often each token comes has 0.87


def rehearse(model, tokens, tokenizer, batch_size, seconds=math.inf):
    """Ask a model that is built and not trained yet what the evaluation will ask it; returns seconds that a row takes.

    Whether it leaks is asked of weights that are shaken, since an output that begins at zero hides a leak. Afterwards
    all is as before. tokens: the training split, uint16. seconds: for the leak checks. Raises `Refused`.
    """
    width = tokenizer.dataset.sequence_length + 1
    rows = np.resize(np.array(tokens[: 256 * width]), (max(ROWS, batch_size * len(compute_streams())), width))
    with evaluation_mode(model), model_state.kept(model) as built:
        knows_text(model, rows, tokenizer, batch_size)
        model_state.refuse_changed(built, model)  # by its very first call
        try:
            with model_state.kept(model):
                model_state.shake(model)
                return ask(model, rows, tokenizer, batch_size, seconds)
        except Refused as refused:
            if not str(refused).startswith("finite: "):  # evaluation.finite
                raise
        return ask(model, rows, tokenizer, batch_size, seconds)  # shaken too much for it: as it was built, then


def ask(model, rows, tokenizer, batch_size, seconds):
    questions, start = LeakChecks(model, rows, tokenizer, batch_size), time.monotonic()
    nats, took = score_rows(model, rows, tokenizer, batch_size), time.monotonic() - start
    questions.ask(nats, seconds)
    return took / len(rows)


def knows_text(model, rows, tokenizer, batch_size):
    """Refuse a model that knows, before the clock starts, which token follows which.

    It is asked about pairs of neighbours, in rows in which no token comes a second time to be followed by the same
    one: so copying from earlier in the row, which needs no text, helps nobody. rows: uint16 (n, T + 1).
    """
    rng, length = np.random.default_rng(0), rows.shape[1] - 1
    pairs = rng.permutation(np.stack([rows[:, :-1], rows[:, 1:]], axis=-1).reshape(-1, 2))
    pairs = pairs[np.unique(pairs[:, 0], return_index=True)[1]]  # of each first token one
    shuffled = [rng.permutation(pairs)[: length // 2].reshape(-1) for _ in range(batch_size)]
    ids = rng.integers(0, tokenizer.vocab_size, (batch_size, length))
    ids[:, : len(shuffled[0])] = shuffled
    asked = nats_of(model, ids, np.roll(ids, -1, axis=1)[..., None], tokenizer.vocab_size, batch_size)
    nats, nothing = asked[:, : len(shuffled[0]) : 2].mean(), math.log(tokenizer.vocab_size)
    if nats < UNTRAINED * nothing:
        raise Refused(
            f"start-up: before the clock starts the model predicts tokens of the training text with {nats:.2f} nats; "
            f"who knows nothing has {nothing:.2f}, and under {UNTRAINED:.0%} of that some is known. Look for weights "
            "of an earlier run, tables counted at start-up, training before the clock starts."
        )
