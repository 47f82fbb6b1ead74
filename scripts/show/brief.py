"""Tell an agent that lost the thread where the session stands, in at most 60 lines.

usage: brief.py --tag TAG
"""

import textwrap

from scripts.session import counted, cut, one_line, options, run_command, tags
from scripts.show.night import Night, clock, gain_words

WIDTH, LINES = 120, 60
KEPT, NEAR, DEAD, OPEN, SISTERS = 12, 6, 14, 8, 3  # of each at most


def lines(night):
    if not night.experiments:
        return [f"{night.tag}: no results yet: make baseline", *newest_run(night)]
    found = [f"{night.tag}: {counted(len(night.experiments), 'experiment')} in {clock(night.seconds)}; {night.counts}"]
    found += standing(night)
    found += block("kept, the oldest first:", [entry(e) for e in night.chain[1:]][-KEPT:])
    found += block("put back, though probably better:", [entry(e) for e in night.near_misses[:NEAR]])
    dead = [(part, "; ".join(f"{one_line(e.description)} ({short(e)})" for e in group[::-1]), len(group))
            for part, group in night.dead_ends.items()]  # fmt: skip
    found += block("dead ends, by the part of train.py:", [f"{part}, {n}: {tried}" for part, tried, n in dead[:DEAD]])
    found += block("open questions, the newest first:", [f"{e.number:3}  {text}" for e, text in night.questions[:OPEN]])
    found += sisters(night.tag)
    if night.untouched:
        found += wrapped("not touched by any experiment: " + ", ".join(night.untouched), 4)
    if night.plateau:
        found.append(f"plateau: {night.plateau}")
    found += [cut(f"note: {words}", WIDTH) for words in night.missing[:3]]
    return [*found[: LINES - 1], *newest_run(night)][:LINES]


def block(title, entries):
    return [title, *(cut(f"  {text}", WIDTH) for text in entries)] if entries else []


def wrapped(text, most):
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", max_lines=most, placeholder=" …")


def standing(night):
    """Baseline, best, noise and held-out gain, a line each; the table ends with it, too."""
    if not night.best:
        return ["nothing was kept yet"]
    first, best, found = night.first, night.best, []
    found.append(f"baseline {first.bpb:.6f}  {first.commit}, {counted(len(first.runs), 'run')}")
    if night.gain:
        found.append(f"best     {best.bpb:.6f}  {best.commit}, {counted(len(best.runs), 'run')}; gain "
                     f"{gain_words(night.gain)}; after the winner's curse {gain_words(night.left)}")  # fmt: skip
    sigma, repeats = night.evidence.sigma, night.evidence.df
    known = f"by {counted(repeats, 'repeat')}" if repeats else "a guess: make run REFERENCE=1 N=4 measures it"
    found.append(f"noise    of one run ± {sigma:.4f}, ± {night.evidence.same_seed:.4f} between equal seeds; {known}")
    if night.held_out:
        found.append(f"held out {night.held_out[0]}, {night.looks[-1]['best']} against the baseline")
    return found


def sisters(tag):
    """What the other sessions of this clone have tried, the last changed first: another agent may be at work beside."""
    found = []
    for night in map(Night, [other for other in reversed(tags()) if other != tag][:SISTERS]):
        if night.kept:
            ideas = "; ".join(f"{one_line(e.description)} ({e.status})" for e in night.experiments[:0:-1])
            gain = gain_words(night.gain) if night.gain else "none"
            tried = counted(len(night.experiments), "experiment")
            found += wrapped(f"session {night.tag}: {tried}, gain {gain}: {ideas}", 3)
    return found


def short(e):
    return f"{e.gain.gain:+.4f}" if e.gain else e.status


def entry(e):
    trust = f"  {e.trust}" if e.trust else ""
    where = f"  in {', '.join(e.parts[:2])}" if e.parts else ""
    return f"{e.number:3}  {gain_words(e.gain)}{trust}  {one_line(e.description)[:60]}{where}"


def newest_run(night):
    """What the newest run asks for."""
    own = [a for a in night.attempts if a["role"] == "candidate"]
    if not own:
        return []
    last = own[-1]
    what = f"row {last['row']}" if last.get("logged") else "running" if last["status"] == "running" else "not logged"
    mend = ": make verdict" if what == "not logged" and last["status"] == "valid" else ""
    return [f"newest run: {(last['commit'] or 'none')[:7]}, {last['status']}, {what}{mend}"]


def show(args):
    print("\n".join(lines(Night(args.tag))))


if __name__ == "__main__":
    run_command(show, options(__doc__).parse_args())
