"""Everything a step of the GAN needs, tiny, for tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cgtgan.assets.optimizer import Optimizer
from cgtgan.assets.reader import Reader
from cgtgan.config import Config, DemoClipConfig, DiscriminatorConfig, GeneratorConfig, OptimizerConfig
from cgtgan.method.batches import sampling_seeds
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.models.demo_clip import DemoClip
from cgtgan.models.discriminator import make_discriminator
from cgtgan.models.generator_bundle import make_generator, make_tokenizer
from cgtgan.models.tokenizers import END_OF_TEXT, train_tokenizer
from cgtgan.stages.train import gan_step
from cgtgan.training.batches import Batch
from cgtgan.training.parts import TrainingParts

SENTENCES = [
    "A red dog runs over the grass.",
    "Two cats sleep on a blue sofa.",
    "A man rides a horse.",
    "The sea is calm.",
]


def tiny_parts(
    *,
    mapper: str = "mlp",
    dropout: bool = False,
    kl_weight: float = 0.0,
    kl: str = "k3",
    discriminator: bool = True,
    lr: float = 1e-3,
) -> tuple[Config, TrainingParts]:
    """Everything a step of the GAN needs, tiny, from seed 0."""
    cfg = Config()
    sizes: dict[str, Any] = {"tokenizer": "corpus", "vocab_size": 300, "width": 16, "heads": 2}
    prefix: dict[str, Any] = {
        "mapper": mapper,
        "prefix_length": 3,
        "clip_length": 2,
        "mapper_layers": 1,
        "mapper_heads": 2,
    }
    cfg.generator = GeneratorConfig(language_model="scratch", layers=2, max_length=6, **sizes, **prefix)
    cfg.discriminator = DiscriminatorConfig(encoder="scratch", layers=1, **sizes)
    cfg.reward_weights.delay_steps, cfg.reward_weights.ramp_steps = 0, 0
    cfg.train.dropout, cfg.train.num_samples = dropout, 3
    cfg.train.kl_weight, cfg.train.kl = kl_weight, kl
    rate = OptimizerConfig(lr=lr)
    clip = DemoClipConfig(dim=8, width=8, text_layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = DemoBackbone(DemoClip(clip, train_tokenizer(SENTENCES, 300, [END_OF_TEXT]), 32), torch.device("cpu"))
    bundle = make_generator(cfg.generator, make_tokenizer(cfg.generator, SENTENCES), backbone.dim, seed=1)
    reference = copy.deepcopy(bundle.model).eval().requires_grad_(False) if kl_weight else None
    parts = TrainingParts(bundle, reference, None, backbone, Optimizer(bundle.model, rate, 10), None)
    if discriminator:
        parts.discriminator = make_discriminator(cfg.discriminator, SENTENCES, cfg.generator.max_length, seed=2)
        parts.d_optimizer = Optimizer(parts.discriminator, rate, 10)
    return cfg, parts


def step_inputs(parts: TrainingParts, step: int) -> Tensor:
    """Images and aggregated texts (2, 4, D)"""
    return torch.randn(2, 4, parts.backbone.dim, generator=torch.Generator().manual_seed(step))


def tiny_batch(cfg: Config, parts: TrainingParts, step: int) -> Batch:
    image, target = step_inputs(parts, step)
    seeds = sampling_seeds(0, step, range(4), cfg.train.num_samples)
    read = Reader(parts.bundle, parts.gap, parts.prompts).images(image)
    return Batch(list(range(4)), image, target, seeds, SENTENCES * 3, 4, read)


def one_step(cfg: Config, parts: TrainingParts, step: int, *, logged: bool = True) -> dict[str, float]:
    """The metrics of a step, without those of the clock."""
    metrics = gan_step(cfg, parts, step, tiny_batch(cfg, parts, step), logged=logged)
    clock = ("time/", "memory/", "train/seconds", "train/images_per_second")
    return {k: v for k, v in metrics.items() if not k.startswith(clock)}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
