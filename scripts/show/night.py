"""One session as a value: its experiments, what each gained, what was kept, what is open, what it cost.

Table, summary, page, brief and screen all say what is said here, so that they agree. It reads and changes nothing.
What is missing (records, git, repeats) is named in `Night.missing`, and the rest is there.
"""

import difflib
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from harness import record
from scripts import session
from scripts.judge.evidence import Comparison, Evidence, gain_words  # noqa: F401 (the views say a gain by it)
from scripts.judge.observations import of_session
from scripts.session import Session, counted, one_line

SAFE, DOUBTFUL = 0.975, 0.80  # how sure a kept gain is after the winner's curse: below the second it is unproven
CLOSE = 0.70  # how sure a gain was that was put back and is worth another look
PLATEAU = 10  # experiments without a kept change


@dataclass(eq=False)
class Experiment:
    """A row of the table and all that is known of it."""

    row: session.Row
    event: dict  # what was noted when it was logged; empty for a row that was written by hand
    before: "Experiment | None" = None  # what it was compared with
    runs: list = field(default_factory=list)  # comparable records of its program, the oldest first
    bpb: float = 0.0  # of its program, by all its runs
    rate: float = 0.0  # tokens a second, likewise
    gain: Comparison | None = None  # against `before`; None of a crash and of the first row
    left: Comparison | None = None  # what the winner's curse leaves of that
    reason: str = ""  # why its run has no result
    diff: list = field(default_factory=list)  # lines of the change of train.py; empty where git does not know both

    def __getattr__(self, name):  # number, commit, status, description, blob, memory
        return getattr(self.row, name)

    @property
    def program(self):
        """The name by which the evidence knows its program; without git a row stands for itself."""
        return self.blob or f"row {self.number}"

    @property
    def trust(self):
        """Of a kept change: whether its gain is safe, doubtful or unproven. Empty for all others."""
        if self.status != "keep" or not self.left:
            return ""
        return "safe" if self.left.sure >= SAFE else "doubtful" if self.left.sure >= DOUBTFUL else "unproven"

    @property
    def changed(self):
        """How many lines of train.py were added and removed: `+3/-2`."""
        signs = Counter(line[0] for line in self.diff if line)
        return f"+{signs['+']}/-{signs['-']}" if self.before else ""


