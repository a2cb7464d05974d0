"""Line plots over the training step as inline SVG that follows the page's light and dark style."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from cgtgan.errors import InputError

SMOOTH_FROM = 60  # points from which a noisy curve is drawn thin, with its moving average over it
LARGEST = 1e300  # beyond it a difference of two values may be infinite; treated as not finite
INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#1f5fa8", "#b4470f", "#1a7344", "#8a3fa0", "#a8324a", "#5c6414", "#0c6f7a", "#6b5646")  # --c0 to --c7 of the page
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so the layout is the same everywhere; the page shows its own font
    "legend.fontsize": 9,
    "text.parse_math": False,  # a dollar in a label is a dollar
    "axes.formatter.useoffset": False,
    "path.simplify_threshold": 0.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK),
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot. `steps` and `values` have the same length; a value that is not finite leaves a gap."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """Curves over the training step, in the unit that `y_label` names; a `note` is printed under the plot."""

    title: str
    y_label: str
    curves: Sequence[Curve]
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """A plot ready for the template; `svg` is empty when there is nothing to draw."""

    plot: Plot
    svg: Markup
    note: str


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values, short at the ends; what is not finite becomes NaN and counts for no other."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return array
    finite = np.abs(array) < LARGEST
    kernel = np.ones(min(window, len(array)))
    total, count = (np.convolve(np.where(finite, x, 0.0), kernel, "same") for x in (array, 1.0))
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def draw(plot: Plot) -> Drawing:
    """Raises InputError when a curve's steps and values differ in length."""
    for curve in plot.curves:
        if len(curve.steps) != len(curve.values):
            sizes = f"{len(curve.steps)} steps and {len(curve.values)} values"
            raise InputError(f"plot '{plot.title}', curve '{curve.label}': {sizes}; give one value a step")
    points = [[(x, y) for x, y in zip(c.steps, c.values, strict=True) if abs(y) < LARGEST] for c in plot.curves]
    steps = [x for curve in points for x, _ in curve]
    missing = sum(len(curve.values) for curve in plot.curves) - len(steps)
    notes = [plot.note.rstrip(".") + "."] if plot.note else []
    if missing:
        notes.append(f"{missing} {'value is' if missing == 1 else 'values are'} not finite and left out.")
    if not steps:
        return Drawing(plot, Markup(), " ".join(notes))
    if any(len(curve.values) >= SMOOTH_FROM for curve in plot.curves):
        notes.append("Faint: as logged; solid: moving average over a twentieth of the run.")
    lasts = [f"{curve[-1][1]:.3g}" if curve else "no value" for curve in points]
    ends = "; ".join(f"{curve.label} ends at {last}" for curve, last in zip(plot.curves, lasts, strict=True))
    alt = f"Line chart of {plot.y_label} from step {min(steps):,} to {max(steps):,}: {ends}."
    svg = re.sub('<g id="[^"]*"', "<g", _svg(plot, lasts))  # matplotlib's group names are the same in every figure
    svg = re.sub('width="[^"]*" height="[^"]*"', lambda _: f'width="100%" role="img" aria-label="{escape(alt)}"', svg, count=1)
    svg = svg.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{i}, {colour})")
    return Drawing(plot, Markup(svg), " ".join(notes))


def _svg(plot: Plot, lasts: Sequence[str]) -> str:
    """matplotlib's <svg> element; `lasts` are the curves' last values for the legend."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    names = [curve.label.encode("utf-8", "replace").decode() for curve in plot.curves]
    names = [name if len(name) <= 34 else name[:33] + "…" for name in names]
    legend = [f"{name} (last {last})" for name, last in zip(names, lasts, strict=True)]
    legend_columns = 2 if max(map(len, legend)) <= 20 else 1
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": ascii(plot.title)}):
        figure = Figure(figsize=(4.2, 2.6 + 0.18 * math.ceil(len(legend) / legend_columns)), layout="constrained")
        axes, lines = figure.subplots(), []
        for i, curve in enumerate(plot.curves):
            steps, values, colour = np.asarray(curve.steps), smooth(curve.values, 1), COLOURS[i % 8]
            if len(values) >= SMOOTH_FROM:
                axes.plot(steps, values, color=colour, lw=0.7, alpha=0.3, clip_on=False)
                values = smooth(values, len(values) // 20 | 1)
            lines += axes.plot(steps, values, color=colour, ls=DASHES[(i + i // 8) % 4], lw=1.6, clip_on=False)
            gaps = np.pad(np.isnan(values), 1, constant_values=True)
            alone = ~gaps[1:-1] & gaps[:-2] & gaps[2:]  # a line of one point would not be seen
            if alone.any():
                axes.plot(steps[alone], values[alone], "o", color=colour, ms=3, clip_on=False)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", alpha=0.2, lw=0.6)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        figure.legend(lines, legend, loc="outside upper left", ncols=legend_columns, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()[file.getvalue().index("<svg") :]
