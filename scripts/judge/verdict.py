"""The rule for keeping: a candidate against the newest kept program, by the model of evidence. It changes nothing.

First `again`: the program is the reference, or computes the same. Then `rerun`: the model says which run may settle it.
The rest is a table. Differences at equal steps stand in a note.
"""

from collections import namedtuple
from dataclasses import dataclass, field
from statistics import NormalDist

from scripts import session
from scripts.judge.evidence import Comparison, Evidence, gain_words, of_session
from scripts.session import Refused, record

# --- the thresholds ---------------------------------------------------------------------------------

SURE = 0.93  # how sure one must be
BAR = NormalDist().inv_cdf(SURE)  # the same in standard errors
CLEAR = 0.005  # bits per byte: a gain that may cost throughput, and a loss that matters
WEAK = 2.0  # sigmas: a loss matters from CLEAR on, or from so many sigmas where that is more
SMALL = 0.003  # bits per byte: a loss that much throughput may pay for
SLOWER = 0.15  # share of throughput that a gain may cost without a question
FASTER, MUCH_FASTER = 0.10, 0.25  # share of throughput that keeps an equal, or a slightly worse, result
SIMPLER_COSTS = 0.05  # share of throughput that simpler code may cost
TEACHES_LESS = 2.0  # standard errors at equal steps, beyond which a step of the new program teaches less

# Which run is next: probability that the runs that are left show a gain, below which it is not made (usual: 0.1 to
# 0.2); how it is said; what to type. A run of the reference serves all candidates to come.
NEXT = {
    "old": (0.03, "another run of the reference", "make run REFERENCE=1"),
    "new": (0.25, "another run of it", "make run AGAIN=1"),
}


# --- the rule ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """All that the rule looks at."""

    seen: Comparison
    promise: float  # probability that the runs that are left show a gain
    matters: float  # bits per byte: the least difference that matters
    harmless: float  # probability that it loses less than that
    harmless_promise: float  # that the runs that are left show it
    next: str | None = None  # "new", "old": which run would say most
    fewer_lines: bool = False
    same: bool = False  # it computes what the reference computes
    unearned: tuple | None = None  # (verdict, why) where throughput that rose keeps nothing, see `not_earned`

    @classmethod
    def of(cls, evidence, new, old, **more):
        seen, matters = evidence.compare(new, old), max(CLEAR, WEAK * evidence.sigma)
        promise, unharmed = (evidence.outlook(new, old, BAR, least) for least in (0.0, -matters))
        harmless, run = evidence.chance(new, old, -matters), evidence.next_run(new, old)
        return cls(seen, promise, matters, harmless, unharmed, run, **more)


def rule(facts):
    """(verdict, why, which run is next)."""
    gain, faster = facts.seen.gain, facts.seen.faster
    if abs(faster) <= BAR * facts.seen.faster_error:  # a load makes speed uncertain, too
        faster = 0.0
    if facts.same and not (facts.fewer_lines or faster > FASTER):
        return "again", "its losses are the reference's, step by step: the change has no effect", None
    better, worse = facts.seen.sure >= SURE, facts.seen.sure <= 1 - SURE
    harmless = facts.same or facts.harmless >= SURE
    pays = harmless and faster > FASTER and not facts.unearned  # it is kept, whatever its gain turns out to be
    if facts.next and not (better or facts.same or pays):
        least, run, _ = NEXT[facts.next]
        may_pay = not harmless and (facts.fewer_lines or faster > FASTER)
        if facts.promise >= least or (may_pay and facts.harmless_promise >= least):
            return "rerun", f"{run} may settle it", facts.next
    word, why = table(better, worse, harmless, gain, faster, facts.fewer_lines)
    if facts.unearned and faster > 0:
        without = table(better, worse, harmless, gain, 0.0, facts.fewer_lines)
        if without[0] != word:
            return facts.unearned[0], f"{without[1]}, and throughput keeps nothing here: {facts.unearned[1]}", None
        why = without[1]
    if why == "not proven" and harmless and abs(gain) + BAR * facts.seen.error < facts.matters:
        why = f"no difference seen: more than {facts.matters:.4f} is ruled out"
    return word, why, None


def table(better, worse, harmless, gain, faster, fewer_lines):
    """What is left to decide: (verdict, why). harmless: a loss that matters is ruled out."""
    if better and faster >= -SLOWER:
        return "keep", f"val_bpb improved, and throughput did not fall by more than {100 * SLOWER:g} %"
    if better and gain < CLEAR:
        return "discard", f"val_bpb improved by less than {CLEAR}, throughput fell by more than {100 * SLOWER:g} %"
    if better:
        return "judge", f"val_bpb improved by {CLEAR} or more, throughput fell by more than {100 * SLOWER:g} %"
    if harmless and faster > FASTER:
        return "keep", f"no loss that matters, throughput rose by more than {100 * FASTER:g} %"
    if harmless and fewer_lines and faster >= -SIMPLER_COSTS:
        return "keep", "no loss that matters, with fewer lines (simpler)"
    if worse and gain > -SMALL and faster > MUCH_FASTER:
        return "keep", f"val_bpb worse by less than {SMALL}, throughput rose by more than {100 * MUCH_FASTER:g} %"
    return "discard", "val_bpb worse" if worse else "not proven"


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


