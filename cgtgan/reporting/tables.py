"""Tables of scores: rows and cells, for the console and as Markdown. Scores are printed as in papers, times 100."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from cgtgan.config import COCO_METRICS, METRICS
from cgtgan.evaluation.bootstrap import Difference, Interval
from cgtgan.reporting.methods import FROM_FILE, SYSTEMS

FIRST_COLUMNS = [score for metric in COCO_METRICS for score in METRICS[metric]]  # of the first table
TIMES_100 = {*FIRST_COLUMNS, *METRICS["clipscore"]}  # others stay as measured
# Parts of a table, in their order, with their headings.
PARTS = {
    "": "",
    "untrained": "Without adversarial training",
    "domain": "By domain of the pictures, each scored alone",
    "bound": "For orientation: supervised on pairs, or human",
    "published": "Published: the paper's figures, not measured here",
}
MARKS = {(1, True): "▲", (1, False): "△", (-1, True): "▼", (-1, False): "▽"}  # (sign, holds over other seeds too)


def is_times_100(metric: str) -> bool:
    return metric in TIMES_100


def format_score(metric: str, value: float, like: float | None = None) -> str:
    """`value` times 100 with one decimal; other columns have the decimals that suit `like` (a spread: its mean)."""
    if is_times_100(metric):
        return f"{value * 100:.1f}"
    size = abs(value if like is None else like)
    return f"{value:,.{3 if size < 1 else 2 if size < 100 else 0}f}"


def signed_score(metric: str, value: float) -> str:
    """'+3.2', times 100 where the metric is, with a true minus."""
    return ("−" if value < 0 else "+") + format_score(metric, abs(value))


def signed_interval(metric: str, interval: Interval) -> str:
    return f"{signed_score(metric, interval.low)} to {signed_score(metric, interval.high)}"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


# ---------------------------------------------------------------------------------------------------------------- rows


class Origin(NamedTuple):
    """What a row of several runs is: `variant` is empty where several variants share the row."""

    method: str = ""
    experiment: str = ""
    variant: str = ""


@dataclass(frozen=True)
class MethodRow:
    """A row of a table. `scores`: metric -> raw values (CIDEr 2.39, not 239), one per seed of `seeds`; `part` of PARTS.

    `differences`: metric -> against the row named `baseline`.
    """

    name: str
    note: str = ""
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    part: str = ""
    ours: bool = False
    decoding: str = ""
    seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    baseline: str = ""
    differences: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        """Whether it is never bold: of a domain alone, a bound (supervised, human) or published."""
        return self.part in ("domain", "bound", "published")

    @property
    def num_seeds(self) -> int:
        """0 for captions made elsewhere."""
        return 0 if self.origin.method == FROM_FILE else max(map(len, self.scores.values()), default=0)

    def mean(self, metric: str) -> float | None:
        """Over the finite values."""
        finite = [value for value in self.scores.get(metric, ()) if math.isfinite(value)]
        return statistics.fmean(finite) if finite else None

    def mark(self, metric: str) -> tuple[str, str]:
        """A sign, and what it means in words, where the score differs from the baseline's; else two empty texts."""
        difference = self.differences.get(metric)
        if difference is None or not difference.sign:
            return "", ""
        above = "above" if difference.sign > 0 else "below"
        over = "over other seeds too" if difference.firm else "for these runs"
        return MARKS[difference.sign, difference.firm], f"{above} {self.baseline}, {over}"


# Name of a test set -> the rows that were scored on its images against its references, in the order of the table.
def domain_rows(name: str, record: Mapping[str, Any], decoding: str = "") -> list[MethodRow]:
    """A row per domain of what scores.json holds, for NoCaps; empty where it has none."""
    return [
        MethodRow(
            f"{name}, {domain}",
            f"{part['images']:,} image{'s' * (part['images'] != 1)}",
            {metric: [value] for metric, value in part["scores"].items()},
            "domain",
            decoding=decoding,
        )
        for domain, part in (record.get("domains") or {}).items()
    ]


