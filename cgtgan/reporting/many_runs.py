"""report with `runs`: many run folders -> one page and one table (HTML, CSV, LaTeX, Markdown) that sets their variants side by side."""

from __future__ import annotations

import os
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from cgtgan.assets.images import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, DemoWorldConfig, ReportConfig, as_dict
from cgtgan.data.datasets import Split
from cgtgan.errors import UserError
from cgtgan.reporting.compared_rows import Entry, against_baseline, entries, tables_of
from cgtgan.reporting.curves import Curve, Plot
from cgtgan.reporting.export import TestSet, csv_text, latex_table, signed_score
from cgtgan.reporting.many_runs_page import (
    Comparison,
    Gallery,
    RunLine,
    Said,
    markdown,
    render_comparison,
    split_metrics,
)
from cgtgan.reporting.page import GalleryItem, comparison_table, shown_score
from cgtgan.reporting.variants import OUTPUT, Variant, differing, find_runs, gather, shown
from cgtgan.runtime.artifacts import fingerprint, write_text
from cgtgan.runtime.tracking import Tracker
from cgtgan.runtime.versions import code_version

CURVES = (  # title, y label, factor, key in metrics.jsonl, note, level
    ("Validation CIDEr", "CIDEr x 100", 100, "eval/CIDEr", "greedy captions of the validation images", None),
    ("Caption and aggregated text", "cosine x reward scale", 1, "reward/cos", "sampled captions", None),
    ("Caption and image", "cosine x reward scale", 1, "reward/clip", "sampled captions, rewarded for it or not", None),
    ("Naturalness", "logit", 1, "reward/naturalness", "sampled captions; above 0, the dotted line, the discriminator says human", 0.0),
    ("Accuracy of the discriminator", "share told right", 1, "train/d_accuracy", "dotted: chance", 0.5),
    ("Captions that end by themselves", "share", 1, "caption/finished", "sampled captions", None),
    ("Distance from the initial generator", "nats a token", 1, "train/kl", "", None),
)  # fmt: skip
RANDOM_WEIGHTS = "CLIP has random weights in some of these runs: their scores are meaningless."
TOGETHER = 6  # variants with a colour and dashes of their own in one plot; the others stand behind in grey
POINTS = 50  # of a curve; what was logged more often is averaged
BESIDE = 8  # variants whose captions stand under one picture


def compare(cfg: Config) -> Path:
    """Write the comparison of the runs that `runs` names; returns the page's path. Reads run folders, and the pictures if at hand."""
    tracker = Tracker()
    found = find_runs(cfg.run_patterns, cfg.evaluate.split)
    variants = gather(found)
    notes: list[str] = []
    made = entries(variants, notes)
    baselines = against_baseline(made, cfg.report.baseline, resamples=cfg.report.resamples, seed=cfg.seed, notes=notes)
    sets = tables_of(made, variants)
    notes += _notes(variants, made)
    notes += [found.sentence()] if found.left_out else []
    page = _page(cfg, variants, made, sets, baselines, notes)
    places = _outputs(cfg, [run.folder for variant in variants for run in variant.runs])
    for suffix, text in {
        ".csv": csv_text(sets),
        ".tex": latex_table(sets, made_by=[page.command, page.facts["Code"]]),
        ".md": markdown(page),
        ".html": render_comparison(page),
    }.items():
        write_text(places[suffix], text)
    for test_set in sets:
        tracker.say(test_set.name)
        for metrics in split_metrics(test_set):
            rows = [row.method_row() for row in sorted(test_set.rows, key=lambda row: row.kind)]
            tracker.show(comparison_table(rows, metrics))
    for text in filter(None, [page.warning, page.summary, *notes]):
        tracker.say(text)
    tracker.say(f"report: {places['.html']} and beside it {', '.join(places[s].name for s in ('.csv', '.tex', '.md'))}")
    return places[".html"]


