"""What program.md, README.md, CLAUDE.md, AGENTS.md and the plugin say is so.

Whatever stands in backticks or in an indented block must resolve: a target, a variable with its default, a
file, a field of a real run's record, a column, a constant, a name in the code. What resolves to nothing fails.
"""

import ast
import itertools
import json
import keyword
import re
import shlex
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import HARNESS, ROOT
from test_record import RECORD

import data_sources
from harness import corpus, project
from scripts import session as sessions
from scripts import settings
from scripts.judge import verdict
from scripts.show.summary import EXIT

PLUGIN = ROOT / "experiment-plugin"
SKILL = PLUGIN / "skills" / "model" / "SKILL.md"
PAGES = {name: ROOT / name for name in ("program.md", "README.md", "CLAUDE.md", "AGENTS.md")} | {"SKILL.md": SKILL}
FOLDERS = (".", "harness", "scripts", "scripts/judge", "scripts/run", "scripts/show")
SOURCES = "\n".join(p.read_text() for folder in FOLDERS for p in sorted((ROOT / folder).glob("*"))
                    if p.suffix in (".py", ".sh", "") and p.is_file() and p.name != "LICENSE")  # fmt: skip
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
VARIABLES = set(" ".join(re.findall(r"^(?:SETTINGS|GIVEN) = (.*)", MAKEFILE, re.MULTILINE)).split())
ENVIRONMENT = set(re.findall(r"\b(?:AUTORESEARCH|HF)_[A-Z_]+", SOURCES))
COMMANDS = {"make", "git", "tail", "sed", "python3", "uv", "claude"}
EXAMPLES = {"nov24", "Error 124"}  # a session's tag; what make says of an exit code
CLAUDE_CODE = {"$ARGUMENTS", "run_in_background"}  # what the skill says to Claude Code alone


def names_in(module):
    """Classes, functions, methods and constants of a file, by their bare names."""
    tree = ast.parse((ROOT / module).read_text())
    defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    constants = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    return defined | constants


class Names:
    """All names that the prose may use."""

    def __init__(self):
        code = [path.relative_to(ROOT) for folder in (".", "harness") for path in (ROOT / folder).glob("*.py")]
        self.train, self.run = set().union(*map(names_in, code)), names_in("harness/run.py")
        columns = set(sessions.HEADER.split("\t"))
        statuses = set(re.search(r"\(((?:\w+\|)+\w+)\)", sessions.ROW.pattern).group(1).split("|"))
        verdicts = {verdict_of(*edge) for edge in EDGES} | {"rerun", "again"}
        datasets = set(data_sources.DATASETS)
        fields = {f"{part}.{name}".lstrip(".") for part, names in RECORD.items() for name in names.split()}
        self.words = columns | statuses | verdicts | set(EXIT) | datasets | EXAMPLES | CLAUDE_CODE | fields
        self.values = {"STATUS": statuses, "DATASET": datasets}

    def assignment(self, text):
        name, _, value = text.partition("=")
        if name not in VARIABLES:
            return f"make has no variable {name}"
        if name in self.values and not {*value.split("|")} <= self.values[name]:
            return f"{name} cannot be {value}"

    def command(self, text):
        words = shlex.split(text.split("  #")[0].replace("[", "").replace("]", ""))
        if words[:1] == ["make"]:
            targets = [word for word in words[1:] if "=" not in word]
            wrong = [f"make has no target {word}" for word in targets if word not in TARGETS]
            return "; ".join(filter(None, wrong + [self.assignment(word) for word in words[1:] if "=" in word]))

    def path(self, text):
        if text.startswith("~/"):
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("AUTORESEARCH_CACHE", raising=False)
                cache = corpus.cache_dir(data_sources.DATASETS["climbmix"])
            return None if Path(text).expanduser() == cache else f"the cache is in {cache}"
        name = text.removeprefix("./")
        if not ignored(name):
            return None if any(any((ROOT / folder).glob(name)) for folder in FOLDERS) else f"no file {text}"
        # written at run time: its name, up to what varies, stands in the code
        stem = re.split(r"YYYY|\*", name.rstrip("/").rsplit("/", 1)[-1])[0]
        return None if re.search(rf"[\"'/ ]{re.escape(stem)}", SOURCES) else f"nothing writes {text}"

    def python(self, text):
        text = re.sub(r"\(.*\)$", "", text)
        owner, _, name = text.rpartition(".")
        if owner == "run":
            return None if name in self.run else f"prepare.Run has no {name}"
        if text.startswith("mx.") or owner == "":
            found = mx
            for part in text.removeprefix("mx.").split("."):
                found = getattr(found, part, None)
            if found is not None:
                return
        if text.startswith("."):
            return None if hasattr(mx.array, name) else f"arrays have no {text}"
        if text in self.train or text in {path.stem for path in HARNESS} or keyword.iskeyword(text):
            return
        return f"{text} is nothing that the code knows"

    def resolve(self, text):
        if text in self.words or text in ENVIRONMENT | VARIABLES:
            return
        if text.split()[0] in COMMANDS:
            return self.command(text)
        if re.fullmatch(r"/[\w-]+:[\w-]+.*", text):
            return None if text.split()[0] == "/experiment:model" else f"no skill {text}"
        if re.fullmatch(r"autoresearch/(<tag>|nov24)|refs/experiments/(nov24/)?", text):
            return None if text.split("<")[0].split("nov24")[0] in SOURCES else f"no code makes {text}"
        if re.fullmatch(r"[A-Z]+=.*", text):
            return self.assignment(text)
        if argument := re.fullmatch(r'(\w+)=(None|"\w+")', text):
            known = mx.fast.scaled_dot_product_attention.__doc__
            return None if argument.group(1) in known else f"no argument {text}"
        if re.fullmatch(r"\.(parquet|jsonl|txt)", text):
            return None if f'"{text}"' in SOURCES else f"{text} is not read"
        if "/" in text or re.search(r"\.(py|md|sh|tsv|json|toml|lock|log)$", text) or text == "Makefile":
            return self.path(text.split()[0])  # perhaps a script with an option
        if (" " in text or "…" in text) and "(…" not in text:  # a message, or its beginning
            return None if text.split("…")[0].strip() in SOURCES else f"no message says: {text}"
        return self.python(text)


