"""The report page and the gallery page (one self-contained HTML file each); the comparison table for the console and as Markdown.

Plain data comes in and a string goes out. A page makes no request of any kind: style inline, pictures as data URIs, curves as SVG,
no script, and a Content-Security-Policy that forbids everything else. Captions, file names and labels are untrusted text, which
jinja2 escapes. Scores are shown the way papers print them, times 100.
"""

from __future__ import annotations

import base64
import io
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageOps
from rich import box
from rich.table import Table
from rich.text import Text

from cgtgan.errors import InputError
from cgtgan.evaluation.curves import Curve, Plot, draw

__all__ = ["Curve", "GalleryItem", "MethodRow", "Plot", "Report"]
__all__ += ["comparison_table", "markdown_table", "pick_gallery", "render_gallery", "render_report"]

Id = TypeVar("Id", int, str, int | str)

# other columns (a length, a count) stay as measured
TIMES_100 = ("bleu", "meteor", "rouge", "cider", "spice", "clipscore", "refclipscore")
EMBED_PIXELS = 320  # longest side of an embedded picture
PIXEL_ART = 96  # up to here a picture is enlarged with hard pixels instead of a blur
EMBED_AS_IS_BYTES = 200_000


@dataclass(frozen=True)
class MethodRow:
    """A row of the comparison table; `scores` maps a metric to its raw values (CIDEr 2.39, not 239), one a seed."""

    name: str
    note: str = ""
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ours: bool = False
    bound: bool = False  # supervised or human: set apart, never the bold one


@dataclass(frozen=True)
class GalleryItem:
    """A picture (None: only its embedding was given) and what was said about it.

    `extra` maps another method's name to its caption, `cider` is the raw score.
    """

    image_id: int | str
    image: Path | None
    caption: str
    references: Sequence[str] = ()
    cider: float | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything the page shows. The first row marked `ours` makes the summary line; `metrics` is the order of the columns."""

    title: str
    subtitle: str = ""
    warning: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = ()
    rows: Sequence[MethodRow] = ()
    plots: Sequence[Plot] = ()
    best: Sequence[GalleryItem] = ()
    worst: Sequence[GalleryItem] = ()
    random: Sequence[GalleryItem] = ()
    config_yaml: str = ""
    notes: Sequence[str] = ()


def render_report(report: Report) -> str:
    """The report as one HTML document. Raises InputError when a curve's steps and values differ in length."""
    sections = [
        ("best", "Best captions", "Test pictures with the highest CIDEr.", report.best),
        ("worst", "Worst captions", "Test pictures with the lowest CIDEr.", report.worst),
        ("random", "Random captions", "Drawn at random: what to expect.", report.random),
    ]
    return _render(
        "report.html.j2",
        report=report,
        summary=_summary(report.rows, report.metrics),
        columns=[(metric, _is_times_100(metric)) for metric in report.metrics],
        table=_cells(report.rows, report.metrics),
        several_seeds=_seeds(report.rows) > 1,
        drawings=[draw(plot) for plot in report.plots],
        sections=[(key, heading, note, [_card(item) for item in items]) for key, heading, note, items in sections if items],
    )


def render_gallery(title: str, items: Sequence[GalleryItem]) -> str:
    """Pictures with their captions as one HTML document; references and scores appear only where an item has them."""
    return _render("gallery.html.j2", title=title, cards=[_card(item) for item in items])


def _render(template: str, **values: object) -> str:
    # autoescape must be True and not select_autoescape(), which does not know the ending .j2
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a caption must not make the page unwritable


# ---- scores ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    mean: str
    spread: str = ""  # '± 1.2'
    note: str = ""  # '2/3 seeds finite'
    best: bool = False


def _is_times_100(metric: str) -> bool:
    return metric.lower().startswith(TIMES_100)


def _show(metric: str, value: float, beside: float | None = None) -> str:
    """`value` times 100 with one decimal; for other columns the decimals that suit `beside` (a spread is printed like its mean)."""
    if _is_times_100(metric):
        return f"{value * 100:.1f}"
    size = abs(value if beside is None else beside)
    return f"{value:,.{3 if size < 1 else 2 if size < 100 else 0}f}"


