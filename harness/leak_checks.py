"""The questions that a model is asked as a black box: does any answer use what it must not see?

An answer at a position may depend on that position and those before it, in its own row, and on nothing else: not on
later tokens, other rows, earlier calls. Every question is one exchange that must not matter. Rows are asked again with
something exchanged, and the nats of the same tokens at the same positions are compared. An honest model gives the same
answer, rounding aside. What rounding does is told from a leak in two ways:

moved       How far answers move, as a share of their spread: root mean square over many. Honest models in half
            precision move by up to 2.4 % (gated chunks, eight layers, bfloat16). More than 5 % are refused.
t           Whether they move the right way. Rounding does not know which token comes next: for noise that is as
            likely up as down, of whatever size and shape, P(t > 5) < 4e-6 (Efron 1969; Pinelis 1994). Where a leak
            is seen and is not sure, more is asked.

What leaks seldom is looked for where it pays, too: at places where the model does strangely well. Rounding that helps
is met there more often than by chance, so these count for `moved` alone.
"""

import math
import time

import mlx.core as mx
import numpy as np

from harness import model_state
from harness.evaluation import compute_streams, evaluation_mode, nats_of
from harness.run_checks import Refused

LEAK = 0.001  # bits per byte that a leak may be worth
MOVED = 0.05**2  # mean square, over the variance of the nats
SURE = 5.0  # t
PLACES = 64  # that are asked about since the model does strangely well there
EXCHANGES = 32, 128, 512  # at random places: at least; while time is left; at most, while a leak is likely, not sure
FEW = 32  # of so many moves the largest is left out, and always one: rounding may flip a choice between experts
SLOW = 0.5  # seconds a row, from which on half as many are asked: a run must end within its TIMEOUT
STEADY = 16  # times that a model must score as before, or nothing else is said of it
MOST = 50.0  # nats that count: a model may hold a token to be impossible

STATELESS = (
    "state: the same rows score differently when they are asked again. Look for random numbers (dropout, stochastic "
    "depth that stays on), a running mean, a cache or a state that outlives a call, learning in evaluation."
)
ROWS = (
    "rows: a row scores differently beside other rows, or at another place among them. Look for statistics over the "
    "batch; a mean, sort, roll or reshape that takes in axis 0; experts whose capacity all tokens share; what depends "
    "on a row's number."
)
CAUSALITY = (
    "causality: logits depend on later tokens; when those are exchanged, {}. It shows best at position {} with the "
    "tokens from {} on exchanged. Look for attention without a causal mask (mask=None is none), means or normalisation "
    "over time or over blocks, a recurrent state that covers a whole chunk, a convolution padded on both sides, an FFT "
    "without padding, tokens shifted the wrong way (mx.roll wraps round), routing, sorting, a top-k of a row."
)


def t_of(values):
    """Student's t of a mean that should be 0, by the root of the sum of squares (self-normalised)."""
    return values.sum() / math.sqrt((values**2).sum() + 1e-30)


