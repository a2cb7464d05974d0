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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cgtgan.data.datasets import Split
from cgtgan.data.image_files import DAMAGED_IMAGE
from cgtgan.reporting import tables
from cgtgan.reporting.pictures import embed
from cgtgan.reporting.svg import Histogram, Plot, draw
from cgtgan.reporting.tables import MethodRow, RowsBySet, format_score, signed_score

TEMPLATES = Path(__file__).parent / "templates"
FIRST_LOOK = "What to expect"  # of the comparison, the gallery above the table
OPEN_PLOTS = 8  # of the comparison, drawn before the rest is folded away
WrittenCaption = tuple[Sequence[str], str, Sequence[float]]  # names of variants, their caption, its raw CIDErs


@dataclass(frozen=True)
class GalleryItem:
    """A picture (None: only its embedding is here) and its captions. `scores`: metric -> the picture's raw value.

    `others`: another method's name -> its caption and scores. Any score may be missing.
    """

    image_id: int | str
    image: Path | None
    caption: str
    references: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, tuple[str, Mapping[str, float]]] = field(default_factory=dict)


def item_of(split: Split | None) -> Callable[[Any, str], GalleryItem]:
    """(image id, caption) -> the item with its picture and references, as far as the split is available."""
    images = split.images if split else []
    if split and split.embeddings:  # made where the pictures were
        images = [record for record in images if record.path.is_file()]
    paths = {record.image_id: record.path for record in images}
    references = split.references if split else {}
    return lambda i, caption: GalleryItem(i, paths.get(i), caption, references.get(i, []))


@dataclass(frozen=True)
class Change:
    """One picture's caption before, and in `item` after; `gain` is the raw difference in CIDEr, where it is known."""

    item: GalleryItem
    before: str
    gain: float = math.nan


@dataclass(frozen=True)
class Changes:
    """Pictures whose captions differ between two generators, which are named `before` and `after`."""

    title: str
    note: str
    before: str
    after: str
    changes: Sequence[Change]


