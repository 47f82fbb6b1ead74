"""Write the morning's page, one file that needs nothing else, and its picture; what is known comes from night.py."""

import base64
import shlex
import sys

try:
    import matplotlib  # noqa: F401  (pictures.py draws with it)
    from jinja2 import Environment, FileSystemLoader
except ImportError as missing:
    sys.exit(f"error: the report needs {missing.name}: install it, or unset PYTHON, and the project has its own")

from harness import files, project
from scripts.judge.evidence import DOUBTFUL, SAFE, gain_words
from scripts.session import Refused, counted, one_line, options, run_command, shown
from scripts.show import pictures
from scripts.show.night import Night
from scripts.show.terminal import figures

MEANING = {
    "safe": f"at least {100 * SAFE:g} % sure, after the winner's curse",
    "doubtful": f"{100 * DOUBTFUL:g} to {100 * SAFE:g} %",
    "unproven": "less: noise could make it, or speed or fewer lines kept it",
}


def sentence(night, safe):
    """Whether it got better, and whether that is to be believed."""
    gain, changes = night.gain, night.chain[1:]
    if not gain:
        return f"Nothing better than the baseline yet, in {night.tried}."
    believed = "It got better" if gain.sure > SAFE else "It seems better" if gain.sure > DOUBTFUL else "Not proven"
    words = f"{believed}: val_bpb fell by {gain.gain:.4f}; safe: {len(safe)} of {counted(len(changes), 'kept change')}"
    if "" in night.held_out:
        words += "; on held-out text {1}: {0}".format(*night.held_out[""])
    return f"{words}."


def home(night, safe):
    """[(what it does, commands)] that take the night's work along."""
    if not (count := len(night.chain[1:])):
        return []
    found = [(f"All {count} with their history, on a branch of yours", f"git merge {night.best.commit}")]
    if 0 < len(safe) < count:
        steps = [f"git checkout -b {shlex.quote(f'{night.tag}-safe')} {night.first.commit}"]
        for e in safe:
            words = shlex.quote(f"{one_line(e.description)} ({gain_words(e.gain)})") + " || git checkout @ -- train.py"
            steps.append(f"git diff {e.before.commit} {e.commit} -- train.py | git apply -3 && git commit -qm {words}")
        what = f"The {len(safe)} safe ones alone, on the baseline, but what needs lines of others; never measured so"
        found.insert(0, (what, "\n".join(steps)))
    return found


def page(night):
    """The page as text."""
    safe = [e for e in night.chain if e.trust == "safe"]
    picture = base64.b64encode(pictures.progress(night, "svg")).decode()
    folder = FileSystemLoader(project.ROOT / "scripts" / "show")
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (counted, one_line, gain_words)}
    said = {"sentence": sentence(night, safe), "figures": figures(night), "home": home(night, safe), "meaning": MEANING}
    return environment.get_template("report.html.j2").render(night=night, picture=picture, **said)


def write(args):
    night = Night(args.tag)
    if not night.experiments and not night.attempts:
        raise Refused(f"there is no session '{night.tag}' in data/sessions: make setup opens one")
    html, picture = project.DATA / "report.html", project.DATA / "progress.png"
    files.write_atomically(html, page(night))
    files.write_atomically(picture, pictures.progress(night, "png"))
    print(f"report   {shown(html)}, {html.stat().st_size / 1e6:.1f} MB; open it in a browser")
    print(f"picture  {shown(picture)}")


if __name__ == "__main__":
    run_command(write, options(__doc__).parse_args())
