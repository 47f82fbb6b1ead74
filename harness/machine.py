"""The machine under a run: what it is, and what else it did while the budget ran.

Facts alone, for the record. Whether they disturbed a run is judged in scripts/judge.
"""

import os
import platform
import threading
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil


def describe():
    """Plain facts about the machine and the software: results of unlike ones are not compared."""
    info = mx.device_info()
    memory = info.get("memory_size") or info.get("total_memory") or allowed(lambda: psutil.virtual_memory().total)
    maps = allowed(lambda: Path("/proc/self/maps").read_text()) or ""  # whose matrix product the CPU backend calls
    blas = "Accelerate" if platform.system() == "Darwin" else "OpenBLAS" if "libopenblas" in maps else "reference"
    return {
        "name": info.get("device_name", platform.machine()),
        "memory_gb": round(memory / 2**30) if memory else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "backend": "cpu" if mx.default_device().type != mx.gpu else "metal" if mx.metal.is_available() else "cuda",
        "blas": blas,
    }


def cores():
    """The numbers of the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def allowed(question):
    """What psutil answers, or None where a sandbox hides it."""
    with suppress(OSError, RuntimeError, psutil.Error):
        return question()


TICK = 0.25  # seconds between two looks at the clock
GAP = 2.0  # seconds between two looks, without work done: it was stopped, or slept; see run_checks.paused
BUSY = ("user", "system", "nice", "irq", "softirq", "steal")  # time of guests is in `user`


class Watch:
    """Looks at the machine until `stop`."""

    def __init__(self):
        self._paused, self._done = 0.0, threading.Event()
        self._start, self._others, self._swapped = time.monotonic(), seconds_of_others(), swapped_mb()
        threading.Thread(target=self._tick, daemon=True, name="watch").start()

    def _tick(self):
        last, worked = time.time(), own_seconds()  # another clock may stand still while the machine sleeps
        while not self._done.wait(TICK):
            now, work = time.time(), own_seconds()
            if now - last > GAP and work - worked < 0.5 * (now - last):
                self._paused += now - last - TICK
            last, worked = now, work

    def stop(self, step_ends):
        """What was seen, for the record. step_ends: seconds at which each step ended."""
        self._done.set()
        wall, others = max(time.monotonic() - self._start, 1e-3), seconds_of_others()
        steps = 1e3 * np.diff(step_ends)
        return {
            "cores": len(cores()),
            "other_cores": others and round(max(0.0, others - (self._others or others)) / wall, 3),
            "step_ms": [round(float(ms), 3) for ms in np.percentile(steps, (5, 50, 95))] if len(steps) else None,
            "paused_seconds": round(self._paused, 2),
            "swapped_mb": round(swapped_mb() - self._swapped),
        }


def own_seconds():
    """Processor seconds that this process and its ended children have used."""
    return sum(os.times()[:4])


def seconds_of_others():
    """Processor seconds that other processes have used on our cores, or None where a sandbox hides them."""
    if every := allowed(lambda: psutil.cpu_times(percpu=True)):
        ours = [every[core] for core in cores() if core < len(every)]
        return sum(getattr(times, name, 0.0) for times in ours for name in BUSY) - own_seconds()


def swapped_mb():
    """Memory that stands on disk, in MB; 0 where nothing tells."""
    return getattr(allowed(psutil.swap_memory), "used", 0) / 2**20
