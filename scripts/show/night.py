"""A session as a value: experiments, the kept chain, where it stands, what failed, what is open, what it cost.

The table, the report, the brief and the screen all say what is said here. It reads, and changes nothing; what is
missing (an archive, git, the noise) leaves a gap that is named in `Night.missing`, and the rest is there.
"""

import bisect
import difflib
import math
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from statistics import NormalDist

import numpy as np

from harness import project
from scripts import session
from scripts.judge import verdict
from scripts.judge.expected import Prior
from scripts.session import Session, one_line, record

PART = re.compile(r"(?:def|class) (\w+)|([A-Z][A-Z0-9_]*) *(?::[^=]*)?=|    def (\w+)")
SURE = NormalDist().inv_cdf(0.975)  # standard errors on either side of a 95 % interval
PLATEAU = 10  # experiments without a kept gain


@dataclass(eq=False)
class Experiment:
    """A row of the table and all that is known of it."""

    row: session.Row
    event: dict  # what was noted when it was logged; empty for a row that was written by hand
    before: "Experiment | None" = None  # what it was compared with
    runs: list = field(default_factory=list)  # comparable records of its program
    side: verdict.Side = None
    attempts: list = field(default_factory=list)  # all that ran on its behalf, repeats of the reference too
    gain: float = math.nan  # against `before`, by all runs of each; bits per byte, above 0 it is better
    error: float = math.nan  # its standard error
    expected: float = math.nan  # the gain after the winner's curse
    uncertain: float = math.nan  # the standard deviation of that
    added: int = 0
    removed: int = 0
    parts: list = field(default_factory=list)  # of train.py that it changed, the most lines first

    def __getattr__(self, name):  # number, commit, status, description, blob
        return getattr(self.row, name)

    @property
    def count(self):
        return self.side.runs if self.side else 0

    @property
    def bpb(self):
        return self.side.bpb if self.count else self.row.bpb

    @property
    def rate(self):
        return self.side.rate if self.count else self.row.rate

    @property
    def spread(self):
        """The standard deviation of its own runs; 0 where there is but one."""
        return float(np.std([self.side.bpbs[i] for i in self.side.used], ddof=1)) if self.count > 1 else 0.0

    @property
    def own(self):
        """The newest of its records, or None."""
        return self.runs[-1] if self.runs else None

    @property
    def failed(self):
        """Its attempts that crashed, were refused or cut off."""
        return [a for a in self.attempts if a["status"] not in ("valid", "running")]

    @property
    def undecided(self):
        """Whether it was given up before the runs that its verdict asked for."""
        return (self.event.get("verdict"), self.status) == ("rerun", "discard")

    @property
    def overruled(self):
        judged = self.event.get("verdict") in ("keep", "discard", "rerun")
        return judged and self.event["verdict"] != self.status and not self.undecided

    @property
    def mark(self):
        return "?" if self.undecided else "!" if self.overruled else ""

    @property
    def seconds(self):
        """That all its attempts took, start-up, evaluation and repeats with them."""
        return sum(a.get("wall_seconds") or 0.0 for a in self.attempts)

    @property
    def time(self):
        """When it was logged, or its newest run ended."""
        stamp = self.event.get("time") or (self.own or {}).get("timestamp")
        return parsed(stamp)


