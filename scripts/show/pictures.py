"""The picture of a night: every experiment in order, and the kept ones as a staircase."""

import io
import warnings

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scripts.session import cut, one_line

COLOURS = {"paper": "#fefefd", "ink": "#1c2127", "quiet": "#5f6873", "line": "#d5dae0", "dot": "#7f8b98",
           "good": "#0a7d4f", "doubt": "#b26a00", "bad": "#c2413a"}  # fmt: skip
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 11, "text.color": COLOURS["ink"], "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": COLOURS["line"], "axes.axisbelow": True,
    "axes.labelcolor": COLOURS["quiet"], "xtick.color": COLOURS["quiet"], "ytick.color": COLOURS["quiet"],
    "savefig.facecolor": COLOURS["paper"], "axes.facecolor": "none",
}  # fmt: skip
LISTED = 8  # of the kept changes, those that gained most, which stand as text in the picture
KINDS = {  # status or trust: what it is called, its marker, size in points, inside, edge
    "discard": ("discarded", "o", 6, "dot", "paper"), "crash": ("crashed", "x", 6, "bad", "bad"),
    "safe": ("safe", "o", 9, "good", "paper"), "doubtful": ("doubtful", "o", 8, "paper", "good"),
    "unproven": ("unproven", "o", 8, "paper", "doubt"), "keep": ("baseline", "s", 8, "good", "paper"),
}  # fmt: skip
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # scripts that the font lacks: boxes, and no word


def progress(night, kind):
    """All experiments of a night as the bytes of a `png`, which stands alone, or of the `svg` for the page."""
    alone, out = kind == "png", io.BytesIO()
    matplotlib.rcdefaults()  # a person's own settings have no say
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(12, 6.75 if alone else 3.2), dpi=100)
    axis = figure.subplots(gridspec_kw={"left": 0.07, "right": 0.99, "top": 0.85, "bottom": 0.11 if alone else 0.16})
    chain, end, (low, high) = night.chain, len(night.experiments) + 1, bounds(night, 0.5 if alone else 0.15)
    axis.set(xlim=(0, end), ylim=(low, high), xlabel="experiment", ylabel="val_bpb, bits per byte")
    axis.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if chain:
        edges, levels = [*(e.number for e in chain), end], [*(e.bpb for e in chain), chain[-1].bpb]
        axis.step(edges, levels, where="post", color=COLOURS["good"], linewidth=1.6)
    for e in night.kept:
        if e.gain:  # 95 % of it, against what it was compared with
            axis.errorbar(e.number, e.bpb, 1.96 * min(e.gain.error, high - low), ecolor=COLOURS["dot"], elinewidth=1)
    for sort, (name, marker, size, inside, edge) in KINDS.items():
        found = [e for e in night.experiments if (e.trust or e.status) == sort]
        heights = [low + 0.03 * (high - low) if sort == "crash" else min(e.bpb, high) for e in found]
        look = {"color": COLOURS[inside], "markeredgecolor": COLOURS[edge], "markersize": size, "label": name}
        if found:
            axis.plot([e.number for e in found], heights, marker, clip_on=False, zorder=4, **look)
    figure.legend(loc="upper right", bbox_to_anchor=(0.995, 0.99), ncols=len(KINDS), frameon=False, fontsize=10)
    if alone:
        most = sorted(chain[1:], key=lambda e: -e.gain.gain)[:LISTED]
        kept = [f"{e.number:3}  {e.gain.gain:+.4f}  {cut(one_line(e.description), 40)}" for e in chain if e in most]
        look = {"fontsize": 9.5, "backgroundcolor": COLOURS["paper"], "transform": axis.transAxes}
        axis.text(0.015, 0.06, "\n".join(kept), **look)  # below the steps
        fell = f"val_bpb {night.first.bpb:.4f} → {night.best.bpb:.4f}" if night.gain else "no gain yet"
        figure.text(0.07, 0.95, f"{night.tag}: {fell}", fontsize=16, fontweight="bold", va="center")
        figure.text(0.07, 0.9, night.circumstances, fontsize=10.5, color=COLOURS["quiet"], va="center")
    figure.savefig(out, format=kind, dpi=100)
    return out.getvalue()


def bounds(night, below):
    """(lowest, highest) val_bpb to show: all that was kept, and what lies near; what is above is drawn on the edge."""
    kept = [e.bpb for e in night.kept]
    if not kept:
        return 0.0, 1.0
    span = max(max(kept) - min(kept), 6 * night.evidence.sigma, 0.004)
    return min(kept) - below * span, max(kept) + 0.25 * span