def _finite_mean(row: MethodRow, metric: str) -> float | None:
    finite = [value for value in row.scores.get(metric, ()) if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _seeds(rows: Sequence[MethodRow]) -> int:
    return max((len(values) for row in rows for values in row.scores.values()), default=0)


def _cell(row: MethodRow, metric: str, best: str | None) -> _Cell:
    values = row.scores.get(metric, ())
    mean = _finite_mean(row, metric)
    if mean is None:
        return _Cell("NaN" if values else "-")
    finite = [value for value in values if math.isfinite(value)]
    spread = f"± {_show(metric, statistics.stdev(finite), mean)}" if len(finite) > 1 else ""
    note = "" if len(finite) == len(values) else f"{len(finite)}/{len(values)} seeds finite"
    return _Cell(_show(metric, mean), spread, note, best=not row.bound and _show(metric, mean) == best)


def _cells(rows: Sequence[MethodRow], metrics: Sequence[str]) -> list[tuple[MethodRow, int, list[_Cell]]]:
    """(row, seeds, cells) for every row, bounds last. What looks equal in a column is bold together: no hidden third decimal."""
    best: dict[str, str | None] = dict.fromkeys(metrics)
    for metric in metrics:
        if not _is_times_100(metric):
            continue  # more is not better for a length or a count
        means = [mean for row in rows if not row.bound and (mean := _finite_mean(row, metric)) is not None]
        best[metric] = _show(metric, max(means)) if means else None
    ordered = sorted(rows, key=lambda row: row.bound)
    return [(row, _seeds([row]), [_cell(row, metric, best[metric]) for metric in metrics]) for row in ordered]


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
    value, other = max(((value, row) for value, row in scored if not row.bound), key=lambda pair: pair[0], default=(0.0, None))
    if other:
        gap = f"{_show(metric, abs(mean - value), mean)} {'above' if mean >= value else 'below'}"
        parts.append(f"{gap} {other.name} ({_show(metric, value)}), the best other unpaired method")
    for value, row in scored:
        if row.bound and value > 0:
            parts.append(f"{100 * mean / value:.0f}% of {row.name} ({_show(metric, value)})")
    return text + (": " + "; ".join(parts) if parts else "") + "."


def comparison_table(rows: Sequence[MethodRow], metrics: Sequence[str]) -> Table:
    """The comparison for the console: times 100, the mean above ± its standard deviation (n-1), the best unpaired value bold."""
    several = _seeds(rows) > 1
    scaled = ", ".join(metric for metric in metrics if not _is_times_100(metric))
    caption = f"scores x 100{f' (not {scaled})' if scaled else ''}; bold: best unpaired"
    if several:
        caption += "; ± standard deviation over seeds (n-1)"
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption), caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=18)  # the only column that gives way in a narrow console
    if several:
        table.add_column("seeds", justify="right", no_wrap=True)
    for metric in metrics:
        table.add_column(Text(metric.replace(" ", "\n")), justify="right", no_wrap=True, vertical="top")
    bounds_begun = False
    for row, seeds, cells in _cells(rows, metrics):
        if row.bound and not bounds_begun:
            table.add_section()
            bounds_begun = True
        name = Text(row.name, style="bold cyan" if row.ours else "italic" if row.bound else "")  # Text: a name is never markup
        if row.note or row.bound:
            name.append("\n" + ", ".join(part for part in ("bound" if row.bound else "", row.note) if part), style="not bold dim")
        shown = []
        for cell in cells:
            text = Text(cell.mean, style="bold" if cell.best else "")
            for extra in filter(None, (cell.spread, cell.note.replace(" ", "\n"))):
                text.append("\n" + extra, style="not bold dim")
            shown.append(text)
        table.add_row(name, *([Text(str(seeds))] if several else []), *shown)
    return table


