"""Advantages, the policy-gradient loss, schedules and the KL penalty: exact values."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cgtgan.method.reinforce import (
    advantages,
    kl_to_reference,
    learning_rate_factor,
    policy_gradient_loss,
    semantic_weight,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def schedule() -> dict[str, Any]:
    return json.loads((GOLDEN / "schedule.json").read_text(encoding="utf-8"))


def test_golden_semantic_weight(schedule: dict[str, Any]) -> None:
    assert len(schedule["reward_weight"]) == 11
    for step, weight in schedule["reward_weight"].items():
        assert semantic_weight(int(step), max_weight=0.5, delay_steps=150, ramp_steps=2350) == pytest.approx(
            weight, rel=1e-12, abs=0
        )


@pytest.mark.parametrize(
    ("key", "warmup", "total", "final"),
    [("G_lr_constant", 150, 44_000, 1.0), ("D_lr_constant", 0, 44_000, 1.0), ("G_lr_linear_total400", 150, 400, 0.0)],
)
def test_golden_learning_rates(schedule: dict[str, Any], key: str, warmup: int, total: int, final: float) -> None:
    assert len(schedule[key]) >= 5
    for step, rate in schedule[key].items():
        factor = learning_rate_factor(int(step), warmup_steps=warmup, total_steps=total, final_ratio=final)
        assert 1e-5 * factor == pytest.approx(rate, rel=1e-9, abs=1e-20), step


def test_no_ramp_is_a_step() -> None:
    weights = [semantic_weight(s, max_weight=0.7, delay_steps=3, ramp_steps=0) for s in (0, 1, 3, 4, 5, 10**6)]
    assert weights == [0, 0, 0, 0.7, 0.7, 0.7]
    assert semantic_weight(1, max_weight=0.7, delay_steps=0, ramp_steps=0) == 0.7


def test_linear_decay_ends_at_its_ratio_and_stays() -> None:
    factors = [learning_rate_factor(s, warmup_steps=2, total_steps=12, final_ratio=0.1) for s in (1, 2, 3, 8, 13, 500)]
    assert factors == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1])


def test_fewer_steps_than_the_warm_up() -> None:
    assert learning_rate_factor(3, warmup_steps=10, total_steps=3, final_ratio=0.0) == 0.2


def test_self_critical_advantage() -> None:
    found = advantages(torch.tensor([[1.0, 3.0], [5.0, -2.0]]), torch.tensor([2.0, 4.0]))
    assert found.tolist() == [[-1, 1], [1, -6]]


def test_leave_one_out_uses_the_other_samples_of_the_same_image() -> None:
    found = advantages(torch.tensor([[1.0, 2.0, 6.0], [10.0, 10.0, 10.0]]))
    assert found.tolist() == [[-3.0, -1.5, 4.5], [0, 0, 0]]
    assert advantages(torch.tensor([[2.0, 5.0]])).tolist() == [[-3.0, 3.0]]


def test_leave_one_out_is_unbiased_where_one_mean_is_not() -> None:
    """K/(K-1) times the advantage against the mean of all K, and its sum per image is 0."""
    torch.manual_seed(0)
    rewards = torch.randn(6, 5, dtype=torch.float64)
    found = advantages(rewards)
    torch.testing.assert_close(found, 5 / 4 * (rewards - rewards.mean(dim=1, keepdim=True)))
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rewards", "greedy", "sentence"),
    [
        ((4,), None, r"\(4,\) must be \(B, K\)"),
        ((2, 3), (3,), r"\(3,\) must be \(2,\)"),
        ((2, 3), (2, 1), r"\(2, 1\) must be \(2,\)"),
        ((2, 3), (1,), r"\(1,\) must be \(2,\)"),
        ((2, 1), None, "2 samples or more"),
    ],
)
def test_wrong_shapes_of_rewards(rewards: tuple[int, ...], greedy: tuple[int, ...] | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        advantages(torch.ones(rewards), None if greedy is None else torch.ones(greedy))


def test_loss_and_gradient_by_hand() -> None:
    advantage = torch.tensor([[1.0, -2.0]], requires_grad=True)
    log_probs = torch.tensor([[-0.5, -0.25]], requires_grad=True)
    loss = policy_gradient_loss(advantage, log_probs)
    loss.backward()
    assert loss.item() == 0.0  # -(1*-0.5 + -2*-0.25)/2
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-0.5, 1.0]]
    assert advantage.grad is None


@pytest.mark.parametrize("shape", [(3, 2), (2, 1), (6,), (1, 3)])
def test_shapes_that_would_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        policy_gradient_loss(torch.ones(2, 3), torch.ones(shape))


def test_the_gradient_raises_what_is_rewarded() -> None:
    """REINFORCE on a bandit of four arms finds the best one."""
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    worth = torch.tensor([0.0, 1.0, 3.0, 2.0])
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(60):
        log_probs = torch.log_softmax(logits, dim=0)
        drawn = torch.multinomial(log_probs.exp().detach(), 32, replacement=True).view(4, 8)
        optimizer.zero_grad()
        policy_gradient_loss(advantages(worth[drawn]), log_probs[drawn]).backward()
        optimizer.step()
    assert torch.softmax(logits, dim=0)[2].item() > 0.9


def test_kl_is_zero_for_the_same_policy_and_masks() -> None:
    log_probs = torch.tensor([[[-1.0, -2.0, 0.0]]], requires_grad=True)
    mask = torch.tensor([[[True, True, False]]])
    assert kl_to_reference(log_probs, log_probs.detach(), mask).item() == 0
    other = torch.tensor([[[-1.5, -1.0, -50.0]]])
    by_hand = ((math.exp(-0.5) - 1 + 0.5) + (math.exp(1.0) - 1 - 1)) / 2
    kl = kl_to_reference(log_probs, other, mask)
    assert kl.item() == pytest.approx(by_hand, rel=1e-6)
    kl.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0, 0, 2] == 0
    assert log_probs.grad[0, 0, 0] > 0  # more likely than under the reference: pushed down
    assert log_probs.grad[0, 0, 1] < 0


def test_kl_estimates_the_divergence() -> None:
    torch.manual_seed(0)
    p, q = torch.softmax(torch.randn(6), dim=0), torch.softmax(torch.randn(6), dim=0)
    drawn = torch.multinomial(p, 200_000, replacement=True).view(1, 1, -1)
    found = kl_to_reference(p.log()[drawn], q.log()[drawn], torch.ones_like(drawn, dtype=torch.bool))
    assert found.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=0.02)


# A vocabulary of three tokens and captions of one: every expectation is a sum of three terms.
POLICY, REFERENCE = torch.tensor([0.3, -1.2, 0.9]), torch.log_softmax(torch.tensor([-0.4, 0.8, 0.1]), dim=0)


def gradient(of: Callable[[Tensor], Tensor]) -> list[float]:
    """d of(log policy) / d logits"""
    logits = POLICY.clone().requires_grad_()
    of(torch.log_softmax(logits, dim=0)).backward()
    assert logits.grad is not None
    return logits.grad.tolist()


def exact(divergence: str) -> list[float]:
    if divergence == "KL(policy || reference)":
        return gradient(lambda log_p: (log_p.exp() * (log_p - REFERENCE)).sum())
    return gradient(lambda log_p: (REFERENCE.exp() * (REFERENCE - log_p)).sum())


def expected_loss(log_p: Tensor, estimate: str) -> Tensor:
    """The mean, over what the policy draws, of the loss on the drawn token; the drawing has no gradient."""
    per_token = kl_to_reference(log_p[:, None], REFERENCE[:, None], torch.ones(3, 1, dtype=torch.bool), estimate)
    return (log_p.exp().detach() * per_token).sum()


@pytest.mark.parametrize(
    ("estimate", "divergence"), [("k2", "KL(policy || reference)"), ("k3", "KL(reference || policy)")]
)
def test_as_a_loss_each_estimate_has_the_exact_gradient_of_its_divergence(estimate: str, divergence: str) -> None:
    assert gradient(lambda log_p: expected_loss(log_p, estimate)) == pytest.approx(exact(divergence), rel=1e-5)
    other = {"k2": "KL(reference || policy)", "k3": "KL(policy || reference)"}[estimate]
    assert gradient(lambda log_p: expected_loss(log_p, estimate)) != pytest.approx(exact(other), rel=0.05)


def test_k1_as_a_loss_has_no_gradient_and_in_the_reward_that_of_the_kl_to_the_reference() -> None:
    assert gradient(lambda log_p: expected_loss(log_p, "k1")) == pytest.approx([0, 0, 0], abs=1e-7)

    def expected_reward_loss(log_p: Tensor) -> Tensor:
        """Over every pair of drawn tokens: two samples of an image, each the other's baseline."""
        total = torch.zeros(())
        for a in range(3):
            for b in range(3):
                drawn = torch.tensor([a, b])
                k1 = kl_to_reference(
                    log_p[drawn, None], REFERENCE[drawn, None], torch.ones(2, 1, dtype=torch.bool), "k1"
                )
                loss = policy_gradient_loss(advantages(-k1[None]), log_p[drawn][None])
                total = total + (log_p[a] + log_p[b]).exp().detach() * loss
        return total

    assert gradient(expected_reward_loss) == pytest.approx(exact("KL(policy || reference)"), rel=1e-5)


@pytest.mark.parametrize("estimate", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimate: str) -> None:
    log_p = torch.log_softmax(POLICY, dim=0)
    divergence = (log_p.exp() * (log_p - REFERENCE)).sum().item()
    assert expected_loss(log_p, estimate).item() == pytest.approx(divergence, rel=1e-6)
