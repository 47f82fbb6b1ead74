"""One screen that follows a session: the running experiment, the last rows, the best, the load.

usage: watch.py --tag TAG

It reads files and nothing else, so a run does not notice it.
"""

import os
import shutil
import sys
import time
from datetime import datetime

from harness import files
from scripts.session import PROGRESS, Session, blanked, cut, one_line, options, run_command

EVERY = 1.0  # seconds
ROWS = 10


def screen(sitting, width, height):
    """What there is to see, as lines that fit."""
    rows, attempts = sitting.rows()[0], sitting.attempts()
    kept = [row for row in rows if row.status == "keep"]
    best = min(kept, key=lambda row: row.bpb, default=None)
    load = os.getloadavg()[0]
    lines = [f"{sitting.tag}  {len(rows)} experiments, {len(kept)} kept   load {load:.1f} of {os.cpu_count()}"]
    if best:
        lines.append(f"best   {best.bpb:.6f}  ({best.bpb - kept[0].bpb:+.6f} to the baseline), row {best.number}")
    lines += ["", *running(attempts, width), ""]
    shown = rows[-max(1, min(ROWS, height - len(lines) - 2)) :]
    for row in reversed(shown):
        mark = "*" if row is best else " "
        value = f"{row.bpb:.6f}" if row.status != "crash" else "-"
        lines.append(f"{row.number:4}{mark} {row.status:8}{value:>9}  {row.description}")
    if not rows:
        lines.append("no results yet")
    return [cut(blanked(line), width) for line in lines][:height]


def running(attempts, width):
    """The run that goes on, or how the last one ended."""
    if not attempts:
        return ["no run yet"]
    last = attempts[-1]
    name = f"{(last['commit'] or 'none')[:7]} {last['role']}, seed {last['seed']}"
    if last["status"] != "running":
        ended = f", {last['wall_seconds']:.0f} s in all" if last.get("wall_seconds") else ""
        return [f"last   {name}: {last['status']}{ended}", one_line(last.get("reason"))][: 1 + bool(last.get("reason"))]
    since = (datetime.now().astimezone() - datetime.fromisoformat(last["started"])).total_seconds()
    now = files.read_json(PROGRESS) or {}
    if now.get("attempt") != last["id"]:
        return [f"run    {name}: starting, {since:.0f} s"]
    share = min(1.0, now["seconds"] / now["budget"])
    room = max(10, min(40, width - 30))
    bar = "#" * round(room * share) + "-" * (room - round(room * share))
    left = max(0.0, now["budget"] - now["seconds"])
    state = f"{left:.0f} s left" if share < 1 else "evaluating"
    return [f"run    {name}, {since:.0f} s", f"       [{bar}] {100 * share:.0f} %, {state}",
            f"       step {now['step']}, loss {now['loss']:.4f}, {now['tok_sec']:,.0f} tok/s"]  # fmt: skip


def watch(args):
    sitting, terminal = Session(args.tag), sys.stdout.isatty()
    try:
        while True:
            width, height = shutil.get_terminal_size() if terminal else (100, 40)
            lines = screen(sitting, width, height - 1)
            if not terminal:
                print("\n".join(lines))
                return
            # home, each line with its rest wiped, and all below
            print("\x1b[H" + "".join(line + "\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
            time.sleep(EVERY)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    run_command(watch, options(__doc__).parse_args())
