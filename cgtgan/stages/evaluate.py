"""evaluate: a checkpoint and its baselines, or captions made elsewhere -> captions and scores of the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cgtgan.assets.backbone import open_backbone
from cgtgan.assets.baselines import baseline_generator, written_captions
from cgtgan.assets.checkpoints import find_checkpoint
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.scored_checkpoint import scored_checkpoint
from cgtgan.assets.scores import (
    ScoredCaptions,
    image_names_of,
    own_metric_identity,
    record_in,
    references_of,
    run_identity,
    stored_captions,
    write_scores,
)
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import Decoder, describe
from cgtgan.config import Config, custom_name
from cgtgan.errors import InputError
from cgtgan.evaluation.coco_files import id_list, load_results, under_reference_ids
from cgtgan.evaluation.records import WITHOUT_GENERATOR, differences, find_record, missing_metrics, settle_record
from cgtgan.method.batches import stable_seed
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator
from cgtgan.reporting.methods import METHODS, Method
from cgtgan.reporting.tables import MethodRow, console_table, score_tables
from cgtgan.runtime.artifacts import file_fingerprint, fingerprint, locked, read_json
from cgtgan.runtime.wandb_run import under_agent
from cgtgan.training.wandb_tables import send_scores


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    if ws.rank.number:  # only the first process scores
        return
    if cfg.captions is not None:
        score_file(ws, Path(cfg.captions).expanduser())
        return
    with ws.hold_run():
        _show(ws, evaluate(ws), METHODS)


def evaluate(ws: Workspace) -> dict[str, Path]:
    """Caption the split with every method, and score it, where that is not done yet: the record of each method."""
    cfg = ws.cfg.evaluate
    checkpoint, references = find_checkpoint(ws), references_of(ws)
    ws.check_same_settings()
    images = image_embeddings(ws, cfg.split)
    made_from, origin = run_identity(ws, checkpoint, images, references), scored_checkpoint(ws, checkpoint)
    about = {"decoding": _decoding(ws), "checkpoint": origin.name, "made_from": made_from}
    usual = [{"made_from": {**made_from, **each}} for each in origin.usual]
    folder, listed = ws.run / "evaluation" / cfg.split, {i: references.get(i, []) for i in images.ids}
    places, scored = dict[str, Path](), ScoredCaptions({}, {})
    wanted: dict[str, tuple[str, ...]] = {}
    for method in ("cgtgan", *cfg.baselines):
        there = find_record(folder, method, made_from)
        if metrics := _caption_if_missing(ws, method, there, checkpoint, made_from, scored):
            wanted[method] = metrics
        places[method] = settle_record(folder, method, about, usual, foreign=origin.foreign and method == "cgtgan")
    for metrics in dict.fromkeys(wanted.values()):
        methods = [method for method, theirs in wanted.items() if theirs == metrics]
        write_scores(ws, ws.run, places, scored.of(methods), listed, metrics, about)
    if places["cgtgan"].name == "cgtgan" and ("cgtgan" in wanted or under_agent()):
        send_scores(ws, places["cgtgan"], made_from)
    return places


def _decoding(ws: Workspace) -> str:
    precision = ws.cfg.decode.precision
    return describe(ws.cfg.decode) + ("" if precision == "auto" else f", {precision}")


def score_file(ws: Workspace, file: Path) -> Path:
    """Captions in COCO's results format -> their scores, in `output` or in <file>_scores beside the file.

    Needs no run, checkpoint, backbone or corpus, except for the metrics that are made of them.
    """
    captions = load_results(file)
    if not captions:
        raise InputError(f"captions={file}: the file is an empty list, so there is nothing to score")
    references = references_of(ws)
    if not captions.keys() <= references.keys():
        captions = under_reference_ids(captions, references, image_names_of(ws), file)
    # as COCO's own program: a part of the images of a reference file may be scored
    if ws.cfg.evaluate.references is not None and not captions.keys().isdisjoint(references):
        if without := [i for i in references if i not in captions]:
            ws.tracker.say(f"{id_list(without)} no caption in {file}: left out")
        references = {i: texts for i, texts in references.items() if i in captions}
    beside = file.with_name(file.name.removesuffix(".gz").removesuffix(".json") + "_scores")
    folder = (Path(ws.cfg.output).expanduser() if ws.cfg.output else beside).resolve()
    made_from = {
        "captions": file_fingerprint(file),
        "references": fingerprint(list(references.items())),
        "split": ws.cfg.evaluate.split,
        "metrics": list(map(custom_name, ws.cfg.evaluate.metrics)),
    } | own_metric_identity(ws)
    about = {"decoding": f"captions of {file.name}", "made_from": made_from}
    waiting, name = f"waiting for another process that works in {folder}", folder.name
    with locked(folder / "captions.json", lambda: ws.tracker.say(waiting)):
        # what is scored now has the folder's name; scores of other captions or references there move beside it
        settle_record(folder.parent, name, about, [about], foreign=False)
        scored, metrics = ScoredCaptions({name: captions}, {}), ws.cfg.evaluate.metrics
        write_scores(ws, folder, {name: folder}, scored, references, metrics, about)
    _show(ws, {name: folder}, {name: Method(file.name, "")})
    return folder


def _show(ws: Workspace, places: Mapping[str, Path], methods: Mapping[str, Method]) -> None:
    """The table of one run, or of one file, as scored now; the report compares several runs."""
    rows = []
    for method, place in places.items():
        record = read_json(place / "scores.json")
        title, _, part = methods[method]
        decoding = "" if method in WITHOUT_GENERATOR else record["decoding"]
        scores = {metric: [value] for metric, value in record["scores"].items()}
        usual = {} if place.name == method else record_in(place.with_name(method))
        differs = ", ".join(differences(method, record, usual, skip=("decode",)).values()) if usual else ""
        differs = differs or (str(record.get("checkpoint", "")) if place.name != method and not usual else "")
        rows.append(MethodRow(f"{title}, {differs}" if differs else title, "", scores, part, decoding=decoding))
    for table in score_tables(rows):
        ws.tracker.show(console_table(table))
    folders = {place.parent for place in places.values()} if len(places) > 1 else set(places.values())
    ws.tracker.say(f"captions and scores, of the whole and of each image: {', '.join(map(str, folders))}")


def _caption_if_missing(
    ws: Workspace, method: str, record: Path | None, checkpoint: Path, made_from: Mapping[str, Any],
    scored: ScoredCaptions,
) -> tuple[str, ...]:  # fmt: skip
    """The metrics to compute for a method; its captions, of its record or new ones, are added to `scored` if any."""
    cfg, ids = ws.cfg.evaluate, image_embeddings(ws, ws.cfg.evaluate.split).ids
    samples = 0 if method in WITHOUT_GENERATOR else cfg.self_cider_samples
    captions = stored_captions(record, ids) if record else None
    metrics = tuple(dict.fromkeys(cfg.metrics))
    if record and captions is not None:
        metrics = tuple(missing_metrics(record_in(record), metrics, made_from, samples=samples))
    if not metrics:
        return ()
    if "clipscore" in metrics:
        open_backbone(ws)  # missing weights are reported before the captioning
    draw = samples > 0 and "diversity" in metrics
    if captions is None or draw:
        texts, drawn = _caption_split(ws, method, checkpoint, captions is None, draw)
        captions = captions or dict(zip(ids, texts, strict=True))
        if draw:
            scored.samples[method] = dict(zip(ids, drawn, strict=True))
    scored.captions[method] = captions
    return metrics


def _caption_split(
    ws: Workspace, method: str, checkpoint: Path, caption: bool, draw: bool
) -> tuple[list[str], list[list[str]]]:
    """One caption per image of the split, and each image's samples for self-CIDEr; of both what is asked for."""
    if (captions := written_captions(ws, method)) is not None:
        return captions, []
    if method == "cgtgan":
        bundle, vectors = load_generator(checkpoint), image_embeddings(ws, ws.cfg.evaluate.split).vectors
    else:
        bundle, vectors = baseline_generator(ws, method)
    captions = _decoded(ws, method, bundle, vectors) if caption else []
    return captions, _sampled(ws, method, bundle, vectors) if draw else []


