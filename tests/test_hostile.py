"""Text from anywhere: unexecuted and intact, or refused in one line. What reads it is fuzzed."""

import json
import os
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data_sources
from harness import corpus, files, project, record, token_cache

sys.path.insert(0, str(ROOT / "scripts"))
from scripts import session as sessions  # noqa: E402
from scripts.run import lock  # noqa: E402
from scripts.show import summary  # noqa: E402

HOSTILE = {
    "commands": "$(touch owned) `touch owned` ; touch owned | touch owned && touch owned #",
    "quotes": """it's "quoted" \\" \\' 100 %s %n {x} {} !! \\n""",
    "options": "--help -n -rf",
    "globs": "* ? [a-z] ~ ~root ../../x",
    "scripts": "größer 東京 🙂 ∂ ½",
    "markup": "<script>alert(1)</script> &amp; ## 9. keep: [x](y) | a | b |",
}
CONTROL = {
    "newlines": ("a\nb\r\nc\x0bd\u2028e", "a b c d e"),
    "tabs": ("\ta\tb\t", "a b"),
    "escapes": ("\x1b[2Ja\x1b]0;owned\x07b\x9b31mc", "[2Ja ]0;owned b 31mc"),
    "right to left": ("a\u202eb\u2066c\u200fd", "a b c d"),
}
AS_TYPED = {**{name: (text, " ".join(text.split())) for name, text in HOSTILE.items()}, **CONTROL}


def calm(text):
    """Whether a terminal shows all of it and does nothing else."""
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.slow
def test_texts_pass_through_make_git_table_and_journal_as_they_are(session):
    texts = [*AS_TYPED.values(), *AS_TYPED.values()][:12]
    for number in range(2, 6):
        (desc, row), (found, first), (question, second) = texts[number - 2 :: 4]
        session.write_train(f"prepare.finish({1.5 - number / 10})", commit=desc)
        done = session.script("run", check=0)
        assert f"1 run against 1: {session.rows[-1][5][:20]}".rstrip() in done.stdout
        assert calm(done.stdout)
        session.make("log-result", "STATUS=keep", f"DESC={desc}", f"FOUND={found}", f"OPEN={question}", check=0)
        assert session.rows[-1][5] == row and len(session.rows) == number
        assert f"- found: {first}\n- open: {second}\n" in session.journal
        assert f"## {number}. keep: {row}\n" in session.journal
    shown = session.make("results", check=0).stdout
    assert all(row[5] in shown for row in session.rows) and calm(shown)
    assert not list(session.path.parent.rglob("owned"))


BRANCHES = ["$(touch${IFS}owned)", 'it\'s-"a"', "größer/東京-🙂", "a;b&c|d%s", "x=y", "`touch\u00a0owned`"]


@pytest.mark.slow
def test_a_branch_by_any_name_has_its_own_table(checkout):
    for branch in BRANCHES:
        checkout.git("checkout", "-q", "-b", branch)
        checkout.make("baseline", "AGAIN=1", check=0)
        assert [row[4:] for row in checkout.rows] == [["keep", "baseline"]]
        assert checkout.git("rev-parse", f"refs/experiments/{branch}/001") == checkout.git("rev-parse", "HEAD")
    folders = [path.name for path in (checkout.path / "data" / "sessions").iterdir()]
    assert len(folders) == len(BRANCHES) and all(re.fullmatch(r"[\w.%~-]+", name, re.ASCII) for name in folders)
    assert not list(checkout.path.parent.rglob("owned"))


VALUES = ["$(touch owned)", "a[$(touch owned)]", "1; touch owned", "x\n1", "-1", "9" * 5000]
NAMES = {"BUDGET": "run", "TIMEOUT": "run", "SEED": "run", "N": "run", "TAG": "setup", "STATUS": "log-result",
         "DEVICE": "run", "NPROC": "run"}  # fmt: skip


@pytest.mark.parametrize("name", ["BUDGET", *(pytest.param(n, marks=pytest.mark.slow) for n in [*NAMES][1:])])
def test_a_variable_is_a_value_and_never_a_command(session, name):
    for value in VALUES[: 5 if name in ("BUDGET", "TIMEOUT") else 6]:
        done = session.script(NAMES[name], check=1, **{"AGAIN": "1", "DESC": "x", name: value})
        assert done.stderr.startswith("error: ") and calm(done.stderr) and done.stderr.count("\n") == 1, done.stderr
    assert not list(session.path.parent.rglob("owned"))


def test_names_of_files_with_text_reach_nobody_as_commands(cache, tmp_path, monkeypatch):
    folder = tmp_path / "$(touch owned) 'texts' \x1b[2J\n🙂"
    folder.mkdir()
    for name in ("-rf", "$(touch owned).txt", "a\nb.txt", "\x1b]0;owned\x07.txt", "\u202etxt.jsonl", "x'y\"z.txt"):
        text = json.dumps({"text": f"{name} and more"}) if name.endswith("jsonl") else f"the text of {name!r}\n" * 40
        (folder / name).write_text(text)
    monkeypatch.setenv("AUTORESEARCH_FILES", str(folder))
    env = {**os.environ, "AUTORESEARCH_FILES": str(folder), "PYTHONUTF8": "1"}
    command = [sys.executable, "prepare.py", "--dataset", "files"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and calm(done.stdout + done.stderr), (done.stdout, done.stderr)
    files = data_sources.DATASETS["files"]
    read = "".join(text for split in corpus.SPLITS for text in files.source.texts(files, split))
    assert "touch owned" in read and not list(tmp_path.rglob("owned"))


# --- what reads files: any bytes --------------------------------------------------------------------

ROWS = st.from_regex(sessions.ROW, fullmatch=True).filter(lambda line: "\n" not in line and "\r" not in line)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)  # fmt: skip
lightly = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def this_session(tmp_path, monkeypatch):
    for name in ("STORE", "JOURNAL", "ROOT"):
        monkeypatch.setattr(sessions, name, tmp_path)
    monkeypatch.setattr(sessions, "git", lambda *_, **__: None)
    found = sessions.Session("t")
    found.folder.mkdir(parents=True)
    return found


