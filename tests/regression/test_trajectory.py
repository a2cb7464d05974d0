"""Twenty steps of the GAN on one thread: losses, rewards and gradient norms are as stored.

After a change that is meant to change them, `PYTHONPATH=. python tests/regression/test_trajectory.py` stores them anew;
say why in the commit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from cgtgan.assets.optimizer import Optimizer
from cgtgan.config import Config, DemoClipConfig, DiscriminatorConfig, GeneratorConfig, OptimizerConfig
from cgtgan.method.batches import EpochOrder, sampling_seeds
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.models.demo_clip import DemoClip
from cgtgan.models.discriminator import make_discriminator
from cgtgan.models.generator_bundle import make_generator, make_tokenizer
from cgtgan.models.tokenizers import END_OF_TEXT, train_tokenizer
from cgtgan.stages.train import gan_step
from cgtgan.training.batches import Batch
from cgtgan.training.parts import TrainingParts

STORED = Path(__file__).with_name("trajectory.json")
STEPS, IMAGES = 20, 6
CLOCK = ("time/", "memory/", "train/seconds", "train/images_per_second")
SENTENCES = [
    f"A {size} {colour} {shape} is {where} a {other}."
    for size in ("small", "large")
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square")
    for where in ("above", "below")
    for other in ("star", "cross")
]


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def trajectory() -> list[dict[str, float]]:
    torch.set_num_threads(1)
    cfg = Config()
    small: dict[str, Any] = {"tokenizer": "corpus", "vocab_size": 320, "width": 32, "heads": 4, "layers": 2}
    cfg.generator = GeneratorConfig(language_model="scratch", prefix_length=3, max_length=10, **small)
    cfg.discriminator = DiscriminatorConfig(encoder="scratch", **small)
    cfg.reward_weights.delay_steps, cfg.reward_weights.ramp_steps = 4, 8
    cfg.train.num_samples, cfg.train.reward_scale = 4, 20.0
    torch.manual_seed(0)
    clip = DemoClip(DemoClipConfig(dim=16, width=8, text_layers=1), train_tokenizer(SENTENCES, 300, [END_OF_TEXT]), 32)
    backbone = DemoBackbone(clip, torch.device("cpu"))
    bundle = make_generator(cfg.generator, make_tokenizer(cfg.generator, SENTENCES), backbone.dim, seed=1)
    discriminator = make_discriminator(cfg.discriminator, SENTENCES, cfg.generator.max_length, seed=2)
    recipe = OptimizerConfig(lr=1e-3, warmup_steps=3)
    g_optimizer, d_optimizer = Optimizer(bundle.model, recipe, STEPS), Optimizer(discriminator, recipe, STEPS)
    parts = TrainingParts(bundle, None, discriminator, backbone, g_optimizer, d_optimizer)
    noise = torch.Generator().manual_seed(3)
    images, targets = torch.randn(2, 40, backbone.dim, generator=noise)
    order, texts = EpochOrder(40, 0, "images"), EpochOrder(len(SENTENCES), 0, "real")
    rows = []
    for step in range(1, STEPS + 1):
        chosen = order.batch(step, IMAGES)
        index = torch.from_numpy(chosen)
        seeds = sampling_seeds(0, step, chosen.tolist(), cfg.train.num_samples)
        real = [SENTENCES[i] for i in texts.batch(step, IMAGES * cfg.train.num_samples)]
        row = gan_step(cfg, parts, step, Batch(chosen.tolist(), images[index], targets[index], seeds, real, IMAGES))
        rows.append({k: v for k, v in row.items() if not k.startswith(CLOCK)})
    return rows


def test_twenty_steps_are_as_stored() -> None:
    stored = json.loads(STORED.read_text())
    assert stored["versions"] == versions(), (
        "other libraries: look whether the trajectory still holds, and store it anew"
    )
    for step, (found, wanted) in enumerate(zip(trajectory(), stored["rows"], strict=True), start=1):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4), f"step {step}"


if __name__ == "__main__":
    STORED.write_text(json.dumps({"versions": versions(), "rows": trajectory()}, indent=1) + "\n")
    sys.exit(f"stored {STORED}")
