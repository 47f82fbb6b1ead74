"""Take the machine's lock, on the file that descriptor 9 holds open.

usage: lock.py PID [--wait]

The lock belongs to whoever has that descriptor: the verb and the training under it. Should both die, the
kernel drops it; no pid is trusted, none can be mistaken for another.
"""

import fcntl
import json
import os
import sys
import time

from session import LOCK, ROOT, Refused, record, run_command


def take(pid, wait):
    waited = False
    while True:
        try:
            fcntl.flock(9, fcntl.LOCK_EX | (0 if waited else fcntl.LOCK_NB))
            break
        except BlockingIOError:
            if not wait:
                raise Refused(f"this machine is taken by another run{holder()}; WAIT=1 waits for it") from None
            print(f"waiting for another run{holder()}", flush=True)
            waited = True
    note = {"pid": pid, "clock": time.monotonic(), "folder": str(ROOT)}
    try:  # of another user's lock file only the content is out of reach
        with open(os.open(LOCK, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "w") as out:
            json.dump(note, out)
    except OSError:
        pass


def holder():
    note = record.read_json(LOCK) or {}
    try:
        age = max(0, round(time.monotonic() - note["clock"]))
        return f": pid {note['pid']}, for {age // 60} min {age % 60} s, in {note['folder']}"
    except (KeyError, TypeError):
        return ""


if __name__ == "__main__":
    run_command(take, int(sys.argv[1]), "--wait" in sys.argv)
