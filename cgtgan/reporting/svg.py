"""Line plots over the training step and histograms as inline SVG in the page's light or dark colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from cgtgan.errors import InputError

SMOOTH_FROM = 60  # points from which a noisy curve is drawn thin, with its moving average over it
LARGEST = 1e300  # beyond it a difference of two values may be infinite; treated as not finite
INK = "#010203"  # stands for the page's text colour until the SVG is written
# --c0 to --c7 of the page
COLOURS = ("#1f5fa8", "#b4470f", "#1a7344", "#8a3fa0", "#a8324a", "#5c6414", "#0c6f7a", "#6b5646")
BINS = 24
TEXT_HEIGHT = 0.085  # of a line's name, as a share of the axes
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (7, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 2.5)))
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same layout everywhere; the page shows its own font
    "legend.fontsize": 9,
    "text.parse_math": False,  # a dollar in a label is a dollar
    "axes.formatter.useoffset": False,
    "path.simplify_threshold": 0.5,
    **dict.fromkeys(_INKED, INK),
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot: `steps`, `values` and, if given, `spread` have one length; a value not finite leaves a gap.

    `spread`: half the height of the band behind it. `style`: number of its colour and dashes, by default its place.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    spread: Sequence[float] = ()
    style: int | None = None


@dataclass(frozen=True)
class Plot:
    """Curves over the training step; `y_label` names their unit, `note` stands under them, `level` is a dotted line.

    `context`: further curves, drawn thin and grey behind the others, without a name. `lines`: name -> value of dashed
    lines to compare with, each named at its right end.
    """

    title: str
    y_label: str
    curves: Sequence[Curve]
    note: str = ""
    level: float | None = None
    context: Sequence[Curve] = ()
    lines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """How often values occur. `values`: label -> one value per image, in the unit that `x_label` names."""

    title: str
    x_label: str
    values: Mapping[str, Sequence[float]]
    note: str = ""


class Drawing(NamedTuple):
    """A plot ready for the template; `svg` is empty when there is nothing to draw."""

    unit: str
    svg: Markup
    note: str


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values, fewer at the ends; a value that is not finite becomes NaN."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return array
    finite = np.abs(array) < LARGEST
    kernel = np.ones(min(window, len(array)))
    total, count = (np.convolve(np.where(finite, x, 0.0), kernel, "same") for x in (array, 1.0))
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def draw(plot: Plot | Histogram) -> Drawing:
    """Raises InputError when a curve's steps and values differ in length."""
    return _lines(plot) if isinstance(plot, Plot) else _histogram(plot)


