"""results.tsv and the journal: true to the record, each run once, and no row ever lost."""

import re
import resource
import subprocess

import pytest

HEADER = "commit\tval_bpb\tmemory_gb\tavg_tok_sec\tstatus\tdescription"


@pytest.fixture
def ran(session):
    """A session with a second run, 1.4 at 1100 tok/s, that is valid and not logged."""
    session.experiment("prepare.finish(1.4, 1100)")
    return session


def table(checkout):
    return (checkout.path / "results.tsv").read_bytes()


def log(checkout, status="keep", desc="warmer", check=0, **env):
    return checkout.script("log-result", STATUS=status, DESC=desc, check=check, **env)


def test_a_row_and_an_entry_from_the_record(ran):
    ran.make("log-result", "STATUS=keep", "DESC=warmer", "FOUND=it helps", "OPEN=how far?", check=0)
    head = ran.git("rev-parse", "HEAD")
    assert ran.rows[1] == [head[:7], "1.400000", "1.5", "1100", "keep", "warmer"]
    assert ran.refs("t")["002"] == head
    entry = ran.journal.split("\n## ")[2]
    for text in (
        "2. keep: warmer",
        "val_bpb 1.400000, 1100 tok/s, 1 run against 1",
        "verdict against",
        "keep (val_bpb improved",
        f"- t, commit {head}, ",
        "- found: it helps",
        "- open: how far?",
    ):
        assert text in entry


def test_a_description_is_made_one_line(ran):
    log(ran, desc="  a\tb\r\nc \x1b[31m \x85 d ")
    assert ran.rows[1][5] == "a b c [31m d" and len(ran.rows) == 2


def test_text_reaches_the_row_as_it_was_typed(ran):
    typed = "costs $5 & `x` \"quoted\" 'single' #hash \\n 100% $(HOME) größer ∂ | a=b; rm"
    ran.make("log-result", "STATUS=keep", f"DESC={typed}", f"FOUND={typed}", check=0)
    assert ran.rows[1][5] == typed
    assert f"- found: {typed}\n" in ran.journal


@pytest.mark.parametrize("words", [["STATUS=good", "DESC=x"], ["STATUS=keep", "DESC= \t"], ["STATUS=crash", "DESC=x"]])
def test_what_is_missing_or_wrong_is_said(ran, words):
    done = ran.make("log-result", *words, check=2)
    assert re.match("error: (STATUS=.* is none of|DESC is missing|the run was valid, so it is no crash)", done.stderr)
    assert len(ran.rows) == 1


def test_the_commit_logged_is_the_one_that_ran(ran):
    head = ran.git("rev-parse", "HEAD")
    ran.write_train("prepare.finish(9.9)", commit="already the next idea")
    log(ran)
    assert ran.rows[1][:2] == [head[:7], "1.400000"]
    before = table(ran), ran.journal
    assert "logged already, as row 2" in log(ran, check=1).stderr
    assert (table(ran), ran.journal) == before


def test_a_record_that_was_changed_by_hand_is_not_logged(ran):
    for path in (ran.path / "data").glob("*run*.json"):
        path.write_text(path.read_text().replace('"val_bpb": 1.4', '"val_bpb": 1.1'))
    assert "changed" in log(ran, check=1).stderr
    assert len(ran.rows) == 1


# --- faults ----------------------------------------------------------------------------------------


def test_a_lost_link_comes_back_and_without_its_table_a_session_goes_on(ran):
    before = table(ran)
    (ran.path / "results.tsv").unlink()  # a link: the table itself is out of a reset's reach
    ran.script("results", check=0)
    assert table(ran) == before
    (ran.path / "data" / "sessions" / "t" / "results.tsv").unlink()
    log(ran)
    assert [row[5] for row in ran.rows] == ["warmer"]
    assert "002" in ran.refs("t")  # the first experiment's ref is not taken


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text + "abc1234\t1.4",  # cut off in mid-row
        lambda text: text + "a note by hand\n\n",
        lambda text: text.replace("\n", "\r\n"),  # an editor on another system
        lambda text: "\ufeff" + text,
        lambda text: "",
    ],
    ids=["cut", "note", "crlf", "bom", "empty"],
)
def test_a_table_edited_by_hand_or_cut_short_keeps_what_it_has(ran, damage):
    path = ran.path / "results.tsv"
    path.write_bytes(damage(path.read_text()).encode())
    before = table(ran)
    log(ran)
    after = table(ran)
    assert after.startswith(before)
    assert after.splitlines()[-1].split(b"\t")[1:] == [b"1.400000", b"1.5", b"1100", b"keep", b"warmer"]
    assert ran.script("results", check=0).stdout.count("warmer") == 1


