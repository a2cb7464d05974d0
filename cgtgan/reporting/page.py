"""The report page and the gallery page (one self-contained HTML file each); the comparison table for the console and as Markdown.

Plain data comes in and a string goes out. A page makes no request of any kind: style inline, pictures as data URIs, curves as SVG,
and a Content-Security-Policy that forbids everything else. The report has one script, search and sorting, which the policy names by
its hash; without it the page lacks that section alone. Captions, file names and labels are untrusted text, which jinja2 escapes.
Scores are shown the way papers print them, times 100.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from cgtgan.reporting.curves import Curve, Histogram, Plot, draw
from cgtgan.reporting.pictures import UNREADABLE, embed, pick_gallery

__all__ = ["Change", "Changes", "Curve", "GalleryItem", "Histogram", "MethodRow", "Plot", "Report"]
__all__ += ["comparison_table", "is_times_100", "markdown_table", "pick_gallery", "render_gallery", "render_report"]

# other columns (a length, a count) stay as measured
TIMES_100 = ("bleu", "meteor", "rouge", "cider", "spice", "clipscore", "refclipscore")
TEMPLATES = Path(__file__).parent / "templates"
DISCRIMINATOR = (
    "It should tell corpus sentences from samples, but not always: right on half of them is chance, right on all of them for long "
    "means that it has won and naturalness teaches nothing more."
)


@dataclass(frozen=True)
class MethodRow:
    """A row of the comparison table; `scores` maps a metric to its raw values (CIDEr 2.39, not 239), one a seed."""

    name: str
    note: str = ""
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ours: bool = False
    bound: bool = False  # supervised or human: set apart, never the bold one
    published: bool = False  # printed in the paper, not measured here: set apart, never the bold one
    decoding: str = ""

    @property
    def apart(self) -> bool:
        return self.bound or self.published


@dataclass(frozen=True)
class GalleryItem:
    """A picture (None: only its embedding was given) and what was said about it.

    `extra` maps another method's name to its caption, `cider` is the raw score. `scores` maps a metric to the picture's raw value and
    `extra_scores` another method's name to its values; any may be missing.
    """

    image_id: int | str
    image: Path | None
    caption: str
    references: Sequence[str] = ()
    cider: float | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    extra_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """What two generators said about one picture; `gain` is the raw difference in CIDEr, where it is known."""

    item: GalleryItem
    before: str
    gain: float | None = None


@dataclass(frozen=True)
class Changes:
    """Pictures whose captions differ between two generators, named `before` and `after`; the items' captions are the later ones."""

    title: str
    note: str
    before: str
    after: str
    changes: Sequence[Change]


@dataclass(frozen=True)
class Report:
    """Everything the page shows. The first row marked `ours` makes the summary line; `metrics` is the order of the columns.

    `more_metrics` are the columns of a second table. `pictures` are searched and sorted; `thumbnails` maps the ids of some to (data URI,
    whether it is pixel art), `method` is who wrote their captions and `left_out` says which pictures or thumbnails are not there.
    """

    title: str
    subtitle: str = ""
    warning: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = ()
    rows: Sequence[MethodRow] = ()
    more_metrics: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    discriminator: Sequence[Plot] = ()
    health: Mapping[str, str] = field(default_factory=dict)
    distributions: Sequence[Plot | Histogram] = ()
    changes: Sequence[Changes] = ()
    method: str = ""
    pictures: Sequence[GalleryItem] = ()
    thumbnails: Mapping[int | str, tuple[str, bool]] = field(default_factory=dict)
    left_out: str = ""
    best: Sequence[GalleryItem] = ()
    worst: Sequence[GalleryItem] = ()
    random: Sequence[GalleryItem] = ()
    config_yaml: str = ""
    notes: Sequence[str] = ()


