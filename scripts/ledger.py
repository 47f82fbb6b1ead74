"""From a run's record to a verdict, a row of results.tsv and an entry of the journal.

Plain functions over plain files; run.sh, verdict.sh, log-result.sh, results.sh and discard.sh call the
command line at the end. No figure is ever typed by hand: all come from the records in data/.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results.tsv"
DATA = ROOT / "data"
JOURNAL = ROOT / "internal" / "log"
ATTEMPT = DATA / "attempt.json"
HEADER = "commit\tval_bpb\tmemory_gb\tavg_tok_sec\tstatus\tdescription"
ROW = re.compile(r"([0-9a-f]{7})\t(\d+\.\d{6})\t(\d+\.\d)\t(\d+)\t(keep|discard|crash)\t([^\t]*)")


class Refused(Exception):
    """What was asked cannot be done; the text says why and what to do."""


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
    with path.open("ab+") as out:
        size = out.seek(0, os.SEEK_END)
        if size:
            out.seek(size - 1)
            header = "" if out.read(1) == b"\n" else "\n"  # a line cut short ends here, and stays its own line
        try:
            out.write((header + text).encode())
            out.flush()
            os.fsync(out.fileno())
        except OSError:
            os.ftruncate(out.fileno(), size)
            raise


@contextmanager
def locked():
    """One writer at a time, whatever becomes of the others: the kernel drops a dead one's lock."""
    DATA.mkdir(exist_ok=True)
    with (DATA / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- rows ----------------------------------------------------------------------------------------


def read_rows(path=RESULTS):
    """The rows of results.tsv, and what is wrong with the lines that are none."""
    rows, problems = [], []
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return rows, problems
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if match := ROW.fullmatch(line):
            commit, bpb, memory, rate, status, description = match.groups()
            figures = SimpleNamespace(micro_bpb=round(float(bpb) * 1e6), tok_sec=int(rate))
            rows.append(SimpleNamespace(line=line, commit=commit, bpb=bpb, memory=memory, rate=rate, status=status,
                                        description=description, figures=figures))  # fmt: skip
        elif line.strip() and line != HEADER:
            problems.append(f"results.tsv, line {number} is no row and was passed over: {line[:60]!r}")
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
    """Every valid archived record, the newest first."""
    for path in sorted(DATA.glob("run_*.json"), key=lambda p: p.name, reverse=True):
        record = read_json(path)
        if record and record.get("status") == "valid" and record.get("result", {}).get("val_bpb") is not None:
            yield record


def record_of_row(row):
    """The record that a row was made from, or None where its archive is gone."""
    for record in archives():
        if (record["commit"] or "0" * 7).startswith(row.commit) and figures(record) == row.figures:
            return record
    return None


def record_of_attempt(attempt):
    newest = read_json(DATA / "last_run.json")
    for record in [newest] if newest and newest.get("run_id") == attempt["run_id"] else archives():
        if record["run_id"] == attempt["run_id"]:
            return record
    raise Refused("the record of the newest run is gone from data/: make run AGAIN=1")


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


# --- the verdict ---------------------------------------------------------------------------------


def judge(new, old):
    """The table of the rule for keeping. Returns (verdict, the rule that decided).

    Exact at its edges: val_bpb in whole millionths, throughput in whole tokens a second.
    """
    change = new.micro_bpb - old.micro_bpb  # below 0: improved
    slower = 100 * new.tok_sec < 85 * old.tok_sec

    def faster(percent):
        return 100 * new.tok_sec > (100 + percent) * old.tok_sec

    if change < 0 and not slower:
        return "keep", "val_bpb improved, throughput fell by at most 15 %"
    if change < 0 and change > -5000:
        return "discard", "val_bpb improved by less than 0.005, throughput fell by more than 15 %"
    if change < 0:
        return "judge", "val_bpb improved by 0.005 or more, throughput fell by more than 15 %"
    if change <= 1000 and faster(10):
        return "keep", "val_bpb within 0.001, throughput rose by more than 10 %"
    if change < 3000 and faster(25):
        return "keep", "val_bpb worse by less than 0.003, throughput rose by more than 25 %"
    if change == 0:
        return "discard", "val_bpb no better, and not enough throughput gained (less code may still be worth it)"
    return "discard", "val_bpb worse, and not enough throughput gained"


def noise(new, old):
    """Two standard errors are no test of a difference, but within one there is nothing to see."""
    errors = [r["result"].get("val_bpb_stderr") or 0.0 for r in (new, old)]
    return sum(e * e for e in errors) ** 0.5


def last_kept(rows):
    kept = [row for row in rows if row.status == "keep"]
    return kept[-1] if kept else None


def decide(record, rows):
    """Compare a record with the last kept run.

    Returns a namespace: verdict, rule, base (row or None), old and new figures, runs (how many were averaged),
    old_record (or None), note. Raises Refused where the two may not be compared.
    """
    new, base = figures(record), last_kept(rows)
    result = SimpleNamespace(verdict="keep", rule="nothing was kept before", base=base, new=new, old=None, runs=1,
                             old_record=None, note="")  # fmt: skip
    if base is None:
        return result
    old_record = result.old_record = record_of_row(base)
    result.old = base.figures
    if old_record is None:
        result.note = f"the record of {base.commit} is not in data/: its row was compared, dataset and device were not"
    elif unlike := differences(record, old_record):
        raise Refused(f"not comparable with the last kept run {base.commit}: {'; '.join(unlike)}")
    same = [r for r in archives() if r["train_blob"] == record["train_blob"] and not differences(r, record)]
    if old_record and old_record["train_blob"] != record["train_blob"] and len(same) > 1:
        # run again: the mean of all its runs decides
        result.runs = len(same)
        result.new = SimpleNamespace(
            micro_bpb=round(sum(figures(r).micro_bpb for r in same) / len(same)),
            tok_sec=round(sum(figures(r).tok_sec for r in same) / len(same)),
        )
    result.verdict, result.rule = judge(result.new, result.old)
    gain = result.old.micro_bpb - result.new.micro_bpb
    if old_record and result.runs == 1 and result.verdict == "keep" and 0 < gain < 1000:
        if gain < 1e6 * noise(record, old_record) and 100 * new.tok_sec <= 110 * result.old.tok_sec:
            result.verdict = "rerun"
            result.rule += "; but by less than 0.001 and within the noise, so look twice: make run AGAIN=1"
    return result


def change_of(result):
    """The two figures that decide, and how they moved."""
    new, old = result.new, result.old
    bpb = f"val_bpb {new.micro_bpb / 1e6:.6f}"
    rate = f"{new.tok_sec} tok/s"
    if old:
        bpb += f" ({(new.micro_bpb - old.micro_bpb) / 1e6:+.6f})"
        rate += f" ({percent(new.tok_sec, old.tok_sec)})"
    mean = f"mean of {result.runs} runs: " if result.runs > 1 else ""
    return f"{mean}{bpb}, {rate}"


def percent(new, old):
    return f"{100 * (new / old - 1):+.1f} %" if old else "-"


# --- commands ------------------------------------------------------------------------------------


def newest_attempt(tag):
    attempt = read_json(ATTEMPT)
    if attempt is None:
        raise Refused("no run yet: make run")
    if attempt["tag"] != tag:
        raise Refused(f"the newest run is of '{attempt['tag']}', and this is '{tag}': make run")
    return attempt


def rows_before(attempt, rows):
    """The rows that the attempt is to be compared with: once logged, those above its own."""
    return rows[: attempt["logged"] - 1] if attempt.get("logged") else rows


def cmd_verdict(args):
    attempt = newest_attempt(args.tag)
    if attempt["status"] != "valid":
        raise Refused(f"the newest run has no valid result ({attempt['status']}): make log-result STATUS=crash DESC=…")
    rows, problems = read_rows()
    result = decide(record_of_attempt(attempt), rows_before(attempt, rows))
    print(result.verdict)
    print(f"rule     {result.rule}")
    print(f"run      {(attempt['commit'] or '0' * 7)[:7]}  {change_of(result)}")
    if base := result.base:
        print(f"against  {base.commit}  val_bpb {base.bpb}, {base.rate} tok/s: {base.description}")
    for note in [result.note, *problems]:
        if note:
            print(f"note     {note}")


def cmd_log(args):
    """Row, journal entry, ref; each step is skipped where an interrupted call has done it."""
    description = one_line(args.description)
    if args.status not in ("keep", "discard", "crash"):
        raise Refused(f"STATUS={args.status or ''} is none of keep, discard, crash")
    if not description:
        raise Refused('DESC is missing: say in one line what was tried, DESC="…"')
    with locked():
        attempt = newest_attempt(args.tag)
        status, record = attempt["status"], None
        if attempt.get("logged") and attempt.get("log_complete"):
            raise Refused(f"this run is logged already, as row {attempt['logged']}: make run")
        if status == "running":
            raise Refused("the run has not ended yet")
        if args.status == "crash" and status == "valid":
            raise Refused("the run was valid, so it is no crash: STATUS=keep or STATUS=discard")
        if args.status != "crash" and status != "valid":
            raise Refused(f"the run has no valid result ({status}), so it can only be logged as STATUS=crash")
        if status == "valid":
            record = record_of_attempt(attempt)
        rows, _ = read_rows()
        rows = rows_before(attempt, rows)
        result = None
        if record:
            try:
                result = decide(record, rows)
            except Refused:
                if not args.new_table:
                    raise
                archive_results()
                rows, result = [], decide(record, [])
        row = make_row(attempt["commit"], record, args.status, description)
        if not attempt.get("logged"):
            attempt.update(logged=len(rows) + 1, number=next_number(args.tag, len(rows)))
            write_json(ATTEMPT, attempt)
        rows, _ = read_rows()
        if len(rows) < attempt["logged"]:
            append(RESULTS, row + "\n", HEADER + "\n")
        entry = journal_entry(attempt, record, args.status, description, result, args.found, args.open)
        journal = JOURNAL / f"log_{datetime.now():%Y-%m-%d}.md"
        written = journal.read_bytes() if journal.exists() else b""
        if f"run {attempt['id']}".encode() not in written:
            append(journal, entry, f"# Research journal, {datetime.now():%Y-%m-%d}\n")
        if attempt["commit"]:
            git("update-ref", f"refs/experiments/{args.tag}/{attempt['number']:03d}", attempt["commit"])
        write_json(ATTEMPT, {**attempt, "log_complete": True})
    print(f"row {attempt['logged']}: {row.expandtabs(1)}")
    print(f"journal: {journal.relative_to(ROOT)}")


def journal_entry(attempt, record, status, description, result, found, unanswered):
    lines = [f"\n## {attempt['number']}. {status}: {description}\n"]
    if record:
        training = record["training"]
        lines.append(f"- {change_of(result)}; {training['peak_memory_mb'] / 1024:.1f} GB, "
                     f"{training['total_steps']} steps, evaluation {training['eval_seconds']:.1f} s")  # fmt: skip
        against = f" against {result.base.commit}" if result.base else ""
        lines.append(f"- verdict{against}: {result.verdict} ({result.rule})")
    else:
        lines.append(f"- {attempt['status']}: {attempt['reason']}")
    lines.append(f"- commit {attempt['commit'] or 'none'}, {attempt['started']}, run {attempt['id']}")
    for name, text in (("found", one_line(found)), ("open", one_line(unanswered))):
        if text:
            lines.append(f"- {name}: {text}")
    return "\n".join(lines) + "\n"


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"git {words[0]}: {done.stderr.strip()}")
    return done.stdout


