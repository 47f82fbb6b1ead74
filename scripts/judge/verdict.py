"""The rule for keeping: all runs of a candidate against all runs of the reference. It reads, and changes nothing.

In this order: the reference's own text is `again`; what a shared machine can explain is `rerun`; what the
measured noise can explain is `rerun` until both sides have runs enough, and then no difference; the rest is a table.
"""

import math
import re
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np

from scripts import session
from scripts.session import Refused, Session, counted, options, record, run_command

# --- the thresholds ---------------------------------------------------------------------------------

SAME = 0.001  # bits per byte: within it two results are called equal while noise is unknown
CLEAR = 0.005  # bits per byte: a gain that may cost throughput
SMALL = 0.003  # bits per byte: a loss that much throughput may pay for
SLOWER = 0.15  # share of throughput that a gain may cost without a question
FASTER, MUCH_FASTER = 0.10, 0.25  # share of throughput that keeps an equal, or a slightly worse, result
SIMPLER_COSTS = 0.05  # share of throughput that simpler code may cost
RUNS = 3  # of a candidate, after which it is decided
REFERENCE_RUNS = 4  # a kept program was lucky more often than not, and many are compared with it

# A gain in its standard errors, after one, two and three runs of the candidate: below the first number there is
# none, above the second there is one, between them it is run again. Found by simulation (tests/test_noise.py), which
# moves the reference with every keep: its table is in docs/noise.md.
LOOKS = ((0.5, 3.0), (0.8, 2.5), (1.5, 1.5))
# The same by runs of equal seeds.
SEED_LOOKS = ((0.5, 3.0), (0.8, 2.5), (2.0, 2.0))
# The same for pairs: each stands alone, where other candidates share one reference, so more of them are lucky.
PAIR_LOOKS = ((1.0, math.inf), (1.6, 3.8), (3.0, 3.0))
UNEVEN_PAIR = 0.10  # share of throughput by which the ends of a pair may differ, and one pair still ends it
UNEVEN_LOAD = 2.0  # times the noise of a quiet machine: pairs that differ so much among themselves are judged by that
SHARPER = 0.85  # of the gain that is seen otherwise: as small must one be that is seen by equal seeds, to go by these
PAIRED_SIGMAS = 4.0  # of the difference at equal steps that asks for a second look
TEACHES_LESS = 2.0  # standard errors of it, beyond which a step of the new program teaches less
GAP_SIGMAS = 6.0  # of the difference between what validation and test gained: few rows, whose losses have long tails

# How much of the cores others may use, by backend: a GPU's host needs few of them.
OTHERS = {"cpu": lambda cores: 0.05 * cores, "metal": lambda cores: 0.5 * cores, "cuda": lambda cores: cores - 2}
EVEN = 0.05  # share of the cores by which the use of others may vary up and down, and it is part of the machine
UNEVEN = 2.0  # times the median step: how long the slowest twentieth may take
SWAPPED = 256  # MB, moved to disk during the budget


def busy(run):
    """What disturbed a run, in words, or None. run: a record."""
    seen = run.get("machine") or {}
    others, cores, steps = seen.get("other_cores"), seen.get("cores") or 1, seen.get("step_ms")
    if record.paused(run) > 0.01 * run["budget"]:
        return f"it stood still for {record.paused(run):.0f} s"
    if others is not None and others > max(0.05, OTHERS[run["device"].get("backend", "cpu")](cores)):
        return f"other processes used {others:.1f} of {cores} cores"
    if steps and steps[2] > UNEVEN * steps[1]:
        return f"steps were uneven: the slowest twentieth took over {steps[2] / steps[1]:.1f} times the median"
    if (seen.get("swapped_mb") or 0) > SWAPPED:
        return f"{seen['swapped_mb']} MB were swapped to disk"
    if seen.get("speed_limit_percent", 100) < 95:
        return f"heat held the processor to {seen['speed_limit_percent']} %"
    return None


