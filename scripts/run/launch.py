"""Run a program as a group of ranks, which mlx.launch starts. Where one fails all end, and the first is named.

usage: launch.py FOLDER PROGRAM [OPTION …]     NPROC and HOSTS stand in the environment

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
from scripts.session import Refused, run_command

TEMPORARY = "autoresearch-"  # begins the name of a folder of ours among everybody's
FIRST_PORT, BLOCK = 32323, 64  # each device of this machine has a block of ports, so that no two launches share one
MLX_LAUNCH = "from mlx._distributed_utils.launch import main; main()"  # what its script `mlx.launch` does
CARRIED = re.compile(r"AUTORESEARCH_(?!LOCK)|MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$|OPENBLAS_|PYTHONU|MLX_")  # by ssh


def is_ours(address, port=0):
    """Whether `address` is this machine's, and the port free; without one, whether one can connect to it."""
    with socket.socket() as one, socket.socket() as other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.settimeout(5)
        try:
            one.bind((address, port))
            one.listen()
            if not port:
                other.connect(one.getsockname())
        except OSError:
            return False
    return True


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
    except socket.gaierror as error:
        mend = "a hostfile of mlx.launch gives its address"
        raise Refused(f"HOSTS: {host['ssh']} is unknown ({error.strerror}); {mend}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refused(f"HOSTS: {named} is no hostfile of mlx.launch: {error}") from None
    if group.get("backend") == "mpi":
        raise Refused("HOSTS: the backend mpi has a launcher of its own, which is not supported: nccl, ring or jaccl")
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
    return group


def follow(launcher, hosts):
    """Pass on what the ranks say until all have ended; returns the exit code, and says which ended first of itself."""
    begun, ends = set(), {}
    for line in launcher.stderr:
        said = SAID.search(line)
        if b"[WARN] Node with rank" not in line:  # mlx.launch's words for what is said below
            os.write(2, line[: said.start()] if said else line)
        if said and said[2] == b"begins":
            begun.add(int(said[1]))
            if len(begun) == len(hosts):  # mlx.launch keeps a core busy until it finds that nobody reads what it writes
                launcher.stdin.write(b"\n")
                launcher.stdin.flush()
        elif said:
            ends[int(said[1])] = int(said[2])
    first = next(((rank, code) for rank, code in ends.items() if code not in (0, LOST)), None)
    absent = [host for rank, host in enumerate(hosts) if rank not in begun and host != HERE]
    if absent and not first:
        mend = "must need no password, and find the same folder and its environment there"
        print(f"error: no rank began on {absent[0]}: ssh {absent[0]} {mend}", file=sys.stderr)
        return UNFIT
    if first is None:
        return ends.get(0, 1)
    rank, code = first
    if ends.get(0) != code:  # else rank 0 has said why
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit {code}"
        print(f"error: rank {rank} of {len(hosts)} ({hosts[rank]}) {how}", file=sys.stderr)
    return max(code, 1)


def ranks():
    """(a hostfile's content, this machine's devices, the first port) of ranks that can begin."""
    group, devices = hostfile(), [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.isdecimal()]
    port = FIRST_PORT + BLOCK * int(devices[0] if devices else 0)
    if not is_ours(group["hosts"][0]["ips"][0], port):
        raise Refused(f"port {port}, by which ranks talk, is taken by another program")
    return group, devices, port


def main(folder, program, *words):
    group, devices, port = ranks()
    hosts = [host["ssh"] for host in group["hosts"]]
    facts = {"hosts": hosts, "devices": devices, "folder": folder, "temporary": os.environ.get("TMPDIR"),
             "limit": float(os.environ.get("TIMEOUT") or 600)}  # fmt: skip
    if set(hosts) != {HERE}:
        facts["program"] = base64.b64encode(zlib.compress(Path(program).read_bytes())).decode()
    os.environ["AUTORESEARCH_GROUP"] = json.dumps(facts)
    # mlx.launch leaves files behind, and no path to them may hold a space; where we are killed, experiment.py clears up
    ends = {"prefix": TEMPORARY, "suffix": f".{os.getpid()}.part"}
    with tempfile.TemporaryDirectory(**ends, ignore_cleanup_errors=True) as temporary:
        Path(temporary, "hosts.json").write_text(json.dumps(group))
        options = [f"--env={name}={value}" for name, value in os.environ.items() if CARRIED.match(name)]
        options += [f"--env=PYTHONPATH={folder}", f"--starting-port={port}", f"--nccl-port={port}"]
        options += [f"--hostfile={temporary}/hosts.json", "-n", os.environ.get("NPROC") or "1"]
        rank = [sys.executable, "-m", "scripts.run.rank", program, *words]
        with subprocess.Popen([sys.executable, "-c", MLX_LAUNCH, *options, "--", *rank], stdin=subprocess.PIPE,
                              stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": temporary}) as launcher:  # fmt: skip
            return follow(launcher, hosts)


if __name__ == "__main__":
    sys.exit(run_command(main, *sys.argv[1:]))
