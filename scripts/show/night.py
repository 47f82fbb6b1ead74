"""One session as a value: its experiments, what each gained, what was kept, what is open, what it cost.

Table, page, brief and screen say what is said here, so that they agree. It reads and changes nothing. What is missing
(records, git, repeats) is named in `Night.missing`, and the rest is there.
"""

import difflib
import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from harness import record
from scripts import session
from scripts.judge.evidence import CLOSE, DOUBTFUL, SAFE, Comparison, Evidence, of_session
from scripts.session import Session, counted, cut, one_line


@dataclass(eq=False)
class Experiment(session.Row):
    """A row of the table and all that is known of it. `bpb` and `rate` become its program's, by all its runs."""

    before: "Experiment | None" = None  # what it was compared with
    runs: list = field(default_factory=list)  # comparable records of its program, the oldest first
    gain: Comparison | None = None  # against `before`; None of a crash and of the first row
    left: Comparison | None = None  # what the winner's curse leaves of that
    worth: Comparison | None = None  # what it is still worth, see judge/ablate.py
    text: str | None = None  # its train.py; None where git does not know it
    diff: list = field(default_factory=list)  # lines of the change of train.py
    reason: str = ""  # why its run has no result

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
        signs = Counter(line[:1] for line in self.diff)
        return f"+{signs['+']}/-{signs['-']}" if self.diff else ""


