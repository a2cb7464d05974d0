"""Names of rows: what differs between the variants, or the user's own words."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from run_folders import make_run

from cgtgan.config import Config
from cgtgan.errors import InputError
from cgtgan.reporting.labels import labelled
from cgtgan.reporting.many_runs import compare
from cgtgan.reporting.variants import find_runs, gather

BASE = np.random.default_rng(0).normal(1, 0.5, 20)


def run(root: Path, variant: str, shift: float = 0.0, experiment: str = "exp", **settings: object) -> Path:
    """A run of this variant; `aggregation_t__t=25` is the setting aggregation_t.t."""
    given = {name.replace("__", "."): value for name, value in settings.items()}
    return make_run(
        root, variant, 0, {"cgtgan": list(BASE + shift), "init": list(BASE / 2)}, experiment=experiment, settings=given
    )


def names(root: Path, own: dict[str, str] | None = None) -> list[str]:
    return [variant.name for variant in labelled(gather(find_runs([str(root)], "test")), own or {})]


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    for t in (25, 100):
        run(tmp_path, f"demo_t{t}_clip_agg_k5", t / 100, aggregation_t__t=float(t))
    return tmp_path


def test_a_swept_setting_is_the_label(swept: Path) -> None:
    assert names(swept) == ["t = 25", "t = 100"]
    run(
        swept,
        "demo_t25_clip_cos_k5",
        aggregation_t__t=25.0,
        reward_weights__name="clip_cos",
        reward_weights__clip_weight=1.0,
    )
    assert names(swept) == ["clip_agg, t = 25", "clip_cos, t = 25", "clip_agg, t = 100"]
    run(swept, "mine", aggregation_t__t=50.0)  # variant=mine was typed
    assert "mine" in names(swept)
    run(swept, "demo_t25_clip_agg_k5", experiment="other", aggregation_t__t=25.0)
    assert "exp / clip_agg, t = 25" in names(swept)
    assert "other / demo_t25_clip_agg_k5" in names(swept)  # nothing in its experiment to differ from


def test_experiments_of_one_variant_each_keep_their_names(tmp_path: Path) -> None:
    for t, experiment in ((25, "cold"), (100, "warm")):
        run(tmp_path, f"demo_t{t}_clip_agg_k5", experiment=experiment, aggregation_t__t=float(t))
    assert names(tmp_path) == ["cold", "warm"]


def test_own_labels_stand_in_page_csv_and_latex(swept: Path) -> None:
    cfg = Config(stage="report", runs=str(swept), output=str(swept / "out"))
    cfg.report.labels = {"t25": "Cold & slow", "demo_t100_clip_agg_k5": "Warm", "init": "Before"}
    cfg.report.resamples, cfg.report.baseline = 100, "demo_t25_clip_agg_k5"  # the variant's own name still finds it
    compare(cfg, find_runs([str(swept)], "test"))
    with (swept / "out/comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["row"] for row in rows} == {"Cold & slow", "Warm", "Before"}
    assert {row["variant"] for row in rows if row["method"] == "cgtgan"} == {
        "demo_t25_clip_agg_k5",
        "demo_t100_clip_agg_k5",
    }
    assert {row["baseline"] for row in rows if row["row"] == "Warm" and row["diff"]} == {"Cold & slow"}
    assert "Cold \\& slow & " in (swept / "out/comparison.tex").read_text()
    page = (swept / "out/report.html").read_text()
    assert "Cold &amp; slow" in page
    assert "<dt>Seed</dt><dd>0</dd>" in page
    assert "Seeds</dt>" not in page


def test_labels_that_fit_nothing_or_two_rows(swept: Path) -> None:
    with pytest.raises(
        InputError, match=r"report\.labels has 't26', which is none of the rows; they are t = 25, t = 100"
    ):
        names(swept, {"t26": "x"})
    with pytest.raises(InputError, match=r"report\.labels gives 2 rows the name 'x'"):
        names(swept, {"exp": "x"})
