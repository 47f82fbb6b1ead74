"""The files of a session: its table, its events, its journal. What is read may be damaged; what is written is whole.

They belong to the tag and the clone, in data/sessions/TAG/; results.tsv in the root is a link to the table of the
session at hand. events.jsonl says in order which run began, how it ended and what was logged; it only grows.

usage: python -m scripts.session --tag TAG --verb VERB    (lib.sh; prints what it exports)
"""

import argparse
import ast
import dataclasses
import json
import os
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote, unquote

from harness import files, project, record
from harness.files import printable
from harness.processes import is_alive
from harness.project import HOME, ROOT, STORE, git
from scripts import settings

HEADER = "commit\tval_bpb\tmemory_gb\tavg_tok_sec\tstatus\tdescription"
ROW = re.compile(r"([0-9a-f]{7})\t(\d+\.\d{6})\t(\d+\.\d)\t(\d+)\t(keep|discard|crash)\t([^\t]*)")
LINK = ROOT / "results.tsv"
PROGRESS = project.DATA / ".progress.json"  # of the run that goes on, written by record.tell_step
JOURNAL = HOME / "internal" / "log"
LOCK = os.environ.get("AUTORESEARCH_LOCK") or "/tmp/autoresearch.lock"


class Refused(Exception):
    """What was asked cannot be done; the text says why and what to do."""


@dataclass
class Row:
    """A line of results.tsv, with what was noted when it was logged. Rows count from 1."""

    number: int
    line: str
    commit: str
    bpb: float
    memory: str
    rate: int
    status: str
    description: str
    event: dict  # empty for a row by hand
    blob: str  # of its program; empty where nothing tells it


