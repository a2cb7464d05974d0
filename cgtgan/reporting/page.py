"""Every HTML page: the report of one run, the comparison of many, the gallery of captions. Plain data in, a string out.

A page is one file and makes no request: style inline, pictures as data URIs, curves as SVG, and a policy that forbids
all else. The report has one script (search and sorting), which the policy names by its hash; without scripts the page
lacks that section alone. Captions, file names and labels are untrusted text, which jinja2 escapes.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cgtgan.data.image_files import DAMAGED_IMAGE
from cgtgan.reporting.pictures import embed
from cgtgan.reporting.svg import Histogram, Plot, draw
from cgtgan.reporting.tables import (
    MethodRow,
    TestSet,
    difference_table,
    format_score,
    is_times_100,
    score_cell,
    score_table,
    signed_score,
    split_metrics,
)

TEMPLATES = Path(__file__).parent / "templates"
OPEN_PLOTS = 8  # of the comparison, drawn before the rest is folded away
DISCRIMINATOR = (
    "It should tell corpus sentences from samples, but not always. Right on half of them is chance. Right on all of "
    "them for a long time means that it is saturated: then naturalness no longer teaches the generator."
)


@dataclass(frozen=True)
class GalleryItem:
    """A picture (None: only its embedding was given) and its captions.

    `extra` maps another method's name to its caption, `cider` is the raw score. `scores` maps a metric to the picture's
    raw value and `extra_scores` another method's name to its values; any may be missing.
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
    """One picture's caption before, and in `item` after; `gain` is the raw difference in CIDEr, where it is known."""

    item: GalleryItem
    before: str
    gain: float | None = None


@dataclass(frozen=True)
class Changes:
    """Pictures whose captions differ between two generators, which are named `before` and `after`."""

    title: str
    note: str
    before: str
    after: str
    changes: Sequence[Change]


@dataclass(frozen=True)
class Report:
    """Everything on the page of one run. The first row marked `ours` makes the summary line.

    `pictures` are searched and sorted; `method` names the writer of their captions. `thumbnails` maps the ids of some
    to (data URI, whether it is pixel art), and `left_out` says which pictures or thumbnails are missing.
    """

    title: str
    subtitle: str = ""
    warning: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = ()
    rows: Sequence[MethodRow] = ()
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


@dataclass(frozen=True)
class PictureCaptions:
    """One picture, and (names of variants, their caption, their raw CIDErs) for every different caption."""

    item: GalleryItem
    captions: Sequence[tuple[Sequence[str], str, Sequence[float]]]


@dataclass(frozen=True)
class Gallery:
    title: str
    note: str
    pictures: Sequence[PictureCaptions]


