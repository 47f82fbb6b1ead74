"""Whole nights as an agent leaves them: commits, refs, events, records, table, journal; nothing is trained.

`python tests/nights.py FOLDER [EXPERIMENTS] [TAG]` writes one into a clone, to look at its report. Verdicts are the
real ones, on invented figures.
"""

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness import record  # noqa: E402
from scripts.judge import verdict  # noqa: E402
from scripts.judge.evidence import Evidence, Observation, slots  # noqa: E402

SIGMA = 0.002  # of one run, bits per byte
HEADER = "commit\tval_bpb\tmemory_gb\tavg_tok_sec\tstatus\tdescription"
CONSTANTS = ("MATRIX_LR", "EMBEDDING_LR", "HEAD_LR", "WEIGHT_DECAY", "WARMDOWN", "FINAL_LR", "SOFTCAP", "ROPE_BASE")
LINES = {
    "class MLP": ("gate the MLP by its input", "        x = x * mx.sigmoid(x)  # a gate"),
    "class Attention": ("sharper queries and keys", "        queries = queries * 1.2"),
    "def orthogonalize": ("one more Polar Express step", "    steps = 6"),
    "def norm": ("norm with a bias", "    bias = 0.0"),
    "def softcap": ("softcap by tanh of half", "    half = logits / 2"),
    "class GPT(": ("subtract a middle layer's stream", "        middle = None"),
}


def blob_of(text):
    """The hash that git gives it."""
    content = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def idea(text, draw, number):
    """(description, changed program): another value of a constant, or a line at the head of a function."""
    if draw.random() < 0.6:
        name = draw.choice(CONSTANTS)
        factor = draw.choice((0.5, 0.7, 1.4, 2.0, 3.0))
        old = float(re.search(rf"^{name} = ([\d.]+)", text, re.MULTILINE).group(1))
        new = round(old * factor + (0.05 if old == 0 else 0), 6)
        return f"{name} {old:g} to {new:g}", re.sub(rf"(?m)^{name} = [\d.]+", f"{name} = {new:g}", text)
    place = draw.choice(list(LINES))
    words, line = LINES[place]
    first = "def __call__" if place.startswith("class") else place
    head = re.compile(rf"^ *{first}.*:\n", re.MULTILINE).search(text, text.index(f"\n{place}"))
    return f"{words}, {number}", f"{text[: head.end()]}{line}  # {number}\n{text[head.end() :]}"


def a_record(blob, commit, clock, seed, bpb, rate, draw, budget, busy, change):
    """A sealed record of a run that ended at `clock`. change: what to replace in it."""
    steps = int(rate * budget / 2**14)
    seconds = np.linspace(0, budget, steps + 1)[1:]
    loss = 2.2 * bpb + 3.0 * np.exp(-seconds / budget * 9) + np.random.default_rng(seed + steps).normal(0, 0.03, steps)
    curve = [(s, x, 2**14 * (i + 1), 1800.0) for i, (s, x) in enumerate(zip(seconds, loss, strict=True))]
    content = {
        "run_id": f"{clock:%Y%m%d_%H%M%S}-{draw.getrandbits(48):012x}",
        "attempt": "", "timestamp": clock.isoformat(timespec="seconds"), "commit": commit, "train_blob": blob,
        "status": "valid", "reason": None, "harness": "h" * 64, "dataset": "tinystories", "token_cache": "t" * 64,
        "seed": seed, "budget": budget,
        "device": {"name": "Apple M9", "memory_gb": 64, "os": "macOS 26", "mlx": "0.32.4", "backend": "metal"},
        "model": {"depth": 4, "dmodel_scale": 1.0, "num_params": 11_500_000},
        "training": {
            "seconds": budget, "total_seconds": budget + 55.0, "startup_seconds": 9.0,
            "total_steps": steps, "total_tokens": steps * 2**14, "tokens_per_step": 2**14,
            "sequence_length": 512, "avg_tok_sec": rate, "training_peak_mb": 1800.0 + draw.randrange(200),
            "peak_memory_mb": 1850.0 + draw.randrange(300), "eval_seconds": 38.0, "epochs": 0.4,
        },
        "machine": {"load": [0.5, 0.9], "cores": 12, "other_cores": 9.0 if busy else 0.1, "paused_seconds": 0.0,
                    "step_ms": [40.0, 41.0, 44.0], "swapped_mb": 0},
        "result": {"val_bpb": bpb, "val_bpb_stderr": 0.001, "eval_bytes": 2**21,
                   "row_bits": record.packed(np.full(512, bpb * 4096))},
        "curve": record.binned(curve),
        **change,
    }  # fmt: skip
    content["seal"] = record.seal(content)
    return content


