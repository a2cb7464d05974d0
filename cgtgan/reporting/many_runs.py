"""Many run folders -> one page and its tables (HTML, CSV, LaTeX, Markdown) that compare their variants."""

from __future__ import annotations

import json
import os
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cgtgan.assets.splits import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, DemoWorldConfig, ReportConfig
from cgtgan.data.datasets import Split
from cgtgan.data.demo_world import world_folder
from cgtgan.errors import UserError
from cgtgan.reporting import tables
from cgtgan.reporting.compared_rows import Entry, against_baseline, entries, name_methods, tables_of
from cgtgan.reporting.curves import shared_baselines, variant_plots
from cgtgan.reporting.export import csv_text, latex_table, markdown
from cgtgan.reporting.labels import labelled
from cgtgan.reporting.methods import SYSTEMS
from cgtgan.reporting.page import (
    FIRST_LOOK,
    About,
    ComparedPicture,
    Comparison,
    WrittenCaption,
    item_of,
    render_comparison,
)
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.svg import Plot
from cgtgan.reporting.tables import MethodRow, RowsBySet, format_score, signed_interval
from cgtgan.reporting.variants import OUTPUT, Selection, Variant, as_typed, differing, gather
from cgtgan.runtime.artifacts import write_text
from cgtgan.runtime.tracking import Tracker
from cgtgan.runtime.versions import code_version

RANDOM_WEIGHTS = "CLIP has random weights in some of these runs: their scores are meaningless."
FIRST_PICTURES = 6  # above the table
CAPTIONS_PER_PICTURE = 8  # variants whose captions stand under one picture
FILES = (".csv", ".tex", ".md")


def compare(cfg: Config, selection: Selection, split: Split | None = None) -> Path:
    """Write the comparison of the selected runs; returns the page's path.

    Pictures and references are those of `split`, else of the first run's test set where it is available.
    """
    tracker = Tracker()
    variants = labelled(gather(selection), cfg.report.labels)
    notes: list[str] = []
    rows = entries(variants, notes)
    name_methods(rows, cfg.report.labels)
    baselines = against_baseline(rows, cfg.report.baseline, resamples=cfg.report.resamples, seed=cfg.seed, notes=notes)
    sets = tables_of(rows)
    notes += _notes(variants, rows)
    notes += [selection.sentence()] if selection.left_out else []
    trained = [variant for variant in variants if variant.settings]  # the others are files of captions
    differ = differing([variant.settings for variant in trained]).items()
    about = replace(_about(cfg, variants), facts=_facts(variants, sets, baselines), notes=notes)
    page = Comparison(
        replace(about, summary=_summary(next(iter(sets.values())))),
        sets,
        cfg.report.resamples,
        {v.name: {name: as_typed(values[i]) for name, values in differ} for i, v in enumerate(trained) if differ},
        _plots(trained),
        _galleries(cfg, next(iter(rows.values())), split),
        [_run_line(variant, run) for variant in variants for run in variant.runs],
    )
    places = _outputs(cfg, [run.folder for variant in variants for run in variant.runs])
    write_text(places[".csv"], csv_text(sets))
    write_text(places[".tex"], latex_table(sets, made_by=[page.about.made_by, page.about.facts["Code"]]))
    write_text(places[".md"], markdown(sets))
    write_text(places[".html"], render_comparison(page))
    for name, table_rows in sets.items():
        tracker.say(name)
        for table in tables.score_tables(table_rows):
            tracker.show(tables.console_table(table))
    for text in filter(None, [page.about.warning, page.about.summary, *notes]):
        tracker.say(text)
    tracker.say(f"report: {places['.html']}, with {', '.join(places[suffix].name for suffix in FILES)} in its folder")
    tracker.say(f"look at it: {places['.html'].resolve().as_uri()}")
    return places[".html"]


def _plots(trained: Sequence[Variant]) -> list[Plot]:
    if not trained:
        return []
    runs = [run for variant in trained for run in variant.runs]
    baselines = shared_baselines([(run.settings["seed"], run.validation_baselines()) for run in runs])
    return variant_plots({v.name: [run.history for run in v.runs] for v in trained}, baselines)


def _outputs(cfg: Config, folders: Sequence[Path]) -> dict[str, Path]:
    if cfg.report.output is not None:
        page = Path(cfg.report.output).expanduser()
        return {suffix: page.with_suffix(suffix) for suffix in FILES} | {".html": page}
    folder = Path(cfg.output).expanduser() if cfg.output is not None else Path(os.path.commonpath(folders)) / OUTPUT
    return {suffix: folder / f"comparison{suffix}" for suffix in FILES} | {".html": folder / "report.html"}


