"""Every command that README.md, program.md and docs/ show, typed as it stands there by a reader who follows them.

A command is an indented line, or a piece in backticks, that begins with one of `PROGRAMS`. Each stands at the beginning
of a line of a walk below, or in `NOT_TYPED`, with the reason.
"""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Checkout, small_laboratory

PAGES = [ROOT / "README.md", ROOT / "program.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"make", "git", "rsync", "uv", "claude", "tail", "sed", ".venv/bin/python", "python", "python3"}
NOT_TYPED = {
    "claude --plugin-dir ./experiment-plugin": "needs Claude Code, and a network",
    "make prepare DATASET=tinystories": "needs a network",
    "make test": "runs this test",
    "make test ALL=1": "runs this test",
    "make lint": "looks at the whole repository, and runs before `make test`",
    "make tune": "refuses beside other work; test_tune.py types it",
    "make setup TAG=nov24 HOSTS=mac1.local,mac2.local": "needs a second machine",
    "make setup TAG=nov24 HOSTS=hosts.json": "needs a second machine",
    "make run BUDGET=60 DEVICE=0": "needs a GPU",
    "make run BUDGET=60 NPROC=2": "needs two GPUs",
    ".venv/bin/python tests/crash/points.py discard FOLDER --show": "minutes; test_crashes.py types it",
    ".venv/bin/python tests/simulation.py 20": "half an hour; test_evidence.py asks for less",
    ".venv/bin/python tests/soak.py --hours 1": "an hour; test_crashes.py asks for less",
    ".venv/bin/python tests/soak.py --hours 1.02 --seed 117": "an hour; test_crashes.py asks for less",
}

# What a reader types from a fresh clone on. A line that begins with a blank is his own, and one that begins with `#`
# is what he writes into train.py.
NIGHT = """
make baseline BUDGET=20
make help
git branch --list 'autoresearch/*'
make setup TAG=nov24 NPROC=2
make setup TAG=nov24
make prepare
make baseline
# raise ValueError()
 git commit -q -m "wrong" train.py
 ! make run
tail -n 50 run.log
tail -n 5 run.log
make log-result STATUS=crash DESC="…"
 make verdict 2>&1 | grep "it is logged, as row 2"
make discard
# prepare.finish(1.6)
git commit -q -m "SwiGLU in place of relu squared" -m "Expect: 0.002 to 0.006" train.py
make run WAIT=1
make watch
sed '/"curve"/,$d' data/last_run.json | cut -c-99
 sed '/"curve"/,$d' data/last_run.json | grep '"val_bpb": 1.6'
make log-result STATUS=discard DESC="SwiGLU, same parameters" FOUND="5 % slower, no better a step" OPEN="wider?"
make discard
# prepare.finish(1.4, 1200)
 git commit -q -m "a gate" train.py
make run
make verdict
make log-result STATUS=keep DESC="…"
make results
make brief
 git clone -q . ../elsewhere && cp -R .venv ../elsewhere && cd ../elsewhere
git fetch origin && git fetch origin 'refs/experiments/*:refs/experiments/*' && git checkout autoresearch/nov24
rsync -a OLD/data OLD/internal .
git checkout autoresearch/nov24
make brief
git status --short; git log --oneline -3
make verdict
# prepare.finish(1.3, 1300)
 git commit -q -m "on another machine" train.py
make run
 make log-result STATUS=keep DESC="on another machine"
git worktree add ../second && cd ../second
make setup TAG=second && make baseline
make clean
"""
MORNING = """
make run REFERENCE=1 N=4
# prepare.finish(1.4, 1200)
 git commit -q -m "a gate" train.py
make run
 make log-result STATUS=keep DESC="a gate"
make ablate
make holdout N=1
make holdout N=1 BUDGET=1200
make holdout N=3
make report
"""
PIECES = """
make prepare DATASET=files FILES=dir
make check
make baseline
make bench
 echo "import train" > probe.py
make bench SCRIPT=probe.py
make sample
uv run prepare.py
uv run train.py
uv run bench.py
 uv run train.py --weights data/best.safetensors
"""


def shown(page):
    """The commands of a page, without comments."""
    lines = page.read_text().splitlines()
    blocks = [line.strip() for line in lines if line.startswith("    ")]
    spans = re.findall(r"`([^`]+)`", "\n".join(line for line in lines if not line.startswith("    ")))
    pieces = [" ".join(re.split(r"\s#", piece)[0].split()) for piece in [*blocks, *spans]]
    return {piece for piece in pieces if piece.split()[0] in PROGRAMS}


def test_every_command_is_typed_or_says_why_not():
    typed = [line for line in (NIGHT + MORNING + PIECES).splitlines() if line and line[0] not in " #"]
    commands = set().union(*map(shown, PAGES))
    assert {c for c in commands - set(NOT_TYPED) if not any(f"{line} ".startswith(f"{c} ") for line in typed)} == set()
    assert set(NOT_TYPED) <= commands


def follow(walk, reader, **names):
    """Type the lines of a walk, each with its own words for `names`; each must succeed, and may change the folder."""
    for line in filter(None, walk.splitlines()):
        if line[0] == "#":
            reader.write_train(line[2:], commit="")
            continue
        for name, value in names.items():
            line = re.sub(rf"\b{name}\b", value, line)
        done = reader.run("bash", "-c", f"{line.strip()} && pwd", check=0)
        reader.path = Path(done.stdout.splitlines()[-1])


def test_a_night_as_it_is_told(checkout, tmp_path):
    reader = Checkout(tmp_path / "clone", checkout.env | {"BUDGET": "1"})
    checkout.git("clone", "-q", ".", str(reader.path))
    reader.give_environment()
    follow(NIGHT, reader, OLD=str(reader.path), rsync="rsync" if shutil.which("rsync") else "cp")
    assert [row[4] for row in reader.rows] == ["keep"]
    reader.path = tmp_path / "elsewhere"
    assert [row[4] for row in reader.rows] == ["keep", "crash", "discard", "keep", "keep"]


@pytest.mark.slow
def test_the_end_of_a_night(session):
    follow(MORNING, session)


@pytest.mark.slow
def test_what_takes_a_real_model(tmp_path):
    reader = small_laboratory(tmp_path, DEVICE_BATCH_SIZE=4, EVAL_BATCH_SIZE=16)
    reader.env |= {"BUDGET": "1", "AUTORESEARCH_BUDGET": "1"}
    follow(PIECES, reader, dir=str(tmp_path / "texts"), **{"uv run": reader.env["PYTHON"]})