class Session:
    """The session of a tag: `Session("nov24")`."""

    def __init__(self, tag):
        self.tag, self.folder = tag, STORE / "sessions" / quote(tag, safe="")
        self.table, self.log = self.folder / "results.tsv", self.folder / "events.jsonl"

    def stored_settings(self):
        """{name: text} of what it was opened with; empty outside a session."""
        stored = files.read_json(self.folder / "settings.json")
        if stored is None and git("rev-parse", "-q", "--verify", f"refs/experiments/{self.tag}/start"):
            raise Refused(f"'{self.tag}' has no settings: bring data/ along from where it was opened; if an earlier "
                          "form of it did that, make report shows it, make setup TAG=name opens one")  # fmt: skip
        return stored or {}

    # --- the table ---

    def link(self):
        """Make results.tsv in the root a link to this session's table. A file that stands there is moved aside."""
        files.make_folder(self.folder)
        target = os.path.relpath(self.table, ROOT)
        if LINK.exists() and not LINK.is_symlink():
            aside = files.free_name(STORE, "results", ".tsv")
            LINK.rename(aside)
            say(f"note: results.tsv was another file than this session's table; it is now {shown(aside)}")
        if not LINK.is_symlink() or os.readlink(LINK) != target:
            LINK.unlink(missing_ok=True)
            LINK.symlink_to(target)
        if HOME != ROOT and not os.path.lexists(ROOT / "internal"):
            (ROOT / "internal").symlink_to(HOME / "internal")

    def rows(self):
        """(the rows of the table, what is wrong with it): a line that is no row does not count."""
        rows, problems, noted = [], [], {event["line"]: event for event in self.logged().values()}
        text = self.table.read_bytes().decode("utf-8", "replace") if self.table.exists() else ""
        for number, line in enumerate(text.split("\n"), 1):
            line = line.removesuffix("\r")
            if match := ROW.fullmatch(line):
                commit, bpb, memory, rate, *words = match.groups()
                event = noted.get(line, {})
                blob = event.get("train_blob") or git("rev-parse", "-q", "--verify", f"{commit}:train.py") or ""
                rows.append(Row(len(rows) + 1, line, commit, float(bpb), memory, int(rate), *words, event, blob))
            elif line.strip() and line != HEADER:
                problems.append(f"results.tsv, line {number} is no row and was passed over: {one_line(line)[:60]!r}")
        return rows, problems

    def archive_table(self):
        """Begin a new table; the old one stays beside it under a name of its own."""
        old = files.free_name(self.folder, "results", ".tsv")
        self.note("table", archived=old.name)
        self.table.rename(old)
        files.to_disk(self.folder)
        say(f"note: the older results.tsv is now {shown(old)}")

    # --- events ---

    def note(self, event, **content):
        time = datetime.now().astimezone().isoformat(timespec="milliseconds")
        files.append(self.log, json.dumps({"event": event, "time": time, **content}) + "\n")

    def events(self):
        """Everything noted, in order; a line that is damaged does not count."""
        found = []
        for line in self.log.read_bytes().split(b"\n") if self.log.exists() else ():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                event = json.loads(line)
                found += [event] * bool(event["event"] and event["time"])
        return found

    def attempts(self):
        """Every run that was begun here, the oldest first: a dict of all that its events hold, and their times.

        begin: see `experiment.run_once`; end: status, reason, wall_seconds, run_id, test; logging: row, line, verdict
        and so on (`log_result.intended`). Times: `started`, `end`, `logging`, `logged`. Without an end its status is
        `running` or `interrupted`.
        """
        attempts = {}
        for event in self.events():
            content = {key: value for key, value in event.items() if key not in ("event", "time")}
            if event["event"] == "begin":
                attempts[event["id"]] = {"status": "running", "started": event["time"], "row": None, **content}
            elif event.get("id") in attempts:
                attempts[event["id"]].update(content, **{event["event"]: event["time"]})
        for attempt in attempts.values():
            if attempt["status"] == "running":  # while its launcher lives, and was the last to have the device's lock
                note = files.read_json(attempt.get("lock") or LOCK) or {}
                if note.get("pid") != attempt["launcher"] or not is_alive(attempt["launcher"]):
                    attempt.update(status="interrupted", reason="it was cut off without a word")
        return list(attempts.values())

    def logged(self):
        """{row number: the event of its logging} of the present table."""
        rows = {}
        for event in self.events():
            if event["event"] == "table":
                rows = {}
            elif event["event"] == "logging":
                rows[event["row"]] = event
        return rows

    def newest(self):
        """The newest run of a candidate, or None. Runs of the reference, of holdout and of ablate do not count."""
        return next((a for a in reversed(self.attempts()) if a["role"] == "candidate"), None)

    def candidate(self):
        """The newest run of a candidate; refused where there is none."""
        if newest := self.newest():
            return newest
        raise Refused(f"no run yet in '{self.tag}': make run, or go back to the session whose run you mean")

    def reference(self, rows, head):
        """The newest kept program that the commit `head` stands on, as its row; without git (no `head`) the newest one.

        A commit that was amended, rebased or squashed is another one, and its program the same: the row then names
        the commit that has it now.
        """
        there = programs_of(head) if head else {}
        for row in kept_rows(rows):
            if not head or (row.blob in there and git("merge-base", "--is-ancestor", row.commit, head) is not None):
                return row
            if row.blob in there:
                return dataclasses.replace(row, commit=there[row.blob][:7])
        return None


def kept_rows(rows):
    """The rows of kept programs, the newest first. What its newest row says of a program counts."""
    newest = {row.blob or row.line: row for row in rows}
    return [row for row in reversed(rows) if row.status == "keep" and newest[row.blob or row.line] is row]


def taken_back(rows, reference):
    """The newest kept row, if the branch does not stand on its program. reference: the one that it does stand on."""
    newest = next(iter(kept_rows(rows)), None)
    same = newest is reference or (newest and reference and newest.blob == reference.blob)
    return None if same else newest


def programs_of(head):
    """{program (blob): the newest commit that has it} of the commit `head` and all that it stands on."""
    commits = (git("rev-list", head, "--", "train.py") or "").splitlines()
    names = "".join(f"{commit}:train.py\n" for commit in commits)
    blobs = (git("cat-file", "--batch-check=%(objectname)", text=names) or "").splitlines()
    return dict(reversed([*zip(blobs, commits, strict=False)]))


def tags():
    """The tags of all sessions of this clone that have a table, in the order of their last change."""
    tables = sorted(STORE.glob("sessions/*/results.tsv"), key=lambda path: path.stat().st_mtime)
    return [unquote(path.parent.name) for path in tables]


def record_of(attempt):
    """The record of a valid run, or None where it is gone or was changed."""
    return next((run for run in record.archived() if run["run_id"] == attempt["run_id"]), None)


# --- programs as text ------------------------------------------------------------------------------


