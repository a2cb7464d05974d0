"""What W&B has of a run beyond its curves: captions of the same images at each validation, scores, artifacts."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.aggregated import aggregated_embeddings
from cgtgan.assets.images import dataset_split
from cgtgan.assets.released import released_aggregated
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, WandbConfig, as_dict
from cgtgan.data.image_files import DAMAGED_IMAGE
from cgtgan.reporting.methods import reward_title
from cgtgan.reporting.pictures import embed
from cgtgan.run_identity import REWARD_PRESETS, scientific_settings, variant_name
from cgtgan.runtime.artifacts import Embeddings, atomic_path, read_json
from cgtgan.runtime.tracking import read_metrics
from cgtgan.runtime.versions import code_version
from cgtgan.runtime.wandb_run import under_agent
from cgtgan.training.inputs import TrainingInputs
from cgtgan.training.parts import TrainingParts
from cgtgan.training.rewards import semantic_rewards
from cgtgan.training.validation import Validation

EXAMPLES = 32
SIDE = 200  # longest side of a picture, in pixels
TABLE = "eval/captions"


def run_settings(cfg: Config) -> WandbConfig:
    """`cfg.wandb` with the tags that every run has: experiment, corpus, backbone and reward."""
    weights = cfg.reward_weights
    numbers = (weights.cos_weight, weights.clip_weight, weights.max_weight)
    reward = weights.name  # a preset's name says nothing about other numbers
    if weights.terms or numbers != REWARD_PRESETS.get(reward):
        reward = ", ".join(reward_title(scientific_settings(cfg)))
    names = (cfg.name, cfg.corpus.name, cfg.clip_backbone.name, reward)
    tags = [*cfg.wandb.tags, *(name.replace("/", "-")[:64] for name in names)]
    return replace(cfg.wandb, tags=list(dict.fromkeys(tags)))


def run_config(cfg: Config, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting, the variant, the code and the fingerprints of what the run was made from."""
    return as_dict(cfg) | {"variant": variant_name(cfg), "code": code_version(), "inputs": dict(made_from)}


@dataclass(frozen=True)
class Examples:
    """Validation images that W&B shows: embeddings (n, D) float32; no targets where the authors' files have none."""

    ids: list[Any]
    image: Tensor
    target: Tensor | None
    pictures: list[Path | None]


def validation_examples(ws: Workspace, val: Embeddings) -> Examples | None:
    """The same images for every run on these images; None where W&B is disabled.

    The pictures are the first process's.
    """
    if ws.cfg.wandb.mode == "disabled":
        return None
    order = sorted(range(len(val.ids)), key=lambda row: (str(val.ids[row]), isinstance(val.ids[row], str)))
    rows = random.Random(0).sample(order, min(EXAMPLES, len(order)))
    ids = [val.ids[row] for row in rows]
    # the authors' pairs bring the train images' targets only, and need no embedded sentences
    targets = (
        None if released_aggregated(ws, "train") is not None else aggregated_embeddings(ws, "val").vectors[rows].float()
    )
    pictures = [] if ws.rank.number else _thumbnails(ws, ids)
    return Examples(ids, val.vectors[rows].float(), targets, pictures)


def _thumbnails(ws: Workspace, ids: list[Any]) -> list[Path | None]:
    """Small files of the pictures, made once; None where there is no file or it cannot be read."""
    files = {record.image_id: record.path for record in dataset_split(ws, "val").images}
    folder = ws.run / "validation" / "pictures"
    thumbnails: list[Path | None] = []
    for number, image_id in enumerate(ids):
        earlier = next(folder.glob(f"{number:02d}.*"), None)
        try:
            thumbnails.append(earlier or _thumbnail(files[image_id], folder / f"{number:02d}"))
        except (KeyError, *DAMAGED_IMAGE):
            thumbnails.append(None)
    return thumbnails


def _thumbnail(path: Path, to: Path) -> Path:
    kind, _, content = embed(path, SIDE)[0].removeprefix("data:image/").partition(";base64,")
    with atomic_path(to.with_suffix(f".{kind}")) as beside:
        beside.write_bytes(base64.b64decode(content))
    return to.with_suffix(f".{kind}")


