"""Several devices: ranks that train one model together, and runs side by side, one on each device."""

import fcntl
import json
import subprocess
import sys
from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, Checkout, small_laboratory
from test_run import alive, started, wait_for

from harness import devices, record, run_checks

SMALL = {"DEVICE_BATCH_SIZE": 1}  # on all rows alone: sums in another order move these losses by 0.003
SMALL |= {"WEIGHT_DECAY": 0.0, "WARMDOWN": 0.0}  # as it is, the rate hangs on the clock


@pytest.fixture(autouse=True, scope="module")
def alone(tmp_path_factory):
    """Groups of one machine share ports, and each checkout has a lock of its own."""
    with open(tmp_path_factory.getbasetemp().parent / "groups", "w") as file:
        yield fcntl.flock(file, fcntl.LOCK_EX)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A clone with the real harness, a small dataset and a small model; one run of one device made."""
    checkout = small_laboratory(tmp_path_factory.mktemp("group"), **SMALL)
    checkout.make("run", "BUDGET=1.5", check=0)
    return checkout


def last_run(checkout):
    return json.loads((checkout.path / "data" / "last_run.json").read_text())


@pytest.mark.slow
def test_ranks_train_as_one_device_does(lab):
    ranks = 2

    def trained(budget, ranks):
        before = len(list((lab.path / "data").glob("run_*.json")))
        lab.make("run", f"BUDGET={budget}", "AGAIN=1", "SEED=42", f"NPROC={ranks}", check=0)
        assert len(list((lab.path / "data").glob("run_*.json"))) == before + 1
        return last_run(lab)

    first = one = last_run(lab)
    several = trained(1.5, ranks)
    for budget in (6, 24):  # where a busy machine made few steps
        if min(r["training"]["total_steps"] for r in (one, several)) < 8:
            one, several = trained(budget, 1), trained(budget, ranks)
    assert several["group"] == {"backend": "ring", "size": ranks, "devices": [one["device"]["name"]] * ranks}
    (unlike,) = record.differences(several, one)
    assert unlike.startswith("group is {") and unlike.endswith("was None")
    steps = min(50, len(one["curve"]["loss"]), len(several["curve"]["loss"]))  # later, rounding has grown
    assert steps > 5 and one["curve"]["steps_per_bin"] == several["curve"]["steps_per_bin"] == 1
    np.testing.assert_allclose(several["curve"]["loss"][:steps], one["curve"]["loss"][:steps], atol=1e-3)
    assert several["training"]["tokens_per_step"] == one["training"]["tokens_per_step"]
    (lab.path / "data" / "last_run.json").write_text(json.dumps(first))  # for whoever comes next


PROGRAM = """
from harness import devices as group
import prepare, hashlib, json, os, sys
import mlx.core as mx, numpy as np, train
tokenizer = prepare.Tokenizer.load(prepare.get_dataset("files"))
mx.random.seed(1)
_, trainer = train.build(tokenizer.vocab_size, 128)
cache = prepare.TokenCache.load(tokenizer.dataset)
found = prepare.evaluate_bpb(trainer.model, prepare.evaluation_rows(cache, tokenizer.dataset), tokenizer, 3)
stream = prepare.Batches(cache, 8 // group.SIZE, 128, 1)
rows = [hashlib.sha1(np.array(row)).hexdigest() for _ in range(20) for row in next(stream)]
rows = sum(map(json.loads, group.all_gather(json.dumps([r[:8] for r in rows]))), [])
if group.RANK == 0:
    told = [found.bpb, found.stderr, found.row_bits.tolist(), sorted(rows), stream.epochs]
    open(sys.argv[1], "w").write(json.dumps(told))
"""


@pytest.mark.slow
def test_the_figure_and_the_rows_are_those_of_one_device(lab):
    (lab.path / "program.py").write_text(PROGRAM)
    found = []
    for ranks, words in ((1, []), (2, ["-m", "scripts.run.launch", "."])):
        lab.run(sys.executable, *words, "program.py", f"found{ranks}", check=0, NPROC=str(ranks), PYTHONPATH=str(ROOT))
        found.append(json.loads((lab.path / f"found{ranks}").read_text()))
    assert found[0] == found[1]


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1.001, True), (1.03, False), (-1.0, False)])
def test_ranks_that_trained_models_of_their_own_are_refused(monkeypatch, factor, same):
    monkeypatch.setattr(devices, "SIZE", 2)
    monkeypatch.setattr(devices, "gathered", lambda x: mx.concatenate([x, factor * x]))
    found = devices.same_weights({"a": mx.random.normal((3, 4)), "b": [mx.ones(5), mx.zeros(2)]})
    with nullcontext() if same else pytest.raises(run_checks.Refused, match="ranks: the ranks' weights differ"):
        run_checks.one_model(found)


# --- a rank that fails -------------------------------------------------------------------------------

GROUP = "from harness import devices as group"
BEGIN = """from harness import devices as group\nimport os, signal, sys, time
import mlx.core as mx
pids = group.all_gather(str(os.getpid()))
if not group.RANK:
    open('pids.new', 'w').write(' '.join(pids))
    os.replace('pids.new', 'pids')
for step in range(10**9):
    mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group.GROUP))
    time.sleep(0.05)
    if group.RANK == 1 and step == 9:
        {}
