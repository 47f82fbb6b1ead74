"""Setup, verdict, discard: the branch, and what git keeps of an experiment."""

import json
import re
from pathlib import Path

import pytest

from scripts import settings


def test_setup_opens_a_session(checkout):
    (checkout.path / "results.tsv").write_text("an older table\n")
    done = checkout.make("setup", "TAG=nov24", "DATASET=tinystories", check=0)
    assert done.stdout.endswith("next     make prepare && make baseline\n")
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "autoresearch/nov24"
    assert 'DATASET = "tinystories"' in (checkout.path / "train.py").read_text()
    assert checkout.git("status", "--porcelain") == ""
    assert checkout.rows == []
    assert [p.read_text() for p in (checkout.path / "data").glob("results_2*.tsv")] == ["an older table\n"]
    assert checkout.refs("nov24")["start"] == checkout.git("rev-parse", "HEAD")


@pytest.mark.parametrize("tag", ["", "a/b", "x.lock", "$(touch x)"])
def test_setup_refuses_a_tag_that_names_no_branch(checkout, tag):
    done = checkout.script("setup", TAG=tag, check=1)
    assert done.stderr.startswith("error: TAG") and done.stderr.count("\n") == 1
    assert checkout.git("branch", "--format=%(refname:short)") == "main"


def test_setup_refuses_a_taken_tag_even_when_its_branch_is_gone(session):
    session.git("checkout", "-q", "main")
    assert "taken" in session.script("setup", TAG="t", check=1).stderr
    session.git("branch", "-q", "-D", "autoresearch/t")
    assert "taken" in session.script("setup", TAG="t", check=1).stderr
    assert len(session.rows) == 1


def test_setup_refuses_a_dirty_tree(checkout):
    for file in ("train.py", "Makefile"):
        with (checkout.path / file).open("a") as out:
            out.write("\n# changed\n")
    assert "train.py" in (told := checkout.script("setup", TAG="t", check=1).stderr) and "Makefile" in told
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main"


