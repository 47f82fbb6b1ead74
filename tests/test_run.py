"""One run, whatever train.py does: how it ends, what the agent reads, what is left behind."""

import errno
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import ROOT, sampled

from harness.processes import is_alive as alive
from scripts.run import experiment, lock
from scripts.session import Refused
from scripts.show import summary

HANG = "import time\nwhile True: time.sleep(0.05)"


def wait_for(condition, what, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def started(checkout, *words, **options):
    """run.sh in the background, with a train.py that wrote its pids into `pids`."""
    command = words or ("scripts/run.sh",)
    process = subprocess.Popen(command, cwd=checkout.path, env=checkout.env, **options)
    wait_for(lambda: (checkout.path / "pids").exists(), "train.py starts")
    return process, [int(pid) for pid in (checkout.path / "pids").read_text().split()]


def on_a_terminal(checkout, *words):
    """A command in the foreground of a terminal of its own, as in a window; and that terminal's other side."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        words,
        cwd=checkout.path,
        env=checkout.env,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        preexec_fn=lambda: (fcntl.ioctl(0, termios.TIOCSCTTY, 0), signal.signal(signal.SIGINT, signal.SIG_DFL)),
        start_new_session=True,
    )
    os.close(inside)
    return process, terminal


FAMILY = f"""
import os, subprocess, sys
sleeper = [sys.executable, '-c', 'import time; time.sleep(99)']
inner = [subprocess.Popen(sleeper, start_new_session=new) for new in (False, True)]
open('pids.new', 'w').write(' '.join(str(p) for p in [os.getpid()] + [i.pid for i in inner]))
os.replace('pids.new', 'pids')
{HANG}
"""  # train.py, a child in its group, and one that left the group


def test_a_valid_run(session):
    done = session.experiment("print('clutter ' * 99)\nprepare.finish(1.4, 1100)")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 15 and done.stderr == "" and "clutter" not in done.stdout
    for line in (
        "peak_memory_mb        1536.0",
        "avg_tok_sec             1100  +10.0 %",
        "total_steps               10",
        "eval_seconds             0.5",
        "verdict  keep: val_bpb improved, and throughput did not fall by more than 15 %",
    ):
        assert f"\n{line}" in done.stdout, done.stdout
    assert re.search(r"(?m)^val_bpb             1\.400000  gain \+0\.1000 ± 0\.\d{4}, >99\.9 %$", done.stdout)
    assert "val_bpb 1.500000, 1 run against 1: baseline" in done.stdout and len(done.stdout) < 600
    assert done.stdout.endswith('next     make log-result STATUS=keep DESC="…"\n')
    assert "clutter" in (session.path / "run.log").read_text()
    state = session.attempt
    assert (state["status"], state["commit"]) == ("valid", session.git("rev-parse", "HEAD"))


ENDS = {  # what train.py does: the exit code, the status, a line of the summary
    "raise ValueError('a bad idea')": (2, "crash", "ValueError: a bad idea"),
    "x = = 1": (2, "crash", "SyntaxError"),
    "e = ValueError('it'); e.add_note('(a note)'); raise e": (2, "crash", "ValueError: it (a note)"),
    "raise SystemExit('error: the loss is nan at step 3')": (2, "crash", "the loss is nan at step 3"),
    "import os; os.kill(os.getpid(), 11)": (2, "crash", "signal 11"),
    "import os; os._exit(0)": (3, "stale", "of another run"),
    "import os; os.remove('data/last_run.json')": (3, "stale", "missing"),
    "open('data/last_run.json', 'w').write('{\"run_id')": (3, "stale", "missing or damaged"),
    "prepare.finish(1.4, attempt='another')": (3, "stale", "of another run"),
    "prepare.finish(0.1, seal='made by hand')": (3, "stale", "not written by the harness"),
    "prepare.finish(1.4, train_blob='x')": (3, "stale", "train.py was changed"),
    "prepare.finish(1.4); raise SystemExit(1)": (2, "crash", "exit 1"),
    "prepare.finish(1.4, status='invalid', reason='causality: a leak.')": (2, "invalid", "causality: a leak."),
    "prepare.START += 6; prepare.finish(1.4)": (2, "invalid", "clock stood still"),  # 5 s and 2 % are forgiven
}


@pytest.mark.parametrize("body", sampled(ENDS), ids=lambda body: body[:40])
def test_every_other_end_is_told_apart(session, body):
    code, status, shown = ENDS[body]
    done = session.experiment(body)
    assert done.returncode == code, done.stdout + done.stderr
    assert shown in done.stdout and f"{status} (exit {code})" in done.stdout
    assert len(done.stdout.splitlines()) <= 15 and done.stderr == ""
    assert session.attempt["status"] == status
    # it is no result: it can be logged as a crash, and as nothing else
    assert "crash" in session.script("log-result", STATUS="keep", DESC="x", check=1).stderr
    session.script("log-result", STATUS="crash", DESC="x", check=0)
    assert session.rows[-1][1:5] == ["0.000000", "0.0", "0", "crash"]


def test_a_run_that_never_ends_is_killed_with_its_children(session):
    session.settings(BUDGET="0.5", TIMEOUT="3")
    session.write_train("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)" + FAMILY)
    done = session.script("run", check=124)
    assert "timeout (exit 124)" in done.stdout and "TIMEOUT=3 s" in done.stdout
    pids = [int(pid) for pid in (session.path / "pids").read_text().split()]
    assert len(pids) == 3 and not any(map(alive, pids))


def test_a_plain_kill_of_make_ends_a_run_that_was_started_in_the_background(session):
    """As a script's `&` starts it under nohup: INT and HUP are ignored from the beginning, and a terminal may go."""

    def ignore():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    session.write_train(FAMILY)
    process, pids = started(session, "make", "run", preexec_fn=ignore, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.kill(session.attempt["launcher"], signal.SIGHUP)
    process.terminate()
    said = process.communicate(timeout=30)[0]
    assert b"stopped by SIGTERM" in said
    wait_for(lambda: not any(map(alive, pids)), "children gone")


@pytest.mark.slow
def test_a_watcher_that_was_stopped_alone_accuses_nobody(session):
    """Ctrl-Z, then fg: the run went on meanwhile, and what passed unseen is no time that it has to account for."""
    session.write_train("import os, time\nopen('pids', 'w').write('1')\n"
                        "while not os.path.exists('go'): time.sleep(0.05)\nprepare.finish(1.4)")  # fmt: skip
    first, _ = started(session)
    os.kill(first.pid, signal.SIGSTOP)
    (session.path / "go").touch()
    time.sleep(experiment.START + 1.5)
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(30) == 0


def test_ctrl_c_on_a_terminal(session):
    """A person's Ctrl-C goes to everything in the foreground: make and experiment.sh, and the run ends."""
    session.write_train("import os\nprint('shown:', os.environ['AUTORESEARCH_TERMINAL'], flush=True)" + FAMILY)
    process, terminal = on_a_terminal(session, "make", "run")
    wait_for(lambda: (session.path / "pids").exists(), "train.py starts")
    before = subprocess.run(["stty", "-a"], stdin=terminal, capture_output=True, text=True).stdout
    os.write(terminal, b"\x03")
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
            after = subprocess.run(["stty", "-a"], stdin=terminal, capture_output=True, text=True).stdout
    except OSError:
        pass  # the far side is closed
    process.wait(timeout=30)
    assert b"shown: 1" in shown and b"interrupted" in shown, shown
    assert "shown: 1" in (session.path / "run.log").read_text()
    assert before == after
    wait_for(lambda: not any(alive(int(p)) for p in (session.path / "pids").read_text().split()), "children gone")
    assert session.attempt["status"] == "interrupted"


@pytest.mark.slow
def test_when_run_sh_is_killed_the_run_ends_and_counts_as_interrupted(session):
    session.write_train(FAMILY)
    process, pids = started(session)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, pids)), "children gone")
    assert "interrupted" in session.script("log-result", STATUS="keep", DESC="x", check=1).stderr


