"""Take a device's lock, then become another command, which holds it.

usage: lock.py [--wait] -- COMMAND …

A Mac or a CPU is one device. Of several NVIDIA GPUs each has a lock and an equal part of the processor cores: DEVICE
says which, else the first free one is taken, or so many as NPROC says. CUDA_VISIBLE_DEVICES limits the choice.
The lock belongs to whoever has its descriptor: the verb and the training under it. Should both die, the
kernel drops it; no pid is trusted, none can be mistaken for another.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from contextlib import suppress

from session import LOCK, ROOT, Refused, record, run_command

PAUSE = 0.5  # seconds between two looks whether a device is free


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


def open_lock(path):
    """The descriptor of a lock that was free and is ours now, or None."""
    if not os.path.exists(path):
        with suppress(OSError):
            os.close(os.open(path, os.O_CREAT, 0o666))
            os.chmod(path, 0o666)
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise Refused(f"the machine's lock {path} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def holder(path):
    note = record.read_json(path) or {}
    try:
        age = max(0, round(time.monotonic() - note["clock"]))
        return f": pid {note['pid']}, for {age // 60} min {age % 60} s, in {note['folder']}"
    except (KeyError, TypeError):
        return ""


def take(wait, command):
    total, usable = gpus()
    chosen, wanted = os.environ.get("DEVICE"), int(os.environ.get("NPROC") or 1)
    several = total > 1
    if chosen and int(chosen) not in (usable if several else [0]):
        raise Refused(f"DEVICE={chosen} is not here: the devices are {', '.join(map(str, usable)) if several else '0'}")
    devices = ([int(chosen)] if chosen else usable) if several else [0]
    if several and wanted > len(devices):
        raise Refused(f"NPROC={wanted} devices are wanted, and {len(devices)} may be used here")
    paths = {device: f"{LOCK}.{device}" if several else LOCK for device in devices}
    wanted, waited = min(wanted, len(devices)), False
    while True:
        held = {}
        for device, path in paths.items():
            if len(held) < wanted and (lock := open_lock(path)) is not None:
                held[device] = lock
        if len(held) == wanted:
            break
        busy = next(device for device in devices if device not in held)
        what = "this machine" if not several else f"device {busy}" if chosen else f"all but {len(held)} of its devices"
        for lock in held.values():
            os.close(lock)
        if not wait:
            raise Refused(f"{what} is taken by another run{holder(paths[busy])}; WAIT=1 waits for it")
        if not waited:
            print(f"waiting for another run{holder(paths[busy])}", flush=True)
        waited = True
        time.sleep(PAUSE)
    note = {"pid": os.getpid(), "clock": time.monotonic(), "folder": str(ROOT)}
    for device, lock in held.items():
        os.set_inheritable(lock, True)
        with suppress(OSError):  # of another user's lock file only the content is out of reach
            with open(os.open(paths[device], os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "w") as out:
                json.dump(note, out)
    os.environ["AUTORESEARCH_LOCK"] = paths[next(iter(held))]
    os.environ["AUTORESEARCH_LOCKED"] = " ".join(map(str, held.values()))
    if several:
        os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, held))}
        cores = sorted(os.sched_getaffinity(0))
        ours = {core for d in held for core in cores[d * len(cores) // total : (d + 1) * len(cores) // total]}
        os.sched_setaffinity(0, ours or cores)
    os.execvp(command[0], command)


if __name__ == "__main__":
    mark = sys.argv.index("--")
    run_command(take, "--wait" in sys.argv[1:mark], sys.argv[mark + 1 :])