@torch.no_grad()
def log_captions(
    ws: Workspace, parts: TrainingParts, examples: Examples | None, validation: Validation, step: int
) -> None:
    """The table of this validation.

    Draws no random number and leaves every module in its mode: training is the same without W&B.
    """
    run = ws.tracker.wandb
    if run is None or examples is None:
        return
    captions = [validation.captions[i] for i in examples.ids]
    references = dataset_split(ws, "val").references
    columns = {
        "image": [str(i) for i in examples.ids],
        "picture": examples.pictures,
        "caption": captions,
        "references": ["\n".join(references[i]) for i in examples.ids],
        "CIDEr": [validation.per_image.get(i) for i in examples.ids],
        **reward_columns(ws.cfg, parts, examples, captions),
    }
    run.table(step, TABLE, tuple(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def reward_columns(
    cfg: Config, parts: TrainingParts, examples: Examples, captions: list[str]
) -> dict[str, list[float] | list[None]]:
    """A column per reward term, `semantic` and `naturalness`: values of the captions, or None.

    Without targets only `clip` has values, without a discriminator `naturalness` has none.
    """
    device = parts.devices.device
    image, target = examples.image, examples.image if examples.target is None else examples.target
    rewards = semantic_rewards(cfg, parts, captions, image.to(device), target.to(device))
    nothing = [None] * len(captions)
    with_target = examples.target is not None
    columns: dict[str, list[float] | list[None]] = {
        name: reward.tolist() if with_target or name == "clip" else nothing for name, reward in rewards.items()
    }
    columns["naturalness"] = nothing
    if (discriminator := parts.discriminator) is not None:
        mode = discriminator.training
        with parts.devices.autocast():
            columns["naturalness"] = discriminator.eval().score(captions).float().tolist()
        discriminator.train(mode)
    return columns


def start_run(ws: Workspace, inputs: TrainingInputs, meta: Mapping[str, Any]) -> None:
    """Open this run in W&B, or go on in the one that `meta`, the checkpoint's, names."""
    config = run_config(ws.cfg, inputs.made_from) | {"total_steps": inputs.steps}
    step, wandb_id = meta["step"], meta["wandb_id"]
    ws.tracker.start_run(
        ws.run, run_settings(ws.cfg), config=config, job_type=ws.cfg.stage, step=step, wandb_id=wandb_id
    )


def summarize(ws: Workspace, meta: Mapping[str, Any], last: float | None = None) -> None:
    """The best validation, and the last one, into the run's summary."""
    if meta["best_step"]:
        ws.tracker.summarize({"eval/best_CIDEr": meta["best"], "eval/best_step": meta["best_step"]})
    if last is not None:
        ws.tracker.summarize({"eval/last_CIDEr": last})


def report_finished_run(ws: Workspace, inputs: TrainingInputs, meta: Mapping[str, Any]) -> None:
    """Report a run that was trained before to a W&B agent, which waits for a result.

    Without an agent nothing is done.
    """
    if under_agent() and not ws.rank.number:
        start_run(ws, inputs, meta)
        summarize(ws, meta)
        ws.tracker.finish()


def log_checkpoint(ws: Workspace, made_from: Mapping[str, Any], best: Mapping[str, Any]) -> None:
    """The best checkpoint, without what only training needs, as an artifact: `wandb.artifacts` asks for it."""
    run, folder = ws.tracker.wandb, (ws.run / "checkpoints" / "best").resolve()
    if run is None or not ws.cfg.wandb.artifacts:
        return
    files = [
        (str(f.relative_to(folder)), f)
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != "training.safetensors" and not f.name.startswith(".")
    ]
    run.artifact("checkpoint", "checkpoint", files, {**made_from, **best}, "best")


def send_scores(ws: Workspace, scores: Path, made_from: Mapping[str, Any]) -> None:
    """The captioner's scores into its run's summary, `test/CIDEr` and so on, and its captions as an artifact."""
    trained = read_metrics(ws.run / "metrics.jsonl")
    config = run_config(ws.cfg, made_from)
    if trained:  # the start of training has recorded them, and more
        del config["inputs"]
    ws.tracker.open_wandb(
        ws.run, run_settings(ws.cfg), config=config, job_type=None if trained else ws.cfg.stage, rows=trained
    )
    split = ws.cfg.evaluate.split
    ws.tracker.summarize(
        {f"{split}/{metric}": value for metric, value in read_json(scores / "scores.json")["scores"].items()}
    )
    if ws.tracker.wandb is not None and ws.cfg.wandb.artifacts:
        files = [(name, scores / name) for name in ("captions.json", "per_image.json", "scores.json")]
        ws.tracker.wandb.artifact(
            "captions", "predictions", files, made_from, split, uses=("checkpoint", ws.cfg.evaluate.which)
        )
    ws.tracker.finish()
