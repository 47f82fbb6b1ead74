"""Setup, verdict, discard: the branch, and what git keeps of an experiment."""

import json

import pytest


def test_setup_opens_a_session(checkout):
    (checkout.path / "results.tsv").write_text("an older table\n")
    done = checkout.make("setup", "TAG=nov24", "DATASET=tinystories", check=0)
    assert "make prepare DATASET=tinystories" in done.stdout
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "autoresearch/nov24"
    assert 'DATASET = "tinystories"' in (checkout.path / "train.py").read_text()
    assert checkout.git("status", "--porcelain") == ""
    assert checkout.rows == []
    assert [p.read_text() for p in (checkout.path / "data").glob("results_2*.tsv")] == ["an older table\n"]
    assert checkout.refs("nov24")["start"] == checkout.git("rev-parse", "HEAD")


def test_setup_without_a_dataset_takes_the_one_of_train(checkout):
    before = checkout.git("rev-parse", "HEAD")
    done = checkout.make("setup", "TAG=nov24", check=0)
    assert "not prepared" not in done.stdout and "stdlib" in done.stdout
    assert checkout.git("rev-parse", "HEAD") == before


@pytest.mark.parametrize("tag", ["", "two words", "a/b", "-x", "a..b", ".hidden", "x.lock", "$(touch x)"])
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


@pytest.mark.parametrize("file", ["train.py", "prepare.py", "Makefile"])
def test_setup_refuses_a_dirty_tree(checkout, file):
    with (checkout.path / file).open("a") as out:
        out.write("\n# changed\n")
    done = checkout.script("setup", TAG="t", check=1)
    assert file in done.stderr
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main"


def test_setup_that_fails_half_way_leaves_nothing_behind(checkout):
    hook = checkout.path / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    checkout.script("setup", TAG="t", DATASET="tinystories", check=1)
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main"
    assert checkout.git("status", "--porcelain", "--untracked-files=all") == ""
    hook.unlink()
    checkout.script("setup", TAG="t", DATASET="tinystories", check=0)


def test_setup_asks_for_an_author_before_the_first_experiment_does(checkout):
    for name in [name for name in checkout.env if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER"))]:
        del checkout.env[name]
    checkout.git("config", "user.useConfigOnly", "true")  # as on a machine with no name of its own
    done = checkout.script("setup", TAG="t", check=1)
    assert done.stderr.count("\n") == 1
    checkout.run("sh", "-c", done.stderr.split("commits: ")[1], check=0)
    checkout.script("setup", TAG="t", check=0)


def test_setup_names_the_known_datasets(checkout):
    done = checkout.script("setup", TAG="t", DATASET="nothing", check=1)
    assert "unknown dataset 'nothing'; known: stdlib" in done.stderr
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "main"


def test_without_a_session(checkout):
    assert "make setup" in checkout.script("discard", check=1).stderr
    assert "make run" in checkout.script("verdict", check=1).stderr
    assert "make run" in checkout.script("log-result", STATUS="keep", DESC="x", check=1).stderr
    assert "make baseline" in checkout.script("results", check=0).stdout


def test_session_in_a_worktree_and_from_a_detached_head(checkout, tmp_path):
    checkout.git("checkout", "-q", "--detach")
    other = tmp_path / "zweiter Baum"
    checkout.git("worktree", "add", "-q", str(other), "main")
    checkout.path, main = other, checkout.path
    checkout.make("setup", "TAG=t", check=0)
    checkout.make("baseline", check=0)
    checkout.experiment("prepare.finish(1.6)", "discard")
    checkout.make("discard", check=0)
    assert checkout.git("rev-parse", "HEAD") == checkout.refs("t")["001"]
    checkout.path = main
    checkout.make("setup", "TAG=u", check=0)


def test_off_its_branch_a_session_says_so(session):
    session.git("checkout", "-q", "--detach")
    for verb in ("run", "log-result", "verdict", "discard"):
        assert "git checkout autoresearch/t" in session.script(verb, check=1).stderr
    session.git("checkout", "-q", "main")
    assert "newest run is of 't'" in session.script("verdict", check=1).stderr


# --- verdict: the table of the rule for keeping, at its edges --------------------------------------

TABLE = [  # val_bpb and tokens a second against 1.500000 and 100000
    ("keep", 1.499999, 85000, "improved, throughput fell by at most 15 %"),
    ("keep", 1.4, 200000, "improved, throughput fell by at most 15 %"),
    ("discard", 1.499999, 84999, "improved by less than 0.005"),
    ("discard", 1.495001, 84999, "improved by less than 0.005"),
    ("judge", 1.495, 84999, "improved by 0.005 or more"),
    ("judge", 1.2, 1, "improved by 0.005 or more"),
    ("keep", 1.5, 110001, "within 0.001"),
    ("keep", 1.501, 110001, "within 0.001"),
    ("discard", 1.501, 110000, "worse"),
    ("discard", 1.501001, 110001, "worse"),
    ("keep", 1.501001, 125001, "worse by less than 0.003"),
    ("keep", 1.502999, 125001, "worse by less than 0.003"),
    ("discard", 1.502999, 125000, "worse"),
    ("discard", 1.503, 999999, "worse"),
    ("discard", 1.5, 100000, "no better"),
    ("discard", 1.5000001, 100000, "no better"),  # beyond the sixth decimal nothing counts
    ("discard", 1.4999999, 100000, "no better"),
]


def test_verdict_is_the_table(checkout):
    """One make for the wiring, then every edge through the function that the script calls."""
    checkout.make("setup", "TAG=t", check=0)
    checkout.write_train("prepare.finish(1.5, 100000)")
    checkout.make("baseline", check=0)
    checkout.experiment("prepare.finish(1.499999, 84999)")
    done = checkout.script("verdict", check=0)
    assert done.stdout.startswith("discard\n") and "improved by less than 0.005" in done.stdout
    assert "-0.000001" in done.stdout and "-15.0 %" in done.stdout
    code = (
        "import json, sys; from types import SimpleNamespace as S\n"
        "sys.path.insert(0, 'scripts'); import verdict, records\n"
        "def f(bpb, rate): return records.figures({'result': {'val_bpb': bpb}, 'training': {'avg_tok_sec': rate}})\n"
        "print(json.dumps([verdict.judge(f(b, r), f(1.5, 100000)) for b, r in json.loads(sys.argv[1])]))"
    )
    python = checkout.env["PYTHON"]
    judged = checkout.run(python, "-c", code, json.dumps([row[1:3] for row in TABLE]), check=0).stdout
    for (expected, bpb, rate, rule), (verdict, reason) in zip(TABLE, json.loads(judged), strict=True):
        assert (verdict, rule in reason) == (expected, True), (bpb, rate, verdict, reason)


def test_marginal_win_is_run_again_and_then_the_mean_decides(session):
    done = session.experiment("prepare.finish(1.4996, stderr=0.01)")
    assert session.script("verdict", check=0).stdout.startswith("rerun\n")
    assert "next     make run AGAIN=1" in done.stdout
    session.make("log-result", "STATUS=discard", "DESC=x", check=0)
    # the same train.py, another outcome: on the mean it is worse
    (session.path / "outcome").write_text("1.4996")
    session.experiment("prepare.finish(float(open('outcome').read()), stderr=0.01)")
    (session.path / "outcome").write_text("1.5010")
    session.script("run", AGAIN="1", check=0)
    done = session.script("verdict", check=0)
    assert done.stdout.startswith("discard\n") and "mean of 2 runs" in done.stdout and "1.500300" in done.stdout


def test_verdict_is_against_the_last_kept_run(session):
    session.experiment("prepare.finish(1.4)", "keep")
    session.experiment("prepare.finish(1.3)", "discard")
    session.experiment("prepare.finish(1.35)")
    done = session.script("verdict", check=0)
    assert done.stdout.startswith("keep\n") and "-0.050000" in done.stdout
    session.make("log-result", "STATUS=keep", "DESC=x", check=0)
    done = session.script("verdict", check=0)  # asked again, it says the same
    assert "-0.050000" in done.stdout and "logged, as row 4" in done.stdout


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("dataset='tinystories'", "dataset is tinystories, was stdlib"),
        ("token_cache='other'", "token_cache is other"),
        ("budget=30.0", "budget is 30.0, was 300.0"),
        ("harness='other'", "harness is other"),
        ("device={'name': 'other', 'memory_gb': 1, 'mlx': '0'}", "device.name is other, was abacus"),
    ],
)
def test_only_like_is_compared_with_like(session, change, named):
    done = session.experiment(f"prepare.finish(1.4, {change})")
    assert named in done.stdout
    assert named in session.script("verdict", check=1).stderr
    assert named in session.script("log-result", STATUS="keep", DESC="x", check=1).stderr
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