def even_load(new, old):
    """(least, most) cores that others used beside most runs of both programs, where none was quiet; else None."""
    runs = [*new, *old]
    if not (new and old) or not all((busy(r) or "").startswith("other processes") for r in runs):
        return None
    middle, cores = float(np.median([r["machine"]["other_cores"] for r in runs])), runs[0]["machine"]["cores"]
    band = middle - EVEN * cores, middle + EVEN * cores
    inside = [[band[0] <= r["machine"]["other_cores"] <= band[1] for r in side] for side in (new, old)]
    return band if all(map(any, inside)) and sum(map(sum, inside)) > 0.6 * len(runs) else None


def beside(load):
    """`busy`, to which an even load (see `even_load`) is part of the machine."""

    def disturbed(run):
        inside = load and load[0] <= (run["machine"].get("other_cores") or 0.0) <= load[1]
        return None if inside else busy(run)

    return disturbed


def alike(one, other):
    """Whether two runs made in turn are a pair, from what `busy` says of each: the load neither came nor went."""
    return bool(one) == bool(other)


# --- evidence ------------------------------------------------------------------------------------------


@dataclass
class Side:
    """All runs of one program, as far as a verdict looks at them."""

    bpbs: list  # bits per byte, a run
    rates: list  # tokens a second
    busy: list = None  # what disturbed it, or None
    lines: int = 0  # of code
    seeds: list = None

    def __post_init__(self):
        self.busy = self.busy or [None] * len(self.bpbs)
        self.quiet = [i for i, reason in enumerate(self.busy) if not reason]
        self.used = self.quiet or range(len(self.bpbs))  # disturbed runs count only where there are no others

    @property
    def runs(self):
        return len(self.used)

    @property
    def bpb(self):
        return float(np.mean([self.bpbs[i] for i in self.used]))

    @property
    def rate(self):
        return float(np.mean([self.rates[i] for i in self.used]))

    @property
    def disturbed(self):
        return next((self.busy[i] for i in self.used if self.busy[i]), None)


@dataclass
class Verdict:
    word: str  # again, keep, discard, rerun, judge
    rule: str
    next: str = ""  # what to type where it is `rerun`
    new: Side = None
    old: Side = None
    gain: float = 0.0  # bits per byte; above 0 the candidate is better
    error: float = math.nan  # its standard error
    faster: float = 0.0  # share of throughput won
    pairs: int = 0  # run in turn, by which it was decided
    notes: list = field(default_factory=list)


def in_t(sigmas, df):
    """How many standard errors `sigmas` become where the noise was estimated with `df` degrees of freedom.

    Exact for one and two, and else the expansion of Student's t about the normal distribution
    (Abramowitz and Stegun 26.7.5).
    """
    if math.isinf(sigmas):
        return sigmas
    z, tail = sigmas, NormalDist().cdf(-sigmas)
    if df == 1:
        return 1 / math.tan(math.pi * tail)
    if df == 2:
        return (1 - 2 * tail) / math.sqrt(2 * tail * (1 - tail))
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / df**power for power, term in enumerate(terms, 1))


def difference(new, old, noise):
    """(how much lower val_bpb is, sigma of one run, its degrees of freedom, spread, by how many equal seeds).

    sigma * spread is the standard error. Where both ran with the same seeds and that leaves clearly less noise, only
    these runs are compared.
    """
    spread, pairs = math.sqrt(1 / new.runs + 1 / old.runs), at_equal_seeds(new, old)
    if pairs and noise.same_seed_df:
        sharp = in_t(2.5, noise.same_seed_df) * noise.same_seed * math.sqrt(2 / len(pairs))
        own = float(np.std(pairs, ddof=1)) / math.sqrt(2) if len(pairs) > 1 else 0.0
        if sharp < SHARPER * in_t(2.5, noise.df) * noise.bpb * spread and own <= UNEVEN_LOAD * noise.same_seed:
            return float(np.mean(pairs)), noise.same_seed, noise.same_seed_df, math.sqrt(2 / len(pairs)), len(pairs)
    return old.bpb - new.bpb, noise.bpb, noise.df, spread, 0


