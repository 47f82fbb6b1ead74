"""What a run must satisfy before its val_bpb counts. Called by prepare.py alone.

`Examination` asks the model, as a black box, before and after the sums of the evaluation. The
functions below it look at the clock, at the data that was served and at the harness itself. A
check that fails raises `Refused`, whose text names the check and says what to look for.

An agent with a shell can forge anything. This stops mistakes and casual shortcuts.
"""

import contextvars
import hashlib
import inspect
import itertools
import math
import os
import sys
import time
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

# Bound here, so that whoever replaces time.monotonic later does not reach them.
CLOCKS = (
    time.monotonic,
    time.perf_counter,
    partial(time.clock_gettime, getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC)),
)


class Refused(Exception):
    """A check failed. The text names the check, and what to look for."""


# --- one answer: shape, type, finite ---------------------------------------------------------------


def logits_of(model, ids, vocab_size):
    """The model's logits (b, T, vocab_size) for ids (b, T): one row for every position."""
    logits, expected = model(ids), (*ids.shape, vocab_size)
    if not isinstance(logits, mx.array):
        raise Refused(f"shape: the model returned {type(logits).__name__}, expected an mx.array of logits {expected}.")
    if tuple(logits.shape) != expected:
        raise Refused(
            f"shape: logits are {tuple(logits.shape)}, expected (batch, positions, vocabulary) = {expected}: one row "
            "for every position, with one number for every token of the vocabulary, none skipped and none added."
        )
    if not mx.issubdtype(logits.dtype, mx.floating):
        raise Refused(f"shape: logits are {logits.dtype}, expected a floating-point type.")
    return logits


def finite(values):
    """values: (b, T), computed from all logits of a position; not finite where one of those is not."""
    if not np.isfinite(values).all():
        row, position = np.argwhere(~np.isfinite(values))[0]
        raise Refused(
            f"finite: logits are not finite (position {position}, row {row} of a batch). Look for a division by zero, "
            "a root or logarithm of a negative number, a softmax with every entry masked, an overflow in float16."
        )


# --- two answers: how much they may differ ---------------------------------------------------------
#
# Answers that should be the same are compared position by position, in three ways.
#
# moved        Mean square of the difference of the logits, over their variance. Honest models
#              differ by rounding alone, and most do not differ at all, since their sums run in the
#              same order. What mixes over all of time by an FFT does: by 0.0001 % of the spread in
#              float32, by 0.8 % in bfloat16 at six layers; gated linear attention in chunks, whose
#              decays are taken from a chunk's end, by 2.4 % in bfloat16 at eight. 5 % are refused:
#              what is wired wrongly, trained or not.
# information  What the difference is worth by the model's own account: the divergence of the two
#              distributions. A model that makes good use of g nats a token from where it must not
#              look moves by g or more when that is exchanged. 0.001 bits per byte are refused at
#              the position that would see the next token, over what those behind it show: rounding
#              does not know which token is next. Over several positions the chunks above, between
#              experts, reach 0.0027; 0.004 are refused.
# gain         What it is worth by the text: log-probability of the true token, with the true
#              surroundings less with the exchanged ones. Rounding has no sign, a leak has: one
#              that is too faint or too timid for the other two is caught where the mean gain is
#              over half of 0.001 bits per byte and over five of its standard errors.
#
# In half precision, rounding flips the choice of an expert where two are close, and then a position
# moves by much. So the few that move most do not decide, but are asked about again in other rows:
# what is wired wrongly shows in all of them. And where an exchange that cannot matter moves the
# logits as well, the first two must exceed that `floor` by far: without limit for what the
# difference is worth, but 7 % of the spread are no rounding. All that is for causality: the same rows
# asked again round the same, and there 0.001 bits per byte are refused wherever they are found.

