"""Every point at which a verb may die, one after the other, and what the same command makes of it.

usage: points.py VERB FOLDER [--every K] [--only N:FORM] [--show]

FOLDER holds the state that the verb begins in. For n = 1 … N, and in each of three forms, a copy of it dies at the
n-th operation on the disk, in Python or in git, and the same command runs again:

    killed   the process alone: the system writes the rest; half of the n-th write, and git's lock files, are there
    lost     the power: what was not synced is gone, names as well as content
    empty    the power: names are as they were, and files hold what was synced of them

N + 1 is the power cut after the command's success, and then nothing may be missing. Prints a line for each failure, and
as the last line the operations of an undisturbed run, as JSON.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from hashlib import sha1
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
FORMS = ("killed", "lost", "empty")
RUN = ["-m", "scripts.run.experiment", "--tag=t", "--head=HEAD", "--session"]
VERBS = {  # what is typed; a Python helper is called without its shell script, which changes nothing by itself
    "log-result": ["-m", "scripts.judge.log_result", "--tag=t", "--status=keep", "--description=warmer", "--found=much",
                   "--open=how far?"],
    "run": RUN,
    "run REFERENCE=1": [*RUN, "--reference"],
    "holdout": ["-m", "scripts.judge.holdout", "--tag=t", "--head=HEAD", "--runs=1"],
    "ablate": ["-m", "scripts.judge.ablate", "--tag=t", "--head=HEAD"],
    "baseline": ["-m", "scripts.judge.log_result", "--tag=t", "--status=keep", "--description=baseline", "--new-table"],
    "discard": ["scripts/discard.sh"],
    "setup": ["scripts/setup.sh"],
    "report": ["-m", "scripts.show.report", "--tag=t"],
    "prepare": ["prepare.py", "--dataset=files"],  # of the texts beside FOLDER
}  # fmt: skip


class Lab:
    """A folder in which the state is laid out anew for each death."""

    def __init__(self, verb, pristine, work, python):
        self.verb, self.pristine, self.work, self.words = verb, pristine, work, list(VERBS[verb])
        self.folder, self.log = work / "disk" / "repo", work / "log"
        self.env = {
            "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
            "PATH": f"{work / 'bin'}:{os.environ['PATH']}", "HOME": str(work), "TMPDIR": str(work / "disk" / "tmp"),
            "PYTHON": python, "AUTORESEARCH_LOCK": str(work / "lock"), "CRASH_GIT": shutil.which("git"),
            "TAG": "t" if verb == "setup" else "", "DATASET": "tinystories" if verb == "setup" else "",
            **{f"GIT_{who}_{what}": "tester" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
            "PYTHONDONTWRITEBYTECODE": "1", "CRASH_UNDER": str(work / "disk"), "PYTHONUTF8": "1",
            "PYTHONPATH": "",
            "AUTORESEARCH_CACHE": str(work / "disk" / "cache"), "AUTORESEARCH_FILES": str(pristine.parent / "texts"),
        }  # fmt: skip
        (work / "bin").mkdir(parents=True)
        (work / "bin" / "git").symlink_to(HERE / "git")
        (work / "lock").touch()

    def lay_out(self):
        shutil.rmtree(self.work / "disk", ignore_errors=True)
        (self.work / "disk").mkdir()
        subprocess.run(["cp", "-a", self.pristine, self.folder], check=True)
        for name in ("tmp", "cache"):
            (self.work / "disk" / name).mkdir()
        for path in self.work.glob("log*"):
            path.unlink()
        if self.head is None:
            self.head = self.git("rev-parse", "HEAD")
            self.words = [word.replace("HEAD", self.head) for word in self.words]

    head = None

    def git(self, *words):
        return subprocess.run(["git", *words], cwd=self.folder, capture_output=True, text=True).stdout.strip()

    def type(self, at=None, form=""):
        """Run the verb, dying at the point `at` (0 counts alone, None is undisturbed): (exit code, what it said)."""
        env = dict(self.env)
        if at is not None:
            env |= {"CRASH_LOG": str(self.log), "CRASH_AT": str(at), "CRASH_FORM": form, "PYTHONPATH": str(HERE)}
        else:
            env["PATH"] = os.environ["PATH"]
        script = self.words[0].endswith(".sh")
        if at is None and not script:  # its shell script does that first
            subprocess.run(["bash", "-c", ". scripts/lib.sh; read_git"], cwd=self.folder, env=env, capture_output=True)
        words = self.words if script else [env["PYTHON"], *self.words]
        with open(self.work / "said", "w+", errors="replace") as said:
            done = subprocess.run(words, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=said,
                                  stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            end_descendants()
            said.seek(0)
            return done.returncode, said.read()

    def operations(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def cut_power(self, form):
        """Leave on the disk what a power cut leaves. See the forms above."""
        pending, dirty = [], {}
        for op in self.operations():
            if op["op"] == "fsync":
                dirty.pop(op["inode"], None)
                if op["folder"]:
                    pending = [p for p in pending if os.path.dirname(p["path"]) != op["path"]]
            elif op["op"] == "write":
                if op["path"].startswith(f"{self.folder}/"):  # a temporary file's inode may be another file's by now
                    dirty.setdefault(op["inode"], op["before"])
            elif op["op"] != "git":
                pending.append(op)
        for op in reversed(pending if form == "lost" else []):
            path, kind = op["path"], op["op"]
            if kind == "rename" and os.path.lexists(path):
                os.rename(path, op["source"])
            elif kind in ("create", "symlink", "link", "mkdir"):
                with suppress(FileNotFoundError):
                    shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
            if op.get("kept") and not os.path.lexists(path):
                os.rename(op["kept"], path)
        for root, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(root, name)
                inode = os.lstat(path).st_ino
                if inode in dirty and not os.path.islink(path):
                    Path(path).write_bytes(Path(dirty[inode]).read_bytes() if dirty[inode] else b"")

    def state(self):
        """What must be the same whenever a verb died: no time, no name that is drawn."""
        data, journal = self.folder / "data", self.folder / "internal" / "log"
        records = [json.loads(p.read_text() or "{}") for p in sorted(data.glob("run_*.json"))]
        table = self.folder / "results.tsv"
        events = []
        for path in data.glob("sessions/*/events.jsonl"):
            for line in path.read_text().splitlines():
                with suppress(ValueError):
                    events.append(json.loads(line))
        runs = self.verb in ("ablate", "holdout", "run", "run REFERENCE=1")
        return {
            "table": table.read_text() if table.exists() else None,
            "tables": sorted(p.read_text() for p in data.glob("sessions/*/results_*.tsv")),
            "journal": "".join(p.read_text() for p in sorted(journal.glob("log_*.md"))) if journal.exists() else "",
            "refs": self.git("for-each-ref"),
            "head": self.git("symbolic-ref", "HEAD"),
            "tree": self.git("status", "--porcelain"),
            "train": (self.folder / "train.py").read_text(),
            "weights": (data / "best.safetensors").read_text() if (data / "best.safetensors").exists() else None,
            "worktrees": len(self.git("worktree", "list").splitlines()),
            "logged": [e["id"] for e in events if e["event"] == "logged"],
            "last": [e["status"] for e in events if e["event"] == "end"][-1:],
            "cache": {str(p.relative_to(self.work)): sha1(p.read_bytes()).hexdigest()
                      for p in (self.work / "disk" / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"},
            "pages": [p.read_bytes()[-8:] for p in (data / "report.html", data / "progress.png") if p.exists()],
            "records": len(records) if not runs else all(r.get("seal") for r in records),
            "left over": runs  # which clear up what others left
            and sorted(p.name for p in [*data.rglob(".*tmp"), *data.rglob("*.part")]),
        }  # fmt: skip


def end_descendants():
    """On Linux all that a verb left running is ours to collect (see main)."""
    while left := psutil.Process().children():
        for process in left:
            with suppress(psutil.Error):
                process.kill()
                process.wait()


def differences(now, wanted):
    return [f"{key}: {now[key]!r} is not {wanted[key]!r}" for key in wanted if now[key] != wanted[key]]


def try_point(lab, at, form, wanted, last):
    """What went wrong where the verb died at the point `at`, a line each."""
    lab.lay_out()
    code, said = lab.type(at, form)
    if at <= last and code != -signal.SIGKILL and not (lab.log.parent / "log.dead").exists():
        return [f"was not reached (exit {code}): {said[-300:]}"]
    if form != "killed":
        lab.cut_power(form)
    if at > last and form != "killed":
        return [f"lost after success: {line}" for line in differences(lab.state(), wanted)]
    code, said = lab.type()
    found = differences(lab.state(), wanted)
    if code and found or re.search("Traceback|fatal", said):
        found.append(f"again: exit {code}: {said[-600:]}")
    return found


def main(args):
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    work = Path(args.work or "/tmp") / f"points.{os.getpid()}"
    lab = Lab(args.verb, Path(args.folder).resolve(), work, sys.executable)
    lab.lay_out()
    code, said = lab.type(0)
    operations, wanted = lab.operations(), lab.state()
    if code:
        sys.exit(f"undisturbed, {args.verb} ended with {code}: {said}")
    last = max(op["n"] for op in operations)
    if args.show:
        for op in operations:
            print(op["n"], op["op"], op.get("verb") or os.path.relpath(op["path"], lab.folder), file=sys.stderr)
    points = [(at, form) for at in range(1, last + 2) for form in FORMS if at <= last or form != "killed"]
    if args.only:
        at, form = args.only.split(":")
        points = [(int(at), form)]
    else:  # always with the power cuts after success
        points = [*points[:-2][args.part :: args.every], *points[-2:]]
    failures = 0
    for at, form in points:
        for line in try_point(lab, at, form, wanted, last):
            op = next((op for op in operations if op["n"] == at), {"op": "after the end"})
            where = op.get("verb") or os.path.relpath(op.get("path", ""), lab.folder) if at <= last else ""
            print(f"{args.verb}, point {at} ({op['op']} {where}), {form}: {line}", flush=True)
            failures += 1
    print(json.dumps([op["op"] + ("-folder" if op.get("folder") else "") for op in operations]))
    shutil.rmtree(work)
    sys.exit(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("folder")
    parser.add_argument("--every", type=int, default=1, help="only every K-th point")
    parser.add_argument("--part", type=int, default=0, help="the first of them")
    parser.add_argument("--only", help="N:FORM")
    parser.add_argument("--work")
    parser.add_argument("--show", action="store_true")
    main(parser.parse_args())