def _decoded(ws: Workspace, method: str, bundle: GeneratorBundle, vectors: Tensor) -> list[str]:
    if vectors.shape[1] != bundle.clip_dim:
        raise InputError(
            f"the checkpoint reads embeddings of {bundle.clip_dim} numbers and clip_backbone="
            f"{ws.cfg.clip_backbone.name} gives {vectors.shape[1]}: use the backbone it was trained with"
        )
    with ws.tracker.progress(f"captioning: {METHODS[method].title}", len(vectors)) as bar:
        backbone = open_backbone(ws) if ws.cfg.decode.name == "best_of_n" else None
        decoder = Decoder(bundle, ws.cfg.decode, ws.device, ws.cfg.seed, backbone, bar.advance)
        return decoder.captions(vectors, images=image_embeddings(ws, ws.cfg.evaluate.split).vectors)


def _sampled(ws: Workspace, method: str, bundle: GeneratorBundle, vectors: Tensor) -> list[list[str]]:
    """`evaluate.self_cider_samples` captions per row, drawn at the decoding's temperature whatever the decoding is."""
    count, decode = ws.cfg.evaluate.self_cider_samples, replace(ws.cfg.decode, name="sample")
    with ws.tracker.progress(f"sampling for self-CIDEr: {METHODS[method].title}", count * len(vectors)) as bar:
        seeds = [stable_seed(ws.cfg.seed, "self-CIDEr", k) for k in range(count)]
        draws = [Decoder(bundle, decode, ws.device, seed, on_batch=bar.advance).captions(vectors) for seed in seeds]
    return [list(row) for row in zip(*draws, strict=True)]