def _outputs(cfg: Config, folders: Sequence[Path]) -> dict[str, Path]:
    if cfg.report.output is not None:
        page = Path(cfg.report.output).expanduser()
        return {".html": page} | {suffix: page.with_suffix(suffix) for suffix in (".csv", ".tex", ".md")}
    folder = Path(cfg.output).expanduser() if cfg.output is not None else Path(os.path.commonpath(folders)) / OUTPUT
    return {".html": folder / "report.html"} | {
        suffix: folder / f"comparison{suffix}" for suffix in (".csv", ".tex", ".md")
    }


def _command(cfg: Config) -> str:
    """The command line, from the settings: what Hydra was given has its own quotes."""
    patterns = cfg.run_patterns
    words = [f"runs={patterns[0]}" if len(patterns) == 1 else f"runs=[{','.join(patterns)}]"]
    default, given = ReportConfig(), cfg.report
    words += [
        f"report.{f}={getattr(given, f)}"
        for f in ("baseline", "resamples", "gallery")
        if getattr(given, f) != getattr(default, f)
    ]
    words += [f"evaluate.split={cfg.evaluate.split}"] if cfg.evaluate.split != "test" else []
    words += [f"seed={cfg.seed}"] if cfg.seed else []
    return " ".join(["python run.py stage=report", *map(shlex.quote, words)])


def _page(
    cfg: Config, variants: Sequence[Variant], made: Mapping[Any, Sequence[Entry]], sets: Sequence[TestSet], baselines: Sequence[str],
    notes: Sequence[str],
) -> Comparison:  # fmt: skip
    runs = [run for variant in variants for run in variant.runs]
    every = [entry for rows in made.values() for entry in rows]
    tested = {metric for entry in every for metric in entry.row.differences}
    experiments = list(dict.fromkeys(variant.experiment for variant in variants))
    random_weights = any(variant.settings.get("clip_backbone.kind") == "random" for variant in variants)
    seeds = sorted({run.settings["seed"] for run in runs})
    facts = {
        "Runs": f"{len(runs)}, of {len(variants)} {'variant' if len(variants) == 1 else 'variants'}",
        "Experiments": ", ".join(experiments),
        "Seeds": ", ".join(map(str, seeds)) if len(seeds) <= 12 else f"{len(seeds)}, from {seeds[0]} to {seeds[-1]}",
        "Decoding": ", ".join(sorted({entry.decoding for entry in every} - {"none"})),
        "Baseline of the differences": ", ".join(baselines) or "none: there is one row alone",
        "Code": code_version(),
    }
    return Comparison(
        title=f"cgtgan: {', '.join(experiments)}"
        if len(experiments) <= 3
        else f"cgtgan: {len(experiments)} experiments",
        subtitle="Runs side by side",
        warning=cfg.report.warning or (RANDOM_WEIGHTS if random_weights else None),
        summary=_summary(sets[0]),
        facts=facts,
        sets=sets,
        untested=[m for m in dict.fromkeys(m for s in sets for m in s.metrics) if m not in tested] if tested else [],
        resamples=cfg.report.resamples,
        variants=[variant.name for variant in variants],
        settings={
            name: [shown(v) for v in values] for name, values in differing([v.settings for v in variants]).items()
        },
        plots=_plots(variants),
        galleries=_galleries(cfg, variants, made),
        runs=[_line(variant, run) for variant in variants for run in variant.runs],
        notes=notes,
        command=_command(cfg),
    )


def _summary(test_set: TestSet) -> str:
    """Which variant has the highest CIDEr, and how far above the baseline."""
    scored = [
        (np.mean(list(row.values["CIDEr"].values())), row)
        for row in test_set.rows
        if row.kind == 0 and "CIDEr" in row.values
    ]
    if not scored:
        return ""
    mean, row = max(scored, key=lambda pair: pair[0])
    values = list(row.values["CIDEr"].values())
    spread = (
        f" ± {shown_score('CIDEr', float(np.std(values, ddof=1)))} ({len(values)} seeds)" if len(values) > 1 else ""
    )
    best = f"Highest CIDEr of {len(scored)} variants: {row.name}" if len(scored) > 1 else row.name
    text = f"{best}, {shown_score('CIDEr', float(mean))}{spread}"
    if (found := row.differences.get("CIDEr")) is not None:
        interval = found.seeds or found.images
        low, high = signed_score("CIDEr", interval.low), signed_score("CIDEr", interval.high)
        over = "test images and seeds" if found.seeds else "test images"
        text += (
            f"; {shown_score('CIDEr', abs(found.value))} {'above' if found.value >= 0 else 'below'} {row.baseline} "
            f"(95% interval over {over}: {low} to {high})"
        )
    return text + "."


