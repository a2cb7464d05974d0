"""What W&B shows of a run beside its curves: captions of the same validation images at every validation, scores, artifacts."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.assets.aggregated import aggregated_embeddings
from cgtgan.assets.images import dataset_split
from cgtgan.assets.released import released_aggregated
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, WandbConfig, as_dict, variant_name
from cgtgan.data.corpora import embedded_text
from cgtgan.method.rewards import semantic_reward
from cgtgan.reporting.pictures import UNREADABLE, embed
from cgtgan.runtime.artifacts import Embeddings, atomic_path, read_json
from cgtgan.runtime.tracking import read_metrics
from cgtgan.runtime.versions import code_version
from cgtgan.training.parts import Players
from cgtgan.training.validation import Validation

EXAMPLES = 32
SIDE = 200  # longest side of a picture, in pixels
TABLE = "eval/captions"
REWARDS = ("cos", "l1", "clip", "semantic", "naturalness")
COLUMNS = ("image", "picture", "caption", "references", "CIDEr", *REWARDS)


def run_settings(cfg: Config) -> WandbConfig:
    """`cfg.wandb` with the tags that every run has: experiment, corpus, backbone and reward."""
    own = (cfg.name, cfg.corpus.name, cfg.clip_backbone.name, cfg.reward_weights.name)
    return replace(cfg.wandb, tags=list(dict.fromkeys([*cfg.wandb.tags, *(tag.replace("/", "-")[:64] for tag in own)])))


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
    """The same images for every run on these images; None where W&B is disabled. The pictures are the first process's."""
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
    """Small files of the pictures, made once; None where there is no file, as with the authors' embeddings, or it cannot be read."""
    files, folder = (
        {record.image_id: record.path for record in dataset_split(ws, "val").images},
        ws.run / "validation" / "pictures",
    )
    made: list[Path | None] = []
    for number, image_id in enumerate(ids):
        found = next(folder.glob(f"{number:02d}.*"), None)
        try:
            made.append(found or _thumbnail(files[image_id], folder / f"{number:02d}"))
        except (KeyError, *UNREADABLE):
            made.append(None)
    return made


def _thumbnail(path: Path, to: Path) -> Path:
    kind, _, content = embed(path, SIDE)[0].removeprefix("data:image/").partition(";base64,")
    with atomic_path(to.with_suffix(f".{kind}")) as beside:
        beside.write_bytes(base64.b64decode(content))
    return to.with_suffix(f".{kind}")


@torch.no_grad()
def log_captions(ws: Workspace, players: Players, examples: Examples | None, found: Validation, step: int) -> None:
    """The table of this validation. Draws no random number and leaves every module in its mode: training goes on as without W&B."""
    run = ws.tracker.wandb
    if run is None or examples is None:
        return
    captions = [found.captions[i] for i in examples.ids]
    columns = _rewards(ws.cfg, players, examples, captions)
    references = dataset_split(ws, "val").references
    rows = [
        [
            str(i),
            picture,
            caption,
            "\n".join(references[i]),
            found.per_image.get(i),
            *(columns[name][n] for name in REWARDS),
        ]
        for n, (i, picture, caption) in enumerate(zip(examples.ids, examples.pictures, captions, strict=True))
    ]
    run.table(step, TABLE, COLUMNS, rows)


def _rewards(cfg: Config, players: Players, examples: Examples, captions: list[str]) -> dict[str, list[float | None]]:
    device, weights = players.devices.device, cfg.reward_weights
    image, target = examples.image, examples.image if examples.target is None else examples.target
    target = F.normalize(target, dim=-1) if "l1_target" in cfg.train.released else target
    with players.devices.autocast():
        embedded = players.backbone.encode_texts([embedded_text(text) for text in captions], players.clip_batch).to(
            device
        )
    fit = semantic_reward(
        embedded, target.to(device), image.to(device), cos_weight=weights.cos_weight, clip_weight=weights.clip_weight,
        logit_scale=cfg.train.reward_scale or players.backbone.logit_scale,
    )  # fmt: skip
    nothing: list[float | None] = [None] * len(captions)
    aimed = {"cos": fit.cos, "l1": fit.l1, "semantic": fit.total} if examples.target is not None else {}
    columns = dict.fromkeys(REWARDS, nothing) | {
        name: column.tolist() for name, column in {**aimed, "clip": fit.clip}.items()
    }
    if (discriminator := players.discriminator) is not None:
        mode = discriminator.training
        with players.devices.autocast():
            columns["naturalness"] = discriminator.eval().score(captions).float().tolist()
        discriminator.train(mode)
    return columns


def log_checkpoint(ws: Workspace, made_from: Mapping[str, Any], best: Mapping[str, Any]) -> None:
    """The best checkpoint, without what only training needs, as an artifact: `wandb.artifacts` asks for it."""
    run, folder = ws.tracker.wandb, (ws.run / "checkpoints" / "best").resolve()
    if run is None or not ws.cfg.wandb.artifacts:
        return
    files = [
        (str(f.relative_to(folder)), f)
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != "training.safetensors"
    ]
    run.artifact("checkpoint", "checkpoint", files, {**made_from, **best}, "best")


def send_scores(ws: Workspace, scores: Path, made_from: Mapping[str, Any]) -> None:
    """The captioner's scores into the summary of the run that trained it, `test/CIDEr` and so on, and its captions as an artifact."""
    trained = read_metrics(ws.run / "metrics.jsonl")
    config = run_config(ws.cfg, made_from)
    if trained:  # its own start has said them, and more
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