def at_equal_seeds(new, old):
    """How much lower val_bpb is at each seed with which both ran undisturbed."""
    runs = [{side.seeds[i]: side.bpbs[i] for i in side.quiet} if side.seeds else {} for side in (new, old)]
    return [runs[1][seed] - runs[0][seed] for seed in sorted(runs[0].keys() & runs[1].keys())]


def decide(new, old, noise, pairs=(), equal_steps=None, unearned=None):
    """The rule for keeping.

    new, old: `Side`. noise: `record.Noise`. pairs: of runs made in turn on a shared machine, each (new, old) as
    (val_bpb, tokens a second). equal_steps: see `record.at_equal_steps`; unearned: see `not_earned`. The verdict's
    sides are those that decided.
    """
    gain, sigma, df, spread, by_seeds = difference(new, old, noise)
    result, looks, levels = Verdict("", "", new=new, old=old, gain=gain), new.runs, LOOKS
    result.faster = new.rate / old.rate - 1 if old.rate else 0.0
    more, more_of_old = max(0, RUNS - new.runs), max(0, REFERENCE_RUNS - old.runs)
    again = "make run REFERENCE=1" if more_of_old else "make run AGAIN=1"
    if by_seeds:
        looks, levels, mine, theirs = by_seeds, SEED_LOOKS, {*new.seeds}, {*old.seeds}
        more, more_of_old = max(0, RUNS - max(looks, new.runs)), 0  # chosen seeds may never meet
        again = f"make run {'AGAIN' if theirs - mine else 'REFERENCE' if mine - theirs else 'PAIR'}=1"
    if new.busy[-1] or old.busy[-1]:
        again = "make run PAIR=1"
    explains = new.disturbed if result.gain <= 0 else old.disturbed
    if explains and not pairs:
        words = f"the machine was shared: {explains}; at most {counted(RUNS, 'pair')} to settle it"
        return replace(result, word="rerun", next="make run PAIR=1", rule=words)
    # Both ends of a pair were disturbed alike; without a load pairs decide where they are no less sharp than all runs.
    by_pairs = bool(pairs) and bool(new.disturbed or old.disturbed or 2 / len(pairs) < 1.001 * spread**2)
    if by_pairs:
        differences = np.array([a[0] - b[0] for a, b in pairs])
        result.gain, result.faster = -float(differences.mean()), float(np.mean([a[1] / b[1] for a, b in pairs])) - 1
        result.new = Side([a[0] for a, _ in pairs], [a[1] for a, _ in pairs], lines=new.lines)
        result.old = Side([b[0] for _, b in pairs], [b[1] for _, b in pairs], lines=old.lines)
        own = float(differences.std(ddof=1)) / math.sqrt(2) if len(pairs) > 1 else math.nan
        if not df or own > UNEVEN_LOAD * sigma:
            df = len(pairs) - 1
        sigma = own if math.isnan(sigma) or own > sigma else sigma
        looks, levels, spread, again = len(pairs), PAIR_LOOKS, math.sqrt(2 / len(pairs)), "make run PAIR=1"
        more, more_of_old = 2 * max(0, RUNS - len(pairs)), 0
        result.pairs = len(pairs)
        result.notes.append(f"by {counted(len(pairs), 'pair')}, run in turn")
    elif by_seeds:
        words = f"by {counted(looks, 'equal seed')}, which leave ± {sigma:.6f} of a run's ± {noise.bpb:.6f}"
        result.notes.append(words)
    # figures are told to six places: a limit is met where they meet it
    result.gain, result.faster = round(result.gain, 9), round(result.faster, 9)
    earned = min(result.faster, 0.0) if by_pairs else result.faster  # a load changes speed most of all
    faster, simpler = earned > FASTER and not unearned, new.lines < old.lines
    if df:
        result.error = float(sigma * spread)
        low, high = levels[min(looks, 2 if more or more_of_old else RUNS) - 1]
        high = in_t(high, df)
        z = result.gain / max(result.error, 1e-12)
        seen = 1 if z >= high else -1 if z <= -high else 0
        asked = f"{high:.1f} are asked for" if high < 50 else "but so few runs hardly tell what noise is"
        told, why = f"noise could make this difference ({z:+.1f} standard errors, {asked})", ""
        if low <= z < high:
            why = told
        elif -high < z < low and (faster or simpler):
            why = f"{told}, and it is {'simpler' if simpler else 'faster'}"
        elif looks < 2 and not seen and not why:
            if equal_steps and equal_steps[0] < -PAIRED_SIGMAS * equal_steps[1]:
                why = "at equal steps its training loss is clearly lower"
            elif by_pairs and abs(result.faster) > UNEVEN_PAIR:
                why = "the ends of the pair were not equally fast: a load came or went between them"
            elif not noise.same_seed_df and sum(at_equal_seeds(new, old)) > 0:
                why = "it is better at equal seeds, and what the seed makes is not known yet"
        if (why and more) or (not seen and more_of_old):
            needed = counted(more_of_old + (more if why else 0), "more run") + (" of the reference" if not why else "")
            return replace(result, word="rerun", next=again, rule=f"{why or told}; at most {needed} to settle it")
    elif any((*new.busy, *old.busy)):
        words = "the machine was shared, and noise is unknown"
        if by_pairs:
            words += f": at most {counted(RUNS - len(pairs), 'more pair')} to settle it"
        return replace(result, word="rerun", next=again, rule=words)
    else:
        result.notes.append(f"noise is unknown: make run REFERENCE=1 N={REFERENCE_RUNS} measures it")
        seen = (result.gain > SAME) - (result.gain < -SAME)
        if not seen and looks < 2 and not faster:
            return replace(result, word="rerun", next=again, rule=f"within {SAME} and noise is unknown: look twice")
    result.word, result.rule = table(seen, result.gain, earned, simpler)
    if df and not seen and result.word == "discard":
        result.rule += f" ({z:+.1f} standard errors)"
    if unearned and earned > 0:
        word, rule = table(seen, result.gain, 0.0, simpler)
        if word != result.word:
            result.word, rule = unearned[0], f"{rule}, and throughput keeps nothing here: {unearned[1]}"
        result.rule = rule
    return result


