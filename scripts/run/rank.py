"""One rank of a group: the program on one device, as mlx.launch starts it, on this machine or by ssh; see launch.py."""

import base64
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from harness import files, processes

HERE = "127.0.0.1"  # mlx.launch's word for this machine


def share(index, count, devices):
    """Take the part `index` of `count` of this machine's cores, and of `devices` the one with that index."""
    if index < len(devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index]
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        part = cores[index * len(cores) // count : (index + 1) * len(cores) // count]
        os.sched_setaffinity(0, part or [cores[index % len(cores)]])


def main(words):
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # see launch.free_mlx_launch
    rank, group = int(os.environ["MLX_RANK"]), json.loads(os.environ["AUTORESEARCH_GROUP"])
    local = [other for other, host in enumerate(group["hosts"]) if host == group["hosts"][rank]]
    index, held = local.index(rank), None
    if group["hosts"][rank] == HERE:
        share(index, len(local), group["devices"])
    else:
        from scripts.run import lock  # here: what it needs takes a while to load, and counts as the run's
        from scripts.session import run_command

        os.chdir(group["folder"])
        held = run_command(lock.take, False) if index == 0 or lock.gpus()[0] > 1 else None
        words[0] = f"data/group/program{index}.py"
        files.write_atomically(Path(words[0]), base64.b64decode(group["program"]))
    signal.alarm(int(group["limit"]) + 1)  # where nobody can end it any more
    if rank:
        os.dup2(nothing, 1)  # what the others print rank 0 prints as well; errors of all are shown
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except BaseException:
        if rank:  # rank 0 ends for the same reason, perhaps, and writes its record first
            time.sleep(processes.PATIENCE)
        raise
    del held  # until here


if __name__ == "__main__":
    main(sys.argv[1:])