MOVED = 0.05**2
LEAK = 0.001  # bits per byte
WIDE = 4.0  # times LEAK, for what reaches over several positions
BEHIND = 1.5  # times what positions 2 to 4 show may show at the first
SIGMAS = 5.0
FLOORS = 4.0  # times the floor that moved and information may reach beside their limit
FEW = 32  # one of so many does not decide
AGAIN = 3  # rows in which those are asked about again
SHOWN = 0.1**2  # by which they must move in each


def judge(moved, information, gain, nats_per_bit, reach, floor=None):
    """None where two sets of answers agree, else what speaks against it, as a phrase.

    moved, information, gain: float (pairs, distances), see above, NaN where a pair has no such
    position; column 0 is next to the change. A leak may reach over one position or over all, so
    means are taken over the 1, 2, 4, … nearest; `gain` is looked at within `reach` alone: farther
    off, pairs that share a row share its rounding as well.
    nats_per_bit: nats a token that make one bit per byte. floor: of moved and information; None
    where the same rows were asked again, and round the same.
    """
    if not np.nanmax(moved) > 0:
        return None
    pairs, distances = moved.shape
    leak, allowed, behind, few, wide = LEAK * nats_per_bit, np.zeros(2), 0.0, math.inf, 1.0
    if floor is not None:
        allowed, few, wide = FLOORS * np.asarray(floor), FEW, WIDE
        behind = BEHIND * np.nanmean(information[:, 1:4])

    def mean_of_most(values):
        values = values[~np.isnan(values)].astype(np.float64)
        most = len(values) - int(len(values) // few)
        return np.partition(values, most - 1)[:most].mean()

    for width in sorted({min(2**i, distances) for i in range(distances.bit_length() + 1)}):
        share, worth = mean_of_most(moved[:, :width]), mean_of_most(information[:, :width])
        if share > MOVED + min(allowed[0], MOVED):
            return f"they move by {share**0.5:.1%} of their spread"
        if worth > wide * leak + allowed[1] or (width == 1 and worth > leak + allowed[1] + behind):
            return f"they move by what is worth {worth / nats_per_bit:.4f} bits per byte"
        by_pair = np.nanmean(gain[:, :width], axis=1, dtype=np.float64)
        gained, error = by_pair.mean(), by_pair.std(ddof=1) / math.sqrt(pairs) if pairs > 1 else math.inf
        if width <= reach and gained > max(leak / 2, SIGMAS * error):
            return f"it helps the score by {gained / nats_per_bit:.4f} bits per byte"
    return None


# --- causality: what is exchanged, and where -------------------------------------------------------

GROUP = 16  # rows, at least, that share a beginning: one as it is, the others with a suffix exchanged
EXCHANGES = 112, 256  # rows of all groups on a CPU and on a GPU, at least; or a fortieth of the evaluation's
SECONDS, SHARE = 3.0, 0.05  # all questions together take so long, or such a part of the evaluation if that is more
REACH = 8  # see `judge`
NOTHING = 1e-4, 0.01  # nats and share of the spread: logits that differ by less cannot fail `judge`
LEVELS = NOTHING[0] * 10.0 ** np.arange(5)  # nats, by which a logit may have moved
LOUDER = 10  # times: how much louder, and more often, a target may move than other tokens do
HITS = 5  # targets, at most, that move the right way where nearly nothing else does


def cut_points(length, count, rng):
    """`count` cuts in 1 … length - 1: positions before a cut must not notice what comes from it on.

    Early ones, near the end, at powers of two and beside them, at other places where blocks of
    common sizes meet; neighbours, of which one is inside of a block, whatever the block's size.
    The rest is drawn anew in every run.
    """
    powers = {2**i for i in range(length.bit_length())}
    fixed = {p + shift for p in powers for shift in (-1, 0, 1)} | {k * p for p in powers for k in (3, 5)}
    fixed |= {length - p for p in powers} | {10, 100, 1000}
    fixed = np.array(sorted(c for c in fixed if 0 < c < length))
    others = rng.permutation(np.setdiff1d(np.arange(1, length), fixed))
    return np.resize(np.concatenate([rng.permutation(fixed), others]), count)


def exchanged(row, cut, other, vocab_size, kind, rng):
    """`row` with its tokens from `cut` on exchanged; the first of them is surely another one.

    By turns another row's text; random tokens; one token throughout, which moves what averages
    over time far more than random ones do.
    """
    size, new = len(row) - cut, row.copy()
    new[cut:] = (other[cut:], rng.integers(0, vocab_size, size), rng.integers(0, vocab_size))[kind % 3]
    if new[cut] == row[cut]:
        new[cut] = (row[cut] + 1) % vocab_size
    return new


def log_probabilities(logits):
    """float32, in the shape of logits (…, vocab); none below -50, since logits may be minus infinity."""
    logits = logits.astype(mx.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return mx.maximum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), -50)


