"""The lock of a device: one run at a time is on it. What a device is, and which is taken, says docs/devices.md.

usage: lock.py -- COMMAND …     becomes COMMAND, which holds the lock

The lock belongs to whoever has its descriptor: the verb and the training under it. When both are dead the kernel drops
it; no pid is trusted.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from contextlib import suppress

from harness import files
from scripts.session import LOCK, ROOT, Refused, one_line, run_command, tell

PAUSE = 0.5  # seconds between two looks whether a device is free


def gpus():
    """How many NVIDIA GPUs the machine has, and the numbers of those that may be used."""
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
        listed = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        names = [line.split(", ") for line in listed.splitlines()]  # of each its number and UUID
        usable = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(number for number, _ in names)).split(",")
        return len(names), [int(n) for name in usable for n, uuid in names if name and (name == n or uuid == name)]
    return 0, []


def open_lock(path):
    """The descriptor of a lock that was free and is ours now, its file saying so; None where another has it."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # never through a link: another user may have laid it there
    try:
        try:
            lock = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's file
            lock = os.open(path, flags | os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError as error:  # a file system may have no locks
        mend = "export AUTORESEARCH_LOCK=FILE names another one, the same for all who run on this machine"
        raise Refused(f"the machine's lock {path} cannot be used ({error.strerror}): {mend}") from None
    with suppress(OSError):
        os.fchmod(lock, 0o666)
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps({"pid": os.getpid(), "folder": str(ROOT)}).encode(), 0)
    return lock


def keep(locks):
    """Make a lock file anew that a cleaner of /tmp took: a second run would make one of its own, and begin."""
    for path, lock in locks.items():
        if not os.fstat(lock).st_nlink:
            with suppress(Refused):
                locks[path] = open_lock(path) or lock


def holder(path):
    """Who holds a lock, in words, as far as its file tells."""
    note = files.read_json(path) or {}
    return one_line(f": pid {note.get('pid')}, in {note.get('folder')}")[:300]


def take_of(paths, wanted, what):
    """{path: descriptor} of `wanted` of these locks, or of none; where they are taken, wait or be refused."""
    told = False
    while True:
        held = {}
        for path in paths:
            if len(held) < wanted and (lock := open_lock(path)) is not None:
                held[path] = lock
        if len(held) == wanted:
            return held
        for lock in held.values():
            os.close(lock)
        by = holder(next(path for path in paths if path not in held))
        if not os.environ.get("WAIT"):
            raise Refused(f"{what} is taken by another run{by}; WAIT=1 waits for it")
        told = told or tell(f"waiting for another run{by}") or True
        time.sleep(PAUSE)


def take_cores(parts, total):
    """Keep to some of `total` equal parts of this machine's cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        ours = {core for n in parts for core in cores[n * len(cores) // total : (n + 1) * len(cores) // total]}
        os.sched_setaffinity(0, ours or {cores[parts[0] % len(cores)]})


def take(folder=True):
    """Take a device, or NPROC of them, and their part of the machine; returns {path: descriptor}, the device's last.

    folder: where there are several devices, this folder as well, since two runs in it would mix their files.
    """
    total, usable = gpus()
    chosen, wanted, several = os.environ.get("DEVICE"), int(os.environ.get("NPROC") or 1), total > 1
    usable, wanted = (usable, wanted) if several else ([0], 1)
    places = {f"{LOCK}.{d}" if several else LOCK: d for d in usable if not chosen or d == int(chosen)}
    if len(places) < wanted:
        which = f"DEVICE={chosen}" if chosen else f"NPROC={wanted}"
        raise Refused(f"{which} is not here; there is {', '.join(map(str, usable)) or 'none'}")
    os.makedirs(ROOT / "data", exist_ok=True)
    held = take_of([str(ROOT / "data" / ".run")], 1, "this folder") if several and folder else {}
    devices = take_of(places, wanted, f"device {chosen}" if chosen else "this machine")
    if several:
        ours = [places[path] for path in devices]
        os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, ours))}
        take_cores(ours, total)
    return held | devices


def main(command):
    for lock in take().values():
        os.set_inheritable(lock, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    run_command(main, sys.argv[sys.argv.index("--") + 1 :])
