"""The questions that a model is asked as a black box, beside the sums of the evaluation.

An answer at a position may depend on that position and those before it, in its own row, and on nothing else:
not on later tokens, other rows, earlier calls. `Examination` asks, before and after the sums. A question that is
answered wrongly raises `Refused`, whose text names the check, says what was seen, and what to look for.
"""

import itertools
import math
import re
import time

import numpy as np

from harness.model_state import CHANGED, Refused, arrays_of, copies_of, mx, same

CLOCK = time.monotonic  # bound here, so that whoever replaces it later does not reach this

OUT_OF_MEMORY = re.compile(r"memory|alloc|buffer size", re.IGNORECASE)

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
SEEN = 0.3  # nats that a true token loses by an exchange, where it is asked about again in the same row
SUSPECTS = 6  # so many at most
ROUNDS = 4  # of questions about a suspect, all of which it must fail: rounding flips a choice by chance, a leak never
STEADY = 64  # batches of the same rows that must agree before anything else than that is named


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
EXCHANGES = 96, 256  # rows of all groups on a CPU and on a GPU, at least; or a fortieth of the evaluation's
LOOKS = 112, 256  # rows that are looked at once, see `_look`; or a fortieth
SECONDS, SHARE = 3.0, 0.05  # all questions together take so long, or such a part of the evaluation if that is more
LEAST = 1 / 3  # of them, however slow the model is
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
    """`row` with its tokens from `cut` on exchanged, each for another one.

    By turns another row's text; random tokens; one token throughout, which moves what averages
    over time far more than random ones do.
    """
    size, new = len(row) - cut, row.copy()
    new[cut:] = (other[cut:], rng.integers(0, vocab_size, size), rng.integers(0, vocab_size))[kind % 3]
    return np.where((new == row) & (np.arange(len(row)) >= cut), (row + 1) % vocab_size, new)


def log_probabilities(logits):
    """float32, in the shape of logits (…, vocab); none below -50, since logits may be minus infinity."""
    logits = logits.astype(mx.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return mx.maximum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), -50)


def each(batch):
    """The rows of an array. Slices, since an index is a gather, for which CUDA compiles seconds on a bare machine."""
    return [row.reshape(row.shape[1:]) for row in mx.split(batch, len(batch))]


def compare(base, logits, ids, changed, cuts):
    """How the answers to `changed` differ from that to `ids`: (3, b, T), moved, information, gain;
    and (b, 3), see `aimed`.

    base: (T, vocab), logits: (b, T, vocab), ids: (T,), changed: (b, T), cuts: (b,). Row by row, since
    float32 logits of a batch are large. At the position before a cut both the true token and the
    one put in its place are 'next': there the gain is the mean over both.
    """
    base = log_probabilities(base)
    probability, spread = mx.exp(base), mx.var(base, axis=-1) + 1e-10
    targets, columns, sides = mx.array(np.append(ids[1:], 0)), [], []
    for row, new, cut in zip(each(logits), changed, cuts.tolist(), strict=True):
        answer = log_probabilities(row)
        difference = base - answer
        gain = mx.fast.cross_entropy(answer, targets) - mx.fast.cross_entropy(base, targets)
        at, old, other = (cut - 1) % len(ids), int(ids[cut]), int(new[cut])
        here, middle = difference[at : at + 1].reshape(-1), base.shape[1] // 2
        here = here - mx.sort(here)[middle : middle + 1]  # what most of the vocabulary does is no favour
        favoured = mx.concatenate([here[old : old + 1], -here[other : other + 1]])
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
    "stateless: the same rows score differently when they are asked again. Look for random numbers (dropout, "
    "stochastic depth that stays on), a running mean, a cache or a state that outlives a call, learning in evaluation."
)
ROWS = (
    "rows: a row scores differently when other rows of its batch are exchanged. Look for statistics over the batch; a "
    "mean, sort, roll or reshape that takes in axis 0; experts whose capacity all tokens share."
)
ORDER = (
    "order: rows score differently when they come in another order. Look for what depends on a row's place in the "
    "batch, on the batch before, or on how often the model was called."
)


