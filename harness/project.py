"""Where this checkout keeps things, what a person sets for a run, and which program and which harness it is."""

import ast
import hashlib
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from harness.files import printable

ROOT = Path(__file__).resolve().parent.parent


def main_worktree(root):
    """The folder of the clone that `root` is a linked git worktree of; `root` itself where it is none.

    Results belong to the clone: `git worktree remove` takes nothing of them along.
    """
    if root.match("data/tree.*.part"):  # of a run's own: see `checked_out` in scripts/run/experiment.py
        return main_worktree(root.parent.parent)
    with suppress(OSError, ValueError):
        folder = root / (root / ".git").read_text().strip().removeprefix("gitdir: ")
        common = (folder / (folder / "commondir").read_text().strip()).resolve()
        return common.parent if common.name == ".git" else common / "autoresearch"
    return root


HOME = main_worktree(ROOT)
DATA = ROOT / "data"  # of this folder: the newest run
STORE = HOME / "data"  # of the clone: the archive of all runs
LAST_WEIGHTS, BEST_WEIGHTS = DATA / "last_run.safetensors", DATA / "best.safetensors"  # of the newest kept program

BUDGET, SEED = 300.0, 42  # what holds where nothing is set


def positive(name, text):
    """`text` as a positive finite number, or the program ends with one line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        sys.exit(f"error: {name}={printable(text)} is not a positive number")
    return value


def whole(name, text, least=0):
    """`text` as a whole number from `least` to 2^32 - 1, or the program ends with one line."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) < 2**32):
        sys.exit(f"error: {name}={printable(text)} is not a whole number ({least} to {2**32 - 1})")
    return int(text)


def settings():
    """(budget in seconds, seed) of a run, from the environment."""
    budget = positive("BUDGET", os.environ.get("AUTORESEARCH_BUDGET") or str(BUDGET))
    return budget, whole("SEED", os.environ.get("AUTORESEARCH_SEED") or str(SEED))


def blob_hash(path):
    """The hash that git gives a file's content, computed without git: it names a program."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def git(*words, text=None):
    """What git prints; None without git or a repository of our own, or where git refuses. `text`: its input."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, input=text, capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def dataset_of_train(path=ROOT / "train.py"):
    """The constant DATASET of train.py, read without running it."""
    try:
        text = Path(path).read_text("utf-8", "replace")
    except OSError:
        mend = "git checkout HEAD -- train.py; where a commit took it away, make discard"
        sys.exit(f"error: train.py is missing or not to be read: {mend}")
    found = re.search(r"^DATASET\s*=\s*[\"'](\w+)[\"']", text, re.MULTILINE)
    if not found:
        sys.exit('error: train.py has no line of the form DATASET = "name"')
    return found.group(1)


def harness_hash():
    """Which harness this is."""
    return code_hash(sorted([*ROOT.glob("harness/[!.]*.py"), ROOT / "prepare.py", ROOT / "data_sources.py"]))


def code_hash(paths):
    """SHA-256 over Python files, in which comments and layout do not count."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + ast.dump(ast.parse(path.read_text("utf-8"))).encode() + b"\0")
    return digest.hexdigest()
