"""evaluate: a checkpoint and its baselines, or captions made elsewhere -> captions and scores of the same images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cgtgan.assets.backbone import open_backbone
from cgtgan.assets.baselines import baseline_generator, written_captions
from cgtgan.assets.checkpoints import find_checkpoint
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.scores import (
    ScoredCaptions,
    is_scored,
    own_metric_identity,
    references_of,
    run_identity,
    write_scores,
)
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import Decoder, describe
from cgtgan.config import Config
from cgtgan.errors import InputError
from cgtgan.evaluation.coco_files import id_list, load_results
from cgtgan.method.batches import stable_seed
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator
from cgtgan.reporting.methods import METHODS, Method
from cgtgan.reporting.tables import MethodRow, console_table, measured_metrics, score_table
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


def evaluate(ws: Workspace) -> Path:
    """Caption the split with every method without scores, then score these together: the folder of the scores."""
    cfg = ws.cfg.evaluate
    checkpoint, references = find_checkpoint(ws), references_of(ws)
    ws.check_same_settings()
    images = image_embeddings(ws, cfg.split)
    made_from = run_identity(ws, checkpoint, images, references)
    folder = ws.run / "evaluation" / cfg.split
    scored = ScoredCaptions({}, {})
    for method in ("cgtgan", *cfg.baselines):
        if is_scored(folder / method, made_from):
            continue
        if "clipscore" in cfg.metrics:
            open_backbone(ws)  # missing weights are reported before the captioning
        shutil.rmtree(folder / method, ignore_errors=True)
        texts, samples = _caption_split(ws, method, checkpoint)
        scored.captions[method] = dict(zip(images.ids, texts, strict=True))
        if samples:
            scored.samples[method] = dict(zip(images.ids, samples, strict=True))
    if scored.captions:
        about = {"decoding": describe(ws.cfg.decode), "made_from": made_from}
        write_scores(ws, ws.run, folder, scored, {i: references[i] for i in images.ids}, about)
    if "cgtgan" in scored.captions or under_agent():
        send_scores(ws, folder / "cgtgan", made_from)
    return folder


def score_file(ws: Workspace, file: Path) -> Path:
    """Captions in COCO's results format -> their scores, in `output` or in <file>_scores beside the file.

    Needs no run, checkpoint, backbone or corpus, except for the metrics that are made of them.
    """
    captions = load_results(file)
    if not captions:
        raise InputError(f"captions={file}: the file is an empty list, so there is nothing to score")
    references = references_of(ws)
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
    } | own_metric_identity(ws)
    about = {"decoding": f"captions of {file.name}", "made_from": made_from}
    waiting = f"waiting for another process that works in {folder}"
    with locked(folder / "captions.json", lambda: ws.tracker.say(waiting)):
        write_scores(ws, folder, folder.parent, ScoredCaptions({folder.name: captions}, {}), references, about)
    _show(ws, folder.parent, {folder.name: Method(file.name, "")})
    return folder


def _show(ws: Workspace, folder: Path, methods: Mapping[str, Method]) -> None:
    """The table of one run, or of one file; the report compares several runs."""
    files = {name: path for name in methods if (path := folder / name / "scores.json").is_file()}
    scores = {name: read_json(path)["scores"] for name, path in files.items()}
    rows = [
        MethodRow(methods[name].title, "", {metric: [v] for metric, v in row.items()}, methods[name].part)
        for name, row in scores.items()
    ]
    ws.tracker.show(console_table(score_table(rows, measured_metrics(rows))))
    place = folder if len(files) > 1 else folder / next(iter(files))
    ws.tracker.say(f"captions and scores, of the whole and of each image: {place}")


def _caption_split(ws: Workspace, method: str, checkpoint: Path) -> tuple[list[str], list[list[str]]]:
    """One caption per image of the split, and each image's samples where self-CIDEr asks for them."""
    if (captions := written_captions(ws, method)) is not None:
        return captions, []
    if method == "cgtgan":
        bundle, vectors = load_generator(checkpoint), image_embeddings(ws, ws.cfg.evaluate.split).vectors
    else:
        bundle, vectors = baseline_generator(ws, method)
    captions = _decoded(ws, method, bundle, vectors)
    return captions, _sampled(ws, method, bundle, vectors) if ws.cfg.evaluate.self_cider_samples else []


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
