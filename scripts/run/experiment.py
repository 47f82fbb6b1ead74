"""Run train.py under watch: one process group, a time limit, a log, and nothing left behind.

usage: run.py --tag TAG [--head COMMIT] [--session] [--again | --reference | --pair] [--runs N] [--baseline]

What comes before (is it committed, is nothing else changed, is the machine free) is in run.sh; what the agent is
told at the end in summary.py. Whether a record is of this run is settled by identity, never by a clock.
"""

import ast
import ctypes
import errno
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

from harness import files, project
from scripts import session
from scripts.judge import log_result
from scripts.run.notify import notify
from scripts.session import PROGRESS, ROOT, TEMPORARY, Refused, Session, options, record, run_command, say, tell
from scripts.show import summary
from scripts.show.summary import EXIT

PATIENCE = 3.0  # seconds between asking a process to end and killing it
ROOM = 2**20  # bytes that are free on a disk that is not full
# How Python, C++, MLX, Metal and CUDA say that memory is short.
NO_MEMORY = re.compile(r"MemoryError|bad_alloc|(?i:out of memory|unable to allocate|maximum allowed buffer size)")
stopped_by = []  # signals that came


# --- processes -------------------------------------------------------------------------------------


def descendants(root):
    """The pids of all that `root` started, and they, in whatever group. From /proc, elsewhere from ps."""
    parents = {}
    if os.path.exists("/proc/self/stat"):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError, IndexError, ValueError):
                facts = Path("/proc", name, "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
                parents[int(name)] = int(facts[1])
    else:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
        for line in listed.stdout.splitlines():
            pid, parent = map(int, line.split())
            parents[pid] = parent
    found, new = set(), {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def kill_tree(pid, reap=lambda: None):
    """End a process group and all that came from it: asked first, killed after PATIENCE seconds.

    reap: waits for its leader where that is our child, which would stay in its group as a zombie.
    """
    everyone = descendants(pid)
    with suppress(OSError):
        os.killpg(pid, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and group_lives(pid):
        time.sleep(0.1)
        reap()
    for victim in everyone | descendants(pid):
        with suppress(OSError):
            os.kill(victim, signal.SIGKILL)
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def group_lives(group):
    with suppress(OSError):  # on macOS also where it holds zombies alone
        os.killpg(group, 0)
        return True
    return False


def take_charge():
    """From here on a signal ends the run, not us, and no process of it is lost."""
    with suppress(OSError, AttributeError):  # on Linux, what loses its parent below us becomes our child (prctl(2))
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopped_by.append(number))


@contextmanager
def guarded(pid):
    """Should we be killed without a chance to clean up, a process that waits for just that does it."""
    end, ours = os.pipe()
    guard = os.fork()
    if guard == 0:
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.closerange(3, end)
            os.closerange(end + 1, 256)
            if not os.read(end, 1):
                kill_tree(pid)
        finally:
            os._exit(0)
    os.close(end)
    try:
        yield
    finally:
        with suppress(OSError):
            os.write(ours, b"x")
        os.close(ours)
        os.waitpid(guard, 0)


def keep_awake(pid):
    """The machine does not go to sleep while `pid` lives, where it has a word for that."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    inhibit = ["systemd-inhibit", "--what=sleep:idle", "--who=autoresearch", "--why=an experiment runs"]
    wait = f"while kill -0 {pid} 2>/dev/null; do sleep 2; done"
    for command in (["caffeinate", "-i", "-w", str(pid)], [*inhibit, "sh", "-c", wait]):
        with suppress(OSError):
            return subprocess.Popen(command, **quiet)


class Output:
    """Where train.py prints to: the log, and on a terminal both. Of an overwritten line the log has the last state."""

    def __init__(self, path):
        self.log, self.line, self.terminal = open(path, "wb", buffering=0), b"", None
        self.target = self.log  # what train.py is given
        if sys.stdout.isatty():
            self.terminal, self.target = pty.openpty()
            with suppress(OSError):
                fcntl.ioctl(self.target, termios.TIOCSWINSZ, fcntl.ioctl(1, termios.TIOCGWINSZ, b"\0" * 8))

    def pump(self, seconds):
        """Pass on what came, or wait so long for it."""
        if self.terminal is None:
            return
        while select.select([self.terminal], [], [], seconds)[0]:
            try:
                chunk = os.read(self.terminal, 65536)
            except OSError:  # Linux's way to say that the other side is closed
                chunk = b""
            if not chunk:
                time.sleep(seconds)
                return
            os.write(1, chunk)
            *whole, line = (self.line + chunk.replace(b"\r\n", b"\n")).split(b"\n")
            self.log.write(b"".join(last_state(text) + b"\n" for text in whole))
            self.line, seconds = last_state(line), 0

    def close(self):
        if self.terminal is not None:
            os.close(self.target)
            self.pump(0)
            os.close(self.terminal)
        self.log.write(self.line)
        self.log.close()


def last_state(line):
    return line[line.rfind(b"\r", 0, -1) + 1 :]


def words_of_group(*options):
    """What runs a program: Python, and for more than one device (NPROC, HOSTS) its launcher."""
    alone = os.environ.get("NPROC") in (None, "", "1") and not os.environ.get("HOSTS")
    return [sys.executable] if alone else [sys.executable, "-m", "scripts.run.launch", *options]


def locks():
    """The descriptors that hold the devices' locks (see lock.py): who runs has them too."""
    return [int(number) for number in os.environ.get("AUTORESEARCH_LOCKED", "").split()]


def watch(folder, timeout, *options):
    """Run train.py in `folder` to its end: (pid, exit code, whether time ran out)."""
    output = Output(ROOT / "run.log")
    child = subprocess.Popen(
        [*words_of_group(), "train.py", *options], cwd=folder, stdin=subprocess.DEVNULL, stdout=output.target,
        stderr=subprocess.STDOUT, start_new_session=True, pass_fds=locks(),
    )  # fmt: skip
    late = False
    keep_awake(child.pid)
    with guarded(child.pid):
        end = time.monotonic() + timeout
        while child.poll() is None:
            late = time.monotonic() > end
            if late or stopped_by:
                break
            if output.terminal is None:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(min(0.5, max(0.01, end - time.monotonic())))
            else:
                output.pump(0.2)
        kill_tree(child.pid, child.poll)  # also what train.py left behind
        child.wait()
    for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}{child.pid}-*"):  # of a launcher that was killed
        shutil.rmtree(folder, ignore_errors=True)
    for orphan in descendants(os.getpid()):
        with suppress(OSError):
            os.kill(orphan, signal.SIGKILL)
    output.close()
    return child.pid, child.returncode, late


# --- one run ----------------------------------------------------------------------------------------


def clear_up(sitting):
    """What killed commands left: a row half logged is completed, temporary files and folders go."""
    log_result.complete_begun(sitting)
    for folder in (project.DATA, project.STORE):  # found out now, not when the budget is spent
        files.make_folder(folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    for folder in (ROOT, project.DATA, project.STORE, sitting.folder):
        files.remove_leftovers(folder)
    known = re.findall(r"(?m)^worktree (.*)/tree$", session.git("worktree", "list", "--porcelain") or "")  # and gone
    lost = {Path(name) for name in known if not os.path.lexists(name) and Path(name).name.startswith(TEMPORARY)}
    for folder in {*Path(tempfile.gettempdir()).glob(TEMPORARY + "*-*"), *lost}:
        pid, mine = folder.name.split("-")[1], folder in lost or folder.lstat().st_uid == os.getuid()
        if pid.isdecimal() and mine and not files.is_alive(int(pid)):
            ours = session.git("worktree", "remove", "--force", "--force", str(folder / "tree")) is not None
            if ours or not (folder / "tree" / ".git").exists():  # else another clone's
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def checked_out(commit):
    """A folder in which train.py is as `commit` has it; the tree and the branch at hand stay as they are."""
    if not commit:
        yield ROOT
        return
    prefix = f"{TEMPORARY}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as parent:
        folder = Path(parent, "tree")
        if session.git("worktree", "add", "-q", "--detach", str(folder), commit) is None:
            raise Refused(f"git could not check out {commit[:7]} in a folder of its own: git worktree prune, and again")
        try:
            if (ROOT / ".venv").exists():
                (folder / ".venv").symlink_to(ROOT / ".venv")
            yield folder
        finally:
            session.git("worktree", "remove", "--force", str(folder))


def run_once(sitting, role, commit, head, seed, pair=None):
    """Run a program once and note how it ended; returns the attempt.

    role: candidate, reference or holdout; the last one's `test` holds what was found on the test split.
    commit: what is checked out for it, or None for the folder at hand.
    """
    budget, timeout = project.settings()[0], project.positive("TIMEOUT", os.environ.get("TIMEOUT") or "600")
    with checked_out(commit) as folder:
        last = folder / "data" / "last_run.json"
        attempt = {
            "id": f"{time.strftime('%Y%m%d_%H%M%S')}-{uuid.uuid4().hex[:6]}",
            "role": role, "pair": pair, "tag": sitting.tag, "commit": commit or head or None,
            "train_blob": project.blob_hash(folder / "train.py"), "budget": budget, "seed": seed,
            "launcher": os.getpid(), "lock": session.LOCK,
            "waited": float(os.environ.pop("AUTORESEARCH_WAITED", 0)),
        }  # fmt: skip
        before = (files.read_json(last) or {}).get("run_id")
        sitting.note("begin", **attempt)
        os.environ["AUTORESEARCH_SEED"], start = str(seed), time.monotonic()
        os.environ["AUTORESEARCH_PROGRESS"] = f"{attempt['id']} {PROGRESS}"
        if role == "holdout":
            files.write_atomically(folder / "data" / ".holdout", attempt["id"])
        pid, code, late = watch(folder, timeout, *["--holdout"] * (role == "holdout"))
        wall = time.monotonic() - start
        found = files.read_json(last)
        status, reason, run = outcome(attempt, pid, code, timeout if late else None, wall, found, before)
        if run and run.get("run_id") and commit:
            files.write_atomically(project.DATA / "last_run.json", last.read_text())
        ended = {"status": status, "reason": reason, "exit_code": code, "wall_seconds": round(wall, 1)}
        ended["run_id"] = run["run_id"] if run else None
        if role == "holdout" and status == "valid":
            ended["test"] = files.read_json(folder / "data" / "holdout.json")
        sitting.note("end", id=attempt["id"], **ended)
    return {**attempt, **ended, "row": None}


# --- how it ended, and the words for it -------------------------------------------------------------


def outcome(attempt, pid, code, late, wall, found, before):
    """(status, why, record or None) of a run that has ended. late: the limit that it ran past, else None."""
    if stopped_by:
        return "interrupted", f"stopped by {signal.Signals(stopped_by[0]).name}", None
    if late:
        return "timeout", f"it ran past TIMEOUT={late:g} s and was killed", None
    stale = None
    if found is None:
        stale = "data/last_run.json is missing or damaged"
    elif found.get("run_id") == before:
        stale = "data/last_run.json is of an earlier run"
    elif pid not in (found.get("pid"), found.get("ppid")):
        stale = "data/last_run.json is of another process"
    elif not record.seal_fits(found):
        stale = "data/last_run.json was not written by the harness: its seal does not fit"
    elif found["train_blob"] != attempt["train_blob"]:
        stale = "train.py was changed while the run started"
    if not stale and found["status"] != "valid" and code:
        return "paused" if found["reason"].startswith("paused:") else "invalid", found["reason"], found
    if code and shutil.disk_usage(ROOT).free < ROOM:
        return "paused", f"the disk is full, and train.py ended with exit {code}: free some space", None
    if code:
        return "crash", how_it_died(code, wall), None
    if stale:
        return "stale", f"train.py ended without a record of its own: {stale}", None
    if found["status"] != "valid":
        return "invalid", found["reason"], found
    told = found["training"]["total_seconds"]
    if told < wall - 5 - 0.02 * wall:
        return "invalid", (
            f"{wall - told:.0f} s of {wall:.0f} passed that the run does not account for. Look for work above "
            "`import prepare`, for work after run.finish(); or its clock stood still."), found  # fmt: skip
    return "valid", None, found


def how_it_died(code, wall):
    if code == -signal.SIGKILL:
        return (
            f"train.py was killed (signal 9) after {wall:.0f} s, as when memory is short: halve DEVICE_BATCH_SIZE, "
            "or see what else takes memory"
        )
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit {code}"
    last = summary.what_was_raised(ROOT / "run.log")
    said = f"train.py ended with {how} after {wall:.0f} s" + (f": {last}" if last else "")
    return said + (". Out of memory: halve DEVICE_BATCH_SIZE, or EVAL_BATCH_SIZE" if NO_MEMORY.search(last) else "")


# --- which runs --------------------------------------------------------------------------------------


def seeds_of(sitting, blob):
    """The seeds of a program's runs that could be compared with one made now, a seed for each run."""
    budget = project.settings()[0]
    alike = [a for a in sitting.attempts() if a["status"] == "valid" and a["budget"] == budget]
    like = session.record_of(alike[-1]) if alike else None
    return [r["seed"] for r in record.runs_of(blob, like)] if like else []


def unused(seeds):
    return next(seed for seed in range(project.SEED, project.SEED + len(seeds) + 1) if seed not in seeds)


def refuse_seen(sitting, args):
    """Refuse a train.py that was run before, and say what came of it; and whatever would push a result aside."""
    blob, (budget, seed), rows = project.blob_hash(ROOT / "train.py"), project.settings(), sitting.rows()[0]
    attempts = [a for a in sitting.attempts() if a["role"] == "candidate"]
    if attempts and not attempts[-1].get("logged"):
        last = attempts[-1]
        if last["train_blob"] == blob and (last["budget"], last["seed"]) == (budget, seed):
            if last["status"] not in ("running", "interrupted", "paused"):
                word = "baseline" if args.baseline else "run"
                raise Refused(f"this train.py was just run ({last['status']}): make log-result, or make {word} AGAIN=1")
        elif args.session and last["train_blob"] != blob and summary.can_be_a_row(sitting, last, rows):
            commit = last["commit"][:7]
            raise Refused(f'the result of {commit} is not logged yet: make log-result STATUS=… DESC="…" comes first')
    for row in rows:
        tried = [a for a in attempts if a["train_blob"] == blob and a["status"] == "valid"]
        if row.blob == blob and (not tried or (budget, seed) in [(a["budget"], a["seed"]) for a in tried]):
            raise Refused(f"this train.py was run before: {row.line.expandtabs(1)} (make run AGAIN=1 runs it again)")


def refuse_modules(sitting, args):
    """Refuse a program that is more than train.py: the commit alone, from the session's start on, must run again."""
    base = f"refs/experiments/{sitting.tag}/start" if args.session else args.head
    lists = ("ls-files", "--others", "--exclude-standard"), ("diff", "--name-only", base)
    new = {name for words in lists for name in (session.git(*words, "--", "*.py", "*.so") or "").splitlines()}
    known = (session.git("ls-tree", "--name-only", base) or "").splitlines()
    new |= {path.name for path in ROOT.glob("*.py")} - {*known}  # what git ignores as well
    if not args.head or not new - {"train.py"}:
        return
    used = set()
    for path in [ROOT / name for name in known if name.endswith(".py")] + [ROOT / "train.py"]:
        with suppress(OSError, SyntaxError, ValueError, RecursionError):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Import):
                    used |= {part for alias in node.names for part in alias.name.split(".")}
                elif isinstance(node, ast.ImportFrom):
                    used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    used |= {node.value, node.value.rpartition("/")[2]}
    for name in sorted(new - {"train.py"}):
        path = Path(name)
        stem = path.parent.name if path.stem == "__init__" else path.name.split(".")[0]
        if {stem, name, path.name} & used:
            what = "was committed or changed since the session began" if args.session else "git does not have like this"
            raise Refused(f"train.py imports or names {name}, which {what if name in known else 'is new'}: "
                          "an experiment is train.py alone, so its code belongs in there")  # fmt: skip


def plan(sitting, args):
    """The runs to make: [(role, commit or None, seed, pair), …]."""
    seed, blob = project.settings()[1], project.blob_hash(ROOT / "train.py")
    chosen = seed if os.environ.get("AUTORESEARCH_SEED") else None
    if not (args.reference or args.pair):
        if not args.again:
            refuse_seen(sitting, args)
            return [("candidate", None, seed, None)]
        return repeats("candidate", None, seeds_of(sitting, blob), args.runs, chosen)
    row = sitting.reference(sitting.rows()[0], args.head)
    if row is None or not row.blob or not args.head:
        raise Refused("there is no reference yet, or git does not know it: make baseline makes one")
    used = seeds_of(sitting, row.blob)
    if args.reference:
        return repeats("reference", row.commit, used, args.runs, chosen)
    if row.blob == blob:
        raise Refused("the program at hand is the reference: there is no pair (make run REFERENCE=1 repeats it)")
    mine, made = seeds_of(sitting, blob), []
    count = len({a["pair"] for a in sitting.attempts() if a.get("pair")})
    for number in range(count, count + (args.runs or 1)):
        seed, pair = unused([*used, *mine]) if chosen is None else chosen, f"{number + 1}-{uuid.uuid4().hex[:6]}"
        ends = [("reference", row.commit, seed, pair), ("candidate", None, seed, pair)]
        made += ends if number % 2 == 0 else ends[::-1]
        mine.append(seed)
    return made


def repeats(role, commit, used, wanted, chosen):
    """As many runs as `wanted` are more than those `used`, or one. chosen: the seed of all, or None."""
    seeds = []
    for _ in range(len(used), wanted or len(used) + 1):
        seeds.append(unused([*used, *seeds]) if chosen is None else chosen)
    return [(role, commit, seed, None) for seed in seeds]


def main(args):
    sitting = Session(args.tag)
    sitting.link()
    clear_up(sitting)
    take_charge()
    if any(a["status"] == "interrupted" and "end" not in a for a in sitting.attempts()[-1:]):
        say("note: the run before this one was cut off without a word and is not logged")
    refuse_modules(sitting, args)
    runs = plan(sitting, args)
    if not runs:
        print(f"nothing to do: there are {args.runs} runs already")
        return
    if len(words_of_group()) > 1 and subprocess.run([*words_of_group("--check"), "train.py"]).returncode:
        sys.exit(1)
    for number, (role, commit, seed, pair) in enumerate(runs, 1):
        attempt = run_once(sitting, role, commit, args.head, seed, pair)
        if attempt["status"] != "valid":
            break
        if number < len(runs) or attempt["pair"]:  # behind a pair the summary is of means
            tell(summary.brief(attempt))
    text = "\n".join(summary.lines(sitting, attempt, args.baseline))
    tell(text)
    notify(text)
    sys.exit(128 + stopped_by[0] if stopped_by else EXIT[attempt["status"]])


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--head", default="", help="the checked-out commit")
    parser.add_argument("--session", action="store_true", help="a session is open")
    parser.add_argument("--again", action="store_true", help="the program at hand once more, with a seed of its own")
    parser.add_argument("--reference", action="store_true", help="the last kept program, in a folder of its own")
    parser.add_argument("--pair", action="store_true", help="reference and candidate in turn")
    parser.add_argument("--runs", type=int, default=0, help="until there are so many; of pairs, so many more")
    parser.add_argument("--baseline", action="store_true", help="leave out what to type next")
    run_command(main, parser.parse_args())
