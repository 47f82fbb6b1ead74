"""Write the morning's page, data/report.html, and the picture data/progress.png.

usage: report.py --tags "nov24 nov25"

The page is one file that needs nothing else. What is known comes from night.py; here it is only said.
"""

import argparse
import base64
import re
import shlex
import sys
from collections import Counter

try:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup, escape

    from scripts.show import pictures
except ImportError as error:
    sys.exit(f"error: the report needs the package {error.name}: unset PYTHON, and the project's environment has it")

from harness import files, project
from scripts import session
from scripts.judge.observations import busy
from scripts.session import Refused, counted, one_line, run_command, shown
from scripts.show.brief import noise
from scripts.show.night import DOUBTFUL, SAFE, Night, clock, gain_words

MEANING = {
    "safe": f"at least {100 * SAFE:g} % sure, after the winner's curse",
    "doubtful": f"{100 * DOUBTFUL:g} to {100 * SAFE:g} % sure",
    "unproven": f"less than {100 * DOUBTFUL:g} % sure: noise could make it, or speed or fewer lines kept it",
}  # fmt: skip


class Page:
    """What the template asks of a night, as text."""

    def __init__(self, night):
        self.night, self.id = night, re.sub("[^A-Za-z0-9]", "-", night.tag)
        self.changes = night.chain[1:]
        self.trusted = {word: [e for e in self.changes if e.trust == word] for word in MEANING}

    @property
    def sentence(self):
        """Whether it got better, and whether that is to be believed."""
        n, gain = self.night, self.night.gain
        if not n.best:
            return "Nothing was kept yet, so there is nothing to compare."
        if not gain:
            tried = counted(len(n.experiments) - 1, "idea")
            return f"Nothing better than the baseline yet: {tried} tried, val_bpb {n.first.bpb:.4f}."
        believed = "It got better" if gain.sure > SAFE else "It seems better" if gain.sure > DOUBTFUL else "Not proven"
        words = f"{believed}: val_bpb fell by {gain.gain:.4f}, and {len(self.trusted['safe'])} of "
        words += f"{counted(len(self.changes), 'kept change')} {'is' if len(self.changes) == 1 else 'are'} safe"
        if n.held_out:
            held, agrees = n.held_out
            words += f"; held-out text {'agrees' if agrees else 'does not settle it'}: {minus(held)}"
        return f"{words}."

    @property
    def figures(self):
        """[(name, value, what it means)] of those at the top."""
        n, found = self.night, [("gain", "–", "nothing is better than the baseline")]
        if n.gain:
            runs = f"{counted(len(n.first.runs), 'run')} of the baseline, {len(n.best.runs)} of the best"
            fell, left = f"{n.first.bpb:.6f} to {n.best.bpb:.6f}; {runs}", "what is left: the best of many is flattered"
            found = [("gain, ± its standard error", gain_words(n.gain), fell),
                     ("after the winner's curse", gain_words(n.left), left)]  # fmt: skip
        held = "not measured", "make holdout measures it on text that nothing selected on"
        if n.held_out:
            look = n.looks[-1]
            held = n.held_out[0], f"{counted(look['pairs'], 'pair')} of fresh runs, best {look['best']}"
        return [*found, ("held-out gain", *held), ("experiments", str(len(n.experiments)), n.counts)]

    @property
    def noise(self):
        """What a reader should know of the noise before believing a gain."""
        n, found = self.night, []
        if n.evidence:
            found.append(noise(n.evidence))
        shared = Counter(bool(busy(n.records[a["run_id"]])) for a in n.attempts if a.get("run_id") in n.records)
        if shared[True]:
            found.append(f"The machine was shared during {shared[True]} of {shared.total()} runs; they count for less.")
        if len(n.looks) > 1:
            found.append(f"The test split was looked at {len(n.looks)} times: each look is worth a little less.")
        if n.looks and n.best and n.looks[-1]["best"] != n.best.commit:
            found.append(f"The held-out gain is that of {n.looks[-1]['best']}; the best is now {n.best.commit}.")
        return found

    @property
    def home(self):
        """[(what it does, commands)] that take the night's work along."""
        n, safe = self.night, self.trusted["safe"]
        named = (session.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads") or "").split()
        branch = next((name for name in ("main", "master") if name in named), "main")
        steps = [f"git checkout -b {shlex.quote(f'{n.tag}-safe')} {branch}"]
        for e in safe:
            words = shlex.quote(f"{one_line(e.description)} ({gain_words(e.gain)})")
            steps.append(f"git diff {e.before.commit} {e.commit} -- train.py | git apply -3 && git commit -qm {words}")
        merge = f"git checkout {branch}\ngit merge {n.best.commit}"
        found = [(f"All {len(self.changes)} of them, history and all", merge)]
        if safe and len(safe) < len(self.changes):
            found.insert(0, (f"The {len(safe)} safe ones alone, a commit each", "\n".join(steps)))
        patch = f"git diff {n.first.commit} {n.best.commit} -- train.py > {shlex.quote(f'{n.tag}.patch')}"
        return [*found, ("All as a patch", patch)]

    def diff(self, e):
        """The change of an experiment as HTML, or an empty text where git does not know both programs."""
        found = []
        for line in e.diff:
            kind = {"+": "add", "-": "del", "@": "hunk"}.get(line[:1])
            found.append(Markup('<span class="{}">{}</span>').format(kind, line) if kind else escape(line))
        return Markup("\n").join(found)

    @property
    def picture(self):
        """The address of the night's picture, which holds the picture itself."""
        drawn = pictures.saved(pictures.progress([self.night]), "svg")
        return f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode()}"

    @property
    def cost(self):
        """[(what, seconds, share)], the dearest first."""
        spent = {name: seconds for name, seconds in self.night.cost.items() if seconds >= 1}
        total = sum(spent.values())
        return [(name, s, s / total) for name, s in sorted(spent.items(), key=lambda item: -item[1])]


def minus(text):
    """Figures as they are set: a minus sign, and no break beside ± and %."""
    return text.replace("-", "\u2212").replace(" %", "\u00a0%").replace("± ", "±\u00a0")


def write(args):
    nights = [Night(tag) for tag in dict.fromkeys(args.tags.split())]
    for night in nights:
        if not night.experiments and not night.attempts:
            raise Refused(f"there is no session '{night.tag}' in data/sessions: make setup opens one")
    folder = FileSystemLoader(str(project.ROOT / "scripts" / "show"))
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (clock, counted, one_line, minus, gain_words)}
    text = environment.get_template("report.html.j2").render(pages=[Page(n) for n in nights], meaning=MEANING)
    text = text.encode("utf-8", "replace").decode("utf-8")
    files.write_atomically(project.DATA / "report.html", text)
    files.write_atomically(project.DATA / "progress.png", pictures.saved(pictures.progress(nights), "png"))
    print(f"report   {shown(project.DATA / 'report.html')}, {len(text.encode()) / 1e6:.1f} MB; open it in a browser")
    print(f"picture  {shown(project.DATA / 'progress.png')}")
    for night in nights:
        for words in night.missing:
            print(f"note     {night.tag}: {words}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tags", default="none")
    run_command(write, parser.parse_args())