def _command(cfg: Config) -> str:
    """The command line, made from the settings: the words that Hydra was given have quotes of their own."""
    default = ReportConfig()
    name, patterns = ("captions", cfg.caption_patterns) if cfg.captions is not None else ("runs", cfg.run_patterns)
    words = [f"{name}={patterns[0]}" if len(patterns) == 1 else f"{name}=[{','.join(patterns)}]"]
    words += [f"images={','.join(cfg.image_paths)}"] if cfg.captions is not None and cfg.image_paths else []
    words += [f"evaluate.references={cfg.evaluate.references}"] if cfg.evaluate.references else []
    for name in ("baseline", "resamples", "gallery"):
        value = getattr(cfg.report, name)
        words += [f"report.{name}={value}"] if value != getattr(default, name) else []
    words += [f"report.labels={json.dumps(dict(cfg.report.labels))}"] if cfg.report.labels else []
    words += [f"evaluate.split={cfg.evaluate.split}"] if cfg.evaluate.split != "test" else []
    words += [f"seed={cfg.seed}"] if cfg.seed else []
    return " ".join([f"python run.py stage={cfg.stage}", *map(shlex.quote, words)])


def _about(cfg: Config, variants: Sequence[Variant]) -> About:
    experiments = list(dict.fromkeys(variant.experiment for variant in variants if variant.settings))
    names = f"{len(experiments)} experiments" if len(experiments) > 3 else ", ".join(experiments) or "captions"
    random_weights = any(variant.settings.get("clip_backbone.kind") == "random" for variant in variants)
    warning = cfg.report.warning or (RANDOM_WEIGHTS if random_weights else None)
    subtitle = "Runs side by side" if experiments else "Captions made elsewhere, side by side"
    return About(f"cgtgan: {names}", subtitle, warning, made_by=_command(cfg))


def _facts(variants: Sequence[Variant], sets: RowsBySet, baselines: Sequence[str]) -> dict[str, str]:
    trained = [variant for variant in variants if variant.settings]
    runs, files = [run for variant in trained for run in variant.runs], len(variants) - len(trained)
    seeds = [str(seed) for seed in sorted({run.settings["seed"] for run in runs})]
    decodings = {row.decoding for rows in sets.values() for row in rows if row.part != "published"} - {"none", ""}
    of_runs = {
        "Runs": f"{len(runs)}, of {len(trained)} {'variant' if len(trained) == 1 else 'variants'}",
        "Experiments": ", ".join(dict.fromkeys(variant.experiment for variant in trained)),
        "Seeds" if len(seeds) > 1 else "Seed": ", ".join(seeds)
        if len(seeds) <= 12
        else f"{len(seeds)}, from {seeds[0]} to {seeds[-1]}",
        "Decoding": ", ".join(sorted(decodings)),
    }
    return {
        **(of_runs if runs else {}),
        **({"Files of captions": f"{files}"} if files else {}),
        "Baseline of the differences": ", ".join(baselines) or "none: there is only one row",
        "Code": code_version(),
    }


def _summary(rows: Sequence[MethodRow]) -> str:
    """Which variant has the highest CIDEr, and how far above the baseline."""
    systems = [row for row in rows if row.origin.method in SYSTEMS]
    scored = [(mean, row) for row in systems if (mean := row.mean("CIDEr")) is not None]
    if not scored:
        return ""
    _, row = max(scored, key=lambda pair: pair[0])
    kind = "variants" if any(row.num_seeds for _, row in scored) else "files"
    best = f"Highest CIDEr of {len(scored)} {kind}: {row.name}" if len(scored) > 1 else row.name
    cell, seeds = tables.score_cell(row, "CIDEr"), len(row.scores["CIDEr"])
    text = f"{best}, {cell.mean}" + (f" {cell.spread} ({cell.note or f'{seeds} seeds'})" if seeds > 1 else "")
    rivals = [(mean, other) for mean, other in scored if other.baseline == row.name and "CIDEr" in other.differences]
    other = max(rivals, key=lambda pair: pair[0])[1] if rivals and not row.differences else row
    if (difference := other.differences.get("CIDEr")) is not None:
        over = "test images and seeds" if difference.seeds else "test images"
        interval = signed_interval("CIDEr", difference.seeds or difference.images)
        side = "above" if difference.value >= 0 else "below"
        name = "" if other is row else f"{other.name} is "
        text += f"; {name}{format_score('CIDEr', abs(difference.value))} {side} {other.baseline}"
        text += f" (95% interval over {over}: {interval})"
    return text + "."


def _run_line(variant: Variant, run: Run) -> tuple[str, int | None, float | None, int | None, Path]:
    method = next((method for method in SYSTEMS if method in run.scored), None)
    cider = run.scores(method)["scores"].get("CIDEr") if method else None
    return variant.name, run.settings["seed"] if variant.settings else None, cider, run.last_step, run.folder


