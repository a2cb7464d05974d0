"""What the report shows of one run folder: scores, curves, the discriminator's health, pictures, changed captions."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from cgtgan.assets.corpus import corpus_sentences, demo_overlap
from cgtgan.assets.images import dataset_split
from cgtgan.assets.released import released_images
from cgtgan.assets.workspace import Workspace
from cgtgan.config import as_dict
from cgtgan.data.corpora import CleanedCorpus
from cgtgan.errors import MissingFileError, UserError
from cgtgan.evaluation.coco_files import load_results
from cgtgan.reporting import curves
from cgtgan.reporting.methods import METHODS, method_note
from cgtgan.reporting.page import About, Change, Changes, GalleryItem, Pictures, Report, item_of
from cgtgan.reporting.pictures import pick_gallery, thumbnails
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.svg import Histogram
from cgtgan.reporting.tables import MethodRow, domain_rows, format_score, is_times_100, measured_metrics, score_cell
from cgtgan.runtime.versions import code_version

CARD_METHODS = ("init", "projection", "supervised")  # their captions stand in every card
LEADING = ("CIDEr", "CLIPScore")  # what pictures are ranked by: the first that there is
FIRST_LOOK = 6  # pictures above the table
LISTED = 10_000  # pictures that the page searches and sorts
THUMBNAIL_BYTES = 15_000_000  # 5,000 photographs of COCO with a side of 88 pixels take 12 MB
WITHOUT_REFERENCES = (
    "The pictures have no references: no score compares the captions with those of people. CLIPScore says how near "
    "CLIP puts caption and picture, which training rewards too; a high value does not show that a caption reads well."
)
SUBTITLE = "Unpaired image captioning: a captioner trained from images without captions and sentences without images."


def make_report(ws: Workspace, run: Run) -> Report:
    """Everything on the page. Raises `MissingFileError` where the run folder has no scores."""
    if not run.scored:
        raise MissingFileError(f"{run.folder} holds no scores: run stage=evaluate there first")
    cfg, history, seed = ws.cfg, run.history, run.settings["seed"]
    rows, items = method_rows(run), pictures(ws, run)
    metric = next((m for m in LEADING if any(m in item.scores for item in items.values())), LEADING[0])
    scores = {i: item.scores[metric] for i, item in items.items() if metric in item.scores}
    best, worst, drawn = pick_gallery(scores, cfg.report.gallery, cfg.seed)
    galleries = {"first": drawn[:FIRST_LOOK], "best": best, "worst": worst, "random": drawn[FIRST_LOOK:]}
    plots = {
        "curves": curves.run_plots(history, seed, run.validation_baselines()),
        "discriminator": curves.discriminator_plots(history, seed),
        "distributions": [*curves.reward_bands(history), *histograms(run)],
    }
    about = About(f"cgtgan: {cfg.name}", SUBTITLE, cfg.report.warning, summary(rows), _facts(ws, run), _notes(run))
    return Report(
        replace(about, made_by=OmegaConf.to_yaml(OmegaConf.create(as_dict(cfg)))),
        rows,
        plots,
        curves.health(history),
        [*since_initialisation(run, items, cfg.report.gallery, metric), *between_validations(ws, run)],
        {key: [_for_card(items[i], short=key == "first") for i in ids] for key, ids in galleries.items()},
        _listed(ws, run, items),
        metric,
    )


# -------------------------------------------------------------------------------------------------- tables and numbers


def method_rows(run: Run) -> list[MethodRow]:
    """A row per score record, bounds last; then the paper's row where the setting is the paper's."""
    rows = []
    for record in run.records():
        method, part = record.method, METHODS[record.method].part
        note = method_note(method, run.settings, [record.training(method)])
        scores = {metric: [value] for metric, value in record.scores(method)["scores"].items()}
        ours = method == "cgtgan" and not run.ablated
        rows.append(MethodRow(record.record_title(), note, scores, part, ours, record.decoding(method)))
        rows += domain_rows(record.record_title(), record.scores(method), record.decoding(method))
    paper = run.published()
    return [*rows, paper] if paper else rows


def summary(rows: Sequence[MethodRow]) -> str:
    """'A reaches CIDEr 239.0 ± 4.1 (5 seeds): 12.0 above B (227.0), ...; 93% of C (256.0).' Empty without `ours`."""
    metrics = measured_metrics(rows)
    metric = next((metric for metric in LEADING if metric in metrics), metrics[-1] if metrics else "")
    scored = [(mean, row) for row in rows if (mean := row.mean(metric)) is not None]
    mean, ours = next(((mean, row) for mean, row in scored if row.ours), (0.0, None))
    if ours is None:
        return ""
    cell, seeds = score_cell(ours, metric), len(ours.scores[metric])
    text = f"{ours.name} reaches {metric} {cell.mean} {cell.spread}".rstrip()
    text += f" ({cell.note or f'{seeds} seeds'})" if seeds > 1 else ""
    parts = []
    if others := [(value, row) for value, row in scored if not row.ours and not row.apart]:
        value, row = max(others, key=lambda pair: pair[0])
        gap = f"{format_score(metric, abs(mean - value), mean)} {'above' if mean >= value else 'below'}"
        parts.append(f"{gap} {row.name} ({format_score(metric, value)}), the best other unpaired method")
    for value, row in scored:
        if row.part == "bound" and value > 0:
            parts.append(f"{100 * mean / value:.0f}% of {row.name} ({format_score(metric, value)})")
        if row.part == "published":
            parts.append(f"against {format_score(metric, value)} of {row.name}")
    return text + (": " + "; ".join(parts) if parts else "") + "."


def histograms(run: Run) -> list[Histogram]:
    """The scores of single test images, of the GAN and of its initialisation."""
    scores = {run.title(m): run.per_image(m) for m in ("cgtgan", "init") if m in run.scored}
    plots = []
    for metric in dict.fromkeys(m for images in scores.values() for row in images.values() for m in row):
        if metric.startswith("BLEU"):  # of a single caption mostly 0 or near 1
            continue
        factor, label = (100, f"{metric} x 100") if is_times_100(metric) else (1, metric)
        values = {
            name: [factor * row[metric] for row in images.values() if metric in row] for name, images in scores.items()
        }
        if len({value for column in values.values() for value in column}) >= 3:  # not yes or no, nor always the same
            plots.append(Histogram(f"{metric} of single images", label, values))
    return plots


def _facts(ws: Workspace, run: Run) -> dict[str, str]:
    cfg = ws.cfg
    try:
        sentences, counts, _ = corpus_sentences(ws)
        corpus = f"{len(sentences):,} sentences; {CleanedCorpus(sentences, counts).summary()}"
    except UserError:  # a transfer row: the checkpoint was trained elsewhere
        corpus = f"{cfg.corpus.name}, not available here"
    model = f" ({cfg.clip_backbone.model})" if cfg.clip_backbone.model else ""
    facts = {
        "Images": ", ".join(f"{_images(ws, name)} {name}" for name in ("train", "val", "test")),
        "Corpus": corpus,
        "Backbone": cfg.clip_backbone.name + model,
        "Aggregation temperature": f"{cfg.aggregation_t.t:g}",
        "Decoding": ", ".join(sorted({record.decoding(record.method) for record in run.records()} - {"none"})),
        "Checkpoint": f"{cfg.evaluate.which} step; the test images play no part in the choice",
        "Seed": str(run.settings["seed"]),
        "Code": code_version(),
    }
    if overlap := demo_overlap(ws):
        facts["Overlap"] = (
            f"{overlap['references_in_corpus']} of {overlap['references']} test references are also corpus sentences; "
            f"they belong to {overlap['scenes_in_corpus']} of {overlap['scenes']} test images"
        )
    return facts


def _images(ws: Workspace, name: str) -> str:
    """How many images a split has; of the authors' files the embeddings are counted."""
    try:
        given = released_images(ws, name)
        return f"{len(given.ids if given else dataset_split(ws, name).images):,}"
    except MissingFileError:  # an evaluation alone needs no train images
        return "no"


