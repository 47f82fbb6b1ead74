"""Checkouts to work in, as a person would: through make, in a folder whose name has spaces and accents."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlx.core as mx
import pytest

if "PYTEST_XDIST_WORKER" in os.environ and os.environ.get("LD_PRELOAD", "/")[:1] != "/":
    del os.environ["LD_PRELOAD"]  # in a checkout whose path has a blank: it is loaded, and children elsewhere lack it

mx.set_default_device(mx.cpu)  # the tests of the Python core give the same everywhere

import data_sources  # noqa: E402
import prepare  # noqa: E402
from harness import corpus  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OURS = ["Makefile", "scripts", "harness", "pyproject.toml", "requirements.lock", "requirements-cuda.lock"]
OURS += [".gitignore", ".gitattributes"]
HARNESS = sorted(ROOT.glob("*.py"))  # the real one, train.py and bench.py with it
SIZES = """
import dataclasses
DATASETS["files"] = dataclasses.replace(DATASETS["files"], vocab_size=512, sequence_length=64, eval_tokens=6400)
"""  # appended to data_sources.py: the sizes of the fixture `small`
STANDIN = Path(__file__).parent / "standin" / "prepare.py"


def sampled(values):
    """Parameters of a test, of which `make test` tries every third, and ALL=1 all."""
    return [pytest.param(value, marks=pytest.mark.slow if n % 3 else ()) for n, value in enumerate(values)]


def clean_environment(home, **more):
    """What a fresh login has, so that nothing of the test run leaks in."""
    identity = {f"GIT_{who}_{what}": f"tester{'@example.org' * (what == 'EMAIL')}"
                for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        "PYTHON": sys.executable,
        "AUTORESEARCH_LOCK": str(home / "lock"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **identity,
        **more,
    }


class Checkout:
    """A working copy and the commands that a person types in it."""

    def __init__(self, path, env):
        self.path, self.env = path, env

    def run(self, *words, check=None, **env):
        """Run a command; `check` is the exit code that it must have."""
        done = subprocess.run(
            words, cwd=self.path, env={**self.env, **env}, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert check is None or done.returncode == check, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def make(self, *words, check=None, **env):
        return self.run("make", *words, check=check, **env)

    def script(self, name, *words, check=None, **env):
        """A verb's script itself, whose exit code make would hide."""
        return self.run(f"scripts/{name}.sh", *words, check=check, **env)

    def git(self, *words, **env):
        return self.run("git", *words, check=0, **env).stdout.strip()

    def give_environment(self):
        """An environment of its own, as `make prepare` builds it, in place of PYTHON: that of the tests."""
        (self.path / ".venv" / "bin").mkdir(parents=True)
        (self.path / ".venv/bin/python").symlink_to(sys.executable)
        for name in ("lib", "pyvenv.cfg"):
            (self.path / ".venv" / name).symlink_to(Path(sys.prefix, name))
        stamp = re.search(r"(?ms)^stamp\(\) \{.*?^\}", (ROOT / "scripts/environment.sh").read_text())[0]
        self.run("bash", "-c", f"lock=requirements.lock\n{stamp}\nstamp >.venv/.stamp", check=0)
        self.env["PYTHON"] = ""

    def settings(self, tag="*", **changed):
        """Change what the session was opened with, as no person can."""
        (path,) = (self.path / "data" / "sessions").glob(f"{tag}/settings.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    def write_train(self, body, commit="an idea", dataset="stdlib"):
        """Make `body` the science of train.py, and commit it."""
        (self.path / "train.py").write_text(f'DATASET = "{dataset}"\nimport prepare\n{body}\n')
        if commit:
            self.git("commit", "-q", "-m", commit, "train.py")

    def experiment(self, body, status=None, desc="an idea"):
        """Commit, run, and log where a status is given; returns run.sh's result."""
        self.write_train(body)
        done = self.script("run")
        if status:
            self.make("log-result", f"STATUS={status}", f"DESC={desc}", check=0)
        return done

    @property
    def rows(self):
        lines = (self.path / "results.tsv").read_text().splitlines()
        assert lines[0] == "commit\tval_bpb\tmemory_gb\tavg_tok_sec\tstatus\tdescription"
        return [line.split("\t") for line in lines[1:]]

    @property
    def events(self):
        """What was noted of the newest session that has anything noted."""
        files = (self.path / "data" / "sessions").glob("*/events.jsonl")
        newest = max(files, key=lambda path: path.stat().st_mtime_ns)
        return [json.loads(line) for line in newest.read_text().splitlines()]

    @property
    def attempt(self):
        """The newest run: how it began and, where it ended, how."""
        begun = [event for event in self.events if event["event"] == "begin"][-1]
        ends = [e for e in self.events if e["event"] == "end" and e["id"] == begun["id"]]
        return {"status": "running", **begun} | (ends[0] if ends else {})

    @property
    def journal(self):
        return "".join(p.read_text() for p in sorted((self.path / "internal" / "log").glob("log_*.md")))

    def refs(self, tag):
        names = self.git("for-each-ref", "--format=%(refname:lstrip=3) %(objectname)", f"refs/experiments/{tag}/")
        return dict(line.split() for line in names.splitlines())


def new_checkout(path, home, harness=(STANDIN,)):
    """A folder with our files and a harness, and a repository without a commit."""
    path.mkdir(parents=True)
    home.mkdir(exist_ok=True)
    for name in OURS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, path / name)
    for file in harness:
        shutil.copy(file, path / file.name)
    checkout = Checkout(path, clean_environment(home))
    checkout.run("git", "init", "-q", "--template=", "-b", "main", check=0)
    return checkout


