"""Run a program as a group of ranks, started by MLX's own launcher; where one fails, all end, and it is named.

usage: launch.py [--check] PROGRAM [OPTION …]      NPROC and HOSTS stand in the environment; --check only looks
       launch.py --facts DATASET [ADDRESS PORT]    what this checkout is; asked of other hosts over ssh

Rank 0 is of this machine, and alone writes results. HOSTS are names for ssh, or a hostfile as mlx.launch reads it; on
each stands the same checkout in the same folder. The program goes there with each run, to data/group/.
mlx.launch makes the commands, addresses and environment of all ranks. Only its loop over their output is not used:
it waits for a rank that hangs without end, forgets how rank 0 ended, and keeps a core busy for each rank.
"""

import json
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from mlx._distributed_utils import launch

from harness import files, project
from harness.devices import SIGN as MARK
from harness.devices import SILENCE
from scripts.session import ROOT, TEMPORARY, Refused, run_command

START = 30  # seconds until the first
STEP = 20.0  # seconds that a step may take at least, and three times as long as the longest before it
PATIENCE = 3.0  # seconds that the others have to end by themselves; and again, once they were asked to
FIRST_PORT = 32323
BLOCK = 64  # ports of one launch: one that the launcher holds, and the ranks'
SIGN = re.compile(MARK + rb"(-?\d+)\r?\n")


# --- where ------------------------------------------------------------------------------------------


def facts(dataset, address=None, port=None):
    """What must be the same on all hosts, and whether a port is free here."""
    import data_sources  # here: they take a while, and are of no use to the launcher itself
    from harness import corpus, token_cache

    cache = token_cache.TokenCache.read(corpus.cache_dir(data_sources.get_dataset(dataset)) / "tokens")
    files = sorted(path for path in ROOT.glob("*.py") if path.name != "train.py")
    return {
        "code": project.code_hash(files),
        "version of MLX": launch.mx.__version__,
        "token cache": cache.hash if cache else None,
        "port": port is None or can_bind(address, int(port)),
    }


def can_bind(address, port=0):
    """Whether `address` is this machine's, and the port free."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            one.bind((address, port))
            return True
    return False


def address_of(host):
    """The address that ssh would call."""
    try:
        settings = subprocess.run(["ssh", "-G", host], capture_output=True, text=True).stdout
    except OSError:
        raise Refused("HOSTS needs ssh, and there is none on this machine") from None
    name = (re.search(r"^hostname (.*)", settings, re.MULTILINE) or ["", host])[1]
    try:
        return socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0]
    except OSError as error:
        raise Refused(f"HOSTS: {host} is unknown ({error.strerror})") from None


def hostfile():
    """What mlx.launch's --hostfile holds, from HOSTS and NPROC."""
    hosts, each = os.environ.get("HOSTS") or "127.0.0.1", int(os.environ.get("NPROC") or 1)
    if hosts.endswith(".json"):
        try:
            found = launch.Hostfile.from_file(hosts).to_json()
        except ValueError as error:
            raise Refused(f"HOSTS: {error}") from None
        for host in found["hosts"]:
            host["ips"] = host["ips"] or [address_of(host["ssh"])]
    else:
        addresses = {name: address_of(name) if os.environ.get("HOSTS") else name for name in hosts.split(",")}
        listed = [{"ssh": name, "ips": [address], "rdma": []} for name, address in addresses.items()]
        found = {"backend": "", "envs": [], "hosts": listed}
    found["backend"] = found["backend"] or ("nccl" if launch.mx.cuda.is_available() else "ring")
    if found["backend"] == "mpi":
        raise Refused("HOSTS: the backend mpi has a launcher of its own, which is not supported: nccl, ring or jaccl")
    local = [can_bind(host["ips"][0]) for host in found["hosts"]]
    if not local[0]:
        raise Refused(f"HOSTS: this machine comes first, since rank 0 writes the results, and {hosts} begins elsewhere")
    for host, here in zip(found["hosts"], local, strict=True):
        host["ssh"] = "127.0.0.1" if here else host["ssh"]  # mlx.launch's word for here
    found["hosts"] = [host for host in found["hosts"] for _ in range(each)]
    return found


def reserve_ports(hosts):
    """(socket, port): from `port` on this machine's ranks find theirs free, and no other launch takes them meanwhile.

    Not before the socket is closed: two launches at once would otherwise find the same ports, and a rank of one
    would train with a rank of the other.
    """
    if len(hosts) >= BLOCK:
        raise Refused(f"{len(hosts)} ranks: at most {BLOCK - 1} can be launched")
    for first in range(FIRST_PORT, FIRST_PORT + 64 * BLOCK, BLOCK):
        held = socket.socket()
        with suppress(OSError):
            held.bind(("127.0.0.1", first))
            held.listen()
            if all(can_bind(h["ips"][0], first + 1 + i) for i, h in enumerate(hosts) if h["ssh"] == "127.0.0.1"):
                return held, first + 1
        held.close()
    raise Refused(f"no free ports from {FIRST_PORT} on")


