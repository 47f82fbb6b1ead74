"""The processes that train one model together, a rank on each device; without a launcher it is a group of one.

MLX's own engine carries what they exchange (`mx.distributed`: NCCL, a ring over TCP, JACCL over Thunderbolt), and
scripts/launch.py starts them by MLX's own launcher. Every rank runs the same program: it takes its own rows of each
batch, and all apply the same mean of the gradients, so that weights stay the same without being sent. Whatever
is summed or told here, all ranks must call in the same order: one that does not come is waited for.
"""

import os
import select
import threading
from contextlib import contextmanager, suppress

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# --- signs of life -----------------------------------------------------------------------------------
#
# A rank that waits in a sum for another one says nothing, and cannot be asked. So each tells the launcher every
# second how many steps it has begun (scripts/launch.py), and hears from it as often: it ends when the launcher has
# gone, or the cable has. It goes by the pipes that the launcher has anyway, over ssh too; no port is opened for it.

SILENCE = 15  # seconds without a word
SIGN = b"\x1e"  # begins a line of ours among what train.py prints

_steps = -1


def at_step(number=None):
    """Training has come to this step, or to the next one; -1 outside of training."""
    global _steps
    _steps = _steps + 1 if number is None else number


def _give_signs():
    silent = 0  # counted, not timed: a machine that slept has missed nothing
    while silent < SILENCE:
        try:
            os.write(1, SIGN + b"%d\n" % _steps)
            silent += 1
            if select.select([0], [], [], 1.0)[0]:
                silent = 0 if os.read(0, 4096) else SILENCE
        except OSError:
            break
    with suppress(OSError):
        os.write(2, b"error: this rank hears no more of the launcher, and ends\n")
    os._exit(1)


if "AUTORESEARCH_GROUP" in os.environ:
    threading.Thread(target=_give_signs, daemon=True, name="signs of life").start()

# --- what ranks exchange ---------------------------------------------------------------------------

GROUP = None
if "MLX_RANK" in os.environ:
    GROUP = mx.distributed.init(strict=True, backend=os.environ.get("AUTORESEARCH_GROUP", "any"))
    if "AUTORESEARCH_GROUP" in os.environ:
        with suppress(OSError, KeyError):
            os.unlink(os.environ["MLX_HOSTFILE"])  # the launcher's, for this process alone
RANK, SIZE = (GROUP.rank(), GROUP.size()) if GROUP else (0, 1)


def averaged(gradients):
    """The mean over all ranks of a tree of arrays; in few large pieces, as MLX packs them."""
    return nn.average_gradients(gradients, GROUP) if SIZE > 1 else gradients


def summed(values):
    """The sum over all ranks of a float32 NumPy array."""
    return np.array(mx.distributed.all_sum(mx.array(values), group=GROUP)) if SIZE > 1 else values


def told(text):
    """What each rank says here, a list of texts; of each the first 2,000 bytes."""
    if SIZE == 1:
        return [text]
    sent = np.zeros((1, 2000), np.uint8)
    content = np.frombuffer(text.encode()[: sent.size], np.uint8)
    sent[0, : content.size] = content
    rows = np.array(mx.distributed.all_gather(mx.array(sent), group=GROUP))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


@contextmanager
def agreement(refusal):
    """An exception of the type `refusal` that one rank raises within it is raised by all, after it."""
    reason = ""
    try:
        yield
    except refusal as error:
        if SIZE == 1:
            raise
        reason = str(error)
    for rank, text in enumerate(told(reason)):
        if text:
            raise refusal(f"{text} (Found by rank {rank}.)" if rank else text)


def step_figures(loss, clock):
    """(mean over all ranks of a scalar loss, rank 0's `clock`), an array that is not computed yet."""
    figures = mx.stack([loss.astype(mx.float32) / SIZE, mx.array(0.0 if RANK else clock)])
    return mx.distributed.all_sum(figures, group=GROUP)


def weight_sketches(parameters):
    """Of each array its norm, and its product with a fixed one: float32 (ranks, arrays, 2), zeros for one rank."""
    arrays = [array.astype(mx.float32).reshape(-1) for _, array in tree_flatten(parameters)]
    sketches = np.zeros((SIZE, len(arrays), 2), np.float32)
    if SIZE > 1:
        for i, x in enumerate(arrays):
            fixed = mx.cos(1.7 * mx.arange(x.size))
            sketches[RANK, i] = mx.sqrt((x * x).sum()).item(), (x * fixed).sum().item()
    return summed(sketches)


def describe(device):
    """For the record: results of unlike groups are not compared. None for a group of one."""
    if SIZE == 1:
        return None
    return {"backend": os.environ.get("AUTORESEARCH_GROUP", "any"), "size": SIZE, "devices": told(device)}
