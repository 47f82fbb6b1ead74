"""Nights without end: a scripted agent with every bad habit, real git, real scripts, and a model of what must be true.

usage: python tests/soak.py [--hours H | --scenarios N] [--seed S] [--folder DIR] [--replay "NAME:SEED NAME:SEED …"]

A night is a list of scenarios, each drawn from a seed of its own, so that the night replays. The harness is the
stand-in (tests/standin), whose runs take no time. After each scenario `Model.check` compares disk, git and processes
with what the agent did. The last line says how much was done.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import psutil  # noqa: E402
from conftest import Checkout, new_checkout  # noqa: E402

CRASH = Path(__file__).resolve().parent / "crash"
ENDS = {  # what a train.py may do: the exit code of its run
    "raise ValueError({x})": 2,
    "x = = {x}": 2,
    "raise SystemExit('error: the loss is nan at step {x}')": 2,
    "import os, signal; x = {x}; os.kill(os.getpid(), signal.SIGKILL)": 2,
    "import os, signal; x = {x}; os.kill(os.getpid(), signal.SIGSEGV)": 2,
    "import os; x = {x}; os._exit(0)": 3,
    "import time; x = {x}; time.sleep(99)": 124,
    "prepare.finish({x}, status='invalid', reason='causality: a leak.')": 2,
    "prepare.finish({x}); raise SystemExit(1)": 2,
    "prepare.finish({x}, seal='made by hand')": 3,
    "open('data/last_run.json', 'w').write('{{' + str({x}))": 3,
}
HOSTILE = [
    "plain", "$(touch owned) `touch owned`", "it's \"quoted\" \\ 100 %", "-n --help", "a\tb\nc", "größer 東京",
    "🙂", "\u202eright to left", "\x1b[2J\x1b]0;title\x07", "${HOME} $5 && touch owned; |", "../../x", "#!*?[a]",
]  # fmt: skip


class Wrong(AssertionError):
    pass


def must(condition, *words):
    if not condition:
        raise Wrong(" ".join(map(str, words)))


class Side:
    """A session as the agent remembers it."""

    def __init__(self, tag):
        self.tag, self.rows, self.best, self.table, self.texts = tag, [], 5.0, "", set()


class Night:
    """The laboratory, what an agent may do in it, and what must hold afterwards."""

    def __init__(self, folder):
        self.lab = new_checkout(folder / "ein répo", folder / "home")
        self.folder, self.counts, self.number = folder, Counter(), 0
        (folder / "tmp").mkdir()
        self.lab.env |= {"TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
        self.lab.write_train("prepare.finish(5.0)", commit="")
        self.lab.git("add", "-A")
        self.lab.git("commit", "-q", "-m", "start")
        self.lab.git("config", "gc.auto", "0")
        self.sides, self.side = {}, None
        self.open("t")

    # --- what an agent types ---

    def type(self, name, *allowed, at=None, **env):
        """A verb; its exit code must be one of `allowed`, 137 where it is made to die at the point `at`."""
        if at:
            log = self.folder / "crash"
            for path in self.folder.glob("crash*"):
                path.unlink()
            env |= {"CRASH_LOG": str(log), "CRASH_AT": str(at), "CRASH_UNDER": str(self.folder), "CRASH_FORM": "killed",
                    "CRASH_GIT": shutil.which("git"), "PYTHONPATH": str(CRASH),
                    "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}  # fmt: skip
            (self.folder / "bin").mkdir(exist_ok=True)
            if not (self.folder / "bin" / "git").exists():
                (self.folder / "bin" / "git").symlink_to(CRASH / "git")
        words = [f"scripts/{name}.sh"]
        done = subprocess.run(words, cwd=self.lab.path, env={**self.lab.env, **env}, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, errors="replace", start_new_session=True)  # fmt: skip
        self.counts[name] += 1
        self.counts["commands"] += 1
        said = done.stdout + done.stderr
        must("Traceback" not in done.stderr, name, said)
        if done.returncode == 1:
            lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
            must(len(lines) == 1 and lines[0].startswith("error: "), name, "is refused in one line:", said)
        must(not allowed or done.returncode in allowed, name, env.get("STATUS"), "ended with", done.returncode, said)
        return done

    def commit(self, body):
        self.lab.write_train(body, commit=f"idea {self.number}")

    def value(self, better):
        self.number += 1
        step = 0.002 + 1e-6 * (self.number % 997)
        return round(self.side.best - step if better else self.side.best + step, 6)

    def description(self, chance):
        return f"idea {self.number} {chance.choice(HOSTILE)}"

    def open(self, tag):
        self.lab.git("checkout", "-q", "main")
        self.type("setup", 0, TAG=tag, BUDGET="1", TIMEOUT="20")
        self.side = self.sides[tag] = Side(tag)
        self.type("baseline", 0, **({"AGAIN": "1"} if len(self.sides) > 1 else {}))
        self.side.rows.append(("keep", self.head(), "baseline"))

    def head(self):
        return self.lab.git("rev-parse", "HEAD")

    def kept(self):
        """The last kept commit that HEAD descends from."""
        for status, commit, _ in reversed(self.side.rows):
            if status == "keep" and self.lab.run("git", "merge-base", "--is-ancestor", commit, "HEAD").returncode == 0:
                return commit
        raise Wrong("the branch has left everything that was kept")

    def tried(self):
        """The commit of the newest candidate that was run in this session."""
        lines = (self.lab.path / "data" / "sessions" / self.side.tag / "events.jsonl").read_text().splitlines()
        begun = [line for line in lines if line.startswith('{"event": "begin"') and line.endswith("}")]
        return [event for event in map(json.loads, begun) if event["role"] == "candidate"][-1]["commit"]

    def log(self, chance, status, at=None):
        text, commit = self.description(chance), self.tried()
        env = {"STATUS": status, "DESC": text, "FOUND": chance.choice(HOSTILE), "OPEN": chance.choice(HOSTILE)}
        done = self.type("log-result", *([] if at else [0]), at=at, **env)
        if at and done.returncode:
            self.counts["died"] += 1
            self.type("log-result", 0, 1, **env)  # completed, or it had been whole already
        self.side.rows.append((status, commit, " ".join("".join(c if c.isprintable() else " " for c in text).split())))
        if status == "keep":
            self.side.best = self.pending
        return done

    def run(self, *allowed, **env):
        return self.type("run", *allowed, **env)

    def settle(self, chance, better, at=None):
        self.log(chance, "keep" if better else "discard", at)
        if not better:
            self.discard()

    def discard(self, at=None):
        before, kept = self.head(), self.kept()
        if self.type("discard", *([] if at else [0]), at=at).returncode and at:
            self.counts["died"] += 1
            self.type("discard", 0)
        must(self.head() == kept, "discard left the branch on", self.head(), "not on", kept)
        must(self.lab.git("for-each-ref", "--contains", before), "the discarded commit is lost")
        must(self.lab.git("status", "--porcelain") == "", self.lab.git("status", "--porcelain"))

    # --- scenarios ---

    def good(self, chance):
        better = chance.random() < 0.4
        self.pending = self.value(better)
        self.commit(f"prepare.finish({self.pending}, {chance.choice([1000, 1200, 900])})")
        self.run(0)
        self.type("verdict", 0)
        self.settle(chance, better)

    def bad(self, chance):
        body, code = chance.choice(list(ENDS.items()))
        self.commit(body.format(x=self.value(False)))
        if code == 124:
            self.lab.settings(self.side.tag, TIMEOUT="2")
        self.run(code)
        self.lab.settings(self.side.tag, TIMEOUT="20")
        if chance.random() < 0.4:  # mended at the second attempt
            self.pending = self.value(False)
            self.commit(f"prepare.finish({self.pending})")
            self.run(0)
            self.settle(chance, False)
        else:
            self.log(chance, "crash")
            self.discard()

    def dies(self, chance):
        """A verb dies at some point of its own, and is typed again."""
        better, where = chance.random() < 0.4, chance.randrange(3)
        self.pending = self.value(better)
        self.commit(f"prepare.finish({self.pending})")
        if self.type("run", at=chance.randrange(1, 26) if where == 0 else None).returncode:
            self.counts["died"] += 1
            self.reap()
            self.run(0, 1)
        self.log(chance, "keep" if better else "discard", chance.randrange(1, 18) if where == 1 else None)
        if not better:
            self.discard(chance.randrange(1, 12) if where == 2 else None)

    def killed(self, chance):
        """run is killed from outside at some moment, by this signal or that, alone or with all its group."""
        self.pending = self.value(False)
        slow = f"import time\ntime.sleep({chance.choice([0, 0.3, 9])})\nprepare.finish({self.pending})"
        self.commit(slow)
        process = subprocess.Popen(["scripts/run.sh"], cwd=self.lab.path, env=self.lab.env, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        time.sleep(chance.uniform(0.1, 1.5))
        number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        with suppress(ProcessLookupError):
            (os.kill if chance.random() < 0.5 else os.killpg)(process.pid, number)
        process.wait()
        self.counts["killed"] += 1
        self.reap()
        self.commit(f"prepare.finish({self.pending})")
        if self.run(0, 1).returncode:  # the killed one had ended by itself, and comes first
            self.log(chance, "discard")
            self.run(0)
        self.settle(chance, False)

    def wrong_order(self, chance):
        """Discard before logging, logging twice, a figure that is no crash, a run of what was run."""
        self.pending = self.value(False)
        self.commit(f"prepare.finish({self.pending})")
        self.type("discard", 0) if chance.random() < 0.2 else None
        if self.head() == self.kept():
            return
        self.run(0)
        self.type("discard", 1)
        self.run(1)
        self.type("log-result", 1, STATUS="crash", DESC="x")
        self.type("log-result", 1, STATUS="keep", DESC=" \t")
        self.log(chance, "discard")
        self.type("log-result", 1, STATUS="discard", DESC="again")
        self.run(1)
        self.discard()
        self.type("discard", 0)

    def forgotten(self, chance):
        """The next idea before the last was logged."""
        self.pending = self.value(False)
        self.commit(f"prepare.finish({self.pending})")
        self.run(0)
        self.commit(f"prepare.finish({self.value(False)})")
        self.run(1)
        self.log(chance, "discard")
        if chance.random() < 0.5:
            self.run(0)
            self.log(chance, "discard")
        self.discard()

    def frozen(self, chance):
        names = ["prepare.py", "harness/record.py", "Makefile", "scripts/run/experiment.py", "scripts/new.py"]
        name = chance.choice(names)
        (self.lab.path / name).open("a").write("\n# kinder\n")
        how = chance.randrange(name == "scripts/new.py", 3)  # what git does not know, and nobody imports, may stay
        if how == 1:
            self.lab.git("add", "-A")
        elif how == 2:
            self.lab.git("add", "-A")
            self.lab.git("commit", "-q", "-m", "sly")
        self.pending = self.value(False)
        self.commit(f"prepare.finish({self.pending})")
        said = self.run(1).stderr
        if "Put back: " in said:
            self.lab.run("sh", "-c", said.split("Put back: ")[1].splitlines()[0])
            if "git rm" not in said and (self.lab.path / "scripts/new.py").exists():
                self.lab.run("git", "rm", "-q", "-f", "scripts/new.py")
                self.lab.run("git", "commit", "-q", "-m", "put back")
        with suppress(FileNotFoundError):
            (self.lab.path / "scripts" / "new.py").unlink()
        self.run(0)
        self.settle(chance, False)

    def reset(self, chance):
        """By hand: to an earlier kept row, from where the night goes on."""
        kept = [commit for status, commit, _ in self.side.rows if status == "keep"]
        commit = chance.choice(kept[-4:])
        self.lab.git("reset", "-q", "--hard", commit)
        self.type("discard", 0)
        must(self.head() == commit, "discard went on from where the branch was reset to")

    def switch(self, chance):
        """Off to another session and back, with work undone."""
        if len(self.sides) < 4 and chance.random() < 0.3:
            here = self.side
            self.open(f"u{len(self.sides)}")
            must(self.side is not here)
        else:
            self.side = self.sides[chance.choice(sorted(self.sides))]
            self.lab.git("checkout", "-q", f"autoresearch/{self.side.tag}")
        self.type("results", 0)

    def again(self, chance):
        """Runs that are no ideas: of the reference, of a pair."""
        before = self.head()
        self.type("run", 0, REFERENCE="1")
        self.pending = self.value(False)
        self.commit(f"prepare.finish({self.pending})")
        self.run(0)
        self.type("run", 0, **chance.choice([{"AGAIN": "1"}, {"PAIR": "1"}, {"PAIR": "1", "N": "2"}]))
        self.settle(chance, False)
        must(self.head() == before or self.kept() == self.head())

    def holdout(self, chance):
        kept = {commit for status, commit, _ in self.side.rows if status == "keep"}
        done = self.type("holdout", 0 if len(kept) > 1 else 1, at=None, N="1")
        if not done.returncode and chance.random() < 0.5:
            if self.type("holdout", at=chance.randrange(1, 50), N="1").returncode:
                self.counts["died"] += 1
                self.reap()
                self.type("holdout", 0, N="1")

    def worktree(self, chance):
        """Another session in a worktree, which runs at the same time and then is removed."""
        tag = f"w{self.number}"
        self.number += 1
        other = Checkout(self.folder / "zweiter Baum", dict(self.lab.env))
        self.lab.git("worktree", "add", "-q", "--detach", str(other.path), "main")
        other.script("setup", TAG=tag, check=0)
        self.pending = self.value(False)
        self.commit(f"import time; time.sleep(0.4)\nprepare.finish({self.pending})")
        both = [subprocess.Popen([f"scripts/{verb}.sh"], cwd=where.path, env={**where.env, "WAIT": "1", "AGAIN": "1"},
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                for verb, where in (("run", self.lab), ("baseline", other))]  # fmt: skip
        said = [process.communicate()[0] for process in both]
        must([process.returncode for process in both] == [0, 0], *said)
        self.settle(chance, False)
        must(len(other.rows) == 1, "the other session's table")
        self.lab.git("worktree", "remove", "--force", str(other.path))
        must((self.lab.path / "data" / "sessions" / tag / "results.tsv").exists(), "its results went with it")

    def lost(self, chance):
        """Something is deleted that can be made again, or that is spare."""
        name = chance.choice(["results.tsv", "run.log", "data/last_run.json"])
        (self.lab.path / name).unlink(missing_ok=True)
        self.type("results", 0)
        self.good(chance)

    # --- what must be true ---

    def reap(self):
        """All that a killed command left ends by itself, soon."""
        end = time.monotonic() + 15
        while time.monotonic() < end:
            if not ours():
                return
            time.sleep(0.05)
        raise Wrong(f"processes that nobody ends: {ours()}")

    def check(self):
        self.reap()
        git, data = self.lab.git, self.lab.path / "data"
        must(git("symbolic-ref", "HEAD") == f"refs/heads/autoresearch/{self.side.tag}", "the branch is another one")
        must(git("status", "--porcelain") == "", "the tree is not clean:", git("status", "--porcelain"))
        must(self.head() == self.kept(), "the branch stands on", self.head(), "and not on a kept commit")
        must(not (self.lab.path / "owned").exists(), "a text was executed")
        for side in self.sides.values():
            text = (data / "sessions" / side.tag / "results.tsv").read_text()
            must(text.startswith(side.table), "rows were rewritten", side.table[-300:], "now", text[-300:])
            side.table = text
            rows = [line.split("\t") for line in text.splitlines()[1:]]
            wanted = [(status, commit[:7], words) for status, commit, words in side.rows]
            found = [(row[4], row[0], row[5]) for row in rows]
            must(found == wanted, "rows", [x for x in found if x not in wanted], "in place of",
                 [x for x in wanted if x not in found], len(found), len(wanted))  # fmt: skip
            refs = self.lab.refs(side.tag)
            for number, (_, commit, _) in enumerate(side.rows, 1):
                must(refs.get(f"{number:03d}") == commit, "ref", number, "of", side.tag)
            headings = re.findall(r"^## (\d+)\. (\w+): (.*)$\n\n(?:- .*\n)*- (\S+), commit", self.lab.journal, re.M)
            mine = [(int(n), status, words) for n, status, words, tag in headings if tag == f"{side.tag}"]
            entries = [(n, status, words) for n, (status, _, words) in enumerate(side.rows, 1)]
            lacking = [entry for entry in entries if entry not in mine]
            must(mine == entries, "journal of", side.tag, lacking, Counter(mine).most_common(1))
        linked = (self.lab.path / "results.tsv").read_text()
        must(linked == self.side.table, "results.tsv shows another session")
        must(git("worktree", "list").count("\n") == 0, "worktrees are left")
        # of four bytes at most is what Python tries a folder with, when it was killed just then
        left = [p.name for p in (self.folder / "tmp").iterdir() if p.is_dir() or p.stat().st_size > 4]
        must(not left, "temporary files are left", left)
        must(not list((self.lab.path / ".git").rglob("*.lock")), "a lock of git is left")
        left = [*data.rglob(".*.tmp"), *self.lab.path.glob(".*.tmp")]
        must(len(left) <= 3, "temporary files pile up", left)  # one may outlive a run, where its pid is used again
        for path in data.glob("run_*.json"):
            if path not in self.seen:
                self.seen.add(path)
                must(path.stat().st_size and json.loads(path.read_text())["seal"], "a record is not whole", path)

    seen = frozenset()


def ours():
    """Processes below this one that have not ended; what lost its parent is ours too (PR_SET_CHILD_SUBREAPER)."""
    psutil.wait_procs(found := psutil.Process().children(recursive=True), timeout=0)
    return [process for process in found if process.is_running()]


SCENARIOS = {
    "good": 30, "bad": 20, "dies": 20, "killed": 10, "wrong_order": 6, "forgotten": 5, "frozen": 4,
    "reset": 3, "switch": 5, "again": 4, "holdout": 2, "worktree": 2, "lost": 4,
}  # fmt: skip


def night(scenarios, folder, tell=lambda *_: None):
    """Run scenarios, an iterable of (name, seed); returns (those done, the night, what went wrong or None)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    now, done = Night(folder), []
    now.seen = set()
    for name, seed in scenarios:
        done.append((name, seed))
        try:
            getattr(now, name)(random.Random(seed))
            now.check()
        except (Wrong, AssertionError) as wrong:
            return done, now, f"{name}:{seed}: {wrong}"
        tell(len(done), now)
    return done, now, None


