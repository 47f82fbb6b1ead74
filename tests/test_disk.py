"""A disk that is full or not to be written, memory that is short, few file handles, a clock that jumps."""

import json
import os
import re
import shutil
import subprocess
from datetime import datetime, timedelta

import pytest
from conftest import Checkout

from harness import record

VERBS = {  # what stands before, the verb, what it is given
    "run": {},
    "log-result": {"STATUS": "keep", "DESC": "warmer"},
    "discard": {},
    "setup": {"TAG": "u", "DATASET": "tinystories"},
}


@pytest.fixture
def small_disk(session, tmp_path):
    """The session on a file system of its own: (checkout, a function that leaves so many bytes free)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (it takes root on Linux)")
    shutil.copytree(session.path, disk / "repo", symlinks=True)
    checkout = Checkout(disk / "repo", {**session.env, "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"})

    def leave(size):
        (disk / "filler").unlink(missing_ok=True)
        if size is not None:
            facts = os.statvfs(disk)
            (disk / "filler").write_bytes(bytes(max(0, facts.f_bavail * facts.f_frsize - size)))

    yield checkout, leave
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_on_a_full_disk_each_verb_says_so_and_succeeds_once_there_is_room(small_disk, verb):
    checkout, leave = small_disk
    checkout.write_train("prepare.finish(1.4)")
    if verb in ("log-result", "discard"):
        checkout.script("run", check=0)
    if verb == "discard":
        checkout.script("log-result", STATUS="discard", DESC="x", check=0)
    if verb == "setup":
        checkout.git("checkout", "-q", "main")
    rows, failed = len(checkout.rows), 0
    for pages in (0, 1, 2, 3, 5, 8):
        leave(4096 * pages)
        done = checkout.script(verb, **VERBS[verb])
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode == 0:
            break
        said, failed = (done.stdout + done.stderr).lower(), failed + 1
        assert re.search("no space left|disk is full|full disk|diskspace|couldn't write", said), said
        assert "error: " in said or "paused" in said
        table = (checkout.path / "data" / "sessions" / "t" / "results.tsv").read_text()
        assert table.endswith("\n") and table.count("\n") in (1 + rows, 2 + rows)
    assert failed
    leave(None)
    if done.returncode:
        checkout.script(verb, check=0, **VERBS[verb])
    if verb == "run":
        checkout.script("log-result", STATUS="keep", DESC="warmer", check=0)
    if verb in ("run", "log-result"):
        assert len(checkout.rows) == rows + 1 and checkout.journal.count(". keep: warmer\n") == 1
    for path in (checkout.path / "data").glob("run_*.json"):
        assert record.seal_fits(json.loads(path.read_text()))
    assert checkout.git("status", "--porcelain") == ""


@pytest.fixture
def unprivileged(session):
    """The words before a command that make a mode count for root, too."""
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if not os.geteuid() else []
    if words and (not shutil.which(words[0]) or subprocess.run([*words, "true"], capture_output=True).returncode):
        pytest.skip("root may write everywhere, and setpriv is not here to take that from it")
    return words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", ".git/refs/experiments/t", ".git", "."])
def test_a_folder_that_is_not_to_be_written_is_named(session, unprivileged, name):
    def script(verb):
        return session.run(*unprivileged, f"scripts/{verb}.sh", STATUS="keep", DESC="warmer")

    session.write_train("prepare.finish(1.4)")
    (session.path / name).chmod(0o555)
    for verb in ("run", "log-result", "discard"):
        done = script(verb)
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode:
            break
    assert done.returncode == 1 and done.stderr.startswith(("error: ", "fatal: ")), done
    assert name in done.stderr or verb == "discard", done
    (session.path / name).chmod(0o755)
    if verb == "run":
        session.script("run", check=0, AGAIN="1" if "crash" in done.stdout else "")
    if len(session.rows) == 1:
        session.script("log-result", STATUS="keep", DESC="warmer", check=0)
    else:
        session.script("discard", check=0)
    assert [row[5] for row in session.rows] == ["baseline", "warmer"]


# --- memory, handles, time ----------------------------------------------------------------------------


NO_MEMORY = {
    "python": "x = bytearray(2**45)",
    "c++": "import sys; sys.stderr.write('terminate called after throwing an instance of std::bad_alloc\\n'); "
           "import os; os.abort()",
    "mlx": "raise RuntimeError('[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum "
           "allowed buffer size')",
    "from outside": "import os; os.kill(os.getpid(), 9)",
    "a limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); x = b'x' * 2**31",
}  # fmt: skip


def test_memory_that_is_short_is_named_with_what_helps(session):
    for body in NO_MEMORY.values():
        done = session.experiment(body)
        assert done.returncode == 2 and "memory" in done.stdout.lower() and "halve DEVICE_BATCH_SIZE" in done.stdout


def test_a_clock_that_jumps_back_hides_no_record(tmp_path, monkeypatch):
    class Clock(datetime):
        hours = 0

        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) + timedelta(hours=cls.hours)

    monkeypatch.setattr(record, "datetime", Clock)
    monkeypatch.setattr(record, "DATA", tmp_path)
    monkeypatch.setattr(record, "STORE", tmp_path)
    for number, Clock.hours in enumerate((0, -5, 9000, 0, -5, 0)):
        record.write("b" * 40, None, number=number, status="valid")
        assert json.loads((tmp_path / "last_run.json").read_text())["number"] == number
    assert sorted(run["number"] for run in record.archived()) == list(range(6))


def test_the_newest_run_s_record_may_be_deleted_and_its_folder_too(session):
    session.experiment("prepare.finish(1.4)")
    shutil.rmtree(session.path / "data")
    for verb, said in (("log-result", "make run"), ("verdict", "make run"), ("results", ""), ("run", "make setup")):
        done = session.script(verb, STATUS="keep", DESC="x")
        assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
    session.script("setup", TAG="u", check=0)
    session.script("run", check=0)