def draw(weight, count, rng):
    """`count` numbers into weight.reshape(-1), by weight."""
    return rng.choice(weight.size, count, p=weight.reshape(-1) / weight.sum())


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
        split: whose rows they are.
    """

    def __init__(self, model, rows, batch_size, vocab_size, bytes_per_token, ask, score, split="validation"):
        self.rows, self.size, self.vocab_size, self.split = rows, batch_size, vocab_size, split
        self.ask, self.score = ask, score
        self.nats_per_bit = math.log(2) * bytes_per_token
        self.rng = np.random.default_rng()  # from the system: nobody can train for the draw
        self.model, (held, self.parameters) = model, arrays_of(model)
        self.held = copies_of(held)
        self.group = -(-max(GROUP, batch_size) // batch_size) * batch_size
        self.numbers = itertools.cycle(self.rng.permutation(len(rows)))  # of the rows that are asked about
        self.found = []  # what `_ask` returned so far
        self.asked = {"exchanges": 0, "looks": 0}

    def _plan(self, seconds_a_row, seconds):
        """How many groups and looks there will be; what they cost is counted in rows, so that load does not cut them.

        seconds: of all questions; None where sums will come, of which they are a share.
        """
        n, gpu = len(self.rows), mx.default_device().type == mx.gpu
        exchanges, looks = (max(least[gpu], n // 40) for least in (EXCHANGES, LOOKS))
        if seconds is None:
            rows = max(SECONDS / seconds_a_row, SHARE * n) - 5 * self.size
        else:
            rows, looks = seconds / seconds_a_row - 3 * self.size, 0
        share = min(1.0, max(LEAST, rows / (exchanges + looks)))
        self.groups, self.looks = max(2, round(share * exchanges) // self.group), round(share * looks)
        self.later = max(1, self.groups // 4)  # groups after the sums
        self.cuts = cut_points(self.rows.shape[1] - 1, self.groups * (self.group - 2), self.rng)

    def before(self, seconds=None):
        """Ahead of the sums: whether an answer depends on anything but its row, then causality.

        seconds: of a dress rehearsal, after which no sums will come.
        """
        start = CLOCK(), time.process_time()
        first, reverse = self.rows[np.resize(np.arange(len(self.rows)), self.size)], slice(None, None, -1)
        company = first.copy()
        # Tokens that do occur: a model may hold others to be impossible, and their loss would be infinite.
        company[1::2] = self.rng.choice(self.rows.reshape(-1), company[1::2].shape)
        company[1::4] = company[1::4, :1]  # one token throughout, which moves statistics of a batch most
        nats = self.score(np.concatenate([first, company, first[reverse]]), self.size)
        took, worked = CLOCK() - start[0], time.process_time() - start[1]
        self._plan(max(1e-9, took if mx.default_device().type == mx.gpu else min(took, worked)) / len(nats), seconds)
        once, beside, reversed_ = np.split(nats, 3)
        self._unchanged()
        self.once = first, once
        self._same(once[::2], beside[::2], ROWS)
        self._same(once, reversed_[reverse], ORDER)
        self._causality(self.groups if seconds else self.groups - self.later)

    def same_again(self, nats):
        """Whether all rows score nats float32 (n, T) as they did, after whatever else was asked."""
        self._same(nats, self.score(self.rows, self.size), STATELESS)

    def after(self, nats):
        """After the sums. nats: float32 (n, T), what the evaluation found for each target."""
        first = np.resize(np.arange(len(self.rows)), self.size)
        shuffled = self.rng.choice(len(self.rows), self.size, replace=len(self.rows) < self.size)
        again, elsewhere = np.split(self.score(self.rows[np.append(first, shuffled)], self.size), 2)
        self._unchanged()
        self.once = self.rows[first], nats[first]
        self._same(nats[first], again, STATELESS)
        self._same(nats[shuffled], elsewhere, ORDER)
        self._causality(self.later)
        self._most_moved()
        self._look(nats)

    def _steady(self, number=None):
        """Refuse where the same rows do not score the same in STEADY batches.

        Asked before a model is refused for anything else: one that answers otherwise now and then is refused for that,
        whatever it looks like. number: of the row that is suspect, which then is asked about between others that begin
        as it does.
        """
        first, once = self.once
        if number is not None:
            first = np.resize(self.rows[number], first.shape)
            other, late = first.copy(), (slice(None), slice(first.shape[1] // 4, None))
            other[late] = self.rng.choice(self.rows.reshape(-1), other[late].shape)
            once, _ = np.split(self.score(np.concatenate([first, other]), self.size), 2)
        for again in np.split(self.score(np.resize(first, (STEADY * self.size, first.shape[1])), self.size), STEADY):
            self._same(once, again, STATELESS)

    def _same(self, old, new, text):
        """old, new: nats (b, T) of the same targets."""
        change = new - old
        gain = change * np.sign(change.mean())
        moved, information = change**2 / (old.var() + 1e-10), change**2 / 2
        if reason := judge(moved, information, gain, self.nats_per_bit, reach=old.shape[1]):
            text = f"{text} (Log-probabilities of the targets: {reason}.)"
            if not text.startswith("stateless"):
                self._steady()
            raise Refused(text)

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

    def _ask(self, cuts):
        """A group for each of cuts (groups, group - 2).

        Returns of each exchange: row, cut, and what `compare` returns for it, NaN from the cut on.
        """
        groups, found = [self._draw_group(c) for c in cuts], []
        parts, base = self.group // self.size, None
        batches = [batch for _, _, ids in groups for batch in np.split(ids, parts)]

        def difference(logits, i):  # the largest (b, T) in units of NOTHING, and what it was taken from
            nonlocal base
            base = each(logits)[0] if i % parts == 0 else base
            unit = mx.minimum(NOTHING[0], NOTHING[1] * mx.std(log_probabilities(base), axis=-1)) + 1e-10
            largest = [mx.where(x == base, 0, mx.abs(x - base)).max(axis=-1) / unit for x in each(logits)]
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
        self.asked["exchanges"] += len(found)
        return found

    def _causality(self, count):
        """Ask about `count` groups; then judge all that was found so far."""
        fresh, self.cuts = np.split(self.cuts, [count * (self.group - 2)])
        self.found += self._ask(fresh.reshape(count, -1))
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

    def _most_moved(self):
        """What moved most did not decide: it is asked about in other rows, where a leak shows again."""
        most = sorted(self.found, key=lambda found: -np.nanmax(found[2][0]))[: 1 + len(self.found) // FEW]
        spots = [(cut, np.nanargmax(columns[0])) for _, cut, columns, _ in most if np.nanmax(columns[0]) > SHOWN]
        spots = spots[: self.group - 2]
        if not spots:
            return
        cuts = np.resize([cut for cut, _ in spots], self.group - 2)
        again = self._ask([cuts] * AGAIN)
        for cut, position in spots:
            rows = {}
            for number, at, columns, _ in again:
                if at == cut:
                    rows.setdefault(number, []).append(columns[0, position])
            share, number = min((np.mean(moved), number) for number, moved in rows.items())
            if len(rows) > 1 and share > SHOWN:
                reason = f"they move by {share**0.5:.1%} of their spread or more in each of {len(rows)} rows"
                self._refuse_causality(reason, number, cut, position)

    def _look(self, nats):
        """One question a row, in many rows: what leaks seldom, in few rows or after few tokens, is met where it pays.

        What comes next is exchanged where a model does strangely well, and so is what it knew too much of. Where the
        true token loses by that, the same row is asked about again: see `_confirm`. nats: as for `after`.
        """
        rows, gain = self.rows, self._gain(nats)  # (n, T - 1)
        best = np.argsort(-gain.mean(axis=1))[: self.looks // 8]
        some = np.append(best, self.rng.choice(len(rows), min(len(rows), 1024), replace=False))
        drawn = [(row, draw(gain[row] ** 2, 1, self.rng)[0]) for row in best]
        left = self.looks - len(drawn)
        for weight, count in (
            (gain[some] ** 2, left // 3),
            (gain[some] ** 2 / (nats[some, :-1] + 0.05), left - left // 3),
        ):
            spots = zip(*np.divmod(draw(weight, count, self.rng), weight.shape[1]), strict=True)
            drawn += [(some[row], position) for row, position in spots]
        loses = self._loses(nats, [(row, position + 1, kind) for kind, (row, position) in enumerate(drawn)])
        suspects = [(abs(x).max(), row, p + 1, abs(x).argmax()) for x, (row, p) in zip(loses, drawn, strict=True)]
        for number, cut, columns, _ in self.found:  # the exchanges were looks as well
            gains = np.nan_to_num(abs(columns[2]))
            suspects.append((gains.max(), number, cut, gains.argmax()))
        self.asked["looks"] += len(drawn)
        for loss, row, cut, position in sorted(suspects, key=lambda s: -s[0])[:SUSPECTS]:
            if loss > SEEN:
                self._confirm(nats, int(row), int(cut), int(position))

    def _gain(self, nats):
        """How much better each target is known than by its frequency alone, nats (n, T - 1); the last is no input."""
        targets = self.rows[:, 1:]
        counts = np.bincount(targets.reshape(-1), minlength=self.vocab_size) + 1.0
        return np.maximum(1e-6, -np.log(counts / counts.sum())[targets] - nats)[:, :-1]

    def _loses(self, nats, spots):
        """What the true tokens before a cut lose when what comes from it on is exchanged: a (cut,) for each of spots.

        spots: (row, cut, kind of exchange).
        """
        rows, length, loses = self.rows, self.rows.shape[1] - 1, []
        others = self.rng.integers(0, len(rows), len(spots))
        ids = [
            exchanged(rows[row, :-1].astype(np.int32), cut, rows[other, :-1], self.vocab_size, kind, self.rng)
            for (row, cut, kind), other in zip(spots, others, strict=True)
        ]
        batches = np.resize(ids, (-(-len(ids) // self.size) * self.size, length)).reshape(-1, self.size, length)
        targets = rows[np.resize([row for row, *_ in spots], batches.shape[:2]), 1:].astype(np.int32)

        def new_nats(logits, i):  # one row after the other, since float32 logits of a batch are large
            picked = zip(each(logits), map(mx.array, targets[i]), strict=True)
            return mx.stack([mx.fast.cross_entropy(log_probabilities(x), t) for x, t in picked])

        found = np.concatenate([np.array(x) for x in self.ask(batches, new_nats)])
        for (row, cut, _), new in zip(spots, found, strict=False):
            finite(new[None, :cut])
            loses.append(new[:cut] - np.minimum(nats[row, :cut], 50))
        return loses

    def _confirm(self, nats, row, cut, position):
        """Refuse where what `position` loses is bound to the tokens from `cut` on: it does whatever they are, and not
        where the first of them stays, or where the row's last token alone is another. What rounding flips is not bound.
        """
        last, least = self.rows.shape[1] - 2, math.inf
        spots = [(row, at, kind) for at, count in ((cut, 8), (cut + 1, 4), (last, 4)) for kind in range(count)]
        for asked in range(ROUNDS):
            loses = np.array([x[position] for x in self._loses(nats, spots)])
            away, first_stays, last_alone = np.split(abs(loses), [8, 12])
            least = min(least, away.min())
            bound = first_stays.max() < SEEN / 3 or (last_alone.max() < SEEN / 3 and cut < last)
            if least <= SEEN or not bound:
                return
            if asked == 0:
                self._steady(row)
        self._refuse_causality(
            f"the true token's loss there changes by {least:.1f} nats or more, whatever comes instead",
            row, cut, position,
        )  # fmt: skip

    def _refuse_causality(self, reason, row, cut, position):
        self._steady(row)
        raise Refused(
            f"causality: logits depend on later tokens; when those are exchanged, {reason}. It shows best in "
            f"{self.split} row {row}, at position {position} with the tokens from {cut} on exchanged. "
            "Look for attention without a causal mask (mask=None is none), means or normalisation over time or "
            "over blocks, a recurrent state that covers a whole chunk, a convolution padded on both sides, an FFT "
            "without padding, tokens shifted the wrong way (mx.roll wraps round), routing, sorting, a top-k of a row."
        )

    def _unchanged(self):
        """Nothing was learnt: the parameters are the same; of what a model holds beside, less than half may differ."""
        now, changed, total = arrays_of(self.model)[0], {}, 0
        for path, old in self.held.items():
            new = now.get(path)
            if new is None and path not in self.parameters:
                continue
            total += old.size
            if not same(old, new):
                changed[path] = old.size
                if path in self.parameters:
                    raise Refused(CHANGED.format(path))
        if 2 * sum(changed.values()) > total:
            raise Refused(CHANGED.format(max(changed, key=changed.get)))
