"""The files of the experiments: records in data/, rows of results.tsv; read with doubt, written whole.

Plain functions; verdict.py, ledger.py and attempt.py stand on them.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results.tsv"
DATA = ROOT / "data"
COPY = DATA / "results_copy.tsv"  # results.tsv as last logged, should it be lost
JOURNAL = ROOT / "internal" / "log"
ATTEMPT = DATA / "attempt.json"
HEADER = "commit\tval_bpb\tmemory_gb\tavg_tok_sec\tstatus\tdescription"
ROW = re.compile(r"([0-9a-f]{7})\t(\d+\.\d{6})\t(\d+\.\d)\t(\d+)\t(keep|discard|crash)\t([^\t]*)")


class Refused(Exception):
    """What was asked cannot be done; the text says why and what to do."""


class Incomparable(Refused):
    """Two records that differ in more than the experiment; `budget`: the other's, where that is all."""

    budget = None


# --- files: written whole or not at all ----------------------------------------------------------


def read_json(path):
    """The object in a JSON file, or None where there is none that is whole."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path, content):
    """Replace a file: a reader sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            json.dump(content, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path, text, header=""):
    """Add whole lines at the end of a file, or nothing at all; what stands there is never rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.stat().st_mode & 0o222:
        name = path.relative_to(ROOT)
        raise Refused(f"{name} is read-only, so this was not logged: chmod u+w {name}, then the same command again")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size:  # a line that was cut short ends here, and stays a line of its own
            header = "" if os.pread(descriptor, 1, size - 1) == b"\n" else "\n"
        content = (header + text).encode()
        try:
            if os.write(descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked():
    """One writer at a time, whatever becomes of the others: the kernel drops a dead one's lock."""
    DATA.mkdir(exist_ok=True)
    with (DATA / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- rows ----------------------------------------------------------------------------------------


def read_rows():
    """The rows of results.tsv, and what is wrong with it: a line that is none does not count."""
    rows, problems, path = [], [], RESULTS
    if not path.exists():
        if not COPY.exists():
            return rows, problems
        path = COPY
        problems.append(f"results.tsv is missing: read from {COPY.relative_to(ROOT)}; the next log-result restores it")
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").split("\n"), 1):
        line = line.removesuffix("\r")
        if match := ROW.fullmatch(line):
            commit, bpb, memory, rate, status, description = match.groups()
            figures = SimpleNamespace(micro_bpb=round(float(bpb) * 1e6), tok_sec=int(rate))
            rows.append(SimpleNamespace(line=line, commit=commit, bpb=bpb, memory=memory, rate=rate, status=status,
                                        description=description, figures=figures))  # fmt: skip
        elif line.strip() and line != HEADER:
            problems.append(f"{path.name}, line {number} is no row and was passed over: {line[:60]!r}")
    return rows, problems


def one_line(text):
    """Text without tab, newline or any other control character."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def make_row(commit, record, status, description):
    """A line of results.tsv; a crash has no figures."""
    bpb, memory, rate = 0.0, 0.0, 0
    if status != "crash":
        training = record["training"]
        bpb, memory, rate = record["result"]["val_bpb"], training["peak_memory_mb"] / 1024, training["avg_tok_sec"]
    return f"{(commit or '0' * 7)[:7]}\t{bpb:.6f}\t{memory:.1f}\t{round(rate)}\t{status}\t{description}"


# --- records -------------------------------------------------------------------------------------


def blob_of_train():
    """The hash that git gives train.py as it stands."""
    content = (ROOT / "train.py").read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

def seal_fits(record):
    """Whether the harness wrote this record, as far as one can tell (prepare.seal)."""
    content = {key: value for key, value in record.items() if key != "seal"}
    text = "autoresearch" + json.dumps(content, sort_keys=True)
    return record.get("seal") == hashlib.sha256(text.encode()).hexdigest()


def figures(record):
    """What a verdict compares, as whole numbers: results.tsv's six decimals and tokens a second."""
    return SimpleNamespace(
        micro_bpb=round(record["result"]["val_bpb"] * 1e6),
        tok_sec=round(record["training"]["avg_tok_sec"]),
    )


def archives():
    """Every valid archived record as the harness wrote it, the newest first."""
    for path in sorted(DATA.glob("run_*.json"), reverse=True):
        record = read_json(path)
        if record and record.get("status") == "valid" and seal_fits(record):
            yield record


def record_of_row(row, but=None):
    """The record that a row was made from, or None where its archive is gone. `but`: a run_id that it is not."""
    found = None
    for record in archives():
        if (record["commit"] or "0" * 7).startswith(row.commit) and figures(record) == row.figures:
            found = found if record["run_id"] == but else record  # the first run of several alike
    return found


def record_of_attempt(attempt):
    """The record that the newest run wrote."""
    newest = read_json(DATA / "last_run.json")
    if newest and newest.get("run_id") == attempt["run_id"] and seal_fits(newest):
        return newest
    for record in archives():
        if record["run_id"] == attempt["run_id"]:
            return record
    raise Refused("the record of the newest run is gone from data/, or was changed: make run AGAIN=1")


def differences(new, old):
    """Why two records may not be compared; empty where they may."""
    found = []
    for key in ("dataset", "token_cache", "budget", "harness"):
        if new.get(key) != old.get(key):
            a, b = (str(r.get(key))[:12] for r in (new, old))
            found.append(f"{key} is {a}, was {b}")
    a, b = new.get("device") or {}, old.get("device") or {}
    found += [f"device.{k} is {a.get(k)}, was {b.get(k)}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    return found


# --- attempts ------------------------------------------------------------------------------------


def newest_attempt(tag):
    """data/attempt.json of this session; one that died without a word counts as interrupted."""
    attempt = read_json(ATTEMPT)
    if attempt is None:
        raise Refused("no run yet: make run")
    if attempt["tag"] != tag:
        raise Refused(f"the newest run is of '{attempt['tag']}' and this is '{tag}': go back there, or make run")
    if attempt["status"] == "running" and not alive(attempt):
        attempt.update(status="interrupted", reason="it was cut off without a word")
    return attempt


def alive(attempt):
    """Whether the attempt still holds the machine's lock (see attempt.py)."""
    path = os.environ.get("AUTORESEARCH_LOCK") or "/tmp/autoresearch.lock"
    try:
        with open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return (read_json(path) or {}).get("pid") == attempt["launcher"]
    except OSError:
        return False


# --- the command lines ---------------------------------------------------------------------------


def run_command(function, args):
    """Call it; what went wrong is said in one line."""
    try:
        function(args)
    except Refused as refused:
        sys.exit(f"error: {refused}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'writing'}: {error.strerror or error}; mend that, and run the same again")
    except KeyboardInterrupt:
        sys.exit(130)