def text_of(blob):
    """The text of a train.py that git knows, else None."""
    return git("cat-file", "blob", blob) if blob else None


def essence(text):
    """A program's statements without comments, docstrings, layout and the setting of seeds; None if it is no Python."""
    try:
        code = ast.unparse(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, TypeError):
        return None
    code = re.sub(r'(?ms)^ *(""".*?"""|\'\'\'.*?\'\'\')(?:\n|\Z)', "", code)  # docstrings
    return re.sub(r"(?m)^ *(\w+\.)*seed\([^()]*\)(?:\n|\Z)", "", code)


def on_dataset(text, dataset):
    """The text of a train.py that trains on a dataset."""
    return re.sub(r"(?m)^(DATASET\s*=\s*)[\"']\w+[\"']", rf'\1"{dataset}"', text, count=1)


def commit_with(text, base, tag, name, message):
    """(commit, blob of train.py) of the commit `base` with `text` as train.py, under refs/experiments/TAG/NAME.

    Where that is the text of `base`, it is that commit itself, without a ref.
    """
    ref = f"refs/experiments/{tag}/{name}"
    blob = git("hash-object", "-w", "--stdin", text=text)
    if blob and blob == git("rev-parse", f"{base}:train.py"):
        return base, blob
    known = git("rev-parse", "-q", "--verify", ref)
    if blob and known and git("rev-parse", f"{known}:train.py", f"{known}^") == git("rev-parse", blob, base):
        return known, blob
    listed = (git("ls-tree", base) or "").splitlines()
    lines = [f"100644 blob {blob}\ttrain.py" if line.endswith("\ttrain.py") else line for line in listed]
    tree = git("mktree", text="\n".join(lines) + "\n")
    commit = tree and git("commit-tree", tree, "-p", base, "-m", message)
    if not commit or git("update-ref", ref, commit) is None:
        raise Refused(f"git could not write .git/{ref}: a full disk, no user.name, read-only? Mend it, and again")
    return commit, blob


# --- words -----------------------------------------------------------------------------------------


def one_line(text):
    """Text without tab, newline or any other control character."""
    return " ".join(printable(text or "").split())


def cut(text, width):
    return text if len(text) <= width else text[: width - 1] + "…"


def counted(n, word):
    return f"{n} {word}{'s' * (n != 1)}"


def shown(path):
    """A path as a person types it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def tell(text):
    """Print what is no longer waited for, perhaps: work goes on where nobody listens."""
    try:
        print(text, flush=True)
    except OSError:  # a pipe, or a terminal, that is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say(text):
    print(text, file=sys.stderr)


def options(about, **more):
    """The options of a helper, of which all have --tag. about: its docstring. more: {name: default}, a text if none."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tag": "none", **more}.items():
        kind = str if default is None else type(default)
        words = {"action": "store_true"} if default is False else {"default": default, "type": kind}
        parser.add_argument("--" + name.replace("_", "-"), **words)
    return parser


def run_command(function, *arguments):
    """Call it; what goes wrong is said in one line."""
    try:
        try:
            return function(*arguments)
        finally:
            sys.stdout.flush()  # not when Python ends, where nothing could be said any more
    except Refused as refused:
        sys.exit(f"error: {refused}")
    except BrokenPipeError as broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody listens any more; the work is done all the same
        if isinstance(broken.__context__, SystemExit):
            raise broken.__context__ from None
    except OSError as error:
        sys.exit(f"error: {error.filename or 'writing'}: {files.what_failed(error)}; mend that, and run the same again")
    except KeyboardInterrupt:
        sys.exit(130)


def main(arguments):
    session = Session(arguments.tag)
    verb, given = arguments.verb, settings.typed()
    found = settings.in_force(session.stored_settings(), any_budget=verb == "holdout")
    if verb != "prepare":  # a prepared dataset does not need its source, which may change or go
        found = {name: text for name, text in found.items() if name not in ("FILES", "COLUMN") or name in given}
    exported = {settings.TO_PYTHON.get(name, name): text for name, text in found.items()}
    exported |= settings.of_one_command(any_dataset=verb in ("prepare", "holdout"))
    print("export", *(f"{name}={shlex.quote(text)}" for name, text in exported.items()))


if __name__ == "__main__":
    run_command(main, options(__doc__, verb="").parse_args())
