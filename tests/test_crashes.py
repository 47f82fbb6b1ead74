"""Whatever ends a command, and wherever: the same command again ends well, and nothing is lost or there twice."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import small_laboratory

HERE = Path(__file__).parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="the crash points are read from /proc")

# What stands before each verb, and how often it asks the disk to be done: (files, folders). One that is missing
# loses rows in a power cut; points.py then says which.
SYNCS = {
    "log-result": (6, 6), "baseline": (7, 8), "run": (4, 4), "discard": (1, 1), "setup": (3, 6),
    "run REFERENCE=1": (5, 6), "holdout": (13, 15), "ablate": (7, 8), "report": (2, 2),
}  # fmt: skip
EVERY = {"log-result": 4, "discard": 4, "setup": 6, "run": 6, "run REFERENCE=1": 10, "holdout": 40,
         "ablate": 40, "report": 12}  # fmt: skip


@pytest.fixture
def before(request):
    """The state that a verb begins in."""
    return lambda verb: state_before(verb, request.getfixturevalue("checkout" if verb == "setup" else "session"))


def state_before(verb, session):
    if verb == "log-result":
        session.experiment("prepare.finish(1.4, 1100)")
        (session.path / "data" / "best.safetensors").write_text("the best so far")
    elif verb == "discard":
        session.experiment("prepare.finish(1.6)", "discard")
    elif verb == "run":
        session.write_train("prepare.finish(1.4)")
    elif verb in ("holdout", "report"):
        session.experiment("prepare.finish(1.4)", "keep")
    elif verb == "ablate":  # without the second change it is a program of its own
        for a, b in ((0, 0), (1, 0), (1, 1)):
            body = f"A = {a}\n# one line\n# between\nB = {b}\nprepare.finish(1.4 - 0.1 * A - 0.1 * B)"
            session.experiment(body, "keep")
    elif verb == "baseline":
        session.write_train("prepare.finish(1.45)")
        session.settings(BUDGET="30")
        session.script("run", check=0)
    return session


def points(verb, folder, tmp_path, every):
    """Crash points of a verb, tried in two processes; returns what an undisturbed call does to the disk."""
    words = [sys.executable, HERE / "crash" / "points.py", verb, folder, "--work", tmp_path, f"--every={every}"]
    halves = [subprocess.Popen([*words, f"--part={part}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
              for part in ((0, every // 2) if every > 1 else (0,))]  # fmt: skip
    said = [half.communicate()[0] for half in halves]
    assert not any(half.returncode for half in halves), "".join(said)
    return Counter(json.loads(said[0].splitlines()[-1]))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("verb", SYNCS)
def test_a_verb_that_dies_at_many_points_is_completed_by_the_same_verb(before, tmp_path, verb):
    done = points(verb, before(verb).path, tmp_path, EVERY.get(verb, 2))
    assert (done["fsync"], done["fsync-folder"]) == SYNCS[verb]


@linux
@pytest.mark.slow
def test_preparing_that_dies_is_completed_by_the_same_command(tmp_path):
    checkout = small_laboratory(tmp_path / "lab")
    done = points("prepare", checkout.path, tmp_path, 80)
    assert (done["fsync"], done["fsync-folder"]) == (1, 3)


@linux
@pytest.mark.slow
def test_an_agent_of_bad_habits_does_no_harm(tmp_path):
    command = [sys.executable, HERE / "soak.py", "--scenarios=50", "--seed=11", "--folder", tmp_path / "soak"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def syncs_of_git(checkout, *words):
    """How often a git command, or one that calls git, has git wait for the disk."""
    trace = checkout.path.parent / "trace"
    trace.unlink(missing_ok=True)
    checkout.run(*words, check=0, GIT_TRACE2_EVENT=str(trace))
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    found = [e for e in events if "hardware-flush" in (e.get("key") or e.get("name") or "")]
    return sum(int(e.get("value") or e.get("count")) for e in found)


@pytest.mark.slow
def test_commits_and_refs_of_a_session_are_on_the_disk(session):
    if tuple(map(int, session.git("--version").split()[2].split(".")[:2])) < (2, 36):
        pytest.skip("this git knows no core.fsync")
    session.write_train("prepare.finish(1.4)", commit="")
    assert syncs_of_git(session, "git", "commit", "-q", "-m", "x", "train.py") == 4  # blob, tree, commit, ref
    session.script("run", check=0)
    assert syncs_of_git(session, "make", "log-result", "STATUS=discard", "DESC=x") == 1
    assert syncs_of_git(session, "make", "discard") == 1


def test_a_choice_of_core_fsync_is_respected(checkout):
    checkout.git("config", "core.fsync", "none")
    checkout.script("setup", TAG="t", check=0)
    assert checkout.git("config", "core.fsync") == "none"


# --- locks that a killed git leaves ----------------------------------------------------------------


LOCKS = ["refs/experiments/t/002.lock", pytest.param("index.lock", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_of_a_git_that_was_killed_is_in_nobody_s_way(session, name):
    (session.path / ".git" / name).touch()
    uncollected = subprocess.Popen(["git", "version"], cwd=session.path, stdout=subprocess.DEVNULL)  # ends, and stays
    done = session.script("run", AGAIN="1", check=0)
    uncollected.wait()
    assert "git that was killed left its lock" in done.stderr and name in done.stderr
    session.experiment("prepare.finish(1.6)", "discard")
    assert session.refs("t")["002"] == session.git("rev-parse", "HEAD")


@pytest.mark.slow
def test_a_lock_of_a_git_at_work_stays(session):
    """An editor that waits for a commit's message, say: the lock is its own, and is waited for."""
    editor = "touch begun; while [ ! -e done ]; do sleep 0.05; done; echo x >"
    work = subprocess.Popen(["git", "commit", "--allow-empty", "-q"], cwd=session.path, stdin=subprocess.DEVNULL,
                            env={**session.env, "GIT_EDITOR": f"sh -c '{editor}$1' -"})  # fmt: skip
    while not (session.path / "begun").exists():
        assert work.poll() is None
    held = session.path / ".git" / "index.lock"
    held.touch()
    done = session.script("run", AGAIN="1", check=1)
    assert "git is at work, or was cut off" in done.stderr and "index.lock" in done.stderr and held.exists()
    (session.path / "done").touch()
    work.wait()
