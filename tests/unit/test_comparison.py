"""Rows of several runs, the baseline and its test, the CSV and the LaTeX table."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import make_run

from cgtgan.errors import InputError
from cgtgan.evaluation.bootstrap import Difference, Interval
from cgtgan.reporting.compared_rows import against_baseline, entries, tables_of
from cgtgan.reporting.curves import POINTS, TOGETHER, mean_curve, shared_baselines, short_names, variant_plots
from cgtgan.reporting.export import COLUMNS, csv_text, latex_escaped, latex_table
from cgtgan.reporting.tables import MethodRow, Origin, RowsBySet
from cgtgan.reporting.variants import find_runs, gather

RNG = np.random.default_rng(0)
BASE = RNG.normal(1, 0.5, 60)


def made(root: Path, wanted: str | None = None, resamples: int = 500) -> tuple[RowsBySet, list[str], list[str]]:
    """(tables, names of the baselines, notes)"""
    variants, notes = gather(find_runs([str(root)], "test")), []
    rows = entries(variants, notes)
    baselines = against_baseline(rows, wanted, resamples=resamples, seed=0, notes=notes)
    return tables_of(rows), baselines, notes


def row(sets: RowsBySet, name: str) -> MethodRow:
    (found,) = [row for rows in sets.values() for row in rows if row.name == name]
    return found


def values(row: MethodRow, metric: str = "CIDEr") -> dict[int, float]:
    """Seed -> score."""
    return dict(zip(row.seeds[metric], row.scores[metric], strict=True))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in (0, 1):
        init = list(BASE / 2 + seed / 10)
        make_run(
            tmp_path,
            "a",
            seed,
            {"cgtgan": list(BASE), "init": init, "nearest": list(BASE / 3)},
            settings={"reward_weights.name": "x"},
        )
        make_run(
            tmp_path,
            "b",
            seed,
            {"cgtgan": list(BASE + 0.3 + seed / 50), "init": init},
            settings={"reward_weights.name": "y"},
        )
    return tmp_path


def test_rows_have_their_seeds_and_shared_methods_stand_once(root: Path) -> None:
    sets, baselines, notes = made(root)
    (rows,) = sets.values()
    assert list(sets) == ["demo, test split, 60 images"]
    assert [(r.name, r.origin.method, r.origin.variant) for r in rows] == [
        ("a", "cgtgan", "a"),
        ("b", "cgtgan", "b"),
        ("Initialisation only", "init", ""),
        ("Nearest sentence", "nearest", "a"),
    ]
    assert values(row(sets, "b")) == {0: pytest.approx(BASE.mean() + 0.3), 1: pytest.approx(BASE.mean() + 0.32)}
    assert list(values(row(sets, "Initialisation only"))) == [0, 1]
    assert (baselines, notes) == (["a"], [])


def test_differences_are_paired_and_only_of_means_of_images(root: Path) -> None:
    sets, _, _ = made(root)
    found = row(sets, "b").differences
    assert sorted(found) == ["CIDEr", "ROUGE-L"]  # BLEU and METEOR are of summed counts, whatever they come to
    assert found["CIDEr"].value == pytest.approx(0.31)
    assert found["CIDEr"].images.high - found["CIDEr"].images.low < 1e-6  # every image gained the same
    assert found["CIDEr"].sign == 1
    assert row(sets, "Initialisation only").differences["CIDEr"].sign == -1
    assert row(sets, "a").differences == {}


@pytest.mark.parametrize(
    ("wanted", "name"), [("b", "b"), ("exp/b", "b"), ("init", "Initialisation only"), ("Nearest sentence",) * 2]
)
def test_the_baseline_is_a_variant_or_a_method(root: Path, wanted: str, name: str) -> None:
    sets, baselines, _ = made(root, wanted)
    assert baselines == [name]
    assert {r.baseline for rows in sets.values() for r in rows if r.name != name} == {name}


def test_an_unknown_baseline_names_the_choice(root: Path) -> None:
    with pytest.raises(
        InputError, match=r"report.baseline=c is none of the rows; it must be one of a, b, init, nearest"
    ):
        made(root, "c")
    with pytest.raises(InputError, match=r"report.baseline=exp is several rows: name one of a, b"):
        made(root, "exp")


def test_one_variant_alone_is_compared_with_its_initialisation(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 0, {"cgtgan": list(BASE), "init": list(BASE / 2)})
    assert made(tmp_path)[1] == ["Initialisation only"]


def test_a_method_that_hangs_on_what_differs_has_a_row_each(tmp_path: Path) -> None:
    for corpus, shift in (("coco", 0.0), ("gcc", 0.2)):
        make_run(
            tmp_path,
            corpus,
            0,
            {"cgtgan": list(BASE + shift), "init": list(BASE / 2 + shift)},
            settings={"corpus.name": corpus},
        )
    sets, baselines, _ = made(tmp_path, "init")
    assert baselines == ["Initialisation only (corpus.name=coco)", "Initialisation only (corpus.name=gcc)"]
    assert row(sets, "gcc").baseline == "Initialisation only (corpus.name=gcc)"  # its own
    assert row(sets, "coco").baseline == "Initialisation only (corpus.name=coco)"


def test_decodings_are_rows_of_their_own(root: Path) -> None:
    make_run(root, "a", 2, {"cgtgan": list(BASE)}, decoding="beam 3", settings={"reward_weights.name": "x"})
    sets, _, _ = made(root)
    assert [(r.decoding, list(values(r))) for r in next(iter(sets.values())) if r.name == "a"] == [
        ("greedy", [0, 1]),
        ("beam 3", [2]),
    ]


def test_other_references_are_a_table_of_their_own(root: Path) -> None:
    make_run(root, "c", 0, {"cgtgan": list(BASE)}, references="def")
    sets, baselines, _ = made(root)
    assert list(sets) == ["demo, test split, 60 images, references abc", "demo, test split, 60 images, references def"]
    assert [r.name for r in [*sets.values()][1]] == ["c"]
    assert baselines == ["a"]


def test_other_images_are_said_and_not_tested(root: Path) -> None:
    make_run(root, "c", 0, {"cgtgan": list(BASE)}, ids=range(1, 61), settings={"train.steps": 5})
    sets, _, notes = made(root)
    assert notes == ["c is not tested against a: their scored images differ (2 are not in both)"]
    assert row(sets, "c").differences == {}
    assert row(sets, "b").differences != {}


def test_a_shared_method_with_two_results_is_said(root: Path) -> None:
    make_run(root, "b", 1, {"cgtgan": list(BASE), "init": list(BASE)}, settings={"reward_weights.name": "y"})
    _, _, notes = made(root)
    assert len(notes) == 1
    assert notes[0].startswith("Initialisation only, seed 1:")


def test_projections_at_two_temperatures_are_two_rows(root: Path) -> None:
    make_run(root, "b", 1, {"cgtgan": list(BASE), "projection": list(BASE)}, settings={"reward_weights.name": "y"})
    folder = make_run(
        root, "c", 1, {"cgtgan": list(BASE), "projection": [v + 1 for v in BASE]}, settings={"reward_weights.name": "z"}
    )
    scores = folder / "evaluation/test/projection/scores.json"
    made_from = json.loads(scores.read_text())
    made_from["made_from"]["projection_t"] = 3.0
    scores.write_text(json.dumps(made_from))
    names = [r.name for r in next(iter(made(root)[0].values())) if r.name.startswith("Projection")]
    assert len(names) == 2
    assert any("3" in name for name in names)


def test_the_paper_s_row_stands_beside_its_setting_alone(root: Path) -> None:
    assert not any(r.part == "published" for r in next(iter(made(root)[0].values())))
    paper = {
        "dataset.name": "coco",
        "corpus.name": "coco",
        "clip_backbone.kind": "openai",
        "clip_backbone.model": "ViT-L/14",
    }
    make_run(root, "p", 0, {"cgtgan": list(BASE)}, settings=paper, references="coco")
    sets, _, _ = made(root)
    assert [r.name for r in [*sets.values()][1]] == ["p", "CgT-GAN as published"]
    assert row(sets, "CgT-GAN as published").scores["CIDEr"] == [pytest.approx(1.081)]
    assert not any(r.part == "published" for r in next(iter(sets.values())))


# ----------------------------------------------------------------------------------------------------------- CSV, LaTeX

HOSTILE = 'a_b, 50% & #1 {x} $y$ \\z ~ ^ "q"\n<t>|[*'


def compared(name: str, method: str, values: dict[str, dict[int, float]], **more: Any) -> MethodRow:
    """A row from metric -> seed -> score."""
    scores, seeds = {m: list(v.values()) for m, v in values.items()}, {m: list(v) for m, v in values.items()}
    part = more.pop("part", {"published": "published", "cgtgan": ""}.get(method, "untrained"))
    return MethodRow(name, scores=scores, seeds=seeds, origin=Origin(method), part=part, **more)


def parsed(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_csv_gives_every_number_back(root: Path) -> None:
    sets, _, _ = made(root)
    lines = parsed(csv_text(sets))
    assert csv_text(sets).splitlines()[0] == ",".join(COLUMNS)
    assert len(lines) == sum(len(r.scores) for r in next(iter(sets.values())))
    (line,) = [x for x in lines if (x["row"], x["metric"]) == ("b", "CIDEr")]
    given = dict(zip(map(int, line["seeds"].split()), map(float, line["values"].split()), strict=True))
    assert given == values(row(sets, "b"))
    assert (int(line["n"]), float(line["mean"]), float(line["std"])) == (
        2,
        statistics.fmean(given.values()),
        statistics.stdev(given.values()),
    )
    found = row(sets, "b").differences["CIDEr"]
    assert found.seeds is not None
    assert [float(line[k]) for k in ("diff", "ci_low", "ci_high", "p")] == [
        found.value,
        found.images.low,
        found.images.high,
        found.images.p,
    ]
    assert [float(line[f"seeds_{k}"]) for k in ("ci_low", "ci_high", "p")] == [
        found.seeds.low,
        found.seeds.high,
        found.seeds.p,
    ]
    (base,) = [x for x in lines if (x["row"], x["metric"]) == ("a", "CIDEr")]
    assert base["baseline"] == base["diff"] == base["p"] == ""


def test_the_csv_takes_any_name_and_no_number_for_one() -> None:
    rows = [
        compared(HOSTILE, "cgtgan", {"CIDEr": {3: math.nan, 4: 1.5}}),
        compared("paper", "published", {"CIDEr": {0: 1.081}}),
    ]
    one, paper = parsed(csv_text({"t,1": rows}))
    assert (one["row"], one["test_set"]) == (HOSTILE, "t,1")
    assert (one["n"], one["mean"], one["std"], one["seeds"], one["values"]) == ("1", "1.5", "", "3 4", "nan 1.5")
    assert (paper["n"], paper["mean"], paper["values"]) == ("", "1.081", "")


def latex() -> str:
    up, down = (
        Difference(0.2, Interval(0.1, 0.3, 0.01), Interval(0.05, 0.4, 0.02)),
        Difference(-0.2, Interval(-0.3, -0.1, 0.01)),
    )
    rows = [
        compared("base", "cgtgan", {"BLEU-4": {0: 0.30}, "CIDEr": {0: 1.0, 1: 1.1}}),
        compared(
            HOSTILE,
            "cgtgan",
            {"BLEU-4": {0: 0.31}, "CIDEr": {0: 1.2, 1: 1.3}},
            baseline="base",
            differences={"CIDEr": up},
        ),
        compared(
            "[x]", "init", {"CIDEr": {0: 0.5}, "Vocabulary": {0: 1234.0}}, baseline="base", differences={"CIDEr": down}
        ),
        compared("human", "human", {"CIDEr": {0: 2.8}}, part="bound"),
        compared("paper", "published", {"CIDEr": {0: 3.081}}),
    ]
    return latex_table({"coco_test, 100%": rows}, made_by=["python run.py 'runs=a%b\nc'", "cgtgan 1 (abc)"])


def test_the_latex_table_is_whole() -> None:
    lines = latex().splitlines()
    assert lines[:2] == ["% python run.py 'runs=a%b c'", "% cgtgan 1 (abc)"]
    body = [line for line in lines if line and not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{lrrrr}"
    assert [body[1], body[-2], body[-1]] == [r"\toprule", r"\bottomrule", r"\end{tabular}"]
    assert body.count(r"\midrule") == 4  # variants, other methods, bounds, published
    cells = [line for line in body if line.endswith(r"\\")]
    assert len(cells) == 6
    assert all(len(re.findall(r"(?<!\\)&", line)) == 4 for line in cells)  # as many columns as are declared
    assert all(len(re.findall(r"(?<!\\)\$", line)) % 2 == 0 for line in cells)
    assert all(len(re.findall(r"(?<!\\)\{", line)) == len(re.findall(r"(?<!\\)\}", line)) for line in cells)
    assert all(line.isascii() for line in body)


def test_the_best_of_ours_is_bold_and_signs_say_what_excludes_0() -> None:
    text = latex()
    assert r"$\mathbf{125.0} \pm 7.1^{+}$" in text
    assert r"$50.0^{(-)}$" in text  # one seed
    assert r"$\mathbf{31.0}$" in text
    assert text.count(r"\mathbf") == 2  # neither a bound, nor the paper's, nor a count
    assert "$280.0$" in text
    assert "$308.1$" in text
    assert "$1{,}234$" in text
    assert r"base & 2 & $30.0$ & $105.0 \pm 7.1$ & -- \\" in text


def test_names_are_escaped() -> None:
    assert latex_escaped("a_b & 5% #1 $x$ {y}") == r"a\_b \& 5\% \#1 \$x\$ \{y\}"
    assert (
        latex_escaped("\\~^<>|")
        == r"\textbackslash{}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"
    )
    assert latex_escaped("[a] *") == "{[}a] {*}"  # neither is taken for an argument of the row's end
    assert latex_escaped("a---b-c\n  d\t\x00e") == "a-{}-{}-b-c d e"
    assert latex_escaped("cos 0.5 ± 1 · é") == r"cos 0.5 $\pm$ 1 $\cdot$ é"


# --------------------------------------------------------------------------------------------------------------- curves


def history(values: dict[int, float], key: str = "x") -> list[dict[str, Any]]:
    return [{"step": step, key: value} for step, value in values.items()] + [
        {"step": 99, "other": 1},
        {"step": 98, key: None},
    ]


def test_a_curve_is_the_mean_at_common_steps_with_its_spread() -> None:
    three = [history({1: 1.0, 2: 5.0, 3: 9.0}), history({2: 7.0, 3: 9.0}), history({2: 9.0, 3: 9.0, 4: 0.0})]
    curve = mean_curve(three, "x", 10)
    assert curve is not None
    assert (list(curve.steps), list(curve.values), list(curve.spread)) == ([2, 3], [70.0, 90.0], [20.0, 0.0])
    two = mean_curve(three[:2], "x")
    assert two is not None
    assert list(two.spread) == [1.0, 0.0]  # from the lower to the higher
    one = mean_curve(three[:1], "x")
    assert one is not None
    assert (list(one.values), list(one.spread)) == ([1.0, 5.0, 9.0], [])
    assert mean_curve([history({1: 1.0}), history({2: 1.0})], "x") is None
    assert mean_curve(three, "y") is None


def test_a_long_curve_is_averaged() -> None:
    curve = mean_curve([history({i: float(i) for i in range(1, 1001)})], "x")
    assert curve is not None
    assert len(curve.steps) == POINTS
    assert (curve.values[0], curve.steps[-1]) == (pytest.approx(np.arange(1, 21).mean()), 1000)


def test_many_variants_are_several_plots_that_look_alike(tmp_path: Path) -> None:
    for k in range(TOGETHER + 2):
        make_run(tmp_path, f"v{k}", 0, {"cgtgan": [1.0]}, settings={"train.steps": k + 1}, steps=(1, 2) if k else ())
    variants = gather(find_runs([str(tmp_path)], "test"))
    plots = variant_plots({variant.name: [run.history for run in variant.runs] for variant in variants})
    first, second = [plot for plot in plots if plot.title.startswith("Validation")]
    assert [c.style for c in first.curves] == list(
        range(1, TOGETHER)
    )  # v0 logged nothing: the others keep their colours
    assert ([c.label for c in second.curves], [c.style for c in second.curves]) == (["v6", "v7"], [0, 1])
    assert (len(first.context), len(second.context)) == (2, TOGETHER - 1)


def test_lines_are_of_the_baselines_that_all_runs_share_and_means_over_seeds() -> None:
    def runs(*ciders: dict[str, float]) -> list[tuple[int, dict[str, float]]]:
        return [(i % 2, cider) for i, cider in enumerate(ciders)]  # two variants of the seeds 0 and 1

    first, second = {"init": 0.1, "projection": 2.0, "human": 3.0}, {"init": 0.3, "projection": 2.0, "human": 3.0}
    same = shared_baselines(runs(first, second, first, second))
    assert same == pytest.approx({"init": 0.2, "projection": 2.0, "human": 3.0})
    # at another temperature in the second variant, where `human` was not scored for one seed
    other = {**second, "projection": 2.1}
    assert shared_baselines(runs(first, second, first, other)) == pytest.approx({"init": 0.2, "human": 3.0})
    assert shared_baselines(runs(first, second, first, {"init": 0.3})) == pytest.approx({"init": 0.2})
    assert shared_baselines(runs(first, {})) == shared_baselines([]) == {}


def test_the_validation_curves_of_variants_have_the_lines(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 0, {"cgtgan": [1.0]})
    variants = {"a": [run.history for run in gather(find_runs([str(tmp_path)], "test"))[0].runs]}
    cider, *others = variant_plots(variants, {"mean_shift": 2.0})
    assert cider.lines == {"mean shift": 200.0}
    assert "dashed: baselines that are the same in all variants, mean over seeds" in cider.note
    assert others
    assert not any(plot.lines for plot in others)
    assert "dashed" not in variant_plots(variants)[0].note


def test_long_names_lose_what_they_share() -> None:
    names = [f"coco_vit_l14_t100_clip_{kind}_k5_noise0.5" for kind in ("agg", "cos")]
    assert short_names(names) == ["agg", "cos"]
    assert short_names([names[0], f"{names[0]}_nodisc"]) == [names[0], "nodisc"]
    assert short_names(["a_x", "b_x"]) == ["a_x", "b_x"]