"""
FAULTS = {  # what rank 1 does: how it is named
    "os.kill(os.getpid(), 9)": "rank 1 of 2 (127.0.0.1) was killed by signal 9",
    "sys.exit('error: no idea')": "rank 1 of 2 (127.0.0.1) ended with exit 1",
    "raise ValueError('no idea')": "ValueError: no idea",
}


@pytest.fixture
def group_of_two(session):
    session.git("update-ref", "refs/experiments/t/start", "HEAD")
    session.settings(NPROC="2")
    return session


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_ends_the_run_and_is_named(group_of_two, fault):
    done = group_of_two.experiment(BEGIN.format(fault))
    assert done.returncode == 2 and FAULTS[fault] in done.stdout, done.stdout + done.stderr
    assert not any(alive(int(pid)) for pid in (group_of_two.path / "pids").read_text().split())


@pytest.mark.slow
def test_a_group_ends_with_its_time_and_with_its_launcher(group_of_two):
    group_of_two.write_train(BEGIN.format("pass"))
    group_of_two.settings(BUDGET="3", TIMEOUT="20")
    done = group_of_two.script("run", check=124)
    assert "timeout (exit 124)" in done.stdout
    pids = [int(pid) for pid in (group_of_two.path / "pids").read_text().split()]
    assert len(pids) == 2 and not any(map(alive, pids))
    (group_of_two.path / "pids").unlink()
    group_of_two.env["AGAIN"] = "1"
    process, pids = started(group_of_two, stdout=subprocess.PIPE, text=True)
    process.kill()  # without a chance to clean up
    wait_for(lambda: not any(map(alive, pids)), "ranks gone")


def test_a_group_that_ends_well_leaves_one_record(group_of_two, tmp_path):
    """By a hostfile of mlx.launch."""
    host = {"ssh": "localhost", "ips": ["127.0.0.1"]}
    (tmp_path / "two.json").write_text(json.dumps([host, host]))
    group_of_two.settings(HOSTS=str(tmp_path / "two.json"), NPROC="1")
    said = "print('said by', group.RANK), print('half', end=' ', flush=True), time.sleep(0.5), print('a line')"
    done = group_of_two.experiment(f"import time\n{GROUP}\n{said}\nif not group.RANK: prepare.finish(1.4)")
    assert done.returncode == 0 and "val_bpb             1.400000" in done.stdout
    assert (group_of_two.path / "run.log").read_text().splitlines()[:2] == ["said by 0", "half a line"]


# --- refused before training ------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", ["127.0.0.1,no.such.host.invalid", "hosts.json"])
def test_hosts_that_cannot_serve_are_refused(group_of_two, hosts):
    group_of_two.write_train("prepare.finish(1.4)")
    group_of_two.settings(HOSTS=hosts)
    done = group_of_two.script("run", check=1)
    assert done.stderr.startswith(f"error: HOSTS={hosts} names no machines") and done.stderr.count("\n") == 1
    group_of_two.settings(HOSTS="127.0.0.1", NPROC="1")
    assert group_of_two.script("run", check=1).stderr.startswith("error: HOSTS=127.0.0.1 is one machine")


ELSEWHERE = """import os, sys
if os.environ["MLX_RANK"] == "1":
    open("elsewhere", "w").write(" ".join([os.getcwd(), os.environ["AUTORESEARCH_BUDGET"], *sys.argv]))