RowsBySet = Mapping[str, Sequence[MethodRow]]


def measured_metrics(rows: Iterable[MethodRow]) -> list[str]:
    return list(dict.fromkeys(metric for row in rows if row.part != "published" for metric in row.scores))


def baseline_names(rows: Iterable[MethodRow]) -> list[str]:
    return list(dict.fromkeys(row.baseline for row in rows if row.differences))


# --------------------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Cell:
    mean: str
    spread: str = ""  # '± 1.2'
    note: str = ""  # '2/3 seeds finite'
    best: bool = False
    mark: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """`columns`: metric, whether it is printed times 100. `parts`: heading, lines. `decodings`: how many there are."""

    columns: list[tuple[str, bool]]
    parts: list[tuple[str, list[tuple[MethodRow, list[Cell]]]]]
    decodings: int
    several_seeds: bool

    @property
    def leading(self) -> int | None:
        """The column that papers are compared by, where there are others: on a phone it stands first."""
        names = [name for name, _ in self.columns]
        return names.index("CIDEr") if "CIDEr" in names[1:] else None


def score_tables(rows: Sequence[MethodRow]) -> list[ScoreTable]:
    """A table of COCO's metrics and one of all others; one without columns is left out."""
    metrics = measured_metrics(rows)
    parts = [m for m in FIRST_COLUMNS if m in metrics], [m for m in metrics if m not in FIRST_COLUMNS]
    return [score_table(rows, columns) for columns in parts if columns]


def score_table(rows: Sequence[MethodRow], metrics: Sequence[str]) -> ScoreTable:
    """The rows that have one of `metrics`, by part. Means that look equal in a column are bold together."""
    rows = sorted((row for row in rows if row.scores.keys() & set(metrics)), key=_place)
    best: dict[str, str] = {}
    for metric in filter(is_times_100, metrics):  # more is not better for a length or a count
        means = [mean for row in rows if not row.apart and (mean := row.mean(metric)) is not None]
        best |= {metric: format_score(metric, max(means))} if means else {}
    lines = [(row, [score_cell(row, metric, best.get(metric, "")) for metric in metrics]) for row in rows]
    parts = [(PARTS[part], list(group)) for part, group in groupby(lines, key=lambda line: line[0].part)]
    decodings = len({row.decoding for row in rows} - {"", "none"})
    columns = [(metric, is_times_100(metric)) for metric in metrics]
    return ScoreTable(columns, parts, decodings, any(row.num_seeds > 1 for row in rows))


def _place(row: MethodRow) -> int:
    return list(PARTS).index(row.part)


def score_cell(row: MethodRow, metric: str, best: str = "") -> Cell:
    values, mean = row.scores.get(metric, ()), row.mean(metric)
    if mean is None:
        return Cell("NaN" if values else "-")
    finite = [value for value in values if math.isfinite(value)]
    spread = f"± {format_score(metric, statistics.stdev(finite), mean)}" if len(finite) > 1 else ""
    note = "" if len(finite) == len(values) else f"{len(finite)}/{len(values)} seeds finite"
    text = format_score(metric, mean)
    return Cell(text, spread, note, not row.apart and text == best, *row.mark(metric))


@dataclass(frozen=True)
class DifferenceCell:
    """A difference to the baseline. `places`: the interval's ends and the value, on the column's scale of -50 to 50."""

    value: str
    images: str
    seeds: str
    p: str
    mark: str
    places: tuple[float, ...]


def difference_table(
    rows: Iterable[MethodRow],
) -> tuple[list[str], list[tuple[MethodRow, list[DifferenceCell | None]]]]:
    """(metrics, rows with a cell per metric) of what was tested against a baseline."""
    rows = list(rows)
    tested = sorted((row for row in rows if row.differences), key=_place)
    metrics = dict.fromkeys((*FIRST_COLUMNS, *measured_metrics(rows)))
    reach = {m: _reach(tested, m) for m in metrics if any(m in row.differences for row in tested)}
    return list(reach), [(row, [_difference_cell(row, m, reach[m]) for m in reach]) for row in tested]


