"""Many runs side by side: the rows of the comparison, as a tidy CSV file and as a LaTeX table."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cgtgan.evaluation.bootstrap import Difference
from cgtgan.reporting.page import Cell, MethodRow, is_times_100, shown_score, table_cells

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


@dataclass(frozen=True)
class ComparedRow:
    """A variant, a method that needs no GAN training, or the paper's figures. `values`: metric -> seed -> corpus score, raw (CIDEr 2.39).

    `method` is a name of stage=evaluate, or `published`. `differences`: metric -> against the row named `baseline`. `variant` is empty
    where several share the row.
    """

    name: str
    method: str
    values: Mapping[str, Mapping[int, float]]
    experiment: str = ""
    variant: str = ""
    note: str = ""
    decoding: str = ""
    bound: bool = False
    baseline: str = ""
    differences: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def published(self) -> bool:
        return self.method == "published"

    @property
    def kind(self) -> int:
        """The order of the table's parts: variants, methods without adversarial training, bounds, the paper's figures."""
        return 3 if self.published else 2 if self.bound else 0 if self.method == "cgtgan" else 1

    def method_row(self) -> MethodRow:
        scores = {metric: list(values.values()) for metric, values in self.values.items()}
        return MethodRow(
            self.name, self.note, scores, bound=self.bound, published=self.published, decoding=self.decoding
        )


@dataclass(frozen=True)
class TestSet:
    """Rows that were scored on the same images against the same references, in the order of the table."""

    __test__ = False  # no test class, whatever pytest makes of its name

    name: str
    rows: Sequence[ComparedRow]

    @property
    def metrics(self) -> list[str]:
        """Those that were measured here."""
        return list(dict.fromkeys(metric for row in self.rows if not row.published for metric in row.values))


def csv_text(sets: Sequence[TestSet]) -> str:
    """A line a row and metric; scores are fractions with all their digits, what is not known is empty.

    `seeds` and `values` are separated by blanks and belong together; `n`, `mean` and `std` (n-1) leave out what is not finite. A published
    row has a mean and nothing else.
    """
    file = io.StringIO()
    table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    for test_set in sets:
        for row in test_set.rows:
            for metric, values in row.values.items():
                table.writerow({"test_set": test_set.name, **_csv_fields(row, metric, values)})
    return file.getvalue()


def _csv_fields(row: ComparedRow, metric: str, values: Mapping[int, float]) -> dict[str, str]:
    fields = {
        "experiment": row.experiment,
        "variant": row.variant,
        "method": row.method,
        "row": row.name,
        "decoding": row.decoding,
    }
    fields["metric"] = metric
    finite = [value for value in values.values() if math.isfinite(value)]
    fields["mean"] = repr(statistics.fmean(finite)) if finite else ""
    if row.published:
        return fields
    fields |= {"n": str(len(finite)), "std": repr(statistics.stdev(finite)) if len(finite) > 1 else ""}
    fields |= {"seeds": " ".join(map(str, values)), "values": " ".join(map(repr, values.values()))}
    if found := row.differences.get(metric):
        fields |= {"baseline": row.baseline, "diff": repr(found.value)}
        for prefix, interval in (("", found.images), ("seeds_", found.seeds)):
            if interval:
                fields |= {
                    f"{prefix}ci_low": repr(interval.low),
                    f"{prefix}ci_high": repr(interval.high),
                    f"{prefix}p": repr(interval.p),
                }
    return fields


# ---- LaTeX -----------------------------------------------------------------------------------------------------------------------

_SPECIAL = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # behind the \\ of the row above, these two would be its arguments
    "*": "{*}",
    **{
        c: f"${name}$"
        for c, name in {"±": r"\pm", "·": r"\cdot", "×": r"\times", "→": r"\rightarrow", "−": "-"}.items()
    },
}


def latex_escaped(text: str) -> str:
    """Plain text as LaTeX's text mode prints it, on one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub("-(?=-)", "-{}", "".join(_SPECIAL.get(c, c) for c in line))  # two hyphens would become a dash


def latex_table(sets: Sequence[TestSet], *, made_by: Sequence[str] = ()) -> str:
    r"""A booktabs `tabular` for each test set, to be \input; `made_by` and what the signs mean stand above as comments.

    In a column the best of what was measured here without pairs is bold.
    """
    lines = [f"% {' '.join(line.split())}" for line in made_by]
    lines += [
        "% Needs \\usepackage{booktabs}.",
        "% Scores x 100 (not counts and lengths); mean \\pm standard deviation (n-1) over seeds.",
    ]
    lines += ["% Bold: the best score measured here without pairs."]
    if baselines := sorted({row.baseline for test_set in sets for row in test_set.rows if row.differences}):
        lines.append(
            f"% ^{{+}}, ^{{-}}: above, below {' / '.join(' '.join(name.split()) for name in baselines)}; the 95% interval of the"
        )
        lines.append(
            "% paired bootstrap over test images excludes 0. In parentheses: not so over other seeds, or their spread is unknown."
        )
    for test_set in sets:
        lines += ["", f"% {' '.join(test_set.name.split())}", *_tabular(test_set)]
    return "\n".join(lines) + "\n"


def _tabular(test_set: TestSet) -> list[str]:
    rows = [row for row in test_set.rows if any(metric in row.values for metric in test_set.metrics)]
    cells = dict(zip(map(id, rows), table_cells([row.method_row() for row in rows], test_set.metrics), strict=True))
    decodings = {row.decoding for row in rows if row.decoding not in ("", "none")}
    heads = ["Method", *(["Decoding"] if len(decodings) > 1 else []), "Seeds", *test_set.metrics]
    lines = [
        f"\\begin{{tabular}}{{{'l' * (len(heads) - 1 - len(test_set.metrics))}{'r' * (1 + len(test_set.metrics))}}}",
        "\\toprule",
    ]
    lines.append(" & ".join(latex_escaped(head) for head in heads) + r" \\")
    kind = None
    for row in sorted(rows, key=lambda row: row.kind):
        if row.kind != kind:
            lines.append("\\midrule")
            kind = row.kind
        seeds = max((len(values) for values in row.values.values()), default=0)
        line = [latex_escaped(row.name), *([latex_escaped(row.decoding)] if len(decodings) > 1 else [])]
        line.append("--" if row.published else str(seeds))
        for metric, cell in zip(test_set.metrics, cells[id(row)], strict=True):
            line.append(_latex_score(cell, row.differences.get(metric)))
        lines.append(" & ".join(line) + r" \\")
    return [*lines, "\\bottomrule", "\\end{tabular}"]


def _latex_score(cell: Cell, difference: Difference | None) -> str:
    if cell.mean in ("-", "NaN"):
        return "--" if cell.mean == "-" else cell.mean
    mean, spread = (text.replace(",", "{,}").replace("±", r" \pm") for text in (cell.mean, cell.spread))
    sign = "" if difference is None else ("", "+", "-")[difference.sign]
    if sign:
        sign = f"^{{{sign}}}" if difference and difference.firm else f"^{{({sign})}}"
    return f"$\\mathbf{{{mean}}}{spread}{sign}$" if cell.best else f"${mean}{spread}{sign}$"


# ---- differences -----------------------------------------------------------------------------------------------------------------


def signed_score(metric: str, value: float) -> str:
    """'+3.2', times 100 where the metric is, with a true minus."""
    text = (
        f"{value * 100:+.1f}" if is_times_100(metric) else ("−" if value < 0 else "+") + shown_score(metric, abs(value))
    )
    return text.replace("-", "−")


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
