"""The run's frozen CLIP. The demo's is trained here, contrastively on drawn pairs, when first needed, and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from cgtgan.assets.optimizer import Optimizer
from cgtgan.assets.training_state import load_state, save_state, state_tensors
from cgtgan.assets.workspace import Workspace
from cgtgan.config import ClipBackboneConfig, DemoClipConfig, DemoWorldConfig, OptimizerConfig, as_dict
from cgtgan.data import demo_world
from cgtgan.data.demo_world import DemoWorld
from cgtgan.errors import InputError, MissingFileError
from cgtgan.method.batches import EpochOrder, stable_seed
from cgtgan.models.backbone_identity import backbone_identity
from cgtgan.models.clip_backbone import ClipBackbone, DemoBackbone
from cgtgan.models.clip_inputs import normalise
from cgtgan.models.custom_backbone import absolute_spec
from cgtgan.models.demo_clip import DemoClip, contrastive_loss
from cgtgan.models.load_backbone import load_backbone
from cgtgan.models.tokenizers import END_OF_TEXT, TextTokenizer, train_tokenizer
from cgtgan.models.weights import pinned
from cgtgan.runtime.artifacts import atomic_path
from cgtgan.runtime.devices import Devices, best_precision, keep_freed_memory
from cgtgan.runtime.producers import settings_of, with_format

DEMO_CLIP_FORMAT = 1  # raise it where the same settings train another CLIP (runtime/producers.py)
CHECKPOINTS = 10  # of the contrastive training, evenly spread


def backbone_producer(ws: Workspace) -> dict[str, Any]:
    """What an artifact made with the run's backbone must record of it."""
    config = ws.cfg.clip_backbone
    if config.kind == "demo":
        world = ws.cfg.dataset.world
        demo = replace(config.demo, precision=best_precision(config.demo.precision, ws.device))
        groups = {"lookalikes": demo_world.LOOKALIKES_FORMAT} if demo.group > 1 else {}
        return {
            "kind": "demo",
            "clip": with_format(settings_of(demo), DEMO_CLIP_FORMAT) | groups,
            "world": with_format({"seed": world.seed, "image_size": world.image_size}, demo_world.FORMAT_VERSION),
        }
    return ws.once("backbone identity", lambda: backbone_identity(config, ws.store.root / "fingerprints"))


def open_backbone(ws: Workspace) -> ClipBackbone:
    """The run's backbone, loaded once per workspace: an archive of a gigabyte takes longer than many splits."""
    return ws.once("backbone", lambda: _opened(ws))


def _opened(ws: Workspace) -> ClipBackbone:
    config = ws.cfg.clip_backbone
    if config.kind != "demo":
        return load_backbone(config, ws.device)
    folder = ws.store.path("clip", backbone_producer(ws), "")
    ws.store.make(folder, lambda path: _train_demo_clip(ws, path))
    return DemoBackbone(load_demo_clip(folder), ws.device)


def save_demo_clip(folder: Path, model: DemoClip) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / "clip.safetensors"))
    (folder / "tokenizer.json").write_text(model.tokenizer.to_json(), encoding="utf-8")
    (folder / "clip.json").write_text(
        json.dumps({"config": as_dict(model.config), "image_size": model.image_size}), encoding="utf-8"
    )


def load_demo_clip(folder: Path) -> DemoClip:
    try:
        description = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
        tokenizer = TextTokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = DemoClip(DemoClipConfig(**description["config"]), tokenizer, description["image_size"])
        load_model(model, str(folder / "clip.safetensors"))
    except FileNotFoundError as e:
        raise MissingFileError(
            f"{e.filename} is missing: remove the folder {folder} and the demo's CLIP is trained again"
        ) from None
    except Exception as e:  # every way in which foreign bytes can fail to be a model
        raise InputError(
            f"{folder} is not a whole demo CLIP ({type(e).__name__}: {e}): remove it and it is trained again"
        ) from None
    return model


