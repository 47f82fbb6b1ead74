"""Tell an agent that lost the thread where the session stands, in at most 60 lines.

usage: brief.py --tag TAG
"""

import math
import textwrap

from scripts.judge import verdict
from scripts.session import Session, counted, cut, one_line, options, run_command, tags
from scripts.show.night import Night, clock, wide

WIDTH, LINES = 120, 60
KEPT, NEAR, DEAD, OPEN, SISTERS = 12, 6, 14, 8, 3  # of each at most


def lines(night):
    counts, found = night.by_outcome, []
    if not night.experiments:
        return [f"{night.tag}: no results yet: make baseline", *at_hand(night)]
    tried = f"{len(night.kept[1:])} kept after the baseline, {counts['discard']} discarded, {counts['crash']} crashed"
    found.append(
        f"{night.tag}: {counted(len(night.experiments), 'experiment')} in {clock(3600 * night.hours)}; {tried}"
    )
    found += standing(night)
    if len(night.chain) > 1:
        found.append("kept, the oldest first:" + left_out(night.chain[1:], KEPT))
        found += [entry(e) for e in night.chain[1:][-KEPT:]]
    if night.near_misses:
        found.append("near misses, within the noise, or undecided:" + left_out(night.near_misses, NEAR))
        found += [entry(e) for e in night.near_misses[:NEAR]]
    groups = list(night.dead_ends.items())
    if groups:
        found.append("dead ends, by the part of train.py:" + left_out(groups, DEAD))
        for part, group in groups[:DEAD]:
            tried = "; ".join(f"{one_line(e.description)} ({outcome(e)})" for e in group[::-1])
            found.append("  " + textwrap.shorten(f"{part}, {len(group)}: {tried}", WIDTH + 2, placeholder=" …"))
    if night.questions:
        found.append("open questions, the newest first:" + left_out(night.questions, OPEN))
        found += [cut(f"  {e.number:3}  {text}", WIDTH) for e, text in night.questions[:OPEN]]
    found += sisters(night.tag)
    if night.untouched:
        found += cut_block("not touched by any experiment: " + ", ".join(night.untouched), 4)
    if night.due:
        found.append(f"plateau: no kept gain in {night.since_gain} experiments. Due: {night.due}")
    found += [cut(f"note: {words}", WIDTH) for words in night.missing[:3]]
    return [*found[: LINES - 1], *at_hand(night)][:LINES]


def standing(night):
    if not night.best:
        return ["nothing was kept yet"]
    first, best, (gain, half) = night.first, night.best, night.gain
    found = [f"baseline {first.bpb:.6f} ({first.commit}, {counted(first.count, 'run')})"]
    if best is not first:
        width = "" if math.isnan(half) else f" ± {half:.6f}"
        worth = night.expected[0]
        after = "" if math.isnan(worth) else f"; after the winner's curse {worth:+.6f}"
        runs = counted(best.count, "run")
        found.append(f"best     {best.bpb:.6f} ({best.commit}, {runs}), gain {gain:+.6f}{width}{after}")
    if (noise := night.noise).df == 1:
        words = night.typed("its size is hardly known: make run REFERENCE=1 N=4")
        found.append(f"noise    of a run {noise.bpb:.6f} by two runs of one program; {words}")
    elif noise.df:
        seen = wide(noise.bpb, noise.df, verdict.LOOKS[0][1]) * math.sqrt(1 + 1 / max(1, night.kept[-1].count))
        if noise.same_seed_df:
            seen = min(seen, wide(noise.same_seed, noise.same_seed_df, verdict.SEED_LOOKS[0][1]) * math.sqrt(2))
        found.append(f"noise    of a run {noise.bpb:.6f}{verdict.same_seed(noise)} ({noise.df} degrees of freedom): "
                     f"one run shows a gain from {seen:.6f} on")  # fmt: skip
    if night.look:
        fresh = night.look["test"][0]
        found.append(f"held out {fresh:+.6f}, {night.look['baseline']} against {night.look['best']}")
    return found


def sisters(tag):
    """What the other sessions of this clone have tried, the last changed first: another agent may be at work beside."""
    found = []
    for other in [t for t in reversed(tags()) if t != tag]:
        rows = Session(other).rows()[0]
        kept = [row for row in rows if row.status == "keep"]
        if kept and len(found) < SISTERS:
            ideas = [f"{one_line(row.description)} ({row.status})" for row in reversed(rows) if row is not kept[0]]
            gain = min(row.bpb for row in kept) - kept[0].bpb
            words = f"session {other}: {counted(len(rows), 'experiment')}, best {gain:+.4f} to its baseline"
            found.append(cut_block(words + ": " * bool(ideas) + "; ".join(ideas), 3))
    return [line for block in found for line in block]


def outcome(e):
    return "crash" if e.status == "crash" else f"{e.gain:+.4f}" if not math.isnan(e.gain) else e.status


def entry(e):
    error = "" if math.isnan(e.error) else f" ± {e.error:.4f}"
    where = f"  in {', '.join(e.parts[:2])}" if e.parts else ""
    return cut(f"  {e.number:3}  {outcome(e)}{error}  {one_line(e.description)[:70]}{where}", WIDTH)


def left_out(found, most):
    return f" ({most} of {len(found)})" if len(found) > most else ""


def cut_block(text, most):
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", max_lines=most, placeholder=" …")


def at_hand(night):
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
