"""Run folders as the report reads them: rows over seeds and decodings, curves, what changed, what was left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.reporting.compared_rows import entries, tables_of
from cgtgan.reporting.curves import (
    DISCRIMINATOR,
    discriminator_plots,
    further_rewards,
    health,
    quantity_plots,
    reward_bands,
    run_plots,
    variant_plots,
)
from cgtgan.reporting.export import csv_text
from cgtgan.reporting.methods import training_note
from cgtgan.reporting.one_run import (
    _left_out,
    between_validations,
    histograms,
    method_rows,
    since_initialisation,
    summary,
)
from cgtgan.reporting.page import About, GalleryItem, Report, render_report
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.tables import markdown_table, score_table, score_tables
from cgtgan.reporting.variants import find_runs, gather
from cgtgan.training.wandb_tables import run_settings

SETTINGS = {
    "seed": 0,
    "dataset.name": "coco",
    "dataset.max_images": None,
    "corpus.name": "coco",
    "clip_backbone.kind": "openai",
    "clip_backbone.model": "ViT-L/14",
    "reward_weights.name": "clip_agg",
    "reward_weights.max_weight": 0.5,
    "train.use_initialization": True,
}
CIDER = {"cgtgan": {1: 2.0, 2: 1.0, 3: 0.5}, "init": {1: 1.0, 2: 1.5, 3: 0.5}, "nearest": {1: 0.1, 2: 0.2, 3: 0.3}}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_run(folder: Path, cider: float = 1.0, decoding: str = "greedy", **settings: Any) -> Run:
    write(folder / "settings.json", SETTINGS | settings)
    for method, images in CIDER.items():
        home = folder / "evaluation" / "test" / method
        scores = {"CIDEr": cider, "CLIPScore": 0.7} if method == "cgtgan" else {"CIDEr": cider / 2}
        write(home / "scores.json", {"scores": scores, "failed": {}, "excluded": [], "decoding": decoding})
        captions = {i: f"{method} {i}" if i != 3 else "the same" for i in images}
        write(home / "captions.json", [{"image_id": i, "caption": text} for i, text in captions.items()])
        rows = [{"image_id": i, "CIDEr": value, "BLEU-4": value / 9, "Novel": 1.0} for i, value in images.items()]
        write(
            home / "per_image.json",
            [row | ({"CLIPScore": row["image_id"] / 4} if method == "cgtgan" else {}) for row in rows],
        )
    for step in (10, 20, 30):
        write(
            folder / "validation" / f"step_{step:06d}.json",
            [{"image_id": i, "caption": f"{i} at {step if i else 0}"} for i in range(4)],
        )
    history = [
        {
            "step": step,
            "reward/semantic": 5.0,
            "advantage/semantic": -1.0,
            "advantage/semantic_abs": 2.0,
            "train/d_accuracy": 0.5,
        }
        | {"train/d_accuracy_real": step / 40, "reward/naturalness": None, "eval/CIDEr": 1 / step}
        for step in (10, 20, 30, 40)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    return Run(folder, "test")


@pytest.fixture
def own(tmp_path: Path) -> Run:
    return make_run(tmp_path / "seed=0")


def test_rows_are_the_scored_methods_and_the_paper(tmp_path: Path, own: Run) -> None:
    rows = method_rows(own)
    assert [(row.name, row.decoding, row.scores["CIDEr"]) for row in rows] == [
        ("Initialisation only", "greedy", [0.5]),
        ("Nearest sentence", "none", [0.5]),
        ("CgT-GAN (CLIP-agg)", "greedy", [1.0]),
        ("CgT-GAN as published", "greedy", [pytest.approx(1.081)]),
    ]
    assert [(row.ours, row.part) for row in rows] == [(False, "")] * 2 + [(True, ""), (False, "published")]
    assert rows[2].scores["CLIPScore"] == [0.7]
    beam = method_rows(make_run(tmp_path / "beam", decoding="beam 3 (length penalty 1)"))
    assert [row.decoding for row in beam[:3]] == ["beam 3 (length penalty 1)", "none", "beam 3 (length penalty 1)"]
    assert not [
        row for row in method_rows(make_run(tmp_path / "d", 1.0, **{"corpus.name": "gcc"})) if row.part == "published"
    ]


def test_domains_of_nocaps_have_rows_below_those_of_the_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    place = tmp_path / "evaluation/test/cgtgan/scores.json"
    domains = {
        name: {"images": n, "scores": {"CIDEr": n / 10}} for n, name in enumerate(("in-domain", "out-domain"), 1)
    }
    write(place, {**json.loads(place.read_text()), "domains": domains})
    (table,) = score_tables(method_rows(run))[:1]
    rows = {heading: [(row.name, row.note, row.mean("CIDEr")) for row, _ in part] for heading, part in table.parts}
    assert rows["By domain of the pictures, each scored alone"] == [
        ("CgT-GAN (CLIP-agg), in-domain", "1 image", 0.1), ("CgT-GAN (CLIP-agg), out-domain", "2 images", 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({}, "CLIP-agg"),
        ({"reward_weights.clip_weight": 1}, "CLIP-cos"),  # typed by hand, under the name clip_agg
        ({"reward_weights.name": "clip_cos"}, "CLIP-agg"),  # a name changes nothing
        ({"reward_weights.clip_weight": 0.5}, "CLIP-agg and CLIP-cos"),
        (
            {"reward_weights.cos_weight": 0.3, "reward_weights.clip_weight": 0.2},
            "0.8 CLIP-agg (cosine 0.3) + 0.2 CLIP-cos",
        ),
        ({"reward_weights.cos_weight": 1}, "CLIP-agg cosine"),
        ({"reward_weights.max_weight": 0.7}, "CLIP-agg, semantics 0.7"),
        ({"reward_weights.max_weight": 0}, "no semantics"),
        ({"reward_weights.max_weight": 1}, "CLIP-agg, no naturalness"),
        ({"train.use_discriminator": False}, "CLIP-agg, no naturalness"),
        ({"train.use_initialization": False}, "CLIP-agg, no initialisation"),
        (
            {f"reward_weights.terms.brevity.{key}": value for key, value in {"weight": 0.2, "scale": 10.0}.items()},
            "CLIP-agg + 0.2 brevity x10",
        ),
    ],
)
def test_a_title_comes_from_the_numbers(tmp_path: Path, settings: dict[str, Any], title: str) -> None:
    run = make_run(tmp_path / "run", **settings)
    assert run.title("cgtgan") == f"CgT-GAN ({title})"
    assert run.ablated == ("no " in title)
    assert (run.published() is not None) == (title == "CLIP-agg")


def test_a_reward_of_its_own_without_a_discriminator_is_a_recipe_and_has_a_headline(tmp_path: Path) -> None:
    weight = "reward_weights.terms.consensus.weight"
    alone: dict[str, Any] = {"reward_weights.max_weight": 1, "train.use_discriminator": False}
    without: dict[str, Any] = alone | {weight: 0.0}
    assert make_run(tmp_path / "ablation", **without).ablated
    alone[weight] = 1.0
    recipe = make_run(tmp_path / "recipe", **alone)
    assert not recipe.ablated
    assert summary(method_rows(recipe)).startswith("CgT-GAN (")
    assert not discriminator_plots([{"step": 1, "train/d_loss": 0.0, "reward/naturalness": 0.0}], 0)


def test_the_tag_in_wandb_names_other_numbers_than_the_preset_s() -> None:
    cfg = Config()
    assert run_settings(cfg).tags[-1] == "clip_agg"
    cfg.reward_weights.clip_weight = 1
    assert run_settings(cfg).tags[-1] == "CLIP-cos"


def test_the_paper_s_row_stands_beside_greedy_decoding_and_the_paper_s_training(tmp_path: Path) -> None:
    assert make_run(tmp_path / "beam", decoding="beam 3 (length penalty 1)").published() is None
    others: dict[str, Any] = {
        "train.steps": 6,
        "generator.mapper": "transformer",
        "aggregation_t.t": 175.0,
        "train.kl_weight": 0.1,
    }
    for field, value in others.items():
        assert make_run(tmp_path / field, **{field: value}).published() is None, field
    released: dict[str, Any] = {
        "train.dropout": True,
        "generator.language_model": "/models/gpt2",
        "train.released": ["text_order"],
    }
    assert make_run(tmp_path / "released", **released).published() is not None


def test_unlogged_plots_are_left_out(own: Run) -> None:
    (cider,) = run_plots(own.history, 0)
    assert (cider.title, cider.curves[0].label) == ("Validation CIDEr", "seed 0")
    assert list(cider.curves[0].values) == [10.0, 5.0, 100 / 30, 2.5]
    (accuracy,) = quantity_plots(own.history, DISCRIMINATOR, 0)
    assert [curve.label for curve in accuracy.curves] == ["corpus sentences"]
    assert accuracy.level == 0.5


def test_the_validation_curve_has_a_line_per_baseline_in_the_order_of_the_table(own: Run) -> None:
    assert own.validation_baselines() == {}
    assert run_plots(own.history, 0)[0].lines == {}
    write(own.folder / "validation/baselines.json", {"CIDEr": {"human": 2.9, "x": 1.0, "mean_shift": 0.5}})
    (cider,) = run_plots(own.history, 0, own.validation_baselines())
    assert list(cider.lines.items()) == [("mean shift", 50.0), ("human", 290.0)]
    assert "dashed: baselines on the same images" in cider.note
    (accuracy,) = quantity_plots(own.history, DISCRIMINATOR, 0)
    assert accuracy.lines == {}


def test_a_row_says_its_updates_and_seconds(own: Run) -> None:
    seeds = [{"updates": 300, "kept_step": 240, "seconds": 62.4}, {"updates": 300, "kept_step": 1200, "seconds": 9.44}]
    assert training_note("init", SETTINGS, seeds[:1]) == "300 updates in 62 s, step 240 kept"
    after = "300 updates in 9.4 to 62 s after initialisation, step 240 to 1,200 kept"
    assert training_note("cgtgan", SETTINGS, seeds) == after
    untrained = SETTINGS | {"train.use_initialization": False}
    assert training_note("cgtgan", untrained, seeds[:1]) == "300 updates in 62 s, step 240 kept"
    # an earlier version noted no seconds, for one seed here
    earlier = {"updates": 300, "kept_step": 300}
    assert training_note("init", SETTINGS, [seeds[0], earlier]) == "300 updates, step 240 to 300 kept"
    assert training_note("init", SETTINGS, [earlier, {}]) == "300 updates"
    assert training_note("init", SETTINGS, [{}]) == ""


def test_the_cost_of_a_run_is_that_of_its_own_checkpoint(own: Run) -> None:
    assert own.training("cgtgan") == {}  # of version 0.1: the scores name no checkpoint
    place = own.folder / "evaluation/test/cgtgan/scores.json"
    scores = json.loads(place.read_text())
    write(place, scores | {"checkpoint": "step 2"})
    last = own.history[-1]["step"]
    assert Run(own.folder, "test").training("cgtgan") == {"updates": last, "kept_step": 2}
    with (own.folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": last, "train/seconds_total": 12.5}) + "\n")
    run = Run(own.folder, "test")
    assert run.training("cgtgan") == {"updates": last, "kept_step": 2, "seconds": 12.5}
    (row,) = [row for row in method_rows(run) if row.ours]
    assert row.note == f"images and sentences, unpaired, {last} updates in 12 s after initialisation, step 2 kept"
    write(place, scores | {"checkpoint": "other/seed=1, step 2"})
    assert run.training("cgtgan") == {}


def add_own_term_and_metric(folder: Path) -> Run:
    """As a run with a reward term `brevity` and a metric `words` of the user logs and scores them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"reward/brevity": -10.0 + i, "reward/brevity_greedy": -9.0, "advantage/brevity": -1.0}
        row |= {"advantage/brevity_abs": 2.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = folder / "evaluation/test/cgtgan/scores.json"
    stored = json.loads(scores.read_text())
    write(scores, stored | {"scores": stored["scores"] | {"words": 9.25}})
    per_image = scores.with_name("per_image.json")
    write(per_image, [row | {"words": 7.0 + row["image_id"]} for row in json.loads(per_image.read_text())])
    return Run(folder, "test")


def test_a_reward_term_and_a_metric_of_the_user_are_shown(own: Run) -> None:
    run = add_own_term_and_metric(own.folder)
    assert further_rewards([run.history]) == ["brevity"]
    plot = run_plots(run.history, 0)[-1]
    assert plot.title == "Reward: brevity"
    assert {curve.label: list(curve.values) for curve in plot.curves} == {
        "samples": [-10.0, -9.0, -8.0, -7.0],
        "greedy": [-9.0] * 4,
    }
    band = reward_bands(run.history)[-1]
    assert (band.title, list(band.curves[0].spread)) == ("Reward: brevity: samples about the baseline", [2.0] * 4)
    assert list(band.curves[0].values) == [-9.0, -8.0, -7.0, -6.0]  # reward less advantage
    (many,) = [plot for plot in variant_plots({"a": [run.history]}) if plot.title == "Reward: brevity"]
    assert list(many.curves[0].values) == [-10.0, -9.0, -8.0, -7.0]
    words = histograms(run)[-1]
    assert (words.title, words.x_label, words.values["CgT-GAN (CLIP-agg)"]) == (
        *("words of single images", "words"),
        [8.0, 9.0, 10.0],
    )
    rows = method_rows(run)
    html = render_report(Report(About("t"), rows, plots={"curves": [plot]}))
    assert '<th scope="col">words<small>&nbsp;</small></th>' in html
    assert "<td>9.25</td>" in html
    assert "<h3>Reward: brevity</h3>" in html
    assert "| method | note | decoding | CLIPScore | words |" in markdown_table(
        score_table(rows, ["CLIPScore", "words"])
    )


def test_a_metric_of_the_user_is_compared_over_runs(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"exp/v/seed={seed}", seed=seed, name="exp")
        add_own_term_and_metric(tmp_path / f"exp/v/seed={seed}")
    variants = gather(find_runs([str(tmp_path)], "test"))
    tables = tables_of(entries(variants, []))
    (rows,) = tables.values()
    columns = [[metric for metric, _ in part.columns] for part in score_tables(rows)]
    assert columns == [["CIDEr"], ["CLIPScore", "words"]]
    (row,) = [row for row in rows if row.origin.method == "cgtgan"]
    assert (row.seeds["words"], row.scores["words"]) == ([0, 1], [9.25, 9.25])
    assert ",cgtgan,v,greedy,words,2,9.25,0.0,0 1,9.25 9.25," in csv_text(tables)


def test_domains_of_nocaps_are_compared_over_runs(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"exp/v/seed={seed}", seed=seed, name="exp")
        place = tmp_path / f"exp/v/seed={seed}/evaluation/test/cgtgan/scores.json"
        domains = {"near-domain": {"images": 3, "scores": {"CIDEr": 0.5 + seed}}}
        write(place, {**json.loads(place.read_text()), "domains": domains})
    tables = tables_of(entries(gather(find_runs([str(tmp_path)], "test")), []))
    (rows,) = tables.values()
    (row,) = [row for row in rows if row.part == "domain"]
    assert (row.name, row.note) == ("v, near-domain", "3 images")
    assert (row.scores, row.seeds) == ({"CIDEr": [0.5, 1.5]}, {"CIDEr": [0, 1]})
    assert '"v, near-domain",greedy,CIDEr,2,1.0,' in csv_text(tables)


def test_health_is_the_first_and_the_last_quarter(own: Run) -> None:
    assert health(own.history) == {"Right on corpus sentences": "0.25 → 1.00"}
    assert health([{"step": 1, "train/d_loss": 0.0}]) == {}  # trained without a discriminator


def test_distributions_are_bands_about_the_baseline_and_histograms(own: Run) -> None:
    (band,) = reward_bands(own.history)
    assert band.title == "Semantic reward: samples about the baseline"
    assert (list(band.curves[0].values), list(band.curves[0].spread)) == ([6.0] * 4, [2.0] * 4)  # reward less advantage
    shown = {histogram.title: histogram.values for histogram in histograms(own)}
    assert shown["CIDEr of single images"] == {
        "CgT-GAN (CLIP-agg)": [200, 100, 50],
        "Initialisation only": [100, 150, 50],
    }
    assert shown["CLIPScore of single images"] == {"CgT-GAN (CLIP-agg)": [25, 50, 75], "Initialisation only": []}
    assert len(shown) == 2  # neither BLEU nor Novel, which is yes or no


def test_what_changed_since_initialisation(own: Run) -> None:
    captions, scores = {m: own.captions(m) for m in CIDER}, {m: own.per_image(m) for m in CIDER}
    shown = {
        i: GalleryItem(i, None, captions["cgtgan"][i], (), scores["cgtgan"][i],
                       {"Initialisation only": (captions["init"][i], scores["init"][i])})
        for i in CIDER["cgtgan"]
    }  # fmt: skip
    (changes,) = since_initialisation(own, shown, 4)
    assert [(c.item.image_id, c.before, c.gain) for c in changes.changes] == [(1, "init 1", 1.0), (2, "init 2", -0.5)]
    assert "2 of 3 test captions differ; CIDEr rose for 1 of them and fell for 1" in changes.note
    shown[1] = GalleryItem(1, None, "x", (), {"CIDEr": math.nan}, {"Initialisation only": ("y", {"CIDEr": 1.0})})
    assert [c.item.image_id for c in since_initialisation(own, shown, 4)[0].changes] == [2]
    assert since_initialisation(own, shown, 0) == []


@pytest.mark.parametrize(("which", "last"), [("last", 30), ("best", 20)])
def test_what_changed_between_validations(tmp_path: Path, own: Run, which: str, last: int) -> None:
    cfg = Config()
    cfg.evaluate.which, cfg.dataset.root = which, str(tmp_path / "nowhere")
    history = [row | {"eval/CIDEr": {10: 0.2, 20: 0.9, 30: 0.4}.get(row["step"])} for row in own.history]
    (own.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    own = Run(own.folder, "test")
    (changes,) = between_validations(Workspace(cfg), own)
    assert (changes.before, changes.after) == (
        "Step 10 (CIDEr 20.0)",
        f"Step {last} (CIDEr {90 if last == 20 else 40}.0)",
    )
    assert sorted((c.item.image_id, c.before, c.item.caption) for c in changes.changes) == [
        (i, f"{i} at 10", f"{i} at {last}") for i in (1, 2, 3)
    ]
    assert "3 of 4 validation captions differ" in changes.note
    assert all(c.item.image is None for c in changes.changes)  # the pictures are not available
    for step in (20, 30):
        (own.folder / "validation" / f"step_{step:06d}.json").unlink()
    assert between_validations(Workspace(cfg), own) == []


def test_what_the_page_leaves_out_is_said() -> None:
    assert _left_out(300, 300, 300, 300) == ""
    assert _left_out(5000, 5000, 5000, 4000).startswith("4,000 of 5,000 have a thumbnail")
    assert _left_out(4, 4, 0, 0) == "No pictures are shown: only their embeddings are here."
    assert _left_out(40_000, 10_000, 10_000, 10_000) == "10,000 of 40,000 pictures are listed, drawn at random."
