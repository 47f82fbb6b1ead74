"""Tell an agent that lost the thread where the session stands, in at most 60 lines.

usage: brief.py --tag TAG
"""

from scripts.session import Session, counted, cut, one_line, options, run_command
from scripts.show.night import Night, clock, gain_words

WIDTH, LINES = 120, 60
KEPT, NEAR, DEAD, OPEN = 12, 6, 14, 8  # of each at most


def lines(night):
    if not night.experiments:
        return [f"{night.tag}: no results yet: make baseline", *newest_run(night)]
    found = [f"{night.tag}: {counted(len(night.experiments), 'experiment')} in {clock(night.seconds)}; {night.counts}"]
    found += standing(night)
    found += block("kept, the oldest first:", [entry(e) for e in night.chain[1:]][-KEPT:])
    found += block("put back, though probably better:", [entry(e) for e in night.near_misses[:NEAR]])
    found += block("dead ends, the newest first:", [entry(e) for e in night.dead_ends[:DEAD]])
    found += block("open questions, the newest first:", [f"{e.number:3}  {text}" for e, text in night.questions[:OPEN]])
    if night.plateau:
        found.append(f"plateau: {night.plateau}")
    found += [cut(f"note: {words}", WIDTH) for words in night.missing[:3]]
    return [*found[: LINES - 1], *newest_run(night)][:LINES]


def block(title, entries):
    return [title, *(cut(f"  {text}", WIDTH) for text in entries)] if entries else []


def standing(night):
    """Baseline, best, noise and held-out gain, a line each; the table ends with it, too."""
    if not night.best:
        return ["nothing was kept yet"]
    first, best, found = night.first, night.best, []
    found.append(f"baseline {first.bpb:.6f}  {first.commit}, {counted(len(first.runs), 'run')}")
    if night.gain:
        found.append(f"best     {best.bpb:.6f}  {best.commit}, {counted(len(best.runs), 'run')}; gain "
                     f"{gain_words(night.gain)}; after the winner's curse {gain_words(night.left)}")  # fmt: skip
    found.append(noise(night.evidence))
    if night.held_out:
        found.append(f"held out {night.held_out[0]}, {night.looks[-1]['best']} against the baseline")
    return found


def noise(evidence):
    """How far one run is off, in a line."""
    known = f"by {counted(evidence.df, 'repeat')}" if evidence.df else "a guess: make run REFERENCE=1 N=4 measures it"
    return f"noise    of one run ± {evidence.sigma:.4f}, ± {evidence.same_seed:.4f} between equal seeds; {known}"


def entry(e):
    """An experiment in a line; `make watch` has it, too."""
    gain = f"{gain_words(e.gain)}  " if e.gain else ""
    return f"{e.number:3}  {gain}{e.trust or e.status}  {one_line(e.description)}"


def newest_run(night):
    """What the newest run asks for."""
    last = Session(night.tag).newest()
    if not last:
        return []
    logged = f"row {last['row']}" if last.get("logged") else "not logged: make verdict"
    return [f"newest run: {(last['commit'] or 'none')[:7]}, {last['status']}, {logged}"]


def show(args):
    print("\n".join(lines(Night(args.tag))))


if __name__ == "__main__":
    run_command(show, options(__doc__).parse_args())
