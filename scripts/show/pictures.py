"""The pictures of a night: every experiment over time with the kept chain as a staircase; val_bpb against its price.

Drawn once, in one palette: the page puts its own colours in their place, the PNG keeps them.
"""

import io
import logging
import math
import re
import warnings

import matplotlib
import numpy as np

from scripts.judge import verdict
from scripts.session import counted, cut, one_line, record
from scripts.show.night import clock, parsed

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

# Each is a variable of the page's style sheet too, so no two are the same.
LIGHT = {"paper": "#fefefd", "ink": "#1c2127", "quiet": "#6b7480", "line": "#d5dae0", "dot": "#9aa5b1",
         "good": "#0a7d4f", "band": "#bfe3d2", "bad": "#c2413a", "busy": "#faf1d6"}  # fmt: skip
LABEL, LABELS = 34, 24  # characters of a description; how many are shown
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # scripts that the font lacks: boxes, and no word
STYLE = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["quiet"], "xtick.color": LIGHT["quiet"], "ytick.color": LIGHT["quiet"],
    "text.color": LIGHT["ink"], "axes.facecolor": "none", "svg.fonttype": "none", "axes.unicode_minus": True,
    "text.parse_math": False, "svg.hashsalt": "night", "font.family": "DejaVu Sans", "axes.axisbelow": True,
}  # fmt: skip


