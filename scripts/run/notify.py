"""Give a run's summary to a command of the user's, ON_RESULT, which can neither hold up the run nor fail it.

It is started on its own: with no descriptor of ours, in a session of its own, and with a time limit. What it prints
is lost; how it ended stands in data/on_result.log.
"""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from harness import files, project

LIMIT = 60.0  # seconds
OURS = ("LD_PRELOAD", "GLIBC_TUNABLES", "OPENBLAS_NUM_THREADS")  # meant for train.py alone


def notify(text):
    """Start the command, if there is one, and return at once."""
    if not os.environ.get("ON_RESULT"):
        return
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    environment = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("MALLOC_")}
    with suppress(OSError), tempfile.TemporaryFile() as note:
        note.write(text.encode("utf-8", "replace") + b"\n")
        note.seek(0)
        words = [sys.executable, "-m", "scripts.run.notify"]
        subprocess.Popen(words, stdin=note, env=environment, cwd=project.ROOT, **quiet)


def deliver():
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(["/bin/sh", "-c", os.environ["ON_RESULT"]], start_new_session=True, **quiet)
    try:
        words = f"ON_RESULT ended with {child.wait(LIMIT)}"
    except subprocess.TimeoutExpired:
        words = f"ON_RESULT ran past {LIMIT:g} s and was killed"
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    files.write_atomically(project.DATA / "on_result.log", words + "\n")


if __name__ == "__main__":
    deliver()
