"""Variety, length and repetition of captions by hand-counted examples, and when a collapse is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cgtgan.assets.optimizer import Optimizer
from cgtgan.config import Config, OptimizerConfig, RewardTermConfig
from cgtgan.method.batches import sampling_seeds
from cgtgan.method.reward_terms import RewardInputs
from cgtgan.models.chunks import pad_rows
from cgtgan.stages.train import gan_step
from cgtgan.training.health import COLLAPSES, Health, caption_metrics, most_frequent
from cgtgan.training.parts import TrainingParts
from tests.tiny_gan import SENTENCES, tiny_batch, tiny_parts

pytestmark = pytest.mark.usefixtures("one_thread")


def test_distinct_and_identical_by_hand() -> None:
    found = caption_metrics(["a dog runs.", "a dog sits."], [])  # words are split at blanks: a full stop belongs to one
    assert (found["caption/distinct_1"], found["caption/distinct_2"]) == (4 / 6, 3 / 4)
    assert caption_metrics(["a", "b"], [])["caption/distinct_2"] == 0
    assert caption_metrics([], [])["caption/distinct_1"] == 0
    assert most_frequent(["x", "y", "x", "x"]) == 0.75
    found = caption_metrics(["x y", "x y", "z z"], ["g", "g"], ["a b c d", "a b"])
    assert found == {
        "caption/distinct_1": 3 / 6, "caption/distinct_2": 2 / 3,
        "caption/identical": pytest.approx(1 / 3), "caption/greedy_most_frequent": 1.0,
        "caption/stutter": pytest.approx(1 / 3), "caption/length_ratio": pytest.approx(2 / 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_named_once_it_has_lasted_and_again_after_it_was_gone(name: str) -> None:
    collapse = COLLAPSES[name]
    bad = {metric: low if math.isinf(high) else (low + high) / 2 for metric, (low, high) in collapse.bounds.items()}
    good = {metric: high + 1 if low <= 0 or high < 1 else low - 1 for metric, (low, high) in collapse.bounds.items()}
    health = Health()
    messages = {step: health.update(step, bad) for step in range(10, 200, 10)}
    (due,) = [step for step, texts in messages.items() if texts]
    assert due - 10 <= 30  # with the usual log_every
    (text,) = messages[due]
    assert "since step 10" in text
    assert all(metric in text for metric in bad)
    assert any(knob in text for knob in ("train.", "initialize.", "reward_weights."))
    assert health.update(200, good) == []
    assert name not in health.since
    assert health.update(201, bad) == []
    resumed = Health(dict(health.since))
    assert resumed.update(201 + collapse.steps - 1, bad) == []
    assert len(resumed.update(201 + collapse.steps, bad)) == 1


def test_a_metric_that_is_not_there_is_no_collapse() -> None:
    health = Health()
    assert not any(health.update(step, {}) for step in range(100))
    assert not any(health.update(step, {"train/d_loss": 0.693}) for step in range(100))  # the other half is missing


# ------------------------------------------------------------------------------------------------ produced on purpose

Words = Callable[[str], float]


def reward(points: Words) -> Callable[[RewardInputs], Tensor]:
    return lambda inputs: torch.tensor([points(text) for text in inputs.texts])


PERVERSE: dict[str, Words] = {
    "no end": lambda text: 1.0 * len(text),
    "run on": lambda text: 1.0 * len(text.split()),
    "stutter": lambda text: 10.0 * sum(a == b for a, b in pairwise(text.split())),
    "too short": lambda text: -1.0 * len(text.split()),
    "one caption": lambda text: 20.0 * SequenceMatcher(None, text, SENTENCES[2]).ratio(),
}


def taught(**options: Any) -> tuple[Config, TrainingParts]:
    """A generator that has learned a sentence for each of four images: nothing has collapsed."""
    cfg, parts = tiny_parts(lr=3e-3, **options)
    model = parts.bundle.model
    model.max_length = 24
    tokens, mask = pad_rows(parts.bundle.tokenizer.encode(SENTENCES))
    images = tiny_batch(cfg, parts, 1).image
    optimizer, noise = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout draws from the process's own generator, wherever earlier tests left it
        for _ in range(80):
            optimizer.zero_grad()
            read = images + 0.5 * torch.randn(images.shape, generator=noise)
            model.reconstruction_loss(read, tokens, mask).backward()
            optimizer.step()
    return cfg, parts


def metrics_of(cfg: Config, parts: TrainingParts, step: int) -> dict[str, float]:
    seeds = sampling_seeds(0, step, range(4), cfg.train.num_samples)
    return gan_step(cfg, parts, step, replace(tiny_batch(cfg, parts, 1), seeds=seeds))


def first_message(cfg: Config, parts: TrainingParts, name: str, steps: int = 80) -> tuple[int, int]:
    """(the step from which the collapse `name` is seen, the step at which it is named)"""
    health = Health()
    for step in range(1, steps):
        messages = health.update(step, metrics_of(cfg, parts, step))
        if any(message.startswith(COLLAPSES[name].message[:30]) for message in messages):
            return health.since[name], step
    raise AssertionError(f"{name} is not named in {steps} steps")


@pytest.mark.parametrize("name", PERVERSE)
def test_a_reward_that_pays_for_it_is_named_within_30_steps(name: str) -> None:
    cfg, parts = taught(discriminator=False)
    cfg.reward_weights.max_weight = 1.0
    cfg.reward_weights.terms = {"cos": RewardTermConfig(0.0), "l1": RewardTermConfig(0.0), name: RewardTermConfig(1.0)}
    parts.own_terms = {name: reward(PERVERSE[name])}
    healthy = metrics_of(cfg, parts, 1)
    assert not any(collapse.seen(healthy) for collapse in COLLAPSES.values())
    begun, named = first_message(cfg, parts, name)
    assert named - begun <= 30


def test_a_dead_discriminator_is_named_within_30_steps() -> None:
    cfg, parts = taught()
    assert parts.discriminator is not None
    with torch.no_grad():
        parts.discriminator.mlp.model[2].weight.zero_()
        parts.discriminator.mlp.model[2].bias.zero_()
    parts.d_optimizer = Optimizer(parts.discriminator, OptimizerConfig(lr=1e-9), 100)
    begun, named = first_message(cfg, parts, "discriminator dead")
    assert (begun, named) == (1, 21)