def drawn(seed, until):
    chance, number = random.Random(seed), 0
    while until(number):
        name = chance.choices(list(SCENARIOS), SCENARIOS.values())[0]
        yield name, seed * 1_000_003 + number
        number += 1


def main(args):
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    folder, start = Path(args.folder or tempfile.mkdtemp(prefix="soak-")), time.monotonic()
    end = start + 3600 * args.hours
    plan = drawn(args.seed, lambda n: time.monotonic() < end if args.hours else n < args.scenarios)
    if args.replay:
        plan = [(name, int(seed)) for name, seed in (pair.split(":") for pair in args.replay.split())]

    def tell(number, now):
        if number % 50 == 0:
            print(f"{number} scenarios, {dict(now.counts)}, {time.monotonic() - start:.0f} s", flush=True)

    done, now, wrong = night(plan, folder / "night", tell)
    if wrong:
        print(f"seed {args.seed}, scenario {len(done)}: {wrong}", flush=True)
        print("to see it again: --replay", repr(" ".join(f"{name}:{seed}" for name, seed in done)))
        sys.exit(1)
    rows, counts = sum(len(side.rows) for side in now.sides.values()), now.counts
    records = len(list((now.lab.path / "data").glob("run_*.json")))
    print(f"seed {args.seed}: {len(done)} scenarios, {counts['commands']} commands, {counts['run']} runs, "
          f"{counts['killed']} killed from outside, {counts['died']} died at a point of their own, {rows} rows in "
          f"{len(now.sides)} sessions, {records} records, {time.monotonic() - start:.0f} s")  # fmt: skip
    print(dict(Counter(name for name, _ in done)))
    shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=0)
    parser.add_argument("--scenarios", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder")
    parser.add_argument("--replay")
    main(parser.parse_args())
