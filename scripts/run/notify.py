"""Give a run's summary to a command of the user's, ON_RESULT, which can neither hold up the run nor fail it.

It is started on its own: with no descriptor of ours, in a session of its own, and with a time limit. What it prints
is lost; how it ended stands in data/on_result.log.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress

from harness import files, processes, project

LIMIT = 60.0  # seconds
OURS = ("LD_PRELOAD", "GLIBC_TUNABLES", "OPENBLAS_", "MALLOC_")  # begin the names of what is meant for train.py alone
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}


def notify(text):
    """Start the command, if there is one, and return at once."""
    if not os.environ.get("ON_RESULT"):
        return
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    with suppress(OSError), tempfile.TemporaryFile() as note:
        note.write(text.encode("utf-8", "replace") + b"\n")
        note.seek(0)
        words = [sys.executable, "-m", "scripts.run.notify"]
        subprocess.Popen(words, stdin=note, env=environment, cwd=project.ROOT, **QUIET)


def deliver():
    """Run the command to its end, or to its limit; our standard input is its own."""
    child = subprocess.Popen(["/bin/sh", "-c", os.environ["ON_RESULT"]], **QUIET)
    try:
        said = f"ON_RESULT ended with {child.wait(LIMIT)}"
    except subprocess.TimeoutExpired:
        said = f"ON_RESULT ran past {LIMIT:g} s and was killed"
    processes.end_tree(child.pid, child.poll)
    files.write_atomically(project.DATA / "on_result.log", said + "\n")


if __name__ == "__main__":
    deliver()