def not_earned(run, other, equal_steps):
    """None, or (verdict, why) where throughput that rose keeps no run: tokens are counted when they are drawn.

    run, other: records of candidate and reference, or None. equal_steps: see `record.at_equal_steps`.
    """
    steps = [[r["training"].get(key) for key in ("tokens_per_step", "sequence_length")] for r in (run, other) if r]
    if len(steps) < 2 or steps[0] != steps[1]:
        return "discard", "steps take another number of tokens, and what is drawn need not be trained"
    if equal_steps is None:
        return "discard", "no run of the reference with this seed shows the loss at equal steps"
    if equal_steps[0] > TEACHES_LESS * equal_steps[1]:
        return "judge", f"a step teaches less ({equal_steps[0]:+.4f} nats a token at equal steps)"
    return None


def table(seen, gain, faster, simpler):
    """What is left to decide: (verdict, rule). seen: 1 a gain, -1 a loss, 0 no difference."""
    if seen > 0 and faster >= -SLOWER:
        return "keep", "val_bpb improved, throughput fell by at most 15 %"
    if seen > 0 and gain < CLEAR:
        return "discard", f"val_bpb improved by less than {CLEAR}, throughput fell by more than 15 %"
    if seen > 0:
        return "judge", f"val_bpb improved by {CLEAR} or more, throughput fell by more than 15 %"
    if seen == 0 and faster > FASTER:
        return "keep", "no difference seen, throughput rose by more than 10 %"
    if seen == 0 and simpler and faster >= -SIMPLER_COSTS:
        return "keep", "no difference seen with fewer lines (simpler)"
    if seen < 0 and gain > -SMALL and faster > MUCH_FASTER:
        return "keep", f"val_bpb worse by less than {SMALL}, throughput rose by more than 25 %"
    return "discard", "val_bpb worse" if seen < 0 else "no difference seen"


