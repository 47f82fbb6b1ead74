"""A night in small: a scripted agent, five experiments, real git, real processes, the real harness and model.

The agent edits train.py, types what program.md says, and reads nothing but what is printed. Only sizes are small: one
layer, half a second of training, a corpus of a megabyte. The learning rates start far too low, so that what is better
and what is worse does not hang on luck.
"""

import re
from pathlib import Path

import pytest
from conftest import set_constants, small_laboratory

LOW = {"DEVICE_BATCH_SIZE": 4, "EVAL_BATCH_SIZE": 16, "MATRIX_LR": 1e-4, "EMBEDDING_LR": 1e-3, "HEAD_LR": 1e-5,
       "X0_LR": 0.0, "RESID_LR": 0.0}  # fmt: skip


class Agent:
    """Does what program.md says, and knows only what its commands print."""

    def __init__(self, checkout):
        self.checkout, self.train = checkout, checkout.path / "train.py"
        self.said = []  # val_bpb of each experiment as its last verdict told it

    def edit(self, why, **constants):
        self.train.write_text(set_constants(self.train.read_text(), **constants))
        self.checkout.git("commit", "-q", "-am", why)

    def run(self):
        done = self.checkout.make("run")
        assert len(done.stdout.splitlines()) <= 15
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
        told = re.search(r"^val_bpb +([\d.]+)", done.stdout, re.MULTILINE)
        self.said.append(told[1] if told else "0.000000")
        status = "keep" if verdict == "judge" else verdict  # its only judgement: a large win is worth slower steps
        self.checkout.make("log-result", f"STATUS={status}", f"DESC={why}", f"FOUND={verdict}", check=0)
        if status != "keep":
            assert "next: make discard" in self.checkout.make("brief", check=0).stdout
            self.checkout.make("discard", check=0)
        return status


@pytest.mark.slow
def test_a_night(tmp_path):
    lab = small_laboratory(tmp_path, **LOW)
    agent = Agent(lab)
    lab.make("setup", "TAG=nov24", "TUNE=0", "BUDGET=0.5", check=0)
    lab.make("baseline", check=0)
    if (Path(lab.env["PYTHON"]).parent.parent / "lib" / "libopenblas.so").exists():  # on a CPU under Linux
        assert "BLAS: OpenBLAS" in (lab.path / "run.log").read_text()

    agent.edit("higher rates", EMBEDDING_LR=0.01, HEAD_LR=3e-4, MATRIX_LR=1e-3)
    agent.run()
    decided = [agent.settle("higher rates")]
    text = agent.train.read_text()
    agent.train.write_text(text.replace("\ndef main():\n", "\ndef main():\n    mx.zeros((2, 3)) @ mx.zeros((2, 3))\n"))
    lab.git("commit", "-q", "-am", "a shape that does not fit")
    assert "ValueError" in agent.run().stdout
    decided.append(agent.settle("a shape that does not fit"))
    agent.edit("a rate that explodes", EMBEDDING_LR="float('nan')")
    assert "the loss is nan" in agent.run().stdout
    decided.append(agent.settle("a rate that explodes"))

    agent.edit("higher rates still", EMBEDDING_LR=0.05, HEAD_LR=3e-3, MATRIX_LR=3e-3)
    agent.run()
    decided.append(agent.settle("higher rates still"))
    agent.edit("no rate at all", EMBEDDING_LR=0.0, HEAD_LR=0.0)
    agent.run()
    decided.append(agent.settle("no rate at all"))

    # half a second of training beside other tests: what a load may hide is not asked
    assert decided[1:3] == ["crash"] * 2 and {decided[0], *decided[3:]} <= {"keep", "discard"}
    # truthful rows, a journal of as many entries, and commits that stay reachable
    assert [row[4] for row in lab.rows] == ["keep", *decided]
    assert [row[1] for row in lab.rows[1:]] == agent.said
    assert all(row[1:4] == ["0.000000", "0.0", "0"] for row in lab.rows if row[4] == "crash")
    assert re.findall(r"^## \d+\. (\w+):", lab.journal, re.MULTILINE) == [row[4] for row in lab.rows]
    refs = lab.refs("nov24")
    assert [refs[f"{n:03d}"][:7] for n in range(1, 7)] == [row[0] for row in lab.rows]
    # the branch stands on the last kept commit, and nothing else has changed
    assert lab.git("rev-parse", "HEAD").startswith([row for row in lab.rows if row[4] == "keep"][-1][0])
    assert lab.git("symbolic-ref", "--short", "HEAD") == "autoresearch/nov24"
    assert lab.git("status", "--porcelain") == ""
    assert lab.git("diff", "--name-only", "main", "HEAD") == "train.py"
