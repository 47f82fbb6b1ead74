"""The picture of a night: every experiment in order, and the kept ones as a staircase.

It is drawn with matplotlib's own settings: neither MPLBACKEND nor a person's matplotlibrc has a say.
"""

import io
import logging
import os
import warnings

os.environ.pop("MPLBACKEND", None)  # a notebook's, which this Python may not have
logging.getLogger("matplotlib").setLevel(logging.ERROR)
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from scripts.session import cut, one_line  # noqa: E402

COLOURS = {"paper": "#fefefd", "ink": "#1c2127", "quiet": "#5f6873", "line": "#d5dae0", "dot": "#7f8b98",
         "good": "#0a7d4f", "doubt": "#b26a00", "bad": "#c2413a"}  # fmt: skip
LABEL, LABELS = 40, 24  # characters of a description; how many are shown
PAPER = {"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1}  # behind words
STYLE = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["quiet"], "xtick.color": COLOURS["quiet"], "ytick.color": COLOURS["quiet"],
    "text.color": COLOURS["ink"], "axes.facecolor": "none", "text.parse_math": False,
    "font.family": "DejaVu Sans", "axes.axisbelow": True,
}  # fmt: skip
KINDS = {  # name: marker, its area, edge, inside
    "discarded": ("o", 32, "paper", "dot"), "crashed": ("x", 26, "bad", "bad"), "safe": ("o", 70, "paper", "good"),
    "doubtful": ("o", 55, "good", "paper"), "unproven": ("o", 55, "doubt", "paper"),
    "baseline": ("s", 50, "paper", "good"),
}  # fmt: skip
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # scripts that the font lacks: boxes, and no word


def progress(nights):
    """A figure with an axis for each night, all on one scale."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(12, 6.75), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(nights), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.075, right=0.98, top=0.85, bottom=0.11, wspace=0.06)
    for night, axis in zip(nights, axes, strict=True):
        one_night(axis, night, bounds(nights))
    axes[0].set_ylabel("val_bpb, bits per byte")
    shown = {}
    for axis in axes:
        shown |= {words: mark for mark, words in zip(*axis.get_legend_handles_labels(), strict=True)}
    where = {"loc": "upper right", "bbox_to_anchor": (0.99, 0.99), "ncols": len(KINDS)}
    look = {"frameon": False, "fontsize": 10, "labelcolor": COLOURS["quiet"], "handletextpad": 0.2, "columnspacing": 1}
    figure.legend([*shown.values()], [*shown], **where, **look)
    figure.text(0.075, 0.95, title(nights), fontsize=16, fontweight="bold", va="center")
    words = "  ·  ".join(n.circumstances for n in nights)
    figure.text(0.075, 0.9, words, fontsize=10.5, color=COLOURS["quiet"], va="center")
    return figure


def title(nights):
    words = []
    for n in nights:
        fell = f"val_bpb {n.first.bpb:.4f} → {n.best.bpb:.4f}" if n.best and n.best is not n.first else "no gain yet"
        words.append(f"{n.tag}: {fell}")
    return "  ·  ".join(words)


def bounds(nights):
    """(lowest, highest) val_bpb to show: all that was kept, and what lies near; an outlier is drawn on the edge."""
    kept = [e.bpb for n in nights for e in n.kept]
    if not kept:
        return 0.0, 1.0
    tried = [e.bpb for n in nights for e in n.experiments if e.status != "crash"]
    sigma = max(n.evidence.sigma for n in nights if n.evidence)
    span = max(max(kept) - min(kept), 6 * sigma, 0.004)
    high = max(max(kept) + 0.15 * span, min(float(np.quantile(tried, 0.9)), max(kept) + 0.8 * span))
    low = min(kept)
    return low - 0.3 * (high - low), high + 0.05 * (high - low)


def one_night(axis, night, limits):
    low, high = limits
    count = max(2, len(night.experiments))
    axis.set_ylim(low, high)
    axis.set_xlim(0.5 - 0.01 * count, count + 0.5 + 0.01 * count)
    axis.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    axis.tick_params(length=0)
    axis.set_xlabel("experiment")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    chain = night.chain
    if chain:
        edges = [*(e.number for e in chain), count + 0.5]
        look = {"where": "post", "zorder": 2, "color": COLOURS["good"], "linewidth": 1.6}
        axis.step(edges, [e.bpb for e in [*chain, chain[-1]]], **look)
    for name, (marker, area, edge, inside) in KINDS.items():
        found = [e for e in night.experiments if kind(e) == name]
        if not found:
            continue
        if name in ("safe", "doubtful", "unproven"):  # 95 % of the gain, against what it was compared with
            x, y, half = zip(*((e.number, e.bpb, 1.96 * min(e.gain.error, high - low)) for e in found), strict=True)
            axis.errorbar(x, y, half, fmt="none", ecolor=COLOURS["dot"], elinewidth=1, zorder=3)
        y = [low + 0.03 * (high - low) if name == "crashed" else min(e.bpb, high) for e in found]
        look = {"marker": marker, "color": COLOURS[inside], "label": name, "clip_on": False, "zorder": 4}
        look |= {} if marker == "x" else {"edgecolors": COLOURS[edge], "linewidths": 1.8 if inside == "paper" else 0.8}
        axis.scatter([e.number for e in found], y, area, **look)
    put_labels(axis, chain)


def kind(e):
    """Which of KINDS an experiment is."""
    return e.trust or {"discard": "discarded", "crash": "crashed"}.get(e.status, "baseline")


def put_labels(axis, chain):
    """Text below and left of the kept points, where nothing can be: each in a line of its own, or not at all."""
    renderer = axis.figure.canvas.get_renderer()
    frame, below = axis.get_window_extent(renderer), float("inf")
    wanted = sorted(chain[1:], key=lambda e: -e.gain.gain)[:LABELS]
    for e in sorted(wanted, key=lambda e: e.number):
        text = f"{cut(one_line(e.description), LABEL)}  {-e.gain.gain:+.4f}".replace("-0.", "\u22120.")
        x, y = axis.transData.transform((e.number, e.bpb))
        look = {"fontsize": 9.5, "ha": "right", "va": "top", "zorder": 3, "bbox": PAPER}
        label = axis.text(0, 0, text, **look)
        box = label.get_window_extent(renderer)
        top, right = min(y - 5, below), max(x - 7, frame.x0 + 4 + 1.05 * box.width)
        if top - box.height < frame.y0 + 0.08 * frame.height:  # there crashes are marked
            label.remove()
            continue
        below = top - 1.15 * box.height
        label.set_position(axis.transData.inverted().transform((right, top)))


def saved(figure, kind):
    """The figure as the bytes of a `png`, 100 dots an inch, or of an `svg`."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=100, facecolor=COLOURS["paper"])
    return out.getvalue()
