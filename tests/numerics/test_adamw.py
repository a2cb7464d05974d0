"""The optimiser: torch's AdamW as the golden file has it, what is decayed, clipping, and the schedule inside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from cgtgan.assets.optimizer import Optimizer
from cgtgan.config import OptimizerConfig
from cgtgan.models.mapper import TransformerMapper

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


class OneMatrix(nn.Module):
    def __init__(self, value: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))


@pytest.mark.parametrize(
    ("case", "eps", "decay"), [("cgtgan", 1e-8, 0.05), ("init", 1e-6, 0.05), ("nodecay", 1e-8, 0.0)]
)
def test_golden(case: str, eps: float, decay: float) -> None:
    """Six gradients from 1e-6 to 20 in size: epsilon and decay of torch's update differ from those of transformers'."""
    golden = np.load(GOLDEN / "adamw.npz")
    module = OneMatrix(golden["p0"])
    optimizer = Optimizer(module, OptimizerConfig(lr=0.01, eps=eps, weight_decay=decay, grad_clip=0.0), 6)
    for step, (gradient, expected, old) in enumerate(
        zip(golden["grads"], golden[f"{case}_torch"], golden[f"{case}_hf"], strict=True), 1
    ):
        optimizer.step((module.weight * torch.tensor(gradient)).sum(), step)
        found = module.weight.detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)
        if step == 1:
            assert np.abs(found - old).max() > 1e-6


@pytest.mark.parametrize(
    ("case", "eps", "decay"), [("cgtgan", 1e-8, 0.05), ("init", 1e-6, 0.05), ("nodecay", 1e-8, 0.0)]
)
def test_golden_released(case: str, eps: float, decay: float) -> None:
    golden = np.load(GOLDEN / "adamw.npz")
    module = OneMatrix(golden["p0"])
    config = OptimizerConfig(lr=0.01, eps=eps, weight_decay=decay, grad_clip=0.0, released_adamw=True)
    optimizer = Optimizer(module, config, 6)
    for step, (gradient, expected) in enumerate(zip(golden["grads"], golden[f"{case}_hf"], strict=True), 1):
        optimizer.step((module.weight * torch.tensor(gradient)).sum(), step)
        np.testing.assert_allclose(module.weight.detach().numpy(), expected, rtol=0, atol=2e-7)


def test_released_decay_takes_the_norms_that_its_name_filter_misses() -> None:
    moved, still = decayed(
        GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16)), released=True
    )
    assert {"transformer.h.0.ln_1.weight", "transformer.ln_f.weight"} <= moved
    assert all("bias" in name for name in still)
    moved, still = decayed(TransformerMapper(6, 16, 3, 2, layers=1, heads=2), released=True)
    assert any("norm" in name and name.endswith("weight") for name in moved)
    encoder = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    _, still = decayed(RobertaModel(encoder), released=True)
    assert any(name.endswith("LayerNorm.weight") for name in still)


def decayed(module: nn.Module, *, released: bool = False) -> tuple[set[str], set[str]]:
    """Names with and without weight decay, found by a step with a zero gradient: only decay moves a weight then."""
    for p in module.parameters():
        nn.init.constant_(p, 0.5)
    optimizer = Optimizer(module, OptimizerConfig(lr=0.1, weight_decay=0.5, released_decay=released), 10)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step(torch.stack([p.sum() for p in module.parameters()]).sum() * 0, 1)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    return moved, set(before) - moved


def test_no_norm_and_no_bias_of_a_gpt2_is_decayed() -> None:
    moved, still = decayed(GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16)))
    by_name = {name for name in moved | still if name.endswith("bias") or ".ln_" in name}
    assert still == by_name
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.mlp.c_fc.weight"} <= moved
    assert len(still) == 2 * 8 + 2  # two layers of 4 biases and 2 norms, and the last norm


def test_no_norm_and_no_bias_of_the_others_is_decayed() -> None:
    mapper_moved, mapper_still = decayed(TransformerMapper(6, 16, 3, 2, layers=1, heads=2))
    assert mapper_still == {name for name in mapper_moved | mapper_still if name.endswith("bias") or "norm" in name}
    assert "prefix_const" in mapper_moved
    encoder = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    moved, still = decayed(RobertaModel(encoder))
    assert still == {name for name in moved | still if name.endswith("bias") or "LayerNorm" in name}


def test_norm_is_of_all_gradients_and_clipped_to_the_limit() -> None:
    module = nn.Linear(2, 1)
    optimizer = Optimizer(module, OptimizerConfig(lr=0.1, grad_clip=1.0), 10)
    inputs = torch.tensor([[3.0, 4.0]])
    norm = optimizer.step(module(inputs).sum() * 10, 1)
    assert norm == pytest.approx(10 * 26**0.5, rel=1e-5)
    clipped = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    assert clipped.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_grad_clip_0_leaves_gradients_alone() -> None:
    module = nn.Linear(2, 1)
    norm = Optimizer(module, OptimizerConfig(grad_clip=0.0), 10).step(module(torch.tensor([[300.0, 400.0]])).sum(), 1)
    assert norm == pytest.approx((300**2 + 400**2 + 1) ** 0.5, rel=1e-6)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[300.0, 400.0]]


def test_schedule_is_in_the_step() -> None:
    module = OneMatrix([[1.0, 2.0]])
    optimizer = Optimizer(module, OptimizerConfig(lr=0.1, warmup_steps=2, weight_decay=0.0), 10)
    seen = []
    for step in (1, 2, 3, 4):
        before = module.weight.detach().clone()
        optimizer.step(module.weight.sum(), step)
        seen.append((before - module.weight.detach()).abs().max().item())
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.1], abs=1e-5)  # a constant gradient moves a weight by the rate


def test_frozen_parameters_are_left_out() -> None:
    first = nn.Linear(2, 2).requires_grad_(False)
    module = nn.Sequential(first, nn.Linear(2, 1))
    frozen = first.weight.clone()
    optimizer = Optimizer(module, OptimizerConfig(lr=0.1, weight_decay=0.5), 10)
    optimizer.step(module(torch.ones(1, 2)).sum(), 1)
    assert torch.equal(first.weight, frozen)
    assert len(optimizer.parameters) == 2  # the second layer's