# --- from records ----------------------------------------------------------------------------------------


class Incomparable(Refused):
    """The runs differ in more than the experiment."""


Side = namedtuple("Side", "bpb rate runs")  # of a program by the model: mean val_bpb, tokens a second, its runs


@dataclass
class Verdict:
    run: dict  # the record that is judged
    row: session.Row | None  # of its reference
    evidence: Evidence
    new: Side
    old: Side | None
    word: str = "again"  # again, keep, discard, rerun, judge
    rule: str = ""
    next: str = ""  # what to type where it is `rerun`
    seen: Comparison | None = None
    notes: list = field(default_factory=list)


def of_attempt(this_session, attempt, rows):
    """The `Verdict` on a run of the session `this_session`. rows: of the table; those below its own do not count."""
    run = session.record_of(attempt)
    if run is None:
        raise Refused("the record of the newest run is gone from data/, or was changed: make run AGAIN=1")
    before = rows[: attempt["row"] - 1] if attempt.get("row") else rows
    row = this_session.reference(before, attempt["commit"])
    records, observations = of_session(this_session.attempts(), rows, run)
    evidence, new = Evidence(observations), run["train_blob"]
    old = row and (row.blob or f"row {row.number}")
    verdict = Verdict(run, row, evidence, side(evidence, new), row and side(evidence, old))
    if gone := session.taken_back(before, row):
        verdict.notes.append(f"row {gone.number}, kept, is not on this branch: make discard says the way back")
    if row is None:
        verdict.word, verdict.rule = "keep", "nothing was kept before: it becomes what all is compared with"
        return verdict
    old_runs = [r for r in records if r["train_blob"] == old]
    if not any(r["run_id"] != run["run_id"] for r in old_runs):  # where it has runs, one must be comparable
        known = [r for r in record.archived() if r["train_blob"] == row.blob and r["run_id"] != run["run_id"]]
        if known and (unlike := record.differences(run, known[-1])):
            raise Incomparable(f"not comparable with the last kept run {row.commit}: {'; '.join(unlike)}")
    verdict.rule = again(new, old)
    if verdict.rule:
        return verdict
    other = old_runs[-1] if old_runs else None
    twins = [(a, b) for a in records if a["train_blob"] == new for b in old_runs if a["seed"] == b["seed"]]
    equal = next(filter(None, (record.at_equal_steps(a, b) for a, b in twins)), None)
    facts = Facts.of(evidence, new, old, fewer_lines=0 < code_lines(new) < code_lines(old),
                     same=any(record.same_losses(a, b) for a, b in twins),
                     unearned=not_earned(run, other, equal))  # fmt: skip
    verdict.word, verdict.rule, following = rule(facts)
    verdict.next = NEXT[following][2] if following else ""
    verdict.seen = facts.seen
    if not other:
        verdict.notes.append(f"the record of {row.commit} is not in data/: its row was compared, the device was not")
    if equal:
        words = f"{abs(equal[0]):.4f} ± {equal[1]:.4f} nats a token {'lower' if equal[0] < 0 else 'higher'}"
        verdict.notes.append(f"at equal steps, in the second quarter, training loss is {words}")
    return verdict


def side(evidence, program):
    return Side(evidence.mean(program), evidence.rate(program), sum(run.program == program for run in evidence.runs))


def again(new, old):
    """Why a program is the reference over again, by its text; empty where it is not."""
    if new == old:
        return "the reference's own text: it measures noise"
    text, kept = session.text_of(new), session.text_of(old)
    if text and kept and session.essence(text) == session.essence(kept) is not None:
        return "only the seed, comments or layout differ from the reference: no idea to keep"
    return ""


def code_lines(blob):
    return len((session.essence(session.text_of(blob) or "") or "").splitlines())


def can_be_a_row(this_session, attempt, rows):
    """Whether log-result would take a run: one with another budget, say, or a repeat has no place in the table."""
    repeat = any((row.blob, row.status) == (attempt["train_blob"], "discard") for row in rows)
    if attempt["status"] != "valid" or repeat:
        return False
    try:
        return of_attempt(this_session, attempt, rows).word != "again"
    except Refused:
        return False


def reason(verdict, gain=True):
    """The rule that decided, and what it rests on: gain, error, how sure it is, and how sure it must be."""
    words = [verdict.rule]
    if verdict.seen and gain:
        words.append(f"gain {gain_words(verdict.seen)} sure")
    if verdict.word == "rerun" or verdict.rule == "not proven":
        words.append(f"{100 * SURE:g} % is asked")
    return "; ".join(words)
