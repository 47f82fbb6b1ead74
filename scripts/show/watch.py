"""One screen that follows a session: the running experiment, the last rows, the best, the load.

usage: watch.py --tag TAG

It reads files and nothing else, and looks at the whole session only when that has changed: a run does not notice it.
"""

import os
import shutil
import sys
import time

from scripts.session import Session, blanked, counted, cut, options, run_command
from scripts.show.brief import entry, newest_run, standing
from scripts.show.night import Night

EVERY = 1.0  # seconds
ROWS = 12


def screen(night):
    """What there is to see, as lines."""
    tried = counted(len(night.experiments), "experiment")
    lines = [f"{night.tag}: {tried}; {night.counts}; load {os.getloadavg()[0]:.1f} of {os.cpu_count()}"]
    return [*lines, *standing(night), "", *newest_run(night), "", *map(entry, night.experiments[: -1 - ROWS : -1])]


def watch(args):
    session, seen, night = Session(args.tag), None, None
    while True:
        now = [path.stat().st_mtime_ns for path in (session.log, session.table) if path.exists()]
        if now != seen:
            seen, night = now, Night(args.tag)
        width, height = shutil.get_terminal_size((100, 40))
        lines = [cut(blanked(line), width) for line in screen(night)][: height - 1]
        if not sys.stdout.isatty():
            print("\n".join(lines))
            return
        # home, each line with its rest wiped, and all below
        print("\x1b[H" + "".join(line + "\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
        time.sleep(EVERY)


if __name__ == "__main__":
    run_command(watch, options(__doc__).parse_args())