def _notes(run: Run) -> list[str]:
    notes = sorted({why for r in run.records() for why in r.scores(r.method)["failed"].values()})
    made_from = run.scores(run.scored[0]).get("made_from") or {}
    if "references" in made_from and made_from["references"] is None:
        notes.append(WITHOUT_REFERENCES)
    if excluded := run.scores(run.scored[0])["excluded"]:
        notes.append(f"{len(excluded)} images have no reference and are left out of the scores")
    return notes


# ------------------------------------------------------------------------------------------------------------ pictures


def pictures(ws: Workspace, run: Run) -> dict[Any, GalleryItem]:
    """Every test picture by id, in the order of the ids, with the captions and scores of all of the run's methods."""
    if "cgtgan" not in run.scored:
        return {}
    split = dataset_split(ws, run.split)
    listed = {record.image_id for record in split.images}
    make, captions, scores = item_of(split), run.captions("cgtgan"), run.per_image("cgtgan")
    names = [m for m in dict.fromkeys((*CARD_METHODS, *run.scored)) if m in run.scored and m != "cgtgan"]
    methods = [(METHODS[m].title, run.captions(m), run.per_image(m)) for m in names]
    items = {}
    for i, caption in captions.items():
        item = make(i, caption)
        if not listed or i in listed:
            others = {title: (texts[i], values.get(i, {})) for title, texts, values in methods if i in texts}
            items[i] = replace(item, scores=scores.get(i, {}), others=others)
    return items