def carried():
    """What of our environment goes to other hosts: ["NAME=value", …]."""
    names = re.compile(r"AUTORESEARCH_(?!LOCK)|MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$|OPENBLAS_|PYTHONU|MLX_")
    return [f"{name}={value}" for name, value in os.environ.items() if names.match(name)]


def look_at(hosts, port, program):
    """Refuse hosts that cannot be reached or differ from this one; each gets the program."""
    ours, dataset, python = None, project.dataset_of_train(), shlex.quote(sys.executable)
    for rank, host in enumerate(hosts):
        name = host["ssh"]
        if name == "127.0.0.1":
            continue
        ours = ours or facts(dataset)
        asked_for = f"--facts {dataset} {host['ips'][0]} {port + rank}"
        command = f"cd {shlex.quote(str(ROOT))} && env {shlex.join(carried())} {python}"
        command += f" -m scripts.run.launch {asked_for}"
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR"]
        asked = subprocess.run(["ssh", *options, name, command], input=program, capture_output=True, text=True)
        said = (asked.stderr.strip().splitlines() or ["no word"])[-1]
        if asked.returncode == 255:
            raise Refused(f"HOSTS: {name} cannot be reached by ssh: {said}")
        if asked.returncode:
            raise Refused(f"HOSTS: on {name} no checkout answers in {ROOT}, or it lacks its environment: {said}")
        theirs = json.loads(asked.stdout.splitlines()[-1])
        for fact in ("code", "version of MLX", "token cache"):
            if ours[fact] != theirs[fact]:
                a, b = (str(value)[:12] for value in (theirs[fact], ours[fact]))
                raise Refused(f"HOSTS: on {name} the {fact} is {a}, here {b}: the same commit and make prepare on both")
        if not theirs["port"]:
            raise Refused(f"HOSTS: on {name} port {port + rank} is taken")


# --- the ranks --------------------------------------------------------------------------------------


class Rank:
    """A process of the group: what it says, and what is known of it. kind: mlx.launch's class, which starts it."""

    def __init__(self, kind, number, host, *rest):
        self.number, self.host, self.process = number, host, kind(number, host, *rest).process
        self.silent, self.steps, self.since, self.longest = SILENCE - START, -1, time.monotonic(), 0.0
        self.held = {1: b"", 2: b""}  # what was read and is not passed on yet
        self.begun = False  # the first line is mlx.launch's own: where it noted the process
        for end in (self.process.stdin, self.process.stdout, self.process.stderr):
            os.set_blocking(end.fileno(), False)

    def read(self, where):
        """Pass on what came; False at the end."""
        try:
            chunk = os.read((self.process.stdout if where == 1 else self.process.stderr).fileno(), 65536)
        except BlockingIOError:
            return True
        text = SIGN.sub(self._sign, self.held[where] + chunk)
        if where == 1 and not self.begun and b"\n" in text.lstrip():
            self.begun, text = True, text.lstrip().partition(b"\n")[2]
        # A line that is not whole waits, and a sign in it; of one that rank 0 overwrites, the newest state.
        whole = max(text.rfind(b"\n") + 1, text.rfind(b"\r") if self.number == 0 and self.begun else 0)
        whole = len(text) if not chunk else whole
        self.held[where] = text[whole:]
        if self.number == 0 and whole:
            os.write(where, text[:whole])
        for line in text[:whole].splitlines(keepends=True) if self.number else ():
            if line.strip():
                os.write(where, b"rank %d: " % self.number + line)
        return bool(chunk)

    def _sign(self, match):
        steps, now = int(match[1]), time.monotonic()
        self.silent = 0
        if steps != self.steps:
            self.longest = max(self.longest, now - self.since) if steps > 1 and self.steps > 0 else 0.0
            self.steps, self.since = steps, now
        return b""

    def stalled(self):
        return self.steps >= 0 and time.monotonic() - self.since > max(STEP, 3 * self.longest)


def fault(ranks):
    """(the rank that is to blame, why), or None."""
    # One that was killed comes first: the others end because of it, perhaps before we look.
    for rank in sorted(ranks, key=lambda rank: (rank.process.returncode or 0) >= 0):
        code = rank.process.returncode
        if code:
            return rank, f"was killed by signal {-code}" if code < 0 else f"ended with exit {code}"
        if code is None and rank.silent > SILENCE:
            return rank, f"gave no sign of life for {SILENCE} s: it was stopped, or the way to its machine is cut"
    if all(rank.stalled() for rank in ranks):
        last = min(ranks, key=lambda rank: rank.steps)
        return last, f"hangs at step {last.steps}, and the others wait for it"
    return None


