"""The machine under a run: what it is, and what else it did while the budget ran.

Facts alone, for the record. Whether a run was disturbed by them is judged in scripts/verdict.py.
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


def describe():
    """Plain facts about the machine and the software: results of unlike ones are not compared."""
    info = mx.device_info()
    memory = info.get("memory_size") or info.get("total_memory")
    if not memory and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
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

TICK = 0.25  # seconds between two signs of life
GAP = 2.0  # seconds without one, and without work done: the process was stopped, or the machine slept


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
        wall, own, everything = (b - a if a is not None else None for a, b in zip(
            self._before, (time.monotonic(), own_seconds(), all_seconds()), strict=True))  # fmt: skip
        wall = max(wall, 1e-3)
        others = busy_by_others() if everything is None else max(0.0, everything - own) / wall
        steps = 1e3 * np.diff(step_ends)
        return {
            "load": [round(self._load, 2), round(os.getloadavg()[0], 2)],
            "cores": len(cores()),
            "own_cores": round(own / wall, 3),
            "other_cores": None if others is None else round(others, 3),
            "step_ms": [round(float(ms), 3) for ms in np.percentile(steps, (5, 50, 95))] if len(steps) else None,
            "paused_seconds": round(self._paused, 2),
            "swapped_mb": round(swapped_mb() - self._swap),
            **power(),
        }


def clock_that_never_stops():
    """Seconds by a clock that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC_RAW", 0)))


def own_seconds():
    """Processor seconds that this process and its ended children have used."""
    return sum(os.times()[:4])


def all_seconds():
    """Processor seconds that all have used on our cores, from /proc/stat; None elsewhere."""
    with suppress(OSError, ValueError):
        wanted, ticks = {f"cpu{i}" for i in cores()}, 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *counts = line.split()
            if name in wanted:  # user nice system (idle iowait) irq softirq steal
                ticks += sum(int(counts[i]) for i in (0, 1, 2, 5, 6, 7))
        return ticks / os.sysconf("SC_CLK_TCK")
    return None


def busy_by_others():
    """Cores that other processes use now, as `ps` averages them; None where there is no ps."""
    listed = [line.split() for line in output("ps", "-A", "-o", "pid=,pcpu=").replace(",", ".").splitlines()]
    shares = [float(share) for pid, share in listed if int(pid) != os.getpid()]
    return sum(shares) / 100 if shares else None


def swapped_mb():
    """Memory that stands on disk, in MB; 0 where nothing tells."""
    with suppress(OSError, ValueError):
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return (int(facts["SwapTotal"].split()[0]) - int(facts["SwapFree"].split()[0])) / 1024
    found = re.search(r"used = ([\d.]+)M", output("sysctl", "-n", "vm.swapusage")) if sys.platform == "darwin" else None
    return float(found[1]) if found else 0.0


def power():
    """On macOS: whether the machine ran on battery, in low-power mode, or slowed down by heat."""
    if sys.platform != "darwin":
        return {}
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", output("pmset", "-g", "therm"))
    return {
        "on_battery": "Battery Power" in output("pmset", "-g", "batt"),
        "low_power": bool(re.search(r"lowpowermode\s+1", output("pmset", "-g"))),
        "speed_limit_percent": int(limit[1]) if limit else 100,
    }


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