def _lines(plot: Plot) -> Drawing:
    for curve in (*plot.curves, *plot.context):
        if len(curve.steps) != len(curve.values) or (curve.spread and len(curve.spread) != len(curve.values)):
            sizes = f"{len(curve.steps)} steps and {len(curve.values)} values"
            sizes += f" with {len(curve.spread)} spreads" if curve.spread else ""
            raise InputError(f"plot '{plot.title}', curve '{curve.label}': {sizes}; give one value per step")
    points = [[(x, y) for x, y in zip(c.steps, c.values, strict=True) if abs(y) < LARGEST] for c in plot.curves]
    steps = [x for curve in points for x, _ in curve]
    notes = _notes(plot.note, sum(len(curve.values) for curve in plot.curves) - len(steps))
    if not steps:
        return Drawing(plot.y_label, Markup(), notes)
    if any(len(curve.values) >= SMOOTH_FROM for curve in plot.curves):
        notes = f"{notes} Faint: as logged; solid: moving average over a twentieth of the run.".lstrip()
    lasts = [f"{curve[-1][1]:.3g}" if curve else "no value" for curve in points]
    ends = "; ".join(f"{curve.label} ends at {last}" for curve, last in zip(plot.curves, lasts, strict=True))
    alt = f"Line chart of {plot.y_label} from step {min(steps):,} to {max(steps):,}: {ends}."
    lines = {name: value for name, value in plot.lines.items() if abs(value) < LARGEST}
    if lines:
        alt += f" Dashed lines: {', '.join(f'{name} {value:.3g}' for name, value in lines.items())}."

    def fill(axes: Any) -> list[Any]:
        handles = []
        for curve in plot.context:
            axes.plot(curve.steps, smooth(curve.values, 1), color=INK, lw=0.8, alpha=0.25)
        for place, curve in enumerate(plot.curves):
            i = place if curve.style is None else curve.style
            steps, values, colour = np.asarray(curve.steps), smooth(curve.values, 1), COLOURS[i % 8]
            spread = smooth(curve.spread, 1)
            if len(values) >= SMOOTH_FROM:
                axes.plot(steps, values, color=colour, lw=0.7, alpha=0.3, clip_on=False)
                values, spread = (smooth(x, len(values) // 20 | 1) for x in (values, spread))
            if len(spread):
                axes.fill_between(steps, values - spread, values + spread, color=colour, alpha=0.18, lw=0)
            dashes = DASHES[(i + i // 8) % len(DASHES)]
            handles += axes.plot(steps, values, color=colour, ls=dashes, lw=1.6, clip_on=False)
            gaps = np.pad(np.isnan(values), 1, constant_values=True)
            alone = ~gaps[1:-1] & gaps[:-2] & gaps[2:]  # a line of one point would not be seen
            if alone.any():
                axes.plot(steps[alone], values[alone], "o", color=colour, ms=3, clip_on=False)
        if plot.level is not None:
            axes.axhline(plot.level, color=INK, lw=0.9, ls=(0, (1, 3)))
        _draw_lines(axes, lines)
        return handles

    legend = [f"{_short(curve.label)} (last {last})" for curve, last in zip(plot.curves, lasts, strict=True)]
    return Drawing(plot.y_label, _svg(plot.title, "step", legend, alt, fill), notes)


def _draw_lines(axes: Any, lines: Mapping[str, float]) -> None:
    """Each with its name and value beside the axes; names that would overlap are moved apart and joined to theirs."""
    for value in lines.values():
        axes.axhline(value, color=INK, lw=0.8, ls=(0, (6, 4)), alpha=0.6)
    low, high = axes.get_ylim()
    ordered = sorted(lines.items(), key=lambda line: line[1])
    for (name, value), place in zip(ordered, _apart([(v - low) / (high - low) for _, v in ordered]), strict=True):
        axes.annotate(
            f"{_short(name)} {value:.3g}", (1, value), (1.04, place), axes.get_yaxis_transform(), "axes fraction",
            {"arrowstyle": "-", "color": INK, "lw": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
            annotation_clip=False, fontsize=9, va="center",
        )  # fmt: skip


def _apart(places: Sequence[float]) -> list[float]:
    """Heights in ascending order, as shares of the axes, moved as little as leaves a line of text between them."""
    # names that touch: the sum of the heights at which each would have the list of all names begin, and their number
    groups: list[tuple[float, int]] = []
    for i, place in enumerate(places):
        total, count = place - i * TEXT_HEIGHT, 1
        while groups and groups[-1][0] / groups[-1][1] > total / count:
            total, count = total + groups[-1][0], count + groups.pop()[1]
        groups.append((total, count))
    starts = [total / count for total, count in groups for _ in range(count)]
    highest = 1 - (len(places) - 1) * TEXT_HEIGHT
    return [min(max(start, 0.0), highest) + i * TEXT_HEIGHT for i, start in enumerate(starts)]


def _histogram(plot: Histogram) -> Drawing:
    values = {label: np.asarray([y for y in column if abs(y) < LARGEST]) for label, column in plot.values.items()}
    values = {label: column for label, column in values.items() if len(column)}
    notes = _notes(plot.note, sum(map(len, plot.values.values())) - sum(map(len, values.values())))
    if not values:
        return Drawing(plot.x_label, Markup(), notes)
    everything = np.concatenate(list(values.values()))
    if (everything == everything.round()).all() and np.ptp(everything) <= 2 * BINS:  # counts: one bar per number
        edges = np.arange(everything.min() - 0.5, everything.max() + 1)
    else:
        edges = np.histogram_bin_edges(everything, min(BINS, 5 + len(everything) // 12))
    quartiles = {label: np.quantile(column, (0.25, 0.5, 0.75)) for label, column in values.items()}
    middles = (f"{k}: median {b:.3g}, half of them from {a:.3g} to {c:.3g}" for k, (a, b, c) in quartiles.items())
    alt = f"Histogram of {plot.x_label} over {max(map(len, values.values())):,} images. {'; '.join(middles)}."

    def fill(axes: Any) -> list[Any]:
        drawn = []
        for i, column in enumerate(values.values()):
            counts, colour = np.histogram(column, edges)[0], COLOURS[i % 8]
            if i == 0:
                axes.stairs(counts, edges, color=colour, fill=True, alpha=0.22, lw=0)
            drawn.append(axes.stairs(counts, edges, color=colour, ls=DASHES[i % 4], lw=1.6))
        axes.set_ylim(0)
        return drawn

    legend = [f"{_short(label)} (median {b:.3g})" for label, (_, b, _) in quartiles.items()]
    return Drawing("images", _svg(plot.title, plot.x_label, legend, alt, fill), notes)


def _notes(note: str, missing: int) -> str:
    given = f"{note.rstrip('.')}." if note else ""
    left_out = f"{missing} {'value is' if missing == 1 else 'values are'} not finite and left out." if missing else ""
    return f"{given} {left_out}".strip()


def _short(name: str) -> str:
    name = name.encode("utf-8", "replace").decode()
    return name if len(name) <= 34 else name[:33] + "…"


def _svg(title: str, x_label: str, legend: Sequence[str], alt: str, fill: Callable[[Any], list[Any]]) -> Markup:
    """matplotlib's <svg> in the page's colours; `fill` draws into the axes and returns the artists of the legend."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    legend_columns = 2 if max(map(len, legend)) <= 20 else 1
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": ascii(title)}):
        figure = Figure(figsize=(4.2, 2.6 + 0.18 * math.ceil(len(legend) / legend_columns)), layout="constrained")
        axes = figure.subplots()
        handles = fill(axes)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", alpha=0.2, lw=0.6)
        axes.set_xlabel(x_label)
        if x_label == "step":
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=x_label != "step"))
        figure.legend(handles, legend, loc="outside upper left", ncols=legend_columns, frameon=False)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub('<g id="[^"]*"', "<g", svg)  # matplotlib's group names are the same in every figure
    size = f'width="100%" role="img" aria-label="{escape(alt)}"'
    svg = re.sub('width="[^"]*" height="[^"]*"', lambda _: size, svg, count=1)
    svg = svg.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{i}, {colour})")
    return Markup(svg)
