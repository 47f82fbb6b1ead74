"""Show a session's table: its rows with all runs and the gain of each, and where the session stands.

usage: results.py --tag TAG [--all]
"""

from scripts.session import Session, options, run_command, say, tags
from scripts.show.brief import standing
from scripts.show.night import Night, gain_words


def show(args):
    for number, tag in enumerate(tags() if args.all else [args.tag]):
        if args.all:
            print("\n" * (number > 0) + tag)
        else:
            Session(tag).link()
        table(Night(tag))


def table(night):
    for problem in night.problems:
        say(f"note: {problem}")
    if not night.experiments:
        print("no results yet: make baseline")
        return
    head = ("", "commit", "val_bpb", "gain", "runs", "GB", "tok/s", "+/-", "status", "description")
    look = "{:>5} {:8}{:>8}  {:26}{:>4} {:>5} {:>8} {:>8}  {:14}{}"
    print(look.format(*head))
    for e in night.experiments:
        number = f"{e.number}{'*' if e is night.best else ' '}"
        print(look.format(number, e.commit, f"{e.bpb:.6f}", gain_words(e.gain) if e.gain else "", len(e.runs) or "",
                          e.memory, f"{e.rate:.0f}", e.changed, f"{e.status} {e.trust}", e.description))  # fmt: skip
    print("* the best; a kept gain is safe, doubtful or unproven")
    print("\n".join(standing(night)))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--all", action="store_true", help="of every session of this clone")
    run_command(show, parser.parse_args())
