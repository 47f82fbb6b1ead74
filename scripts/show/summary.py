"""What the agent is told when a run has ended: at most 15 lines, the last of them what to type next."""

import re
from itertools import dropwhile

from harness.files import printable
from harness.project import SEED
from scripts import session
from scripts.judge import verdict
from scripts.judge.evidence import Evidence, busy, gain_words, of_session
from scripts.session import ROOT, Refused, Session, counted, one_line, options, run_command
from scripts.show.terminal import noise

EXIT = {"valid": 0, "crash": 2, "invalid": 2, "paused": 2, "stale": 3, "timeout": 124, "interrupted": 130}
IDEA = "next     change train.py"
SHOWN = 8  # last lines of run.log
GIVE_UP = 'make log-result STATUS=crash DESC="…"; make discard'


def lines(this_session, attempt, baseline=False):
    """The summary of a run (see experiment.py) in the session `this_session`."""
    if attempt["status"] != "valid":
        return failure(attempt, baseline)
    run, rows = session.record_of(attempt), this_session.rows()[0]
    disturbed = [f"busy     {words}"] if run and (words := busy(run)) else []
    made = [attempt] if attempt["role"] == "reference" and not attempt["pair"] else []
    if attempt["role"] == "reference":  # made for the candidate that waits, if one does
        waits = this_session.newest()
        if not waits or waits["status"] != "valid" or waits.get("logged"):
            evidence = Evidence(of_session(this_session.attempts(), rows, run)[1])
            return [*map(brief, made), *disturbed, "noise    {}; {}".format(*noise(evidence)), IDEA]
        attempt = waits  # what follows is about the candidate
    try:
        decision = verdict.of_attempt(this_session, attempt, rows)
    except verdict.Incomparable as refused:
        told = f"verdict  none: {refused}", "next     make discard; make baseline AGAIN=1"
        return [*map(brief, made), *disturbed, *told]
    if decision.word == "again":
        told = f"verdict  again: {decision.rule}", "noise    {}; {}".format(*noise(decision.evidence))
        return [*map(brief, made or [attempt]), *disturbed, *told, IDEA]
    found = [brief(reference, measured=False) for reference in made]  # beside a load that would read as a gap
    ran = f"valid    {(attempt['commit'] or '0' * 7)[:7]}  {attempt['wall_seconds']:.0f} s in all"
    is_open = decision.word == "rerun" and not attempt.get("logged")  # the rest is told when it is settled
    found = found or [ran] if is_open else [*found, ran, *figures(decision), *disturbed]
    found.append(f"verdict  {decision.word}: {verdict.reason(decision, gain=is_open)}")
    return found if baseline else [*found, f"next     {then(decision, attempt)}"]  # baseline.sh does the next step


def then(decision, attempt):
    """What to type after a verdict."""
    if attempt.get("logged"):
        return f"it is logged, as row {attempt['row']}: change train.py"
    if decision.next:
        return decision.next
    status = decision.word if decision.word in ("keep", "discard") else "keep|discard"
    return f'make log-result STATUS={status} DESC="…"' + "; make discard" * (status == "discard")


def figures(decision):
    """val_bpb and throughput by all runs of the program, three figures of this run, what it is compared with, notes."""
    training, result, seen = decision.run["training"], decision.run["result"], decision.seen
    some = result.get("eval_rows") != result.get("eval_rows_of")
    rows = "{eval_rows} of {eval_rows_of} rows, ± {val_bpb_stderr:.4f} over rows".format(**result) if some else ""
    gain, faster = (f"gain {gain_words(seen)}", f"{100 * seen.faster:+.1f} %") if seen else ("", "")
    shown = (("val_bpb", f"{decision.new.bpb:.6f}", gain),
             ("peak_memory_mb", f"{training['peak_memory_mb']:.1f}", ""),
             ("avg_tok_sec", f"{decision.new.rate:.0f}", faster),
             ("total_steps", training["total_steps"], "in this run"),
             ("eval_seconds", f"{training['eval_seconds']:.1f}", rows))  # fmt: skip
    found = [f"{name:14} {value:>13}  {words}".rstrip() for name, value, words in shown]
    if row := decision.row:
        runs = f"{counted(decision.new.runs, 'run')} against {decision.old.runs}"
        found.append(f"against  {row.commit}  val_bpb {decision.old.bpb:.6f}, {runs}: {row.description[:20]}")
    return found + [f"note     {note}" for note in decision.notes]


def brief(attempt, measured=True):
    """One line on a run that is one of several, with what was measured or without."""
    words, run = f"{attempt['role']:9} {(attempt['commit'] or '0' * 7)[:7]}", session.record_of(attempt)
    found = f"  val_bpb {run['result']['val_bpb']:.6f}, {run['training']['avg_tok_sec']:.0f} tok/s" if measured else ""
    return f"{words}  seed {attempt['seed']}{found}"


def failure(attempt, baseline=False):
    """baseline: there is nothing to log yet, and make baseline is typed again."""
    status = attempt["status"]
    found = [f"{status} (exit {EXIT[status]}) {(attempt['commit'] or '0' * 7)[:7]}: {one_line(attempt['reason'])}"]
    if attempt.get("logged"):
        return [*found, f"next     {then(None, attempt)}"]
    if status in ("interrupted", "paused") or attempt["role"] == "reference":
        more = " PAIR=1" if attempt["pair"] else " REFERENCE=1" if attempt["role"] == "reference" else ""
        more = more or " AGAIN=1" * (attempt.get("seed", SEED) != SEED)  # a plain run would be refused
        return [*found, f"next     make {'baseline' if baseline else 'run'}{more}"]
    if status != "invalid":
        found += [f"  | {line[:160]}" for line in printed(ROOT / "run.log")[-SHOWN:]]
    run = "make baseline: ideas are compared with it" if baseline else f"make run; or: {GIVE_UP}"
    return [*found, "log      tail -n 50 run.log", f"next     mend it and commit, then {run}"]


def printed(path):
    """The lines at the end of a log, without what a progress line has overwritten and without control characters."""
    text = path.read_bytes()[-40000:].decode("utf-8", "replace") if path.exists() else ""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split("\n")
    shown = [printable(line.rstrip("\r").rsplit("\r", 1)[-1]).rstrip() for line in plain]
    return [line for line in shown if line]


def what_was_raised(path):
    """The exception of the last traceback with all its lines and notes; without one the last line that holds a word."""
    text = [line for line in printed(path) if re.search(r"\w", line)]
    starts = [i for i, line in enumerate(text) if line.startswith("Traceback (most recent call last)")]
    raised = list(dropwhile(lambda line: line[0] == " ", text[starts[-1] + 1 :])) if starts else []
    return one_line(" ".join(raised or text[-1:]))[:400]


def show(args):
    """`make verdict`: the summary of the newest run once more."""
    this_session = Session(args.tag)
    this_session.link()
    attempt = this_session.candidate()
    if attempt["status"] == "running":
        raise Refused("the run has not ended yet")
    told = lines(this_session, attempt)
    if attempt["status"] != "valid":
        raise Refused(f"the newest run has no result: {told[0]}; {told[-1].removeprefix('next     ')}")
    print("\n".join(told))


if __name__ == "__main__":
    run_command(show, options(__doc__).parse_args())
