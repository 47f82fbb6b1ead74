"""Write the morning's page, data/report.html, and the picture data/progress.png.

usage: report.py --tags "nov24 nov25"

The page is one file that needs nothing else. What is known comes from night.py; here it is only said.
"""

import argparse
import math
import re
import shlex
import sys
from collections import Counter

try:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup, escape
    from pygments.lexers import PythonLexer
    from pygments.token import STANDARD_TYPES

    from scripts.show import pictures
except ImportError as error:
    sys.exit(f"error: the report needs the package {error.name}: unset PYTHON, and the project's environment has it")
import numpy as np

from harness import files, project
from scripts import session
from scripts.judge import verdict
from scripts.session import Refused, counted, one_line, run_command, shown
from scripts.show.night import Night, clock, diff

ROOM = 1_200_000  # characters of diffs, and as many of journal entries, that the page holds for all experiments
KEPT_LINES = 600  # of the diff of a kept change
POINTS = 64  # of a loss curve


class Page:
    """What the template asks of a night, as text and figures."""

    def __init__(self, night):
        self.night, sigma = night, night.noise.bpb
        self.digits = 4 if not sigma > 0 else min(6, max(4, 1 + math.ceil(-math.log10(sigma))))
        self.id = re.sub("[^A-Za-z0-9]", "-", night.tag)

    def place(self, e):
        return pictures.place(self.night, e)

    def signed(self, value, error=math.nan):
        """A gain as a person reads it, with its error where that is known."""
        if value is None or math.isnan(value):
            return "–"
        words = f"{value:+.{self.digits}f}".replace("-", "\u2212")
        return words if math.isnan(error) else f"{words} ±\u202f{error:.{self.digits}f}"

    def figure(self, value):
        return f"{value:.{self.digits}f}"

    @property
    def sentence(self):
        """Whether it got better, and whether that is to be believed."""
        n = self.night
        if not n.best:
            return "Nothing was kept yet, so there is nothing to compare."
        if n.best is n.first:
            tried = len(n.experiments) - 1
            ideas = counted(tried, "idea")
            return f"Nothing better than the baseline yet: {ideas} tried, val_bpb {self.figure(n.first.bpb)}."
        gain, half = n.gain
        words = f"val_bpb fell from {self.figure(n.first.bpb)} to {self.figure(n.best.bpb)}"
        if n.look:
            test, width = n.look["test"]
            if math.isnan(width or math.nan):
                return f"{words}; on held-out text the gain is {self.signed(test)}, by one pair."
            if test > width:
                return f"It got better, and held-out text agrees: {words}."
            return f"{words}, but held-out text does not show it: the gain there is {self.signed(test, width)}."
        if math.isnan(half):
            return f"{words}; how much of that is noise is not known."
        if gain > half:
            return f"It got better: {words}, more than noise explains."
        return f"{words}, which noise alone could explain."

    @property
    def figures(self):
        """[(name, value, what it means)] of the four at the top."""
        n, look, counts = self.night, self.night.look, self.night.by_outcome
        best = n.best if n.best is not n.first else None
        gain, half = n.gain if best else (math.nan, math.nan)
        runs = "nothing was kept after the baseline"
        if best:
            runs = f"{counted(n.first.count, 'run')} of the baseline, {best.count} of the best; 95 % interval"
        held = ("not measured", "make holdout measures it on text that nothing selected on")
        if look:
            pairs = counted(look["pairs"], "pair")
            held = (self.signed(*look["test"]), f"fresh runs on the test split, {pairs}, best {look['best']}")
        worth, spread = n.expected if best else (math.nan, math.nan)
        compared = sum(not math.isnan(e.expected) for e in n.experiments)
        why = f"after the winner's curse: shrunk by the noise and by {compared} comparisons; 95 % interval"
        if best and math.isnan(worth):
            why = n.typed("needs the noise: make run REFERENCE=1 N=4")
        return [
            ("measured gain", self.signed(gain, half), runs),
            ("held-out gain", *held),
            ("expected gain", self.signed(worth, 1.96 * spread), why if best else ""),
            ("experiments", str(len(n.experiments)),
             f"{len(n.kept[1:])} kept after the baseline, {counts['discard']} discarded, {counts['crash']} crashed; "
             f"{counts['refused']} runs refused"),
        ]  # fmt: skip

    @property
    def facts(self):
        """The circumstances, a phrase each."""
        n, like = self.night, self.night.like
        found = [f"{n.span[0]:%d %b %H:%M} to {n.span[1]:%d %b %H:%M}, {clock(3600 * n.hours)}"] if n.span else []
        if n.tokens:
            found.append(f"{n.tokens / 1e6:,.0f} M tokens trained on")
        if like:
            device = like["device"]
            memory = f", {device['memory_gb']} GB" if device.get("memory_gb") else ""
            found.append(f"{one_line(str(device.get('name')))}{memory}")
            found += [f"dataset {like['dataset']}", f"{like['budget']:g} s a run"]
        if n.noise.df:
            words = f"noise of a run ± {n.noise.bpb:.5f}{verdict.same_seed(n.noise)}"
            found.append(f"{words} ({n.noise.df} degrees of freedom)")
        return found

    @property
    def doubts(self):
        """What a reader should know before believing it."""
        n, found = self.night, []
        busy = Counter(bool(verdict.busy(n.records[a["run_id"]])) for a in n.attempts if a.get("run_id") in n.records)
        if busy[True]:
            found.append(f"The machine was shared during {busy[True]} of {busy.total()} runs (shaded in the picture); "
                         "those runs count only where a program has no others.")  # fmt: skip
        if over := [e.number for e in n.experiments if e.overruled]:
            found.append(f"The verdict was overruled in {len(over)}: " + ", ".join(map(str, over[:12])) + ".")
        if left := [e.number for e in n.experiments if e.undecided]:
            found.append("Given up before the runs that the verdict asked for: " + ", ".join(map(str, left[:12])) + ".")
        if few := [e.number for e in n.chain if e.count < verdict.RUNS]:
            found.append(f"Kept by fewer than {verdict.RUNS} runs: " + ", ".join(map(str, few)) + ".")
        looks = sum(event["event"] == "holdout" for event in n.events)
        if looks > 1:
            found.append(
                f"The test split was looked at {looks} times: each look after the first is worth a little less."
            )
        if n.look and n.best and n.look["best"] != n.best.commit:
            found.append(f"The held-out gain is that of {n.look['best']}; the best is now {n.best.commit}.")
        return found

    @property
    def home(self):
        """[(what it does, commands)] that take the night's work along."""
        n = self.night
        named = (session.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads") or "").split()
        branch = next((name for name in ("main", "master") if name in named), "main")
        clean, file = shlex.quote(f"{n.tag}-clean"), shlex.quote(f"{n.tag}.patch")
        steps = [f"git checkout -b {clean} {branch}"]
        for e in n.chain[1:]:
            words = shlex.quote(f"{one_line(e.description)} (val_bpb {-e.gain:+.{self.digits}f})")
            steps.append(f"git checkout {e.commit} -- train.py && git commit -m {words}")
        patch = f"git diff {n.first.commit} {n.best.commit} -- train.py > {file}"
        return [
            ("Merge it, history and all", f"git checkout {branch}\ngit merge {n.best.commit}"),
            ("Or a clean branch, one commit for each kept change", "\n".join(steps)),
            ("Or as a patch, for another clone", f"{patch}\ngit apply {file}"),
        ]

    def diff(self, e, old=None, rich=False):
        """The change of an experiment as HTML, or an empty text where git does not know both programs."""
        old = old or e.before
        a, b = (self.night.texts.get(x.blob) if x else None for x in (old, e))
        if a is None or b is None:
            return ""
        lines, most = diff(a, b, context=3 if rich else 2), KEPT_LINES
        if not rich:
            most = max(8, int(np.searchsorted(np.cumsum([len(line) + 10 for line in lines]), self.room)))
        found = highlighted(lines[:most], rich)
        if len(lines) > most:
            found += escape(f"\n… {len(lines) - most} more lines: git diff {old.commit} {e.commit} -- train.py")
        return found

    @property
    def room(self):
        """Characters of each experiment's diff, and of its journal entry."""
        return ROOM // max(60, len(self.night.experiments))

    def entry(self, e):
        text = (e.event.get("entry") or "").strip()
        return text if len(text) <= self.room else text[: self.room] + " …"

    @property
    def curves(self):
        """{number: [losses in thousandths over equal parts of the budget]}, for the page's script."""
        found = {}
        for e in self.night.experiments:
            curve = (e.own or {}).get("curve") or {}
            seconds, loss = (np.asarray(curve.get(k) or [], float) for k in ("seconds", "loss"))
            if len(loss) > 1 and len(loss) == len(seconds) and np.isfinite(loss).all():
                at = np.linspace(0, e.own["budget"], POINTS + 1)[1:]
                found[e.number] = np.round(1000 * np.interp(at, seconds, loss)).astype(int).tolist()
        return found

    @property
    def pictures(self):
        """The two views as SVG, each for a desk and for a phone."""
        n, alt = self.night, "val_bpb of every experiment over time; the table below has the figures"
        other = "val_bpb against tokens a second and against memory"
        drawn = [pictures.svg(pictures.progress([n], (12, 6.2)), f"{self.id}-wide", alt),
                 pictures.svg(pictures.progress([n], (4.6, 4.4), labels=False), f"{self.id}-narrow", alt),
                 pictures.svg(pictures.price(n), f"{self.id}-price", other),
                 pictures.svg(pictures.price(n, (4.6, 6.4)), f"{self.id}-price-narrow", other)]  # fmt: skip
        return [Markup(text) for text in drawn]

    @property
    def cost(self):
        """[(what, seconds, share)], the dearest first."""
        spent = {name: seconds for name, seconds in self.night.cost.items() if seconds >= 1}
        total = sum(spent.values()) or 1.0
        return [(name, s, s / total) for name, s in sorted(spent.items(), key=lambda item: -item[1])]


def highlighted(lines, rich):
    """Lines of a diff as HTML, each in an element that says whether it is new; rich: with Python's own colours too."""
    found = []
    for line in lines:
        kind = {"+": "add", "-": "del", "@": "hunk"}.get(line[:1], "")
        text = escape(line)
        if rich and kind != "hunk":
            text = escape(line[:1]) + Markup().join(
                Markup('<span class="{}">{}</span>').format(name, value) if (name := short(token)) else escape(value)
                for token, value in PythonLexer(ensurenl=False, stripnl=False).get_tokens(line[1:])
            )
        found.append(Markup('<span class="{}">{}</span>').format(kind, text) if kind else text)
    return Markup("\n").join(found)


def short(token):
    """Pygments' name for a kind of word, of those that the style sheet colours: keyword, string, comment, number."""
    name = STANDARD_TYPES.get(token, "")[:1]
    return name if name in ("k", "s", "c", "m") else ""


def write(args):
    nights = [Night(tag) for tag in dict.fromkeys(args.tags.split())]
    for night in nights:
        if not night.experiments and not night.attempts:
            raise Refused(f"there is no session '{night.tag}' in data/sessions: make setup opens one")
    folder = FileSystemLoader(str(project.ROOT / "scripts"))
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clock": clock, "counted": counted, "one_line": one_line}
    together = Markup(pictures.svg(pictures.progress(nights, (12, 5.5)), "all", "the sessions")) if nights[1:] else ""
    text = environment.get_template("report.html.j2").render(pages=[Page(n) for n in nights], together=together)
    text = text.encode("utf-8", "replace").decode("utf-8")
    files.write_atomically(project.DATA / "report.html", text)
    files.write_atomically(project.DATA / "progress.png", pictures.png(pictures.progress(nights)))
    print(f"report   {shown(project.DATA / 'report.html')}, {len(text.encode()) / 1e6:.1f} MB; open it in a browser")
    print(f"picture  {shown(project.DATA / 'progress.png')}")
    for night in nights:
        for words in night.missing:
            print(f"note     {night.tag}: {words}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tags", default="none")
    run_command(write, parser.parse_args())