def reopen_backbone(
    description: dict[str, Any], folder: Path, device: torch.device, made_from: dict[str, Any] | None = None
) -> ClipBackbone:
    """The backbone that a checkpoint names: its config as `description`, the demo's weights in `folder`.

    made_from: what told it from others when the checkpoint was written; version 0.1 did not say it. Raises `InputError`
    where the weights are others now.
    """
    if (folder / "clip.json").is_file():
        return DemoBackbone(load_demo_clip(folder), device)
    fields: dict[str, Any] = dict(description, demo=DemoClipConfig(**description["demo"]))
    config = ClipBackboneConfig(**fields)
    backbone = load_backbone(config, device)
    if made_from and config.kind in ("openai", "huggingface", "open_clip") and made_from != backbone_identity(config):
        raise InputError(
            f"{folder.parent} was made with another CLIP than clip_backbone.model={config.model} is now: put back the "
            "files that were there, or train again"
        )
    return backbone


def backbone_description(config: ClipBackboneConfig) -> dict[str, Any]:
    """What a checkpoint stores of its backbone, for `reopen_backbone` in any working directory, after any commit."""
    description = as_dict(config)
    if config.kind == "custom":
        description["model"] = absolute_spec(config.model)
    elif config.kind == "huggingface" or Path(config.model).expanduser().is_file():
        description["model"] = pinned(config.model)
    return description


def _draw_pairs(
    c: DemoClipConfig, world: DemoWorldConfig, on_pair: Callable[[], object]
) -> tuple[Tensor, list[list[str]]]:
    """(pairs, 3, H, W) uint8 and the captions of each picture, from the world's clip pool"""
    images = torch.empty(c.pairs, 3, world.image_size, world.image_size, dtype=torch.uint8)
    captions: list[list[str]] = []
    for i, (image, texts) in enumerate(DemoWorld(world).clip_pairs(c.pairs, c.seed, c.group)):
        images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        captions.append(texts)
        on_pair()
    return images, captions


def _train_demo_clip(ws: Workspace, path: Path) -> None:
    c, world = ws.cfg.clip_backbone.demo, ws.cfg.dataset.world
    with ws.tracker.progress("demo CLIP: drawing pairs", c.pairs) as bar:
        images, captions = _draw_pairs(c, world, bar.advance)
    tokenizer = train_tokenizer((t.lower() for texts in captions for t in texts), 1000, [END_OF_TEXT])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(c.seed, "demo clip"))
        model = DemoClip(c, tokenizer, world.image_size).to(ws.device)
    tokens = [model.tokens(texts) for texts in captions]
    schedule = OptimizerConfig(lr=c.lr, warmup_steps=50, final_lr_ratio=0.01, weight_decay=0.1)
    optimizer = Optimizer(model, schedule, c.steps)
    order = EpochOrder(c.pairs // c.group, c.seed, "demo clip pairs")
    devices = Devices(ws.device, best_precision(c.precision, ws.device))
    if ws.device.type == "cpu":
        keep_freed_memory()
    layout = torch.channels_last if devices.precision == "bf16" else torch.contiguous_format
    state = path.with_name(f"{path.name}.training")
    done = load_state(state, {"clip": model}, {"clip": optimizer})["step"] if state.is_file() else 0
    with ws.tracker.progress("demo CLIP: training", c.steps, done) as bar:
        for step in range(done + 1, c.steps + 1):
            groups = order.batch(step, c.batch_size // c.group)
            rows = (groups[:, None] * c.group + np.arange(c.group)).ravel()
            pixels = normalise(images[torch.from_numpy(rows)].to(ws.device))
            texts = [tokens[i][stable_seed(c.seed, step, i) % len(tokens[i])] for i in rows]
            with devices.autocast():  # the image tower is half of a step; the text tower gains nothing
                image = model.encode_image(pixels.contiguous(memory_format=layout))
            loss = contrastive_loss(image.float(), model.encode_tokens(texts), c.logit_scale)
            optimizer.step(loss, step)
            if step % max(1, c.steps // CHECKPOINTS) == 0 and step < c.steps:
                with atomic_path(state) as temporary:
                    save_state(temporary, state_tensors({"clip": model}, {"clip": optimizer}), {"step": step})
            bar.advance(note=f"loss {loss.item():.2f}")
    with atomic_path(path) as temporary:
        save_demo_clip(temporary, model)
    state.unlink(missing_ok=True)
