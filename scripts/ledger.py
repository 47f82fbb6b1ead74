"""What verdict.sh, log-result.sh, results.sh, setup.sh, run.sh and discard.sh ask of the records.

From a run's record to a verdict, a row of results.tsv and an entry of the journal. No figure is ever
typed by hand: all come from the records in data/.
"""

import argparse
import os
import subprocess
import sys
from datetime import datetime

import records
import verdict
from records import ATTEMPT, COPY, DATA, HEADER, JOURNAL, RESULTS, ROOT, Incomparable, Refused, read_rows

# --- commands: each takes the command line's arguments -------------------------------------------


def cmd_verdict(args):
    attempt = records.newest_attempt(args.tag)
    if attempt["status"] == "running":
        raise Refused("the run has not ended yet")
    if attempt["status"] == "interrupted":
        raise Refused("the newest run was interrupted and has no result: make run")
    if attempt["status"] != "valid":
        raise Refused(f"the newest run has no valid result ({attempt['status']}): make log-result STATUS=crash DESC=…")
    rows, problems = read_rows()
    result = verdict.decide(records.record_of_attempt(attempt), rows_before(attempt, rows))
    print(result.verdict)
    print(f"rule     {result.rule}")
    print(f"run      {(attempt['commit'] or '0' * 7)[:7]}  {verdict.change_of(result)}")
    if base := result.base:
        print(f"against  {base.commit}  val_bpb {base.bpb}, {base.rate} tok/s: {base.description}")
    logged = f"logged, as row {attempt['logged']}" if attempt.get("log_complete") else ""
    for note in [logged, result.note, *problems]:
        if note:
            print(f"note     {note}")


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


def cmd_log(args):
    """Row, journal entry, ref; a call that was cut short is completed by the next one."""
    description = records.one_line(args.description)
    if args.status not in ("keep", "discard", "crash"):
        raise Refused(f"STATUS={args.status} is none of keep, discard, crash")
    if not description:
        raise Refused('DESC is missing: say in one line what was tried, DESC="…"')
    with records.locked():
        attempt = records.newest_attempt(args.tag)
        refuse_untruthful(args.status, attempt)
        restore_results()
        rows, result = rows_before(attempt, read_rows()[0]), None
        record = records.record_of_attempt(attempt) if attempt["status"] == "valid" else None
        if record:
            try:
                result = verdict.decide(record, rows)
            except Incomparable:
                if not args.new_table or attempt["logged"]:
                    raise
                archive_results()
                rows, result = [], verdict.decide(record, [])
        if not attempt["logged"]:
            attempt.update(logged=len(rows) + 1, number=next_number(args.tag, len(rows)))
            records.write_json(ATTEMPT, attempt)
        if len(read_rows()[0]) < attempt["logged"]:
            line = records.make_row(attempt["commit"], record, args.status, description)
            records.append(RESULTS, line + "\n", HEADER + "\n")
        COPY.write_bytes(RESULTS.read_bytes())
        row = read_rows()[0][attempt["logged"] - 1]
        journal = JOURNAL / f"log_{datetime.now():%Y-%m-%d}.md"
        if not (journal.exists() and attempt["id"].encode() in journal.read_bytes()):
            entry = journal_entry(attempt, record, row, result, args.found, args.open)
            records.append(journal, entry, f"# Research journal, {datetime.now():%Y-%m-%d}\n")
        if attempt["commit"]:
            git("update-ref", f"refs/experiments/{args.tag}/{attempt['number']:03d}", attempt["commit"])
        records.write_json(ATTEMPT, {**attempt, "log_complete": True})
    print(f"row {attempt['logged']}: {row.line.expandtabs(1)}")
    print(f"journal: {journal.relative_to(ROOT)}")


def cmd_fresh(args):
    """A new results.tsv for a new session; the older one is archived."""
    with records.locked():
        archive_results()
        records.append(RESULTS, "", HEADER + "\n")


def cmd_seen(args):
    """Refuse a train.py that was run before under the same budget and seed, and say what came of it.

    In a session also one that would push aside a result that is not logged yet.
    """
    blob, rows, attempt = records.blob_of_train(), read_rows()[0], records.read_json(ATTEMPT)
    setting = float(os.environ["AUTORESEARCH_BUDGET"]), int(os.environ["AUTORESEARCH_SEED"])
    if attempt and attempt["tag"] == args.tag and not attempt.get("log_complete"):
        same = attempt["train_blob"] == blob
        if same and (attempt["budget"], attempt["seed"]) == setting:
            if attempt["status"] not in ("running", "interrupted"):
                raise Refused(f"this train.py was just run ({attempt['status']}): make log-result, or make run AGAIN=1")
        elif args.session and not same and attempt["status"] == "valid" and can_be_a_row(attempt, rows):
            commit = attempt["commit"][:7]
            raise Refused(f'the result of {commit} is not logged yet: make log-result STATUS=… DESC="…" comes first')
    for row, its_blob in zip(rows, blobs_of([row.commit for row in rows]), strict=True):
        if its_blob != blob:
            continue
        record = records.record_of_row(row)
        if record is None or (record["budget"], record["seed"]) == setting:
            raise Refused(f"this train.py was run before: {row.line.expandtabs(1)} (make run AGAIN=1 runs it again)")


