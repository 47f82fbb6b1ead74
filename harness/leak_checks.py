"""The questions that a model is asked as a black box: may its answer know what it knows?

An answer at a position may depend on that position and those before it, in its own row, and on nothing else: not on
later tokens, other rows, earlier calls. Every question is one exchange that must not matter. The rows are asked again
with something exchanged, and the nats of the same tokens at the same positions are compared. An honest model gives
the same answer, rounding aside. What rounding does is told from a leak in three ways:

moved       How far answers move, as a share of their spread: root mean square over many. Honest models in half
            precision move by up to 2.4 % (gated chunks, eight layers, bfloat16). More than 5 % are refused.
t           Whether they move the right way. Rounding does not know which token comes next: for noise that is as
            likely up as down, of whatever size and shape, P(t > 5) < 4e-6 (Efron 1969; Pinelis 1994). While t is
            neither small nor sure, more is asked.
always      A leak that is rare, but large where it is: there it shows in each of many exchanges, and in none of the
            last token alone, which is too far away to matter.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from harness import model_state
from harness.evaluation import evaluation_mode, nats_of
from harness.run_checks import Refused

LEAK = 0.001  # bits per byte that a leak may be worth
MOVED = 0.05**2  # mean square, over the variance of the nats
SURE, UNSURE = 5.0, 2.0  # t
FEW = 32  # one of so many does not count for `moved`: rounding flips a choice between experts now and then
FLOOR = 4.0  # times what the last token alone moves may be moved beside the limit
SEEN, BOUND = 0.3, 0.1  # nats by which a suspect moved; and by which it then must move each time
TIMES = 24  # exchanges that a suspect is asked about
SUSPECTS = 6
STEADY = 32  # batches of the same rows that must agree before anything else is said of a model
MOST = 50.0  # nats that count: a model may hold a token to be impossible

SECONDS, SHARE = 3.0, 0.05  # all questions take so long, or such a share of the evaluation if that is more
EXCHANGES = 32, 128  # at least and at most, or a fortieth of the evaluation's rows
LAST = 3  # kinds of exchanges, see `exchanged`; and the number of the one that has the last token alone
ROUNDS = 4  # exchanges of a row, for which it is asked once as it is

STATELESS = (
    "state: the same rows score differently when they are asked again. Look for random numbers (dropout, stochastic "
    "depth that stays on), a running mean, a cache or a state that outlives a call, learning in evaluation."
)
ROWS = (
    "rows: a row scores differently beside other rows, or at another place among them. Look for statistics over the "
    "batch; a mean, sort, roll or reshape that takes in axis 0; experts whose capacity all tokens share; what depends "
    "on a row's number or on how often the model was called."
)
CAUSALITY = (
    "causality: logits depend on later tokens; when those are exchanged, {}. It shows best in {} row {}, at position "
    "{} with the tokens from {} on exchanged. Look for attention without a causal mask (mask=None is none), means or "
    "normalisation over time or over blocks, a recurrent state that covers a whole chunk, a convolution padded on both "
    "sides, an FFT without padding, tokens shifted the wrong way (mx.roll wraps round), routing, sorting, a top-k of a "
    "row."
)


def t_of(values):
    """Student's t of a mean that should be 0, by the root of the sum of squares (self-normalised)."""
    return values.sum() / math.sqrt((values**2).sum() + 1e-30)