def render_report(report: Report) -> str:
    """The report as one HTML document. Raises InputError when a curve's steps and values differ in length."""
    sections = [
        ("best", "Best captions", "Test pictures with the highest CIDEr.", report.best),
        ("worst", "Worst captions", "Test pictures with the lowest CIDEr: where to look first.", report.worst),
        ("random", "Random captions", "Drawn at random: what to expect.", report.random),
    ]
    script = (TEMPLATES / "report_pictures.js").read_text(encoding="utf-8") if report.pictures else ""
    return render_template(
        "report.html.j2",
        report=report,
        summary=_summary(report.rows, report.metrics),
        tables=[
            _table(report.rows, metrics) for metrics in (report.metrics, report.more_metrics) if metrics and report.rows
        ],
        several_seeds=_seeds(report.rows) > 1,
        decoding=any(row.decoding for row in report.rows),
        plots=[
            (key, heading, note, facts, [draw(plot) for plot in plots])
            for key, heading, note, facts, plots in (
                ("curves", "Curves", "", {}, report.plots),
                ("discriminator", "The discriminator", DISCRIMINATOR, report.health, report.discriminator),
                ("distributions", "Distributions", "", {}, report.distributions),
            )
            if plots
        ],
        changes=[(changes, [_changed(change) for change in changes.changes]) for changes in report.changes],
        sections=[
            (key, heading, note, [picture_card(item) for item in items])
            for key, heading, note, items in sections
            if items
        ],
        data=_as_data(report),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def render_gallery(title: str, items: Sequence[GalleryItem], total: int | None = None) -> str:
    """Pictures with their captions as one HTML document; references and scores appear only where an item has them.

    `total`: how many there are where `items` are only the first of them.
    """
    count = f"{len(items):,} {'picture' if len(items) == 1 else 'pictures'}"
    if total is not None and total > len(items):
        count = f"the first {len(items):,} of {total:,} pictures; the file of captions has all"
    return render_template("gallery.html.j2", title=title, subtitle=count, cards=[picture_card(item) for item in items])


def render_template(template: str, **values: object) -> str:
    # autoescape must be True and not select_autoescape(), which does not know the ending .j2
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode(
        "utf-8"
    )  # a lone surrogate in a caption must not make the page unwritable


# ---- scores ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    mean: str
    spread: str = ""  # '± 1.2'
    note: str = ""  # '2/3 seeds finite'
    best: bool = False


def is_times_100(metric: str) -> bool:
    return metric.lower().startswith(TIMES_100)


def shown_score(metric: str, value: float, beside: float | None = None) -> str:
    """`value` times 100 with one decimal; for other columns the decimals that suit `beside` (a spread is printed like its mean)."""
    if is_times_100(metric):
        return f"{value * 100:.1f}"
    size = abs(value if beside is None else beside)
    return f"{value:,.{3 if size < 1 else 2 if size < 100 else 0}f}"


def _finite_mean(row: MethodRow, metric: str) -> float | None:
    finite = [value for value in row.scores.get(metric, ()) if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _seeds(rows: Sequence[MethodRow]) -> int:
    return max((len(values) for row in rows for values in row.scores.values()), default=0)


def _cell(row: MethodRow, metric: str, best: str | None) -> Cell:
    values = row.scores.get(metric, ())
    mean = _finite_mean(row, metric)
    if mean is None:
        return Cell("NaN" if values else "-")
    finite = [value for value in values if math.isfinite(value)]
    spread = f"± {shown_score(metric, statistics.stdev(finite), mean)}" if len(finite) > 1 else ""
    note = "" if len(finite) == len(values) else f"{len(finite)}/{len(values)} seeds finite"
    return Cell(shown_score(metric, mean), spread, note, best=not row.apart and shown_score(metric, mean) == best)


def table_cells(rows: Sequence[MethodRow], metrics: Sequence[str]) -> list[list[Cell]]:
    """The cells of every row, in the order of `rows`. What looks equal in a column is bold together."""
    best: dict[str, str | None] = dict.fromkeys(metrics)
    for metric in metrics:
        if not is_times_100(metric):
            continue  # more is not better for a length or a count
        means = [mean for row in rows if not row.apart and (mean := _finite_mean(row, metric)) is not None]
        best[metric] = shown_score(metric, max(means)) if means else None
    return [[_cell(row, metric, best[metric]) for metric in metrics] for row in rows]


def _cells(rows: Sequence[MethodRow], metrics: Sequence[str]) -> list[tuple[MethodRow, int, list[Cell]]]:
    """(row, seeds, cells) for every row, bounds and then published rows last."""
    ordered = sorted(rows, key=lambda row: (row.published, row.bound))
    return [(row, _seeds([row]), cells) for row, cells in zip(ordered, table_cells(ordered, metrics), strict=True)]


def _table(
    rows: Sequence[MethodRow], metrics: Sequence[str]
) -> tuple[list[tuple[str, bool]], list[tuple[str, list[Any]]]]:
    """(columns with whether they are times 100, groups of rows with their heading)."""
    cells = _cells(rows, metrics)
    groups = [
        ("", [line for line in cells if not line[0].apart]),
        ("For orientation: supervised on pairs, or human", [line for line in cells if line[0].bound]),
        # the paper has no CLIPScore: a line of dashes
        (
            "Published: the paper's figures, not measured here",
            [x for x in cells if x[0].published and any(c.mean != "-" for c in x[2])],
        ),
    ]
    return [(metric, is_times_100(metric)) for metric in metrics], [(name, lines) for name, lines in groups if lines]


def _summary(rows: Sequence[MethodRow], metrics: Sequence[str]) -> str:
    """'A reaches CIDEr 239.0 ± 4.1 (5 seeds): 12.0 above B (227.0), ...; 93% of C (256.0).' Empty without a scored `ours` row."""
    metric = next((metric for metric in metrics if metric.lower() == "cider"), metrics[-1] if metrics else "")
    ours = next((row for row in rows if row.ours and _finite_mean(row, metric) is not None), None)
    if ours is None or (mean := _finite_mean(ours, metric)) is None:
        return ""
    cell, seeds = _cell(ours, metric, None), len(ours.scores[metric])
    text = f"{ours.name} reaches {metric} {cell.mean} {cell.spread}".rstrip()
    if seeds > 1:
        text += f" ({cell.note or f'{seeds} seeds'})"
    parts = []
    scored = [(value, row) for row in rows if not row.ours and (value := _finite_mean(row, metric)) is not None]
    value, other = max(
        ((value, row) for value, row in scored if not row.apart), key=lambda pair: pair[0], default=(0.0, None)
    )
    if other:
        gap = f"{shown_score(metric, abs(mean - value), mean)} {'above' if mean >= value else 'below'}"
        parts.append(f"{gap} {other.name} ({shown_score(metric, value)}), the best other unpaired method")
    for value, row in scored:
        if row.bound and value > 0:
            parts.append(f"{100 * mean / value:.0f}% of {row.name} ({shown_score(metric, value)})")
        if row.published:
            parts.append(f"against {shown_score(metric, value)} of {row.name}")
    return text + (": " + "; ".join(parts) if parts else "") + "."


def comparison_table(rows: Sequence[MethodRow], metrics: Sequence[str]) -> Table:
    """The comparison for the console: times 100, the mean above ± its standard deviation (n-1), the best unpaired value bold."""
    several = _seeds(rows) > 1
    scaled = ", ".join(metric for metric in metrics if not is_times_100(metric))
    caption = f"scores x 100{f' (not {scaled})' if scaled else ''}; bold: best unpaired"
    if several:
        caption += "; ± standard deviation over seeds (n-1)"
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption), caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=18)  # the only column that gives way in a narrow console
    if several:
        table.add_column("seeds", justify="right", no_wrap=True)
    for metric in metrics:
        table.add_column(Text(metric.replace(" ", "\n")), justify="right", no_wrap=True, vertical="top")
    group = (False, False)
    for row, seeds, cells in _cells(rows, metrics):
        if (row.bound, row.published) != group:
            table.add_section()
            group = (row.bound, row.published)
        name = Text(
            row.name, style="bold cyan" if row.ours else "italic" if row.apart else ""
        )  # Text: a name is never markup
        if about := [
            part
            for part in ("bound" if row.bound else "", row.note, f"decoding: {row.decoding}" if row.decoding else "")
            if part
        ]:
            name.append("\n" + ", ".join(filter(None, about)), style="not bold dim")
        shown = []
        for cell in cells:
            text = Text(cell.mean, style="bold" if cell.best else "")
            for extra in filter(None, (cell.spread, cell.note.replace(" ", "\n"))):
                text.append("\n" + extra, style="not bold dim")
            shown.append(text)
        table.add_row(name, *([Text(str(seeds))] if several else []), *shown)
    return table