@dataclass(frozen=True)
class About:
    """The words about a page. `made_by`: the settings of the run as YAML, or the command of the comparison."""

    title: str
    subtitle: str = ""
    warning: str | None = None
    summary: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    made_by: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures that are searched and sorted; `method` names the writer of their captions.

    `thumbnails` maps the ids of some to (data URI, whether it is pixel art); `left_out` says what is missing.
    """

    items: Sequence[GalleryItem] = ()
    method: str = ""
    thumbnails: Mapping[int | str, tuple[str, bool]] = field(default_factory=dict)
    left_out: str = ""


@dataclass(frozen=True)
class Report:
    """The page of one run. Keys of `plots`: curves, discriminator, distributions; of `galleries`: first, best, worst,
    random.

    `health`: the discriminator in numbers. `metric`: what best and worst are of, printed times 100.
    """

    about: About
    rows: Sequence[MethodRow] = ()
    plots: Mapping[str, Sequence[Plot | Histogram]] = field(default_factory=dict)
    health: Mapping[str, str] = field(default_factory=dict)
    changes: Sequence[Changes] = ()
    galleries: Mapping[str, Sequence[GalleryItem]] = field(default_factory=dict)
    pictures: Pictures = Pictures()
    metric: str = "CIDEr"


ComparedPicture = tuple[GalleryItem, Sequence[WrittenCaption]]


@dataclass(frozen=True)
class Comparison:
    """The page of many runs. `settings`: variant -> field -> value, of the fields that differ.

    `galleries`: title -> note, pictures. `runs`: (variant, seed if any, raw CIDEr, last logged step, folder).
    """

    about: About
    sets: RowsBySet = field(default_factory=dict)
    resamples: int = 0
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    galleries: Mapping[str, tuple[str, Sequence[ComparedPicture]]] = field(default_factory=dict)
    runs: Sequence[tuple[str, int | None, float | None, int | None, Path]] = ()


# ----------------------------------------------------------------------------------------------------------- rendering


def render_template(template: str, **values: object) -> str:
    # autoescape must be True and not select_autoescape(), which does not know the ending .j2
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, **options)
    environment.filters |= {"draw": draw, "card": picture_card, "marked_words": marked_words, "ciders": cider_range}
    page = environment.get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a caption has no UTF-8


def render_report(report: Report) -> str:
    """The report as one HTML document. Raises InputError when a curve's steps and values differ in length."""
    script = (TEMPLATES / "report_pictures.js").read_text(encoding="utf-8") if report.pictures.items else ""
    return render_template(
        "report.html.j2",
        page=report,
        tables=tables.score_tables(report.rows),
        data=_as_data(report.pictures, tables.measured_metrics(report.rows)),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def render_comparison(page: Comparison) -> str:
    """The comparison as one HTML document. Raises InputError when a curve's steps and values differ in length."""
    sets = [
        (name, tables.score_tables(rows), tables.baseline_names(rows), *tables.difference_table(rows))
        for name, rows in page.sets.items()
    ]
    every = [row for rows in page.sets.values() for row in rows]
    measured, tested = tables.measured_metrics(every), {metric for row in every for metric in row.differences}
    untested = [metric for metric in measured if metric not in tested] if tested else []
    values: dict[str, object] = {"untested": untested, "seeds": any(row.num_seeds for row in every)}
    values |= {"open_plots": OPEN_PLOTS, "first_look": FIRST_LOOK}
    return render_template("comparison.html.j2", page=page, sets=sets, **values)


def render_gallery(title: str, items: Sequence[GalleryItem], total: int | None = None) -> str:
    """Pictures with their captions as one HTML document; references and scores appear only where an item has them.

    `total`: how many there are where `items` are only the first of them.
    """
    count = f"{len(items):,} {'picture' if len(items) == 1 else 'pictures'}"
    if total is not None and total > len(items):
        count = f"the first {len(items):,} of {total:,} pictures; the file of captions has all"
    return render_template("gallery.html.j2", title=title, subtitle=count, items=items)


# ---------------------------------------------------------------------------------------------------- template filters


def picture_card(item: GalleryItem) -> tuple[str, bool, str]:
    """(data URI, whether it is pixel art, ''), or ('', False, why the picture is not there)."""
    if item.image is None:
        return "", False, "No picture: only its embedding is here."
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
    return before, after, signed_score("CIDEr", change.gain) if math.isfinite(change.gain) else ""


def _as_data(pictures: Pictures, columns: Sequence[str]) -> str:
    """The pictures as JSON for a <script> element: names stand once, values have more digits than the page prints."""
    others = list(dict.fromkeys(name for item in pictures.items for name in item.others))
    every = (s for item in pictures.items for s in (item.scores, *(scores for _, scores in item.others.values())))
    scored = dict.fromkeys(metric for scores in every for metric in scores)
    metrics = [*(m for m in columns if m in scored), *(m for m in scored if m not in columns)]

    def values(scores: Mapping[str, float]) -> list[float | None]:
        given = (scores.get(metric) for metric in metrics)
        return [None if value is None or not math.isfinite(value) else float(f"{value:.7g}") for value in given]

    rows: list[list[Any]] = []
    for item in pictures.items:
        written = [(item.caption, item.scores), *(item.others.get(name, (None, {})) for name in others)]
        captions, scores = [caption for caption, _ in written], [values(scores) for _, scores in written]
        uri, pixelated = pictures.thumbnails.get(item.image_id, ("", False))
        rows.append([str(item.image_id), captions, scores, list(item.references), uri, int(pixelated)])
    names = [[metric, int(tables.is_times_100(metric))] for metric in metrics]
    data = {"methods": [pictures.method, *others], "metrics": names, "pictures": rows}
    text = json.dumps(data, separators=(",", ":"))  # ASCII escapes: a lone surrogate has no UTF-8
    return text.replace("<", "\\u003c")  # no caption can end the element
