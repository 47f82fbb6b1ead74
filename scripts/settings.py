"""The settings of a session: what `make setup` was given holds for each later command, and is not typed again.

They stand in data/sessions/TAG/settings.json, as {name: text}. Outside a session what is typed holds.
"""

import os
import sys
from pathlib import Path

from harness import project
from harness.files import printable

NAMES = ("BUDGET", "TIMEOUT", "NPROC", "HOSTS", "DEVICE", "FILES", "COLUMN")
TO_PYTHON = {"BUDGET": "AUTORESEARCH_BUDGET", "FILES": "AUTORESEARCH_FILES", "COLUMN": "AUTORESEARCH_COLUMN"}
ALLOWANCE = 300.0  # seconds for the start-up and the evaluation of a run, where no TIMEOUT is given
LEAST_TIMEOUT = 600.0  # seconds


def typed():
    """{name: text} of the settings that this command was given, each checked and in its usual form."""
    found = {}
    for name in NAMES:
        if text := os.environ.get(name) or os.environ.get(TO_PYTHON.get(name, ""), ""):
            if name in ("BUDGET", "TIMEOUT"):
                text = f"{project.positive(name, text):.12g}"
            elif name in ("NPROC", "DEVICE"):
                text = str(project.whole(name, text, least=int(name == "NPROC")))
            file = name == "FILES" or (name == "HOSTS" and text.endswith(".json"))
            found[name] = str(Path(os.path.expanduser(text)).absolute()) if file else text
    return found


def complete(given):
    """Settings with a default in place of each that has one and is missing. TIMEOUT follows BUDGET."""
    budget = float(given.get("BUDGET") or project.BUDGET)
    timeout = max(LEAST_TIMEOUT, budget + ALLOWANCE)
    return {"BUDGET": f"{budget:.12g}", "TIMEOUT": f"{timeout:.12g}", "NPROC": "1", "HOSTS": "", **given}


def in_force(stored, any_budget=False):
    """The settings of this command. stored: the session's, or none; another value than they have is refused.

    any_budget: but for BUDGET and TIMEOUT, which is long enough for both budgets unless it is given.
    """
    given, its = typed(), complete(stored)
    free = ("BUDGET", "TIMEOUT") if any_budget else ()
    for name, text in given.items():
        if stored and name not in free and text != its.get(name, text):
            sys.exit(f"error: this session has {name}={its[name]}, not {name}={printable(text)}: leave it out, or open "
                     f"a session with it: make setup TAG=name {name}={printable(text)}")  # fmt: skip
    found = complete({**stored, **given})
    if any_budget and "TIMEOUT" not in given:
        found["TIMEOUT"] = max(found["TIMEOUT"], complete(given)["TIMEOUT"], key=float)
    if float(found["TIMEOUT"]) <= float(found["BUDGET"]):
        sys.exit("error: TIMEOUT={TIMEOUT} kills a run before BUDGET={BUDGET} is over: leave it out".format(**found))
    return found


def of_one_command(any_dataset):
    """{name: text} to export of what belongs to this command alone: SEED; N and DATASET are only checked."""
    seed, runs, name = (os.environ.get(name) for name in ("SEED", "N", "DATASET"))
    if runs:
        project.whole("N", runs, least=1)
    if not any_dataset and (here := project.dataset_of_train()) != (name or here):
        sys.exit(f"error: train.py trains on '{here}', not on '{printable(name)}': "
                 f"make setup TAG=name DATASET={printable(name)} opens a session on it")  # fmt: skip
    return {"AUTORESEARCH_SEED": str(project.whole("SEED", seed))} if seed else {}
