"""The morning's page, the brief and the screen: true, whole where something is missing, and safe to open."""

import fcntl
import html
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import termios
import time
from html.parser import HTMLParser

import nights
import pytest
from conftest import ROOT, STANDIN, copied, new_checkout

from harness import record
from scripts.session import one_line

COUNT = 24  # experiments of the night that most tests read
HOSTILE = [
    "</script><script>document.title='taken'</script>", '"><img src=x onerror="document.title=\'taken\'">',
    "</pre></details><h1>taken</h1>", "{{ 7 * 7 }} {% raw %}", "$\\frac{1}{0}$ and $HOME `touch taken`",
    "&lt;b&gt; &amp; ]]> <!-- -->", "x" * 400, "日本語 🙂 \u202e sdrawkcab", "'; touch taken; echo '",
]  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A clone with the real train.py and no session yet."""
    folder = tmp_path_factory.mktemp("lab")
    clone = new_checkout(folder / "ein répo", folder / "home", harness=(STANDIN, ROOT / "train.py"))
    clone.git("add", "-A")
    clone.git("commit", "-q", "-m", "start")
    return clone


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    """A night of 24 experiments, some of them gains, with its report. A person's own matplotlibrc has no say in it."""
    clone = copied(lab, tmp_path_factory.mktemp("whole"))
    nights.make(clone.path, COUNT, share=(0.15, 0.1), seed=3)
    (clone.path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 30\n")
    done = clone.make("report", check=0, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.stderr == "" and done.stdout.startswith("report   data/report.html, ")
    return clone


@pytest.fixture
def night(whole, tmp_path):
    """A copy of it to damage."""
    return copied(whole, tmp_path)


def page(clone):
    return (clone.path / "data" / "report.html").read_text()


def section(clone, name):
    """The text of a part of the page."""
    return Words(page(clone).split(f'id="{name}"')[1].split("</section>")[0]).text


class Words(HTMLParser):
    """The text of a page as it is seen, and its elements."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(text)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_one_file_that_asks_nothing_of_a_network(whole):
    text = page(whole)
    for tag, attributes in Words(text).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(text) < 1e6
    assert "ValueError: shapes (4,8) and (8,2) differ" in section(whole, "all")  # what crashed says why
    content = (whole.path / "data" / "progress.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == (1200, 675)


GAIN = r"[+-]0\.\d{4} ± \d\.\d{4}, [<>]?[\d.]+ %"


def test_every_view_tells_the_same_gain_and_it_is_the_difference_of_two_val_bpb(whole):
    table = whole.make("results", check=0).stdout
    brief, screen = (whole.make(verb, check=0).stdout for verb in ("brief", "watch"))
    text, best = Words(page(whole)).text, None
    row = rf"(?m)^ *(\d+)[*! ] [0-9a-f]{{7}} ([\d.]+)  ({GAIN})? .* (keep|discard) "
    for number, bpb, gain, status in re.findall(row, table):
        if gain:
            assert gain in text
            assert abs(best - float(bpb) - float(gain.split()[0])) < 0.000051
        if gain and status == "keep":
            assert re.search(rf"(?m)^ *{number}  {re.escape(gain)}", brief)
        if int(number) > COUNT - 10:
            assert re.search(rf"(?m)^ *{number}[* ] .*{re.escape(gain)}", screen)
        best = float(bpb) if status == "keep" else best
    standing = re.search(rf"(?m)^gain +({GAIN}); after the winner's curse ({GAIN})$", table).groups()
    assert all(gain in brief and gain in text for gain in standing) and standing[0] in screen


def commands(clone):
    """What the page offers to type, by what is said above it."""
    found = re.findall(r"<p>([^<]*):</p><pre>(git .*?)</pre>", page(clone), re.DOTALL)
    return {"safe" if "safe" in words else "all": html.unescape(block) for words, block in found}


def test_kept_changes_are_told_with_their_diffs_and_taken_home_all_or_the_safe_ones(night):
    rows = [row for row in night.rows if row[4] == "keep"]
    doubted = rows[2]
    gain = float(re.search(rf"{doubted[0]} [\d.]+ +([+-][\d.]+)", night.make("results", check=0).stdout)[1])
    for path in (night.path / "data").glob("run_*.json"):  # the second change gains nothing, and the noise stays
        run = json.loads(path.read_text())
        if run["commit"].startswith(doubted[0]):
            run["result"]["val_bpb"] += gain
            run["seal"] = record.seal(run)
            path.write_text(json.dumps(run))
    night.make("report", check=0)
    kept = section(night, "kept")
    for row in rows[1:]:
        trust = "unproven" if row is doubted else "safe" if row is rows[1] else "(safe|doubtful|unproven)"
        assert re.search(rf"{re.escape(row[5])}\s+{trust}", kept) and row[0] in kept
    assert len(re.findall(r"^\+ *\w", kept, re.MULTILINE)) >= len(rows) - 1
    best = re.search(r"(?m)^ *\d+\* (\w+)", night.make("results", check=0).stdout)[1]
    typed = commands(night)
    night.run("bash", "-ec", typed["safe"], check=0)
    subjects = night.git("log", "--format=%s", f"{rows[0][0]}..HEAD")
    assert 0 < len(subjects.splitlines()) < len(rows) - 1 and doubted[5] not in subjects
    assert night.git("status", "-s", "-uno") == ""
    night.git("checkout", "-q", "main")
    night.run("bash", "-ec", typed["all"], check=0)
    assert night.git("rev-parse", "HEAD").startswith(best)


# --- what is missing is said, and the rest is shown -----------------------------------------------------


def without_records(clone):
    """Records that are gone, damaged, or changed by hand."""
    for number, path in enumerate(sorted((clone.path / "data").glob("run_*.json"))):
        path.write_text(["", "{", "[]", path.read_text().replace("1.1", "1.0")][number % 4])
    return ["runs have no record in data/, or a damaged one"]


def another_machine(clone):
    paths = sorted((clone.path / "data").glob("run_*.json"))
    for path in paths[: len(paths) // 2]:
        changed = {**(ran := json.loads(path.read_text())), "device": {**ran["device"], "name": "another"}}
        path.write_text(json.dumps({**changed, "seal": record.seal(changed)}))
    return ["from another machine, text or budget"]


def by_hand(clone):
    """Rows of a person's, lines cut short, a run that goes on, a look of an older form, another session's records."""
    session = clone.path / "data" / "sessions" / "t"
    lines = (session / "results.tsv").read_text().splitlines()
    own = [lines[4] + " (edited)", "not a row", "abcdef0\t1.000000\t1.0\t9\tdiscard\tby hand"]
    (session / "results.tsv").write_text("\n".join([*lines[:4], *own, *lines[5:]]) + "\n")
    look = {"event": "holdout", "time": "2099-01-01T00:00:00+00:00", "baseline": "a" * 7, "best": "b" * 7, "pairs": 1,
            "night": 0.01, "fresh": [0.01, float("nan")], "test": [0.0123, float("nan")]}  # fmt: skip
    begun = {"event": "begin", "time": "2099-01-01T00:00:00+00:00", "id": "x", "role": "candidate", "pair": None,
             "tag": "t", "commit": "1" * 40, "train_blob": "2" * 40, "budget": 9.0, "seed": 1,
             "launcher": 1}  # fmt: skip
    with (session / "events.jsonl").open("a") as out:
        out.write('{"event": "end", "id": "\n' + json.dumps(look) + "\n" + json.dumps(begun) + "\n")
    clone.git("checkout", "-q", "main")
    nights.make(clone.path, 3, "other", seed=9)
    clone.git("checkout", "-q", "autoresearch/t")
    return ["by hand: rows 4, 5", "line 6 is no row", "not settled which wins: +0.0123 ± nan"]


def table_alone(clone):
    (clone.path / "data" / "sessions" / "t" / "events.jsonl").unlink()
    shutil.rmtree(clone.path / ".git")
    return ["by hand: rows 1, 2, 3", "git does not know the program", "make run REFERENCE=1 N=4 measures it"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [without_records, another_machine, by_hand, table_alone])
def test_what_is_missing_is_said_and_the_rest_is_shown(night, damage):
    missing = damage(night)
    done = night.run(night.env["PYTHON"], "-m", "scripts.show.report", "--tag=t", check=0)
    assert not done.stderr
    text = Words(page(night)).text
    assert all(words in text for words in missing)
    for row in (night.path / "data" / "sessions" / "t" / "results.tsv").read_text().splitlines()[1:]:
        if row.count("\t") == 5:
            assert row.split("\t")[5] in text
    if damage is by_hand:
        assert "held out +0.0123" in night.make("brief", check=0).stdout
        both = "\n" + night.make("results", "ALL=1", check=0).stdout
        assert both.count("\nval_bpb ") == 2 and "\nt\n" in both and "\nother\n" in both
        refused = night.script("report", TAG="nov99", check=1).stderr
        assert refused.startswith("error: there is no session 'nov99'")


@pytest.mark.slow
def test_a_night_that_has_hardly_begun_has_a_page(session):
    """A real session: its baseline, then an idea that was worse."""
    for count, worse in (("0 experiments.", 1.6), ("1 experiment.", 1.7)):
        assert session.make("report", check=0).stderr == ""
        text = Words(page(session)).text
        assert f"Nothing better than the baseline yet, in {count}" in text and "a guess: make run" in text
        session.experiment(f"prepare.finish({worse})", "discard")


def test_the_brief_holds_what_an_agent_needs_in_sixty_lines(whole):
    told = whole.make("brief", check=0).stdout
    assert len(told.splitlines()) <= 60 and max(map(len, told.splitlines())) <= 125
    for words in ("val_bpb ", "gain ", "noise ", "kept, the oldest first:", "dead ends", "open questions",
                  "held out not measured", "last run ", "; next: "):  # fmt: skip
        assert words in told


def screen(clone, columns):
    """What `make watch` draws on a terminal so wide, as lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([clone.path / "scripts" / "watch.sh"], cwd=clone.path, env=clone.env, stdin=theirs,
                             stdout=theirs, stderr=theirs, start_new_session=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"\x1b[J" not in seen:
        seen += os.read(ours, 65536)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(timeout=20) in (0, -2, 130)
    return re.sub(r"\x1b\[\d*[A-Z]", "", seen.decode()).replace("\r", "").splitlines()


def test_the_screen_fits_a_narrow_terminal(whole):
    lines = screen(whole, 60)
    assert max(map(len, lines)) <= 60 and len(lines) <= 23 and f"{COUNT - 1} experiments" in lines[0]


def test_the_screen_follows_a_run_and_the_run_does_not_notice(session):
    """The run writes where it is; the next one that starts has nothing of it."""
    body = """import subprocess
from harness import record
curve = [(0.5, 3.0, 100, 1.0), (1.5, 2.5, 200, 1.0)]
record.tell_step(curve, 4.0)
print(subprocess.run(["scripts/watch.sh"], capture_output=True, text=True).stdout)
prepare.finish(1.4)"""
    session.experiment(body, "keep")
    seen = (session.path / "run.log").read_text()
    assert "38 %, 2 s left; step 1, loss 2.5000, 100 tok/s" in seen
    assert "valid; next: change train.py" in session.make("watch", check=0).stdout
    session.experiment("import subprocess\nprint(subprocess.run(['scripts/watch.sh'], capture_output=True, text=True)"
                       ".stdout)\nprepare.finish(1.3)")  # fmt: skip
    assert "starting" in (session.path / "run.log").read_text()


def test_a_command_of_the_users_gets_the_summary_and_its_slowness_or_failure_does_not_touch_the_run(session, tmp_path):
    """A run is over when all ends of its pipes are closed: so nothing of the command holds one, nor the lock."""
    told, began = tmp_path / "told it", time.monotonic()
    session.write_train("prepare.finish(1.4)")
    done = session.make("run", f"ON_RESULT=cat > '{told}.part'; mv '{told}.part' '{told}'; sleep 90; exit 3", check=0)
    assert "val_bpb             1.400000" in done.stdout and done.stderr == ""
    while not told.exists() and time.monotonic() < began + 80:
        time.sleep(0.05)
    assert told.read_text() == done.stdout and time.monotonic() < began + 80


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KNOWN = ("file:", "data:")


@pytest.fixture
def opened():
    """opened(clone, width, scheme): its page; at the end nothing may have been asked of a network, or complained of."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium on the PATH")
    complaints = []

    def open_(clone, width, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
        shown = context.new_page()
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        shown.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(KNOWN) else None)
        shown.goto((clone.path / "data" / "report.html").as_uri())
        return shown

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield open_
        browser.close()
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_nothing_overflows_and_every_word_can_be_read(whole, opened, width, scheme):
    shown = opened(whole, width, scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.evaluate("document.querySelector('figure img').naturalWidth") > 500
    paper = shown.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (max(int(c) for c in re.findall(r"\d+", paper)[:3]) < 60) == (scheme == "dark")
    ends = shown.evaluate("document.querySelector('#kept').getBoundingClientRect().bottom")
    assert width < 1000 or ends < 950  # verdict, picture and kept changes are on one screen
    shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.slow
def test_no_text_injects_anything(lab, tmp_path, monkeypatch, opened):
    """Descriptions, findings, diffs, reasons, the tag: each tries to become more than text."""
    clone = copied(lab, tmp_path)
    (clone.path / "train.py").write_text("".join(f"# {words}\n" for words in HOSTILE) + (ROOT / "train.py").read_text())
    clone.git("commit", "-q", "-am", HOSTILE[0])
    line = ("</script><b>", f"    '''{HOSTILE[1]} {HOSTILE[3]}'''")
    monkeypatch.setitem(nights.LINES, "def softcap", line)
    nights.make(clone.path, 20, 'x"><b>', describe=lambda number, _: 3 * (HOSTILE[number % len(HOSTILE)],),
                share=(0.3, 0.2), change={"dataset": HOSTILE[0]})  # fmt: skip
    clone.run(clone.env["PYTHON"], "-m", "scripts.show.report", '--tag=x"><b>', check=0)
    shown = opened(clone, 390)
    shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert "taken" not in shown.title()
    assert shown.locator("b, img:not(figure img), h1:has-text('taken'), script").count() == 0
    text = shown.inner_text("body")
    for words in HOSTILE:
        assert one_line(words)[:200] in re.sub(r"\s+", " ", text)
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    typed = commands(clone)
    clone.run("bash", "-c", typed.get("safe") or typed["all"])
    assert not (clone.path / "taken").exists()