FOLDER = "ein répo für alle"


def copied(source, tmp_path):
    shutil.copytree(source.path, tmp_path / FOLDER, symlinks=True)
    (tmp_path / "home").mkdir()
    return Checkout(tmp_path / FOLDER, clean_environment(tmp_path / "home"))


def set_constants(text, **values):
    """The text of train.py with some of its constants changed, as an agent would edit it."""
    for name, value in values.items():
        text, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", text, flags=re.MULTILINE)
        assert count == 1, f"train.py has no constant {name}"
    return text


def small_laboratory(folder, **constants):
    """A checkout of the whole project with the real harness, a small model and a small dataset, prepared."""
    checkout = new_checkout(folder / "clone", folder / "home", HARNESS)
    with (checkout.path / "data_sources.py").open("a") as out:
        out.write('DATASETS["files"] = Dataset("files", Folder(), 400, 128, 4096, 1 / 20)\n')
    small = {"DATASET": '"files"', "DEPTH": 1, "HEAD_DIM": 32, "ASPECT_RATIO": 32, "TOTAL_BATCH_SIZE": 512, **constants}
    (checkout.path / "train.py").write_text(set_constants((ROOT / "train.py").read_text(), **small))
    checkout.git("add", "-A")
    checkout.git("commit", "-q", "-m", "start")
    (folder / "texts").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        (folder / "texts" / f"{path.stem}.txt").write_bytes(path.read_bytes())
    checkout.env["AUTORESEARCH_CACHE"] = str(folder / "cache")
    checkout.make("prepare", f"FILES={folder / 'texts'}", check=0)
    return checkout


@pytest.fixture(scope="session")
def pristine_checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    checkout = new_checkout(folder / FOLDER, folder / "home")
    checkout.write_train("prepare.finish(1.5)", commit="")
    checkout.git("add", "-A")
    checkout.git("commit", "-q", "-m", "start")
    return checkout


@pytest.fixture(scope="session")
def pristine_session(pristine_checkout, tmp_path_factory):
    session = copied(pristine_checkout, tmp_path_factory.mktemp("session"))
    session.make("setup", "TAG=t", check=0)
    session.make("baseline", check=0)
    return session


@pytest.fixture
def checkout(pristine_checkout, tmp_path):
    """A repository of one commit, with a stand-in harness and a train.py that works."""
    return copied(pristine_checkout, tmp_path)


@pytest.fixture
def session(pristine_session, tmp_path):
    """The same, with a session `t` open and its baseline (1.5, 1000 tok/s) logged."""
    return copied(pristine_session, tmp_path)


# --- the Python core -------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    ours = ("AUTORESEARCH_FILES", "AUTORESEARCH_COLUMN", "AUTORESEARCH_BUDGET", "AUTORESEARCH_SEED")
    for name in (*ours, "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def small_files(tmp_path_factory):
    """The dataset `files` in small sizes, prepared once: (dataset, its cache's root, its FILES)."""
    folder, root = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("small")
    texts = [text for _, part in itertools.islice(corpus.StandardLibrary().documents(), 60) for text in part]
    texts += texts[::9] + ["Füße, 東京, 🙂 \u2028 and so on: " + text for text in texts[::30]]  # copies, other scripts
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = dataclasses.replace(
        data_sources.DATASETS["files"], vocab_size=512, sequence_length=64, eval_tokens=64 * 100
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(root))
        patch.setenv("AUTORESEARCH_FILES", str(folder))
        prepare.prepare(dataset)
    return dataset, root, folder


@pytest.fixture
def small(small_files, cache, monkeypatch):
    """`files` in small sizes, prepared; its cache is this test's own copy."""
    dataset, root, _ = small_files
    shutil.copytree(root, cache)
    monkeypatch.setitem(data_sources.DATASETS, "files", dataset)
    return dataset


@pytest.fixture
def tokenizer(small_files, monkeypatch):
    """The tokenizer of `files` in small sizes; for tests that change nothing in its cache."""
    dataset, root, _ = small_files
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(root))
    return prepare.Tokenizer.load(dataset)


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (it takes root on Linux)")
    yield disk
    subprocess.run(["umount", disk], check=True)
