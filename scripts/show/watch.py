"""One screen that follows a session: the running experiment, the last rows, the best, the load.

usage: watch.py --tag TAG

It reads files and nothing else, and looks at the whole session only when that has changed: a run does not notice it.
"""

import os
import shutil
import sys
import time
from datetime import datetime

from harness import files
from scripts.session import PROGRESS, Session, blanked, counted, cut, one_line, options, run_command
from scripts.show.night import Night, gain_words

EVERY = 1.0  # seconds
ROWS = 10


def screen(night, width, height):
    """What there is to see, as lines that fit."""
    load, kept = os.getloadavg()[0], len(night.kept)
    tried = counted(len(night.experiments), "experiment")
    lines = [f"{night.tag}  {tried}, {kept} kept   load {load:.1f} of {os.cpu_count()}"]
    if night.best:
        gain = f", gain {gain_words(night.gain)}" if night.gain else ""
        lines.append(f"best   {night.best.bpb:.6f}, row {night.best.number}{gain}")
    lines += ["", *newest(night.attempts, width), ""]
    for e in night.experiments[: -1 - max(1, min(ROWS, height - len(lines) - 2)) : -1]:
        mark, gain = "*" if e is night.best else " ", gain_words(e.gain) if e.gain else ""
        lines.append(f"{e.number:4}{mark} {f'{e.status} {e.trust}':13} {gain:25} {e.description}")
    return [cut(blanked(line), width) for line in lines][:height]


def newest(attempts, width):
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
    state = f"{now['budget'] - now['seconds']:.0f} s left" if share < 1 else "evaluating"
    return [f"run    {name}, {since:.0f} s", f"       [{bar}] {100 * share:.0f} %, {state}",
            f"       step {now['step']}, loss {now['loss']:.4f}, {now['tok_sec']:,.0f} tok/s"]  # fmt: skip


def watch(args):
    session, terminal, seen, night = Session(args.tag), sys.stdout.isatty(), (), None
    try:
        while True:
            now = [path.stat().st_mtime_ns for path in (session.log, session.table) if path.exists()]
            if now != seen:
                seen, night = now, Night(args.tag)
            width, height = shutil.get_terminal_size() if terminal else (100, 40)
            lines = screen(night, width, height - 1)
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