# --- one run at a time -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_is_refused_or_waits(session):
    session.write_train(
        "import os, time\nopen('pids', 'w').write(str(os.getpid()))\n"
        "while not os.path.exists('go'): time.sleep(0.05)\nprepare.finish(1.4)"
    )
    first, _ = started(session)
    lock_file = Path(session.env["AUTORESEARCH_LOCK"])
    lock_file.unlink()  # as a cleaner of /tmp does
    wait_for(lambda: lock_file.exists() and lock_file.read_text(), "it is made anew")
    done = session.script("run", AGAIN="1", check=1)
    assert f"taken by another run: pid {first.pid}, in {session.path}" in done.stderr
    for verb in ("log-result", "verdict", "discard"):
        said = session.script(verb, STATUS="keep", DESC="x", check=1).stderr
        assert "not ended" in said or "no result (running)" in said
    env = {**session.env, "WAIT": "1", "AGAIN": "1"}
    waiting = subprocess.Popen(["scripts/run.sh"], cwd=session.path, env=env, stdout=subprocess.PIPE, text=True)
    assert "waiting for another run: pid" in waiting.stdout.readline()
    (session.path / "go").touch()
    assert first.wait(timeout=30) == 0
    assert "valid" in waiting.communicate(timeout=30)[0] and waiting.returncode == 0


