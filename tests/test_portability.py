"""The night runs on a stock Mac: bash 3.2, GNU Make 3.81, BSD tools. Here is what Linux can prove of it."""

import json
import os
import platform
import re
import shutil

import pytest
from conftest import ROOT, STANDIN

SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]

NEWER_THAN_BASH_32 = {
    r"\b(declare|local|typeset)\s+-\w*[An]": "declare -A m",
    r"\b(mapfile|readarray|coproc)\b": "mapfile -t lines",
    r"\$\{!?\w+(\[[^]]*\])?(,|\^)": "echo ${x,,}",
    r"\$\{\w+: +-|\$\{\w+\[-": "echo ${a[-1]}",
    r"\bwait\s+-n": "wait -n",
    r"printf\s+(-v \w+ )?['\"]?%\(": "printf '%(%F)T'",
    r"&>>|\|&": "make |& tee log",
    r";;?&": "a) ;;& b) ;;",
    r"(\[\[|\btest|\[)\s+-v\b": "[[ -v x ]]",
    r"\bread\s+-\w*[Ni]": "read -N 1",
}
NOT_ON_A_MAC = {
    r"(^|[|;&({]\s*|\b(?:then|do|else|if|!|exec|env|command)\s+)"
    r"(timeout|flock|setsid|nproc|sha\d+sum|md5sum|jq|realpath|tac|shuf|gawk|stdbuf|free)\b(?!=)": "x | timeout 5 y",
    r"\breadlink\s+-[fem]": "readlink -f x",
    r"\bsed\s+(-\w+\s+)*(-i|-r|--\w|-z|-s)": "sed -i s/a/b/ x",
    r"\bsed\b.*\\[+?|]": r"sed 's/a\|b/c/'",
    r"\bdate\s+(-d|--|-I|\+\S*%N)": "date -d yesterday",
    r"\bstat\s+(-c|--)": "stat -c %s x",
    r"\bmktemp\b(?!.*X{6})": "mktemp -d",
    r"\bmktemp\s+(-\w+\s+)*(-p|--)": "mktemp -p /tmp XXXXXX",
    r"\bgrep\s+(-\w+\s+)*(-\w*P|--)": "grep -P x",
    r"\b(xargs\s+-\w*[rd]|sort\s+-\w*[Vh]|cp\s+-\w*[tT]|ln\s+-\w*[rT]|ls\s+--|rm\s+--\w|ps\s+--)": "xargs -r x",
    r"\becho\s+-[en]": "echo -e x",
}
NEWER_THAN_MAKE_381 = {
    r"^\s*\.ONESHELL|^\s*\.EXTRA_PREREQS|^\s*\.NOTINTERMEDIATE": ".ONESHELL:",
    r"^\s*\w+\s*(!=|::=|:::=|\?::?=)": "X != date",
    r"\$[({](file|guile|intcmp|let)\s": "$(file >x,y)",
    r"&:": "a b &: c",
    r"^\s*(define\s+\w+\s*[:+?]?=|undefine\b|private\b|load\b|-load\b)": "define X =",
    r"^[^#]*:\s.*\|\|": "x: || y",
}