else:
    while not os.path.exists("elsewhere"): pass
    prepare.finish(1.4)"""


def hosts_by(ssh, checkout, folder):
    """The checkout's session on this machine and another one, which a stand-in for ssh calls by a line of shell."""
    (folder / "ssh").write_text(f"#!/bin/sh\nfor command; do :; done\ncd /\n{ssh}\n")
    (folder / "ssh").chmod(0o755)
    checkout.env["PATH"] = f"{folder}:{checkout.env['PATH']}"
    checkout.settings(HOSTS="127.0.0.1,192.0.2.1", NPROC="1")


def test_a_rank_elsewhere_gets_the_program_and_the_settings(group_of_two, tmp_path):
    lock = f"AUTORESEARCH_LOCK={tmp_path / 'its own'}"
    hosts_by(f'exec env "{lock}" bash -c "$command"', group_of_two, tmp_path)
    group_of_two.write_train(ELSEWHERE)
    group_of_two.script("run", check=0)
    found = (group_of_two.path / "elsewhere").read_text()
    assert found == f"{group_of_two.path} 300 data/group/0/train.py"
    assert (tmp_path / "its own").exists()  # the device there is locked as it is here


def test_a_machine_that_cannot_be_reached_is_no_fault_of_the_experiment(group_of_two, tmp_path):
    hosts_by("exit 255", group_of_two, tmp_path)
    group_of_two.write_train("while True: pass")
    done = group_of_two.script("run", check=2)
    assert "paused (exit 2)" in done.stdout and "no rank began on 192.0.2.1" in done.stdout, done.stdout
    assert "next     make run" in done.stdout


UNLIKE = """import sys
from harness import devices
devices.describe("abacus", **{"token cache": str(devices.RANK)})
raise SystemExit(2)"""


@pytest.mark.slow
def test_ranks_that_differ_and_steps_that_cannot_be_shared_are_no_fault_of_the_experiment(group_of_two):
    done = group_of_two.experiment(UNLIKE)
    assert "paused (exit 2)" in done.stdout and "ranks differ in token cache" in done.stdout, done.stdout
    done = group_of_two.experiment("from harness.batches import cut_step\ncut_step(3 * 64, 1, 64)")
    assert "paused (exit 2)" in done.stdout and "a step has 3 rows, which 2 devices cannot share" in done.stdout


# --- side by side -----------------------------------------------------------------------------------

SMI = """#!/bin/sh
printf '0, GPU-aa\\n1, GPU-bb\\n'
"""
WAITING = """import os, time
open('pids.new', 'w').write(str(os.getpid()) + ' ' + os.environ['CUDA_VISIBLE_DEVICES'])
os.replace('pids.new', 'pids')
while not os.path.exists('go'): time.sleep(0.05)
prepare.finish(1.4)"""


@pytest.fixture
def two_gpus(session, tmp_path):
    """As far as the locks can tell."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    session.env["PATH"] = f"{tmp_path / 'bin'}:{session.env['PATH']}"
    session.write_train(WAITING)
    return session


@pytest.mark.slow
def test_each_gpu_has_a_run_of_its_own(two_gpus, tmp_path):
    first, (_, device) = started(two_gpus)
    assert device == 0
    again = {"AGAIN": "1", "check": 1}
    assert "this folder is taken by another run" in two_gpus.script("run", **again).stderr
    two_gpus.git("worktree", "add", "-q", str(tmp_path / "beside"), "HEAD")
    beside = Checkout(tmp_path / "beside", two_gpus.env)
    beside.make("setup", "TAG=u", check=0)
    assert "DEVICE=2 is not here; there is 0, 1" in beside.script("run", DEVICE="2", check=1).stderr
    assert f"device 0 is taken by another run: pid {first.pid}" in beside.script("run", DEVICE="0", check=1).stderr
    assert "there is 1" in beside.script("run", CUDA_VISIBLE_DEVICES="1", DEVICE="0", check=1).stderr
    assert "is taken by another run" in beside.script("run", CUDA_VISIBLE_DEVICES="GPU-aa", check=1).stderr
    two_gpus.settings("u", NPROC="2")
    assert "this machine is taken by another run" in beside.script("run", check=1).stderr
    two_gpus.settings("u", NPROC="1")
    second, (_, device) = started(beside)
    assert device == 1
    for checkout in (two_gpus, beside):
        (checkout.path / "go").touch()
    assert (first.wait(timeout=30), second.wait(timeout=30)) == (0, 0)
