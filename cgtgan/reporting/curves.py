"""Rows of metrics.jsonl -> plots: of one run, and of many runs as means over their seeds.

A key `reward/NAME` that is not listed here (a reward term of the user) gets plots of its own, labelled from the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from cgtgan.reporting.svg import Curve, Plot

History = Sequence[Mapping[str, Any]]

TOGETHER = 6  # variants with a colour and dashes of their own in one plot; the others stand behind in grey
POINTS = 50  # of a mean curve; of more, neighbours are averaged
BAND_NOTE = (
    "line: mean reward of the baseline (the greedy caption, or the image's other samples); band: mean distance of a "
    "sample's reward from its baseline, up and down. Rewards of single captions are not stored"
)


@dataclass(frozen=True)
class Quantity:
    """A plot of logged values. `keys`: label -> key of metrics.jsonl. Values are multiplied by `factor`."""

    title: str
    unit: str
    keys: Mapping[str, str]
    note: str = ""
    level: float | None = None
    factor: float = 1


CIDER = Quantity(
    "Validation CIDEr",
    "CIDEr x 100",
    {"": "eval/CIDEr"},
    "greedy captions of the validation images; step 0 is the initial generator",
    factor=100,
)
LINES_NOTE = "dashed: baselines on the same images"
SHARED_NOTE = "dashed: baselines that are the same in all variants, mean over seeds"
KL = Quantity("Distance from the initial generator", "nats per token", {"KL": "train/kl"})
SEMANTIC = {"cos(aggregated, caption)": "reward/cos", "1 - L1": "reward/l1", "cos(image, caption)": "reward/clip"}
ONE_RUN = (
    CIDER,
    Quantity("Semantic reward", "reward", SEMANTIC,
             "raw means over the sampled captions, each in units of the reward's scale"),
    Quantity("Sampled captions", "share",
             {"end by themselves": "caption/finished", "repeat another": "caption/identical",
              "most frequent": "caption/greedy_most_frequent"},
             "of one batch; most frequent: share of the images with the batch's most frequent greedy caption"),
    KL,
)  # fmt: skip
DISCRIMINATOR = (
    Quantity("Accuracy", "share classified correctly",
             {"corpus sentences": "train/d_accuracy_real", "samples": "train/d_accuracy_generated"},
             "dotted: chance", 0.5),
    Quantity("Naturalness", "logit",
             {"corpus": "reward/real_logit", "samples": "reward/naturalness", "greedy": "reward/naturalness_greedy"},
             "the discriminator's raw logit; above 0, the dotted line, it says human", 0.0),
    Quantity("Loss", "nats", {"discriminator": "train/d_loss"}, "dotted: chance, ln 2", math.log(2)),
    Quantity("Gradient norm", "norm before clipping",
             {"discriminator": "train/d_grad_norm", "generator": "train/g_grad_norm"}),
)  # fmt: skip
MANY_RUNS = (
    CIDER,
    Quantity("Caption and aggregated text", "cosine x reward scale", {"": "reward/cos"}, "sampled captions"),
    Quantity("Caption and image", "cosine x reward scale", {"": "reward/clip"},
             "sampled captions; also where the reward does not use it"),
    Quantity("Naturalness", "logit", {"": "reward/naturalness"},
             "sampled captions; above 0, the dotted line, the discriminator says human", 0.0),
    Quantity("Accuracy of the discriminator", "share classified correctly", {"": "train/d_accuracy"},
             "dotted: chance", 0.5),
    Quantity("Captions that end by themselves", "share", {"": "caption/finished"}, "sampled captions"),
    KL,
)  # fmt: skip
KNOWN_REWARDS = ("cos", "l1", "clip", "semantic", "naturalness", "real_logit")
HEALTH = {
    "Right on corpus sentences": "train/d_accuracy_real",
    "Right on samples": "train/d_accuracy_generated",
    "Logit of corpus sentences": "reward/real_logit",
    "Logit of samples": "reward/naturalness",
    "Loss (chance: 0.693)": "train/d_loss",
}


def further_rewards(histories: Sequence[History]) -> list[str]:
    """Names of logged reward terms that have no plot of their own above, in the order of their first row."""
    keys = dict.fromkeys(key for rows in histories for row in rows for key in row if key.startswith("reward/"))
    names = dict.fromkeys(key.removeprefix("reward/").removesuffix("_greedy") for key in keys)
    return [name for name in names if name not in KNOWN_REWARDS]


def points(rows: History, key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have the key."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


# ------------------------------------------------------------------------------------------------------------- one run


def run_plots(rows: History, seed: int, baselines: Mapping[str, float] | None = None) -> list[Plot]:
    """Curves of one run; a plot for which nothing was logged is left out.

    baselines: method -> CIDEr (a fraction) on the validation images, the lines of its curve.
    """
    names = further_rewards([rows])
    keys = {name: {"samples": f"reward/{name}", "greedy": f"reward/{name}_greedy"} for name in names}
    further = [Quantity(f"Reward: {name}", "reward", keys[name], "raw means, before the weight") for name in names]
    return _with_lines(quantity_plots(rows, [*ONE_RUN, *further], seed), baselines or {}, LINES_NOTE)


def _with_lines(plots: Sequence[Plot], baselines: Mapping[str, float], note: str) -> list[Plot]:
    """The plots, those of the validation CIDEr with a line per baseline."""
    if not baselines:
        return list(plots)
    lines = {method.replace("_", " "): CIDER.factor * value for method, value in baselines.items()}
    return [
        replace(plot, lines=lines, note=f"{plot.note}; {note}") if plot.title.startswith(CIDER.title) else plot
        for plot in plots
    ]


def quantity_plots(rows: History, quantities: Sequence[Quantity], seed: int) -> list[Plot]:
    plots = []
    for q in quantities:
        logged = {label or f"seed {seed}": points(rows, key) for label, key in q.keys.items()}
        curves = [
            Curve(label, [step for step, _ in xy], [q.factor * value for _, value in xy])
            for label, xy in logged.items() if xy
        ]  # fmt: skip
        if curves:
            plots.append(Plot(q.title, q.unit, curves, q.note, q.level))
    return plots


def has_discriminator(rows: History) -> bool:
    """Whether a discriminator was trained; without one the keys of its reward and its loss are logged as 0."""
    return any("train/d_accuracy" in row for row in rows)


def discriminator_plots(rows: History, seed: int) -> list[Plot]:
    """None where no discriminator was trained."""
    return quantity_plots(rows, DISCRIMINATOR, seed) if has_discriminator(rows) else []


def health(rows: History) -> dict[str, str]:
    """The discriminator in numbers: mean over the first and the last quarter of the logged steps."""
    if not has_discriminator(rows):
        return {}
    facts = {}
    for label, key in HEALTH.items():
        values = [value for _, value in points(rows, key)]
        quarter = max(len(values) // 4, 1)
        if values:
            facts[label] = f"{np.mean(values[:quarter]):.2f} → {np.mean(values[-quarter:]):.2f}"
    return facts


def reward_bands(rows: History) -> list[Plot]:
    """The baseline of each reward over training; its band is the mean distance of the samples from it."""
    plots = []
    terms = {"semantic": ("Semantic reward", "reward"), "naturalness": ("Naturalness", "logit")}
    terms |= {name: (f"Reward: {name}", "reward") for name in further_rewards([rows])}
    for term, (title, unit) in terms.items():
        mean, advantage, distance = f"reward/{term}", f"advantage/{term}", f"advantage/{term}_abs"
        logged = [row for row in rows if None not in (row.get(mean), row.get(advantage), row.get(distance))]
        if any(row[distance] for row in logged):
            steps, baseline = [row["step"] for row in logged], [row[mean] - row[advantage] for row in logged]
            curve = Curve("baseline", steps, baseline, [row[distance] for row in logged])
            plots.append(Plot(f"{title}: samples about the baseline", unit, [curve], BAND_NOTE))
    return plots


# ----------------------------------------------------------------------------------------------------------- many runs


def variant_plots(
    variants: Mapping[str, Sequence[History]], baselines: Mapping[str, float] | None = None
) -> list[Plot]:
    """Plots of several variants' runs, at most six in colour and the others grey; unlogged quantities are left out.

    baselines: as in `run_plots`, those that all variants share.
    """
    names = further_rewards([rows for histories in variants.values() for rows in histories])
    further = [Quantity(f"Reward: {n}", "reward", {"": f"reward/{n}"}, "sampled captions") for n in names]
    labels, count = short_names(list(variants)), len(variants)
    plots = []
    for quantity in (*MANY_RUNS, *further):
        (key,) = quantity.keys.values()
        curves = {}
        for i, histories in enumerate(variants.values()):
            if curve := mean_curve(histories, key, quantity.factor):
                curves[i] = replace(curve, label=labels[i], style=i % TOGETHER)
        for start in range(0, count, TOGETHER):
            coloured = [curve for i, curve in curves.items() if start <= i < start + TOGETHER]
            grey = [curve for i, curve in curves.items() if not start <= i < start + TOGETHER]
            part = f" ({start + 1} to {min(start + TOGETHER, count)})" if count > TOGETHER else ""
            note = "; ".join(filter(None, (quantity.note, "grey: the other variants" if grey else "")))
            if coloured:
                plots.append(Plot(quantity.title + part, quantity.unit, coloured, note, quantity.level, grey))
    return _with_lines(plots, baselines or {}, SHARED_NOTE)


def shared_baselines(runs: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Method -> mean over the seeds, of (seed, method -> CIDEr) of every run.

    Only of the methods that all runs have, with one value per seed whatever the variant: others would need a line for
    each variant.
    """
    common = [m for m in runs[0][1] if all(m in cider for _, cider in runs)] if runs else []
    shared = {}
    for method in common:
        values = dict.fromkeys((seed, cider[method]) for seed, cider in runs)
        if len(values) == len({seed for seed, _ in runs}):
            shared[method] = float(np.mean([value for _, value in values]))
    return shared