def _line(variant: Variant, run: Any) -> RunLine:
    cider = run.scores("cgtgan")["scores"].get("CIDEr") if "cgtgan" in run.scored else None
    step = run.history[-1]["step"] if run.history else None
    return RunLine(variant.name, run.settings["seed"], str(run.folder), step, cider)


def _notes(variants: Sequence[Variant], made: Mapping[Any, Sequence[Entry]]) -> list[str]:
    notes = []
    for variant in variants:
        ends = {run.settings["seed"]: run.history[-1]["step"] for run in variant.runs if run.history}
        if len(set(ends.values())) > 1:
            said = ", ".join(f"seed {seed} at {step:,}" for seed, step in ends.items())
            notes.append(
                f"{variant.name}: the seeds' logs end at different steps ({said}), and the curves where the shortest ends"
            )
    scores = [run.scores(entry.method) for rows in made.values() for entry in rows for run in entry.runs.values()]
    notes += sorted({why for found in scores for why in (found.get("failed") or {}).values()})
    if len(tokenizers := {str(found["tokenizer"]) for found in scores if found.get("tokenizer")}) > 1:
        notes.append(
            f"captions were split into tokens in different ways ({', '.join(sorted(tokenizers))}), which moves scores a little"
        )
    return notes


# ------------------------------------------------------------------------------------------------------------------ curves


def _plots(variants: Sequence[Variant]) -> list[Plot]:
    """For each logged quantity a plot for every six variants, the others in grey behind; what nobody logged is left out."""
    short = _short_names([variant.name for variant in variants])
    plots = []
    for title, label, factor, key, note, level in CURVES:
        curves = {}
        for i, variant in enumerate(variants):
            if curve := mean_curve([run.history for run in variant.runs], key, factor):
                curves[i] = replace(curve, label=short[i], style=i % TOGETHER)
        for start in range(0, len(variants), TOGETHER):
            own = [curve for i, curve in curves.items() if start <= i < start + TOGETHER]
            others = [curve for i, curve in curves.items() if not start <= i < start + TOGETHER]
            part = f" ({start + 1} to {min(start + TOGETHER, len(variants))})" if len(variants) > TOGETHER else ""
            grey = "grey: the other variants" if others else ""
            if own:
                plots.append(Plot(title + part, label, own, "; ".join(filter(None, (note, grey))), level, others))
    return plots


def mean_curve(histories: Sequence[Sequence[Mapping[str, Any]]], key: str, factor: float = 1) -> Curve | None:
    """Mean over the seeds at the steps that all of them logged, with their standard deviation (n-1) or, of two, half their distance.

    Of more than POINTS steps, neighbours are averaged first. None where there is no common step.
    """
    seeds = [{row["step"]: factor * row[key] for row in rows if row.get(key) is not None} for rows in histories]
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not steps:
        return None
    table = np.asarray([[seed[step] for step in steps] for seed in seeds], dtype=np.float64)
    parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    table = np.stack([table[:, part].mean(1) for part in parts], axis=1)
    at = [steps[part[-1]] for part in parts]
    spread: list[float] = []
    if len(seeds) > 1:
        spread = (np.ptp(table, 0) / 2 if len(seeds) == 2 else table.std(0, ddof=1)).tolist()
    return Curve("", at, table.mean(0).tolist(), spread)


