"""What setup is given: names that could be taken for another, and folders that serve no session."""

import json
import shutil
import sys

import pytest


def refused(done):
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_tag_of_git_named_like_the_branch_changes_nothing(session):
    """`git symbolic-ref --short` would answer heads/autoresearch/t, and the session go unseen."""
    for name in ("autoresearch/t", "main", "heads/autoresearch/t"):
        session.git("tag", name)
    assert "keep" in session.experiment("prepare.finish(1.4)", "keep").stdout
    session.experiment("prepare.finish(1.6)", "discard")
    session.make("discard", check=0)
    assert {"001", "002", "003"} < set(session.refs("t"))
    (session.path / "prepare.py").write_text("# another\n")
    assert "differs from where the session began: prepare.py" in session.script("run", check=1).stderr
    session.git("checkout", "prepare.py")
    session.git("checkout", "-q", "main", "--")
    session.git("tag", "autoresearch/u")
    session.make("setup", "TAG=u", check=0)
    assert session.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/u"


def test_a_second_session_in_a_worktree_as_the_readme_has_it(session):
    """git gives the worktree a branch of the session's name."""
    session.git("worktree", "add", "-q", "../second")
    other = type(session)(session.path.parent / "second", session.env)
    other.make("setup", "TAG=second", check=0)
    other.make("baseline", "AGAIN=1", check=0)
    assert [row[5] for row in other.rows] == ["baseline"]
    other.git("checkout", "-q", "second")  # what is made there would be mixed with the session's
    said = refused(other.script("run", check=1, AGAIN="1"))
    assert "off the session's branch: git checkout autoresearch/second" in said
    session.git("worktree", "remove", "../second")  # with no --force, and it takes no results along
    assert "baseline" in (session.path / "data/sessions/second/results.tsv").read_text()
    session.git("checkout", "-q", "second")
    assert "git checkout autoresearch/second" in refused(session.script("run", check=1, AGAIN="1"))


def test_a_clone_whose_git_folder_is_elsewhere_has_all_its_results(checkout, tmp_path):
    """So has a submodule, and a worktree of either, of which `git worktree remove` takes nothing along."""
    clone = type(checkout)(tmp_path / "clone", checkout.env)
    checkout.git("clone", "-q", "--separate-git-dir", str(tmp_path / "git"), ".", str(clone.path))
    other = type(checkout)(tmp_path / "other", checkout.env)
    clone.git("worktree", "add", "-q", "--detach", str(other.path))
    for there, data in ((clone, clone.path / "data"), (other, tmp_path / "git" / "autoresearch" / "data")):
        there.make("setup", f"TAG={there.path.name}", check=0)
        there.make("baseline", check=0)
        assert len(list(data.glob("run_*.json"))) == 1
    other.write_train("prepare.finish(1.4)")
    other.script("run", check=0)
    text = json.dumps({"__metadata__": {"train_blob": other.git("hash-object", "train.py")}})
    weights = len(text).to_bytes(8, "little") + text.encode()
    (other.path / "data/last_run.safetensors").write_bytes(weights)
    other.script("log-result", check=0, STATUS="keep", DESC="x")
    clone.git("worktree", "remove", str(other.path))
    assert (data / "sessions/other/best.safetensors").read_bytes() == weights


def test_runs_outside_a_session_keep_their_name(checkout):
    checkout.make("baseline", check=0)
    for tag, said in (("main", "is taken: choose another one"), ("Detached", "is the name of other runs")):
        assert f"TAG={tag} {said}" in refused(checkout.script("setup", check=1, TAG=tag))
    checkout.script("setup", check=0, TAG="t")


def test_a_folder_that_serves_no_session_is_told_what_is_missing(checkout):
    shutil.rmtree(checkout.path / ".git")
    assert "needs git" in refused(checkout.script("setup", check=1, TAG="t"))
    checkout.git("init", "-q")
    assert "with a commit: git init && git add -A" in refused(checkout.script("setup", check=1, TAG="t"))


@pytest.mark.skipif(sys.platform != "linux", reason="MLX has one build for a Mac")
def test_an_environment_that_cannot_be_built_is_said_once(checkout):
    assert "it is cpu or cuda" in refused(checkout.script("setup", check=1, TAG="t", PYTHON="", BACKEND="metal"))


def test_what_a_hook_exports_does_not_lead_to_another_repository(session, tmp_path):
    session.run("git", "init", "-q", str(tmp_path / "other"), check=0)
    head = session.git("rev-parse", "HEAD")
    session.env.update(GIT_DIR=str(tmp_path / "other" / ".git"), GIT_WORK_TREE=str(tmp_path / "other"))
    assert f" {head[:7]} " in session.script("run", check=0, AGAIN="1").stdout


def test_what_a_shell_exports_does_not_stand_in_for_commands(session):
    """A version manager's `cd`, functions of the names of tools; and a switch that says 0 is none."""
    session.env.update({f"BASH_FUNC_{name}%%": "() { echo mine; return 1; }" for name in ("cd", "git", "sed")})
    session.script("run", check=0, AGAIN="1", REFERENCE="0")
