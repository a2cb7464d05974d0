"""What the report shows of one run folder: scores, curves, the discriminator's health, pictures, and captions that changed."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cgtgan.assets.images import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.errors import UserError
from cgtgan.evaluation.coco_files import load_results
from cgtgan.reporting.curves import Curve, Histogram, Plot
from cgtgan.reporting.methods import METHODS
from cgtgan.reporting.page import Change, Changes, GalleryItem, MethodRow, is_times_100
from cgtgan.reporting.published import DECODING, published_scores
from cgtgan.runtime.artifacts import read_json
from cgtgan.runtime.tracking import read_metrics

REWARDS = {
    "clip_agg": "CLIP-agg",
    "clip_cos": "CLIP-cos",
    "mixed": "CLIP-agg and CLIP-cos",
    "naturalness_only": "no semantics",
}
CURVES = (  # title, y label, factor, {label: key in metrics.jsonl}, note, level
    ("Validation CIDEr", "CIDEr x 100", 100, {"": "eval/CIDEr"}, "greedy captions of the validation images", None),
    ("Semantic reward", "reward", 1,
     {"cos(aggregated, caption)": "reward/cos", "1 - L1": "reward/l1", "cos(image, caption)": "reward/clip"},
     "raw means over the sampled captions, each in units of the reward's scale", None),
    ("Sampled captions", "share", 1,
     {"end by themselves": "caption/finished", "repeat another": "caption/identical", "most frequent": "caption/greedy_most_frequent"},
     "of one batch; most frequent: share of the images with the batch's most frequent greedy caption", None),
    ("Distance from the initial generator", "nats a token", 1, {"KL": "train/kl"}, "", None),
)  # fmt: skip
DISCRIMINATOR = (
    ("Accuracy", "share told right", 1, {"corpus sentences": "train/d_accuracy_real", "samples": "train/d_accuracy_generated"},
     "dotted: chance", 0.5),
    ("Naturalness", "logit", 1, {"corpus": "reward/real_logit", "samples": "reward/naturalness", "greedy": "reward/naturalness_greedy"},
     "the discriminator's raw logit; above 0, the dotted line, it says human", 0.0),
    ("Loss", "nats", 1, {"discriminator": "train/d_loss"}, "dotted: chance, ln 2", math.log(2)),
    ("Gradient norm", "norm before clipping", 1, {"discriminator": "train/d_grad_norm", "generator": "train/g_grad_norm"}, "", None),
)  # fmt: skip
BANDS = {"Semantic reward": "semantic", "Naturalness": "naturalness"}
BAND_NOTE = (
    "line: mean reward of the baseline (the greedy caption, or the image's other samples); band: mean distance of a sample's reward from "
    "its baseline, up and down. Rewards of single captions are not stored"
)
BESIDE = ("init", "projection", "supervised")  # methods whose captions stand in every card


@dataclass(frozen=True)
class Run:
    """One run folder as it lies on the disk."""

    folder: Path
    split: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_json(self.folder / "settings.json")

    @property
    def scored(self) -> list[str]:
        return [name for name in METHODS if (self.folder / "evaluation" / self.split / name / "scores.json").is_file()]

    def scores(self, method: str) -> dict[str, Any]:
        return read_json(self.folder / "evaluation" / self.split / method / "scores.json")

    def captions(self, method: str) -> Mapping[Any, str]:
        return load_results(self.folder / "evaluation" / self.split / method / "captions.json")

    def per_image(self, method: str) -> dict[Any, dict[str, float]]:
        rows = read_json(self.folder / "evaluation" / self.split / method / "per_image.json")
        return {row["image_id"]: {m: value for m, value in row.items() if m != "image_id"} for row in rows}

    def decoding(self, method: str) -> str:
        return "none" if method in ("nearest", "human") else self.scores(method)["decoding"]

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    def validations(self) -> dict[int, Path]:
        return {int(p.stem.removeprefix("step_")): p for p in sorted((self.folder / "validation").glob("step_*.json"))}

    def title(self, method: str) -> str:
        if method != "cgtgan":
            return METHODS[method].title
        reward, weight = str(self.settings["reward_weights.name"]), self.settings["reward_weights.max_weight"]
        how = "no semantics" if weight == 0 else REWARDS.get(reward, reward)
        extra = ["no naturalness"] if weight == 1 else []
        extra += [] if self.settings["train.use_initialization"] else ["no initialisation"]
        return f"CgT-GAN ({', '.join([how, *extra])})"


def published(run: Run, suffix: str = "") -> MethodRow | None:
    """The paper's row, where the run's setting is the paper's; `suffix` tells several of them apart."""
    scores = published_scores(run.settings, run.split, trained_here=(run.folder / "metrics.jsonl").is_file())
    if scores is None:
        return None
    about = f"the paper's figures; {run.settings['dataset.name']} test images, {run.settings['corpus.name']} corpus, ViT-L/14"
    values = {metric: [value] for metric, value in scores.items()}
    return MethodRow(f"CgT-GAN as published{suffix}", about, values, published=True, decoding=DECODING)