class Night:
    """All of a session: `Night("nov24")`."""

    def __init__(self, tag):
        self.tag, sitting = tag, Session(tag)
        rows, self.problems = sitting.rows()
        logged = sitting.logged()
        self.attempts, self.events = sitting.attempts(), sitting.events()
        self.records = {r["run_id"]: r for r in record.archived()}
        newest = {run["train_blob"]: run for run in self.records.values()}
        last = (newest[row.blob] for row in reversed(rows) if row.status == "keep" and row.blob in newest)
        self.like = next(last, None)  # of the last kept program that has a record: what the others are compared with
        self.experiments = [Experiment(row, matching(logged, row)) for row in rows]
        self._runs()
        self.noise = record.noise_of([run for _, run in self._quiet])
        self.kept = [e for e in self.experiments if e.status == "keep"]
        self.first = self.kept[0] if self.kept else None
        self.best = min(self.kept, key=lambda e: e.bpb) if self.kept else None
        self.expected = math.nan, math.nan  # gain of the best after the winner's curse, and its standard deviation
        self._references()
        self._attempts()
        self._gains()
        self.texts = texts([e.blob for e in self.experiments])
        self._changes()
        self.running = next((a for a in self.attempts if a["status"] == "running"), None)
        self.look = next((e for e in reversed(self.events) if e["event"] == "holdout"), None)  # at the test split
        self.missing = [*self.problems, *self._what_is_missing()]

    # --- building it ---

    def _runs(self):
        programs, self._then = {}, {}  # noise by experiment
        alike = [r for r in self.records.values() if self.like and not record.differences(r, self.like)]
        for run in alike:
            programs.setdefault(run["train_blob"], []).append(run)
        self.load = verdict.even_load(alike, alike)
        disturbed = verdict.beside(self.load)
        timed = [(parsed(run.get("timestamp")), run) for run in alike if not disturbed(run)]
        self._quiet = [(when, run) for when, run in timed if when]
        for e in self.experiments:
            e.runs = programs.get(e.blob, []) if e.status != "crash" else []
            if e.runs:
                e.side = verdict.Side([record.bpb(r) for r in e.runs], [record.tok_sec(r) for r in e.runs],
                                      [disturbed(r) for r in e.runs], seeds=[r["seed"] for r in e.runs])  # fmt: skip

    def _references(self):
        last, by_commit = None, {}
        for e in self.experiments:
            e.before = by_commit.get((e.event.get("reference") or "")[:7], last)
            if e.status == "keep":
                last = by_commit[e.commit] = e

    def _attempts(self):
        """Each attempt belongs to the experiment that was logged next."""
        ends = [(e.event["time"], e) for e in self.experiments if e.event.get("time")]
        place = 0
        for attempt in self.attempts:
            while place < len(ends) and ends[place][0] < attempt["started"]:
                place += 1
            if place < len(ends) and attempt["role"] != "holdout":
                ends[place][1].attempts.append(attempt)

    def _gains(self):
        compared = []
        for e in self.experiments:
            if e.before is None or e.status == "crash":
                continue
            e.gain, error, df = self.compare(e, e.before, self._noise_then(e))
            if any(x.side and x.side.disturbed for x in (e, e.before)):  # of unlike loads; what decided were pairs
                e.gain = e.event.get("gain") if isinstance(e.event.get("gain"), float) else e.gain
                continue
            e.error = error
            if not math.isnan(e.error):
                compared.append((e, wide(error, df)))
        if not compared:
            return
        compared, errors = zip(*compared, strict=True)
        gains = [e.gain for e in compared]
        prior = Prior.of(gains, errors)
        for e, mean, spread in zip(compared, *prior.expected(gains, errors), strict=True):
            e.expected, e.uncertain = float(mean), float(spread)
        chain = self.chain
        steps = [self.compare(e, e.before, self._noise_then(e)) for e in chain[1:]]
        means = chain[0].bpb - np.cumsum([0.0, *(gain for gain, _, _ in steps)])
        errors = [wide(error, df) / math.sqrt(2) for _, error, df in steps] or [wide(self.noise.bpb, self.noise.df)]
        means, spreads = prior.along(means, [*errors[:1], *errors] if steps else errors)
        for e, gain in zip(chain[1:], -np.diff(means), strict=True):
            e.expected = round(float(gain), 9) + 0.0  # no -0
        self.expected = round(float(means[0] - means[-1]), 9) + 0.0, math.hypot(spreads[0], spreads[-1])

    def _noise_then(self, e):
        """The noise as it was known when an experiment was logged: programs change during a night, and it with them."""
        if e not in self._then:
            end = bisect.bisect_right(self._quiet, e.time, key=lambda run: run[0]) if e.time else 0
            noise = record.noise_of([run for _, run in self._quiet[:end]])
            self._then[e] = noise if noise.df >= 3 else self.noise
        return self._then[e]

    def _changes(self):
        self.touched = set()
        for e in self.experiments:
            old, new = (self.texts.get(x.blob) if x else None for x in (e.before, e))
            if old is not None and new is not None:
                e.added, e.removed, e.parts = change(old, new)
                self.touched.update(e.parts)

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
        if self.experiments and not self.noise.df:
            measure = self.typed("make run REFERENCE=1 N=4")
            yield f"nothing was run twice on a quiet machine, so noise is unknown: {measure} measures it"
        if self.load:
            yield f"no run was quiet: noise and gains are those beside an even load of {sum(self.load) / 2:.1f} cores"
        if self.best is not self.first and not self.look:
            yield "the gain was not measured on held-out text: make holdout does that"

    def typed(self, command):
        """A command as it is to be typed in this session, see `verdict.typed`."""
        return verdict.typed(command, self.attempts[-1] if self.attempts else {})

    # --- what it says ---

    def compare(self, new, old, noise):
        """(how much lower the first one's val_bpb is, its standard error, the degrees of freedom of that).

        The error is nan where the noise is unknown. What pairs decided keeps their figures: beside a load that comes
        and goes, other runs do not compare.
        """
        gain, error, pairs = (new.event.get(key) for key in ("gain", "error", "pairs"))
        if pairs and isinstance(gain, float):
            return gain, max(noise.bpb * math.sqrt(2 / pairs), error or 0.0), noise.df
        if new.side and old.side:
            gain, sigma, df, spread, _ = verdict.difference(new.side, old.side, noise)
            return gain, sigma * spread, df
        spread = math.sqrt(sum(1 / max(1, e.count) for e in (new, old)))
        return old.bpb - new.bpb, noise.bpb * spread, noise.df

    @property
    def gain(self):
        """(baseline less best, half of its 95 % interval), by all runs of each."""
        if self.best is self.first:
            return 0.0, math.nan
        squares = (max(self.noise.bpb, e.spread) ** 2 / max(1, e.count) for e in (self.first, self.best))
        return self.first.bpb - self.best.bpb, wide(math.sqrt(sum(squares)), self.noise.df, SURE)

    @property
    def chain(self):
        """The kept experiments that the best one stands on, the baseline first; a rewind leaves others out."""
        found, e = [], self.best
        while e and e not in found:
            found.insert(0, e)
            e = e.before
        return found

    @property
    def by_outcome(self):
        """{word: how many}: of experiments kept, discarded, crashed; of runs refused as invalid or past their time."""
        refused = sum(a["status"] in ("invalid", "timeout", "stale") for a in self.attempts)
        return Counter((e.status for e in self.experiments), refused=refused)

    @property
    def near_misses(self):
        """Discarded, and better than its reference by what noise can explain, or undecided; the best first."""
        close = [e for e in self.experiments if e.status == "discard" and (e.gain > 0 or e.undecided)]
        return sorted(close, key=lambda e: -(e.gain / e.error if e.error > 0 else e.gain))

    @property
    def dead_ends(self):
        """{part of train.py: the discarded and crashed experiments that changed it most}, the largest group first."""
        groups = {}
        for e in self.experiments:
            if e.status != "keep" and not e.undecided and e not in self.near_misses[:8]:
                groups.setdefault(e.parts[0] if e.parts else "?", []).append(e)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    @property
    def questions(self):
        """[(experiment, what it left open)], the newest first."""
        asked = [(e, one_line(e.event.get("question"))) for e in reversed(self.experiments)]
        return [(e, text) for e, text in asked if text]

    @property
    def untouched(self):
        """The parts of train.py that no experiment changed, in their order: constants, functions, methods."""
        text = self.texts.get(self.first.blob) if self.first else None
        parts = [part for part in dict.fromkeys(parts_of(text or "")) if part and part not in self.touched]
        whole = {part.split(".")[0] for part in parts if "." in part}  # of a class its methods are named
        return [part for part in parts if part not in (whole | {"DATASET", "GPU", "CUDA"}) and "__init__" not in part]

    @property
    def since_gain(self):
        """How many experiments came after the last kept one."""
        return len(self.experiments) - (self.kept[-1].number if self.kept else 0)

    @property
    def due(self):
        """What kind of idea is due after so long without a kept gain, in words; empty where there is no plateau."""
        if self.since_gain < PLATEAU:
            return ""
        recent = self.experiments[-self.since_gain :]
        constants = sum(bool(e.parts) and e.parts[0].isupper() for e in recent) / len(recent)
        crashed = sum(e.status == "crash" for e in recent) / len(recent)
        words = []
        if crashed > 0.3:
            words.append("smaller steps, tried by make check first: many crashed")
        if constants > 0.6:
            words.append("a mechanism, or a deletion, not one more constant")
        elif constants < 0.3:
            words.append("settle the constants of what was kept: both neighbours of each")
        close = self.near_misses[:2]
        if len(close) == 2:
            words.append(f"two near misses together ({close[0].number} and {close[1].number})")
        return "; ".join(words) or "something large, in a part that nothing has touched"

    @property
    def span(self):
        """(when the first run began, when the last thing was noted) as datetimes, or None."""
        times = [t for t in (parsed(event.get("time")) for event in self.events) if t]
        return (times[0], times[-1]) if times else None

    @property
    def hours(self):
        return (self.span[1] - self.span[0]).total_seconds() / 3600 if self.span else 0.0

    @property
    def tokens(self):
        """Tokens trained on in all runs of the session."""
        ran = (self.records.get(a.get("run_id")) for a in self.attempts)
        return sum(r["training"].get("total_tokens") or 0 for r in ran if r)

    @property
    def cost(self):
        """{what: seconds} of the whole session."""
        spent = dict.fromkeys(("training", "start-up", "evaluation", "repeats", "hold-out", "failed", "standing still",
                               "waiting for other runs", "idle between runs"), 0.0)  # fmt: skip
        seen, end = set(), None
        for a in self.attempts:
            wall, run, began = a.get("wall_seconds") or 0.0, self.records.get(a.get("run_id")), parsed(a["started"])
            if end and began:
                between, waited = max(0.0, (began - end).total_seconds()), a.get("waited") or 0.0
                spent["waiting for other runs"] += min(waited, between)
                spent["idle between runs"] += max(0.0, between - waited)
            end = parsed(a.get("end")) or began
            if a["role"] == "holdout":
                spent["hold-out"] += wall
            elif a["status"] != "valid":
                spent["failed"] += wall
            elif a["role"] == "reference" or a["train_blob"] in seen:
                spent["repeats"] += wall
            elif run:
                t = run["training"]
                scored, still = (t.get("eval_seconds") or 0.0) + (t.get("check_seconds") or 0.0), record.paused(run)
                spent["training"] += t["seconds"]
                spent["evaluation"] += scored
                spent["standing still"] += still
                spent["start-up"] += max(0.0, wall - t["seconds"] - scored - still)
            else:
                spent["training"] += wall
            seen.add(a["train_blob"])
        return spent