def markdown_table(rows: Sequence[MethodRow], metrics: Sequence[str]) -> str:
    """The comparison as a GitHub Markdown table: bounds last, 'mean ± standard deviation' (n-1) over seeds, best unpaired bold."""
    lines = [["method", "note", *metrics], [":--", ":--", *("--:" for _ in metrics)]]
    for row, _, cells in _cells(rows, metrics):
        shown = (f"**{cell.mean}**" if cell.best else cell.mean for cell in cells)
        notes = (f"({cell.note})" if cell.note else "" for cell in cells)
        scores = [" ".join(filter(None, (a, cell.spread, b))) for a, cell, b in zip(shown, cells, notes, strict=True)]
        lines.append([row.name, row.note, *scores])
    text = [[" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def pick_gallery(per_image_cider: Mapping[Id, float], n: int, seed: int) -> tuple[list[Id], list[Id], list[Id]]:
    """`n` ids each: best first, worst first, and random ones drawn with `seed`; the same for any order of the mapping.

    The three are disjoint when there are at least 3 n images with a finite score; with fewer they overlap rather than shrink below
    what there is. An image whose score is not finite can only be among the random ones. Raises InputError when `n` is negative.
    """
    if n < 0:
        raise InputError(f"the gallery's size n is {n}; it must be 0 or more")
    everything = sorted(per_image_cider, key=lambda image_id: (str(image_id), isinstance(image_id, str)))
    ranked = sorted((i for i in everything if math.isfinite(per_image_cider[i])), key=lambda i: -per_image_cider[i])
    best, worst = ranked[:n], ranked[::-1][:n]
    shown = {*best, *worst}
    rest = [image_id for image_id in everything if image_id not in shown]
    pool = rest if len(rest) >= n else everything
    return best, worst, random.Random(seed).sample(pool, min(n, len(pool)))


# ---- pictures --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Card:
    item: GalleryItem
    uri: str  # empty when the picture cannot be shown; then `problem` says why
    pixelated: bool
    problem: str
    cider: str


def _card(item: GalleryItem) -> _Card:
    cider = "" if item.cider is None else _show("CIDEr", item.cider) if math.isfinite(item.cider) else "NaN"
    if item.image is None:
        return _Card(item, "", False, "No picture: only its embedding was given.", cider)
    try:
        uri, longest = _embed(Path(item.image))
    except FileNotFoundError:
        return _Card(item, "", False, f"The picture {Path(item.image).name} was not found.", cider)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):  # what Pillow raises for broken files
        return _Card(item, "", False, f"The picture {Path(item.image).name} could not be read.", cider)
    return _Card(item, uri, longest <= PIXEL_ART, "", cider)


def _embed(path: Path) -> tuple[str, int]:
    """The picture as (data URI, longest side). Small plain files go in byte for byte, others upright, 8 bits, shrunk."""
    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
        small = max(image.size) <= EMBED_PIXELS
        plain = image.format in ("PNG", "JPEG") and image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") and not image.getexif()
        if small and plain and len(raw) <= EMBED_AS_IS_BYTES and getattr(image, "n_frames", 1) == 1:
            image.load()  # a truncated file shows here, not as a broken picture in the page
            return _data_uri(image.format or "", raw), max(image.size)
        image.draft("RGB", (2 * EMBED_PIXELS, 2 * EMBED_PIXELS))  # JPEG only: decodes a large one at a fraction of the cost
        image.seek(0)
        upright = _to_rgb(ImageOps.exif_transpose(image), image.format)
    upright.thumbnail((EMBED_PIXELS, EMBED_PIXELS), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "PNG" if small else "JPEG"
    upright.save(buffer, kind, quality=85, optimize=True)
    return _data_uri(kind, buffer.getvalue()), max(upright.size)


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion clips 16 bits at 255: a white picture
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535.0 if image.mode.startswith("I;16") or file_format == "PNG" else max(float(pixels.max()), 1e-12)
        return Image.fromarray(np.clip(pixels * (255.0 / top) + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _data_uri(kind: str, raw: bytes) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode('ascii')}"
