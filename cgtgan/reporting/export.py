"""The comparison of many runs as files: a tidy CSV table, LaTeX and Markdown."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence

from cgtgan.reporting.tables import (
    Cell,
    ComparedRow,
    TestSet,
    difference_table,
    markdown_lines,
    markdown_table,
    score_table,
    split_metrics,
)

COLUMNS = (
    *(
        "test_set",
        "experiment",
        "variant",
        "method",
        "row",
        "decoding",
        "metric",
        "n",
        "mean",
        "std",
        "seeds",
        "values",
    ),
    *("baseline", "diff", "ci_low", "ci_high", "p", "seeds_ci_low", "seeds_ci_high", "seeds_p"),
)


def csv_text(sets: Sequence[TestSet]) -> str:
    """One line per row and metric; scores are fractions with all their digits, an unknown value is empty.

    `seeds` and `values` are separated by blanks and belong together; `n`, `mean` and `std` (n-1) leave out values that
    are not finite. A published row has a mean and nothing else.
    """
    file = io.StringIO()
    table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    for test_set in sets:
        for row in test_set.rows:
            for metric, values in row.scores.items():
                table.writerow({"test_set": test_set.name, **_csv_fields(row, metric, values)})
    return file.getvalue()


def _csv_fields(row: ComparedRow, metric: str, values: Sequence[float]) -> dict[str, str]:
    finite = [value for value in values if math.isfinite(value)]
    fields = {"experiment": row.experiment, "variant": row.variant, "method": row.method, "row": row.name}
    fields |= {"decoding": row.decoding, "metric": metric, "mean": repr(statistics.fmean(finite)) if finite else ""}
    if row.published:
        return fields
    fields |= {"n": str(len(finite)), "std": repr(statistics.stdev(finite)) if len(finite) > 1 else ""}
    fields |= {"seeds": " ".join(map(str, row.seeds[metric])), "values": " ".join(map(repr, values))}
    if difference := row.differences.get(metric):
        fields |= {"baseline": row.baseline, "diff": repr(difference.value)}
        for prefix, interval in (("", difference.images), ("seeds_", difference.seeds)):
            if interval:
                numbers = {"ci_low": interval.low, "ci_high": interval.high, "p": interval.p}
                fields |= {prefix + name: repr(number) for name, number in numbers.items()}
    return fields


def markdown(sets: Sequence[TestSet]) -> str:
    """The tables of scores and of differences as GitHub Markdown."""
    parts = []
    for test_set in sets:
        parts.append(f"{test_set.name}; mean ± standard deviation (n-1) over seeds, x 100 where the metric is\n")
        parts += [markdown_table(test_set.rows, metrics) for metrics in split_metrics(test_set.metrics)]
        metrics, rows = difference_table(test_set)
        if rows:
            baselines = " / ".join(sorted({row.baseline for row in test_set.rows if row.differences}))
            parts.append(f"difference to {baselines}: 95% interval over test images, p\n")
            lines = [["", *metrics], [":--", *("--:" for _ in metrics)]]
            for row, cells in rows:
                lines.append([row.name, *("-" if c is None else f"{c.value} ({c.images}), {c.p}" for c in cells)])
            parts.append(markdown_lines(lines))
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------------------- LaTeX

_SYMBOLS = {"±": r"\pm", "·": r"\cdot", "×": r"\times", "→": r"\rightarrow", "−": "-"}
_SPECIAL = {
    **{c: "\\" + c for c in "&%$#_{}"},
    **{c: f"\\text{name}{{}}" for c, name in {"\\": "backslash", "~": "asciitilde", "^": "asciicircum"}.items()},
    **{c: f"\\text{name}{{}}" for c, name in {"<": "less", ">": "greater", "|": "bar"}.items()},
    **{"[": "{[}", "*": "{*}"},  # behind the \\ of the row above, these two would be its arguments
    **{c: f"${name}$" for c, name in _SYMBOLS.items()},
}
_SIGNS = {"▲": "^{+}", "△": "^{(+)}", "▼": "^{-}", "▽": "^{(-)}", "": ""}


def latex_escaped(text: str) -> str:
    """Plain text as LaTeX's text mode prints it, on one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub("-(?=-)", "-{}", "".join(_SPECIAL.get(c, c) for c in line))  # two hyphens would become a dash


def latex_table(sets: Sequence[TestSet], *, made_by: Sequence[str] = ()) -> str:
    r"""A booktabs `tabular` for each test set, to be \input; comments above it hold `made_by` and explain the signs."""
    comments = [*made_by, "Needs \\usepackage{booktabs}."]
    comments.append("Scores x 100 (not counts and lengths); mean \\pm standard deviation (n-1) over seeds.")
    comments.append("Bold: the best score measured here without pairs.")
    if baselines := sorted({row.baseline for test_set in sets for row in test_set.rows if row.differences}):
        comments.append(
            f"^{{+}}, ^{{-}}: above, below {' / '.join(baselines)}; the 95% interval of the paired bootstrap"
        )
        comments.append(
            "over test images excludes 0. In parentheses: not over other seeds, or their spread is unknown."
        )
    lines = [f"% {' '.join(comment.split())}" for comment in comments]
    for test_set in sets:
        lines += ["", f"% {' '.join(test_set.name.split())}", *_tabular(test_set)]
    return "\n".join(lines) + "\n"


def _tabular(test_set: TestSet) -> list[str]:
    metrics = test_set.metrics
    table = score_table(test_set.rows, metrics)
    decoding = table.decodings > 1
    heads = ["Method", *(["Decoding"] if decoding else []), "Seeds", *metrics]
    lines = [f"\\begin{{tabular}}{{{'l' * (1 + decoding)}{'r' * (1 + len(metrics))}}}", "\\toprule"]
    lines.append(" & ".join(map(latex_escaped, heads)) + r" \\")
    for _, rows in table.parts:
        lines.append("\\midrule")
        for row, cells in rows:
            names = [row.name, row.decoding] if decoding else [row.name]
            seeds = "--" if row.published else str(row.num_seeds)
            lines.append(" & ".join([*map(latex_escaped, names), seeds, *map(_latex_score, cells)]) + r" \\")
    return [*lines, "\\bottomrule", "\\end{tabular}"]


def _latex_score(cell: Cell) -> str:
    if cell.mean in ("-", "NaN"):
        return "--" if cell.mean == "-" else cell.mean
    mean, spread = (text.replace(",", "{,}").replace("±", r" \pm") for text in (cell.mean, cell.spread))
    mean = f"\\mathbf{{{mean}}}" if cell.best else mean
    return f"${mean}{spread}{_SIGNS[cell.mark]}$"
