"""The rule for keeping: a record against the last kept run. It reads, and changes nothing."""

from types import SimpleNamespace

from records import Incomparable, archives, differences, figures, record_of_row


def judge(new, old):
    """The table of the rule for keeping. Returns (verdict, the rule that decided).

    Exact at its edges: val_bpb in whole millionths, throughput in whole tokens a second.
    """
    change = new.micro_bpb - old.micro_bpb  # below 0: improved
    slower = 100 * new.tok_sec < 85 * old.tok_sec

    def faster(percent):
        return 100 * new.tok_sec > (100 + percent) * old.tok_sec

    if change < 0 and not slower:
        return "keep", "val_bpb improved, throughput fell by at most 15 %"
    if change < 0 and change > -5000:
        return "discard", "val_bpb improved by less than 0.005, throughput fell by more than 15 %"
    if change < 0:
        return "judge", "val_bpb improved by 0.005 or more, throughput fell by more than 15 %"
    if change <= 1000 and faster(10):
        return "keep", "val_bpb within 0.001, throughput rose by more than 10 %"
    if change < 3000 and faster(25):
        return "keep", "val_bpb worse by less than 0.003, throughput rose by more than 25 %"
    if change == 0:
        return "discard", "val_bpb no better, and not enough throughput gained (less code may still be worth it)"
    return "discard", "val_bpb worse, and not enough throughput gained"


def noise(new, old):
    """The standard error of the difference of two evaluations; below it there is nothing to see."""
    errors = [r["result"].get("val_bpb_stderr") or 0.0 for r in (new, old)]
    return sum(e * e for e in errors) ** 0.5


def last_kept(rows):
    kept = [row for row in rows if row.status == "keep"]
    return kept[-1] if kept else None


def decide(record, rows):
    """Compare a record with the last kept run.

    Returns a namespace: verdict, rule, base (row or None), old and new figures, runs (how many were averaged),
    old_record (or None), note. Raises Incomparable where the two may not be compared.
    """
    new, base = figures(record), last_kept(rows)
    result = SimpleNamespace(verdict="keep", rule="nothing was kept before", base=base, new=new, old=None, runs=1,
                             old_record=None, note="")  # fmt: skip
    if base is None:
        return result
    old_record = result.old_record = record_of_row(base, but=record["run_id"])
    result.old = base.figures
    if old_record is None:
        result.note = f"the record of {base.commit} is not in data/: its row was compared, dataset and device were not"
    elif unlike := differences(record, old_record):
        refusal = Incomparable(f"not comparable with the last kept run {base.commit}: {'; '.join(unlike)}")
        if len(unlike) == 1 and record["budget"] != old_record["budget"]:
            refusal.budget = old_record["budget"]
        raise refusal
    same = [r for r in archives() if r["train_blob"] == record["train_blob"] and not differences(r, record)]
    if old_record and old_record["train_blob"] != record["train_blob"] and len(same) > 1:
        # run again: the mean of all its runs decides
        result.runs = len(same)
        result.new = SimpleNamespace(
            micro_bpb=round(sum(figures(r).micro_bpb for r in same) / len(same)),
            tok_sec=round(sum(figures(r).tok_sec for r in same) / len(same)),
        )
    result.verdict, result.rule = judge(result.new, result.old)
    gain = result.old.micro_bpb - result.new.micro_bpb
    if old_record and result.runs == 1 and result.verdict == "keep" and 0 < gain < 1000:
        if gain < 1e6 * noise(record, old_record) and 100 * new.tok_sec <= 110 * result.old.tok_sec:
            result.verdict = "rerun"
            result.rule += "; but by less than 0.001 and within the noise, so look twice: make run AGAIN=1"
    return result


def change_of(result):
    """The two figures that decide, and how they moved."""
    new, old = result.new, result.old
    bpb = f"val_bpb {new.micro_bpb / 1e6:.6f}"
    rate = f"{new.tok_sec} tok/s"
    if old:
        bpb += f" ({(new.micro_bpb - old.micro_bpb) / 1e6:+.6f})"
        rate += f" ({percent(new.tok_sec, old.tok_sec)})"
    mean = f"mean of {result.runs} runs: " if result.runs > 1 else ""
    return f"{mean}{bpb}, {rate}"


def percent(new, old):
    return f"{100 * (new / old - 1):+.1f} %" if old else "-"