def cmd_kept(args):
    """The kept commits, the newest first; refused while the run of --head is not logged (discard.sh)."""
    rows, attempt = read_rows()[0], records.read_json(ATTEMPT)
    if attempt and attempt["tag"] == args.tag and attempt["commit"] == args.head and not attempt.get("log_complete"):
        status = records.newest_attempt(args.tag)["status"]
        if status == "running":
            raise Refused("the run has not ended yet")
        if status != "interrupted" and can_be_a_row(attempt, rows):
            word = "discard" if status == "valid" else "crash"
            raise Refused(f'the newest run is not logged yet: make log-result STATUS={word} DESC="…" comes first')
    for row in reversed(rows):
        if row.status == "keep":
            print(row.commit)


# --- what they stand on --------------------------------------------------------------------------


def refuse_untruthful(status, attempt):
    """What the row would say must be what happened, and be said once."""
    outcome = attempt["status"]
    if attempt.get("log_complete"):
        raise Refused(f"this run is logged already, as row {attempt['logged']}: make run")
    if outcome == "running":
        raise Refused("the run has not ended yet")
    if status == "crash" and outcome == "valid":
        raise Refused("the run was valid, so it is no crash: STATUS=keep or STATUS=discard")
    if status != "crash" and outcome != "valid":
        raise Refused(f"the run has no valid result ({outcome}), so it can only be logged as STATUS=crash")


def can_be_a_row(attempt, rows):
    """Whether log-result would take it: a short try with another budget, say, has no place in the table."""
    try:
        if attempt["status"] == "valid":
            verdict.decide(records.record_of_attempt(attempt), rows_before(attempt, rows))
    except Refused:
        return False
    return True


def rows_before(attempt, rows):
    """The rows that the attempt is to be compared with: once logged, those above its own."""
    return rows[: attempt["logged"] - 1] if attempt["logged"] else rows


def journal_entry(attempt, record, row, result, found, unanswered):
    lines = [f"\n## {attempt['number']}. {row.status}: {row.description}\n"]
    if record:
        training = record["training"]
        memory, steps = f"{training['peak_memory_mb'] / 1024:.1f} GB", f"{training['total_steps']} steps"
        lines.append(f"- {verdict.change_of(result)}, {memory}, {steps}, evaluation {training['eval_seconds']:.1f} s")
        against = f" against {result.base.commit}" if result.base else ""
        lines.append(f"- verdict{against}: {result.verdict} ({result.rule})")
    else:
        lines.append(f"- {attempt['status']}: {records.one_line(attempt['reason'])}")
    made = f", record {record['run_id']}" if record else ""
    lines.append(f"- {attempt['tag']}, commit {attempt['commit'] or 'none'}, attempt {attempt['id']}{made}")
    for name, text in (("found", records.one_line(found)), ("open", records.one_line(unanswered))):
        if text:
            lines.append(f"- {name}: {text}")
    return "\n".join(lines) + "\n"


def restore_results():
    """Bring a lost results.tsv back."""
    if not RESULTS.exists() and COPY.exists():
        records.append(RESULTS, COPY.read_text(encoding="utf-8", errors="replace"))
        print(f"note: results.tsv was missing, and is restored from {COPY.relative_to(ROOT)}")


def archive_results():
    """Move results.tsv into data/ under a name that nothing has."""
    restore_results()
    if not RESULTS.exists():
        return
    DATA.mkdir(exist_ok=True)
    name, number = f"results_{datetime.now():%Y%m%d_%H%M%S}", 1
    while (archive := DATA / (name + (f"_{number}" if number > 1 else "") + ".tsv")).exists():
        number += 1
    RESULTS.rename(archive)
    COPY.unlink(missing_ok=True)
    print(f"note: the older results.tsv is now {archive.relative_to(ROOT)}")


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"git {words[0]}: {done.stderr.strip()}")
    return done.stdout


def blobs_of(commits):
    """The hash of each commit's train.py; something else where git does not know it."""
    if not (ROOT / ".git").exists():
        return [""] * len(commits)
    names = "".join(f"{commit}:train.py\n" for commit in commits)
    command = ["git", "cat-file", "--batch-check=%(objectname)"]
    return subprocess.run(command, cwd=ROOT, input=names, capture_output=True, text=True).stdout.splitlines()


def next_number(tag, rows):
    """The experiment's number: one more than any row or ref has."""
    number = rows
    if (ROOT / ".git").exists():
        for ref in git("for-each-ref", "--format=%(refname)", f"refs/experiments/{tag}/").split():
            if (last := ref.rsplit("/", 1)[1]).isdigit():
                number = max(number, int(last))
    return number + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = {name.removeprefix("cmd_"): f for name, f in globals().items() if name.startswith("cmd_")}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--tag", default="none")
    parser.add_argument("--head", default="", help="the checked-out commit (kept)")
    parser.add_argument("--session", action="store_true", help="a session is open (seen)")
    parser.add_argument("--new-table", action="store_true", help="archive rows that cannot be compared (log)")
    for option in ("status", "description", "found", "open"):
        parser.add_argument(f"--{option}", default="", help="(log)")
    args = parser.parse_args()
    records.run_command(commands[args.command], args)


if __name__ == "__main__":
    main()
