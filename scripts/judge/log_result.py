"""make log-result (see scripts/log-result.sh).

What is about to be written is noted first (session.events), so that a call which was cut short is completed by the next
one, and nothing is written twice. --new-table: archive rows that cannot be compared. --kept: only print what was kept
before COMMIT (discard.sh).
"""

import json
import os
import re
import shutil
from contextlib import suppress
from datetime import datetime

from harness import files, project
from scripts import session
from scripts.judge import verdict
from scripts.session import HEADER, JOURNAL, Refused, Session, counted, one_line, options, run_command


def log(args):
    with files.one_at_a_time(project.STORE):
        this_session = Session(args.tag)
        this_session.link()
        attempt = this_session.candidate()
        if not half_logged(attempt):
            refuse_untruthful(args.status, attempt)
            intent = intended(this_session, attempt, args)
            this_session.note("logging", id=attempt["id"], **intent)
            attempt |= intent
        complete(this_session, attempt)
    print(f"row {attempt['row']}: {attempt['line'].expandtabs(1)}")


def half_logged(attempt):
    return attempt.get("logging") and not attempt.get("logged")


def complete_begun(this_session):
    """What an earlier log-result was killed over is completed, before anything else goes on."""
    with files.one_at_a_time(project.STORE):
        for attempt in filter(half_logged, this_session.attempts()):
            if this_session.logged().get(attempt["row"], {}).get("id") == attempt["id"]:
                complete(this_session, attempt)
                session.say(f"note: row {attempt['row']} had been begun and cut short; it is completed")


def complete(this_session, attempt):
    """Write what was noted of a run's logging, as far as it is not there yet."""
    add_once(this_session.table, attempt["line"] + "\n", HEADER + "\n")
    journal = JOURNAL / attempt["journal"]
    add_once(journal, attempt["entry"], f"# Research journal, {journal.stem.removeprefix('log_')}\n")
    if attempt["commit"]:
        ref = f"refs/experiments/{this_session.tag}/{attempt['number']:03d}"
        if session.git("-c", "core.fsync=committed", "update-ref", ref, attempt["commit"]) is None:
            raise Refused(f"git could not write .git/{ref}: a full disk, or a read-only folder? Mend that, and again")
    if attempt["row_status"] == "keep" and program_of_weights(project.LAST_WEIGHTS) == attempt["train_blob"]:
        own = this_session.folder / project.BEST_WEIGHTS.name  # it outlives the next session, and a worktree
        linked = own.with_name(f".{own.name}.{os.getpid()}.tmp")
        try:
            os.link(project.LAST_WEIGHTS, linked)  # they may be gigabytes
        except OSError:  # on another disk
            shutil.copyfile(project.LAST_WEIGHTS, linked)
        files.move_into_place(linked, own)
        linked.unlink(missing_ok=True)  # a rename leaves it where a call that was cut short had come this far
        files.move_into_place(project.LAST_WEIGHTS, project.BEST_WEIGHTS)
    this_session.note("logged", id=attempt["id"])


def add_once(path, text, header):
    """Add whole lines at the end of a file, where they are not in it yet. header: what a new file begins with."""
    there = path.read_bytes() if path.exists() else header.encode()
    if text.encode() not in there:
        end = b"" if there.endswith(b"\n") or not there else b"\n"  # a line that was cut short ends there
        files.write_atomically(path, there + end + text.encode())


def refuse_untruthful(status, attempt):
    """What the row would say must be what happened, and be said once."""
    outcome = attempt["status"]
    if attempt.get("logged"):
        raise Refused(f"this run is logged already, as row {attempt['row']}: change train.py and make run")
    if outcome in ("running", "interrupted", "paused"):
        raise Refused(f"the run has no result ({outcome}), so no row: make run")
    head = session.git("rev-parse", "-q", "--verify", "HEAD") if attempt["commit"] and status == "keep" else None
    here, own = head and session.git("rev-parse", f"{head}:train.py"), attempt["train_blob"]
    before = session.programs_of(attempt["commit"]) if head and here != own else ()
    if head and (own not in session.programs_of(head) or here in before):  # reset, or reverted
        mend = f"git checkout {attempt['commit'][:7]} -- train.py && git commit -m back"
        raise Refused(f"the branch does not have this program any more, so it cannot be kept: {mend} brings it back")
    if (status == "crash") == (outcome == "valid"):
        mend = "it is no crash: STATUS=keep or STATUS=discard" if outcome == "valid" else "STATUS=crash alone is true"
        raise Refused(f"the run was {outcome}, so {mend}")