# --- programs ------------------------------------------------------------------------------------------


def texts(blobs):
    """{blob: text} of the programs that git knows, from one process."""
    wanted = sorted({blob for blob in blobs if blob})
    if not wanted or not (project.ROOT / ".git").exists():
        return {}
    try:
        asked = "".join(blob + "\n" for blob in wanted).encode()
        words = ["git", "cat-file", "--batch"]
        found = subprocess.run(words, cwd=project.ROOT, input=asked, capture_output=True).stdout
    except OSError:
        return {}
    programs, place = {}, 0
    for blob in wanted:
        head, _, _ = found[place : place + 200].partition(b"\n")
        words, place = head.split(), place + len(head) + 1
        if len(words) == 3:
            size = int(words[2])
            programs[blob] = found[place : place + size].decode("utf-8", "replace")
            place += size + 1
    return programs


def parts_of(text):
    """For each line the part of the program that it stands in: a constant, a function, `Class.method`; None above."""
    found, inside, name = [], "", None
    for line in text.split("\n"):
        if match := PART.match(line):
            top, constant, method = match.groups()
            inside = top or inside if not constant else ""
            name = constant or top or (f"{inside}.{method}" if inside else method)
        found.append(name)
    return found


def changed(old, new):
    """The lines that differ, as opcodes of difflib; what the ends have in common is not looked at."""
    start, end, shortest = 0, 0, min(len(old), len(new))
    while start < shortest and old[start] == new[start]:
        start += 1
    while end < shortest - start and old[-1 - end] == new[-1 - end]:
        end += 1
    codes = difflib.SequenceMatcher(None, old[start : len(old) - end], new[start : len(new) - end], False).get_opcodes()
    moved = [(what, a + start, b + start, c + start, d + start) for what, a, b, c, d in codes]
    return [("equal", 0, start, 0, start), *moved, ("equal", len(old) - end, len(old), len(new) - end, len(new))]


