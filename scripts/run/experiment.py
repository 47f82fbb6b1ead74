"""Run train.py as an experiment: once, again, or in a pair; note how it ended, and say so.

The path of a run:

    make run              what was typed becomes environment variables
    scripts/run.sh        is it committed, is nothing else changed; the session's settings; then this
    experiment.py         takes the device (lock.py), says which runs are made (plan.py), and makes them
    supervise.py          starts train.py, watches it to its end, and leaves nothing of it behind
    launch.py             with NPROC or HOSTS alone: through mlx.launch, a train.py on each device
    train.py              trains, is evaluated by prepare.Run, and leaves data/last_run.json
    experiment.py         whose record is that? It names its attempt and its program; no clock is asked
    show/summary.py       what the agent is told
    make log-result       judge/log_result.py: the row, the journal, the commit's ref

The environment takes to train.py: AUTORESEARCH_BUDGET, _SEED, _FILES, _COLUMN, _CACHE (settings), _ROWS (of
evaluation), _ATTEMPT (whose record it is), _OWN (the session's FILES, which it may not open), _PROGRESS (a file for how
far it is), _TERMINAL (it may show that).
launch.py adds _GROUP.

An attempt is what the session notes of a run (session.py); a record what train.py left of it (harness/record.py); a
row what was logged; a program a train.py, by the hash of its blob.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress

from harness import files, processes, project
from scripts import session
from scripts.judge import log_result
from scripts.run import launch, lock, supervise
from scripts.run.plan import plan, refuse_modules
from scripts.session import PROGRESS, ROOT, Refused, Session, options, record, run_command, tell
from scripts.show import summary
from scripts.show.summary import EXIT

ROOM = 2**20  # bytes that are free on a disk that is not full
START, START_OF_GROUP = 5, 20  # seconds that pass at most until `import prepare`: of Python, and of mlx.launch as well
# How Python, C++, MLX, Metal and CUDA say that memory is short.
NO_MEMORY = re.compile(r"MemoryError|bad_alloc|(?i:out of memory|unable to allocate|maximum allowed buffer size)")


def begin(this_session):
    """What comes before any run: take the device, and clear up after commands that were killed. Returns the locks."""
    held = lock.take()
    this_session.link()
    log_result.complete_begun(this_session)
    for folder in (ROOT, project.DATA, project.STORE, this_session.folder):
        files.make_folder(folder)
        if not os.access(folder, os.W_OK):  # found out now, not when the budget is spent
            raise Refused(f"{session.shown(folder)} is read-only: chmod u+w {session.shown(folder)}")
        files.remove_leftovers(folder)
    session.git("worktree", "prune")  # their folders may have gone
    supervise.take_charge()
    return held


@contextmanager
def checked_out(commit):
    """A folder in which train.py is as `commit` has it; the tree and the branch at hand stay as they are."""
    if not commit:
        yield ROOT
        return
    folder = project.DATA / f"tree.{os.getpid()}.part"
    add = ["git", "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "-q", "--detach", str(folder), commit]
    try:
        added = subprocess.run(add, cwd=ROOT, capture_output=True, text=True, errors="replace")
        if added.returncode:
            raise Refused(f"git could not check out {commit[:7]}: {session.one_line(added.stderr)[-200:]}")
        folder.chmod(0o700)
        if (ROOT / ".venv").exists():  # what is preloaded has a path relative to the folder
            (folder / ".venv").symlink_to(ROOT / ".venv")
        yield folder
    finally:
        session.git("worktree", "remove", "--force", str(folder))


def of_group():
    """Whether one model is trained on several devices."""
    return os.environ.get("NPROC") not in (None, "", "1") or bool(os.environ.get("HOSTS"))


def run_once(this_session, held, role, commit, head, seed, pair=None):
    """Run a program once and note how it ended; returns the attempt.

    held: the locks. role: candidate, reference, ablation or holdout, whose attempt has its test score under `test`.
    commit: what is checked out for it, or None for the folder at hand.
    """
    if of_group():
        launch.hostfile()  # refused where it cannot be one: that is no fault of the program's
    budget, timeout = project.settings()[0], project.positive("TIMEOUT", os.environ.get("TIMEOUT") or "600")
    with checked_out(commit) as folder:
        last, holdout = folder / "data" / "last_run.json", role == "holdout"
        attempt = {
            "id": f"{time.strftime('%Y%m%d_%H%M%S')}-{uuid.uuid4().hex[:6]}",
            "role": role, "pair": pair, "tag": this_session.tag, "commit": commit or head or None,
            "train_blob": project.blob_hash(folder / "train.py"), "budget": budget, "seed": seed,
            "launcher": os.getpid(), "lock": list(held)[-1],
        }  # fmt: skip
        if head and not commit and attempt["train_blob"] != session.git("rev-parse", f"{head}:train.py"):
            raise Refused("train.py was edited since this was typed: commit it, or put it back, and type it again")
        this_session.note("begin", **attempt)
        through = ["-m", "scripts.run.launch", str(ROOT)] if of_group() else []
        command = [sys.executable, *through, "train.py", *["--holdout"] * holdout]
        rows = rows_setting(this_session, budget, project.dataset_of_train(folder / "train.py"))
        known = {"AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_ROWS": rows, "AUTORESEARCH_ATTEMPT": attempt["id"],
                 "AUTORESEARCH_OWN": this_session.stored_settings().get("FILES", ""),
                 "AUTORESEARCH_PROGRESS": str(PROGRESS)}  # fmt: skip
        code, wall = supervise.run(command, folder, ROOT / "run.log", timeout, held, {**os.environ, **known})
        status, reason, run = outcome(attempt, code, wall, timeout, files.read_json(last))
        if run and commit:  # its folder goes; data/last_run.json is always the newest run's
            files.write_atomically(project.DATA / "last_run.json", last.read_text())
        ended = {"status": status, "reason": reason, "wall_seconds": round(wall, 1), "run_id": run and run["run_id"]}
        if holdout and status == "valid":
            ended["test"] = files.read_json(folder / "data" / "holdout.json")
        this_session.note("end", id=attempt["id"], **ended)
    return {**attempt, **ended, "row": None}


def rows_setting(this_session, budget, dataset):
    """How many rows of evaluation a run scores: as the session's first one on this text chose; "auto" for that one."""
    for attempt in this_session.attempts():
        run = session.record_of(attempt) if (attempt["status"], attempt["budget"]) == ("valid", budget) else None
        if run and run["dataset"] == dataset:
            scored = run["result"].get("eval_rows")
            return "" if scored == run["result"].get("eval_rows_of") else str(scored)  # all, of test as well
    return "auto"


