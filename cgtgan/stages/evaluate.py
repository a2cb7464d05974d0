"""evaluate: a checkpoint and its baselines -> captions and scores of the same test images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from cgtgan.artifacts import file_fingerprint, fingerprint, read_json, write_json
from cgtgan.config import Config, as_dict, scientific_settings
from cgtgan.errors import InputError, MissingFileError
from cgtgan.evaluation.java import find_java
from cgtgan.evaluation.metrics import load_results, save_results, score_many
from cgtgan.method.aggregation import nearest_texts
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator
from cgtgan.stages.aggregate import aggregated_embeddings
from cgtgan.stages.decoding import caption_embeddings, describe
from cgtgan.stages.initialize import initial_generator, supervised_generator
from cgtgan.stages.preprocess import corpus_sentences, image_embeddings, sentence_embeddings
from cgtgan.stages.released import imported_checkpoint
from cgtgan.stages.workspace import Workspace


@dataclass(frozen=True)
class Method:
    """A row of the comparison: its name on the page and what it learns from."""

    title: str
    note: str
    bound: bool = False


# The order is the table's.
METHODS = {
    "init": Method("Initialisation only", "text only; reads the image embedding"),
    "mean_shift": Method("+ mean shift", "text only; image embedding moved by the mean modality gap"),
    "nearest": Method("Nearest sentence", "the corpus sentence nearest to the image"),
    "projection": Method("Projection (as DeCap)", "text only; reads the aggregated embedding"),
    "cgtgan": Method("CgT-GAN", "images and sentences, unpaired"),
    "supervised": Method("Supervised", "the same generator trained on pairs", bound=True),
    "human": Method("Human", "a fresh sentence of the grammar", bound=True),
}


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    if ws.rank.number:  # scores are the first process's
        return
    with ws.hold_run():
        ws.tracker.show(scores_table(evaluate(ws), list(METHODS)))


def find_checkpoint(ws: Workspace) -> Path:
    """The checkpoint folder that `checkpoint=` names (itself, a link, a `checkpoints` or a run folder, their model.pt), or this run's."""
    which = ws.cfg.evaluate.which
    given = ws.cfg.checkpoint
    start = Path(given).expanduser() if given else ws.run
    if given and start.is_file():
        return imported_checkpoint(ws, start, "checkpoint")
    for place in (start, start / which, start / "checkpoints" / which):
        if (place / "generator.json").is_file():
            return place.resolve()
    if given:
        raise MissingFileError(
            f"checkpoint={given}: no checkpoint is found there; name a run folder, a checkpoint or the authors' model.pt"
        )
    raise MissingFileError(f"{start / 'checkpoints' / which} is missing: run stage=train first, or name one with checkpoint=FOLDER")


def evaluate(ws: Workspace) -> Path:
    """Caption the split with every method that is not scored yet, then score them together; returns the folder of the scores."""
    cfg = ws.cfg.evaluate
    checkpoint = find_checkpoint(ws)
    references = ws.split(cfg.split).references
    if not references:
        raise InputError(f"the {cfg.split} split has no references, so there is nothing to score against: set dataset.references")
    ws.check_same_run("settings", scientific_settings(ws.cfg))
    images = image_embeddings(ws, cfg.split)
    makers: dict[str, Callable[[], list[str]]] = {
        "cgtgan": lambda: _decoded(ws, "cgtgan", load_generator(checkpoint), images.vectors),
        "init": lambda: _decoded(ws, "init", initial_generator(ws), images.vectors),
        "mean_shift": lambda: _decoded(ws, "mean_shift", initial_generator(ws), mean_shifted(ws, cfg.split)),
        "projection": lambda: _decoded(ws, "projection", initial_generator(ws), aggregated_embeddings(ws, cfg.split).vectors),
        "nearest": lambda: _nearest(ws),
        "supervised": lambda: _decoded(ws, "supervised", supervised_generator(ws), images.vectors),
        "human": lambda: _human(ws),
    }
    folder = ws.run / "evaluation" / cfg.split
    made_from = {
        "checkpoint": file_fingerprint(checkpoint / "generator.safetensors"),
        "images": images.header.fingerprint,
        "references": fingerprint(list(references.items())),
        # a transfer row scores a checkpoint alone, where the corpus it was trained on need not be at hand
        "sentences": fingerprint(corpus_sentences(ws)[2]) if cfg.baselines else None,
        "decode": as_dict(ws.cfg.decode),
        "metrics": list(cfg.metrics),
        "java": find_java() is not None,  # once it is installed, what failed without it is scored again
    }
    captions: dict[str, dict[Any, str]] = {}
    for name in ("cgtgan", *cfg.baselines):
        if _is_scored(folder / name, made_from):
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        captions[name] = dict(zip(images.ids, makers[name](), strict=True))
    if captions:
        _score(ws, folder, captions, {i: references[i] for i in images.ids}, made_from)
    return folder