def mean_curve(histories: Sequence[History], key: str, factor: float = 1) -> Curve | None:
    """Mean over the seeds at the steps that all of them logged; None without such a step.

    The band is their standard deviation (n-1), of two seeds half their distance. More than POINTS steps are averaged.
    """
    seeds = [dict(points(rows, key)) for rows in histories]
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not steps:
        return None
    table = factor * np.asarray([[seed[step] for step in steps] for seed in seeds], dtype=np.float64)
    parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    table = np.stack([table[:, part].mean(1) for part in parts], axis=1)
    spread: list[float] = []
    if len(seeds) > 1:
        spread = (np.ptp(table, 0) / 2 if len(seeds) == 2 else table.std(0, ddof=1)).tolist()
    return Curve("", [steps[part[-1]] for part in parts], table.mean(0).tolist(), spread)


def short_names(names: Sequence[str]) -> list[str]:
    """Names for a legend: long ones lose the beginning and the end that all share, cut at underscores."""
    if max(map(len, names)) <= 30 or len(names) < 2:
        return list(names)
    words = [name.split("_") for name in names]
    head = _common(words)
    tail = _common([part[head:][::-1] for part in words])
    return ["_".join(part[head : len(part) - tail]) or name for part, name in zip(words, names, strict=True)]


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many items all lists begin with."""
    return len(list(takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False))))