def cut_points(length, count, rng):
    """`count` cuts in 1 … length - 1: positions before a cut must not notice what comes from it on.

    Half of them are early, near the end, at powers of two and beside them, at other places where blocks of common
    sizes meet. The rest is drawn.
    """
    powers = [2**i for i in range(length.bit_length())]
    places = [p + shift for p in powers for shift in (-1, 0, 1)] + [k * p for p in powers for k in (3, 5)]
    places += [length - p for p in powers] + [10, 100, 1000]
    places = rng.permutation(sorted({p for p in places if 0 < p < length}))
    others = rng.permutation(np.setdiff1d(np.arange(1, length), places))
    half = max(count // 2, count - len(others))
    return rng.permutation(np.append(np.resize(places, half), others[: count - half]))


def exchanged(row, cut, first, other, kind, rng):
    """`row` with its tokens from `cut` on exchanged, the first one for `first`.

    kind: another row's text; tokens of it in any order; one token throughout, which moves what averages over time far
    more than random ones do.
    """
    size, new = len(row) - cut, row.copy()
    new[cut:] = (other[cut:], rng.choice(other, size), first)[kind % LAST]
    new[cut] = first
    return new


@dataclass(frozen=True)
class Exchange:
    """What one exchange did to the answers before its cut.

    moved: mean square of the change of nats, (T,), NaN from the cut on. favour: log-odds of the token that comes next
    over the one put in its place, at the position before the cut, before the exchange less after it.
    """

    row: int
    cut: int
    kind: int
    moved: np.ndarray
    favour: float


class LeakChecks:
    """The questions about one model and its rows, asked when these were scored.

    Args:
        model: what is evaluated. What it holds is remembered when this is made, before it is scored.
        rows: uint16 (n, T + 1), what it is scored on.
        batch_size: rows of a batch.
        split: whose rows they are.
    """

    def __init__(self, model, rows, tokenizer, batch_size, split="validation"):
        self.model, self.rows, self.split, self.vocab_size = model, rows, split, tokenizer.vocab_size
        # On a GPU kernels may be compiled for a shape, so questions come in the evaluation's own.
        self.size = batch_size if mx.default_device().type == mx.gpu else min(batch_size, 8)
        self.nats_per_bit = math.log(2) * max(tokenizer.token_bytes[rows[:, 1:]].mean(), 1e-3)  # a bit per byte
        self.rng = np.random.default_rng()  # from the system: nobody can train for the draw
        self.held = model_state.copies_of(model_state.arrays_of(model))
        self.spread = None  # the variance of the nats of tokens of the text
        self.found = []  # an `Exchange` for each one

    def ask(self, nats, took, allowed=None):
        """Ask all questions; raises `Refused`.

        nats: float32 (n, T) of the targets. took: seconds that scoring them took. allowed: seconds for the questions.
        """
        rows_in_time = (allowed or max(SECONDS, SHARE * took)) / max(took, 1e-6) * len(self.rows)
        count = int(min(max(EXCHANGES[1], len(self.rows) // 40), max(EXCHANGES[0], rows_in_time / 3)))
        self.nats, self.spread = nats, np.minimum(nats, MOST).var() + 1e-10
        with evaluation_mode(self.model):
            self._state()
            self._company(nats)
            self._causality(count)
            self._suspects(self._looks(nats, count))
            self._state()

    def _nats(self, ids, tokens):
        return np.minimum(nats_of(self.model, ids, tokens, self.vocab_size, self.size), MOST)

    def _score(self, rows):
        return self._nats(rows[:, :-1], rows[:, 1:, None])[..., 0]

    def _refuse(self, text):
        """Refuse; but where the same rows do not score the same each time, that is what is said."""
        first = self.rows[np.resize(np.arange(len(self.rows)), self.size)]
        once = self._score(first)
        for _ in range(STEADY):
            if reason := self._differ(once, self._score(first)):
                raise Refused(f"{STATELESS} ({reason})")
        raise Refused(text)

    # --- earlier calls, other rows ---

    def _differ(self, old, new, limit=MOVED):
        """None where two sets of nats (b, T) of the same targets agree, else how they do not."""
        change = np.minimum(new, MOST) - np.minimum(old, MOST)
        if (change**2).mean() > limit * self.spread:
            return f"The nats of the targets move by {math.sqrt((change**2).mean() / self.spread):.1%} of their spread."
        if abs(change.mean()) > LEAK * self.nats_per_bit and abs(t_of(change)) > SURE:
            return f"The score changes by {abs(change.mean()) / self.nats_per_bit:.4f} bits per byte."
        return None

    def _state(self):
        """The first rows score as they did, and what the model holds did not change."""
        paths = model_state.changed(self.held, model_state.arrays_of(self.model))
        model_state.refuse_changed(paths)
        numbers = np.resize(np.arange(len(self.rows)), self.size)
        limit = MOVED / 50**2 if paths else MOVED  # something private changed: then it must not matter at all
        for _ in range(2):  # what happens now and then may not happen once
            if reason := self._differ(self.nats[numbers], self._score(self.rows[numbers]), limit):
                raise Refused(f"{STATELESS} ({reason})")

    def _company(self, nats):
        """Rows score the same among others and at other places."""
        for strangers in (False, True):
            numbers = self.rng.choice(len(self.rows), self.size, replace=len(self.rows) < self.size)
            beside = self.rows[numbers]
            if strangers:  # tokens of the text in any order, and one throughout, which moves a mean most
                beside[1::2] = self.rng.choice(self.rows.reshape(-1), beside[1::2].shape)
                beside[1::4] = beside[1::4, :1]
            if reason := self._differ(nats[numbers[::2]], self._score(beside)[::2]):
                self._refuse(f"{ROWS} ({reason})")

    # --- later tokens ---

    def _exchanges(self, numbers, cuts):
        """Ask about rows `numbers`, each as it is and with its tokens from its cuts on exchanged. cuts: (rounds, rows).

        Returns what two tokens cost more by each exchange, (rounds, rows, T, 2): the one that comes next and another
        one, which at the position before a cut is the one put in its place.
        """
        text = self.rows[numbers].astype(np.int32)
        ids, following = text[:, :-1], text[:, 1:]
        other = self.rng.choice(self.rows.reshape(-1), following.shape).astype(np.int32)
        other = np.where(other == following, (other + 1) % self.vocab_size, other)
        tokens, rounds = np.stack([following, other], axis=-1), [ids]
        for kind, at in enumerate(cuts):
            strangers = self.rows[self.rng.integers(0, len(self.rows), len(ids)), :-1]
            new = [
                exchanged(row, cut, first[cut - 1], stranger, kind + i, self.rng)
                for i, (row, cut, first, stranger) in enumerate(zip(ids, at, other, strangers, strict=True))
            ]
            rounds.append(np.stack(new))
        asked = len(rounds)
        nats = self._nats(np.concatenate(rounds), np.tile(tokens, (asked, 1, 1)))
        base, *others = np.split(nats, asked)
        return np.stack(others) - base

    def _round(self):
        """ROUNDS exchanges in each row of a batch, the first of its last token alone."""
        length = self.rows.shape[1] - 1
        numbers = self.rng.choice(len(self.rows), self.size, replace=len(self.rows) < self.size)
        cuts = cut_points(length, ROUNDS * self.size, self.rng).reshape(ROUNDS, self.size)
        cuts[0] = length - 1
        for kind, costs in enumerate(self._exchanges(numbers, cuts)):
            for i, (number, cost) in enumerate(zip(numbers, costs, strict=True)):
                cut = cuts[kind, i]
                moved = np.where(np.arange(length) < cut, (cost**2).mean(axis=-1), np.nan)
                favour = cost[cut - 1, 0] - cost[cut - 1, 1]
                self.found.append(Exchange(number, cut, (kind + i) % LAST if kind else LAST, moved, favour))

    def _favour(self):
        """(mean, t) of how much the token that comes next was favoured over the one put in its place."""
        favour = np.array([exchange.favour for exchange in self.found])
        return favour.mean(), t_of(favour)

    def _causality(self, count):
        worth = LEAK / 2 * self.nats_per_bit  # what is rare may have been met seldom
        while len(self.found) < count:
            self._round()
        while len(self.found) < 4 * count and self._favour()[0] > worth and UNSURE < self._favour()[1] < SURE:
            self._round()
        mean, t = self._favour()
        reason = self._moved()
        if not reason and mean > worth and t > SURE:
            reason = f"the next token gains {mean / self.nats_per_bit:.4f} bits per byte over others (t = {t:.1f})"
        if reason:
            most = max(self.found, key=lambda exchange: np.nanmax(exchange.moved))
            self._refuse(CAUSALITY.format(reason, self.split, most.row, np.nanargmax(most.moved), most.cut))

    def _moved(self):
        """None, or how far the answers before the cuts moved. A leak may reach over one position or over all."""
        length = self.rows.shape[1] - 1
        rounding = np.mean([x.moved[: length // 2].mean() for x in self.found if x.kind == LAST])
        limit = (MOVED + min(FLOOR * rounding / self.spread, MOVED)) * self.spread
        for kind in range(LAST + 1):
            nearest = np.stack([np.roll(x.moved[::-1], x.cut) for x in self.found if x.kind == kind])
            for width in sorted({min(2**i, length) for i in range(length.bit_length() + 1)}):
                values = nearest[:, :width][~np.isnan(nearest[:, :width])]
                most = len(values) - len(values) // FEW
                share = np.partition(values, most - 1)[:most].mean()
                if share > limit:
                    return f"those before move by {math.sqrt(share / self.spread):.1%} of their spread"
        return None

    def _looks(self, nats, count):
        """Suspects (movement, row, cut) where the model does strangely well: what leaks seldom is met where it pays."""
        some = self.rng.choice(len(self.rows), min(len(self.rows), 1024), replace=False)
        targets, nats = self.rows[some, 1:], np.minimum(nats[some], MOST)
        counts = np.bincount(targets.reshape(-1), minlength=self.vocab_size) + 1.0
        gain = np.maximum(1e-6, np.log(counts.sum() / counts)[targets] - nats)  # over who knows frequencies alone
        weight = (gain**2 / (nats + 0.05))[:, :-1]
        drawn = self.rng.choice(weight.size, count, p=weight.reshape(-1) / weight.sum())
        at, positions = np.divmod(drawn, weight.shape[1])
        text = self.rows[some[at]].astype(np.int32)
        others = self.rows[self.rng.integers(0, len(self.rows), count)]
        first = (text[np.arange(count), positions + 1] + self.rng.integers(1, self.vocab_size, count)) % self.vocab_size
        drawn = enumerate(zip(text, positions, first, others, strict=True))
        ids = [exchanged(row[:-1], p + 1, new, other[:-1], kind, self.rng) for kind, (row, p, new, other) in drawn]
        moved = abs(self._nats(np.stack(ids), text[:, 1:, None])[np.arange(count), positions, 0] - nats[at, positions])
        return list(zip(moved, some[at], positions + 1, strict=True))

    def _suspects(self, suspects):
        """Ask again where one exchange moved much: a leak moves each time, and not when the last token alone goes."""
        length = self.rows.shape[1] - 1
        suspects += [(math.sqrt(x.moved[x.cut - 1]), x.row, x.cut) for x in self.found]
        for moved, number, cut in sorted(suspects, key=lambda suspect: -suspect[0])[:SUSPECTS]:
            if moved < SEEN or cut == length - 1:
                continue
            numbers, each = np.resize(number, self.size), -(-TIMES // self.size)
            cuts = np.repeat([cut, length - 1], each)[:, None] * np.ones(self.size, int)
            moves = np.sqrt((self._exchanges(numbers, cuts)[:, :, cut - 1] ** 2).mean(axis=-1))
            least, most = moves[:each].min(), moves[each:].max()
            if least > max(BOUND, 3 * most):
                reason = f"the answer there moves by {least:.1f} nats or more, whatever comes instead"
                self._refuse(CAUSALITY.format(reason, self.split, number, cut - 1, cut))