def test_discard_goes_to_the_last_kept_commit(session):
    session.experiment("prepare.finish(1.4)", "keep")
    kept = session.git("rev-parse", "HEAD")
    session.experiment("prepare.finish(1.45)", "discard")
    session.make("discard", check=0)
    assert session.git("rev-parse", "HEAD") == kept


def test_discard_refuses_what_would_lose_work(session):
    session.experiment("prepare.finish(1.6)")
    assert "not logged yet" in session.script("discard", check=1).stderr
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


def test_a_commit_that_never_ran_stays_reachable(session):
    base = session.git("rev-parse", "HEAD")
    session.write_train("prepare.finish(1.2)  # thought better of it")
    head = session.git("rev-parse", "HEAD")
    session.make("discard", check=0)
    assert session.git("rev-parse", "HEAD") == base
    assert head in session.refs("t").values()


def test_a_short_try_is_put_back_without_a_row(session):
    base = session.git("rev-parse", "HEAD")
    session.write_train("prepare.finish(1.9)")
    done = session.script("run", BUDGET="3", check=0)
    assert "none: not comparable" in done.stdout and "next     make discard, or make run BUDGET=300" in done.stdout
    head = session.git("rev-parse", "HEAD")
    session.script("discard", check=0)
    assert session.git("rev-parse", "HEAD") == base and head in session.refs("t").values()


@pytest.mark.parametrize(("body", "word"), [("prepare.finish(1.9)", "discard"), ("raise SystemExit(1)", "crash")])
def test_discard_says_how_to_log_what_is_not_logged(session, body, word):
    session.experiment(body)
    assert f"make log-result STATUS={word} " in session.script("discard", check=1).stderr
    session.script("log-result", STATUS=word, DESC="x", check=0)
    session.script("discard", check=0)


def test_discard_before_anything_was_kept_goes_to_the_start(checkout):
    checkout.make("setup", "TAG=t", check=0)
    start = checkout.git("rev-parse", "HEAD")
    checkout.experiment("raise SystemExit(1)", "crash")
    checkout.make("discard", check=0)
    assert checkout.git("rev-parse", "HEAD") == start