def intended(this_session, attempt, args):
    """What is to be written, as a dict of plain values; refused where it cannot be a row."""
    description = one_line(args.description)
    if args.status not in ("keep", "discard", "crash"):
        raise Refused(f"STATUS={args.status} is none of keep, discard, crash")
    if not description:
        raise Refused('DESC is missing: say in one line what was tried, DESC="…"')
    rows, decision = this_session.rows()[0], None
    if attempt["status"] == "valid":
        try:
            decision = verdict.of_attempt(this_session, attempt, rows)
        except verdict.Incomparable:
            if not args.new_table:
                raise
            this_session.archive_table()
            rows = []
            decision = verdict.of_attempt(this_session, attempt, rows)
        if decision.word == "again":
            raise Refused(f"{decision.rule}, and repeats add no row: change train.py, or make discard")
        if args.new_table and decision.row:
            raise Refused('there is a baseline already: make log-result STATUS=… DESC="…" logs this run as an idea')
        same = [row for row in rows if row.blob == attempt["train_blob"] and row.status == args.status != "keep"]
        if same:
            raise Refused(f"row {same[0].number} is this program's, and repeats add no row: make discard")
        # val_bpb and speed by all runs of the program, memory by this one
        new, memory = decision.new, decision.run["training"]["peak_memory_mb"] / 1024
        figures = f"{new.bpb:.6f}\t{memory:.1f}\t{round(new.rate)}"
    else:
        figures = "0.000000\t0.0\t0"
    line = f"{(attempt['commit'] or '0' * 7)[:7]}\t{figures}\t{args.status}\t{description}"
    refs = session.git("for-each-ref", "--format=%(refname:lstrip=-1)", f"refs/experiments/{this_session.tag}/") or ""
    number = 1 + max([len(rows), *map(int, filter(str.isdecimal, refs.split()))])  # of ref and journal
    gain = expected(attempt["commit"])
    return {
        "row": len(rows) + 1, "number": number, "line": line, "row_status": args.status, "commit": attempt["commit"],
        "train_blob": attempt["train_blob"], "description": description,
        "verdict": decision and decision.word, "rule": decision and decision.rule,
        "reference": decision and decision.row and decision.row.commit,
        "expected": gain, "journal": f"log_{datetime.now():%Y-%m-%d}.md",
        "found": one_line(args.found), "question": one_line(args.open),
        "entry": entry(attempt, args, number, description, decision, gain),
    }  # fmt: skip


def expected(commit):
    """The gain [from, to] that the commit's message expects, as in `Expect: 0.002 to 0.006`; else None."""
    said = session.git("log", "-1", "--format=%B", commit) if commit else ""
    found = re.search(r"(?mi)^expect:\s*([-+]?\d*\.?\d+)\s*(?:to|-|…)\s*([-+]?\d*\.?\d+)", said or "")
    return sorted(map(float, found.groups())) if found else None


def entry(attempt, args, number, description, decision, gain):
    """The journal's text on an experiment: its figures, its verdict, what was found. gain: see `expected`."""
    lines = [f"\n## {number}. {args.status}: {description}\n"]
    if decision:
        training, new, old = decision.run["training"], decision.new, decision.old
        runs = counted(new.runs, "run") + (f" against {old.runs}" if old else "")
        lines.append(f"- val_bpb {new.bpb:.6f}, {new.rate:.0f} tok/s, {runs}, {training['total_steps']} steps, "
                     f"{training['peak_memory_mb'] / 1024:.1f} GB")  # fmt: skip
        against = f" against {decision.row.commit}" if decision.row else ""
        lines.append(f"- verdict{against}: {decision.word} ({verdict.reason(decision)})")
        lines += [f"- {note}" for note in decision.notes]
    else:
        lines.append(f"- {attempt['status']}: {one_line(attempt['reason'])}")
    if gain:
        lines.append("- expected: a gain of {:g} to {:g}".format(*gain))
    lines.append(f"- {attempt['tag']}, commit {attempt['commit'] or 'none'}, attempt {attempt['id']}, "
                 f"record {attempt.get('run_id') or 'none'}")  # fmt: skip
    for name, text in (("found", one_line(args.found)), ("open", one_line(args.open))):
        if text:
            lines.append(f"- {name}: {text}")
    return "\n".join(lines) + "\n"


def program_of_weights(path):
    """Which program (blob) the weights in a file are of; None where there is no such file of the harness's."""
    with suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(size, 2**24)))["__metadata__"]["train_blob"]
    return None


def kept(args):
    """Print the last kept commit that this one descends from; refused while its run is not logged (discard.sh)."""
    this_session = Session(args.tag)
    this_session.link()
    complete_begun(this_session)
    rows, newest = this_session.rows()[0], this_session.newest()
    if newest and newest["commit"] == args.kept and not newest.get("logged"):
        if newest["status"] == "running":
            raise Refused("the run has not ended yet")
        failed = newest["status"] in ("crash", "invalid", "stale", "timeout")
        if failed or verdict.can_be_a_row(this_session, newest, rows):
            word = "crash" if failed else "discard"
            raise Refused(f'the newest run is not logged yet: make log-result STATUS={word} DESC="…" comes first')
    row = this_session.reference(rows, args.kept)
    if other := session.taken_back(rows, row):
        session.say(f"note: row {other.number}, kept, is not on this branch: history was rewritten or taken back. "
                    f"git reset --hard {other.commit} goes on from there")  # fmt: skip
    print(row.commit if row else "")


if __name__ == "__main__":
    texts = dict.fromkeys(("status", "description", "found", "open"), "")
    args = options(__doc__, new_table=False, kept=None, **texts).parse_args()
    run_command(kept if args.kept is not None else log, args)