def _short_names(names: Sequence[str]) -> list[str]:
    """Names for a legend: without the beginning and the end that all share, cut at underscores, where they are long."""
    if max(map(len, names)) <= 30 or len(names) < 2:
        return list(names)
    words = [name.split("_") for name in names]
    head = _common(words)
    tail = _common([part[head:][::-1] for part in words])
    short = ["_".join(part[head : len(part) - tail]) for part in words]
    return [s or name for s, name in zip(short, names, strict=True)]


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many items all lists begin with."""
    return next((i for i, items in enumerate(zip(*lists)) if len(set(items)) > 1), min(map(len, lists)))  # noqa: B905 (to the shortest)


# ---------------------------------------------------------------------------------------------------------------- pictures


def _galleries(cfg: Config, variants: Sequence[Variant], made: Mapping[Any, Sequence[Entry]]) -> list[Gallery]:
    """The same pictures with a caption of every variant: where their CIDErs lie farthest apart, and drawn at random."""
    rows = [entry for entry in next(iter(made.values())) if entry.method == "cgtgan"]
    own = rows[:BESIDE]
    if not own or not cfg.report.gallery:
        return []
    first = [entry.runs[min(entry.runs)] for entry in own]
    captions = [run.captions("cgtgan") for run in first]
    cider = [{i: s["CIDEr"] for i, s in run.per_image("cgtgan").items() if "CIDEr" in s} for run in first]
    split = _pictures_at_hand(cfg, variants[min(own[0].variants)].settings, own[0])
    paths = {record.image_id: record.path for record in split.images} if split else {}
    common = [i for i in captions[0] if all(i in said for said in captions)]
    apart = {i: max(values) - min(values) for i in common if len(values := [c[i] for c in cider if i in c]) == len(own)}
    n = cfg.report.gallery // 2 or 1
    farthest = [i for i in sorted(apart, key=lambda i: -apart[i]) if apart[i] > 0][:n] if len(own) > 1 else []
    rest = [i for i in common if i not in farthest]
    drawn = random.Random(cfg.seed).sample(rest, min(n, len(rest)))

    def said(image_id: Any) -> Said:
        together: dict[str, list[int]] = {}
        for k, texts in enumerate(captions):
            together.setdefault(texts[image_id], []).append(k)
        references = split.references.get(image_id, []) if split else []
        item = GalleryItem(image_id, paths.get(image_id), captions[0][image_id], references)
        scores = [[cider[k][image_id] for k in ks if image_id in cider[k]] for ks in together.values()]
        return Said(
            item, [([own[k].name for k in ks], text, s) for (text, ks), s in zip(together.items(), scores, strict=True)]
        )

    about = "The lowest seed of each variant; the number is that picture's CIDEr, ×100."
    if len(rows) > BESIDE:
        about += f" The first {BESIDE} of {len(rows)} rows."
    if not paths:
        about += " The pictures are not at hand."
    galleries = [
        Gallery(
            "Where they differ most", f"Pictures whose CIDErs lie farthest apart. {about}", [said(i) for i in farthest]
        )
    ]
    galleries += [Gallery("Random pictures", f"Drawn at random: what to expect. {about}", [said(i) for i in drawn])]
    return [gallery for gallery in galleries if gallery.pictures]


def _pictures_at_hand(cfg: Config, settings: Mapping[str, Any], entry: Entry) -> Split | None:
    """The pictures and references of the runs' test set: the demo's where it was drawn, others where this command's `dataset` is theirs."""
    split = next(iter(entry.runs.values())).split
    name, kind = settings["dataset.name"], settings.get("dataset.kind")
    if kind == "demo":
        given = {
            f.name: settings[key] for f in fields(DemoWorldConfig) if (key := f"dataset.world.{f.name}") in settings
        }
        world = DemoWorldConfig(**given)
        cfg = replace(cfg, dataset=replace(cfg.dataset, kind="demo", name=name, world=world))
        if not (
            Path(cfg.artifacts_dir) / "demo_world" / f"world-{fingerprint(as_dict(world))}" / "world.json"
        ).is_file():
            return None
    elif (cfg.dataset.name, cfg.dataset.kind) != (name, kind):
        return None
    try:
        return dataset_split(Workspace(cfg), split)
    except UserError:  # the captions are shown without
        return None
