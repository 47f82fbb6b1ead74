"""Run a program as a group of ranks, which mlx.launch starts; where one fails, all end, and the first is named.

usage: launch.py FOLDER PROGRAM [OPTION …]     NPROC and HOSTS stand in the environment; --check only looks at them

Rank 0 is of this machine, and alone writes results. HOSTS are names for ssh, or a hostfile as mlx.launch reads it. On
each stands the same checkout in the same FOLDER; the program itself goes there with each run. mlx.launch makes the
commands, addresses and environment of all ranks; each of them is scripts/run/rank.py, which runs the program.
"""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from harness.processes import LOST, UNFIT
from scripts.run.rank import HERE, SAID
from scripts.session import TEMPORARY, Refused, run_command

FIRST_PORT, BLOCK = 32323, 64  # each device of this machine has a block of ports, so that no two launches share one
MLX_LAUNCH = "from mlx._distributed_utils.launch import main; main()"  # what its script `mlx.launch` does
CARRIED = re.compile(r"AUTORESEARCH_(?!LOCK)|MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$|OPENBLAS_|PYTHONU|MLX_")  # by ssh


def address_of(host):
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
    except OSError as error:
        mend = "a hostfile of mlx.launch gives its address"
        raise Refused(f"HOSTS: {host} is unknown ({error.strerror}); {mend}") from None


def is_ours(address, port=0):
    """Whether `address` is this machine's, and the port free."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((address, port))
        except OSError:
            return False
    return True


def hostfile():
    """What mlx.launch's --hostfile holds, from HOSTS and NPROC: a host for each rank; those that are here are HERE."""
    named, each = os.environ.get("HOSTS") or HERE, int(os.environ.get("NPROC") or 1)
    group = {"backend": "", "envs": [], "hosts": [{"ssh": name} for name in named.split(",")]}
    if named.endswith(".json"):
        try:
            found = json.loads(Path(named).read_text())
            group |= {"hosts": found} if isinstance(found, list) else found
            group["hosts"] = [{"ssh": str(host["ssh"]), **host} for host in group["hosts"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise Refused(f"HOSTS: {named} is no hostfile of mlx.launch: {error}") from None
    for host in group["hosts"]:
        host["ips"] = host.get("ips") or [address_of(host["ssh"])]
    local = [is_ours(host["ips"][0]) for host in group["hosts"]]
    if not local[0] and named == HERE:
        raise Refused(f"ranks talk by {HERE}, the network within this machine, and it is down or hidden by a sandbox")
    if not local[0]:
        raise Refused(f"HOSTS: this machine comes first, since rank 0 writes the results, and {named} begins elsewhere")
    if len(local) * each == 1:
        raise Refused(f"HOSTS={named} is one machine: leave it out, or name another one behind it")
    for host, here in zip(group["hosts"], local, strict=True):
        host["ssh"] = HERE if here else host["ssh"]
    group["hosts"] = [host for host in group["hosts"] for _ in range(each)]
    if group["backend"] == "mpi":
        raise Refused("HOSTS: the backend mpi has a launcher of its own, which is not supported: nccl, ring or jaccl")
    return group


def first_port(hosts, devices):
    """The first of the ports of our first device, which no other run has while we hold its lock."""
    port = FIRST_PORT + BLOCK * (int(devices[0]) if devices and devices[0].isdecimal() else 0)
    if len(hosts) > BLOCK:
        raise Refused(f"{len(hosts)} ranks: at most {BLOCK} can be launched")
    for rank, host in enumerate(hosts):
        if host["ssh"] == HERE and not is_ours(host["ips"][0], port + rank):
            raise Refused(f"port {port + rank} of {host['ips'][0]} is taken by another program, which must end first")
    return port


def follow(launcher, hosts):
    """Pass on what the ranks say until all have ended; returns the exit code, and says which ended first of itself."""
    begun, ends = set(), {}
    for line in launcher.stderr:
        if not (said := SAID.search(line)):
            if b"[WARN] Node with rank" not in line:  # mlx.launch's words for what is said below
                os.write(2, line)
            continue
        os.write(2, line[: said.start()])
        rank, word = int(said[1]), said[2]
        if word != b"begins":
            ends[rank] = int(word)
            continue
        begun.add(rank)
        if len(begun) == len(hosts):  # mlx.launch keeps a core busy until it finds that nobody reads what it writes
            launcher.stdin.write(b"\n")
            launcher.stdin.flush()
    absent = [rank for rank in range(len(hosts)) if rank not in begun and hosts[rank]["ssh"] != HERE]
    first = next(((rank, code) for rank, code in ends.items() if code not in (0, LOST)), None)
    if absent and not first:
        host = hosts[absent[0]]["ssh"]
        print(f"error: rank {absent[0]} did not begin on {host}: ssh {host} must need no password, and find the same "
              "folder and its environment there", file=sys.stderr)  # fmt: skip
        return UNFIT
    if first and ends.get(0) != first[1]:  # else rank 0 has said the same
        rank, code = first
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit {code}"
        print(f"error: rank {rank} of {len(hosts)} ({hosts[rank]['ssh']}) {how}", file=sys.stderr)
    return first[1] if first and first[1] > 0 else 1 if first else ends.get(0, 1)


def main(words):
    folder, *words = words
    group, devices = hostfile(), [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    port, hosts = first_port(group["hosts"], devices), [host["ssh"] for host in group["hosts"]]
    if words[1:] == ["--check"]:
        return 0
    facts = {"hosts": hosts, "devices": devices, "folder": folder, "temporary": os.environ.get("TMPDIR"),
             "limit": float(os.environ.get("TIMEOUT") or 600)}  # fmt: skip
    if set(hosts) != {HERE}:
        facts["program"] = base64.b64encode(zlib.compress(Path(words[0]).read_bytes())).decode()
    os.environ["AUTORESEARCH_GROUP"] = json.dumps(facts)
    carried = [f"--env={name}={value}" for name, value in os.environ.items() if CARRIED.match(name)]
    # mlx.launch leaves files behind; where we are killed, experiment.py takes the folder away
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}-", ignore_cleanup_errors=True) as temporary:
        Path(temporary, "hosts.json").write_text(json.dumps(group))
        options = [f"--hostfile={temporary}/hosts.json", "-n", os.environ.get("NPROC") or "1", *carried]
        options += [f"--env=PYTHONPATH={folder}", f"--starting-port={port}", f"--nccl-port={port}"]
        command = [sys.executable, "-c", MLX_LAUNCH, *options, "--", sys.executable, "-m", "scripts.run.rank", *words]
        environment = {**os.environ, "TMPDIR": temporary}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as launcher:
            return follow(launcher, group["hosts"])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