def make(folder, count=40, tag="t", seed=1, budget=300.0, describe=None, share=(0.06, 0.03), change=None):
    """Write a night of `count` experiments into the repository `folder`, on the branch autoresearch/TAG.

    describe: experiment number and its words -> what the agent typed as (DESC, FOUND, OPEN). share: of ideas that gain
    2 and 4 SIGMA. change: fields of every record to replace. Returns the true gain of the last kept program.
    """
    draw, folder = random.Random(seed), Path(folder)
    told, programs, reference = simulated((folder / "train.py").read_text(), count, draw, share)
    clock = datetime.now().astimezone() - timedelta(seconds=480 * count)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()
    commits = imported(folder, programs, tag, reference, head)
    write(folder, told, commits, tag, clock, draw, budget, describe or described, change or {})
    return 1.2 - reference.truth


def simulated(base, count, draw, share=(0.06, 0.03)):
    """A night judged by the real rule: (what happened, program, details) in order; its programs; the last."""
    programs, told, loads, runs = [], [], [], []

    def program(text, parent, truth):
        facts = {"text": text, "blob": blob_of(text), "parent": parent, "truth": truth, "rate": 60000.0}
        programs.append(SimpleNamespace(mark=0, count=0, **facts))
        return programs[-1]

    def run(p, role):
        busy, p.count = 40 < len(told) % 150 < 55, p.count + 1
        bpb = draw.gauss(p.truth, SIGMA) + 0.01 * busy
        rate = p.rate * draw.gauss(1, 0.01) * (0.8 if busy else 1)
        facts = {"seed": 41 + p.count, "bpb": bpb, "rate": rate, "busy": busy}
        told.append((role, p, facts))
        runs.append((p.blob, facts["seed"], bpb, rate))
        loads.append(math.log(4) if busy else 0.0)

    def judged(p, reference):
        evidence = Evidence([Observation(*r, *where) for r, *where in zip(runs, loads, slots(loads), strict=True)])
        fewer = len(p.text.splitlines()) < len(reference.text.splitlines())
        facts = verdict.Facts.of(evidence, p.blob, reference.blob, fewer_lines=fewer)
        word, why, following = verdict.rule(facts)
        return SimpleNamespace(word=word, rule=why, next=following, seen=facts.seen, mean=evidence.mean(p.blob))

    reference = program(base, None, 1.2)
    run(reference, "candidate")
    told.append(("log", reference, {"status": "keep", "words": "baseline", "decision": None, "old": None}))
    for _ in range(3):
        run(reference, "reference")
    for number in range(2, count + 1):
        while True:
            words, text = idea(reference.text, draw, number)
            if blob_of(text) not in {p.blob for p in programs}:
                break
        luck = draw.random()
        effect = next((e for limit, e in zip(np.cumsum(share), (2, 4), strict=True) if luck < limit), None)
        effect = -abs(draw.gauss(0, 4)) if effect is None and luck > 0.6 else effect or 0.0
        p = program(text, reference, reference.truth - effect * SIGMA)
        p.rate = reference.rate * draw.choice((1, 1, 1, 0.97, 1.03, 0.9))
        if draw.random() < 0.12:
            for _ in range(draw.randrange(1, 3)):
                kind = draw.choice(("crash", "crash", "invalid", "timeout"))
                told.append(("failed", p, {"kind": kind, "seed": 42}))
            if draw.random() < 0.5:
                told.append(("log", p, {"status": "crash", "words": words, "decision": None, "old": reference}))
                continue
        run(p, "candidate")
        while (decision := judged(p, reference)).word == "rerun":
            run(*{"old": (reference, "reference"), "new": (p, "candidate")}[decision.next])
        status = "keep" if decision.word == "keep" else "discard"
        told.append(("log", p, {"status": status, "words": words, "decision": decision, "old": reference}))
        reference = p if status == "keep" else reference
    return told, programs, reference


def described(number, words):
    return (words, f"it says something about idea {number}" if number % 2 else "",
            f"what about the opposite of {number}?" if number % 7 == 0 else "")  # fmt: skip