def exit_as(attempt):
    """End this command with the exit code of a run."""
    sys.exit(128 + supervise.stopped_by[0] if supervise.stopped_by else EXIT[attempt["status"]])


def notify(text):
    """Give `text` to a command of the user's, ON_RESULT, which can neither hold up the run nor fail it."""
    if command := os.environ.get("ON_RESULT"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        told = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.PIPE, **quiet)
        with suppress(OSError), told.stdin as pipe:
            pipe.write(text.encode("utf-8", "replace") + b"\n")


# --- how it ended, and the words for it -------------------------------------------------------------


def outcome(attempt, code, wall, timeout, found):
    """(status, why, record or None) of a run that has ended. found: what data/last_run.json holds now."""
    if supervise.stopped_by:
        return "interrupted", f"stopped by {signal.Signals(supervise.stopped_by[0]).name}", None
    if code is None:
        return "timeout", f"it ran past TIMEOUT={timeout:g} s and was killed", None
    foreign = why_foreign(attempt, found)
    if not foreign and found["status"] != "valid":
        return "paused" if found["reason"].startswith("paused:") else "invalid", found["reason"], found  # run_checks.py
    if code and shutil.disk_usage(ROOT).free < ROOM:
        return "paused", f"the disk is full, and train.py ended with exit {code}: free some space", None
    if code == processes.UNFIT:
        return "paused", summary.what_was_raised(ROOT / "run.log").removeprefix("error: "), None
    if code:
        return "crash", how_it_died(code, wall), None
    if foreign:
        return "stale", f"train.py ended without a record of its own: {foreign}", None
    unknown = wall - found["training"]["total_seconds"]
    if unknown > (START_OF_GROUP if of_group() else START) + 0.02 * wall:
        return "invalid", (
            f"{unknown:.0f} s of {wall:.0f} passed that the run does not account for. Look for work above "
            "`import prepare`, for work after run.finish(); or its clock stood still."), found  # fmt: skip
    return "valid", None, found


def why_foreign(attempt, found):
    """Why data/last_run.json is not this run's record, or None where it is."""
    if found is None:
        return "data/last_run.json is missing or damaged"
    if found.get("attempt") != attempt["id"]:
        return "data/last_run.json is of another run"
    if not record.seal_fits(found):
        return "data/last_run.json was not written by the harness: its seal does not fit"
    if found["train_blob"] != attempt["train_blob"]:
        return "train.py was changed while the run started"
    return None


def how_it_died(code, wall):
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit {code}"
    last = summary.what_was_raised(ROOT / "run.log")
    said = f"train.py ended with {how} after {wall:.0f} s" + (f": {last}" if last else "")
    short = code == -signal.SIGKILL or NO_MEMORY.search(last)
    return said + (". Memory was short, it seems: halve DEVICE_BATCH_SIZE, or EVAL_BATCH_SIZE" if short else "")


def main(args):
    this_session = Session(args.tag)
    held = begin(this_session)
    refuse_modules(this_session, args)
    runs = plan(this_session, args)
    if not runs:
        print(f"nothing to do: {session.counted(args.runs, 'run')} made already")
        return
    for number, (role, commit, seed, pair) in enumerate(runs, 1):
        attempt = run_once(this_session, held, role, commit, args.head, seed, pair)
        if attempt["status"] != "valid":
            break
        if number < len(runs) or attempt["pair"]:  # behind a pair the summary is of means
            tell(summary.brief(attempt))
    text = "\n".join(summary.lines(this_session, attempt, args.baseline))
    tell(text)
    notify(text)
    exit_as(attempt)


if __name__ == "__main__":
    flags = dict.fromkeys(("session", "again", "reference", "pair", "baseline"), False)
    run_command(main, options(__doc__, head="", runs=0, **flags).parse_args())
