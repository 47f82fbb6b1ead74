"""The lock of a device, so that one run at a time is on it.

usage: lock.py -- COMMAND …     becomes COMMAND, which holds the lock

A Mac or a CPU is one device. Of several NVIDIA GPUs each has a lock and an equal part of the processor cores: DEVICE
says which, else the first free one is taken, or so many as NPROC says. CUDA_VISIBLE_DEVICES limits the choice. With
WAIT, who finds a device taken waits for it. The lock belongs to whoever has its descriptor: the verb and the training
under it. Should both die, the kernel drops it; no pid is trusted, none can be mistaken for another.
"""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from harness import files
from scripts.session import LOCK, ROOT, Refused, one_line, run_command, tell

PAUSE = 0.5  # seconds between two looks whether a device is free
MEND = "export AUTORESEARCH_LOCK=FILE names another one, the same for all who run on this machine"


@dataclass
class Held:
    """Locks that are ours, {path: descriptor}, the device's last; and how many seconds it was waited for them."""

    locks: dict
    waited: float

    @property
    def path(self):
        return list(self.locks)[-1]

    @property
    def descriptors(self):
        return list(self.locks.values())

    def keep(self):
        """Make a lock file anew that was deleted under us: a second run would make one of its own, and begin."""
        for path, lock in self.locks.items():
            if not is_file(path, lock):
                with suppress(OSError, Refused):
                    new = open_lock(path)
                    self.locks[path] = lock if new is None else new
                    write_note(path, self.locks[path])


def gpus():
    """How many NVIDIA GPUs the machine has, and the numbers of those that may be used."""
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
        listed = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        names = dict(line.split(", ") for line in listed.splitlines())  # {number: UUID}
        usable = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(names)).split(",")
        of_name = [[n for n, uuid in names.items() if name.strip() in (n, uuid) or uuid.startswith(name.strip() + "-")]
                   for name in usable if name.strip()]  # fmt: skip
        return len(names), [int(numbers[0]) for numbers in of_name if numbers]
    return 0, []


def is_file(path, lock):
    """Whether `path` is the name of the open file `lock`."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(lock))
    except OSError:
        return False


def open_lock(path):
    """The descriptor of a lock that was free and is ours now, or None."""
    with suppress(OSError):
        os.fchmod(lock := os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), 0o666)
        os.close(lock)
    try:  # never through a link, never to a pipe: another user may have laid it there
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Refused(f"the machine's lock {path} cannot be opened ({error.strerror}): {MEND}") from None
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        raise Refused(f"the machine's lock {path} is no plain file: rm {path}, or AUTORESEARCH_LOCK names another")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise Refused(f"the file system of {path} has no locks ({error.strerror}): {MEND}") from None
    return lock


def write_note(path, lock):
    """Say in the lock's file who holds it; of another user's file only the content is out of reach."""
    with suppress(OSError), open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "w") as out:
        if os.path.sameopenfile(out.fileno(), lock) and os.fstat(lock).st_nlink == 1:  # and no file of ours
            out.truncate(0)
            json.dump({"pid": os.getpid(), "clock": time.monotonic(), "folder": str(ROOT)}, out)


def holder(path):
    """Who holds a lock, in words, as far as its note tells."""
    note = files.read_json(path) or {}
    try:
        age = max(0, round(time.monotonic() - note["clock"]))
        return f": pid {int(note['pid'])}, for {age // 60} min {age % 60} s, in {one_line(note['folder'])[:300]}"
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return ""


def try_all(needed, others, wanted):
    """({path: descriptor} of all `needed` locks and `wanted` others, None), or (None, the first that is taken)."""
    held, taken = {}, None
    for path in [*needed, *others]:
        if len(held) < len(needed) + wanted:
            lock = open_lock(path)
            held |= {} if lock is None else {path: lock}
            taken = path if lock is None and taken is None else taken
    if len(held) == len(needed) + wanted and set(needed) <= set(held):
        return held, None
    for lock in held.values():
        os.close(lock)
    return None, taken


def take(folder=True):
    """Take a device, or NPROC of them, and its part of the machine; returns what is `Held`.

    folder: of several devices' runs, one at a time in this folder, since two would mix their files.
    """
    total, usable = gpus()
    chosen, wanted, several = os.environ.get("DEVICE"), int(os.environ.get("NPROC") or 1), total > 1
    devices = usable if several else [0]
    if chosen and int(chosen) not in devices:
        raise Refused(f"DEVICE={chosen} is not here; there is {', '.join(map(str, devices)) or 'none'}")
    if several and wanted > len(devices):
        raise Refused(f"NPROC={wanted} devices are wanted, and {len(devices)} may be used here")
    places = {f"{LOCK}.{d}" if several else LOCK: d for d in devices if not chosen or d == int(chosen)}
    os.makedirs(ROOT / "data", exist_ok=True)
    needed, start = [str(ROOT / "data" / ".run")] if several and folder else [], time.monotonic()
    held, taken = try_all(needed, places, min(wanted, len(places)))
    if not held:
        what = "every device" if len(places) > 1 else f"device {chosen}" if several else "this machine"
        what = "this folder (a run beside it needs a git worktree of its own)" if taken in needed else what
        if not os.environ.get("WAIT"):
            raise Refused(f"{what} is taken by another run{holder(taken)}; WAIT=1 waits for it")
        tell(f"waiting for another run{holder(taken)}")
        while not held:
            time.sleep(PAUSE)
            held, taken = try_all(needed, places, min(wanted, len(places)))
    for path, lock in held.items():
        write_note(path, lock)
    if several:
        ours = [places[path] for path in held if path in places]
        os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, ours))}
        cores = sorted(os.sched_getaffinity(0))
        parts = {core for d in ours for core in cores[d * len(cores) // total : (d + 1) * len(cores) // total]}
        os.sched_setaffinity(0, parts or cores)
    return Held(held, time.monotonic() - start)


def main(command):
    for lock in take().descriptors:
        os.set_inheritable(lock, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    run_command(main, sys.argv[sys.argv.index("--") + 1 :])