# --- from records ----------------------------------------------------------------------------------------


class Incomparable(Refused):
    """The runs differ in more than the experiment. `budget`: the reference's, where that is all."""

    budget = None


def side(blob, like, disturbed=busy):
    """(all runs of a program that may be compared with the record `like` as a `Side`, their records)."""
    runs = record.runs_of(blob, like)
    code = session.essence(session.text_of(blob) or "")
    return Side([record.bpb(r) for r in runs], [record.tok_sec(r) for r in runs], [disturbed(r) for r in runs],
                len(code.splitlines()) if code else 0, [r["seed"] for r in runs]), runs  # fmt: skip


def quiet_noise(like):
    """`record.Noise` of all runs like this one that nothing disturbed."""
    return record.noise(like, lambda run: not busy(run))


def of_attempt(sitting, attempt, rows):
    """The `Verdict` on a run of the session `sitting`, its reference's row, its record, and one of the reference.

    rows: of the table. What was logged is compared with those above its own.
    """
    run = session.record_of(attempt)
    if run is None:
        words = "the record of the newest run is gone from data/, or was changed: make run AGAIN=1"
        raise Refused(typed(words, attempt))
    row = sitting.reference(rows[: attempt["row"] - 1] if attempt.get("row") else rows, attempt["commit"])
    if row is None:
        words = "nothing was kept before: it becomes what all is compared with"
        return Verdict("keep", words, new=side(run["train_blob"], run)[0]), None, run, None
    new, new_runs = side(run["train_blob"], run)
    old, old_runs = side(row.blob, run)
    if not any(other["run_id"] != run["run_id"] for other in old_runs):
        known = [r for r in record.archived() if r["train_blob"] == row.blob and r["run_id"] != run["run_id"]]
        if known:
            unlike = record.differences(run, known[-1])
            refusal = Incomparable(f"not comparable with the last kept run {row.commit}: {'; '.join(unlike)}")
            if len(unlike) == 1 and run["budget"] != known[-1]["budget"]:
                refusal.budget = known[-1]["budget"]
            raise refusal
        old = old if old_runs else Side([row.bpb], [row.rate], lines=old.lines)
    noise, load = quiet_noise(run), even_load(new_runs, old_runs)
    if load:  # all stood under it alike, so it is as if the machine were a smaller one
        disturbed = beside(load)
        noise = record.noise(run, lambda r: busy(r) and not disturbed(r))
        new, old = (side(blob, run, disturbed)[0] for blob in (run["train_blob"], row.blob))
    if row.blob == run["train_blob"]:
        return Verdict("again", "the reference's own text: it measures noise", new=new, old=old), row, run, run
    text, kept = session.text_of(run["train_blob"]), session.text_of(row.blob)
    if text and kept and session.essence(text) == session.essence(kept) is not None:
        words = "only the seed, comments or layout differ from the reference: no idea to keep"
        return Verdict("again", words, new=new, old=old), row, run, old_runs and old_runs[-1]
    by_id, ends, pairs = {r["run_id"]: r for r in (*new_runs, *old_runs)}, {}, []
    for attempt in sitting.attempts():
        end = by_id.get(attempt.get("run_id"))
        if end and attempt.get("pair"):
            ends.setdefault(attempt["pair"], {})[end["train_blob"]] = end
    for pair in ends.values():
        a, b = pair.get(run["train_blob"]), pair.get(row.blob)
        if a and b and alike(busy(a), busy(b)):
            pairs.append(tuple((record.bpb(end), record.tok_sec(end)) for end in (a, b)))
    twin = next((r for r in sorted(old_runs, key=lambda r: bool(busy(r))) if r["seed"] == run["seed"]), None)
    equal = record.at_equal_steps(run, twin) if twin else None
    used = [old_runs[i] for i in old.used] if old_runs else []  # what is shown is shown beside a run that counts
    other = next((r for r in used if r["seed"] == run["seed"]), used[-1] if used else None)
    twins = ((a, b) for a in (run, *new_runs) for b in old_runs if a["seed"] == b["seed"])
    shown = next(filter(None, (record.at_equal_steps(a, b) for a, b in twins)), None)
    verdict = decide(new, old, noise, pairs, equal, not_earned(run, other, shown))
    if load:
        apart = len(new.bpbs) + len(old.bpbs) - new.runs - old.runs
        words = f"; {counted(apart, 'run')} that had more or less left out" if apart else ""
        verdict.notes.append(f"beside an even load: others used {sum(load) / 2:.1f} cores{words}")
    gap = other and record.held_out_gap(run, twin or other)
    if gap and abs(gap[0]) > max(GAP_SIGMAS * gap[1], SAME):
        verdict.word, verdict.next = "discard", ""
        verdict.rule = "validation and sealed rows of the test split moved apart, as where held-out text was learnt"
    if equal:
        words = f"at equal steps training loss differs by {equal[0]:+.4f} ± {equal[1]:.4f} nats a token"
        verdict.notes.append(f"{words}, in the second quarter of the budget")
    # Beside a run that had another load the load would be told, not the idea.
    like_it = [r for r in used if alike(busy(r), busy(run))] or [r for r in old_runs if alike(busy(r), busy(run))]
    partner = next((r for r in like_it if r["seed"] == run["seed"]), like_it[-1] if like_it else None)
    if on_rows := partner and record.on_same_rows(run, partner):
        words = "" if new.runs == old.runs == 1 else f" from one run of it, seed {partner['seed']}"
        verdict.notes.append(f"on the same rows val_bpb differs by {on_rows[0]:+.6f} ± {on_rows[1]:.6f}{words}")
    if not old_runs:
        verdict.notes.append(f"the record of {row.commit} is not in data/: its row was compared, the device was not")
    return verdict, row, run, other