@dataclass(frozen=True)
class RunLine:
    """A run of the list at the end; `step` is the last logged one, `cider` raw."""

    variant: str
    seed: int
    folder: str
    step: int | None
    cider: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything on the page of many runs. `settings`: field -> its value in each variant. `untested`: metrics."""

    title: str
    subtitle: str = ""
    warning: str | None = None
    summary: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    sets: Sequence[TestSet] = ()
    untested: Sequence[str] = ()
    resamples: int = 0
    variants: Sequence[str] = ()
    settings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    galleries: Sequence[Gallery] = ()
    runs: Sequence[RunLine] = ()
    notes: Sequence[str] = ()
    command: str = ""


# ----------------------------------------------------------------------------------------------------------- rendering


def render_template(template: str, **values: object) -> str:
    # autoescape must be True and not select_autoescape(), which does not know the ending .j2
    loader = FileSystemLoader(TEMPLATES)
    undefined = StrictUndefined
    environment = Environment(loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"draw": draw, "card": picture_card, "marked_words": marked_words, "ciders": cider_range}
    page = environment.get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a caption has no UTF-8


def render_report(report: Report) -> str:
    """The report as one HTML document. Raises InputError when a curve's steps and values differ in length."""
    script = (TEMPLATES / "report_pictures.js").read_text(encoding="utf-8") if report.pictures else ""
    plots = (
        ("curves", "Curves", "", {}, report.plots),
        ("discriminator", "The discriminator", DISCRIMINATOR, report.health, report.discriminator),
        ("distributions", "Distributions", "", {}, report.distributions),
    )
    galleries = (
        ("best", "Best captions", "Test pictures with the highest CIDEr.", report.best),
        ("worst", "Worst captions", "Test pictures with the lowest CIDEr: where to look first.", report.worst),
        ("random", "Random captions", "Drawn at random: what to expect.", report.random),
    )
    return render_template(
        "report.html.j2",
        page=report,
        summary=_summary(report.rows, report.metrics),
        tables=[score_table(report.rows, metrics) for metrics in split_metrics(report.metrics) if report.rows],
        plots=[section for section in plots if section[-1]],
        galleries=[section for section in galleries if section[-1]],
        data=_as_data(report),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def render_comparison(page: Comparison) -> str:
    """The comparison as one HTML document. Raises InputError when a curve's steps and values differ in length."""
    sets = []
    for test_set in page.sets:
        tables = [score_table(test_set.rows, metrics) for metrics in split_metrics(test_set.metrics)]
        baselines = list(dict.fromkeys(row.baseline for row in test_set.rows if row.differences))
        sets.append((test_set.name, tables, baselines, *difference_table(test_set)))
    return render_template("comparison.html.j2", page=page, sets=sets, open_plots=OPEN_PLOTS)


def render_gallery(title: str, items: Sequence[GalleryItem], total: int | None = None) -> str:
    """Pictures with their captions as one HTML document; references and scores appear only where an item has them.

    `total`: how many there are where `items` are only the first of them.
    """
    count = f"{len(items):,} {'picture' if len(items) == 1 else 'pictures'}"
    if total is not None and total > len(items):
        count = f"the first {len(items):,} of {total:,} pictures; the file of captions has all"
    return render_template("gallery.html.j2", title=title, subtitle=count, items=items)


def _summary(rows: Sequence[MethodRow], metrics: Sequence[str]) -> str:
    """'A reaches CIDEr 239.0 ± 4.1 (5 seeds): 12.0 above B (227.0), ...; 93% of C (256.0).' Empty without `ours`."""
    metric = next((metric for metric in metrics if metric.lower() == "cider"), metrics[-1] if metrics else "")
    ours = next((row for row in rows if row.ours and row.mean(metric) is not None), None)
    if ours is None or (mean := ours.mean(metric)) is None:
        return ""
    cell, seeds = score_cell(ours, metric), len(ours.scores[metric])
    text = f"{ours.name} reaches {metric} {cell.mean} {cell.spread}".rstrip()
    text += f" ({cell.note or f'{seeds} seeds'})" if seeds > 1 else ""
    scored = [(value, row) for row in rows if not row.ours and (value := row.mean(metric)) is not None]
    parts = []
    if others := [(value, row) for value, row in scored if not row.apart]:
        value, row = max(others, key=lambda pair: pair[0])
        gap = f"{format_score(metric, abs(mean - value), mean)} {'above' if mean >= value else 'below'}"
        parts.append(f"{gap} {row.name} ({format_score(metric, value)}), the best other unpaired method")
    for value, row in scored:
        if row.bound and value > 0:
            parts.append(f"{100 * mean / value:.0f}% of {row.name} ({format_score(metric, value)})")
        if row.published:
            parts.append(f"against {format_score(metric, value)} of {row.name}")
    return text + (": " + "; ".join(parts) if parts else "") + "."


# ---------------------------------------------------------------------------------------------------- template filters


def picture_card(item: GalleryItem) -> tuple[str, bool, str]:
    """(data URI, whether it is pixel art, ''), or ('', False, why the picture is not there)."""
    if item.image is None:
        return "", False, "No picture: only its embedding was given."
    try:
        return *embed(Path(item.image)), ""
    except FileNotFoundError:
        return "", False, f"The picture {Path(item.image).name} was not found."
    except DAMAGED_IMAGE:
        return "", False, f"The picture {Path(item.image).name} could not be read."


def cider_range(ciders: Iterable[float]) -> str:
    """'12.3', or '12.3 to 45.6' where they differ."""
    texts = sorted({format_score("CIDEr", c) if math.isfinite(c) else "NaN" for c in ciders}, key=float)
    return " to ".join(dict.fromkeys((texts[0], texts[-1]))) if texts else ""


def marked_words(change: Change) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]], str]:
    """Before and after as stretches of words, with whether the other caption lacks them; and the gain in CIDEr."""
    a, b = change.before.split(), change.item.caption.split()
    opcodes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    before = [(" ".join(a[i:j]), tag != "equal") for tag, i, j, _, _ in opcodes if i < j]
    after = [(" ".join(b[k:n]), tag != "equal") for tag, _, _, k, n in opcodes if k < n]
    gain = math.nan if change.gain is None else change.gain
    return before, after, signed_score("CIDEr", gain) if math.isfinite(gain) else ""


def _as_data(report: Report) -> str:
    """The pictures as JSON for a <script> element: names stand once, values have more digits than the page prints."""
    others = list(dict.fromkeys(name for item in report.pictures for name in item.extra))
    every = (s for item in report.pictures for s in (item.scores, *item.extra_scores.values()))
    scored = dict.fromkeys(metric for scores in every for metric in scores)
    metrics = [*(m for m in report.metrics if m in scored), *(m for m in scored if m not in report.metrics)]

    def values(scores: Mapping[str, float]) -> list[float | None]:
        given = (scores.get(metric) for metric in metrics)
        return [None if value is None or not math.isfinite(value) else float(f"{value:.7g}") for value in given]

    pictures: list[list[Any]] = []
    for item in report.pictures:
        captions = [item.caption, *(item.extra.get(name) for name in others)]
        scores = [values(item.scores), *(values(item.extra_scores.get(name, {})) for name in others)]
        uri, pixelated = report.thumbnails.get(item.image_id, ("", False))
        pictures.append([str(item.image_id), captions, scores, list(item.references), uri, int(pixelated)])
    names = [[metric, int(is_times_100(metric))] for metric in metrics]
    data = {"methods": [report.method, *others], "metrics": names, "pictures": pictures}
    text = json.dumps(data, separators=(",", ":"))  # ASCII escapes: a lone surrogate has no UTF-8
    return text.replace("<", "\\u003c")  # no caption can end the element
