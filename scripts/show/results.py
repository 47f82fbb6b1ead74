"""Show a session's table: its rows with all runs and the gain of each, and where the session stands.

usage: results.py --tag TAG [--all]
"""

from scripts.judge.evidence import gain_words
from scripts.session import Session, options, run_command, say, tags
from scripts.show.brief import standing
from scripts.show.night import Night

COLUMNS = ("", "commit", "val_bpb", "gain", "runs", "GB", "tok/s", "+/-", "status", "description")
LOOK = "{:>5} {:8}{:>8}  {:26}{:>4} {:>5} {:>8} {:>8}  {:14}{}"


def show(args):
    if not args.all:
        Session(args.tag).link()
        return table(Night(args.tag))
    for tag in tags():
        print(f"\n{tag}")
        table(Night(tag))


def table(night):
    for problem in night.problems:
        say(f"note: {problem}")
    if not night.experiments:
        return print("no results yet: make baseline")
    print(LOOK.format(*COLUMNS))
    for e in night.experiments:
        gain, number = gain_words(e.gain) if e.gain else "", f"{e.number}{'*' if e is night.best else ' '}"
        print(LOOK.format(number, e.commit, f"{e.bpb:.6f}", gain, len(e.runs) or "", e.memory, f"{e.rate:.0f}",
                          e.changed, f"{e.status} {e.trust}", e.description))  # fmt: skip
    print("* the best; a kept gain is safe, doubtful or unproven")
    print("\n".join(standing(night)))


if __name__ == "__main__":
    run_command(show, options(__doc__, all=False).parse_args())
