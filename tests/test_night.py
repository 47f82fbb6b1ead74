"""A night in small: a scripted agent, ten experiments, real git, real processes, the real harness and model.

The agent edits train.py, types what program.md says, and reads nothing but what is printed. Only sizes are
small: one layer, half a second of training, a corpus of a megabyte. The learning rates start far too
low, so that what is better and what is worse does not hang on luck.
"""

import json
import re
import sysconfig
from pathlib import Path

import pytest
from conftest import FOLDER, HARNESS, new_checkout, set_constants

TINY = {
    "DATASET": '"files"', "DEPTH": 1, "HEAD_DIM": 32, "ASPECT_RATIO": 32, "TOTAL_BATCH_SIZE": "2**9",
    "DEVICE_BATCH_SIZE": 4, "EVAL_BATCH_SIZE": 16, "MATRIX_LR": 1e-4, "EMBEDDING_LR": 1e-3, "HEAD_LR": 1e-5,
    "X0_LR": 0.0, "RESID_LR": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """A checkout of the whole project with a small preset, its dataset prepared."""
    folder = tmp_path_factory.mktemp("night")
    checkout = new_checkout(folder / FOLDER, folder / "home", HARNESS)
    train = checkout.path / "train.py"
    train.write_text(set_constants(train.read_text(), **TINY))
    sources = checkout.path / "data_sources.py"
    text, count = re.subn(
        r"(Dataset\(\"files\",.*?)vocab_size=8192, sequence_length=2048",
        r"\1vocab_size=512, sequence_length=128",
        sources.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1
    sources.write_text(text)
    checkout.git("add", "-A")
    checkout.git("commit", "-q", "-m", "start")
    texts = folder / "some texts"
    texts.mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        (texts / f"{path.stem}.txt").write_bytes(path.read_bytes())
    checkout.env["AUTORESEARCH_CACHE"] = str(folder / "cache")
    checkout.make("prepare", f"FILES={texts}", check=0)
    return checkout


class Agent:
    """Does what program.md says, and knows only what its commands print."""

    def __init__(self, checkout):
        self.checkout = checkout
        self.train = checkout.path / "train.py"
        self.read = []  # what it cost: the lines of each run

    def edit(self, why, **constants):
        self.train.write_text(set_constants(self.train.read_text(), **constants))
        self.checkout.git("commit", "-q", "-am", why)

    def break_with(self, why, line):
        """Put a line at the beginning of the training loop's function."""
        text = self.train.read_text()
        assert text.count("\ndef main():\n") == 1
        self.train.write_text(text.replace("\ndef main():\n", f"\ndef main():\n    {line}\n"))
        self.checkout.git("commit", "-q", "-am", why)

    def run(self):
        done = self.checkout.make("run")
        self.read.append(done.stdout.splitlines())
        return done

    def settle(self, why):
        """Verdict, log, and back where it was not kept. Returns what was decided."""
        for _ in range(9):  # `next` says what settles it; beside other load that is a pair
            done = self.checkout.make("verdict")
            asked = re.search(r"^next +make (run \w+=1)$", done.stdout, re.MULTILINE)
            if not asked:
                break
            self.checkout.make(*asked.group(1).split(), check=0)
        verdict = re.search(r"^verdict +(\w+)", done.stdout, re.MULTILINE)[1] if done.returncode == 0 else "crash"
        status = "keep" if verdict == "judge" else verdict  # its only judgement: a large win is worth slower steps
        self.checkout.make("log-result", f"STATUS={status}", f"DESC={why}", f"FOUND={verdict}", check=0)
        if status != "keep":
            self.checkout.make("discard", check=0)
        return status

    def experiment(self, why, **constants):
        self.edit(why, **constants)
        self.run()
        return self.settle(why)


@pytest.mark.slow
def test_a_night(laboratory):
    lab, agent = laboratory, Agent(laboratory)
    lab.make("setup", "TAG=nov24", "TUNE=0", "BUDGET=0.5", "TIMEOUT=20", check=0)
    lab.make("baseline", check=0)
    prepare_as_it_was = (lab.path / "prepare.py").read_text()

    decided = [agent.experiment("higher rates", EMBEDDING_LR=0.01, HEAD_LR=3e-4, MATRIX_LR=1e-3)]
    decided.append(agent.experiment("hardly any rate at all", EMBEDDING_LR=1e-6, HEAD_LR=1e-6))
    agent.break_with("a shape that does not fit", "mx.zeros((2, 3)) @ mx.zeros((2, 3))")
    assert "ValueError" in agent.run().stdout
    decided.append(agent.settle("a shape that does not fit"))
    agent.break_with("a loop without an end", "while True: pass")
    lab.settings(TIMEOUT="2")
    done = lab.make("run")
    lab.settings(TIMEOUT="20")
    assert "timeout (exit 124)" in done.stdout
    decided.append(agent.settle("a loop without an end"))
    decided.append(agent.experiment("a rate that explodes", EMBEDDING_LR="float('nan')"))
    assert "the loss is nan" in "\n".join(agent.read[-1])
    agent.break_with("a slip of the pen", "x = = 1")
    assert "SyntaxError" in agent.run().stdout
    decided.append(agent.settle("a slip of the pen"))

    # an attempt on the harness is refused, and the mend that is printed mends it
    with (lab.path / "prepare.py").open("a") as out:
        out.write("\ndef evaluate_bpb(*args): return 0.0\n")
    agent.edit("higher rates still, and a kinder metric", EMBEDDING_LR=0.05, HEAD_LR=3e-3, MATRIX_LR=3e-3)
    done = agent.run()
    assert done.returncode == 2 and "prepare.py" in done.stderr and not done.stdout
    lab.run("sh", "-c", done.stderr.split("Put back: ")[1].split("\n")[0], check=0)
    assert (lab.path / "prepare.py").read_text() == prepare_as_it_was
    agent.run()
    decided.append(agent.settle("higher rates still"))
    decided.append(agent.experiment("no rate at all", EMBEDDING_LR=0.0, HEAD_LR=0.0))
    decided.append(agent.experiment("a tenth of the rates", EMBEDDING_LR=5e-3, HEAD_LR=3e-4))

    # half a second of training beside other tests: what a load may hide is not asked
    assert decided[2:6] == ["crash"] * 4 and {"keep", "discard"} == {*decided[:2], *decided[6:]}
    assert all(len(lines) <= 15 for lines in agent.read)

    # ten truthful rows
    assert [row[4] for row in lab.rows] == ["keep", *decided]
    records = [json.loads(path.read_text()) for path in (lab.path / "data").glob("run_*.json")]
    for commit, bpb, memory, rate, status, _ in lab.rows:
        if status == "crash":
            assert (bpb, memory, rate) == ("0.000000", "0.0", "0")
        else:
            bpbs, rates = zip(*((r["result"]["val_bpb"], r["training"]["avg_tok_sec"]) for r in records
                                if r["commit"].startswith(commit)), strict=True)  # fmt: skip
            assert min(bpbs) - 1e-6 < float(bpb) < max(bpbs) + 1e-6
            assert min(rates) - 1 < int(rate) < max(rates) + 1
    # the branch stands on the last kept commit, and nothing else has changed
    assert lab.git("rev-parse", "HEAD").startswith([row for row in lab.rows if row[4] == "keep"][-1][0])
    assert lab.git("symbolic-ref", "--short", "HEAD") == "autoresearch/nov24"
    assert lab.git("status", "--porcelain") == ""
    assert lab.git("diff", "--name-only", "main", "HEAD") == "train.py"
    # ten reachable commits, in order; a journal of ten entries
    refs = lab.refs("nov24")
    assert [refs[f"{n:03d}"][:7] for n in range(1, 11)] == [row[0] for row in lab.rows]
    assert re.findall(r"^## (\d+)\. (\w+):", lab.journal, re.MULTILINE) == [
        (str(n), row[4]) for n, row in enumerate(lab.rows, 1)
    ]


@pytest.mark.slow
def test_on_a_linux_cpu_the_launcher_brings_openblas(laboratory):
    library = Path(laboratory.env["PYTHON"]).parent.parent / "lib" / "libopenblas.so"
    if not library.exists():
        pytest.skip("this Python has no OpenBLAS beside it, as on a GPU or a Mac")
    laboratory.make("run", "BUDGET=0.1", "AGAIN=1")
    assert "BLAS: OpenBLAS" in (laboratory.path / "run.log").read_text()
