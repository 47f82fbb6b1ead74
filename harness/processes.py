"""Processes, by psutil: who is alive, what a process started, and how all of it is ended.

A sandbox may hide other processes. Then whoever can be signalled counts as alive, and a tree is its process group.
"""

import os
import signal
import time
from contextlib import suppress

import psutil

PATIENCE = 3.0  # seconds between asking a process to end and killing it
UNFIT = 75  # exit code where machines or a command are at fault, and not the experiment (EX_TEMPFAIL of sysexits.h)
LOST = 76  # exit code of a rank that ends because another one has ended


def is_alive(pid):
    """Whether a process runs. One that has ended and was not collected yet does not."""
    try:
        os.kill(pid, 0)
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except ProcessLookupError:
        return False
    except (psutil.Error, OSError, OverflowError):
        return True  # another user's, or hidden


def descendants(pid):
    """All that `pid` started, and they, in whatever process group: a list of psutil.Process."""
    with suppress(psutil.Error, OSError):
        return psutil.Process(pid).children(recursive=True)
    return []


def kill(several):
    for process in several:
        with suppress(psutil.Error, OSError):
            process.kill()


def end_tree(pid, collect=lambda: None):
    """End the process group of `pid` and all that came of it: asked first, killed after PATIENCE seconds.

    collect: called while the group is waited for. It collects `pid` where that is our child and would stay a zombie.
    """
    everyone, end = descendants(pid), time.monotonic() + PATIENCE
    with suppress(OSError):  # when the group is gone; on macOS zombies alone are one
        for number in (signal.SIGTERM, signal.SIGCONT):  # one that was stopped would not hear
            os.killpg(pid, number)
        while time.monotonic() < end:
            time.sleep(0.1)
            collect()
            os.killpg(pid, 0)
    kill({*everyone, *descendants(pid)})
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
