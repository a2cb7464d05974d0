"""What a training step changes or asks: generator, discriminator, CLIP, reward terms, optimisers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cgtgan.assets.backbone import open_backbone
from cgtgan.assets.consensus import documents, nearest_rows
from cgtgan.assets.gap import ReadImages, gap_of
from cgtgan.assets.generators import initial_generator
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.optimizer import Optimizer
from cgtgan.assets.prompts import Prompts, prompts_of
from cgtgan.assets.reader import PromptedImages, read_images
from cgtgan.assets.workspace import Workspace
from cgtgan.errors import InputError
from cgtgan.method.batches import EpochOrder, stable_seed
from cgtgan.method.consensus import Consensus
from cgtgan.method.gap import Gap
from cgtgan.method.reward_terms import OF_IMAGES, OF_PRIOR, RewardTerm
from cgtgan.models.attention import use_float32_attention
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.models.discriminator import Discriminator, make_discriminator
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.runtime.artifacts import write_json
from cgtgan.runtime.devices import Devices, keep_freed_memory, tokens_that_fit
from cgtgan.training.own_terms import load_own_terms


@dataclass
class TrainingParts:
    """Everything a step changes, or asks."""

    bundle: GeneratorBundle
    reference: CaptionGenerator | None  # the initial generator, for the KL penalty and for watching the distance to it
    discriminator: Discriminator | None
    backbone: ClipBackbone
    g_optimizer: Optimizer
    d_optimizer: Optimizer | None
    devices: Devices = field(default_factory=Devices)
    g_chunk: int = 2**20  # positions whose states may be kept at once for a backward pass
    d_chunk: int = 2**20
    own_terms: Mapping[str, RewardTerm] = field(default_factory=dict)
    run: Path = Path()
    last_batch: dict[str, Any] = field(default_factory=dict)  # captions and sentences of the step, should it go wrong
    pool: torch.Tensor | None = None  # (J, D) float32: unlabelled images that the term `pmi` compares a caption with
    average: CaptionGenerator | None = None  # moving average of the generator's weights, which is scored and kept
    gap: Gap = field(default_factory=Gap)
    consensus: Consensus | None = None  # of the term `consensus`, with the nearest sentences' rows (k,) by image id
    nearest: Mapping[Any, torch.Tensor] | None = None
    prompts: Prompts | None = None
    # split -> its images as the generator reads them, for those that it does not read as they are
    read: Mapping[str, ReadImages | PromptedImages] = field(default_factory=dict)

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        both = {"generator": self.bundle.model, "discriminator": self.discriminator}
        return {name: module for name, module in both.items() if module is not None}

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        both = {"generator": self.g_optimizer, "discriminator": self.d_optimizer}
        return {name: optimizer for name, optimizer in both.items() if optimizer is not None}

    @property
    def averaged(self) -> GeneratorBundle:
        """The generator that is scored and kept: the moving average of its weights, if there is one."""
        return self.bundle if self.average is None else replace(self.bundle, model=self.average)

    @torch.no_grad()
    def update_average(self, decay: float) -> float:
        """average = decay * average + (1 - decay) * weights; returns the distance, relative to the weights' length."""
        assert self.average is not None
        distance = length = 0.0
        for mean, weight in zip(self.average.parameters(), self.bundle.model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
            distance += (mean - weight).square().sum()
            length += weight.square().sum()
        return float((distance / length) ** 0.5)

    @property
    def clip_batch(self) -> int:
        """Captions per CLIP batch; few on a CPU, where a batch of like lengths saves more than a large one."""
        return 256 if self.devices.device.type == "cuda" else 32

    def check_finite(self, name: str, optimizer: Optimizer, step: int, metrics: Mapping[str, float]) -> None:
        """Raise `InputError` before an update whose losses or gradient are not finite; the step's batch is saved."""
        losses = {"generator": ("semantic_loss", "naturalness_loss", "kl", "kl_loss"), "discriminator": ("d_loss",)}[
            name
        ]
        watched = {f"train/{x}": metrics[f"train/{x}"] for x in losses if f"train/{x}" in metrics}
        watched[f"{name}'s gradient norm"] = metrics[f"train/{name[0]}_grad_norm"]
        if all(map(math.isfinite, watched.values())):
            return
        file = self.run / f"not_finite_step_{step:06d}_process_{self.devices.number}.json"
        write_json(file, {"step": step, "metrics": {k: str(v) for k, v in metrics.items()}, **self.last_batch})
        try:
            optimizer.check(step, watched)
        except InputError as error:
            raise InputError(
                f"{error} (train.{name}_optimizer.lr). No weight was changed; the step's batch is in {file}"
            ) from None


def make_training_parts(ws: Workspace, sentences: Sequence[str], steps: int, dim: int, precision: str) -> TrainingParts:
    """Everything for `steps` steps on image embeddings of `dim` numbers.

    Raises `InputError` if the generator does not fit.
    """
    t = ws.cfg.train
    if ws.device.type == "cpu":
        keep_freed_memory()
    bundle = _generator(ws, dim)
    reference = None
    if t.kl_weight or t.watch_kl or any(name in OF_PRIOR for name in ws.cfg.reward_weights.terms):
        reference = initial_generator(ws, ws.devices).model.to(ws.device).eval().requires_grad_(False)
    discriminator, d_optimizer, d_chunk = None, None, 1
    if t.use_discriminator:
        seed = stable_seed(ws.cfg.seed, "discriminator")
        discriminator = make_discriminator(ws.cfg.discriminator, sentences, ws.cfg.generator.max_length, seed)
        discriminator.to(ws.device)
        d_optimizer = Optimizer(discriminator, t.discriminator_optimizer, steps)
        encoder = discriminator.text_encoder.config
        d_chunk = tokens_that_fit(encoder.num_hidden_layers, encoder.hidden_size, 0, t.memory_gb, ws.device)
    if precision == "bf16" and ws.device.type == "cpu":
        use_float32_attention(bundle.model.gpt, *([discriminator.text_encoder] if discriminator is not None else []))
    g_optimizer = Optimizer(bundle.model, t.generator_optimizer, steps)
    lm = bundle.model.gpt.config
    layers = 1 if t.gradient_checkpointing else lm.num_hidden_layers
    g_chunk = tokens_that_fit(layers, lm.hidden_size, lm.vocab_size, t.memory_gb, ws.device)
    backbone = open_backbone(ws)
    ws.devices.precision = precision
    bundle.model.decode_cache = ws.cfg.decode.cache
    parts = TrainingParts(bundle, reference, discriminator, backbone, g_optimizer, d_optimizer, ws.devices)
    parts.g_chunk, parts.d_chunk = g_chunk, d_chunk
    parts.own_terms, parts.run = load_own_terms(ws.cfg.reward_weights), ws.run
    parts.gap, parts.prompts = gap_of(ws), prompts_of(ws)
    read = {split: read_images(ws, split, bundle) for split in ("train", "val")}
    parts.read = {split: images for split, images in read.items() if images is not None}
    if any(name in OF_IMAGES for name in ws.cfg.reward_weights.terms):
        parts.pool = _pool(ws)
    if "consensus" in ws.cfg.reward_weights.terms:
        ids, rows = image_embeddings(ws, "train").ids, nearest_rows(ws, "train", ws.cfg.reward_weights.neighbours)
        parts.consensus = Consensus(sentences, documents(ws).tolist())
        parts.nearest = dict(zip(ids, rows, strict=True))
    if t.ema is not None:
        parts.average = copy.deepcopy(bundle.model).requires_grad_(False)
    return parts


def _pool(ws: Workspace) -> torch.Tensor:
    """Embeddings of `reward_weights.pool` training images, drawn by the seed; all of them where there are fewer."""
    vectors = image_embeddings(ws, "train").vectors
    count = min(ws.cfg.reward_weights.pool, len(vectors))
    rows = EpochOrder(len(vectors), ws.cfg.seed, "pool").batch(1, count)
    return vectors[torch.from_numpy(rows)].float().to(ws.device)


def _generator(ws: Workspace, dim: int) -> GeneratorBundle:
    cfg, t = ws.cfg, ws.cfg.train
    bundle = initial_generator(ws, ws.devices)
    bundle.model.to(ws.device).eval()
    if (bundle.clip_dim, bundle.config.max_length) != (dim, cfg.generator.max_length):
        raise InputError(
            f"train.init_from={t.init_from} reads {bundle.clip_dim} numbers and writes {bundle.config.max_length} "
            f"tokens; the images have {dim} and generator.max_length={cfg.generator.max_length}: use the backbone and "
            "the length it was made with"
        )
    if t.gradient_checkpointing:
        bundle.model.enable_gradient_checkpointing()
    return bundle
