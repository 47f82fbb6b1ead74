"""The machine under a run: what it is, and what else it did while the budget ran.

Facts alone, for the record. Whether they disturbed a run is judged in scripts/judge.
"""

import os
import platform
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil


def describe():
    """Plain facts about the machine and the software: results of unlike ones are not compared."""
    info, memory = mx.device_info(), None
    with suppress(OSError, psutil.Error):  # a sandbox may hide it
        memory = info.get("memory_size") or info.get("total_memory") or psutil.virtual_memory().total
    return {
        "name": info.get("device_name", platform.machine()),
        "memory_gb": round(memory / 2**30) if memory else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "backend": "cpu" if mx.default_device().type != mx.gpu else "metal" if mx.metal.is_available() else "cuda",
        "blas": blas_library(),
    }


def blas_library():
    """Whose matrix product MLX's CPU backend calls in this process."""
    if platform.system() == "Darwin":
        return "Accelerate"
    try:
        return "OpenBLAS" if "libopenblas" in Path("/proc/self/maps").read_text() else "reference"
    except OSError:
        return "unknown"


def cores():
    """The numbers of the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


# --- what else went on -----------------------------------------------------------------------------

TICK = 0.25  # seconds between two looks at the clock
GAP = 2.0  # seconds between two looks, without work done: the process was stopped, or the machine slept


class Watch:
    """Looks at the machine from `start` to `stop`."""

    def __init__(self):
        self._paused, self._done = 0.0, threading.Event()

    def start(self):
        self._load, self._before = os.getloadavg()[0], (time.monotonic(), own_seconds(), all_seconds())
        self._swap = swapped_mb()
        threading.Thread(target=self._tick, daemon=True, name="watch").start()

    def _tick(self):
        last, worked = clock_that_never_stops(), own_seconds()
        while not self._done.wait(TICK):
            now, work = clock_that_never_stops(), own_seconds()
            if now - last > GAP and work - worked < 0.5 * (now - last):
                self._paused += now - last - TICK
            last, worked = now, work

    def stop(self, step_ends):
        """What was seen, for the record. step_ends: seconds at which each step ended."""
        self._done.set()
        (start, own, everything), now, others = self._before, all_seconds(), None
        wall, own = max(time.monotonic() - start, 1e-3), own_seconds() - own
        if None not in (everything, now):
            others = round(max(0.0, now - everything - own) / wall, 3)
        steps = 1e3 * np.diff(step_ends)
        return {
            "load": [round(self._load, 2), round(os.getloadavg()[0], 2)],
            "cores": len(cores()),
            "own_cores": round(own / wall, 3),
            "other_cores": others,
            "step_ms": [round(float(ms), 3) for ms in np.percentile(steps, (5, 50, 95))] if len(steps) else None,
            "paused_seconds": round(self._paused, 2),
            "swapped_mb": round(swapped_mb() - self._swap),
            "speed_limit_percent": speed_limit(),
        }


def clock_that_never_stops():
    """Seconds by a clock that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC_RAW", 0)))


def own_seconds():
    """Processor seconds that this process and its ended children have used."""
    return sum(os.times()[:4])


def all_seconds():
    """Processor seconds that all processes have used on our cores, or None where a sandbox hides them."""
    with suppress(OSError, RuntimeError, psutil.Error):
        every = psutil.cpu_times(percpu=True)
        ours = [every[core] for core in cores() if core < len(every)]
        return sum(t.user + t.system + sum(getattr(t, name, 0.0) for name in BUSY) for t in ours)
    return None


BUSY = ("nice", "irq", "softirq", "steal")  # Linux counts these apart; time of guests is in `user`


def swapped_mb():
    """Memory that stands on disk, in MB; 0 where nothing tells."""
    with suppress(OSError, RuntimeError, psutil.Error):
        return psutil.swap_memory().used / 2**20
    return 0.0


def speed_limit():
    """The share of its speed, in percent, that heat leaves the processor of a Mac; 100 elsewhere."""
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(["pmset", "-g", "therm"], capture_output=True, text=True, timeout=5).stdout
            if limit := re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", said):
                return int(limit[1])
    return 100
