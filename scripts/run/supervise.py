"""Watch over train.py, or over the launcher of its ranks, from start to end; nothing of it is left behind.

It is a process group of its own. TIMEOUT, a signal to us, and our own death end all of it; Ctrl-Z stops all of it.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from harness import processes
from scripts.run import lock

TICK = 0.5  # seconds between two looks at what runs
GAP = 5.0  # seconds between two looks: we were stopped meanwhile
stopped_by = []  # signals that came
_running = []  # the pid of what is watched over


@dataclass
class Ended:
    """How it ended. late: it ran past its limit. away: seconds in which we were stopped ourselves, of `wall` in all."""

    code: int
    late: bool
    wall: float
    away: float


def take_charge():
    """From here on a signal ends the run, not us, and no process is lost. What nohup has us ignore stays ignored."""
    with suppress(OSError, AttributeError):  # on Linux, what loses its parent below us becomes our child (prctl(2))
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop_with_us if number == signal.SIGTSTP else lambda it, _: stopped_by.append(it))


def stop_with_us(*_):
    """Ctrl-Z: the run stops as well, and its record tells of the pause."""
    for pid in _running:
        processes.signal_group(pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    for pid in _running:
        processes.signal_group(pid, signal.SIGCONT)


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
                processes.end_tree(pid)
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
    for command in (["caffeinate", "-i", "-w", str(pid)], [*inhibit, "tail", "-f", "/dev/null", f"--pid={pid}"]):
        with suppress(OSError):
            return subprocess.Popen(command, **quiet)


def run(command, folder, log, limit, locks, environment):
    """Run a command in `folder`, its output in the file `log` and on our terminal; returns how it `Ended`."""
    terminal, start, away = sys.stdout.isatty(), time.monotonic(), 0.0
    with open(log, "wb") as out, open(log, "rb") as written:
        child = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=list(locks.values()),
            env={**environment, **({"AUTORESEARCH_TERMINAL": "1"} if terminal else {})},
        )  # fmt: skip
        _running[:] = [child.pid]
        keep_awake(child.pid)
        with guarded(child.pid):
            last, late = start, False
            while child.poll() is None and not (late or stopped_by):
                with suppress(subprocess.TimeoutExpired):
                    child.wait(min(TICK, max(0.01, start + limit + away - last)))
                show(written, terminal)
                lock.keep(locks)
                gap, last = time.monotonic() - last, time.monotonic()
                away += gap if gap > GAP else 0.0
                late = child.returncode is None and last > start + limit + away
            processes.end_tree(child.pid, child.poll)  # also what train.py left behind
            child.wait()
        wall = time.monotonic() - start
        _running.clear()
        processes.kill(processes.descendants(os.getpid()))  # whatever lost its parent
        show(written, terminal)
    if terminal:  # of a line that was overwritten the log keeps the last state
        log.write_bytes(re.sub(rb"[^\r\n]*\r(?!\n)", b"", log.read_bytes()))
    return Ended(child.returncode, late, wall, away)


def show(written, terminal):
    """Pass on to the terminal what was written to the log; it may be gone, and the run goes on."""
    with suppress(OSError):
        os.write(1, written.read()) if terminal else None
