"""Run a program as a group of ranks, which mlx.launch starts. Where one fails all end, and the first is named.

usage: launch.py FOLDER PROGRAM [OPTION …]     NPROC and HOSTS stand in the environment

Rank 0 is of this machine, and alone writes results. HOSTS are names for ssh, or a hostfile as mlx.launch reads it. On
each stands the same checkout in the same FOLDER; the program itself goes there with each run. mlx.launch makes the
commands, addresses and environment of all ranks; each of them is this file again, which then runs the program.
"""

import base64
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from harness import files
from harness.processes import LOST, PATIENCE, UNFIT
from scripts.run import lock
from scripts.session import Refused, run_command

HERE = "127.0.0.1"  # mlx.launch's word for this machine
FIRST_PORT, BLOCK = 32323, 64  # each device of this machine has a block of ports, so that no two launches share one
MLX_LAUNCH = "from mlx._distributed_utils.launch import main; main()"  # what its script `mlx.launch` does
ENDED = re.compile(rb"(?:\x1b\[33m)?\[WARN\] Node with rank (\d+) (?:exited with code (-?\d+)|was killed)")
CARRIED = re.compile(r"AUTORESEARCH_(?!LOCK)|MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$|OPENBLAS_|PYTHONU|MLX_")  # by ssh


def hostfile():
    """What mlx.launch's --hostfile holds, from HOSTS and NPROC: a host for each rank; those that are here are HERE."""
    named, each = os.environ.get("HOSTS") or HERE, int(os.environ.get("NPROC") or 1)
    group = {"hosts": [{"ssh": name} for name in named.split(",")]}
    try:
        if named.endswith(".json"):
            found = json.loads(Path(named).read_text())
            group = {"hosts": found} if isinstance(found, list) else found
        for host in group["hosts"]:
            host["ips"] = host.get("ips") or [socket.getaddrinfo(host["ssh"], None, socket.AF_INET)[0][4][0]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refused(f"HOSTS={named} names no machines, nor is it a hostfile of mlx.launch: {error}") from None
    here = group["hosts"][0]["ips"][0]
    for host in group["hosts"]:
        host["ssh"] = HERE if host["ips"][0] == here else host["ssh"]
    group["hosts"] = [host for host in group["hosts"] for _ in range(each)]
    if len(group["hosts"]) < 2:
        raise Refused(f"HOSTS={named} is one machine: leave HOSTS out, or give NPROC devices of it")
    return group


def free_mlx_launch(launcher):
    """mlx.launch keeps a core busy until it finds that nobody reads what it writes: a rank reads nothing."""
    with suppress(OSError):
        while launcher.poll() is None:
            launcher.stdin.write(b"\n")
            launcher.stdin.flush()
            time.sleep(1)


def follow(launcher, hosts):
    """Pass on what the ranks say until all have ended; returns the exit code, and says which ended first of itself."""
    threading.Thread(target=free_mlx_launch, args=[launcher], daemon=True).start()
    rank = code = 0
    for line in launcher.stderr:
        ended = ENDED.search(line)
        os.write(2, line[: ended.start()] if ended else line)
        if ended and ended[2] and not code and int(ended[2]) != LOST:
            rank, code = int(ended[1]), int(ended[2])
    if not code:  # where it began none it has said why
        return UNFIT if launcher.wait() else 0
    if hosts[rank] != HERE and code in (126, 127, 255):  # ssh's words, or a shell's, for what it did not find
        mend = "must need no password, and find the same folder and its environment there"
        print(f"error: no rank began on {hosts[rank]}: ssh {hosts[rank]} {mend}", file=sys.stderr)
        return UNFIT
    if rank:  # else it has said why
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit {code}"
        print(f"error: rank {rank} of {len(hosts)} ({hosts[rank]}) {how}", file=sys.stderr)
    return max(code, 1)


def launch(folder, program, *words):
    group, each = hostfile(), os.environ.get("NPROC") or "1"
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.isdecimal()]
    hosts = [host["ssh"] for host in group["hosts"]]
    port = FIRST_PORT + BLOCK * int(devices[0] if devices else 0)
    facts = {"hosts": hosts, "devices": devices, "folder": folder, "limit": float(os.environ.get("TIMEOUT") or 600)}
    if set(hosts) != {HERE}:
        facts["program"] = base64.b64encode(Path(program).read_bytes()).decode()
    os.environ["AUTORESEARCH_GROUP"] = json.dumps(facts)
    # mlx.launch leaves files behind, and no path to them may hold a blank
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        Path(temporary, "hosts.json").write_text(json.dumps(group))
        options = [f"--env={name}={value}" for name, value in os.environ.items() if CARRIED.match(name)]
        options += [f"--env=PYTHONPATH={folder}", f"--starting-port={port}", f"--nccl-port={port}"]
        options += [f"--hostfile={temporary}/hosts.json", "-n", each]
        rank = [sys.executable, "-m", "scripts.run.launch", program, *words]
        with subprocess.Popen([sys.executable, "-c", MLX_LAUNCH, *options, "--", *rank], stdin=subprocess.PIPE,
                              stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": temporary}) as launcher:  # fmt: skip
            return follow(launcher, hosts)


def rank_of_group(words):
    """One rank of a group: run a program on one device, as mlx.launch has started this, here or by ssh."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # see free_mlx_launch
    rank, group = int(os.environ["MLX_RANK"]), json.loads(os.environ["AUTORESEARCH_GROUP"])
    local = [other for other, host in enumerate(group["hosts"]) if host == group["hosts"][rank]]
    index, held = local.index(rank), None
    if group["hosts"][rank] == HERE:
        if index < len(group["devices"]):
            os.environ["CUDA_VISIBLE_DEVICES"] = group["devices"][index]
        lock.take_cores([index], len(local))
    else:
        os.chdir(group["folder"])
        held = run_command(lock.take, False) if index == 0 or lock.gpus()[0] > 1 else None
        words[0] = f"data/group/{index}/{Path(words[0]).name}"  # whose name says that it is train.py
        files.write_atomically(Path(words[0]), base64.b64decode(group["program"]))
    signal.alarm(int(group["limit"]) + 1)  # where nobody can end it any more
    if rank:
        os.dup2(nothing, 1)  # what the others print rank 0 prints as well; errors of all are shown
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except BaseException:
        if rank:  # rank 0 ends for the same reason, perhaps, and writes its record first
            time.sleep(PATIENCE)
        raise
    del held  # until here


if __name__ == "__main__":
    rank_of_group(sys.argv[1:]) if "MLX_RANK" in os.environ else sys.exit(run_command(launch, *sys.argv[1:]))