def _notes(variants: Sequence[Variant], sets: Mapping[Any, Sequence[Entry]]) -> list[str]:
    notes = []
    for variant in variants:
        ends = {run.settings["seed"]: step for run in variant.runs if (step := run.last_step) is not None}
        if len(set(ends.values())) > 1:
            steps = ", ".join(f"seed {seed} at {step:,}" for seed, step in ends.items())
            notes.append(
                f"{variant.name}: the logs end at different steps ({steps}); the curves end at the first of them"
            )
    scores = [run.scores(entry.method) for rows in sets.values() for entry in rows for run in entry.runs.values()]
    notes += sorted({why for each in scores for why in (each.get("failed") or {}).values()})
    if len(tokenizers := {str(each["tokenizer"]) for each in scores if each.get("tokenizer")}) > 1:
        ways = ", ".join(sorted(tokenizers))
        notes.append(f"captions were split into tokens in different ways ({ways}), which changes scores a little")
    return notes


# ------------------------------------------------------------------------------------------------------------ pictures


def _galleries(cfg: Config, rows: Sequence[Entry], split: Split | None) -> dict[str, tuple[str, list[ComparedPicture]]]:
    """The same pictures with a caption of every variant: drawn at random, and where their CIDErs lie farthest apart."""
    systems = [entry for entry in rows if entry.method in SYSTEMS]
    chosen = systems[:CAPTIONS_PER_PICTURE]
    if not chosen or not cfg.report.gallery:
        return {}
    runs = [entry.runs[min(entry.runs)] for entry in chosen]
    names, captions = [entry.row.name for entry in chosen], [e.runs[min(e.runs)].captions(e.method) for e in chosen]
    cider = [{i: s["CIDEr"] for i, s in e.per_image[min(e.runs)].items() if "CIDEr" in s} for e in chosen]
    split = split or next((load_split_if_available(cfg, run) for run in runs if "dataset.name" in run.settings), None)
    common = [i for i in captions[0] if all(i in texts for texts in captions)]
    ciders = {i: [c[i] for c in cider if i in c] for i in common}
    apart = {i: max(values) - min(values) for i, values in ciders.items() if len(values) == len(chosen) > 1}
    n = cfg.report.gallery // 2 or 1
    farthest = [i for i in sorted(apart, key=lambda i: -apart[i]) if apart[i] > 0][:n]
    rest = [i for i in common if i not in farthest]
    drawn = random.Random(cfg.seed).sample(rest, min(max(n, FIRST_PICTURES), len(rest)))
    about = "The number is the CIDEr (×100) of that picture."
    if any(entry.row.num_seeds for entry in chosen):
        about = f"The captions are those of each variant's lowest seed. {about}"
    if len(systems) > len(chosen):
        about += f" Only the first {len(chosen)} of {len(systems)} rows are shown."
    make, writers = item_of(split), list(zip(names, captions, cider, strict=True))

    if not any(make(i, "").image for i in (*farthest, *drawn)):
        about += " The pictures are not available here."

    def compared(note: str, ids: Sequence[Any]) -> tuple[str, list[ComparedPicture]]:
        return f"{note} {about}", [(make(i, captions[0][i]), _written_captions(i, writers)) for i in ids]

    galleries = {
        FIRST_LOOK: compared("Drawn at random.", drawn[:FIRST_PICTURES]),
        "Where they differ most": compared("Pictures whose CIDErs lie farthest apart.", farthest),
        "More random pictures": compared("Drawn at random, as those at the top.", drawn[FIRST_PICTURES:]),
    }
    return {title: gallery for title, gallery in galleries.items() if gallery[1]}


def _written_captions(
    i: Any, writers: Sequence[tuple[str, Mapping[Any, str], Mapping[Any, float]]]
) -> list[WrittenCaption]:
    """The different captions of one picture, with the names and CIDErs of the variants that wrote them."""
    lines: dict[str, tuple[list[str], str, list[float]]] = {}
    for name, captions, cider in writers:
        names, _, ciders = lines.setdefault(captions[i], ([], captions[i], []))
        names.append(name)
        ciders += [cider[i]] if i in cider else []
    return list(lines.values())


def load_split_if_available(cfg: Config, run: Run) -> Split | None:
    """Pictures and references of the run's test set, or None.

    The demo's are found where it was drawn, others where this command's `dataset` is that of the runs.
    """
    settings = run.settings
    name, kind = settings["dataset.name"], settings.get("dataset.kind")
    if kind == "demo":
        keys = {field.name: f"dataset.world.{field.name}" for field in fields(DemoWorldConfig)}
        world = DemoWorldConfig(**{field: settings[key] for field, key in keys.items() if key in settings})
        cfg = replace(cfg, dataset=replace(cfg.dataset, kind="demo", name=name, world=world))
        folder = world_folder(Path(cfg.artifacts_dir), world)
        if not (folder / "world.json").is_file():
            return None
    elif (cfg.dataset.name, cfg.dataset.kind) != (name, kind):
        return None
    try:
        return dataset_split(Workspace(cfg), run.split)
    except UserError:  # the captions are shown without pictures
        return None