def markdown_table(rows: Sequence[MethodRow], metrics: Sequence[str]) -> str:
    """The comparison as a GitHub Markdown table: bounds and published rows last, 'mean ± standard deviation' (n-1), best unpaired bold."""
    lines = [["method", "note", "decoding", *metrics], [":--", ":--", ":--", *("--:" for _ in metrics)]]
    for row, _, cells in _cells(rows, metrics):
        shown = (f"**{cell.mean}**" if cell.best else cell.mean for cell in cells)
        notes = (f"({cell.note})" if cell.note else "" for cell in cells)
        scores = [" ".join(filter(None, (a, cell.spread, b))) for a, cell, b in zip(shown, cells, notes, strict=True)]
        lines.append([row.name, row.note, row.decoding, *scores])
    text = [[" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


# ---- pictures --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureCard:
    item: GalleryItem
    uri: str  # empty when the picture cannot be shown; then `problem` says why
    pixelated: bool
    problem: str
    cider: str


def picture_card(item: GalleryItem) -> PictureCard:
    cider = "" if item.cider is None else shown_score("CIDEr", item.cider) if math.isfinite(item.cider) else "NaN"
    if item.image is None:
        return PictureCard(item, "", False, "No picture: only its embedding was given.", cider)
    try:
        uri, pixelated = embed(Path(item.image))
    except FileNotFoundError:
        return PictureCard(item, "", False, f"The picture {Path(item.image).name} was not found.", cider)
    except UNREADABLE:
        return PictureCard(item, "", False, f"The picture {Path(item.image).name} could not be read.", cider)
    return PictureCard(item, uri, pixelated, "", cider)


@dataclass(frozen=True)
class _Changed:
    card: PictureCard
    before: list[tuple[str, bool]]  # stretches of words, and whether the other caption lacks them
    after: list[tuple[str, bool]]
    gain: str


def _changed(change: Change) -> _Changed:
    a, b = change.before.split(), change.item.caption.split()
    before, after = [], []
    for tag, i, j, k, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        before.append((" ".join(a[i:j]), tag != "equal"))
        after.append((" ".join(b[k:n]), tag != "equal"))
    gain = (
        "" if change.gain is None or not math.isfinite(change.gain) else f"{change.gain * 100:+.1f}".replace("-", "−")
    )
    return _Changed(picture_card(change.item), [x for x in before if x[0]], [x for x in after if x[0]], gain)


def _as_data(report: Report) -> str:
    """The pictures as JSON that can stand in a <script> element: names are told once, values have a few digits more than are shown."""
    others = list(dict.fromkeys(name for item in report.pictures for name in item.extra))
    scored = list(
        dict.fromkeys(m for item in report.pictures for s in (item.scores, *item.extra_scores.values()) for m in s)
    )
    metrics = [m for m in (*report.metrics, *report.more_metrics) if m in scored]
    metrics += [m for m in scored if m not in metrics]

    def values(scores: Mapping[str, float]) -> list[float | None]:
        found = (scores.get(metric) for metric in metrics)
        return [None if value is None or not math.isfinite(value) else float(f"{value:.7g}") for value in found]

    pictures = []
    for item in report.pictures:
        said = [(item.caption, values(item.scores))]
        said += [(item.extra.get(name), values(item.extra_scores.get(name, {}))) for name in others]
        uri, pixelated = report.thumbnails.get(item.image_id, ("", False))
        pictures.append(
            [
                str(item.image_id),
                [text for text, _ in said],
                [v for _, v in said],
                list(item.references),
                uri,
                int(pixelated),
            ]
        )
    data = {
        "methods": [report.method, *others],
        "metrics": [[metric, int(is_times_100(metric))] for metric in metrics],
        "pictures": pictures,
    }
    text = json.dumps(data, separators=(",", ":"))  # ASCII escapes: a lone surrogate has no UTF-8
    return text.replace("<", "\\u003c")  # no caption can end the element
