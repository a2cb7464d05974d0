"""The baselines of a run: their generators, how these were trained, and their CIDEr on the validation images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cgtgan.assets.baselines import baseline_generator, written_captions
from cgtgan.assets.generators import initial_path, training_of
from cgtgan.assets.images import dataset_split, image_embeddings
from cgtgan.assets.prompts import prompts_of
from cgtgan.assets.reader import Reader
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import Decoder
from cgtgan.errors import MissingFileError
from cgtgan.evaluation.metrics import score_many
from cgtgan.evaluation.records import WITHOUT_GENERATOR, identity
from cgtgan.method.gap import Gap
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.models.prompted import Read
from cgtgan.reporting.run_folder import SECONDS, VALIDATION_BASELINES
from cgtgan.runtime.artifacts import fingerprint, read_json, write_json
from cgtgan.runtime.devices import Devices, best_precision
from cgtgan.runtime.tracking import read_metrics
from cgtgan.training.supervised import supervised_generator, supervised_path


def generator_of_baseline(ws: Workspace, method: str, split: str) -> tuple[GeneratorBundle, Read]:
    """The generator of a baseline that has one, and the images of the split as it reads them."""
    if method != "supervised":
        return baseline_generator(ws, method, split)
    bundle = supervised_generator(ws)
    return bundle, Reader(bundle, prompts=prompts_of(ws)).images(image_embeddings(ws, split).vectors)


def baseline_training(ws: Workspace, method: str) -> dict[str, Any]:
    """Updates of the baseline's generator and its name; empty without one, or where they were not noted.

    Its seconds go to seconds.json of the run folder: the scores of two equal runs are equal.
    """
    if method == "cgtgan" or method in WITHOUT_GENERATOR:
        return {}
    path = supervised_path(ws) if method == "supervised" else initial_path(ws, Gap())
    training = training_of(path) if path else {}
    if path is None or not training:
        return {}
    if (seconds := training.pop("seconds", None)) is not None:
        file = ws.run / SECONDS
        write_json(file, {**(read_json(file) if file.is_file() else {}), path.name: seconds})
    return {**training, "generator": path.name}


def score_validation_baselines(ws: Workspace, made_from: Mapping[str, Any]) -> None:
    """Score `evaluate.baselines` as training scores its generator: the reference lines of the validation curve.

    Writes validation/baselines.json: `CIDEr` and `made_from` by method. What is there and made from the same is kept.
    Nothing is done where nothing was validated. made_from: as in scores.json, of the split that is evaluated.
    """
    history = read_metrics(ws.run / "metrics.jsonl") if ws.cfg.evaluate.baselines else []
    if not any(row.get("eval/CIDEr") is not None for row in history):
        return
    try:
        _score(ws, made_from)
    except MissingFileError as error:  # a run that was trained on another machine
        ws.tracker.say(f"the validation curve has no reference lines: {error}")


def _score(ws: Workspace, made_from: Mapping[str, Any]) -> None:
    images, split = image_embeddings(ws, "val"), dataset_split(ws, "val")
    references = {i: split.references[i] for i in images.ids}
    precision = _precision(ws)
    made_from = {
        **made_from,
        "images": images.header.fingerprint,
        "references": fingerprint(list(references.items())),
        "decode": {"name": "greedy", "precision": precision},
    }
    file = ws.run / VALIDATION_BASELINES
    stored = read_json(file) if file.is_file() else {}
    known = stored.get("made_from", {})
    cider = {m: v for m, v in stored.get("CIDEr", {}).items() if known.get(m) == identity(m, made_from)}
    missing = [method for method in ws.cfg.evaluate.baselines if method not in cider]
    if not missing:
        return
    captions = {}
    with ws.tracker.progress("baselines on the validation images", len(missing) * len(images.ids)) as bar:
        for method in missing:
            texts = written_captions(ws, method, "val")
            if texts is None:
                bundle, vectors = generator_of_baseline(ws, method, "val")
                with Devices(ws.device, precision).autocast():
                    texts = Decoder(bundle, ws.cfg.decode, ws.device, on_batch=bar.advance).greedy(vectors)
            else:
                bar.advance(len(texts))
            captions[method] = dict(zip(images.ids, texts, strict=True))
    scores = score_many(captions, references, ("cider",))
    cider |= {method: scores[method].corpus["CIDEr"] for method in missing}
    write_json(file, {"CIDEr": cider, "made_from": {method: identity(method, made_from) for method in cider}})


def _precision(ws: Workspace) -> str:
    """That of the run's validations, on whatever machine it is evaluated."""
    inputs: Path = ws.run / "inputs.json"
    known = read_json(inputs).get("precision") if inputs.is_file() else None
    return known or best_precision(ws.cfg.train.precision, ws.device)