def _reach(rows: Sequence[MethodRow], metric: str) -> float:
    """The largest end of the variants' intervals: a method without training may be far away and is cut off."""
    tested = [row for row in rows if metric in row.differences]
    variants = [row for row in tested if row.origin.method in SYSTEMS] or tested
    intervals = [row.differences[metric].images for row in variants]
    return max(abs(edge) for interval in intervals for edge in (interval.low, interval.high))


def _difference_cell(row: MethodRow, metric: str, reach: float) -> DifferenceCell | None:
    difference = row.differences.get(metric)
    if difference is None:
        return None
    images, seeds = difference.images, difference.seeds
    numbers = (images.low, images.high, difference.value)
    return DifferenceCell(
        signed_score(metric, difference.value),
        signed_interval(metric, images),
        signed_interval(metric, seeds) if seeds else "",
        p_value(images.p),
        row.mark(metric)[0],
        tuple(max(-50.0, min(50.0, 46 * number / reach)) if reach else 0.0 for number in numbers),
    )


# ------------------------------------------------------------------------------------------------ console and Markdown


def console_table(scores: ScoreTable) -> Table:
    """The mean above ± its standard deviation (n-1), the best unpaired one bold."""
    as_measured = ", ".join(metric for metric, times_100 in scores.columns if not times_100)
    caption = f"scores x 100{f' (not {as_measured})' if as_measured else ''}; bold: best unpaired"
    caption += "; ± standard deviation over seeds (n-1)" if scores.several_seeds else ""
    rows = [row for _, lines in scores.parts for row, _ in lines]
    if any(row.mark(metric)[0] for row in rows for metric, _ in scores.columns):
        caption += f"; ▲△ above, ▼▽ below {' / '.join(baseline_names(rows))} (△▽: for these runs and images alone)"
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption), caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=18)  # the only column that gives way in a narrow console
    if scores.several_seeds:
        table.add_column("seeds", justify="right", no_wrap=True)
    for metric, _ in scores.columns:
        table.add_column(Text(metric.replace(" ", "\n")), justify="right", no_wrap=True, vertical="top")
    for _, lines in scores.parts:
        for row, cells in lines:
            seeds = [Text(str(row.num_seeds))] if scores.several_seeds else []
            table.add_row(_console_name(row), *seeds, *map(_console_cell, cells))
        table.add_section()
    return table


def _console_name(row: MethodRow) -> Text:
    name = Text(row.name, style="bold cyan" if row.ours else "italic" if row.apart else "")  # Text: never markup
    about = "bound" if row.part == "bound" else "", row.note, f"decoding: {row.decoding}" if row.decoding else ""
    return name.append("\n" + ", ".join(filter(None, about)), style="not bold dim") if any(about) else name


def _console_cell(cell: Cell) -> Text:
    text = Text(cell.mean, style="bold" if cell.best else "")
    text.append(cell.mark, style="not bold")
    for extra in filter(None, (cell.spread, cell.note.replace(" ", "\n"))):
        text.append("\n" + extra, style="not bold dim")
    return text


def markdown_table(scores: ScoreTable) -> str:
    """The table as GitHub Markdown: 'mean ± standard deviation' (n-1), the best unpaired one bold."""
    lines = []
    for row, cells in (line for _, part in scores.parts for line in part):
        lines.append([row.name, row.note, row.decoding])
        for cell in cells:
            texts = f"**{cell.mean}**" if cell.best else cell.mean, cell.spread, cell.note and f"({cell.note})"
            lines[-1].append(" ".join(filter(None, texts)))
    return markdown_lines(["method", "note", "decoding"], [metric for metric, _ in scores.columns], lines)


def markdown_lines(names: Sequence[str], metrics: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns of `names` are set to the left, those of `metrics` to the right."""
    rules = [":--"] * len(names) + ["--:"] * len(metrics)
    text = [
        [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in line]
        for line in ([*names, *metrics], rules, *lines)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)
