"""A run's captions of a split, by its checkpoint and its baselines, and their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cgtgan.assets.backbone import open_backbone
from cgtgan.assets.baselines import written_captions
from cgtgan.assets.checkpoints import find_checkpoint
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.reader import load_reader
from cgtgan.assets.scored_checkpoint import scored_checkpoint
from cgtgan.assets.scores import ScoredCaptions, record_in, references_of, run_identity, stored_captions, write_scores
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import Decoder, describe
from cgtgan.errors import InputError
from cgtgan.evaluation.records import WITHOUT_GENERATOR, find_record, missing_metrics, settle_record
from cgtgan.method.batches import stable_seed
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator
from cgtgan.models.prompted import Read, embedding_of
from cgtgan.reporting.methods import METHODS
from cgtgan.runtime.wandb_run import under_agent
from cgtgan.training.validation_baselines import baseline_training, generator_of_baseline, score_validation_baselines
from cgtgan.training.wandb_tables import send_scores


def score_run(ws: Workspace) -> dict[str, Path]:
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
        write_scores(ws, ws.run, places, scored.of(methods), listed if references else None, metrics, about)
    if places["cgtgan"].name == "cgtgan" and ("cgtgan" in wanted or under_agent()):
        send_scores(ws, places["cgtgan"], made_from)
    score_validation_baselines(ws, made_from)
    return places


def _decoding(ws: Workspace) -> str:
    precision = ws.cfg.decode.precision
    return describe(ws.cfg.decode) + ("" if precision == "auto" else f", {precision}")


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
        if training := baseline_training(ws, method):
            scored.training[method] = training
    scored.captions[method] = captions
    return metrics


def _caption_split(
    ws: Workspace, method: str, checkpoint: Path, caption: bool, draw: bool
) -> tuple[list[str], list[list[str]]]:
    """One caption per image of the split, and each image's samples for self-CIDEr; of both what is asked for."""
    split = ws.cfg.evaluate.split
    if (captions := written_captions(ws, method, split)) is not None:
        return captions, []
    if method == "cgtgan":
        bundle = load_generator(checkpoint)
        vectors = load_reader(checkpoint, bundle, ws.device).images(image_embeddings(ws, split).vectors)
    else:
        bundle, vectors = generator_of_baseline(ws, method, split)
    captions = _decoded(ws, method, bundle, vectors) if caption else []
    return captions, _sampled(ws, method, bundle, vectors) if draw else []


def _decoded(ws: Workspace, method: str, bundle: GeneratorBundle, vectors: Read) -> list[str]:
    dim = embedding_of(vectors).shape[1]
    if dim != bundle.clip_dim:
        raise InputError(
            f"the checkpoint reads embeddings of {bundle.clip_dim} numbers and clip_backbone="
            f"{ws.cfg.clip_backbone.name} gives {dim}: use the backbone it was trained with"
        )
    with ws.tracker.progress(f"captioning: {METHODS[method].title}", len(vectors)) as bar:
        backbone = open_backbone(ws) if ws.cfg.decode.name == "best_of_n" else None
        decoder = Decoder(bundle, ws.cfg.decode, ws.device, ws.cfg.seed, backbone, bar.advance)
        return decoder.captions(vectors, images=image_embeddings(ws, ws.cfg.evaluate.split).vectors)


def _sampled(ws: Workspace, method: str, bundle: GeneratorBundle, vectors: Read) -> list[list[str]]:
    """`evaluate.self_cider_samples` captions per row, drawn at the decoding's temperature whatever the decoding is."""
    count, decode = ws.cfg.evaluate.self_cider_samples, replace(ws.cfg.decode, name="sample")
    with ws.tracker.progress(f"sampling for self-CIDEr: {METHODS[method].title}", count * len(vectors)) as bar:
        seeds = [stable_seed(ws.cfg.seed, "self-CIDEr", k) for k in range(count)]
        draws = [Decoder(bundle, decode, ws.device, seed, on_batch=bar.advance).captions(vectors) for seed in seeds]
    return [list(row) for row in zip(*draws, strict=True)]
