"""One rank of a group, as mlx.launch starts it on each device, on this machine or by ssh; see launch.py.

It runs the program on its part of the machine. How it begins and ends it says on stderr, where launch.py reads it.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

from harness import files, processes

HERE = "127.0.0.1"  # mlx.launch's word for this machine
SAID = re.compile(rb"\x1erank (\d+): (begins|-?\d+)\n")


def say(rank, word):
    os.write(2, f"\x1erank {rank}: {word}\n".encode())


def share(index, count, devices):
    """Take the part `index` of `count` of this machine's cores, and of `devices` the one with that index."""
    if index < len(devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index]
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        part = cores[index * len(cores) // count : (index + 1) * len(cores) // count]
        os.sched_setaffinity(0, part or [cores[index % len(cores)]])


def run(rank, command, limit):
    """Run the program to its end, which is ours, or for at most `limit` seconds."""
    # What the others print rank 0 prints as well; errors of all are shown.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if rank else None)

    def stop(*_):
        processes.kill(processes.descendants(os.getpid()))
        child.kill()
        os._exit(1)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    try:
        code = child.wait(limit)
    except subprocess.TimeoutExpired:
        stop()
    say(rank, code)
    if code > 0 and rank:  # rank 0 ends for the same reason, perhaps, and writes its record first
        time.sleep(processes.PATIENCE)
    sys.exit(code != 0)


def main(words):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # see launch.follow
    rank, group = int(os.environ["MLX_RANK"]), json.loads(os.environ["AUTORESEARCH_GROUP"])
    local = [other for other, host in enumerate(group["hosts"]) if host == group["hosts"][rank]]
    index, held = local.index(rank), None
    if group["hosts"][rank] == HERE:
        share(index, len(local), group["devices"])
        os.environ.pop("TMPDIR")
        os.environ |= {"TMPDIR": group["temporary"]} if group["temporary"] else {}
    else:
        from scripts.run import lock  # here: what it needs takes a while to load, and counts as the run's
        from scripts.session import run_command

        os.chdir(group["folder"])
        held = run_command(lock.take, False) if index == 0 or lock.gpus()[0] > 1 else None
        words[0] = f"data/group/program{index}.py"
        files.write_atomically(Path(words[0]), zlib.decompress(base64.b64decode(group["program"])))
    say(rank, "begins")
    run(rank, [sys.executable, *words], group["limit"])
    del held  # until here


if __name__ == "__main__":
    main(sys.argv[1:])