def test_a_line_that_is_no_row_is_named_and_one_that_is_no_event_passed_over(ran):
    with (ran.path / "results.tsv").open("a") as out:
        out.write("abc1234\t1.4")
    with (ran.path / "data" / "sessions" / "t" / "events.jsonl").open("a") as out:
        out.write('[]\n5\nnull\n{"id": 1}\n{"event": "end", "ti')
    assert "results.tsv, line 3 is no row" in ran.script("results", check=0).stdout
    log(ran)


@pytest.mark.parametrize("full_at", ["results.tsv", pytest.param("journal", marks=pytest.mark.slow)])
def test_a_full_disk_loses_nothing_and_the_next_command_completes(ran, full_at):
    # a limit on file sizes fails as a full disk does: in the middle of a write
    grown = (ran.path / "results.tsv").resolve()
    if full_at == "journal":
        grown = next((ran.path / "internal" / "log").iterdir())
    line = b"abc1234\t1.900000\t1.5\t1000\tdiscard\t" if full_at == "results.tsv" else b"prose "
    with grown.open("ab") as out:
        out.write(line + b"x" * (64 * 1024 - 20 - grown.stat().st_size - len(line)) + b"\n")
    before, rows = grown.read_bytes(), len(ran.rows)
    done = subprocess.run(
        ["scripts/log-result.sh"],
        cwd=ran.path,
        env={**ran.env, "STATUS": "keep", "DESC": "warmer"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024,) * 2),
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert grown.read_bytes() == before
    ran.write_train("prepare.finish(1.3)", commit="next")
    assert "it is completed" in ran.script("run", check=0).stderr  # half a log is no log
    assert len(ran.rows) == rows + 1 and ran.rows[-1][5] == "warmer"
    assert grown.read_bytes().startswith(before) and ran.journal.count(". keep: warmer") == 1


def test_two_at_once_log_one_row(ran):
    command = {"args": ["scripts/log-result.sh"], "cwd": ran.path, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(**command, env={**ran.env, "STATUS": "keep", "DESC": f"{n}"}) for n in range(4)]
    errors = [p.communicate()[1] for p in both]
    assert sorted(p.returncode for p in both) == [0, 1, 1, 1], errors
    assert len(ran.rows) == 2 and ran.journal.count("\n## ") == 2


def test_log_result_that_was_killed_half_way_is_completed(ran):
    """Whatever step it reached: the state on disk as after a kill just before the end."""
    log(ran)
    path = ran.path / "data" / "sessions" / "t" / "events.jsonl"
    whole = table(ran), ran.journal, ran.refs("t")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    log(ran, desc="said again")
    assert (table(ran), ran.journal, ran.refs("t")) == whole
    assert "logged already" in log(ran, check=1).stderr


# --- the baseline and the table --------------------------------------------------------------------


@pytest.mark.slow
def test_a_baseline_with_another_budget_begins_a_new_table(checkout):
    checkout.make("baseline", "BUDGET=30", check=0)
    old = table(checkout)
    done = checkout.make("baseline", check=0)
    assert [row[5] for row in checkout.rows] == ["baseline"]
    assert [p.read_bytes() for p in (checkout.path / "data" / "sessions" / "main").glob("results_2*.tsv")] == [old]
    assert "results_2" in done.stderr


def test_results_are_aligned_and_the_best_is_marked(session):
    session.experiment("prepare.finish(1.4)", "keep", "better")
    session.experiment("prepare.finish(1.41, 1500)", "keep", "faster")
    session.experiment("raise SystemExit(1)", "crash", "no luck")
    lines = session.make("results", check=0).stdout.splitlines()
    assert [line.split()[0].rstrip("*!") for line in lines[1:5]] == ["1", "2", "3", "4"]
    assert [n for n, line in enumerate(lines[1:5], 1) if "*" in line] == [2]
    words = ["baseline", "better", "faster", "no luck"]
    assert len({line.index(word) for line, word in zip(lines[1:5], words, strict=True)}) == 1
    assert lines[5].startswith("* the best")