def code_lines(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        yield number, re.sub(r"(^|\s)#.*", r"\1", line)


@pytest.mark.parametrize("rules", [NEWER_THAN_BASH_32, NOT_ON_A_MAC, NEWER_THAN_MAKE_381], ids=["bash", "mac", "make"])
def test_each_rule_finds_its_example(rules):
    for pattern, example in rules.items():
        assert re.search(pattern, example), (pattern, example)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_use_nothing_newer_than_bash_32_and_macos(path):
    for number, line in code_lines(path):
        newer = [pattern for pattern in (*NEWER_THAN_BASH_32, *NOT_ON_A_MAC) if re.search(pattern, line)]
        assert not newer, (number, line)
        # With `set -u`, bash 3.2 stops at an empty array. LAUNCH holds at least an interpreter, once it is set.
        assert set(re.findall(r"\$\{(\w+)\[[@*]\]", line)) <= {"LAUNCH"}, (number, line)


def test_the_makefile_is_for_make_381_and_calls_one_script_a_target():
    for number, line in code_lines(ROOT / "Makefile"):
        assert not any(re.search(pattern, line) for pattern in NEWER_THAN_MAKE_381), (number, line)
        assert not line.startswith("\t") or line == "\t@scripts/$@.sh"


# The commands that macOS ships and that the scripts may use; busybox's applets stand in for a userland
# that is not GNU's. bash, git and make are themselves; a Mac has them too.
MACOS = """awk basename cat chmod cksum cp cut date dirname echo env expr false find grep head id kill ln ls mkdir
mktemp mv printf ps pwd rm rmdir sed sh sleep sort tail tee test touch tr true uname uniq wc xargs""".split()


@pytest.fixture
def stock(session, tmp_path):
    """The session under a PATH of those commands alone, and a Python without what only Linux has."""
    folder = tmp_path / "stock"
    folder.mkdir()
    busybox = shutil.which("busybox")
    if platform.system() == "Darwin":
        for name in [*MACOS, "bash", "git", "make", "caffeinate"]:
            path = shutil.which(name, path="/usr/bin:/bin")
            (folder / name).symlink_to(path) if path else None
    elif busybox:
        for name in MACOS:
            (folder / name).symlink_to(busybox)
        for name in ("bash", "git", "make", "ps"):  # busybox's ps has neither -A nor -p
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(shutil.which(name))
        session.env["PYTHONPATH"] = str(STANDIN.parent / "macos")
    else:
        pytest.skip("neither macOS nor busybox, so there is no other userland to try")
    session.env["PATH"] = str(folder)
    return session


@pytest.mark.slow
def test_a_session_on_stock_tools(stock):
    assert stock.run("sh", "-c", "command -v timeout flock setsid jq realpath").stdout == ""
    stock.git("checkout", "-q", "main")
    stock.make("setup", "TAG=stock", "BUDGET=0.5", "TIMEOUT=9", check=0)
    stock.make("baseline", check=0)
    assert "discard" in stock.experiment("prepare.finish(1.6)").stdout
    stock.make("log-result", "STATUS=discard", "DESC=größer", check=0)
    stock.make("discard", check=0)
    stock.write_train("import time\nwhile True: time.sleep(0.1)")
    assert "timeout (exit 124)" in stock.make("run").stdout
    stock.make("log-result", "STATUS=crash", "DESC=never ends", check=0)
    stock.make("discard", check=0)
    stock.experiment("prepare.finish(1.4)", "keep")
    with (stock.path / "prepare.py").open("a") as out:
        out.write("#")
    assert "prepare.py" in stock.script("run", check=1).stderr
    assert [row[4] for row in stock.rows] == ["keep", "discard", "crash", "keep"]
    for verb in ("results", "verdict", "help", "clean"):
        stock.make(verb, check=0)


@pytest.mark.slow
def test_the_machine_is_kept_awake_for_as_long_as_train_py_runs(session, tmp_path):
    """A stand-in for caffeinate notes how it was called: -i -w PID, and it is macOS that ends it then."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "caffeinate").write_text(f'#!/bin/sh\necho "$*" >"{tmp_path}/awake"\n')
    (folder / "caffeinate").chmod(0o755)
    session.env["PATH"] = f"{folder}{os.pathsep}{session.env['PATH']}"
    session.write_train("import os, time\nprint('pid', os.getpid())\ntime.sleep(0.5)\nprepare.finish(1.4)")
    session.script("run", check=0)
    pid = re.search(r"pid (\d+)", (session.path / "run.log").read_text())[1]
    assert (tmp_path / "awake").read_text() == f"-i -w {pid}\n"


@pytest.mark.slow
def test_a_clone_with_autocrlf_runs(checkout, tmp_path):
    """.gitattributes: without it git would hand out CR LF, and no script would start."""
    clone = tmp_path / "clone"
    checkout.run("git", "clone", "-q", "-c", "core.autocrlf=true", str(checkout.path), str(clone), check=0)
    assert not [p for p in clone.rglob("*") if p.is_file() and ".git" not in p.parts and b"\r" in p.read_bytes()]
    checkout.path = clone
    checkout.make("help", check=0)
    checkout.make("setup", "TAG=t", check=0)
    checkout.make("baseline", check=0)
    # an editor that writes CR LF: the commit holds the bytes that run
    (clone / "train.py").write_bytes(b'DATASET = "stdlib"\r\nimport prepare\r\nprepare.finish(1.4)\r\n')
    checkout.git("commit", "-q", "-m", "CR LF", "train.py")
    checkout.make("run", check=0)
    assert json.loads((clone / "data/last_run.json").read_text())["train_blob"] == checkout.git(
        "rev-parse", "HEAD:train.py"
    )


def test_texts_and_switches_come_from_the_command_line_alone(session):
    session.env.update(OPEN="xdg-open", FOUND="mine", DESC="mine", BASELINE="1", AGAIN="1", STATUS="keep", TAG="q")
    assert "was run before" in session.make("run").stderr
    session.write_train("prepare.finish(1.4)")
    assert "next     make log-result STATUS=keep" in session.make("run", check=0).stdout
    assert session.make("log-result").returncode
    session.make("log-result", "STATUS=discard", "DESC=better", check=0)
    assert session.rows[-1][-1] == "better" and "xdg-open" not in session.journal and "mine" not in session.journal
    assert "TAG is missing" in session.make("setup").stderr
    session.make("run", "AGAIN=1", check=0, SEED="5")  # a number may stand in the environment
    assert json.loads((session.path / "data/last_run.json").read_text())["seed"] == 5


def test_values_reach_the_scripts_as_they_were_typed(session):
    odd = "-3% $x $$ $(touch made) `touch made` #1 'a' \"b\" \\ ü;&|"
    session.write_train("prepare.finish(1.4)")
    session.make("run", check=0)
    session.make("log-result", "STATUS=keep", f"DESC={odd}", f"FOUND={odd}", f"OPEN={odd}", check=0)
    assert session.rows[-1][-1] == odd and session.journal.count(odd) == 3
    assert not (session.path / "made").exists()


def test_a_misspelt_variable_is_refused(checkout):
    done = checkout.make("run", "BUGDET=3", check=2)
    assert "make has no variable BUGDET" in done.stderr and done.stdout == "" and done.stderr.count("\n") == 1
    checkout.make("help", "SHELL=/bin/sh", check=0)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.stem)
def test_a_helper_that_asks_python_has_one(path):
    """Without PYTHON there is none before need_python; these tests give one, so only the text shows it."""
    lines = [line.strip() for line in path.read_text().splitlines() if not line.startswith("#")]
    asking = [i for i, line in enumerate(lines) if re.search(r"\$\{LAUNCH|\$PYTHON", line)]
    if asking and path.stem != "lib":
        assert re.search("need_python|export_settings", " ".join(lines[: asking[0]]))
