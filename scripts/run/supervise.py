"""Watch over train.py, or over the launcher of its ranks, from start to end; nothing of it is left behind.

It is a process group of its own. TIMEOUT, a signal to us, and our own death end all of it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

from harness import processes
from harness.project import ROOT
from scripts.run import lock

TICK, GAP = 0.5, 5.0  # seconds between two looks; from GAP on we were stopped ourselves (Ctrl-Z), which does not count
# Should we be killed without a chance to clean up, a process that waits for just that does it.
GUARD = "import sys; from harness import processes; sys.stdin.read(1) or processes.end_tree(int(sys.argv[1]))"
stopped_by = []  # signals that came


def take_charge():
    """From here on a signal ends the run, not us, and no process is lost. What nohup has us ignore stays ignored."""
    with suppress(OSError, AttributeError):  # on Linux, what loses its parent below us becomes our child (prctl(2))
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda it, _: stopped_by.append(it))


def keep_awake(pid):
    """The machine does not go to sleep while `pid` lives, where it has a word for that."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    inhibit = ["systemd-inhibit", "--what=sleep:idle", "--who=autoresearch", "--why=an experiment runs"]
    for command in (["caffeinate", "-i", "-w", str(pid)], [*inhibit, "tail", "-f", "/dev/null", f"--pid={pid}"]):
        with suppress(OSError):
            return subprocess.Popen(command, **quiet)


def run(command, folder, log, limit, locks, environment):
    """Run a command in `folder`, its output in the file `log` and on our terminal.

    Returns (its exit code, or None where it ran past `limit`; the seconds that it took, as far as we could look).
    """
    terminal, late, wall, last = sys.stdout.isatty(), False, 0.0, time.monotonic()
    with open(log, "wb") as out, open(log, "rb") as written:
        child = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=list(locks.values()),
            env=environment | ({"AUTORESEARCH_TERMINAL": "1"} if terminal else {}),
        )  # fmt: skip
        keep_awake(child.pid)
        guard = [sys.executable, "-c", GUARD, str(child.pid)]
        with subprocess.Popen(guard, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True) as waits:
            while child.poll() is None and not (late or stopped_by):
                with suppress(subprocess.TimeoutExpired):
                    child.wait(min(TICK, max(0.01, limit - wall)))
                show(written, terminal)
                lock.keep(locks)
                since, last = time.monotonic() - last, time.monotonic()
                wall += since if since < GAP else 0.0
                late = child.returncode is None and wall > limit
            processes.end_tree(child.pid, child.poll)  # also what train.py left behind
            child.wait()
            waits.stdin.write(b"x")  # all has ended: the guard may go
        processes.kill(processes.descendants(os.getpid()))  # whatever lost its parent
        show(written, terminal)
    return None if late else child.returncode, wall


def show(written, terminal):
    """Pass on to the terminal what was written to the log; it may be gone, and the run goes on."""
    with suppress(OSError):
        os.write(1, written.read()) if terminal else None
