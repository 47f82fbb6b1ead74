"""One attempt at an experiment: its lock, its beginning, how it ended, and what the agent is told.

run.sh keeps the processes; this keeps data/attempt.json. Whether the record in data/last_run.json is of
this attempt is settled by identity (run and process ids), never by a clock.
"""

import argparse
import fcntl
import json
import os
import sys
import time
from datetime import datetime

import records
import verdict
from records import ATTEMPT, DATA, ROOT, Incomparable, Refused, read_json, write_json

SHOWN = 8  # lines of run.log that a crash shows
EXIT = {"valid": 0, "crash": 2, "invalid": 2, "stale": 3, "timeout": 124, "interrupted": 130}


def cmd_lock(args):
    """Take the machine's lock on the file that descriptor 9 holds open.

    The lock belongs to whoever has that descriptor: run.sh and the training under it. Should both die,
    the kernel drops it; no pid is trusted, none can be mistaken for another.
    """
    waited = False
    while True:
        try:
            fcntl.flock(9, fcntl.LOCK_EX | (0 if waited else fcntl.LOCK_NB))
            break
        except BlockingIOError:
            holder = holder_of(args.lock)
            if not args.wait:
                raise Refused(f"this machine is taken by another run{holder}; WAIT=1 waits for it") from None
            print(f"waiting for another run{holder}", flush=True)
            waited = True
    note = {"pid": args.pid, "clock": time.monotonic(), "folder": str(ROOT)}
    try:  # of another user's lock file only the content is out of reach
        with open(os.open(args.lock, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "w") as out:
            json.dump(note, out)
    except OSError:
        pass


def holder_of(path):
    holder = read_json(path) or {}
    if "pid" not in holder:
        return ""
    age = max(0, round(time.monotonic() - holder["clock"]))
    return f": pid {holder['pid']}, for {age // 60} min {age % 60} s, in {holder['folder']}"


def cmd_begin(args):
    attempt = read_json(ATTEMPT)
    now = datetime.now().astimezone()
    write_json(ATTEMPT, {
        "format_version": 1,
        "id": f"{now:%Y%m%d_%H%M%S}-{args.pid}-{os.urandom(2).hex()}",
        "tag": args.tag,
        "commit": args.head or None,
        "train_blob": records.blob_of_train(),
        "budget": float(os.environ["AUTORESEARCH_BUDGET"]),
        "seed": int(os.environ["AUTORESEARCH_SEED"]),
        "started": now.isoformat(timespec="seconds"),
        "clock": time.monotonic(),
        "launcher": args.pid,
        "previous_run_id": (read_json(DATA / "last_run.json") or {}).get("run_id"),
        "status": "running",
        "reason": None,
        "exit_code": None,
        "wall_seconds": None,
        "run_id": None,
        "logged": None,
    })  # fmt: skip
    if attempt and attempt["status"] == "running":
        print("note: the attempt before this one was cut off without a word and is not logged", file=sys.stderr)


def outcome(args, attempt, wall):
    """(status, why, record or None) of an attempt that has ended."""
    record = read_json(DATA / "last_run.json")
    if args.interrupted:
        return "interrupted", "stopped by a signal", None
    if args.timed_out:
        return "timeout", f"it ran past TIMEOUT={args.timed_out} s and was killed", None
    stale = None
    if record is None:
        stale = "data/last_run.json is missing or damaged"
    elif record.get("run_id") == attempt["previous_run_id"]:
        stale = "data/last_run.json is of an earlier run"
    elif args.child not in (record.get("pid"), record.get("ppid")):
        stale = "data/last_run.json is of another process"
    elif not records.seal_fits(record):
        stale = "data/last_run.json was not written by the harness: its seal does not fit"
    elif record["train_blob"] != attempt["train_blob"]:
        stale = "train.py was changed while the run started"
    fresh = stale is None
    if args.exit_code and fresh and record["status"] == "invalid":
        return "invalid", record["reason"], record
    if args.exit_code:
        how = f"signal {args.exit_code - 128}" if args.exit_code > 128 else f"exit {args.exit_code}"
        last = "".join(f": {line}" for line in last_lines(ROOT / "run.log", 1))
        return "crash", f"train.py ended with {how} after {wall:.0f} s{last}", None
    if not fresh:
        return "stale", f"train.py ended without a record of its own: {stale}", None
    if record["status"] != "valid":
        return "invalid", record["reason"], record
    told = record["training"]["total_seconds"]
    if told < wall - 5 - 0.02 * wall:
        return "invalid", f"the run says it took {told:.0f} s, but {wall:.0f} s passed: its clock stood still", record
    return "valid", None, record


def cmd_end(args):
    attempt = read_json(ATTEMPT)
    wall = time.monotonic() - attempt["clock"]
    status, reason, record = outcome(args, attempt, wall)
    attempt.update(status=status, reason=reason, exit_code=args.exit_code, wall_seconds=round(wall, 1))
    attempt["run_id"] = record["run_id"] if record else None
    write_json(ATTEMPT, attempt)
    lines = summary(attempt, record)
    if args.baseline and status == "valid":
        lines = lines[:-1]  # baseline.sh does the next step itself
    print("\n".join(lines))
    sys.exit(EXIT[status])


def summary(attempt, record):
    """What the agent reads: at most 15 lines."""
    status = attempt["status"]
    commit = (attempt["commit"] or "0" * 7)[:7]
    if status != "valid":
        code = attempt["exit_code"] if status == "interrupted" else EXIT[status]
        lines = [f"{status} (exit {code}) {commit}: {records.one_line(attempt['reason'])}"]
        if status in ("crash", "stale", "timeout"):
            lines += [f"  | {line}" for line in last_lines(ROOT / "run.log", SHOWN)]
        if status == "interrupted":
            return lines + ["next     make run"]
        lines.append("log      tail -n 50 run.log")
        return lines + ['next     mend it and commit, or: make log-result STATUS=crash DESC="…"']
    lines = [f"valid    {commit}  {attempt['wall_seconds']:.0f} s in all"]
    result, refused = None, None
    try:
        result = verdict.decide(record, records.read_rows()[0])
    except Incomparable as refusal:
        refused = refusal
    old = result.old_record if result else None
    for key, form in (
        ("val_bpb", ".6f"),
        ("peak_memory_mb", ".1f"),
        ("avg_tok_sec", ".0f"),
        ("total_steps", "d"),
        ("eval_seconds", ".1f"),
    ):
        new_value, old_value = value_of(record, key), value_of(old, key)
        change = f"{new_value - old_value:+{form}}" if old else ""
        if old and key == "avg_tok_sec":
            change = verdict.percent(new_value, old_value)
        lines.append(f"{key:15}{new_value:>13{form}}  {change}".rstrip())
    if refused:
        mend = f"make run BUDGET={refused.budget:g}" if refused.budget else "make baseline AGAIN=1"
        return lines + [f"verdict  none: {refused}", f"next     make discard, or {mend}"]
    if result.base:
        lines.append(f"against  {result.base.commit}  {result.base.description[:80]}")
    if result.runs > 1:
        lines.append(f"decided  by the {verdict.change_of(result)}")
    lines.append(f"verdict  {result.verdict}: {result.rule}")
    choice = result.verdict if result.verdict in ("keep", "discard") else "keep|discard"
    again = "make run AGAIN=1" if result.verdict == "rerun" else f'make log-result STATUS={choice} DESC="…"'
    return lines + [f"next     {again}"]


def value_of(record, key):
    if record and key == "val_bpb":
        return round(record["result"]["val_bpb"], 6)  # as the row has it, so that differences agree
    return record and record["training"][key]


def last_lines(path, count):
    """The end of a log, without what a progress line has overwritten."""
    if not path.exists():
        return []
    text = path.read_bytes()[-20000:].decode("utf-8", "replace")
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return [line[:160] for line in lines if line][-count:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["lock", "begin", "end"])
    parser.add_argument("--tag", default="none")
    parser.add_argument("--head", default="")
    parser.add_argument("--lock")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--pid", type=int, help="of run.sh")
    parser.add_argument("--child", type=int, help="of train.py")
    parser.add_argument("--exit-code", type=int)
    parser.add_argument("--timed-out", default="", help="the TIMEOUT that it ran past")
    parser.add_argument("--interrupted", action="store_true")
    parser.add_argument("--baseline", action="store_true", help="leave out what to type next")
    args = parser.parse_args()
    records.run_command({"lock": cmd_lock, "begin": cmd_begin, "end": cmd_end}[args.command], args)


if __name__ == "__main__":
    main()