def _for_card(item: GalleryItem, *, short: bool) -> GalleryItem:
    if short:  # above the table: the picture and its caption alone
        return replace(item, others={}, references=())
    titles = [METHODS[m].title for m in CARD_METHODS]
    return replace(item, others={name: other for name, other in item.others.items() if name in titles})


def _listed(ws: Workspace, run: Run, items: Mapping[Any, GalleryItem]) -> Pictures:
    listed = list(items)
    if len(listed) > LISTED:
        chosen = set(random.Random(ws.cfg.seed).sample(listed, LISTED))
        listed = [i for i in listed if i in chosen]
    files = {i: path for i in listed if (path := items[i].image)}
    with ws.tracker.progress("thumbnails", len(files)) as bar:
        small = thumbnails(files, THUMBNAIL_BYTES, bar.advance)
    left_out = _left_out(len(items), len(listed), len(files), len(small))
    return Pictures([items[i] for i in listed], run.title("cgtgan"), small, left_out)


def _left_out(items: int, listed: int, files: int, small: int) -> str:
    sentences = [f"{listed:,} of {items:,} pictures are listed, drawn at random."] if listed < items else []
    if not files:
        sentences.append("No pictures are shown: only their embeddings are here.")
    elif small < listed:
        megabytes = THUMBNAIL_BYTES // 1_000_000
        why = f"the page holds {megabytes} MB of thumbnails, and some files may be unreadable"
        sentences.append(f"{small:,} of {listed:,} have a thumbnail: {why}.")
    return " ".join(sentences)


# ---------------------------------------------------------------------------------------------------- changed captions


def since_initialisation(run: Run, items: Mapping[Any, GalleryItem], n: int, metric: str = "CIDEr") -> list[Changes]:
    """The test captions that gained and lost most since initialisation, half of `n` each."""
    title = METHODS["init"].title
    changes: list[tuple[float, Change]] = []
    for item in items.values():
        before, scores = item.others.get(title, (item.caption, {}))
        if before != item.caption and metric in scores and metric in item.scores:
            gain = item.scores[metric] - scores[metric]
            changes.append((gain, Change(item, before, gain)))
    ranked = sorted((pair for pair in changes if math.isfinite(pair[0])), key=lambda pair: -pair[0])
    gained = [change for gain, change in ranked if gain > 0]
    lost = [change for gain, change in ranked[::-1] if gain < 0]
    picked = [*gained[: (n + 1) // 2], *lost[: n // 2]]
    if not picked:
        return []
    note = (
        f"{len(changes):,} of {len(items):,} test captions differ; {metric} rose for {len(gained):,} of them and fell "
        f"for {len(lost):,}. First those that gained most, then those that lost most."
    )
    return [Changes("Before and after adversarial training", note, title, run.title("cgtgan"), picked)]


def between_validations(ws: Workspace, run: Run) -> list[Changes]:
    """Some validation captions that differ between the first step that has them and the step that is scored."""
    steps, logged = run.validations(), ((row["step"], row.get("eval/CIDEr")) for row in run.history)
    cider = {step: value for step, value in logged if value is not None and step in steps}
    if len(steps) < 2:
        return []
    first, last = min(steps), max(steps)
    if ws.cfg.evaluate.which == "best" and any(cider):  # step 0, the initial generator, is no checkpoint
        last = max(filter(None, cider), key=lambda step: cider[step])
    before, after = load_results(steps[first]), load_results(steps[last])
    differ = [i for i in after if i in before and before[i] != after[i]]
    if not differ:
        return []
    try:
        make = item_of(dataset_split(ws, "val"))
    except UserError:  # the captions are available without the pictures
        make = item_of(None)
    picked = random.Random(ws.cfg.seed).sample(differ, min(ws.cfg.report.gallery, len(differ)))
    changes = [Change(make(i, after[i]), before[i]) for i in picked]
    names = [f"Step {s:,}" + (f" (CIDEr {100 * cider[s]:.1f})" if s in cider else "") for s in (first, last)]
    note = f"{len(differ):,} of {len(after):,} validation captions differ; these are drawn at random from them."
    note += " All are greedy captions."
    return [Changes(f"From step {first:,} to step {last:,}", note, names[0], names[1], changes)]