def cut_points(length, count, rng):
    """`count` cuts in 1 … length - 1: positions before a cut must not notice what comes from it on.

    Each is a multiple of a power of two, which is drawn first: where blocks of common sizes meet.
    """
    size = 2 ** rng.integers(0, (length - 1).bit_length(), count)
    return size * rng.integers(1, (length - 1) // size + 1)


def strangely_good(nats, targets, count, rng):
    """(rows, positions) of `count` places where a target (n, T) costs few nats (n, T), and much by its frequency."""
    counts = np.bincount(targets.reshape(-1))
    gain = np.maximum(1e-6, np.log(counts.sum() / counts[targets]) - nats)
    weight = (gain**2 / (nats + 0.05))[:, :-1]
    return np.divmod(rng.choice(weight.size, count, p=weight.reshape(-1) / weight.sum()), weight.shape[1])


class LeakChecks:
    """The questions about one model and its rows, uint16 (n, T + 1), asked when these were scored.

    What the model holds is remembered when this is made, before it is scored.
    """

    def __init__(self, model, rows, tokenizer, batch_size):
        self.model, self.rows, self.vocab_size = model, rows, tokenizer.vocab_size
        # On a GPU kernels may be compiled for a shape, so questions come in the evaluation's own.
        self.size = batch_size if mx.default_device().type == mx.gpu else min(batch_size, 8)
        self.nats_per_bit = math.log(2) * max(tokenizer.token_bytes[rows[:, 1:]].mean(), 1e-3)  # a bit per byte
        self.rng = np.random.default_rng()  # from the system: nobody can train for the draw
        self.held, self.made = model_state.copies_of(model), time.monotonic()
        self.moves = []  # (cut, how far answers moved) of each exchange, see `_exchange`

    def ask(self, nats, seconds=math.inf):
        """Ask all questions; raises `Refused`. nats: float32 (n, T), as rows were scored since this was made.

        seconds: after which nothing more is begun but what is asked in any case.
        """
        now = time.monotonic()
        self.over, self.nats, self.least = now + seconds, np.minimum(nats, MOST), EXCHANGES[0]
        if (now - self.made) / len(self.rows) > SLOW:
            self.size, self.least = min(self.size, 4), self.least // 2
        self.spread = self.nats.var() + 1e-10
        with evaluation_mode(self.model):
            self._state()
            self._company()
            self._causality()
            self._state()

    def _nats(self, ids, tokens, at_once):
        return np.minimum(nats_of(self.model, ids, tokens, self.vocab_size, at_once), MOST)

    def _score(self, rows):
        return self._nats(rows[:, :-1], rows[:, 1:, None], self.size)[..., 0]

    def _refuse(self, text):
        """Refuse; but where the same rows do not score the same each time, that is what is said."""
        for _ in range(STEADY):
            self._state()
        raise Refused(text)

    # --- earlier calls, other rows ---

    def _state(self):
        """The first rows score as they did, and what the model holds did not change."""
        limit = MOVED
        if model_state.refuse_changed(self.held, self.model):  # something private: then it must not matter at all
            limit = MOVED / 50**2
        numbers = np.resize(np.arange(len(self.rows)), self.size)
        for _ in range(2):  # what happens now and then may not happen once
            share = ((self._score(self.rows[numbers]) - self.nats[numbers]) ** 2).mean() / self.spread
            if share > limit:
                raise Refused(f"{STATELESS} (The answers move by {math.sqrt(share):.1%} of their spread.)")

    def _company(self):
        """Rows score the same at other places, beside rows of tokens in any order and of one throughout."""
        numbers = self.rng.choice(len(self.rows), self.size, replace=len(self.rows) < self.size)
        beside = self.rows[numbers]
        beside[1::2] = self.rng.choice(self.rows.reshape(-1), beside[1::2].shape)
        beside[1::4] = beside[1::4, :1]
        share = ((self._score(beside)[::2] - self.nats[numbers[::2]]) ** 2).mean() / self.spread
        if share > MOVED:
            self._refuse(f"{ROWS} (The answers move by {math.sqrt(share):.1%} of their spread.)")

    # --- later tokens ---

    def _causality(self):
        """Positions before a cut answer the same when all tokens from it on are another one."""
        _, enough, most = EXCHANGES
        some = self.rng.choice(len(self.rows), min(len(self.rows), 1024), replace=False)
        at, positions = strangely_good(self.nats[some], self.rows[some, 1:], PLACES, self.rng)
        for first in range(0, PLACES, self.size):
            if first and time.monotonic() > self.over:
                break
            self._exchange(some[at[first : first + self.size]], positions[first : first + self.size] + 1)
        favour, late, unsure, reason = np.empty(0), False, True, None
        while len(favour) < (self.least if late else enough) or (unsure and not late and len(favour) < most):
            numbers = self.rng.integers(0, len(self.rows), self.size)
            cuts = cut_points(self.rows.shape[1] - 1, self.size, self.rng)
            favour = np.append(favour, self._exchange(numbers, cuts))
            worth = favour.mean() > LEAK / 2 * self.nats_per_bit  # by half, for what is rare may be met seldom
            t, late = t_of(favour) if worth else 0.0, time.monotonic() > self.over
            reason = self._moved() if late or len(favour) >= enough else None
            unsure = 0 < t < SURE and not reason
        if not reason and t > SURE:
            gain = favour.mean() / self.nats_per_bit
            reason = f"the next token gains {gain:.4f} bits per byte over others (t = {t:.1f})"
        if reason:
            cut, moved = max(self.moves, key=lambda exchange: np.nanmax(exchange[1]))
            self._refuse(CAUSALITY.format(reason, np.nanargmax(moved), cut))

    def _exchange(self, numbers, cuts):
        """In each of rows `numbers` put one token, drawn from the text, in the place of all from its cut on.

        Notes how answers moved: mean square of the change of nats, (T,), NaN from the cut on. Returns `favour` (b,):
        log-odds of the token that comes next over the one put in its place, at the position before the cut, before the
        exchange less after it.
        """
        each, rows = np.arange(len(numbers)), self.rows[numbers].astype(np.int32)
        put = self.rng.choice(self.rows.reshape(-1), len(numbers)).astype(np.int32)
        put = np.where(put == rows[each, cuts], (put + 1) % self.vocab_size, put)[:, None]
        ids, following = rows[:, :-1], rows[:, 1:]
        after = np.arange(ids.shape[1]) >= cuts[:, None]
        tokens = np.stack(np.broadcast_arrays(following, put), axis=-1)
        at_once = max(min(2, self.size), self.size // len(compute_streams()))
        cost = self._nats(np.where(after, put, ids), tokens, at_once) - self._nats(ids, tokens, at_once)  # (b, T, 2)
        self.moves += zip(cuts, np.where(after, np.nan, (cost**2).mean(axis=-1)), strict=True)
        return cost[each, cuts - 1, 0] - cost[each, cuts - 1, 1]

    def _moved(self):
        """None, or how far the answers before the cuts moved. A leak may reach over one position or over all."""
        nearest = np.stack([np.roll(moved[::-1], cut) for cut, moved in self.moves])
        length = nearest.shape[1]
        for width in sorted({min(2**i, length) for i in range(length.bit_length() + 1)}):
            values = nearest[:, :width][~np.isnan(nearest[:, :width])]
            most = len(values) - max(1, len(values) // FEW)
            share = np.partition(values, most - 1)[:most].mean() / self.spread
            if share > MOVED:
                return f"those before move by {math.sqrt(share):.1%} of their spread"
        return None