def next_number(tag, rows):
    """The experiment's number: one more than any row or ref has."""
    number = rows
    if (ROOT / ".git").exists():
        for ref in git("for-each-ref", "--format=%(refname)", f"refs/experiments/{tag}/").split():
            if (last := ref.rsplit("/", 1)[1]).isdigit():
                number = max(number, int(last))
    return number + 1


def archive_results():
    """Move results.tsv into data/ under a name that nothing has."""
    if not RESULTS.exists():
        return None
    DATA.mkdir(exist_ok=True)
    name, number = f"results_{datetime.now():%Y%m%d_%H%M%S}", 1
    while (archive := DATA / (name + (f"_{number}" if number > 1 else "") + ".tsv")).exists():
        number += 1
    RESULTS.rename(archive)
    print(f"the older results.tsv is now {archive.relative_to(ROOT)}")
    return archive


def cmd_fresh(args):
    """A new results.tsv for a new session; the older one is archived."""
    with locked():
        archive_results()
        append(RESULTS, "", HEADER + "\n")


def cmd_seen(args):
    """Refuse a train.py that was run before under the same budget and seed, and say what came of it."""
    blob, rows, attempt = blob_of_train(), read_rows()[0], read_json(ATTEMPT)
    setting = float(os.environ["AUTORESEARCH_BUDGET"]), int(os.environ["AUTORESEARCH_SEED"])
    if attempt and attempt["tag"] == args.tag and not attempt["logged"] and attempt["train_blob"] == blob:
        if (attempt["budget"], attempt["seed"]) == setting and attempt["status"] in ("valid", "invalid", "crash"):
            raise Refused(f"this train.py was just run ({attempt['status']}): make log-result, or make run AGAIN=1")
    for row in rows:
        if blob_of_commit(row.commit) != blob:
            continue
        record = record_of_row(row)
        if record is None or (record["budget"], record["seed"]) == setting:
            raise Refused(f"this train.py was run before: {row.line.expandtabs(1)} (make run AGAIN=1 runs it again)")


