"""The night's gain, measured anew, on text that nobody selected on.

Baseline and best kept program, N times in turn with equal seeds that neither has had, each in a worktree of its own,
scored on the validation split and on the test split. Every look at the test split is noted in the session. A look with
another budget than the session's, or on another dataset, tells what is left of the gain there.
"""

import numpy as np

from harness import project
from scripts import session
from scripts.judge.evidence import NOISES, Evidence, Observation, gain_words, load, unused
from scripts.run import experiment
from scripts.session import Refused, Session, commit_with, on_dataset, options, run_command, tell
from scripts.show import summary
from scripts.show.night import Night


def measured_anew(known, noises, looks):
    """`Comparison` of best and baseline by fresh runs alone.

    known: runs that tell how noisy runs are. noises: of both, see `Observation`. looks: of each pair (seed, the load
    beside the baseline's run and the best's, their bits per byte).
    """
    anew = [Observation(("anew", i), seed, bpbs[i], 1.0, loads[i], f"look {number}", noises[i])
            for number, (seed, loads, bpbs) in enumerate(looks) for i in (0, 1)]  # fmt: skip
    return Evidence([*known, *anew]).compare(("anew", 1), ("anew", 0))


def where(night, dataset):
    """What differs from the session, as it is typed: `BUDGET=1200 DATASET=tinystories`; empty where nothing does."""
    budget, like = project.settings()[0], night.like or {}
    found = [f"BUDGET={budget:g}"] if like.get("budget", budget) != budget else []
    return " ".join([*found, f"DATASET={dataset}"] if like.get("dataset", dataset) != dataset else found)


def main(args):
    this_session = Session(args.tag)
    held = experiment.begin(this_session)
    night = Night(args.tag)
    first, best = night.first, night.best
    if not (args.head and best and first.text and best.text):
        raise Refused("nothing was kept yet, or not with git: make baseline")
    if first is best:
        raise Refused("the baseline is the best kept program: there is no gain to measure")
    dataset = args.dataset or project.dataset_of_train()
    there, count = where(night, dataset), args.runs or 3
    programs = {"baseline": (first.commit, first.blob), "best": (best.commit, best.blob)}
    for name, row in (("baseline", first), ("best", best)):
        if (text := on_dataset(row.text, dataset)) != row.text:
            there_too = args.tag, f"on-{dataset}-{row.commit}", f"On {dataset}: {row.description}"
            programs[name] = commit_with(text.strip() + "\n", row.commit, *there_too)
    blobs = [blob for _, blob in programs.values()]
    used, looks = [a["seed"] for a in this_session.attempts() if a["train_blob"] in blobs], []
    for number in range(count):
        seed, bpbs, loads = unused(used), {}, {}
        used.append(seed)
        for name in ("baseline", "best")[:: 1 if number % 2 == 0 else -1]:
            tell(f"run {2 * number + len(bpbs) + 1} of {2 * count}: {name}, seed {seed} {there}".rstrip())
            attempt = experiment.run_once(this_session, held, "holdout", programs[name][0], args.head, seed)
            if attempt["status"] != "valid":
                print("\n".join(summary.failure(attempt)[:-1]))
                experiment.exit_as(attempt)
            run = session.record_of(attempt)
            bpbs[name], loads[name] = (run["result"]["val_bpb"], attempt["test"]["bpb"]), load(run)
        both = [loads[name] for name in programs]
        looks.append([(seed, both, ends) for ends in zip(*(bpbs[name] for name in programs), strict=True)])
        gain = bpbs["baseline"][0] - bpbs["best"][0]  # that on test is told below, once the look is noted
        tell(f"pair {number + 1}: gain {gain:+.4f} on validation")
    runs, longer = night.evidence.runs, project.settings()[0] / (night.like or {}).get("budget", project.settings()[0])
    noises = np.clip([next(r.noise for r in runs if r.program == e.program) / longer for e in (first, best)], *NOISES)
    known = () if "DATASET" in there else runs  # where bits per byte are alike
    seen, (fresh, test) = night.gain, (measured_anew(known, noises, column) for column in zip(*looks, strict=True))
    pair = {"baseline": first.commit, "best": best.commit, "pairs": len(looks), "where": there, "night": seen.gain}
    this_session.note("holdout", **pair, fresh=[fresh.gain, fresh.error], test=[test.gain, test.error])
    told = [f"baseline {first.commit} against best {best.commit}, bits per byte, with standard errors:",
            f"  as the night saw it, on validation  {gain_words(seen)}",
            f"  fresh runs, on validation           {gain_words(fresh)}",
            f"  fresh runs, on test                 {gain_words(test)}",
            f"{there and f'with {there} '}{', '.join(Night(args.tag).held_out[there][1:])}"]  # fmt: skip
    print("\n".join(told), flush=True)
    experiment.notify("\n".join(told))


if __name__ == "__main__":
    run_command(main, options(__doc__, head="", runs=0, dataset="").parse_args())
