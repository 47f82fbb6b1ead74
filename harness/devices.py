"""The devices that train one model together: a rank on each. Without a launcher it is a group of one.

MLX's own engine carries what they exchange (`mx.distributed`: NCCL, a ring over TCP, JACCL over Thunderbolt), and its
own launcher starts them (scripts/run/launch.py). Every rank runs the same program. It takes its own rows of each batch,
and all apply the same mean of the gradients, so weights stay the same without being sent. All ranks must call what is
summed or gathered here in the same order: one that does not come is waited for, until TIMEOUT.
"""

import json
import os
import sys
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from harness.processes import LOST, UNFIT

MARKS = {"MLX_HOSTFILE": "ring", "NCCL_HOST_IP": "nccl", "MLX_JACCL_COORDINATOR": "jaccl"}  # what mlx.launch sets
BACKEND = next((backend for name, backend in MARKS.items() if name in os.environ), "any")
try:
    GROUP = mx.distributed.init(strict=True, backend=BACKEND) if "MLX_RANK" in os.environ else None
except RuntimeError as error:
    print(f"error: this rank does not find the others: {error}", file=sys.stderr)
    sys.exit(UNFIT)
RANK, SIZE = (GROUP.rank(), GROUP.size()) if GROUP else (0, 1)


def end_where_a_peer_is_lost(kind, error, trace):
    """In place of a traceback that says nothing of why that peer ended."""
    if "connection to a peer was lost" in str(error):
        print("error: the connection to another rank was lost", file=sys.stderr, flush=True)
        os._exit(LOST)
    sys.__excepthook__(kind, error, trace)


if GROUP:
    sys.excepthook = end_where_a_peer_is_lost


def average_gradients(gradients):
    """The mean over all ranks of a tree of arrays; in few large pieces, as MLX packs them."""
    return nn.average_gradients(gradients, GROUP) if SIZE > 1 else gradients


def all_sum(values):
    """The sum over all ranks of a float32 NumPy array."""
    return np.array(mx.distributed.all_sum(mx.array(values), group=GROUP)) if SIZE > 1 else values


def gathered(tree):
    """A tree of arrays, those of all ranks one behind the other along their first axis."""
    return tree_map(lambda x: mx.distributed.all_gather(x, group=GROUP), tree) if SIZE > 1 else tree


def all_gather(text):
    """A list of each rank's `text`, of which the first 2,000 bytes count."""
    sent = np.frombuffer(text.encode()[:2000].ljust(2000, b"\0"), np.uint8)
    rows = np.array(gathered(mx.array(sent)[None]))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


@contextmanager
def agreement(refusal):
    """An exception of the type `refusal` that one rank raises within it is raised by all, after it."""
    reason = ""
    try:
        yield
    except refusal as error:
        reason = str(error)
    for rank, text in enumerate(all_gather(reason)):
        if text:
            raise refusal(f"{text} (Found by rank {rank}.)" if rank else text)


def step_figures(loss, clock):
    """(mean over all ranks of a scalar loss, rank 0's `clock`), an array that is not computed yet."""
    figures = mx.stack([loss.astype(mx.float32) / SIZE, mx.array(0.0 if RANK else clock)])
    return mx.distributed.all_sum(figures, group=GROUP)


APART = 0.02  # of an array's norm, by which ranks may differ: unlike devices round differently


def same_weights(parameters):
    """Whether all ranks hold the same: of each array its norm and its product with a fixed one are compared."""
    if SIZE == 1:
        return True
    arrays = [x.astype(mx.float32).reshape(-1) for _, x in tree_flatten(parameters)]
    sketches = [mx.stack([mx.linalg.norm(x), (x * mx.cos(1.7 * mx.arange(x.size))).sum()]) for x in arrays]
    found = np.array(gathered(mx.stack(sketches)[None]))  # (ranks, arrays, 2)
    return bool((np.ptp(found, axis=0) <= APART * found[0, :, :1]).all())


def refuse(text):
    """End all ranks, each of which calls this, with one line: the group is at fault, and not the experiment."""
    if not RANK:
        print(f"error: {text}", file=sys.stderr)
    sys.exit(UNFIT)


def describe(device, **same):
    """For the record, since results of unlike groups are not compared: a dictionary, or None for a group of one.

    device: the name of this rank's. same: {what: text} that must be equal on all ranks, or all end with UNFIT.
    """
    if SIZE == 1:
        return None
    ranks = [json.loads(text) for text in all_gather(json.dumps({"device": device, **same}))]
    if unlike := [what for what in same if len({rank[what] for rank in ranks}) > 1]:
        mend = "the same commit, the same packages and make prepare on every machine"
        refuse(f"ranks differ in {' and '.join(unlike)}: {mend}")
    return {"backend": BACKEND, "size": SIZE, "devices": [rank["device"] for rank in ranks]}
