"""REINFORCE with a self-critical or leave-one-out baseline, and the schedules of the two rewards (METHOD: GAN
training).
"""

from __future__ import annotations

import torch
from torch import Tensor


def advantages(rewards: Tensor, greedy_rewards: Tensor | None = None) -> Tensor:
    """(B, K) rewards of the samples minus a baseline: the same image's greedy reward (B,) (SCST, Rennie et al. 2017),
    or, when None, the mean of the image's other K-1 samples (leave-one-out). Returns (B, K).

    Raises `ValueError` for shapes that do not fit, and for K = 1 without greedy rewards: there is no other sample.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards {tuple(rewards.shape)} must be (B, K)")
    if greedy_rewards is not None:
        if greedy_rewards.shape != rewards.shape[:1]:
            raise ValueError(
                f"greedy_rewards {tuple(greedy_rewards.shape)} must be ({rewards.shape[0]},), one per image"
            )
        return rewards - greedy_rewards[:, None]
    samples = rewards.shape[1]
    if samples < 2:
        raise ValueError("the leave-one-out baseline needs 2 samples or more per image")
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (samples - 1)


def normalised(advantages: Tensor, norm: str, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(B, K) advantages of one reward divided by their standard deviation plus 1e-6: no unit of the reward is left.

    `group`: over an image's K samples (GRPO, Shao et al., 2024; per reward: GDPO, arXiv 2601.05242). `batch`: over the
    whole step, whose mean advantage and mean squared advantage `moments` are; None: those of `advantages`. `none`:
    unchanged. Raises `ValueError` for another norm.
    """
    if norm == "none":
        return advantages
    if norm == "group":
        return advantages / (advantages.std(dim=1, correction=0, keepdim=True) + 1e-6)
    if norm != "batch":
        raise ValueError(f"norm={norm} is not none, group or batch")
    mean, square = moments or (advantages.mean(), advantages.square().mean())
    return advantages / ((square - mean.square()).clamp_min(0).sqrt() + 1e-6)


def policy_gradient_loss(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """-mean(advantage * log_prob) over (B, K); the advantages are constants for the gradient. Returns a scalar."""
    if advantages.shape != log_probs.shape:
        raise ValueError(
            f"advantages {tuple(advantages.shape)} and log_probs {tuple(log_probs.shape)} must have one shape"
        )
    return -(advantages.detach() * log_probs).mean()


def semantic_weight(step: int, *, max_weight: float, delay_steps: int, ramp_steps: int) -> float:
    """w of G_loss = w*semantic + (1-w)*naturalness at optimiser step `step`, counted from 1: 0 while step <=
    delay_steps, then linear over `ramp_steps` up to `max_weight`. With ramp_steps 0 it is `max_weight` from the first
    step after the delay.
    """
    if step <= delay_steps:
        return 0.0
    ramp = 1.0 if ramp_steps == 0 else min((step - delay_steps) / ramp_steps, 1.0)
    return ramp * max_weight


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int, final_ratio: float = 1.0) -> float:
    """Factor of the base learning rate at optimiser step `step`, counted from 1: linear warm-up from 0, then linear to
    `final_ratio` at `total_steps` (1: constant). The first step of a warm-up has rate 0, as in the
    published runs (docs/method.md, slip 11).
    """
    done = step - 1
    if done < warmup_steps:
        return done / warmup_steps
    span = max(total_steps - warmup_steps, 1)
    return final_ratio + (1 - final_ratio) * max(0.0, 1 - (done - warmup_steps) / span)


def kl_to_reference(
    token_log_probs: Tensor, reference_token_log_probs: Tensor, mask: Tensor, estimate: str = "k3"
) -> Tensor:
    """An estimate of KL(policy || reference) per token (Schulman 2020), the mean over a caption's tokens, (...,).

    Token log-probs (..., L) of the drawn tokens under both models; mask (..., L) true up to and including the stop
    token. With r = log reference - log policy: `k1` is -r; `k2` r^2/2 >= 0; `k3` exp(r) - 1 - r >= 0. All three
    estimate that divergence (k2 is biased). As losses on drawn tokens they pull others: the mean gradient is 0 for k1,
    which belongs into the reward; that of KL(policy || reference) for k2; that of KL(reference || policy) for k3.
    """
    ratio = (reference_token_log_probs.detach() - token_log_probs) * mask
    per_token = {"k1": lambda: -ratio, "k2": lambda: ratio.square() / 2, "k3": lambda: torch.expm1(ratio) - ratio}
    return per_token[estimate]().sum(-1) / mask.sum(-1)
