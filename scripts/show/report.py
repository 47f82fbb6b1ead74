"""Write the morning's page, data/report.html, and the picture data/progress.png.

usage: report.py --tag TAG

The page is one file that needs nothing else. What is known comes from night.py; here it is only said.
"""

import base64
import shlex
import sys

try:
    from jinja2 import Environment, FileSystemLoader

    from scripts.show import pictures
except ImportError as error:
    sys.exit(f"error: the report needs the package {error.name}: unset PYTHON, and the project's environment has it")

from harness import files, project
from scripts.judge.evidence import gain_words
from scripts.session import Refused, counted, one_line, options, run_command, shown
from scripts.show.night import DOUBTFUL, SAFE, Night, clock
from scripts.show.terminal import noise

MEANING = {
    "safe": f"at least {100 * SAFE:g} % sure, after the winner's curse",
    "doubtful": f"{100 * DOUBTFUL:g} to {100 * SAFE:g} % sure",
    "unproven": f"less than {100 * DOUBTFUL:g} % sure: noise could make it, or speed or fewer lines kept it",
}  # fmt: skip


def sentence(night, changes, safe):
    """Whether it got better, and whether that is to be believed."""
    gain = night.gain
    if not gain:
        return f"Nothing better than the baseline yet, in {night.tried}."
    believed = "It got better" if gain.sure > SAFE else "It seems better" if gain.sure > DOUBTFUL else "Not proven"
    words = f"{believed}: val_bpb fell by {gain.gain:.4f}; safe: {len(safe)} of {counted(len(changes), 'kept change')}"
    if night.held_out:
        held, agrees = night.held_out
        words += f"; held-out text {'agrees' if agrees else 'does not settle it'}: {held}"
    return f"{words}."


def figures(night):
    """[(name, value, what it means)] of those at the top."""
    found = []
    if night.gain:
        runs = f"{counted(len(night.first.runs), 'run')} of the baseline, {len(night.best.runs)} of the best"
        fell, left = f"{night.first.bpb:.6f} to {night.best.bpb:.6f}; {runs}", "the best of many is flattered"
        found = [("gain, ± its standard error", gain_words(night.gain), fell),
                 ("what the winner's curse leaves", gain_words(night.left), left)]  # fmt: skip
    held = "not measured", "make holdout measures it on text that nothing selected on"
    if night.held_out:
        look, times = night.look, counted(len(night.looks), "look")
        pairs = f"{counted(look['pairs'], 'pair')} of fresh runs of {look['best']} and the baseline"
        held = night.held_out[0], f"{pairs}; {times} at the test split, and each is worth a little less"
    found.append(("held-out gain", *held))
    found += [(f"held-out gain, {there}", *seen) for there, seen in night.elsewhere.items()]
    return [*found, ("ideas", night.tried, night.counts)]


def noise_words(night):
    """What a reader should know of the noise before believing a gain."""
    runs = night.evidence.runs if night.evidence else []
    disturbed = sum(run.slot is not None for run in runs)
    found = [noise(night.evidence)] if runs else []
    found += [f"{night.foresight}."] if night.foresight else []
    if disturbed:
        found.append(f"The machine was shared during {disturbed} of {len(runs)} runs; they count for less.")
    return found


def home(night, changes, safe):
    """[(what it does, commands)] that take the night's work along."""
    found = [(f"All {len(changes)} of them with their history, on a branch of yours", f"git merge {night.best.commit}")]
    if 0 < len(safe) < len(changes):
        steps = [f"git checkout -b {shlex.quote(f'{night.tag}-safe')} {night.first.commit}"]
        for e in safe:
            words = shlex.quote(f"{one_line(e.description)} ({gain_words(e.gain)})")
            steps.append(f"git diff {e.before.commit} {e.commit} -- train.py | git apply -3 && git commit -qm {words}")
        found.insert(0, (f"The {len(safe)} safe ones alone, a commit each, on the baseline", "\n".join(steps)))
    return found


def page(night, picture):
    """The page as text. picture: an SVG."""
    changes = night.chain[1:]
    trusted = {word: [e for e in changes if e.trust == word] for word in MEANING}
    folder = FileSystemLoader(project.ROOT / "scripts" / "show")
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (clock, counted, one_line, gain_words)}
    return environment.get_template("report.html.j2").render(
        night=night, changes=changes, trusted=trusted, meaning=MEANING, figures=figures(night),
        sentence=sentence(night, changes, trusted["safe"]), home=home(night, changes, trusted["safe"]),
        noise=noise_words(night), picture=base64.b64encode(picture).decode(),
    )  # fmt: skip


def write(args):
    night = Night(args.tag)
    if not night.experiments and not night.attempts:
        raise Refused(f"there is no session '{night.tag}' in data/sessions: make setup opens one")
    figure = pictures.progress(night)
    html, picture = project.DATA / "report.html", project.DATA / "progress.png"
    files.write_atomically(html, page(night, pictures.saved(figure, "svg")))
    files.write_atomically(picture, pictures.saved(figure, "png"))
    print(f"report   {shown(html)}, {html.stat().st_size / 1e6:.1f} MB; open it in a browser")
    print(f"picture  {shown(picture)}")
    for words in night.missing:
        print(f"note     {words}")


if __name__ == "__main__":
    run_command(write, options(__doc__).parse_args())