def progress(nights, size=(12, 6.75), labels=True):
    """A figure with an axis for each night, all on one scale."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(nights), figsize=size, dpi=100, sharey=True, squeeze=False)
        limits = bounds(nights)
        left = 0.075 if size[0] > 8 else 0.15
        figure.subplots_adjust(left=left, right=0.985, top=0.86 if labels else 0.9, bottom=0.11, wspace=0.06)
        for night, axis in zip(nights, axes[0], strict=True):
            one_night(axis, night, limits, labels)
        axes[0][0].set_ylabel("val_bpb, bits per byte")
        if labels:
            figure.text(left, 0.95, headline(nights), fontsize=16, fontweight="bold", va="center")
            figure.text(left, 0.905, subtitle(nights), fontsize=10.5, color=LIGHT["quiet"], va="center")
            legend(figure)
        return figure


def legend(figure):
    """What the marks mean, of those that are there: each kind once, as it is drawn last."""
    shown = {}
    for axis in figure.axes:
        shown |= {words: mark for mark, words in zip(*axis.get_legend_handles_labels(), strict=True)}
    look = {"frameon": False, "fontsize": 9.5, "labelcolor": LIGHT["quiet"], "handletextpad": 0.3, "columnspacing": 1.2}
    where = {"loc": "upper right", "bbox_to_anchor": (0.985, 0.985), "ncols": max(1, len(shown))}
    figure.legend([*shown.values()][::-1], [*shown][::-1], **where, **look)


def headline(nights):
    if len(nights) > 1:
        return "  ·  ".join(f"{n.tag}: {n.best.bpb:.4f}" if n.best else f"{n.tag}: no result" for n in nights)
    night = nights[0]
    if not night.best:
        return f"{night.tag}: no result yet"
    if night.best is night.first:
        return f"{night.tag}: nothing better than val_bpb {night.first.bpb:.4f} yet"
    return f"{night.tag}: val_bpb {night.first.bpb:.4f} → {night.best.bpb:.4f}"


def subtitle(nights):
    words = []
    for n in nights:
        kept = len(n.kept) - bool(n.kept)
        words.append(f"{counted(len(n.experiments), 'experiment')} in {clock(3600 * n.hours)}, {kept} kept")
    like = nights[0].like
    if like and len(nights) == 1:
        words.append(f"{like['budget']:g} s each on {one_line(like['device'].get('name'))}, {like['dataset']}")
    return "  ·  ".join(words)


def bounds(nights):
    """(lowest, highest) val_bpb to show: all that was kept, and what lies near; an outlier is drawn on the edge."""
    kept = [e.bpb for n in nights for e in n.kept]
    if not kept:
        return 0.0, 1.0
    all_ = [e.bpb for n in nights for e in n.experiments if e.status != "crash"]
    sigma = max([n.noise.bpb for n in nights if n.noise.df], default=0.0)
    span = max(max(kept) - min(kept), 6 * sigma, 0.004)
    if len(kept) == 1:  # nothing is flattened by what was tried
        span = max(span, 1.5 * (float(np.median(all_)) - kept[0]))
    high = max(max(kept) + max(3 * sigma, 0.2 * span), min(float(np.quantile(all_, 0.9)), max(kept) + 0.8 * span))
    low = min(kept)
    return low - 0.35 * (high - low), high + 0.06 * (high - low)


def one_night(axis, night, limits, labels):
    low, high = limits
    axis.set_ylim(low, high)
    axis.grid(axis="y", color=LIGHT["line"], linewidth=0.6)
    axis.tick_params(length=0)
    unit, seconds = ("hours", 3600) if night.hours >= 1 else ("minutes", 60)
    axis.set_xlabel(f"{unit} since the first run" if labels else unit)
    start, whole = night.span[0] if night.span else None, max(3600 * night.hours, 60) / seconds

    def when(time, number=0):
        if time and start:
            return (time - start).total_seconds() / seconds
        return whole * number / max(1, len(night.experiments))  # by hand: where it stands in the table

    axis.set_xlim(-0.015 * whole, whole * 1.02)
    axis.xaxis.set_major_locator(MaxNLocator(8 if labels else 5))
    for begin, end in busy_stretches(night):
        axis.axvspan(when(begin), when(end), color=LIGHT["busy"], linewidth=0, zorder=0, label="machine shared")
    at = {e: when(e.time, e.number) for e in night.experiments}
    chain, sigma = night.chain, night.noise.bpb if night.noise.df else 0.0
    edges = [*(at[e] for e in chain), whole]
    steps = list(zip(edges[:-1], edges[1:], chain, strict=True))
    for begin, end, e in steps:
        half = 1.96 * sigma / math.sqrt(max(1, e.count))
        look = {"color": LIGHT["band"], "linewidth": 0, "label": "95 % of the noise" if sigma else None}
        axis.fill_between([begin, end], e.bpb - half, e.bpb + half, zorder=1, **look)
    if chain:
        look = {"color": LIGHT["good"], "linewidth": 1.8, "solid_joinstyle": "miter"}
        axis.step(edges, [e.bpb for e in [*chain, chain[-1]]], where="post", zorder=3, **look)
    rail = low + 0.035 * (high - low)
    for e in night.experiments:
        if e.count > 1 and e.status != "crash":
            runs = np.clip([e.side.bpbs[i] for i in e.side.used], low, high)
            colour = LIGHT["good" if e.status == "keep" else "dot"]
            axis.vlines(at[e], min(runs), max(runs), color=colour, linewidth=1, zorder=2)
    discarded = [e for e in night.experiments if e.status == "discard"]
    kinds = (
        ("discarded", [e for e in discarded if e.bpb > high], "^", 22, "dot", high),
        ("discarded", [e for e in discarded if e.bpb <= high], "o", 16, "dot", None),
        ("crashed", [e for e in night.experiments if e.status == "crash"], "x", 24, "bad", rail),
        ("kept", night.kept, "o", 46, "good", None),
    )
    for words, found, marker, area, colour, fixed in kinds:
        if found:
            y = [fixed or e.bpb for e in found]
            edge = {} if marker == "x" else {"edgecolors": LIGHT["paper"], "linewidths": 0.8}
            look = {"marker": marker, "label": words, "clip_on": False, **edge}
            dots = axis.scatter([at[e] for e in found], y, area, LIGHT[colour], zorder=4, **look)
            if labels:
                dots.set_urls([f"#{place(night, e)}" for e in found])
    words = label_words(night) if labels else {e: str(e.number) for e in night.kept}
    wanted = sorted(night.kept, key=lambda e: -e.gain if e.before else -math.inf)[:LABELS]
    others = [(at[e], min(e.bpb, high)) for e in discarded]
    put_labels(axis, [(at[e], e.bpb, words[e]) for e in wanted], steps, others, 9.5 if labels else 9)


def label_words(night):
    """What stands beside each kept point."""
    words = {}
    for e in night.kept:
        text = cut(one_line(e.description), LABEL)
        words[e] = f"{text}  {-e.gain:+.4f}".replace("-0.", "\u22120.") if e.before else text
    return words


def put_labels(axis, labels, steps, dots, size):
    """Text beside points, where it touches neither a point nor the staircase nor other text; no room, no text.

    labels: (x, y, words), those that matter most first; steps: see `one_night`; dots: (x, y) of the other points.
    """
    figure, to_pixels = axis.figure, axis.transData.transform
    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    taken = [(frame.x0, frame.y0, frame.x1, frame.y0 + 0.09 * frame.height)]  # the rail
    for points, around in (([label[:2] for label in labels], 6), (dots, 3)):
        taken += [(x - around, y - around, x + around, y + around) for x, y in (to_pixels(p) for p in points)]
    for (begin, end, e), last in zip(steps, [None, *(e for _, _, e in steps)], strict=False):
        (x0, y), (x1, _) = to_pixels((begin, e.bpb)), to_pixels((end, e.bpb))
        taken.append((x0, y - 3, x1, y + 3))
        if last:
            above = to_pixels((begin, last.bpb))[1]
            taken.append((x0 - 3, min(y, above), x0 + 3, max(y, above)))
    for x, y, words in labels:
        px, py = to_pixels((x, y))
        text = axis.text(0, 0, words, fontsize=size, color=LIGHT["ink"], va="center", zorder=5)
        box = text.get_window_extent(renderer)
        width, height, boxes = box.width, box.height, np.array(taken)
        for dx, dy in places(width, height):
            x0, y0 = px + dx, py + dy - height / 2
            x1, y1 = x0 + width, y0 + height
            if not (frame.x0 <= x0 and x1 <= frame.x1 + 8 and frame.y0 <= y0 and y1 <= frame.y1):
                continue
            if ((x0 < boxes[:, 2]) & (boxes[:, 0] < x1) & (y0 < boxes[:, 3]) & (boxes[:, 1] < y1)).any():
                continue
            taken.append((x0, y0, x1, y1))
            back = axis.transData.inverted().transform
            text.set_position(back((x0, py + dy)))
            if abs(dy) > 1.6 * height:
                ends = zip((x, y), back((px, y1 if dy < 0 else y0)), strict=True)
                axis.plot(*ends, color=LIGHT["quiet"], linewidth=0.6, zorder=2)
            break
        else:
            text.remove()


def places(width, height):
    """Where a label may stand, in pixels from its point: near ones first, below before above."""
    for row in range(14):
        for dy in (-(1.0 + row) * height * 0.95, (1.0 + row) * height * 0.95):
            for dx in (8, -width - 8, -width / 2, -width + 4, -4):
                yield dx, dy


def busy_stretches(night):
    """[(begin, end)] of runs during which the machine was shared, as datetimes."""
    found = []
    for a in night.attempts:
        run = night.records.get(a.get("run_id"))
        begin, end = parsed(a["started"]), parsed(a.get("end"))
        if run and verdict.busy(run) and begin and end:
            if found and (begin - found[-1][1]).total_seconds() < 600:
                begin = found.pop()[0]
            found.append((begin, end))
    return found


def price(night, size=(12, 4.2)):
    """val_bpb against tokens a second and against memory."""
    with plt.rc_context(STYLE):
        wide = size[0] > 8
        figure, axes = plt.subplots(*((1, 2) if wide else (2, 1)), figsize=size, dpi=100)
        figure.subplots_adjust(left=0.075 if wide else 0.16, right=0.985, top=0.95, bottom=0.14 if wide else 0.09,
                               wspace=0.2, hspace=0.28)  # fmt: skip
        low, high = bounds([night])
        low = min((e.bpb for e in night.kept), default=low) - 0.05 * (high - low)  # no rail is needed
        figures = (("tokens a second", record.tok_sec), ("peak memory, MB", lambda r: r["training"]["peak_memory_mb"]))
        for axis, (name, read) in zip(axes, figures, strict=True):
            for status, colour, area in (("discard", "dot", 16), ("keep", "good", 46)):
                found = [e for e in night.experiments if e.status == status and e.runs]
                if found:
                    x = [float(np.mean([read(r) for r in e.runs])) for e in found]
                    dots = axis.scatter(x, np.minimum([e.bpb for e in found], high), area, LIGHT[colour], zorder=3,
                                        edgecolors=LIGHT["paper"], linewidths=0.8, clip_on=False)  # fmt: skip
                    if wide:
                        dots.set_urls([f"#{place(night, e)}" for e in found])
                    for e, at in zip(found, x, strict=True):
                        if e is night.first or e is night.best:
                            words = "baseline" if e is night.first else "best"
                            beside = {"xytext": (7, -4), "textcoords": "offset points", "va": "top"}
                            axis.annotate(words, (at, e.bpb), fontsize=9.5, **beside)
            axis.set_ylim(low, high)
            axis.set_xlabel(name)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.grid(color=LIGHT["line"], linewidth=0.6)
            axis.tick_params(length=0)
        axes[0].set_ylabel("val_bpb")
        return figure


def place(night, experiment):
    """The id of an experiment on the page."""
    return f"e-{re.sub('[^A-Za-z0-9]', '-', night.tag)}-{experiment.number}"


def png(figure):
    """The figure as bytes of a PNG, 100 dots an inch."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, facecolor=LIGHT["paper"])
    plt.close(figure)
    return out.getvalue()


def svg(figure, name, alt):
    """The figure as SVG to stand in a page: its colours are the page's, its ids its own."""
    out = io.StringIO()
    with plt.rc_context(STYLE):
        figure.savefig(out, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for variable, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)(?!e-)', rf"\1{name}-", text)
    text = re.sub(r'(?<=\b[dxy]=")[^"]+', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), text)
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("<a xlink:href", '<a tabindex="-1" href')
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{alt}" ', text, count=1)