def plots(
    runs: Sequence[Run], kinds: Sequence[tuple[str, str, float, dict[str, str], str, float | None]]
) -> list[Plot]:
    """Curves of one variant's runs, a line a seed (and a term); a plot of which nothing was logged is left out."""
    plots = []
    for title, label, factor, keys, note, level in kinds:
        curves = []
        for r in runs:
            for name, key in keys.items():
                points = [(row["step"], factor * row[key]) for row in r.history if row.get(key) is not None]
                seed = f"seed {r.settings['seed']}" if len(runs) > 1 or not name else ""
                if points:
                    curves.append(
                        Curve(" ".join(filter(None, (name, seed))), [s for s, _ in points], [v for _, v in points])
                    )
        if curves:
            plots.append(Plot(title, label, curves, note, level))
    return plots


def health(history: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The discriminator in numbers: mean over the first and the last quarter of the logged steps."""
    if not any("train/d_accuracy" in row for row in history):  # without a discriminator the rewards' keys are 0
        return {}
    facts = {}
    for name, key in (
        ("Right on corpus sentences", "train/d_accuracy_real"),
        ("Right on samples", "train/d_accuracy_generated"),
        ("Logit of corpus sentences", "reward/real_logit"),
        ("Logit of samples", "reward/naturalness"),
        ("Loss (chance: 0.693)", "train/d_loss"),
    ):
        values = [row[key] for row in history if row.get(key) is not None]
        quarter = max(len(values) // 4, 1)
        if values:
            first, last = statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])
            facts[name] = f"{first:.2f} → {last:.2f}"
    return facts


def distributions(own: Run) -> list[Plot | Histogram]:
    """Rewards about their baseline over training, as bands, and the scores of the single test images, as histograms."""
    plots: list[Plot | Histogram] = []
    for title, term in BANDS.items():
        mean, advantage, distance = f"reward/{term}", f"advantage/{term}", f"advantage/{term}_abs"
        rows = [row for row in own.history if None not in (row.get(mean), row.get(advantage), row.get(distance))]
        if any(row[distance] for row in rows):
            baseline = [row[mean] - row[advantage] for row in rows]
            curve = Curve("baseline", [row["step"] for row in rows], baseline, [row[distance] for row in rows])
            plots.append(
                Plot(
                    f"{title}: samples about the baseline",
                    "reward" if term == "semantic" else "logit",
                    [curve],
                    BAND_NOTE,
                )
            )
    scores = {own.title(m): own.per_image(m) for m in ("cgtgan", "init") if m in own.scored}
    for metric in dict.fromkeys(m for images in scores.values() for row in images.values() for m in row):
        if metric.startswith("BLEU"):  # of a single caption mostly 0 or near 1
            continue
        factor = 100 if is_times_100(metric) else 1
        values = {
            name: [factor * row[metric] for row in images.values() if metric in row] for name, images in scores.items()
        }
        if len({value for column in values.values() for value in column}) < 3:  # yes or no, or always the same
            continue
        plots.append(Histogram(f"{metric} of single images", f"{metric} x 100" if factor == 100 else metric, values))
    return plots


def pictures(ws: Workspace, own: Run) -> dict[Any, GalleryItem]:
    """Every test picture by id, in the order of the ids, with the captions and scores of all of the run's methods."""
    if "cgtgan" not in own.scored:
        return {}
    split = dataset_split(ws, own.split)
    paths = {record.image_id: record.path for record in split.images}
    captions = {m: own.captions(m) for m in own.scored}
    scores = {m: own.per_image(m) for m in own.scored}
    others = [m for m in (*BESIDE, *own.scored) if m in own.scored and m != "cgtgan"]
    return {
        i: GalleryItem(
            i,
            paths.get(i),
            caption,
            split.references.get(i, []),
            scores["cgtgan"].get(i, {}).get("CIDEr"),
            {METHODS[m].title: captions[m][i] for m in others if i in captions[m]},
            scores["cgtgan"].get(i, {}),
            {METHODS[m].title: scores[m].get(i, {}) for m in others},
        )
        for i, caption in captions["cgtgan"].items()
        if i in paths or not paths
    }


def beside(item: GalleryItem) -> GalleryItem:
    titles = [METHODS[m].title for m in BESIDE]
    return replace(item, extra={name: caption for name, caption in item.extra.items() if name in titles})


def since_initialisation(own: Run, shown: Mapping[Any, GalleryItem], n: int) -> list[Changes]:
    """The test captions that gained and lost most since initialisation, half of `n` each."""
    title = METHODS["init"].title
    changes = []
    for item in shown.values():
        before, score = item.extra.get(title), item.extra_scores.get(title, {}).get("CIDEr")
        if before is not None and before != item.caption and score is not None and item.cider is not None:
            changes.append(Change(item, before, item.cider - score))
    ranked = sorted((c for c in changes if c.gain is not None and math.isfinite(c.gain)), key=lambda c: -(c.gain or 0))
    gained, lost = [c for c in ranked if (c.gain or 0) > 0], [c for c in ranked[::-1] if (c.gain or 0) < 0]
    picked = [*gained[: (n + 1) // 2], *lost[: n // 2]]
    if not picked:
        return []
    note = (
        f"{len(changes):,} of {len(shown):,} test captions differ; CIDEr rose for {len(gained):,} of them and fell for {len(lost):,}. "
        "First those that gained most, then those that lost most."
    )
    return [Changes("Before and after adversarial training", note, title, own.title("cgtgan"), picked)]


def between_validations(ws: Workspace, own: Run) -> list[Changes]:
    """Validation captions of the first step that has them against those of the step that is scored, a few of those that differ."""
    steps = own.validations()
    cider = {
        row["step"]: row["eval/CIDEr"]
        for row in own.history
        if row.get("eval/CIDEr") is not None and row["step"] in steps
    }
    if len(steps) < 2:
        return []
    first, last = min(steps), max(steps)
    if ws.cfg.evaluate.which == "best" and cider:
        last = max(cider, key=lambda step: cider[step])
    before, after = load_results(steps[first]), load_results(steps[last])
    differ = [i for i in after if i in before and before[i] != after[i]]
    if not differ:
        return []
    try:
        split = dataset_split(ws, "val")
        paths, references = {record.image_id: record.path for record in split.images}, split.references
    except UserError:  # the pictures are not at hand, the captions are
        paths, references = {}, {}
    picked = random.Random(ws.cfg.seed).sample(differ, min(ws.cfg.report.gallery, len(differ)))
    items = [GalleryItem(i, paths.get(i), after[i], references.get(i, [])) for i in picked]
    names = [
        f"Step {step:,}" + (f" (CIDEr {100 * cider[step]:.1f})" if step in cider else "") for step in (first, last)
    ]
    note = f"{len(differ):,} of {len(after):,} validation captions differ, greedy ones both times; these are drawn at random from them."
    changes = [Change(item, before[i]) for i, item in zip(picked, items, strict=True)]
    return [Changes(f"From step {first:,} to step {last:,}", note, names[0], names[1], changes)]
