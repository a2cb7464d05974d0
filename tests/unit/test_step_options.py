"""A step with the options beyond the paper: parts and processes add up, gradients are those of the plain formula."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cgtgan.assets.prompts import Prompts
from cgtgan.config import Config, PromptConfig, RewardTermConfig
from cgtgan.method.consensus import Consensus
from cgtgan.models.discriminator import make_discriminator, pairwise_loss
from cgtgan.stages import train
from cgtgan.training.parts import TrainingParts
from tests.tiny_gan import SENTENCES, one_step, tiny_batch, tiny_parts, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def everything_on() -> tuple[Config, TrainingParts]:
    """Every option that composes with the others, at once."""
    cfg, parts = tiny_parts(kl_weight=0.1, kl="k2")
    cfg.train.baseline, cfg.train.advantage_norm, cfg.train.loss_norm = "leave_one_out", "batch", "tokens"
    terms = {"l1": 0.0, "pmi": 1.0, "prior": 0.1, "entropy": 0.05, "consensus": 0.5}
    cfg.reward_weights.terms = {name: RewardTermConfig(weight) for name, weight in terms.items()}
    cfg.discriminator.loss, cfg.discriminator.reward = "pairwise", "rank"
    cfg.train.ema = 0.9
    parts.average = copy.deepcopy(parts.bundle.model).requires_grad_(False)
    parts.consensus, parts.nearest = (
        Consensus(SENTENCES, [[i] for i in range(len(SENTENCES))]),
        {i: torch.tensor([i % 3, 3]) for i in range(4)},
    )
    parts.pool = torch.randn(20, parts.backbone.dim, generator=torch.Generator().manual_seed(5))
    vectors = torch.randn(len(SENTENCES), parts.backbone.dim, generator=torch.Generator().manual_seed(6))
    config = PromptConfig(kind="retrieval", nearest=2, tokens=40)
    parts.prompts = Prompts(config, vectors, SENTENCES, frozenset(), Path())
    return cfg, parts


def gradients_of(cfg: Config, parts: TrainingParts) -> dict[str, torch.Tensor]:
    """Of one step, before they are clipped and used: Adam's first step would make rounding errors as long as lr."""
    for optimizer in parts.optimizers.values():
        optimizer.apply = lambda step: None
        optimizer.clip = lambda norm: None
    one_step(cfg, parts, 1)
    named = (p for module in parts.modules.values() for p in module.named_parameters())
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_parts_of_a_step_add_up_with_every_option() -> None:
    whole = everything_on()
    split = everything_on()
    split[0].train.accumulation = 3
    one, three = gradients_of(*whole), gradients_of(*split)
    assert one.keys() == three.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(three[name], gradient, rtol=1e-3, atol=2e-7)


def test_the_moving_average_follows_the_weights() -> None:
    cfg, parts = everything_on()
    before = weights(parts.bundle.model)
    distance = one_step(cfg, parts, 1)["train/ema_distance"]
    after, average = weights(parts.bundle.model), weights(parts.averaged.model)
    for name, value in average.items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * after[name])
    names = [name for name, _ in parts.bundle.model.named_parameters()]
    gap = sum((average[n] - after[n]).square().sum() for n in names) / sum(after[n].square().sum() for n in names)
    assert distance == pytest.approx(float(gap) ** 0.5, rel=1e-4)


def test_the_pairwise_gradient_is_that_of_the_formula_and_small_chunks_change_nothing() -> None:
    gradients = []
    for chunk in (2**20, 16):
        cfg, parts = everything_on()
        parts.d_chunk = chunk
        discriminator = parts.discriminator
        assert discriminator is not None
        gradients.append(gradients_of(cfg, parts))
    discriminator.zero_grad()
    samples = parts.last_batch["samples"]
    logits = discriminator.eval()(*discriminator.tokenize([*SENTENCES * 3, *samples]))
    pairwise_loss(logits[:12], logits[12:]).backward()
    for name, p in discriminator.named_parameters():
        if p.grad is not None:
            for gradient in gradients:
                torch.testing.assert_close(gradient[name], p.grad, rtol=1e-4, atol=1e-6)


def test_the_pairwise_loss_does_not_train_the_last_bias() -> None:
    """In exact arithmetic its gradient is 0; what rounding leaves of it, Adam would make a whole step."""
    _, parts = everything_on()
    assert parts.discriminator is not None
    logits = parts.discriminator.eval()(*parts.discriminator.tokenize([*SENTENCES, *(s[:12] for s in SENTENCES)]))
    pairwise_loss(*logits.chunk(2)).backward()
    gradients = {name: p.grad for name, p in parts.discriminator.mlp.named_parameters() if p.grad is not None}
    assert gradients["model.2.bias"].abs().item() < 1e-3 * gradients["model.2.weight"].abs().max().item()
    for loss, trained in (("pairwise", False), ("bce", True)):
        config = replace(Config().discriminator, encoder="scratch", tokenizer="corpus", vocab_size=320, loss=loss)
        discriminator = make_discriminator(config, SENTENCES, 10, seed=0)
        assert {name: p.requires_grad for name, p in discriminator.mlp.named_parameters()} == {
            "model.0.weight": True, "model.0.bias": True, "model.2.weight": True, "model.2.bias": trained,
        }  # fmt: skip


@pytest.mark.parametrize("norm", ["caption", "tokens", "constant"])
def test_the_loss_norm_divides_a_captions_log_prob(norm: str) -> None:
    """The gradient of one output bias, against the plain formula on all captions at once."""
    cfg, parts = tiny_parts(discriminator=False)
    cfg.train.loss_norm, cfg.reward_weights.max_weight = norm, 1.0
    model, batch = parts.bundle.model, tiny_batch(cfg, parts, 1)
    rewarded: dict[str, torch.Tensor] = {}
    kept = train.batch_advantages

    def keep(*given):
        found = kept(*given)
        rewarded.update(found[0])
        return found

    train.batch_advantages = keep
    try:
        gradient = gradients_of(cfg, parts)
    finally:
        train.batch_advantages = kept
    drawn = model.eval().sample_and_greedy(batch.image, batch.seeds)[0].drawn
    model.zero_grad()
    log_probs, mask = model.token_log_probs(batch.image, drawn)
    lengths = mask.sum(-1)
    divisor = {"caption": lengths, "tokens": lengths.sum() / lengths.numel(), "constant": model.max_length}[norm]
    (-(rewarded["total"] * log_probs.sum(-1) / divisor).mean()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradient[name], p.grad, rtol=1e-3, atol=1e-6)