def imported(folder, programs, tag, last, head):
    """Commit every program on its parent by git fast-import; returns {blob: commit}."""
    stream = []
    for mark, p in enumerate(programs, 1):
        p.mark = mark
        text, message = p.text.encode(), f"idea {mark}".encode()
        stream += [b"commit refs/experiments/%s/%03d\nmark :%d\n" % (tag.encode(), mark, mark),
                   b"committer agent <agent@localhost> 1700000000 +0000\ndata %d\n%s\n" % (len(message), message),
                   b"from %s\n" % (b":%d" % p.parent.mark if p.parent else head.encode()),
                   b"M 100644 inline train.py\ndata %d\n%s\n" % (len(text), text)]  # fmt: skip
    stream.append(b"reset refs/heads/autoresearch/%s\nfrom :%d\n\n" % (tag.encode(), last.mark))
    stream.append(b"reset refs/experiments/%s/start\nfrom %s\n\n" % (tag.encode(), head.encode()))
    marks = folder / ".git" / "marks"
    words = ["git", "fast-import", "--quiet", "--force", f"--export-marks={marks}"]
    subprocess.run(words, cwd=folder, input=b"".join(stream), check=True)
    of_mark = dict(line.split() for line in marks.read_text().splitlines())
    subprocess.run(["git", "checkout", "-q", "-f", f"autoresearch/{tag}"], cwd=folder, check=True)
    return {p.blob: of_mark[f":{p.mark}"] for p in programs}


def write(folder, told, commits, tag, clock, draw, budget, describe, change):
    data, session = folder / "data", folder / "data" / "sessions" / quote(tag, safe="")
    session.mkdir(parents=True, exist_ok=True)
    events, table, journal, row, stamp = [], [HEADER], ["# Research journal\n"], 0, None

    def note(event, **content):
        events.append({"event": event, "time": clock.isoformat(timespec="milliseconds"), **content})

    for number, (what, p, facts) in enumerate(told):
        commit = commits[p.blob]
        if what != "log":
            stamp = f"{clock:%Y%m%d_%H%M%S}-{number:06x}"
            role = "candidate" if what == "failed" else what
            note("begin", id=stamp, role=role, pair=None, tag=tag, commit=commit, train_blob=p.blob,
                 budget=budget, seed=facts["seed"], launcher=1)  # fmt: skip
        if what == "failed":
            clock += timedelta(seconds=45)
            note("end", id=stamp, status=facts["kind"], reason="ValueError: shapes (4,8) and (8,2) differ",
                 wall_seconds=45.0, run_id=None)  # fmt: skip
        elif what != "log":
            clock += timedelta(seconds=budget + 57)
            figures = (facts["seed"], facts["bpb"], facts["rate"], draw, budget, facts["busy"])
            made = a_record(p.blob, commit, clock, *figures, change)
            (data / f"run_{clock:%Y%m%d_%H%M%S}_{len(tag)}.json").write_text(json.dumps(made, indent=1))
            (data / "last_run.json").write_text(json.dumps(made, indent=1))
            note("end", id=stamp, status="valid", reason=None, wall_seconds=budget + 57,
                 run_id=made["run_id"])  # fmt: skip
            p.last = stamp
        else:
            row, decision, old = row + 1, facts["decision"], facts["old"]
            clock += timedelta(seconds=20)
            words, found, question = describe(row, facts["words"])
            valid = facts["status"] != "crash"
            own = [f for what, q, f in told[:number] if q is p and "bpb" in f]
            bpb = decision.mean if decision else np.mean([f["bpb"] for f in own]) if valid else 0
            rate = np.mean([f["rate"] for f in own]) if valid else 0
            line = f"{commit[:7]}\t{bpb:.6f}\t{1.8 if valid else 0.0:.1f}\t{rate:.0f}\t{facts['status']}\t{words}"
            entry = f"\n## {row}. {facts['status']}: {words}\n\n- val_bpb {bpb:.6f}\n- found: {found}\n"
            note("logging", id=stamp, row=row, number=row, line=line, row_status=facts["status"], commit=commit,
                 train_blob=p.blob, description=words, verdict=decision.word if decision else None,
                 rule=decision.rule if decision else None, reference=commits[old.blob][:7] if old else None,
                 gain=decision.seen.gain if decision else None, error=decision.seen.error if decision else None,
                 found=found,
                 question=question, entry=entry)  # fmt: skip
            note("logged", id=stamp)
            table.append(line)
            journal.append(entry)
        clock += timedelta(seconds=draw.choice((8, 20, 45)))
    (session / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (session / "results.tsv").write_text("\n".join(table) + "\n")
    (folder / "results.tsv").unlink(missing_ok=True)
    (folder / "results.tsv").symlink_to(session.relative_to(folder) / "results.tsv")
    log = folder / "internal" / "log"
    log.mkdir(parents=True, exist_ok=True)
    (log / f"log_{clock:%Y-%m-%d}.md").write_text("".join(journal))


if __name__ == "__main__":
    print(f"true gain {make(sys.argv[1], int((sys.argv[2:] or [40])[0]), (sys.argv[3:] or ['t'])[0]):.6f}")
