"""Remove the lock files of a git that was killed, for which every later one would refuse.

usage: git_locks.py <<<"their names, a line each"     (lib.sh calls this where there are any)

While a git is at work it is waited for.
"""

import sys
import time
from pathlib import Path

import psutil

from scripts.session import ROOT, Refused, run_command, say

PATIENCE = 10  # seconds


def git_is_at_work():
    """Whether a git runs in this clone, or one that does not tell where."""
    try:
        gits = [p.info for p in psutil.process_iter(["name", "status", "cwd"]) if p.info["name"] == "git"]
    except (psutil.Error, OSError):  # a sandbox hides all processes
        return True
    folders = [git["cwd"] for git in gits if git["status"] != psutil.STATUS_ZOMBIE]
    return any(folder is None or Path(folder).is_relative_to(ROOT) for folder in folders)


def main(names):
    for _ in range(PATIENCE):
        time.sleep(1)
        if not git_is_at_work():
            break
    left = [name for name in names if Path(name).exists()]
    if left and git_is_at_work():
        raise Refused(f"git is at work, or was cut off; if it was, remove {' '.join(left)}")
    for name in left:
        Path(name).unlink(missing_ok=True)
        say(f"note: a git that was killed left its lock {name}, which is removed")


if __name__ == "__main__":
    run_command(main, sys.stdin.read().splitlines())