@pytest.fixture(scope="module")
def resolve():
    """resolve(text) says what is wrong with a piece of code in the prose; nothing where it resolves."""
    return Names().resolve


def ignored(path):
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0


def pieces(text):
    """The code in a page: inline spans, and the lines of indented blocks."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    lines = text.splitlines()
    blocks = [part for line in lines if line.startswith("    ") for part in re.split(r"; (?=git )", line.strip())]
    prose = "\n".join(line for line in lines if not line.startswith("    "))
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return spans, blocks


def unresolved(text, resolve):
    spans, blocks = pieces(text)
    typed = [line for line in blocks if line.split()[0] in COMMANDS or line.startswith("/")]
    return [problem for piece in spans + typed if (problem := resolve(piece))]


# what CLAUDE.md names because macOS does not have it
ABSENT = {"timeout", "flock", "setsid", "nproc", "sha256sum", "jq", "mapfile", ".ONESHELL"}
SHELL = {"set -euo pipefail", "set -u", "git clean", "git add -f", "##", "error: …"}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page, resolve):
    text = PAGES[page].read_text()
    if page == "CLAUDE.md":
        for word in ABSENT | SHELL:
            text = text.replace(f"`{word}`", word)
    assert unresolved(text, resolve) == []


WRONG = [
    "`make fly`", "`make run BUGDET=3`", "`make log-result STATUS=maybe`", "`make setup DATASET=novels`",
    "    make rnu", "`NO_CONSTANT`", "`training.tokens_per_second`", "`nothing.py`", "`scripts/fly.sh`",
    "`data/newest.json`", "`run.stop(…)`", "`mx.fast.flash`", "`Muoon`", "`/experiment:night`", "`refs/nothing/`",
    "`no such message is printed`", "`AUTORESEARCH_SPEED`",
]  # fmt: skip


def test_a_wrong_name_is_noticed(resolve):
    assert [text for text in WRONG if len(unresolved(f"A page.\n\n{text}\n", resolve)) != 1] == []


def test_the_sections_that_program_names_exist():
    text = PAGES["program.md"].read_text()
    headings = re.findall(r"^## (\d+)\.", text, re.MULTILINE)
    assert headings == [str(n) for n in range(1, len(headings) + 1)]
    assert set(re.findall(r"section (\d+)", text)) <= set(headings)


# --- the rule for keeping ------------------------------------------------------------------------

EDGES = list(itertools.product(
    (-0.0031, -0.003, -0.0029, 0.0, 0.0049, 0.005, 0.2),  # gain; of 0 none was seen
    (-0.3, -0.16, -0.15, -0.06, -0.05, 0.0, 0.1, 0.11, 0.25, 0.26),  # faster
    (False, True), (False, True),  # simpler; harmless: a loss that matters is ruled out
))  # fmt: skip
BPB = {  # what the table says of val_bpb
    "improved": lambda gain, simpler, harmless: gain > 0,
    "improved by less than 0.005": lambda gain, simpler, harmless: 0 < gain < 0.005,
    "improved by 0.005 or more": lambda gain, simpler, harmless: gain >= 0.005,
    "no loss that matters": lambda gain, simpler, harmless: harmless,
    "no loss that matters, fewer lines": lambda gain, simpler, harmless: harmless and simpler,
    "worse by less than 0.003": lambda gain, simpler, harmless: -0.003 < gain < 0,
    "anything else": lambda gain, simpler, harmless: True,
}
THROUGHPUT = {
    "fell by at most 5 %": lambda faster: faster >= -0.05,
    "fell by at most 15 %": lambda faster: faster >= -0.15,
    "fell by more than 15 %": lambda faster: faster < -0.15,
    "rose by more than 10 %": lambda faster: faster > 0.1,
    "rose by more than 25 %": lambda faster: faster > 0.25,
    "any": lambda faster: True,
}


def verdict_of(gain, faster, simpler, harmless):
    return verdict.table(gain > 0, gain < 0, harmless, gain, faster, simpler)[0]


def test_the_table_of_program_is_the_verdict_of_the_code():
    head = r"^\| val_bpb \| throughput \| verdict \|\n\|[-|]+\n((?:\|.*\n)+)"
    rows = re.search(head, PAGES["program.md"].read_text(), re.MULTILINE).group(1).splitlines()
    rule = [(BPB[bpb], THROUGHPUT[rate], word) for bpb, rate, word in (row.strip("| ").split(" | ") for row in rows)]
    for gain, faster, *more in EDGES:
        says = next(word for bpb, rate, word in rule if bpb(gain, *more) and rate(faster))
        assert says == verdict_of(gain, faster, *more), (gain, faster, *more)


# --- commands and output -------------------------------------------------------------------------


def test_the_summaries_that_are_shown_look_like_a_real_one(session):
    at_times = {"busy", "note"}  # lines that depend on the machine, or on runs before
    told = session.experiment("prepare.finish(1.4)").stdout.splitlines()
    labels = [line.split()[0] for line in told if line.split()[0] not in at_times]
    assert labels[0] == "valid" and len(told) <= 15
    for page in ("program.md", "README.md"):
        shown = [line.split()[0] for line in pieces(PAGES[page].read_text())[1] if line.split()[0] in labels]
        assert shown == labels, page


def test_the_words_for_an_end_and_their_codes():
    rows = dict(re.findall(r"^\| `(\w+)` \((\d+)\) \|", PAGES["program.md"].read_text(), re.MULTILINE))
    assert {word: int(code) for word, code in rows.items()} == {k: v for k, v in EXIT.items() if v}


def test_every_target_and_variable_is_in_the_readme():
    text = PAGES["README.md"].read_text()
    assert set(re.findall(r"^\| `make ([a-z-]+)` \|", text, re.MULTILINE)) == TARGETS
    assert {name for name in VARIABLES if f"`{name}" not in text and f" {name}=" not in text} == set()


def test_the_defaults_that_are_told():
    budget, timeout = (settings.complete({})[name] for name in ("BUDGET", "TIMEOUT"))
    defaults = {"BUDGET": budget, "TIMEOUT": timeout, "SEED": str(project.SEED)}
    table = re.findall(r"^\| `([A-Z]+)` \| (\d+) \|", PAGES["README.md"].read_text(), re.MULTILINE)
    assert dict(table) == defaults
    text = PAGES["program.md"].read_text()
    assert f"{defaults['BUDGET']} s of training" in text and f"{defaults['TIMEOUT']} s at most" in text


def test_the_datasets_of_the_readme():
    row = r"^\| `(\w+)` \| [^|]* \| ([\d,]+) \| ([\d,]+) \| (?:up to )?([\d,]+\d)"
    rows = re.findall(row, PAGES["README.md"].read_text(), re.MULTILINE)
    told = {name: tuple(int(n.replace(",", "")) for n in numbers) for name, *numbers in rows}
    assert told == {d.name: (d.vocab_size, d.sequence_length, d.eval_tokens) for d in data_sources.DATASETS.values()}


def test_frozen_files_are_told_as_they_are():
    frozen = set(re.search(r'^FROZEN="(.*)"', SOURCES, re.MULTILINE).group(1).split())
    told = re.search(r"\*\*An experiment changes.*?make run", PAGES["CLAUDE.md"].read_text(), re.DOTALL).group(0)
    assert {name.rstrip("/") for name in re.findall(r"`([\w.-]+/?)`", told)} - {"train.py"} == frozen


def test_the_pages_are_short():
    assert len(PAGES["program.md"].read_text().split()) < 1800
    assert len(PAGES["README.md"].read_text().splitlines()) < 220


# --- the plugin ----------------------------------------------------------------------------------


def test_the_plugin_has_its_manifest_and_the_skill_its_front_matter():
    manifest = json.loads((PLUGIN / ".claude-plugin" / "plugin.json").read_text())
    assert manifest["name"] == "experiment" and manifest["description"]
    assert set(manifest) <= {"name", "version", "description", "author", "license", "keywords"}
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", SKILL.read_text(), re.DOTALL).groups()
    keys = re.findall(r"^([a-z-]+):", head, re.MULTILINE)
    assert keys == ["description", "argument-hint", "disable-model-invocation", "allowed-tools"]
    assert "$ARGUMENTS" in body and "program.md" in body and "make setup" in body
    assert "program.md" in PAGES["AGENTS.md"].read_text()


def test_the_skill_may_do_all_that_program_says():
    allowed = re.findall(r"^  - Bash\((.*?) ?\*\)$", SKILL.read_text(), re.MULTILINE)
    spans, blocks = pieces(PAGES["program.md"].read_text())
    commands = {piece for piece in spans + blocks if piece.split()[0] in COMMANDS - {"claude"}}
    assert [c for c in commands if not any(c == a or c.startswith(a) for a in allowed)] == []