def change(old, new):
    """(lines added, lines removed, parts that changed): from one text of a program to another."""
    a, b = old.split("\n"), new.split("\n")
    added = removed = 0
    weights, names = Counter(), (parts_of(old), parts_of(new))
    for what, *where in changed(a, b):
        if what == "equal":
            continue
        removed, added = removed + where[1] - where[0], added + where[3] - where[2]
        for lines, parts, start, end in ((a, names[0], *where[:2]), (b, names[1], *where[2:])):
            for i in range(start, end):
                if lines[i].strip() and not lines[i].lstrip().startswith("#"):
                    weights[parts[i] or "imports"] += 1
    return added, removed, [part for part, _ in weights.most_common()]


def diff(old, new, context=3):
    """The lines of a unified diff between two texts of train.py, without its two head lines."""
    a, b, parts, found = old.split("\n"), new.split("\n"), parts_of(old), []
    matcher = difflib.SequenceMatcher()
    matcher.set_seqs((), ())
    matcher.opcodes = [code for code in changed(a, b) if code[1] < code[2] or code[3] < code[4]]
    for group in matcher.get_grouped_opcodes(context):
        first, last = group[0], group[-1]
        sizes = f"-{first[1] + 1},{last[2] - first[1]} +{first[3] + 1},{last[4] - first[3]}"
        found.append(f"@@ {sizes} @@ {parts[first[1]] or ''}")
        for what, i1, i2, j1, j2 in group:
            found += [" " + line for line in a[i1:i2]] if what == "equal" else ["-" + line for line in a[i1:i2]]
            found += ["+" + line for line in b[j1:j2]] if what != "equal" else []
    return found


# --- small things --------------------------------------------------------------------------------------


def wide(error, df, sigmas=1.0):
    """`sigmas` standard errors, wider where the noise rests on few repeats; nan where it is unknown."""
    return verdict.in_t(sigmas, df) * error if df else math.nan


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


def numbers(found, most=6):
    """`row 3`, `rows 3, 5 and 4 more`."""
    words = ", ".join(map(str, found[:most])) + (f" and {len(found) - most} more" if len(found) > most else "")
    return f"row{'s' * (len(found) > 1)} {words}"


def clock(seconds):
    """`6 min`, `2 h 05 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