def blob_of_commit(commit):
    """The hash of a commit's train.py; empty where git does not know it."""
    name = f"{commit}:train.py"
    known = subprocess.run(["git", "rev-parse", "-q", "--verify", name], cwd=ROOT, capture_output=True, text=True)
    return known.stdout.strip()


def blob_of_train():
    """The hash that git gives train.py as it stands."""
    content = (ROOT / "train.py").read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def cmd_results(args):
    rows, problems = read_rows()
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    if not rows:
        print("no results yet: make baseline")
        return
    kept = [row for row in rows if row.status == "keep"]
    best = min(kept, key=lambda row: row.figures.micro_bpb) if kept else None
    print(f"{'':6}{'commit':9}{'val_bpb':>9}{'memory_gb':>11}{'avg_tok_sec':>13}  {'status':9}description")
    for number, row in enumerate(rows, 1):
        mark = "*" if row is best else " "
        numbers = f"{row.bpb:>9}{row.memory:>11}{row.rate:>13}"
        print(f"{number:4} {mark}{row.commit:9}{numbers}  {row.status:9}{row.description}")
    if best:
        print(f"* best of {len(kept)} kept, {len(rows)} tried")


def cmd_kept(args):
    """The kept commits, the newest first, for discard.sh."""
    for row in reversed(read_rows()[0]):
        if row.status == "keep":
            print(row.commit)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in sorted((k, v) for k, v in globals().items() if k.startswith("cmd_")):
        command = commands.add_parser(name.removeprefix("cmd_"))
        command.set_defaults(function=function)
        command.add_argument("--tag", default="none")
        command.add_argument("--head", default="")
        command.add_argument("--new-table", action="store_true")
        for option in ("status", "description", "found", "open"):
            command.add_argument(f"--{option}", default="")
    args = parser.parse_args()
    try:
        args.function(args)
    except Refused as refused:
        sys.exit(f"error: {refused}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'writing'}: {error.strerror}")


if __name__ == "__main__":
    main()