def compare(base, logits, ids, changed, cuts):
    """How the answers to `changed` differ from that to `ids`: (3, b, T), moved, information, gain;
    and (b, 3), see `aimed`.

    base: (T, vocab), logits: (b, T, vocab), ids: (T,), changed: (b, T), cuts: (b,). Row by row, since
    float32 logits of a batch are large. At the position before a cut both the true token and the
    one put in its place are 'next': there the gain is the mean over both.
    """
    base = log_probabilities(base)
    probability, spread = mx.exp(base), mx.var(base, axis=-1) + 1e-10
    targets, columns, sides = mx.array(np.append(ids[1:], 0))[:, None], [], []
    for row, new, cut in zip(logits, changed, cuts.tolist(), strict=True):
        difference = base - log_probabilities(row)
        gain = mx.take_along_axis(difference, targets, axis=-1)[:, 0]
        here = difference[cut - 1]
        here = here - mx.sort(here)[len(here) // 2]  # what most of the vocabulary does is no favour
        favoured = mx.stack([here[int(ids[cut])], -here[int(new[cut])]])
        sides.append(mx.concatenate([favoured, (mx.abs(here) > mx.array(LEVELS[:, None] / LOUDER)).mean(axis=1)]))
        gain = mx.where(mx.arange(len(ids)) == cut - 1, favoured.mean(), gain)
        moved, information = mx.var(difference, axis=-1) / spread, (probability * difference).sum(axis=-1)
        columns.append(mx.stack([moved, information, gain]))
        mx.eval(columns[-1], sides[-1])
    return np.stack([np.array(c) for c in columns], axis=1), np.stack([np.array(s) for s in sides])


def aimed(sides, nats_per_bit):
    """None, or what shows that the logits that moved are those of the tokens that came next.

    sides: float (exchanges, 2 + levels), of the position before each cut: by how much its true next
    token was favoured before the exchange, and the one in its place after it; then the share of the
    vocabulary that moved at each of LEVELS. Rounding favours as many as it disfavours, and moves a
    target about as often as any other token.
    """
    favoured, shares = sides[:, :2], sides[:, 2:]
    if not favoured.mean() > LEAK / 4 * nats_per_bit:  # a rare leak may have been met seldom
        return None
    for level, expected in zip(LEVELS, 2 * shares.sum(axis=0), strict=True):
        signs = np.sign(favoured) * (np.abs(favoured) > level)
        if signs.sum() > min(SIGMAS * math.sqrt(np.abs(signs).sum()), max(HITS, LOUDER * expected)):
            return f"the next tokens gain by {favoured.mean() / nats_per_bit:.4f} bits per byte"
    return None


STATELESS = (
    "stateless: the same rows score differently when they are asked again. Look for random numbers (dropout that "
    "stays on), a cache or a state that outlives a call, learning while evaluating."
)
ROWS = (
    "rows: a row scores differently when other rows of its batch are exchanged. Look for statistics over the batch; a "
    "mean, sort, roll or reshape that takes in axis 0; experts whose capacity all tokens share."
)
ORDER = (
    "order: rows score differently when they come in another order. Look for what depends on a row's place in the "
    "batch, on the batch before, or on how often the model was called."
)


class Examination:
    """The questions that a model is asked beside the evaluation, in batches of its size.

    Args:
        model: what is evaluated; its parameters are watched where it has any.
        rows: uint16 (n, T + 1), what it is evaluated on.
        batch_size: rows of a batch.
        vocab_size: of the tokenizer.
        bytes_per_token: mean over the targets.
        ask: ask(batches of ids int32 (b, T), function) yields function(logits, i) for each.
        score: score(rows, batch_size) returns the nats float32 (n, T) of their targets.
    """

    def __init__(self, model, rows, batch_size, vocab_size, bytes_per_token, ask, score):
        self.rows, self.size, self.vocab_size, self.ask, self.score = rows, batch_size, vocab_size, ask, score
        self.nats_per_bit, gpu = math.log(2) * bytes_per_token, mx.default_device().type == mx.gpu
        self.rng = np.random.default_rng()  # from the system: nobody can train for the draw
        self.model, self.parameters = model, self._parameters(model)
        self.group = -(-max(GROUP, batch_size) // batch_size) * batch_size
        self.groups = max(2, max(EXCHANGES[gpu], len(rows) // 40) // self.group)
        self.later = max(1, self.groups // 4)  # of them after the sums
        self.cuts = cut_points(rows.shape[1] - 1, self.groups * (self.group - 2), self.rng)
        self.numbers = itertools.cycle(self.rng.permutation(len(rows)))  # of the rows that are asked about
        self.found = []  # what `_ask` returned so far

    @staticmethod
    def _parameters(model):
        # Arrays of their own on the same memory: an update leaves these as they are.
        return tree_map(mx.stop_gradient, model.parameters()) if hasattr(model, "parameters") else {}

    def before(self):
        """Ahead of the sums: whether an answer depends on anything but its row, then causality."""
        mx.eval(self.parameters)
        start = CLOCKS[0]()
        first, reverse = self.rows[np.resize(np.arange(len(self.rows)), self.size)], slice(None, None, -1)
        company = first.copy()
        # Tokens that do occur: a model may hold others to be impossible, and their loss would be infinite.
        company[1::2] = self.rng.choice(self.rows.reshape(-1), company[1::2].shape)
        company[1::4] = company[1::4, :1]  # one token throughout, which moves statistics of a batch most
        nats = self.score(np.concatenate([first, first, company, first[reverse]]), self.size)
        projected = (CLOCKS[0]() - start) / len(nats) * len(self.rows)
        self.allowed = max(SECONDS, SHARE * projected)
        once, again, beside, reversed_ = np.split(nats, 4)
        self._unchanged()
        self._same(once, again, STATELESS)
        self._same(once[::2], beside[::2], ROWS)
        self._same(once, reversed_[reverse], ORDER)
        self._causality(self.groups - self.later, start + 0.7 * self.allowed)
        self.allowed -= CLOCKS[0]() - start

    def after(self, nats):
        """After the sums. nats: float32 (n, T), what the evaluation found for each target."""
        start = CLOCKS[0]()
        first = np.resize(np.arange(len(self.rows)), self.size)
        shuffled = self.rng.choice(len(self.rows), self.size, replace=len(self.rows) < self.size)
        again, elsewhere = np.split(self.score(self.rows[np.append(first, shuffled)], self.size), 2)
        self._unchanged()
        self._same(nats[first], again, STATELESS)
        self._same(nats[shuffled], elsewhere, ORDER)
        self._causality(self.later, start + self.allowed)
        self._most_moved(start + self.allowed)

    def _same(self, old, new, text):
        """old, new: nats (b, T) of the same targets."""
        change = new - old
        gain = change * np.sign(change.mean())
        moved, information = change**2 / (old.var() + 1e-10), change**2 / 2
        if reason := judge(moved, information, gain, self.nats_per_bit, reach=old.shape[1]):
            raise Refused(f"{text} (Log-probabilities of the targets: {reason}.)")

    def _draw_group(self, cuts):
        """A row's number; cuts (group,); the row as it is (cut 0) and its exchanges, int32 (group, T).

        The first exchange is of the last token alone, from which nothing far ahead of it can profit;
        the others are at `cuts` (group - 2,).
        """
        number, others = next(self.numbers), self.rng.integers(0, len(self.rows), self.group - 1)
        cuts = np.concatenate([[0, self.rows.shape[1] - 2], cuts])
        row = self.rows[number, :-1].astype(np.int32)
        new = [
            exchanged(row, cut, self.rows[other, :-1], self.vocab_size, kind, self.rng)
            for kind, (cut, other) in enumerate(zip(cuts[1:], others, strict=True))
        ]
        return number, cuts, np.stack([row, *new])

    def _ask(self, cuts, deadline, least=1):
        """A group for each of cuts (groups, group - 2), or fewer (`least`) where time is up.

        Returns of each exchange: row, cut, and what `compare` returns for it, NaN from the cut on.
        """
        groups, found = [self._draw_group(c) for c in cuts], []
        parts, base = self.group // self.size, None
        batches = [batch for _, _, ids in groups for batch in np.split(ids, parts)]

        def difference(logits, i):  # the largest (b, T) in units of NOTHING, and what it was taken from
            nonlocal base
            base = logits[0] if i % parts == 0 else base
            unit = mx.minimum(NOTHING[0], NOTHING[1] * mx.std(log_probabilities(base), axis=-1)) + 1e-10
            largest = [mx.where(x == base, 0, mx.abs(x - base)).max(axis=-1) / unit for x in logits]
            return mx.stack(largest), logits, base

        for i, (largest, logits, first) in enumerate(self.ask(batches, difference)):
            number, cuts, ids = groups[i // parts]
            cuts = np.split(cuts, parts)[i % parts]
            before = np.arange(ids.shape[1]) < cuts[:, None]  # (b, T)
            largest = np.where(before, np.array(largest), 0)
            finite(np.where(np.isinf(largest), 0, largest))  # infinite: one of the two is minus infinity
            columns, sides = np.zeros((3, *before.shape)), np.zeros((len(cuts), 2 + len(LEVELS)))
            if (largest >= 1).any():
                columns, sides = compare(first, logits, ids[0], batches[i], cuts)
            columns[:, ~before] = np.nan
            found += [(number, cut, columns[:, j], sides[j]) for j, cut in enumerate(cuts) if cut]
            if i + 1 in range(least * parts, len(batches), parts) and CLOCKS[0]() > deadline:
                break
        return found

    def _causality(self, count, deadline):
        """Ask about `count` groups; then judge all that was found so far."""
        fresh, self.cuts = np.split(self.cuts, [count * (self.group - 2)])
        self.found += self._ask(fresh.reshape(count, -1), deadline)
        by_distance = np.stack([np.roll(columns[:, ::-1], cut, axis=1) for _, cut, columns, _ in self.found], axis=1)
        sides = np.stack([sides for *_, sides in self.found])
        length = self.rows.shape[1] - 1
        last = [columns[:2, : length // 2] for _, cut, columns, _ in self.found if cut == length - 1]
        floor = np.mean(last, axis=(0, 2))  # of moved and information, where nothing could be learnt
        reason = judge(*by_distance, self.nats_per_bit, REACH, floor) or aimed(sides, self.nats_per_bit)
        if reason:
            worst, distance = np.unravel_index(np.nanargmax(by_distance[0]), by_distance[0].shape)
            number, cut = self.found[worst][:2]
            self._refuse_causality(reason, number, cut, cut - 1 - distance)

    def _most_moved(self, deadline):
        """What moved most did not decide: it is asked about in other rows, where a leak shows again."""
        most = sorted(self.found, key=lambda found: -np.nanmax(found[2][0]))[: 1 + len(self.found) // FEW]
        spots = [(cut, np.nanargmax(columns[0])) for _, cut, columns, _ in most if np.nanmax(columns[0]) > SHOWN]
        spots = spots[: self.group - 2]
        if not spots:
            return
        cuts = np.resize([cut for cut, _ in spots], self.group - 2)
        again = self._ask([cuts] * AGAIN, deadline, least=2)
        for cut, position in spots:
            rows = {}
            for number, at, columns, _ in again:
                if at == cut:
                    rows.setdefault(number, []).append(columns[0, position])
            share, number = min((np.mean(moved), number) for number, moved in rows.items())
            if len(rows) > 1 and share > SHOWN:
                reason = f"they move by {share**0.5:.1%} of their spread or more in each of {len(rows)} rows"
                self._refuse_causality(reason, number, cut, position)

    def _refuse_causality(self, reason, row, cut, position):
        raise Refused(
            f"causality: logits depend on later tokens; when those are exchanged, {reason}. It shows best in "
            f"validation row {row}, at position {position} with the tokens from {cut} on exchanged. "
            "Look for attention without a causal mask (mask=None is none), means or normalisation over time or "
            "over blocks, a recurrent state that covers a whole chunk, a convolution padded on both sides, an FFT "
            "without padding, tokens shifted the wrong way, routing or sorting by what comes later."
        )

    def _unchanged(self):
        for (name, old), (_, new) in zip(
            tree_flatten(self.parameters), tree_flatten(self._parameters(self.model)), strict=True
        ):
            if old.shape != new.shape or not mx.array_equal(old, new, equal_nan=True):
                raise Refused(
                    f"parameters: {name} is not what it was before the evaluation. Look for an update, a running "
                    "statistic or a buffer that the model changes when it is called: it must not learn from these rows."
                )


# --- the run around it -----------------------------------------------------------------------------

STARTUP = 120  # seconds, at most
OVERSHOOT = 0.02  # of the budget, or one step
SLACK = 2  # seconds, by which a busy machine may hold up a step: it matters to short budgets alone
UNKNOWN_STEP = 10  # seconds that a step may take where there are no others to compare it with
WARM_UP_STEPS = 4  # of training batches that may be used up before the clock starts


def read_clocks():
    return [clock() for clock in CLOCKS]


def clock(seconds, started):
    """The run's clock went on. seconds: of training, by it. started: `read_clocks()` at its start."""
    for now, then in zip(read_clocks(), started, strict=True):
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
            "that are not logged, for work between the last step and run.finish()."
        )


_harness_reads = contextvars.ContextVar("_harness_reads", default=False)


@contextmanager
def harness_reads():
    """Within it, this thread may open held-out data: it is the harness that does."""
    token = _harness_reads.set(True)
    try:
        yield
    finally:
        _harness_reads.reset(token)


class HeldOutWatch:
    """Notes in `opened` who opens held-out data: its files by any name, or `data_sources.documents`.

    It sees what Python opens, and cannot be taken off again.
    """

    def __init__(self, paths):
        self.opened = []
        self._files = {(s.st_dev, s.st_ino) for s in map(os.stat, paths)}
        sys.addaudithook(self._note)

    def _note(self, event, args):
        if event not in ("open", "data_sources.documents") or _harness_reads.get():
            return
        if event == "open":
            try:
                status = os.stat(args[0])
            except (OSError, TypeError, ValueError):
                return
            if (status.st_dev, status.st_ino) in self._files:
                self.opened.append(os.path.basename(os.fsdecode(args[0])))
        elif args[1] != "train":
            self.opened.append(f"the documents of '{args[1]}'")


def data(served, cache, changed_file, opened):
    """What was trained on is the training split as it was prepared, and nothing held out.

    served: content hashes uint64 (n,) of the documents that the run's stream handed out.
    changed_file: `cache.changed_file()`. opened: see `HeldOutWatch`.
    """
    if changed_file:
        raise Refused(f"data: {changed_file} is not as it was prepared. Restore it, or delete it and run make prepare.")
    if opened:
        raise Refused(
            f"data: {opened[0]} was opened during the run; validation and test are the harness's alone. Look for code "
            "that reads another split than 'train'."
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
    """{name: (function, its code)} of every function and method that the modules define."""
    found = {}
    for module in modules:
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
