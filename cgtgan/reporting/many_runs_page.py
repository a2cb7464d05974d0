"""The page over many runs: one self-contained HTML file without scripts, in the report's style, and the same tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from cgtgan.evaluation.bootstrap import Difference
from cgtgan.reporting.curves import Plot, draw
from cgtgan.reporting.export import ComparedRow, TestSet, p_value, signed_score
from cgtgan.reporting.page import (
    Cell,
    GalleryItem,
    PictureCard,
    is_times_100,
    markdown_table,
    picture_card,
    render_template,
    shown_score,
    table_cells,
)

FIRST = (
    "BLEU-1",
    "BLEU-2",
    "BLEU-3",
    "BLEU-4",
    "METEOR",
    "ROUGE-L",
    "CIDEr",
    "SPICE",
)  # the first table; the others stand in a second
KINDS = (
    "",
    "Without adversarial training",
    "For orientation: supervised on pairs, or human",
    "Published: the paper's figures, not measured here",
)
OPEN_PLOTS = 8  # drawn before the rest is folded away


@dataclass(frozen=True)
class Said:
    """What the variants said about one picture: (names, caption, their raw CIDErs) for every different caption."""

    item: GalleryItem
    captions: Sequence[tuple[Sequence[str], str, Sequence[float]]]


@dataclass(frozen=True)
class Gallery:
    title: str
    note: str
    pictures: Sequence[Said]


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
    """Everything the page shows. `settings`: field -> its value in each of `variants`. `untested`: metrics that have no paired test."""

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


def render_comparison(page: Comparison) -> str:
    """The comparison as one HTML document. Raises InputError when a curve's steps and values differ in length."""
    drawings = [draw(plot) for plot in page.plots]
    return render_template(
        "comparison.html.j2",
        page=page,
        sets=[(test_set, _tables(test_set), _differences(test_set)) for test_set in page.sets],
        open_plots=drawings[:OPEN_PLOTS],
        folded_plots=drawings[OPEN_PLOTS:],
        galleries=[(g, [(picture_card(said.item), _captions(said)) for said in g.pictures]) for g in page.galleries],
        runs=[(run, "" if run.cider is None else shown_score("CIDEr", run.cider)) for run in page.runs],
    )


def _captions(said: Said) -> list[tuple[str, str, str]]:
    return [(", ".join(names), caption, _range(ciders)) for names, caption, ciders in said.captions]


def _range(ciders: Sequence[float]) -> str:
    shown = sorted({shown_score("CIDEr", value) for value in ciders}, key=float)
    return "" if not shown else shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


# ---- tables ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A cell of the table: `mark` is a sign, `meaning` says it in words."""

    cell: Cell
    mark: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    columns: list[tuple[str, bool]]  # metric, whether it is printed times 100
    groups: list[tuple[str, list[tuple[ComparedRow, int, list[Score]]]]]
    decoding: bool


def split_metrics(test_set: TestSet) -> list[list[str]]:
    """The metrics of the first table and of the second, as far as there are any."""
    first = [metric for metric in FIRST if metric in test_set.metrics]
    return [part for part in (first, [metric for metric in test_set.metrics if metric not in FIRST]) if part]


def _tables(test_set: TestSet) -> list[Table]:
    tables = []
    for metrics in split_metrics(test_set):
        rows = sorted((row for row in test_set.rows if any(m in row.values for m in metrics)), key=lambda row: row.kind)
        lines = [
            (
                row,
                max(map(len, row.values.values())),
                [_score(row, m, cell) for m, cell in zip(metrics, cells, strict=True)],
            )
            for row, cells in zip(rows, table_cells([row.method_row() for row in rows], metrics), strict=True)
        ]
        groups = [(KINDS[kind], list(part)) for kind, part in groupby(lines, key=lambda line: line[0].kind)]
        decoding = len({row.decoding for row in rows} - {"", "none"}) > 1
        tables.append(Table([(metric, is_times_100(metric)) for metric in metrics], groups, decoding))
    return tables


def _score(row: ComparedRow, metric: str, cell: Cell) -> Score:
    difference = row.differences.get(metric)
    if difference is None or not difference.sign:
        return Score(cell)
    mark = {(1, True): "▲", (1, False): "△", (-1, True): "▼", (-1, False): "▽"}[difference.sign, difference.firm]
    above = "above" if difference.sign > 0 else "below"
    return Score(
        cell, mark, f"{above} {row.baseline}" + (", over other seeds too" if difference.firm else ", for these runs")
    )


@dataclass(frozen=True)
class Tested:
    """A cell of the table of differences; `low` to `high` and `at` are places on a scale from -50 to 50, a column's own."""

    value: str
    images: str
    seeds: str
    p: str
    mark: str
    low: float
    high: float
    at: float
    sign: int


def _differences(test_set: TestSet) -> tuple[list[str], list[tuple[ComparedRow, list[Tested | None]]]]:
    """(metrics, rows with a cell a metric) of what was tested."""
    rows = sorted((row for row in test_set.rows if row.differences), key=lambda row: row.kind)
    metrics = [m for m in (*FIRST, *test_set.metrics) if any(m in row.differences for row in rows)]
    metrics = list(dict.fromkeys(metrics))
    columns = []
    for metric in metrics:
        # the scale is the variants': a method without training may be far away and is cut
        drawn = [row for row in rows if row.kind == 0 and metric in row.differences] or rows
        reach = max(
            (abs(edge) for row in drawn if (d := row.differences.get(metric)) for edge in _reach(d)), default=0.0
        )
        columns.append([_tested(row, metric, reach) for row in rows])
    return metrics, [(row, [column[i] for column in columns]) for i, row in enumerate(rows)]


def _reach(d: Difference) -> list[float]:
    return [d.images.low, d.images.high]


def _tested(row: ComparedRow, metric: str, reach: float) -> Tested | None:
    difference = row.differences.get(metric)
    if difference is None:
        return None

    def place(value: float) -> float:
        return max(-50.0, min(50.0, 46 * value / reach)) if reach else 0.0

    low, high = _reach(difference)
    return Tested(
        signed_score(metric, difference.value),
        f"{signed_score(metric, low)} to {signed_score(metric, high)}",
        f"{signed_score(metric, difference.seeds.low)} to {signed_score(metric, difference.seeds.high)}"
        if difference.seeds
        else "",
        p_value(difference.images.p),
        _score(row, metric, Cell("")).mark,
        place(low),
        place(high),
        place(difference.value),
        difference.sign,
    )


def markdown(page: Comparison) -> str:
    """The tables as GitHub Markdown."""
    parts = []
    for test_set in page.sets:
        parts.append(f"{test_set.name}; mean ± standard deviation (n-1) over seeds, x 100 where the metric is\n")
        rows = [row.method_row() for row in sorted(test_set.rows, key=lambda row: row.kind)]
        parts += [markdown_table(rows, metrics) for metrics in split_metrics(test_set)]
        metrics, lines = _differences(test_set)
        if not lines:
            continue
        parts.append(
            f"difference to {' / '.join(sorted({row.baseline for row, _ in lines}))}: 95% interval over test images, p\n"
        )
        table = [["", *metrics], [":--", *("--:" for _ in metrics)]]
        for row, cells in lines:
            table.append([row.name, *("-" if c is None else f"{c.value} ({c.images}), {c.p}" for c in cells)])
        text = [[" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in table]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in text))
    return "\n".join(parts)


__all__ = ["Comparison", "Gallery", "PictureCard", "RunLine", "Said", "markdown", "render_comparison", "split_metrics"]
