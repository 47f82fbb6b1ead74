"""Files that are whole or not there at all, and are on the disk when a call returns."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from harness.processes import is_alive


def to_disk(path):
    """Return once a file, or the names in a folder, are on the disk itself, which on macOS takes more than fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):
            with suppress(OSError):  # not every file system there knows it
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path):
    """A folder, and those above it, that outlive a power cut themselves."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        to_disk(path.parent)


def write_atomically(path, content):
    """Write a file, text or bytes, so that `path` holds the old content or the new, whatever happens."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if path.exists():
            shutil.copymode(path, temporary)
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move_into_place(temporary, path):
    """Give a finished file its name, so that it is whole under it even after a power cut."""
    to_disk(temporary)
    temporary.replace(path)
    to_disk(path.parent)


def append(path, text):
    """Add whole lines at the end of a file; what stands there is never rewritten, and a line cut short is ended."""
    make_folder(path.parent)
    with open(path, "a+b", buffering=0) as file:  # one write
        size = file.seek(0, os.SEEK_END)
        cut_short = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
        content = b"\n" * bool(cut_short) + text.encode()
        if file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    to_disk(path)
    to_disk(path.parent)  # each time: whoever made the file may have been killed before this


@contextmanager
def one_at_a_time(folder):
    """Hold the lock of a folder, and wait where another process does: the kernel drops a dead one's."""
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder):
    """Delete the temporary `NAME.PID.part` and `.NAME.PID.tmp` of processes that were killed."""
    for path in [*folder.glob("*.part"), *folder.glob(".*.tmp")]:
        pid = path.suffixes[-2].lstrip(".") if len(path.suffixes) > 1 else ""
        if pid.isdecimal() and not is_alive(int(pid)):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_json(path):
    """The object in a JSON file, or None where there is none that is whole."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def free_name(folder, prefix, suffix):
    """A path in `folder`, named after this second, that nothing has yet."""
    stem, number = f"{prefix}_{datetime.now():%Y%m%d_%H%M%S}", 1
    while (path := folder / (stem + (f"_{number}" if number > 1 else "") + suffix)).exists():
        number += 1
    return path


def what_failed(error):
    """An OSError's reason in plain words. NumPy tells a full disk by how many items were written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or re.search(r"requested and \d+ written", str(error)):
        return "the disk is full"
    return error.strerror or error


def printable(text):
    """Text from outside, an odd file name or a log, as it can stand in one line on a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
