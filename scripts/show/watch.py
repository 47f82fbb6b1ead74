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
from scripts.show.brief import entry, standing
from scripts.show.night import Night

EVERY = 1.0  # seconds
ROWS = 12


def screen(night, width, height):
    """What there is to see, as lines that fit."""
    tried = counted(len(night.experiments), "experiment")
    lines = [f"{night.tag}: {tried}; {night.counts}; load {os.getloadavg()[0]:.1f} of {os.cpu_count()}"]
    lines += [*standing(night), "", *newest(night.attempts), "", *map(entry, night.experiments[: -1 - ROWS : -1])]
    return [cut(blanked(line), width) for line in lines][:height]


def newest(attempts):
    """The run that goes on, or how the last one ended."""
    if not attempts:
        return ["no run yet"]
    last = attempts[-1]
    name = f"{(last['commit'] or 'none')[:7]} {last['role']}, seed {last['seed']}"
    if last["status"] != "running":
        return [f"last     {name}: {last['status']}", *filter(None, [one_line(last.get("reason"))])]
    since = (datetime.now().astimezone() - datetime.fromisoformat(last["started"])).total_seconds()
    now = files.read_json(PROGRESS) or {}
    if now.get("attempt") != last["id"]:
        return [f"run      {name}: starting, {since:.0f} s"]
    left = now["budget"] - now["seconds"]
    state = f"{100 * now['seconds'] / now['budget']:.0f} %, {left:.0f} s left" if left > 0 else "evaluating"
    return [f"run      {name}: {state}", f"step     {now['step']}, loss {now['loss']:.4f}, {now['tok_sec']:,.0f} tok/s"]


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
