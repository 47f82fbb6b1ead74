"""What the agent is told when a run has ended: at most 15 lines, the last of them what to type next."""

import re

from scripts import session
from scripts.judge import verdict
from scripts.judge.observations import busy
from scripts.session import ROOT, Refused, blanked, counted, one_line, record
from scripts.show.brief import standing
from scripts.show.night import Night, gain_words

EXIT = {"valid": 0, "crash": 2, "invalid": 2, "paused": 2, "stale": 3, "timeout": 124, "interrupted": 130}
FRAMES = 4  # of train.py, that a crash shows
SHOWN = 8  # last lines of run.log where there is no traceback


def lines(sitting, attempt, baseline=False):
    """The summary of a run (see experiment.py) in the session `sitting`."""
    if attempt["status"] != "valid":
        return failure(attempt, "make baseline" if baseline else None)
    run, found = session.record_of(attempt), []
    disturbed = [f"busy     {words}"] if (words := busy(run)) else []
    night = Night(sitting.tag)
    if attempt["role"] == "reference":  # made for the candidate that waits, if one does
        found = [] if attempt["pair"] else [brief(attempt)]
        waits = [a for a in sitting.attempts() if a["role"] == "candidate"][-1:]
        if not waits or waits[0]["status"] != "valid" or waits[0].get("logged"):
            return [*found, *disturbed, *noise(night), "next     change train.py"]
        attempt = waits[0]
        run = session.record_of(attempt)
    try:
        decision, row, _, _ = verdict.of_attempt(sitting, attempt, sitting.rows()[0])
    except verdict.Incomparable as refused:
        mend = f"make run BUDGET={refused.budget:g}" if refused.budget else "make baseline AGAIN=1"
        return [*found, *disturbed, f"verdict  none: {refused}", f"next     make discard, or {mend}"]
    if decision.word == "again":
        found += [] if found else [brief(attempt)]
        return [*found, *disturbed, f"verdict  again: {decision.rule}", *noise(night), "next     change train.py"]
    found.append(f"valid    {(attempt['commit'] or '0' * 7)[:7]}  {attempt['wall_seconds']:.0f} s in all")
    found += figures(run, decision, row, night)
    if row:
        runs = f"{counted(decision.new.runs, 'run')} against {decision.old.runs}"
        old = f"val_bpb {mean(night, row.blob, row.bpb):.6f}"
        found.append(f"against  {row.commit}  {old}, {runs}: {row.description[:60]}")
    found += [f"note     {note}" for note in decision.notes] + disturbed
    found.append(f"verdict  {decision.word}: {verdict.reason(decision)}")
    return found if baseline else [*found, f"next     {then(decision)}"]  # baseline.sh does the next step itself


def then(decision):
    """What to type after a verdict."""
    if decision.next:
        return decision.next
    status = decision.word if decision.word in ("keep", "discard") else "keep|discard"
    return f'make log-result STATUS={status} DESC="…"' + "; make discard" * (status == "discard")


def figures(run, decision, row, night):
    """Five figures: val_bpb and throughput by all runs of the program, with what changed; the rest by this run."""
    training, blob, gain, faster = run["training"], run["train_blob"], "", ""
    if row and night.knows(blob) and night.knows(row.blob):
        seen = night.evidence.compare(blob, row.blob)
        gain, faster = f"gain {gain_words(seen)}", f"{100 * seen.faster:+.1f} %"
    shown = (("val_bpb", f"{mean(night, blob, record.bpb(run)):.6f}", gain),
             ("peak_memory_mb", f"{training['peak_memory_mb']:.1f}", ""),
             ("avg_tok_sec", f"{decision.new.rate:.0f}", faster),
             ("total_steps", training["total_steps"], ""),
             ("eval_seconds", f"{training['eval_seconds']:.1f}", ""))  # fmt: skip
    return [f"{name:14} {value:>13}  {words}".rstrip() for name, value, words in shown]


def mean(night, blob, otherwise):
    """val_bpb of a program by all its runs; `otherwise` where it has none that compare."""
    return night.evidence.mean(blob) if night.knows(blob) else otherwise


def noise(night):
    return [line for line in standing(night) if line.startswith("noise")]


def brief(attempt):
    """One line on a run that is one of several."""
    run = session.record_of(attempt)
    words = f"{attempt['role']:9} {(attempt['commit'] or '0' * 7)[:7]}  seed {attempt['seed']}"
    return f"{words}  val_bpb {record.bpb(run):.6f}, {record.tok_sec(run):.0f} tok/s"


# --- a run that failed ---------------------------------------------------------------------------------


def failure(attempt, again=None):
    """again: what to type where there is nothing to log, instead of make run."""
    commit, status = (attempt["commit"] or "0" * 7)[:7], attempt["status"]
    code = attempt["exit_code"] if status == "interrupted" else EXIT[status]  # train.py's, where a signal came
    found = [f"{status} (exit {code}) {commit}: {one_line(attempt['reason'])}"]
    if status in ("interrupted", "paused"):
        return [*found, f"next     {again or 'make run'}"]
    if status != "invalid":
        found += [f"  | {line}" for line in last_words(ROOT / "run.log")]
    give_up = 'or: make log-result STATUS=crash DESC="…"; make discard'
    mend = f"then {again}: ideas are compared with it" if again else give_up
    return [*found, "log      tail -n 50 run.log", f"next     mend it and commit, {mend}"]


def printed(path):
    """The lines at the end of a log, without what a progress line has overwritten and without control characters."""
    if not path.exists():
        return []
    text = path.read_bytes()[-40000:].decode("utf-8", "replace")
    plain = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line.rstrip("\r").rsplit("\r", 1)[-1]) for line in text.split("\n")]
    plain = [blanked(line).rstrip() for line in plain]
    return [line for line in plain if line.strip()]


def what_was_raised(path):
    """The exception of the last traceback with all its lines and notes; without one the last line that holds a word."""
    text = printed(path)
    starts = [i for i, line in enumerate(text) if line.startswith("Traceback (most recent call last)")]
    raised = [i for i in range(starts[-1] + 1, len(text)) if text[i][0] != " "] if starts else []
    raised = raised or [i for i, line in enumerate(text) if re.search(r"\w", line)][-1:]
    return one_line(" ".join(text[raised[0] :]))[:400] if raised else ""


def last_words(path):
    """The frames of train.py in the last traceback, or else the log's last lines but the one that the reason has."""
    text = [line for line in printed(path) if not re.fullmatch(r"[\s~^]+", line)]
    starts = [i for i, line in enumerate(text) if line.startswith("Traceback (most recent call last)")]
    if starts:
        text = text[starts[-1] :]
        frames = [i for i, line in enumerate(text) if re.match(r'\s+File ".*train\.py", line \d+', line)]
        return [line[:160] for i in frames[-FRAMES:] for line in text[i : i + 2]]
    return [line[:160] for line in text[-SHOWN - 1 : -1]]


def can_be_a_row(sitting, attempt, rows):
    """Whether log-result would take it: a short try with another budget, say, has no place in the table.

    Nor has a repeat of what was discarded, which so may be discarded again.
    """
    repeat = any((row.blob, row.status) == (attempt["train_blob"], "discard") for row in rows)
    if attempt["status"] != "valid" or repeat:
        return False
    try:
        return verdict.of_attempt(sitting, attempt, rows)[0].word != "again"
    except Refused:
        return False