def _score(
    ws: Workspace, folder: Path, captions: dict[str, dict[Any, str]], references: dict[Any, list[str]], made_from: dict[str, Any]
) -> None:
    """Score the methods together and write captions.json, per_image.json and, last, scores.json of each."""
    for stale in ws.run.glob(".scores*"):  # of a killed run: this process holds the run folder
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=".scores", dir=ws.run))
    try:
        metrics = ws.cfg.evaluate.metrics
        with ws.tracker.progress(f"scoring: {', '.join(metrics)}", len(captions) * len(metrics)) as bar:
            scored = score_many(captions, references, metrics, scratch=scratch, scored=bar.advance)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for name, scores in scored.items():
        save_results(folder / name / "captions.json", captions[name])
        write_json(folder / name / "per_image.json", [{"image_id": i, **s} for i, s in scores.per_image.items()], indent=None)
        summary = {"scores": scores.corpus, "failed": scores.failed, "excluded": list(scores.excluded), "tokenizer": scores.tokenizer}
        summary |= {"images": len(scores.per_image), "decoding": describe(ws.cfg.decode), "made_from": made_from}
        write_json(folder / name / "scores.json", summary)
    for why in sorted({why for scores in scored.values() for why in scores.failed.values()}):
        ws.tracker.say(why)


def scores_table(folder: Path, order: list[str]) -> Table:
    """What one run scored, x 100; the report sets several runs side by side."""
    table = Table(title=f"{folder.name} scores x 100 (captions: {folder})")
    rows = [(name, read_json(folder / name / "scores.json")["scores"]) for name in order if (folder / name / "scores.json").is_file()]
    table.add_column("method")
    for metric in (columns := list(dict.fromkeys(m for _, scores in rows for m in scores))):
        table.add_column(metric, justify="right")
    for name, scores in rows:
        table.add_row(METHODS[name].title, *[f"{100 * scores[m]:.1f}" if m in scores else "-" for m in columns])
    return table


def _is_scored(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the scores there are of these inputs; a baseline does not hang on the checkpoint."""
    path = folder / "scores.json"
    if not path.is_file():
        return False
    ignored = {"checkpoint"} if folder.name != "cgtgan" else {"sentences"}
    found = read_json(path).get("made_from")
    return isinstance(found, dict) and all(found.get(key) == value for key, value in made_from.items() if key not in ignored)


# ------------------------------------------------------------------------------------------------------------ methods


def _decoded(ws: Workspace, name: str, bundle: GeneratorBundle, vectors: Tensor) -> list[str]:
    if vectors.shape[1] != bundle.clip_dim:
        raise InputError(
            f"the checkpoint reads embeddings of {bundle.clip_dim} numbers and clip_backbone={ws.cfg.clip_backbone.name} gives "
            f"{vectors.shape[1]}: use the backbone it was trained with"
        )
    with ws.tracker.progress(f"captioning: {METHODS[name].title}", len(vectors)) as bar:
        return caption_embeddings(bundle, vectors, ws.cfg.decode, ws.device, seed=ws.cfg.seed, captioned=bar.advance)


def mean_shifted(ws: Workspace, split: str) -> Tensor:
    """Image embeddings moved by mean(sentences) - mean(train images): the modality gap closed to first order. (N, D) float32"""
    gap = sentence_embeddings(ws).vectors.float().mean(0) - image_embeddings(ws, "train").vectors.float().mean(0)
    return image_embeddings(ws, split).vectors.float() + gap


def _nearest(ws: Workspace) -> list[str]:
    """The corpus sentence with the highest cosine to the image."""
    images, texts = image_embeddings(ws, ws.cfg.evaluate.split), sentence_embeddings(ws)
    sentences = corpus_sentences(ws)[0]
    rows = nearest_texts(images.vectors, texts.vectors, 1, device=ws.device)[:, 0]
    return [sentences[int(i)] for i in rows]


def _human(ws: Workspace) -> list[str]:
    captions = load_results(ws.data_root / f"human_{ws.cfg.evaluate.split}.json")
    return [captions[i] for i in image_embeddings(ws, ws.cfg.evaluate.split).ids]