def supervise(kind, arguments, verbose=False, elsewhere=()):
    """In place of launch._launch_with_io: run all ranks to their end, and exit as rank 0 did.

    elsewhere: what gives env(1) back the folder for temporary files, which is here for mlx.launch alone.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    here = [words[1] for words, _ in arguments].count("127.0.0.1")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ranks, number = [], 0
    for (rank, host, python, _, kept, env, command), _ in arguments:
        if host == "127.0.0.1":
            env = [*env, f"CUDA_VISIBLE_DEVICES={devices[number]}"] if number < len(devices) and devices[0] else env
            command = ["env", *elsewhere, *command]
            ranks.append(Rank(kind, rank, host, python, os.getcwd(), kept, env, command))
            if cores:
                part = cores[number * len(cores) // here : (number + 1) * len(cores) // here]
                os.sched_setaffinity(ranks[-1].process.pid, part or [cores[number % len(cores)]])
            number += 1
        else:
            env = [*env, *carried(), f"PYTHONPATH={ROOT}"]
            command = [command[0], "-m", "scripts.run.lock", "--", command[0], "data/group/program.py", *command[2:]]
            ranks.append(Rank(kind, rank, host, python, str(ROOT), kept, env, command))
    sys.exit(to_the_end(ranks))


def to_the_end(ranks):
    """Watch over the ranks; returns the exit code."""
    selector, found, deadline, tick = selectors.DefaultSelector(), None, None, 0.0
    for rank in ranks:
        for where, end in ((1, rank.process.stdout), (2, rank.process.stderr)):
            selector.register(end, selectors.EVENT_READ, (rank, where))
    force = [signal.SIGTERM, signal.SIGKILL]
    while None in [rank.process.poll() for rank in ranks]:
        for key, _ in selector.select(0.2):
            rank, where = key.data
            if not rank.read(where):
                selector.unregister(key.fileobj)
        now = time.monotonic()
        if now - tick >= 1:
            tick = now
            for rank in ranks:
                rank.silent += 1
                with suppress(OSError):
                    os.write(rank.process.stdin.fileno(), b"\n")  # a terminal, as ssh makes one, hands on whole lines
        found = found or fault(ranks)
        if deadline is None and (found or ranks[0].process.returncode is not None):
            hangs = found and found[0].process.returncode is None
            deadline = now if hangs else now + PATIENCE
        if deadline is not None and now >= deadline and force:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.send_signal(force[0])
            force, deadline = force[1:], now + PATIENCE
    for key in list(selector.get_map().values()):
        rank, where = key.data
        while rank.read(where) and selector.select(0):
            pass
    found = found or fault(ranks)
    if found and (found[0].number or found[0].process.returncode < 0):
        rank, why = found
        print(f"error: rank {rank.number} of {len(ranks)} ({rank.host}) {why}", file=sys.stderr, flush=True)
    return 2 if found else ranks[0].process.returncode


def main(words):
    if words[0] == "--facts":
        program, place = sys.stdin.read(), ROOT / "data" / "group" / "program.py"
        print(json.dumps(facts(*words[1:])))
        files.write_atomically(place, program)
        return
    check, words = words[0] == "--check", words[words[0] == "--check" :]
    group = hostfile()
    held, port = reserve_ports(group["hosts"])
    look_at(group["hosts"], port, Path(words[0]).read_text())
    if check:
        return
    os.environ["AUTORESEARCH_GROUP"] = group["backend"].removesuffix("-ring")
    if sys.stdout.isatty():
        os.environ["AUTORESEARCH_TERMINAL"] = "1"
    before = os.environ.get("TMPDIR")
    elsewhere = ["-u", "TMPDIR"] if before is None else [f"TMPDIR={before}"]
    launch._launch_with_io = partial(supervise, elsewhere=elsewhere)
    # mlx.launch leaves files behind; run.py takes the folder away where we could not
    prefix = f"{TEMPORARY}{os.getpid()}-"
    with held, tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder
        Path(folder, "hosts.json").write_text(json.dumps(group))
        ports = [f"--starting-port={port}", f"--nccl-port={port}"]
        each = os.environ.get("NPROC") or "1"
        sys.argv = ["mlx.launch", f"--hostfile={folder}/hosts.json", "-n", each, *ports, "--", sys.executable, *words]
        launch.main()


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