@lightly
@given(st.lists(ROWS | st.text(max_size=40)), st.binary(max_size=80))
def test_every_row_of_a_table_is_found_among_whatever_else(this_session, lines, junk):
    rows = [line for text in lines for line in text.replace("\r", "").split("\n") if sessions.ROW.fullmatch(line)]
    this_session.table.write_bytes("\n".join(lines).replace("\r", "").encode("utf-8", "replace") + b"\n" + junk)
    found, problems = this_session.rows()
    lines = [row.line for row in found]
    assert lines[: len(rows)] == [row.encode("utf-8", "replace").decode() for row in rows]
    assert [row.number for row in found] == list(range(1, len(found) + 1)) and all(map(str.isprintable, problems))


@lightly
@given(st.integers(0, 200))
def test_an_event_that_was_cut_short_does_not_count(this_session, cut):
    this_session.log.unlink(missing_ok=True)
    for name in ("ü", "v"):
        this_session.note("begin", id=name, role="candidate", train_blob="b", launcher=1)
    whole = this_session.log.read_bytes()
    this_session.log.write_bytes(whole[: len(whole) - 1 - cut])
    before = len(this_session.events())
    this_session.note("begin", id="x", role="candidate", train_blob="b", launcher=1)
    assert before <= 2 and len(this_session.events()) == before + 1 and this_session.attempts()[-1]["id"] == "x"


def test_a_damaged_line_among_the_events_is_passed_over(session):
    log = session.path / "data/sessions/t/events.jsonl"
    log.write_text('[]\n5\n{"event": "begin"}\nnull\n{"eve\n' + log.read_text() + '{"event": "end", "ti')
    assert "val_bpb  1.500000" in session.script("results", check=0).stdout
    assert session.experiment("prepare.finish(1.4)", "keep").returncode == 0 and len(session.rows) == 2


@lightly
@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"a": 1e999}')
def test_a_record_is_an_object_or_nothing(tmp_path, content):
    path = tmp_path / "run_1.json"
    path.write_bytes(content)
    found = files.read_json(path)
    assert found is None or (isinstance(found, dict) and not record.seal_fits(found))


@lightly
@given(st.binary(max_size=100), st.text(string.ascii_letters + "_ =\"'#", max_size=30))
def test_the_dataset_of_any_train_py(tmp_path, before, line):
    path = tmp_path / "train.py"
    path.write_bytes(before + b"\nDATASET = " + line.encode())
    try:
        assert re.fullmatch(r"\w+", project.dataset_of_train(path))
    except SystemExit as ended:
        assert ended.code.startswith("error: ") and "\n" not in ended.code


@lightly
@given(st.text(max_size=30) | st.from_regex(r"[0-9.eE_+-]+", fullmatch=True))
@example("9" * 5000)
def test_a_number_is_one_or_is_refused(text):
    for read in (project.positive, project.whole):
        try:
            assert read("X", text) >= 0
        except SystemExit as ended:
            assert ended.code.startswith("error: X=") and ended.code.isprintable()


@lightly
@given(st.binary(max_size=400))
def test_a_log_is_shown_without_what_steers_a_terminal(tmp_path, content):
    log = tmp_path / "run.log"
    log.write_bytes(content + b"\nTraceback (most recent call last):\n" + content)
    for line in [*summary.printed(log), summary.what_was_raised(log)]:
        assert line.isprintable()


@lightly
@given(JSON | st.fixed_dictionaries({"pid": JSON, "clock": JSON, "folder": JSON}))
def test_what_stands_in_another_s_lock_is_shown_calmly(tmp_path, note):
    (tmp_path / "lock").write_text(json.dumps(note))
    assert lock.holder(tmp_path / "lock").isprintable()


# --- what is loaded runs nothing ---------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_a_token_cache_with_code_in_it_runs_none(small, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    cache = token_cache.TokenCache.load(small)
    np.save(cache.folder / "val_pieces.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(SystemExit):
        cache.pieces("val")
    assert not all(map(cache.is_whole, cache.meta["sha256"]))
    assert not (tmp_path / "sprung").exists()


# --- the lock of another user --------------------------------------------------------------------------


def test_a_lock_that_leads_elsewhere_writes_nothing_there(session, tmp_path):
    mine, path = tmp_path / "mine.txt", Path(session.env["AUTORESEARCH_LOCK"])
    mine.write_text("precious")
    for target in (mine, tmp_path / "new.txt"):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        assert "cannot be used" in session.script("run", AGAIN="1", check=1).stderr
    assert not (tmp_path / "new.txt").exists() and mine.read_text() == "precious"
    path.unlink()
    session.script("run", AGAIN="1", check=0)
    assert path.stat().st_mode & 0o777 == 0o666  # any user can wait for it
