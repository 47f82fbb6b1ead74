"""Counts what a Python process writes, and dies at the n-th; see crash/points.py, which reads the log.

Python imports this by itself where it stands in PYTHONPATH. Every operation that changes a disk is one point, across
all processes of a command: a line in CRASH_LOG, with what it takes to undo it, and a byte in CRASH_LOG.n.
At the point CRASH_AT the process is killed instead, in the middle of a write.
"""

import builtins
import io
import json
import os
import shutil
import signal

LOG, AT, UNDER = (os.environ.get(f"CRASH_{name}", "") for name in ("LOG", "AT", "UNDER"))
real = {name: getattr(os, name) for name in
        ("open", "write", "fsync", "rename", "replace", "link", "symlink", "mkdir", "unlink", "remove", "rmdir",
         "ftruncate")}  # fmt: skip


CUTS = {"killed": lambda n: n // 2, "lost": lambda n: n - 2, "empty": lambda n: n // 3}  # bytes of the last write


def point(op, **facts):
    """Count an operation, and note it; returns whether to die at it."""
    if os.path.exists(LOG + ".dead"):
        os._exit(137)
    counter = real["open"](LOG + ".n", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    real["write"](counter, b".")
    n = os.fstat(counter).st_size
    os.close(counter)
    if n == int(AT or 0):
        return True
    log = real["open"](LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    real["write"](log, (json.dumps({"n": n, "op": op, "pid": os.getpid(), **facts}) + "\n").encode())
    os.close(log)
    return False


def die():
    os.close(real["open"](LOG + ".dead", os.O_WRONLY | os.O_CREAT))
    os.kill(os.getpid(), signal.SIGKILL)


def ours(path):
    return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(UNDER + os.sep)


def name_of(descriptor):
    with_name = f"/proc/self/fd/{descriptor}"
    return os.readlink(with_name) if os.path.exists(with_name) else ""


def keep(path):
    """A second name for a file that is about to lose its own, or None."""
    if not os.path.lexists(path):
        return None
    kept = f"{LOG}.kept.{os.getpid()}.{os.urandom(4).hex()}"
    if os.path.islink(path):
        real["symlink"](os.readlink(path), kept)
    else:
        real["link"](path, kept)
    return kept


def copy(path):
    """What a file holds before it is written to."""
    if not os.path.exists(path) or not os.path.isfile(path):
        return None
    kept = f"{LOG}.copy.{os.getpid()}.{os.urandom(4).hex()}"
    with REAL_OPEN(path, "rb") as old, REAL_OPEN(kept, "wb") as new:
        shutil.copyfileobj(old, new)
    return kept


def write(descriptor, content):
    path = name_of(descriptor)
    if not ours(path) or not os.path.isfile(path):
        return real["write"](descriptor, content)
    if point("write", path=path, inode=os.fstat(descriptor).st_ino, before=copy(path)):
        real["write"](descriptor, bytes(content)[: CUTS[os.environ["CRASH_FORM"]](len(content))])
        die()
    return real["write"](descriptor, content)


def fsync(descriptor):
    path = name_of(descriptor)
    if ours(path) and point("fsync", path=path, inode=os.fstat(descriptor).st_ino, folder=os.path.isdir(path)):
        die()
    real["fsync"](descriptor)


def ftruncate(descriptor, size):
    path = name_of(descriptor)
    if ours(path) and point("write", path=path, inode=os.fstat(descriptor).st_ino, before=copy(path)):
        die()
    real["ftruncate"](descriptor, size)


def os_open(path, flags, *args, **kwargs):
    if kwargs.get("dir_fd") is None and ours(path) and flags & (os.O_CREAT | os.O_TRUNC):
        opening(os.path.abspath(path), flags & os.O_TRUNC)
    return real["open"](path, flags, *args, **kwargs)


def opening(path, truncated):
    if not os.path.exists(path):
        if point("create", path=path):
            die()
    elif truncated and os.path.isfile(path):
        if point("write", path=path, inode=os.stat(path).st_ino, before=copy(path)):
            die()


class Raw(io.FileIO):
    def write(self, content):
        return write(self.fileno(), content)


REAL_OPEN = io.open


def io_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
    if not set(mode) & set("wax+") or not ours(file) or opener:
        return REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
    opening(os.path.abspath(file), "w" in mode)
    raw = Raw(file, mode.replace("b", "").replace("t", ""))
    if buffering == 0:
        return raw
    buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


def names(op):
    """`op` on one or two names, as a point of its own."""

    def changed(*args, **kwargs):
        path = args[-1] if op in ("rename", "replace", "link", "symlink") else args[0]
        if kwargs.get("dir_fd") is None and ours(path):
            path = os.path.abspath(path)
            facts = {"path": path, "source": os.path.abspath(args[0]) if op in ("rename", "replace") else None}
            gone = op in ("rename", "replace", "unlink", "remove") and os.path.lexists(path)
            kind = {"replace": "rename", "remove": "unlink"}.get(op, op)
            if kind in ("unlink", "rmdir") and not os.path.lexists(path):
                return real[op](*args, **kwargs)
            if kind == "mkdir" and os.path.isdir(path):
                return real[op](*args, **kwargs)
            if point(kind, kept=keep(path) if gone else None, **facts):
                die()
        return real[op](*args, **kwargs)

    return changed


def install():
    os.write, os.fsync, os.ftruncate, os.open = write, fsync, ftruncate, os_open
    io.open = builtins.open = io_open
    for op in ("rename", "replace", "link", "symlink", "mkdir", "unlink", "remove", "rmdir"):
        setattr(os, op, names(op))


if LOG:
    install()