class Night:
    """All of a session: `Night("nov24")`."""

    def __init__(self, tag):
        self.tag, this_session = tag, Session(tag)
        rows, self.missing = this_session.rows()
        self.attempts, self.events = this_session.attempts(), this_session.events()
        self.records = {r["run_id"]: r for r in record.archived()}
        self.experiments = [Experiment(**vars(row)) for row in rows]
        self.kept = [e for e in self.experiments if e.status == "keep"]
        self.looks = [event for event in self.events if event["event"] == "holdout"]  # at the test split
        self.sample = next((event for event in reversed(self.events) if event["event"] == "sample"), None)
        self.ablations = ablations(self.events)
        self._explain()
        self._compare()
        self.missing += self._what_is_missing()
        self.chain = self.chain_of(self.best)
        # the program that is taken apart: the best, or the one that was begun with
        self.apart = next((e for e in self.kept if self.ablations and e.program == self.ablations[0]["of"]), self.best)
        self.idle = [e for e in self.kept if e.worth and e.worth.sure < DOUBTFUL]  # carry nothing, as far as measured
        self.tried = counted(max(0, len(self.experiments) - 1), "experiment")  # the baseline is none
        put_back = [e for e in self.experiments if e.status == "discard" and e.gain and e.gain.sure > CLOSE]
        self.near_misses = sorted(put_back, key=lambda e: -e.gain.sure)  # probably better than their reference
        self.dead_ends = [e for e in reversed(self.experiments) if e.status != "keep" and e not in put_back]
        asked = [(e, one_line(e.event.get("question"))) for e in reversed(self.experiments)]
        self.questions = [(e, text) for e, text in asked if text]  # what each left open

    # --- building it ---

    def _explain(self):
        """What each experiment was compared with, its diff, and why its run has no result."""
        last, by_commit, reasons = None, {}, {a["id"]: a.get("reason") for a in self.attempts}
        for e in self.experiments:
            e.before = by_commit.get((e.event.get("reference") or "")[:7], last)
            e.text, e.reason = session.text_of(e.blob), one_line(reasons.get(e.event.get("id")))
            if e.before and e.text and e.before.text:
                sides = (side.text.split("\n") for side in (e.before, e))
                e.diff = list(difflib.unified_diff(*sides, lineterm=""))[2:]  # without its two head lines
            if e.status == "keep":
                last = by_commit[e.commit] = e

    def _compare(self):
        """Gains by one model of all runs; a row whose records are gone counts as one run with the row's figures."""
        self.first = self.best = self.evidence = None
        self.gain = self.left = None  # of the best against the baseline; None where nothing is better than the baseline
        made = [a for a in self.attempts if a["role"] != "holdout" and a.get("run_id") in self.records]
        newest = {a["train_blob"]: self.records[a["run_id"]] for a in made}
        self.like = next((newest[e.blob] for e in reversed(self.kept) if e.blob in newest), None)
        valid = [e for e in self.experiments if e.status != "crash"]
        if not valid:
            return
        alike, observations = of_session(self.attempts, valid, self.like)
        parents = {event["program"]: event["of"] for event in self.ablations}
        # of a program that has several rows by its first, or two could be each other's
        parents |= {e.program: e.before and e.before.program for e in reversed(valid)}
        self.evidence = Evidence(observations, parents)
        for e in valid:
            e.runs = [run for run in alike if run["train_blob"] == e.blob]
            e.bpb, e.rate = self.evidence.mean(e.program), self.evidence.rate(e.program)
            if e.before:
                e.gain = self.evidence.compare(e.program, e.before.program)
                e.left = self.evidence.shrunk(e.program, e.before.program)
        if self.kept:
            self.first, self.best = self.kept[0], min(self.kept, key=lambda e: e.bpb)
        if self.best is not self.first:
            self.gain = self.evidence.compare(self.best.program, self.first.program)
            self.left = self.evidence.shrunk(self.best.program, self.first.program)
        for event in self.ablations:
            if event["program"] in self.evidence.column:
                change = next(e for e in self.experiments if e.number == event["change"])
                change.worth = self.evidence.compare(event["of"], event["program"])

    def _what_is_missing(self):
        gone = sum(a["status"] == "valid" and a["run_id"] not in self.records for a in self.attempts)
        if gone:
            yield f"{gone} of {len(self.attempts)} runs have no record in data/, or a damaged one"
        ran = {a["train_blob"] for a in self.attempts if a.get("run_id") in self.records}
        if apart := [str(e.number) for e in self.experiments if e.status != "crash" and e.blob in ran and not e.runs]:
            yield f"from another machine, text or budget, gains beside them mislead: rows {cut(', '.join(apart), 30)}"
        for lacks, words in {"event": "by hand", "text": "git does not know the program, so no diff"}.items():
            if numbers := [str(e.number) for e in self.experiments if not getattr(e, lacks)]:
                yield f"{words}: rows {cut(', '.join(numbers), 30)}"

    # --- what it says ---

    @property
    def foresight(self):
        """How often the gain that was expected held the gain that came, in words; empty where nobody said any."""
        said = [(e.event["expected"], e.gain.gain) for e in self.experiments if e.event.get("expected") and e.gain]
        if not said:
            return ""
        inside = sum(low <= gain <= high for (low, high), gain in said)
        hope = sum((low + high) / 2 - gain for (low, high), gain in said) / len(said)
        way = "hopeful" if hope > 0 else "careful"
        return f"right in {inside} of {len(said)}, on average {abs(hope):.4f} too {way}"

    def chain_of(self, e):
        """The kept experiments that one stands on, the baseline first; a rewind leaves others out."""
        found = []
        while e:
            found.insert(0, e)
            e = e.before
        return found

    @property
    def held_out(self):
        """{where: (gain on the test split, which wins, what is left, which look)}, the newest; "": as in the night."""
        found = {}
        for number, look in enumerate(self.looks, 1):
            gain, error = look["test"]
            best = "the best" if self.best and look["best"] == self.best.commit else look["best"]
            wins = f"{best if gain > 0 else 'the baseline'} wins" if abs(gain) > 2 * error else "not settled which wins"
            left = (f"{100 * gain / look['night']:.0f} %" if gain > 0 else "nothing") + " of the night's gain is left"
            where, (fresh, off) = look.get("where", ""), look["fresh"]
            if not where and self.gain and look["night"] - fresh > 2 * math.hypot(off, self.gain.error):
                left += f"; fresh runs show {look['night'] - fresh:.4f} less than it saw, beyond its noise"
            found[where] = f"{gain:+.4f} ± {error:.4f}", wins, left, f"look {number} at the test split"
        return found

    @property
    def circumstances(self):
        """What was done and what became of it, how long it took, when and where, in words."""
        count = Counter(e.status for e in self.experiments)
        found = [f"{self.tried}: {len(self.kept[1:])} kept, {count['discard']} discarded, {count['crash']} crashed"]
        if self.events:
            begun, ended = (datetime.fromisoformat(self.events[i]["time"]).astimezone() for i in (0, -1))
            found.append(f"{str(ended - begun).rpartition(':')[0]} h from {begun:%d %b %H:%M}")
        if self.like:
            name = one_line(str(self.like["device"].get("name")))
            found.append(f"{self.like['budget']:g} s each on {name}, {self.like['dataset']}")
        return "; ".join(found)


def ablations(events):
    """What was noted of the program that was taken apart last, a change each; nothing where one was kept since."""
    found = []
    for event in events:
        if event.get("row_status") == "keep" or (found and event.get("of", found[0]["of"]) != found[0]["of"]):
            found = []
        found += [event] if event["event"] == "ablation" else []
    return found
