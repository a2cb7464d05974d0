"""The comparison of many runs as files: a tidy CSV table, LaTeX and Markdown."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence

from cgtgan.reporting import tables
from cgtgan.reporting.tables import Cell, MethodRow, RowsBySet, baseline_names, measured_metrics

COLUMNS: Sequence[str] = (
    "test_set", "experiment", "variant", "method", "row", "decoding", "metric", "n", "mean", "std", "seeds", "values",
    "baseline", "diff", "ci_low", "ci_high", "p", "seeds_ci_low", "seeds_ci_high", "seeds_p",
)  # fmt: skip


def csv_text(sets: RowsBySet) -> str:
    """One line per row and metric; scores are fractions with all their digits, an unknown value is empty.

    `seeds` and `values` are separated by blanks and belong together; `n`, `mean` and `std` (n-1) leave out values that
    are not finite. A published row has a mean and nothing else.
    """
    file = io.StringIO()
    table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    for name, rows in sets.items():
        for row in rows:
            table.writerows({"test_set": name, **_csv_fields(row, metric)} for metric in row.scores)
    return file.getvalue()


def _csv_fields(row: MethodRow, metric: str) -> dict[str, object]:
    values = row.scores[metric]
    finite = [value for value in values if math.isfinite(value)]
    fields: dict[str, object] = {**row.origin._asdict(), "row": row.name, "decoding": row.decoding, "metric": metric}
    fields["mean"] = row.mean(metric)
    if row.part == "published":
        return fields
    fields |= {"n": len(finite), "std": statistics.stdev(finite) if len(finite) > 1 else ""}
    seeds = row.seeds[metric] if row.num_seeds else ()
    fields |= {"seeds": " ".join(map(str, seeds)), "values": " ".join(map(repr, values))}
    if difference := row.differences.get(metric):
        fields |= {"baseline": row.baseline, "diff": difference.value}
        for prefix, interval in (("", difference.images), ("seeds_", difference.seeds)):
            if interval:
                fields |= {f"{prefix}ci_low": interval.low, f"{prefix}ci_high": interval.high, f"{prefix}p": interval.p}
    return fields


def markdown(sets: RowsBySet) -> str:
    """The tables of scores and of differences as GitHub Markdown."""
    parts = []
    for name, rows in sets.items():
        parts.append(f"{name}; mean ± standard deviation (n-1) over seeds, x 100 where the metric is\n")
        parts += map(tables.markdown_table, tables.score_tables(rows))
        metrics, tested = tables.difference_table(rows)
        if tested:
            baselines = " / ".join(sorted(baseline_names(rows)))
            parts.append(f"difference to {baselines}: 95% interval over test images, p\n")
            lines = [
                [row.name, *("-" if c is None else f"{c.value} ({c.images}), {c.p}" for c in cells)]
                for row, cells in tested
            ]
            parts.append(tables.markdown_lines([""], metrics, lines))
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------------------- LaTeX

_SPECIAL = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "·": r"$\cdot$", "×": r"$\times$",
    "→": r"$\rightarrow$", "−": "$-$",
    "[": "{[}", "*": "{*}",  # behind the \\ of the row above, these two would be its arguments
}  # fmt: skip
_SIGNS = {"▲": "^{+}", "△": "^{(+)}", "▼": "^{-}", "▽": "^{(-)}", "": ""}


def latex_escaped(text: str) -> str:
    """Plain text as LaTeX's text mode prints it, on one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub("-(?=-)", "-{}", "".join(_SPECIAL.get(c, c) for c in line))  # two hyphens would become a dash


def latex_table(sets: RowsBySet, *, made_by: Sequence[str] = ()) -> str:
    r"""A booktabs `tabular` for each test set, to be \input; comments above it hold `made_by` and explain the signs."""
    comments = [*made_by, "Needs \\usepackage{booktabs}."]
    comments.append("Scores x 100 (not counts and lengths); mean \\pm standard deviation (n-1) over seeds.")
    comments.append("Bold: the best score measured here without pairs.")
    if baselines := sorted({name for rows in sets.values() for name in baseline_names(rows)}):
        names, test = " / ".join(baselines), "the 95% interval of the paired bootstrap"
        comments.append(f"^{{+}}, ^{{-}}: above, below {names}; {test}")
        comments.append(
            "over test images excludes 0. In parentheses: not over other seeds, or their spread is unknown."
        )
    lines = [f"% {' '.join(comment.split())}" for comment in comments]
    for name, rows in sets.items():
        lines += ["", f"% {' '.join(name.split())}", *_tabular(rows)]
    return "\n".join(lines) + "\n"


def _tabular(rows: Sequence[MethodRow]) -> list[str]:
    metrics = measured_metrics(rows)
    table = tables.score_table(rows, metrics)
    decoding = table.decodings > 1
    heads = ["Method", *(["Decoding"] if decoding else []), "Seeds", *metrics]
    lines = [f"\\begin{{tabular}}{{{'l' * (1 + decoding)}{'r' * (1 + len(metrics))}}}", "\\toprule"]
    lines.append(" & ".join(map(latex_escaped, heads)) + r" \\")
    for _, part in table.parts:
        lines.append("\\midrule")
        for row, cells in part:
            names = [row.name, row.decoding] if decoding else [row.name]
            seeds = "--" if row.part == "published" or not row.num_seeds else str(row.num_seeds)
            lines.append(" & ".join([*map(latex_escaped, names), seeds, *map(_latex_score, cells)]) + r" \\")
    return [*lines, "\\bottomrule", "\\end{tabular}"]


def _latex_score(cell: Cell) -> str:
    if cell.mean in ("-", "NaN"):
        return "--" if cell.mean == "-" else cell.mean
    mean, spread = (text.replace(",", "{,}").replace("±", r" \pm") for text in (cell.mean, cell.spread))
    mean = f"\\mathbf{{{mean}}}" if cell.best else mean
    return f"${mean}{spread}{_SIGNS[cell.mark]}$"