def test_a_file_system_without_locks_is_named(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(Refused, match="cannot be used .*: export AUTORESEARCH_LOCK=FILE"):
        lock.open_lock(tmp_path / "lock")


# --- refused before it starts ----------------------------------------------------------------------


def test_what_could_not_be_reproduced_is_not_run(session):
    session.write_train("prepare.finish(1.4)", commit="")
    done = session.script("run", check=1)
    assert "train.py is not committed" in done.stderr and "git commit" in done.stderr
    session.git("add", "train.py")
    assert "not committed" in session.script("run", check=1).stderr


@pytest.mark.parametrize(
    ("file", "committed"), [("prepare.py", True), pytest.param("scripts/lib.sh", False, marks=pytest.mark.slow)]
)
def test_what_could_not_be_compared_is_not_run(session, file, committed):
    with (session.path / file).open("a") as out:
        out.write("# a shortcut\n")
    if committed:
        session.git("commit", "-q", "-m", "shortcut", file)
    session.write_train("prepare.finish(1.4)")
    done = session.script("run", check=1)
    assert file in done.stderr and done.stderr.count("\n") == 1
    mend = done.stderr.split("Put back: ")[1].strip()
    session.run("sh", "-c", mend, check=0)  # the command it gives is the cure
    session.script("run", check=0)


def test_a_program_is_train_py_alone(checkout):
    (checkout.path / "mine.py").write_text("LOSS = 1.4")
    checkout.git("add", "mine.py")
    checkout.git("commit", "-q", "-m", "mine")
    checkout.make("setup", "TAG=t", check=0)
    said = "''' as we know\n  from plot to plot '''"
    checkout.write_train(f"{said}\nimport os.path, mine\nfrom os import path as utils\nprepare.finish(mine.LOSS)")
    for name in ("plot.py", "utils.py", "lib/deep/__init__.py"):  # nobody imports them
        (checkout.path / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.path / name).write_text("import mine")
    checkout.script("run", check=0)
    (checkout.path / "mine.py").write_text("LOSS = 1.3")
    for text, name in (("import mine", "mine.py"), ("from lib import deep", "lib"), ("  import plot", "plot.py")):
        checkout.write_train(f"if True:\n  {text}\nprepare.finish(1.1)")
        for _ in range(2):  # as it is, and committed
            done = checkout.script("run", check=1, AGAIN="1")
            assert f"imports {name}, which is new or was changed" in done.stderr and done.stderr.count("\n") == 1
            checkout.git("add", name)
            checkout.git("commit", "-q", "--allow-empty", "-m", "a helper")


@pytest.mark.parametrize("how", ["gone", "gone for good", "a folder"])
def test_a_train_that_cannot_be_read_is_said_and_comes_back(session, how):
    (session.path / "train.py").unlink()
    if how == "gone for good":
        session.git("commit", "-q", "-a", "-m", "gone")
    elif how == "a folder":
        (session.path / "train.py").mkdir()
    for verb in ("run", "check", "bench", "tune", "baseline"):
        done = session.script(verb, check=1)
        assert done.stderr.startswith("error: train.py is missing") and done.stderr.count("\n") == 1
    if how != "a folder":
        session.script("discard", check=0)
        assert (session.path / "train.py").exists() and session.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_results_that_git_tracks_are_refused_with_a_mend(session):
    session.git("add", "-f", "results.tsv", "data", "internal")
    session.git("commit", "-q", "-m", "all of it")
    session.write_train("prepare.finish(1.3)")
    done = session.script("run", check=1)
    session.run("sh", "-c", done.stderr.split("take them along: ")[1], check=0)  # the mend, as it was said
    session.write_train("prepare.finish(1.29)")
    session.script("run", check=0)


def test_nobody_who_listens_changes_no_exit_code(session):
    session.write_train("raise ValueError('no')")
    for words, code in ((["run"], 2), (["results"], 0), (["log-result"], 0), (["verdict"], 1)):
        environment = {**session.env, "STATUS": "crash", "DESC": "x"}
        done = subprocess.run([f"scripts/{words[0]}.sh"], cwd=session.path, env=environment, stdout=closed_pipe(),
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert done.returncode == code and "Exception" not in done.stderr, (words, done.stderr)
    assert len(session.rows) == 2


def closed_pipe():
    """The writing end of a pipe whose reader is gone."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def test_what_is_edited_between_two_runs_is_not_run_as_what_was_typed(session):
    session.write_train("prepare.finish(1.4)\nopen(__file__, 'a').write('# the next idea')")
    told = session.script("run", check=1, AGAIN="1", N="2").stderr
    assert "train.py was edited since this was typed" in told and told.count("\n") == 1
    assert session.attempt["status"] == "valid" and [e["event"] for e in session.events][-2:] == ["begin", "end"]


@pytest.mark.slow
def test_in_a_session_no_result_is_pushed_aside_before_it_is_logged(session):
    session.experiment("prepare.finish(1.4)")
    session.write_train("prepare.finish(1.3)")
    for given in ({}, {"AGAIN": "1"}, {"PAIR": "1"}):
        assert "not logged yet: make log-result" in session.script("run", check=1, **given).stderr
    session.script("log-result", STATUS="keep", DESC="x", check=0)
    session.experiment("raise SystemExit(1)")
    assert session.experiment("prepare.finish(1.2)").returncode == 0  # mending a crash goes on


def test_a_baseline_asks_for_nothing_and_is_made_once(checkout):
    checkout.make("setup", "TAG=t", check=0)
    done = checkout.make("baseline", check=0)
    assert "verdict" in done.stdout and "next" not in done.stdout
    checkout.write_train("prepare.finish(1.9)")
    done = checkout.script("baseline", check=1)
    assert "this session has its baseline: make run" in done.stderr and done.stderr.count("\n") == 1
    assert "there is a baseline already" in checkout.script("baseline", AGAIN="1", check=1).stderr  # what is worse, say
    assert len(checkout.rows) == 1


@pytest.mark.slow
def test_a_baseline_that_fails_is_to_be_made_again(checkout):
    """An idea that ran in its stead would be what all others are compared with."""
    checkout.write_train("raise SystemExit(1)")
    told = checkout.make("baseline", check=2).stdout
    assert "next     mend it and commit, then make baseline: ideas" in told
    assert "make baseline AGAIN=1" in checkout.make("baseline", check=2).stderr
    checkout.make("baseline", "AGAIN=1", check=2)
    checkout.write_train("prepare.finish(1.5)")
    checkout.make("baseline", check=0)
    assert [row[4:] for row in checkout.rows] == [["keep", "baseline"]]


@pytest.mark.slow
def test_the_same_train_is_not_run_twice_by_mistake(session):
    done = session.script("run", check=1)
    assert "was run before" in done.stderr and "1.500000" in done.stderr and "AGAIN=1" in done.stderr
    session.experiment("raise SystemExit(1)", "crash")
    session.write_train("prepare.finish(1.3)")
    session.script("run", check=0)
    session.make("run", "AGAIN=1", check=0)  # with the next seed
    refused = session.script("run", check=1).stderr
    assert "was just run" in refused and refused.count("\n") == 1
    session.script("log-result", STATUS="keep", DESC="x", check=0)
    session.write_train("raise SystemExit(1)", commit="that again")
    assert "crash" in session.script("run", check=1).stderr
    session.script("run", SEED="7", check=2)  # another seed is another experiment


def test_settings_reach_python(session):
    session.write_train("import os\nprint(*[os.environ['AUTORESEARCH_' + n] for n in ('BUDGET', 'SEED', 'FILES')])")
    session.settings(BUDGET="2.5")
    session.make("run", "SEED=0", "FILES=my $texts", check=2)
    assert f"2.5 0 {session.path}/my $texts" in (session.path / "run.log").read_text()


def test_another_dataset_than_trains_is_refused(session):
    assert "make setup" in session.script("run", DATASET="tinystories", check=1).stderr


def test_without_git_it_runs_and_is_logged(checkout):
    (checkout.path / ".git").rename(checkout.path / "git-is-gone")
    checkout.make("baseline", check=0)
    assert checkout.rows[0][0] == "0000000"


AGAIN = [("1-x", "reference", " PAIR=1"), (None, "reference", " REFERENCE=1"), (None, "candidate", "")]


@pytest.mark.parametrize(("pair", "role", "more"), AGAIN)
def test_what_stood_still_is_run_again_as_it_was(pair, role, more):
    attempt = {"status": "paused", "pair": pair, "role": role, "commit": None, "reason": "the machine slept"}
    assert summary.failure(attempt)[-1] == f"next     make run{more}"
    again = {**attempt, "seed": 43}  # another seed than a plain run takes, which would be refused
    assert summary.failure(again)[-1] == f"next     make run{more or ' AGAIN=1'}"
    assert summary.failure({**again, "role": "candidate", "pair": None}, True)[-1] == "next     make baseline AGAIN=1"
    failed = {**attempt, "status": "crash"}
    assert (summary.failure(failed)[-1] == f"next     make run{more}") == (role == "reference")


def test_where_nobody_listens_any_more_work_goes_on():
    tell = "from scripts.session import tell; tell('a'); tell('b')"
    reads, gone = os.pipe()
    os.close(reads)
    assert subprocess.run([sys.executable, "-c", tell], cwd=ROOT, stdout=gone).returncode == 0