def test_setup_that_fails_half_way_is_completed_by_the_same_command(checkout):
    hook = checkout.path / ".git" / "hooks" / "reference-transaction"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    done = checkout.script("setup", TAG="t", DATASET="tinystories", check=1)
    assert done.stderr.startswith("error: git could not write .git/refs/experiments/t/start") and "again" in done.stderr
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main"
    hook.unlink()
    for _ in range(2):  # typed twice, too
        checkout.script("setup", TAG="t", DATASET="tinystories", check=0)
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "autoresearch/t"
    assert checkout.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_setup_asks_for_an_author_before_the_first_experiment_does(checkout):
    for name in [name for name in checkout.env if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER"))]:
        del checkout.env[name]
    checkout.git("config", "user.useConfigOnly", "true")  # as on a machine with no name of its own
    done = checkout.script("setup", TAG="t", check=1)
    assert done.stderr.count("\n") == 1
    checkout.run("sh", "-c", done.stderr.split("commits: ")[1], check=0)
    checkout.script("setup", TAG="t", check=0)


def test_a_first_row_may_be_one_that_is_put_back(checkout):
    checkout.make("setup", "TAG=t", check=0)
    checkout.experiment("prepare.finish(1.4)", "discard")
    assert "next: make discard" in checkout.make("brief", check=0).stdout
    checkout.write_train("prepare.finish(1.3)")
    assert "next: make run" in checkout.make("brief", check=0).stdout


def test_files_that_are_given_count_from_where_they_were_typed(monkeypatch):
    given = {"HOSTS": "hosts.json", "FILES": "~/texts", "COLUMN": "body.json"}
    for name in settings.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    found = {"HOSTS": str(Path.cwd() / "hosts.json"), "FILES": str(Path.home() / "texts"), "COLUMN": "body.json"}
    assert settings.typed() == found


def test_without_a_session(checkout):
    assert "make setup" in checkout.script("discard", check=1).stderr
    assert "make run" in checkout.script("verdict", check=1).stderr
    assert "make run" in checkout.script("log-result", STATUS="keep", DESC="x", check=1).stderr
    assert "make baseline" in checkout.script("results", check=0).stdout
    assert "unknown dataset 'x'; known: stdlib" in checkout.script("setup", TAG="t", DATASET="x", check=1).stderr


def test_off_its_branch_a_session_says_so(session):
    session.git("checkout", "-q", "--detach")
    for verb in ("run", "log-result", "verdict", "discard"):
        assert "git checkout autoresearch/t" in session.script(verb, check=1).stderr
    session.git("checkout", "-q", "main")
    assert "no run yet in 'main'" in session.script("verdict", check=1).stderr


# --- verdict (the rule itself: tests/test_verdict.py) --------------------------------------------------


def test_neither_the_reference_run_again_nor_another_seed_is_an_idea(session):
    """Whatever comes back, it measures noise and can become no row."""
    body = "def seed(n): pass\nseed({})\nimport os\nprepare.finish(float(os.environ.get('BPB', '1.4')))"
    session.experiment(body.format(42), "keep")
    assert "verdict  again" in session.script("run", AGAIN="1", BPB="1.3", check=0).stdout
    session.write_train(body.format(137) + "  # luck")
    assert "verdict  again: only the seed" in session.script("run", BPB="1.2", check=0).stdout
    for status in ("keep", "discard"):
        assert "add no row" in session.script("log-result", STATUS=status, DESC="luck", check=1).stderr
    assert len(session.rows) == 2


def test_the_reference_is_run_again_without_touching_branch_or_tree(session):
    session.write_train("prepare.finish(1.4)", commit="the candidate")
    head, text = session.git("rev-parse", "HEAD"), (session.path / "train.py").read_text()
    done = session.make("run", "REFERENCE=1", "N=3", check=0)
    assert done.stdout.count("reference") == 2 and "by 2 repeats" in done.stdout
    assert "nothing to do" in session.make("run", "REFERENCE=1", "N=3", check=0).stdout
    assert (session.git("rev-parse", "HEAD"), (session.path / "train.py").read_text()) == (head, text)
    assert session.git("worktree", "list").count("\n") == 0 and len(session.rows) == 1
    seeds = [event["seed"] for event in session.events if event["event"] == "begin"]
    assert seeds == [42, 43, 44]


@pytest.mark.slow
def test_a_pair_runs_both_with_one_seed_and_turns_round(session):
    session.experiment("prepare.finish(1.4)")
    session.script("run", PAIR="1", N="2", check=0)
    begun = [event for event in session.events if event["event"] == "begin" and event["pair"]]
    assert [event["role"] for event in begun] == ["reference", "candidate", "candidate", "reference"]
    assert [event["seed"] for event in begun] == [43, 43, 44, 44]
    assert begun[0]["pair"] == begun[1]["pair"] != begun[2]["pair"] == begun[3]["pair"]


@pytest.mark.slow
def test_what_is_kept_keeps_its_weights_whichever_run_was_the_last(session):
    """After the reference's own run data/last_run.json is of another program than the weights beside it."""

    def blob_of_the_best():
        weights = (session.path / "data" / "best.safetensors").read_bytes()
        return json.loads(weights[8:])["__metadata__"]["train_blob"]

    session.experiment("prepare.finish(1.4)")
    told = session.make("run", "REFERENCE=1", check=0).stdout  # made for the candidate that waits: so its verdict
    assert "\nverdict  keep" in told and "1 run against 2" in told
    session.make("log-result", "STATUS=keep", "DESC=better", check=0)
    kept = session.git("rev-parse", "HEAD:train.py")
    assert blob_of_the_best() == kept
    session.experiment("prepare.finish(1.6)", "discard")
    assert blob_of_the_best() == kept


@pytest.mark.slow
def test_each_session_has_its_own_table_and_reference(session):
    session.experiment("prepare.finish(1.4)", "keep", "kept in t")
    kept = session.git("rev-parse", "HEAD")
    session.git("checkout", "-q", "main")
    session.make("setup", "TAG=other", check=0)
    session.make("baseline", "AGAIN=1", check=0)
    assert [row[5] for row in session.rows] == ["baseline"]
    weights = (session.path / "data" / "sessions" / "t" / "best.safetensors").read_bytes()
    assert json.loads(weights[8:])["__metadata__"]["train_blob"] == session.git("rev-parse", f"{kept}:train.py")
    session.git("checkout", "-q", "autoresearch/t")
    assert "kept in t" in session.make("results", check=0).stdout
    done = session.experiment("prepare.finish(1.45)")
    assert re.search(rf"against  {kept[:7]} .*: kept in t", done.stdout) and "verdict  discard" in done.stdout
    session.make("log-result", "STATUS=discard", "DESC=x", check=0)
    session.make("discard", check=0)
    assert session.git("rev-parse", "HEAD") == kept
    assert [row[5] for row in session.rows] == ["baseline", "kept in t", "x"]


def test_verdict_is_against_the_last_kept_run(session):
    session.experiment("prepare.finish(1.4)", "keep")
    session.experiment("prepare.finish(1.0)", "discard")
    session.experiment("prepare.finish(1.2)")
    done = session.script("verdict", check=0)
    assert "gain +0.2000" in done.stdout
    session.make("log-result", "STATUS=keep", "DESC=x", check=0)
    done = session.script("verdict", check=0)  # asked again, it says the same
    assert "gain +0.2000" in done.stdout and "logged, as row 4" in done.stdout


@pytest.mark.slow
def test_only_like_is_compared_with_like(session):
    change = "dataset='tinystories', device={'name': 'other', 'memory_gb': 1, 'mlx': '0'}"
    told = session.experiment(f"prepare.finish(1.4, {change})").stdout
    told += session.script("verdict", check=0).stdout
    told += session.script("log-result", STATUS="keep", DESC="x", check=1).stderr
    assert [told.count(x) for x in ("dataset is tinystories, was stdlib", "device.name is other, was abacus")] == [3, 3]
    assert len(session.rows) == 1
    session.script("discard", check=0)  # what can never be a row is in nobody's way


# --- discard ---------------------------------------------------------------------------------------


def test_discard_puts_back_train_and_the_branch_and_nothing_else(session):
    base = session.git("rev-parse", "HEAD")
    (session.path / "notes.txt").write_text("mine")
    session.experiment("prepare.finish(1.6)", "discard")
    tried = session.git("rev-parse", "HEAD")
    before = {p: p.read_bytes() for p in session.path.rglob("*") if p.is_file() and ".git" not in p.parts}
    session.make("discard", check=0)
    after = {p: p.read_bytes() for p in before if p.exists()}
    assert [p.name for p in before if before[p] != after.get(p)] == ["train.py"]
    assert session.git("rev-parse", "HEAD") == base
    assert session.git("status", "--porcelain") == "?? notes.txt"
    assert session.refs("t")["002"] == tried
    session.make("discard", check=0)  # again: nothing to do


def test_discard_refuses_what_would_lose_work(session):
    session.experiment("prepare.finish(1.6)")
    assert "make log-result STATUS=discard " in session.script("discard", check=1).stderr
    session.make("log-result", "STATUS=discard", "DESC=x", check=0)
    session.write_train("prepare.finish(1.7)  # not committed", commit="")
    done = session.script("discard", check=1)
    assert "not committed" in done.stderr and "1.7" in (session.path / "train.py").read_text()
    session.git("checkout", "HEAD", "--", "train.py")

    (session.path / "notes.txt").write_text("mine")
    session.git("add", "notes.txt")
    session.git("commit", "-q", "-m", "notes")
    head = session.git("rev-parse", "HEAD")
    done = session.script("discard", check=1)
    assert "notes.txt" in done.stderr
    assert session.git("rev-parse", "HEAD") == head
    mend = done.stderr.split("Put back first: ")[1].strip()
    session.run("sh", "-c", mend, check=0)
    session.script("discard", check=0)
    assert session.git("cat-file", "-t", head) == "commit"
    assert any(name.startswith("dropped-") for name in session.refs("t"))


def test_a_commit_that_never_ran_stays_reachable_and_where_nothing_was_kept_the_start_is_back(checkout):
    checkout.make("setup", "TAG=t", check=0)
    base = checkout.git("rev-parse", "HEAD")
    checkout.write_train("prepare.finish(1.2)  # thought better of it")
    head = checkout.git("rev-parse", "HEAD")
    checkout.make("discard", check=0)
    assert checkout.git("rev-parse", "HEAD") == base
    assert head in checkout.refs("t").values()


def test_what_setup_was_given_holds_for_every_later_command(checkout):
    told = checkout.make("setup", "TAG=t", "TUNE=0", "BUDGET=900", "FILES=texts", check=0).stdout
    assert told.endswith("next     make baseline\n")
    checkout.make("baseline", check=0)
    show = "import os\nprint(os.environ['TIMEOUT'], 'AUTORESEARCH_FILES' in os.environ)"
    checkout.write_train(f"{show}\nprepare.finish(1.1)")
    checkout.make("run", "BUDGET=900.0", check=0)
    # what is prepared does not need its source
    assert (checkout.path / "run.log").read_text().startswith("1200 False\n")
    record = json.loads((checkout.path / "data" / "last_run.json").read_text())
    assert record["budget"] == 900 and "not comparable" not in checkout.script("verdict", check=0).stdout


@pytest.mark.parametrize(
    ("verb", "given"), [("run", "BUDGET=3"), ("holdout", "HOSTS=a,b"), ("tune", "BUDGET=ten"), ("run", "NPROC=0")]
)
def test_another_setting_than_the_sessions_is_refused(session, verb, given):
    events = session.events
    done = session.script(verb, check=1, **dict([given.split("=")]))
    assert done.stderr.startswith("error: ") and given in done.stderr and done.stderr.count("\n") == 1
    assert session.events == events


def test_settings_that_cannot_be_are_refused_before_anything_is_made(checkout):
    done = checkout.script("setup", check=1, TAG="t", BUDGET="60", TIMEOUT="10")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert checkout.git("for-each-ref", "--format=%(refname)") == "refs/heads/main"


def test_a_session_of_an_earlier_form_is_shown_and_does_not_go_on(session):
    (session.path / "data" / "sessions" / "t" / "settings.json").unlink()
    told = session.script("run", AGAIN="1", check=1).stderr
    assert told.startswith("error: 't' has no settings") and told.count("\n") == 1 and "make report shows it" in told
    session.make("report", check=0)


@pytest.mark.slow
def test_a_repeat_of_what_was_discarded_is_put_back_without_another_row(session):
    """log-result sends it to discard, and discard does not send it back."""
    session.experiment("prepare.finish(1.6)", "discard")
    text = (session.path / "train.py").read_text()
    session.make("discard", check=0)
    kept = session.git("rev-parse", "HEAD")
    (session.path / "train.py").write_text(text)
    session.git("commit", "-q", "-am", "tried once more")
    session.script("run", AGAIN="1", check=0)
    done = session.make("log-result", "STATUS=discard", "DESC=the same", check=2)
    assert "make discard" in done.stderr
    session.make("discard", check=0)
    assert session.git("rev-parse", "HEAD") == kept and len(session.rows) == 2


def test_a_kept_commit_that_was_rewritten_stays_the_reference_and_on_the_branch(session):
    session.experiment("prepare.finish(1.4)", "keep", desc="kept")
    session.git("commit", "-q", "--amend", "-m", "in other words", GIT_COMMITTER_DATE="2020-01-01T00:00:00Z")
    head = session.git("rev-parse", "HEAD")
    assert head[:7] != session.rows[-1][0]
    told = session.experiment("prepare.finish(1.45)", "discard").stdout
    assert re.search(rf"against  {head[:7]} .*: kept", told) and "verdict  discard" in told
    assert f"reference {head[:7]}" in session.make("run", "PAIR=1", check=0).stdout  # it can be run again
    session.make("discard", check=0)
    assert session.git("rev-parse", "HEAD") == head


@pytest.mark.slow
def test_a_kept_program_that_is_on_the_branch_no_more_is_named(session):
    session.experiment("prepare.finish(1.4)", "keep")
    kept = session.git("rev-parse", "HEAD")
    session.write_train("prepare.finish(1.3)  # more")
    session.git("reset", "-q", "--soft", "refs/experiments/t/start")
    session.git("commit", "-q", "-m", "squashed")
    assert "row 2, kept, is not on this branch" in session.script("run", check=0).stdout
    session.make("log-result", "STATUS=discard", "DESC=x", check=0)
    told = session.script("discard", check=0).stderr
    session.run("sh", "-c", told.split("taken back. ")[1].replace("goes on from there", ""), check=0)
    assert session.git("rev-parse", "HEAD") == kept


def test_what_was_put_back_is_not_kept(session):
    session.experiment("prepare.finish(1.4)")
    tried = session.git("rev-parse", "HEAD")
    session.git("reset", "-q", "--hard", "HEAD^")
    done = session.script("log-result", STATUS="keep", DESC="x", check=1)
    assert f"git checkout {tried[:7]} -- train.py" in done.stderr and done.stderr.count("\n") == 1
    session.git("merge", "-q", "--ff-only", tried)
    session.git("revert", "--no-edit", "HEAD")
    assert done.stderr == session.script("log-result", STATUS="keep", DESC="x", check=1).stderr
    session.run("sh", "-c", done.stderr.split("kept: ")[1].replace("brings it back", ""), check=0)
    session.script("log-result", STATUS="keep", DESC="x", check=0)


def test_a_verdict_that_asks_for_a_run_is_short_and_hides_no_figure_later(session):
    told = session.experiment("prepare.finish(1.499)").stdout.splitlines()
    assert [line.split()[0] for line in told] == ["valid", "verdict", "next"] and "93 % is asked" in told[1]
    told = session.make("run", "REFERENCE=1", "N=3", check=0).stdout.split("reference ")[-1].splitlines()
    assert "val_bpb" not in told[0] and told[1].split()[0] in ("valid", "verdict")


def test_a_hook_of_gits_that_fails_stops_nothing(session):
    hook = session.path / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    session.experiment("prepare.finish(1.6)", "discard")
    session.script("discard", check=0)
    session.script("run", REFERENCE="1", check=0)
