"""What the agent is told when a run has ended: at most 15 lines, the last of them what to type next."""

import re

from scripts import session
from scripts.judge import verdict
from scripts.session import ROOT, Refused, blanked, counted, one_line, record

EXIT = {"valid": 0, "crash": 2, "invalid": 2, "paused": 2, "stale": 3, "timeout": 124, "interrupted": 130}
FIGURES = {"val_bpb": 6, "peak_memory_mb": 1, "avg_tok_sec": 0, "total_steps": 0, "eval_seconds": 1}  # and decimals
FRAMES = 4  # of train.py, that a crash shows
SHOWN = 8  # last lines of run.log where there is no traceback


def lines(sitting, attempt, baseline=False):
    """The summary of a run (see run.py) in the session `sitting`."""
    if attempt["status"] != "valid":
        return failure(attempt, verdict.typed("make baseline", attempt) if baseline else None)
    if attempt["role"] == "reference" and attempt["pair"]:  # its other half came before it
        attempt = sitting.candidate()
    run = session.record_of(attempt)
    disturbed = [f"busy     {words}{alone(attempt, run, baseline)}"] if (words := verdict.busy(run)) else []
    if attempt["role"] == "reference":
        waits = [a for a in sitting.attempts() if a["role"] == "candidate"][-1:]  # for what this run was made
        then = ["next     make verdict" for a in waits if a["status"] == "valid" and not a.get("logged")]
        return [brief(attempt), *disturbed, standing(attempt["train_blob"], run), *then]
    found = [f"valid    {(attempt['commit'] or '0' * 7)[:7]}  {attempt['wall_seconds']:.0f} s in all"]
    decision = row = old = refused = None
    try:
        decision, row, _, old = verdict.of_attempt(sitting, attempt, sitting.rows()[0])
    except verdict.Incomparable as refusal:
        refused = refusal
    if decision and decision.word == "again":
        told = [brief(attempt), *disturbed, f"verdict  again: {decision.rule}"]
        return [*told, standing(attempt["train_blob"], run), "next     change train.py"]
    found += figures(run, decision, old)
    if refused:
        again = verdict.typed("make baseline AGAIN=1", attempt)
        mend = f"make run BUDGET={refused.budget:g}" if refused.budget else again
        return [*found, *disturbed, f"verdict  none: {refused}", f"next     make discard, or {mend}"]
    if row:
        found.append(f"against  {row.commit}  {row.description[:60]}")
    if row and (decision.new.runs, decision.old.runs) != (1, 1):
        found.append(f"decided  by {verdict.change(decision)}")
    found += [f"note     {verdict.typed(note, attempt)}" for note in decision.notes] + disturbed
    found.append(f"verdict  {decision.word}: {decision.rule}")
    if baseline:  # baseline.sh does the next step itself
        return found
    choice = decision.word if decision.word in ("keep", "discard") else "keep|discard"
    wanted = verdict.typed(decision.next, attempt) or f"make log-result STATUS={choice} DESC=…"
    return [*found, f"next     {wanted}"]


def alone(attempt, run, baseline):
    """What is added where a disturbed run does not count, because the program has quiet ones, or need not count."""
    if verdict.side(attempt["train_blob"], run)[0].quiet and not attempt["pair"]:
        return f"; this run (val_bpb {record.bpb(run):.6f}) does not count beside its quiet ones"
    again = verdict.typed("make run REFERENCE=1", attempt)
    return f"; when it is quiet, {again} makes one that counts instead" if baseline else ""


def figures(run, decision, old):
    """Five figures with their change against the reference; val_bpb, throughput and steps as means over all runs."""
    new, change = {**run["training"], "val_bpb": record.bpb(run)}, {}
    if decision and decision.old:
        new |= {"val_bpb": decision.new.bpb, "avg_tok_sec": decision.new.rate, "total_steps": steps(decision.new, run)}
        change = {"val_bpb": f"{-decision.gain:+.6f}", "avg_tok_sec": f"{100 * decision.faster:+.1f} %"}
    if old:
        change |= {key: f"{new[key] - old['training'][key]:+.1f}" for key in ("peak_memory_mb", "eval_seconds")}
        change["total_steps"] = f"{new['total_steps'] - steps(decision.old, old):+d}"
    return [f"{key:14} {new[key]:>13.{digits}f}  {change.get(key, '')}".rstrip() for key, digits in FIGURES.items()]


def steps(side, run):
    """As many as one of its runs took, had it been as fast as all of them were in the mean."""
    return round(run["training"]["total_steps"] * side.rate / record.tok_sec(run))


def brief(attempt):
    """One line on a run that is one of several."""
    run = session.record_of(attempt)
    words = f"{attempt['role']:9} {(attempt['commit'] or '0' * 7)[:7]}  seed {attempt['seed']}"
    return f"{words}  val_bpb {record.bpb(run):.6f}, {record.tok_sec(run):.0f} tok/s"


def standing(blob, run):
    """All runs of a program in one line, and the noise that they and others show."""
    side, noise = verdict.side(blob, run)[0], verdict.quiet_noise(run)
    words = f"stands   {counted(side.runs, 'run')}, mean val_bpb {side.bpb:.6f}"
    if apart := len(side.bpbs) - side.runs:
        words += f" ({counted(apart, 'disturbed run')} left out)"
    if noise.df:
        words += f"; noise of a run ± {noise.bpb:.6f}{verdict.same_seed(noise)}, {100 * noise.rate:.1f} % tok/s"
        words += f" ({noise.df} degrees of freedom)"
    return words


# --- a run that failed ---------------------------------------------------------------------------------


def failure(attempt, again=None):
    """again: what to type where there is nothing to log, instead of make run."""
    commit, status = (attempt["commit"] or "0" * 7)[:7], attempt["status"]
    code = attempt["exit_code"] if status == "interrupted" else EXIT[status]  # train.py's, where a signal came
    found = [f"{status} (exit {code}) {commit}: {one_line(attempt['reason'])}"]
    if status in ("crash", "stale", "timeout"):
        found += [f"  | {line}" for line in last_words(ROOT / "run.log")]
    if status in ("interrupted", "paused"):
        return [*found, f"next     {again or verdict.typed('make run', attempt)}"]
    found.append("log      tail -n 50 run.log")
    if again:
        return [*found, f"next     mend it and commit, then {again}: ideas are compared with it"]
    return [*found, 'next     mend it and commit, or: make log-result STATUS=crash DESC="…"']


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