def change(verdict):
    """The figures that decide, and how they moved, in words."""
    new, old = verdict.new, verdict.old
    bpb, rate = f"val_bpb {new.bpb:.6f}", f"{new.rate:.0f} tok/s"
    if old:
        error = "" if math.isnan(verdict.error) else f" ± {verdict.error:.6f}"
        bpb += f" ({-verdict.gain:+.6f}{error})"
        rate += f" ({100 * verdict.faster:+.1f} %)"
    return f"{bpb}, {rate}, {counted(new.runs, 'run')}" + (f" against {old.runs}" if old else "")


def same_seed(noise):
    """What is said beside the noise of a run where it is less between runs of equal seeds."""
    return f", ± {noise.same_seed:.6f} between equal seeds" if noise.same_seed < noise.bpb else ""


def typed(text, attempt):
    """A text in which commands that start a run have what was given for this one, else the two would not compare."""
    return re.sub(r"make (run|baseline)( [A-Z]+=\w+)*", lambda command: command[0] + attempt.get("given", ""), text)


def show(args):
    sitting = Session(args.tag)
    sitting.link()
    attempt = sitting.candidate()
    status = attempt["status"]
    if status == "running":
        raise Refused("the run has not ended yet")
    if status in ("interrupted", "paused"):
        raise Refused(typed(f"the newest run has no result ({attempt['reason']}): make run", attempt))
    if status != "valid":
        raise Refused(f"the newest run has no valid result ({status}): make log-result STATUS=crash DESC=…")
    rows, problems = sitting.rows()
    verdict, row, _, _ = of_attempt(sitting, attempt, rows)
    print(verdict.word)
    print(f"rule     {verdict.rule}")
    print(f"run      {(attempt['commit'] or '0' * 7)[:7]}  {change(verdict)}")
    if row:
        print(f"against  {row.commit}  val_bpb {verdict.old.bpb:.6f}, {verdict.old.rate:.0f} tok/s: {row.description}")
    logged = [f"logged, as row {attempt['row']}"] if attempt.get("logged") else []
    for note in [*logged, *verdict.notes, *problems]:
        print(f"note     {typed(note, attempt)}")
    if verdict.next:
        print(f"next     {typed(verdict.next, attempt)}")


if __name__ == "__main__":
    run_command(show, options(__doc__).parse_args())