class Night:
    """All of a session: `Night("nov24")`."""

    def __init__(self, tag):
        self.tag, sitting = tag, Session(tag)
        rows, self.problems = sitting.rows()
        self.attempts, self.events, logged = sitting.attempts(), sitting.events(), sitting.logged()
        self.records = {r["run_id"]: r for r in record.archived()}
        self.experiments = [Experiment(row, matching(logged, row)) for row in rows]
        self.kept = [e for e in self.experiments if e.status == "keep"]
        self.first = self.kept[0] if self.kept else None
        self._references()
        self.evidence, self.best, self.like = None, None, self._last_kept_record()
        if valid := [e for e in self.experiments if e.status != "crash"]:
            self._compare(valid)
        texts = {blob: session.text_of(blob) for blob in {e.blob for e in self.experiments}}
        self.texts = {blob: text.strip().split("\n") for blob, text in texts.items() if text}
        reasons = {a["id"]: a.get("reason") for a in self.attempts}
        for e in self.experiments:
            if e.before and e.blob in self.texts and e.before.blob in self.texts:
                sides = self.texts[e.before.blob], self.texts[e.blob]
                e.diff = list(difflib.unified_diff(*sides, lineterm=""))[2:]  # without its two head lines
            e.reason = one_line(reasons.get(e.event.get("id"))) or ("crashed" if e.status == "crash" else "")
        self.running = any(a["status"] == "running" for a in self.attempts)
        self.looks = [event for event in self.events if event["event"] == "holdout"]  # at the test split
        self.missing = [*self.problems, *self._what_is_missing()]

    # --- building it ---

    def _references(self):
        last, by_commit = None, {}
        for e in self.experiments:
            e.before = by_commit.get((e.event.get("reference") or "")[:7], last)
            if e.status == "keep":
                last = by_commit[e.commit] = e

    def _last_kept_record(self):
        """The newest record of the last kept program that has one: all that is compared is like it."""
        newest = {run["train_blob"]: run for run in self.records.values()}
        return next((newest[e.blob] for e in reversed(self.kept) if e.blob in newest), None)

    def _compare(self, valid):
        """Gains by one model of all runs; a row whose records are gone counts as one run with the row's figures."""
        alike, observations = of_session(self.attempts, [e.row for e in valid], self.like)
        for e in valid:
            e.runs = [run for run in alike if run["train_blob"] == e.blob]
        parents = {e.program: e.before.program for e in valid if e.before}
        self.evidence = Evidence(observations, parents)
        for e in valid:
            e.bpb = self.evidence.mean(e.program)
            e.rate = self.evidence.rate(e.program)
            if e.before:
                e.gain = self.evidence.compare(e.program, e.before.program)
                e.left = self.evidence.shrunk(e.program, e.before.program)
        if self.kept:
            best = self.evidence.best([e.program for e in self.kept])
            self.best = next(e for e in self.kept if e.program == best)

    def _what_is_missing(self):
        gone = sum(a["status"] == "valid" and a["run_id"] not in self.records for a in self.attempts)
        by_hand = [e.number for e in self.experiments if e.event.get("line") != e.row.line]
        unread = [e.number for e in self.experiments if e.blob not in self.texts]
        if gone:
            yield f"{gone} of {len(self.attempts)} runs have no record in data/, or a damaged one"
        if by_hand:
            yield f"written or edited by hand: {numbers(by_hand)}"
        if unread:
            yield f"git does not know the program of {numbers(unread)}: no diff"
        if self.evidence and not self.evidence.df:
            yield "no program ran twice undisturbed, so the noise is a guess: make run REFERENCE=1 N=4 measures it"
        if self.best is not self.first and not self.looks:
            yield "the gain was not measured on held-out text: make holdout does that"

    # --- what it says ---

    @property
    def gain(self):
        """The best against the baseline; None where nothing is better than the baseline."""
        return self.evidence.compare(self.best.program, self.first.program) if self.best is not self.first else None

    @property
    def left(self):
        """What the winner's curse leaves of the gain."""
        return self.evidence.shrunk(self.best.program, self.first.program) if self.best is not self.first else None

    @property
    def held_out(self):
        """(gain on the test split in words, whether that agrees) of the newest look at it, or None."""
        if not self.looks:
            return None
        gain, error = self.looks[-1]["test"]
        one_pair = not error or error != error
        words = f"{gain:+.4f} by one pair" if one_pair else f"{gain:+.4f} ± {error:.4f}"
        return words, not one_pair and gain > 2 * error

    @property
    def chain(self):
        """The kept experiments that the best one stands on, the baseline first; a rewind leaves others out."""
        found, e = [], self.best
        while e and e not in found:
            found.insert(0, e)
            e = e.before
        return found

    @property
    def counts(self):
        """What became of the experiments, in words."""
        count = Counter(e.status for e in self.experiments)
        return f"{len(self.kept[1:])} kept after the baseline, {count['discard']} discarded, {count['crash']} crashed"

    @property
    def near_misses(self):
        """Discarded, though they are probably better than their reference; the surest first."""
        close = [e for e in self.experiments if e.status == "discard" and e.gain and e.gain.sure > CLOSE]
        return sorted(close, key=lambda e: -e.gain.sure)

    @property
    def dead_ends(self):
        """Discarded and crashed, and no near miss; the newest first."""
        close = self.near_misses
        return [e for e in reversed(self.experiments) if e.status != "keep" and e not in close]

    @property
    def questions(self):
        """[(experiment, what it left open)], the newest first."""
        asked = [(e, one_line(e.event.get("question"))) for e in reversed(self.experiments)]
        return [(e, text) for e, text in asked if text]

    @property
    def plateau(self):
        """What to do after so long without a kept change, in words; empty where there is no plateau."""
        since = len(self.experiments) - (self.kept[-1].number if self.kept else 0)
        close = [str(e.number) for e in self.near_misses[:2]]
        if since < PLATEAU:
            return ""
        together = f", or two near misses together ({' and '.join(close)})" if len(close) == 2 else ""
        return f"nothing was kept in {since} experiments: try something large{together}"

    @property
    def span(self):
        """(when the first run began, when the last thing was noted) as datetimes, or None."""
        times = [time for event in self.events if (time := parsed(event.get("time")))]
        return (times[0], times[-1]) if times else None

    @property
    def seconds(self):
        return (self.span[1] - self.span[0]).total_seconds() if self.span else 0.0

    @property
    def circumstances(self):
        """How much was done, when and where, in words."""
        found = [f"{counted(len(self.experiments), 'experiment')} in {clock(self.seconds)}"]
        if self.span:
            found.append(f"from {self.span[0]:%d %b %H:%M}")
        if self.like:
            name = one_line(str(self.like["device"].get("name")))
            found.append(f"{self.like['budget']:g} s each on {name}, {self.like['dataset']}")
        return ", ".join(found)

    @property
    def cost(self):
        """{what: seconds} of the whole session."""
        spent, seen = Counter(), set()
        for a in self.attempts:
            wall, run = a.get("wall_seconds") or 0.0, self.records.get(a.get("run_id"))
            repeat = a["role"] == "reference" or a["train_blob"] in seen
            kind = "hold-out" if a["role"] == "holdout" else "failed" if a["status"] != "valid" else "repeats" * repeat
            training = run["training"]["seconds"] if run and not kind else 0.0
            spent["training"] += training
            spent[kind or "start-up, evaluation"] += wall - training
            seen.add(a["train_blob"])
        spent["between runs"] = max(0.0, self.seconds - spent.total())
        return spent


def matching(logged, row):
    """What was noted when a row was logged: by its number, or where rows were moved by its commit; else {}."""
    for event in (logged.get(row.number), *logged.values()):
        if event and (event.get("commit") or "0" * 7)[:7] == row.commit and event.get("row_status") == row.status:
            return event
    return {}


def parsed(stamp):
    """A time that was noted, as a datetime in its own zone; None where it is none."""
    try:
        return datetime.fromisoformat(stamp).astimezone()
    except (TypeError, ValueError):
        return None


# --- words ---------------------------------------------------------------------------------------------


def numbers(found, most=6):
    """`row 3`, `rows 3, 5 and 4 more`."""
    words = ", ".join(map(str, found[:most])) + (f" and {len(found) - most} more" if len(found) > most else "")
    return f"row{'s' * (len(found) > 1)} {words}"


def clock(seconds):
    """`6 min`, `2 h 05 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
