"""Which runs a `make run` makes: of which program, with which seed; and what is refused before any is made."""

import os
import re
import uuid

from harness import project
from scripts import session
from scripts.judge.evidence import of_session, unused
from scripts.judge.verdict import can_be_a_row
from scripts.session import ROOT, Refused


def seeds_of(this_session, blob):
    """The seeds of a program's runs that could be compared with one made now, a seed for each run."""
    attempts, budget = this_session.attempts(), project.settings()[0]
    made = [a for a in attempts if a["status"] == "valid" and a["role"] != "holdout" and a["budget"] == budget]
    like = session.record_of(made[-1]) if made else None
    return [run["seed"] for run in of_session(attempts, (), like)[0] if run["train_blob"] == blob]


def refuse_seen(this_session, args):
    """Refuse what was run before, a run that would push an unlogged result aside, and a second baseline."""
    blob, (budget, seed), rows = project.blob_hash(ROOT / "train.py"), project.settings(), this_session.rows()[0]
    attempts = [a for a in this_session.attempts() if a["role"] == "candidate"]
    last = attempts[-1] if attempts and not attempts[-1].get("logged") else None
    if last and args.session and last["train_blob"] != blob and can_be_a_row(this_session, last, rows):
        commit = last["commit"][:7]
        raise Refused(f'the result of {commit} is not logged yet: make log-result STATUS=… DESC="…" comes first')
    if args.again or args.pair:
        return
    word = "baseline" if args.baseline else "run"
    if args.baseline and args.session and session.kept_rows(rows):
        raise Refused("this session has its baseline: make run tries the present train.py")
    made = [a for a in attempts if (a["train_blob"], a["budget"], a["seed"]) == (blob, budget, seed)]
    if last and last["train_blob"] == blob and made:
        if last["status"] not in ("running", "interrupted", "paused") or made[-1]["status"] == "valid":
            raise Refused(f"this train.py was just run ({last['status']}): make log-result, or make {word} AGAIN=1")
    for row in rows:
        tried = [a for a in attempts if a["train_blob"] == blob]
        if row.blob == blob and (not tried or (budget, seed) in [(a["budget"], a["seed"]) for a in tried]):
            raise Refused(f"this train.py was run before: {row.line.expandtabs(1)} (make run AGAIN=1 runs it again)")


def refuse_modules(this_session, args):
    """Refuse a train.py that imports a module changed since the session began: train.py alone must run again."""
    base = f"refs/experiments/{this_session.tag}/start" if args.session else args.head
    text = (ROOT / "train.py").read_text("utf-8", "replace")
    statement = r"(?m)^\s*(?:import|from(?=\s+[\w.]+\s+import\b))\s+(\w+)"
    imported = sorted(set(re.findall(statement, text))) if args.head else []
    for name in [*imported, *(f"{module}.py" for module in imported)]:
        if (ROOT / name).exists():
            known = session.git("ls-tree", "--name-only", base, name)
            if not known or session.git("diff", "--name-only", base, "--", name):
                raise Refused(f"train.py imports {name}, which is new or was changed: "
                              "an experiment is train.py alone, so its code belongs in there")  # fmt: skip


def plan(this_session, args):
    """The runs to make: [(role, commit or None, seed, pair), …]."""
    seed, blob = project.settings()[1], project.blob_hash(ROOT / "train.py")
    chosen = seed if os.environ.get("AUTORESEARCH_SEED") else None

    def repeats(role, commit, used):  # as many runs as args.runs are more than those `used`, or one
        seeds = []
        for _ in range(len(used), args.runs or len(used) + 1):
            seeds.append(unused([*used, *seeds]) if chosen is None else chosen)
        return [(role, commit, seed, None) for seed in seeds]

    if not args.reference:
        refuse_seen(this_session, args)
    if not (args.reference or args.pair):
        return repeats("candidate", None, seeds_of(this_session, blob) if args.again else [])
    row = this_session.reference(this_session.rows()[0], args.head)
    if row is None or not row.blob or not args.head:
        raise Refused("there is no reference yet, or git does not know it: make baseline makes one")
    used = seeds_of(this_session, row.blob)
    if args.reference:
        return repeats("reference", row.commit, used)
    if row.blob == blob:
        raise Refused("the program at hand is the reference: there is no pair (make run REFERENCE=1 repeats it)")
    used, made = [*used, *seeds_of(this_session, blob)], []
    count = len({a["pair"] for a in this_session.attempts() if a.get("pair")})
    for number in range(count, count + (args.runs or 1)):
        seed, pair = unused(used) if chosen is None else chosen, f"{number + 1}-{uuid.uuid4().hex[:6]}"
        ends = [("reference", row.commit, seed, pair), ("candidate", None, seed, pair)]
        made += ends if number % 2 == 0 else ends[::-1]
        used.append(seed)
    return made
