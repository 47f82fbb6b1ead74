"""A commit like another one, with a train.py of its own: a program that no branch has, kept reachable by a ref."""

import re

from scripts.session import Refused, git


def on_dataset(text, dataset):
    """The text of a train.py that trains on a dataset."""
    return re.sub(r"(?m)^(DATASET\s*=\s*)[\"']\w+[\"']", rf'\1"{dataset}"', text, count=1)


def commit_with(text, base, tag, name, message):
    """(commit, blob of train.py) of the commit `base` with `text` as train.py, under refs/experiments/TAG/NAME.

    Where that is the text of `base`, it is that commit itself, without a ref.
    """
    ref = f"refs/experiments/{tag}/{name}"
    blob = git("hash-object", "-w", "--stdin", text=text)
    if blob and blob == git("rev-parse", f"{base}:train.py"):
        return base, blob
    known = git("rev-parse", "-q", "--verify", ref)
    if blob and known and git("rev-parse", f"{known}:train.py", f"{known}^") == git("rev-parse", blob, base):
        return known, blob
    listed = (git("ls-tree", base) or "").splitlines()
    lines = [f"100644 blob {blob}\ttrain.py" if line.endswith("\ttrain.py") else line for line in listed]
    tree = git("mktree", text="\n".join(lines) + "\n")
    commit = tree and git("commit-tree", tree, "-p", base, "-m", message)
    if not commit or git("update-ref", ref, commit) is None:
        raise Refused(f"git could not write .git/{ref}: a full disk, or a read-only folder? Mend that, and again")
    return commit, blob
