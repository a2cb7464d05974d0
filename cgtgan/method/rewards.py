"""The paper's semantic reward: does the caption fit the image (CgT-GAN, section 3.3; METHOD: GAN training, step 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cgtgan.method.reward_terms import PAPER, TERMS, RewardInputs, paper_total


class SemanticReward(NamedTuple):
    """`total` (R,) and its raw terms, each (R,) float32, in units of the logit scale."""

    total: Tensor
    cos: Tensor
    l1: Tensor
    clip: Tensor


@torch.no_grad()
def semantic_reward(
    text: Tensor,
    aggregated: Tensor,
    image: Tensor,
    *,
    cos_weight: float,
    clip_weight: float,
    logit_scale: float = 100.0,
) -> SemanticReward:
    """Reward of R captions with CLIP text embeddings `text` (R, D) against their images' targets, each (R, D), any
    float dtype.

    cos = s*cos(a, g); l1 = s*(1 - mean|a - g|), on the raw vectors; clip = s*cos(v, g); total =
    (1-clip_weight)*(cos_weight*cos + (1-cos_weight)*l1) + clip_weight*clip. CLIP-agg is cos_weight 0.5, clip_weight 0;
    CLIP-cos is clip_weight 1. Computed in float32. Raises `ValueError` if the three shapes differ.
    """
    if not text.shape == aggregated.shape == image.shape or text.dim() != 2:
        shapes = f"text {tuple(text.shape)}, aggregated {tuple(aggregated.shape)} and image {tuple(image.shape)}"
        raise ValueError(f"{shapes} must all be (R, D)")
    inputs = RewardInputs((), text.float(), aggregated.float(), image.float(), logit_scale)
    terms = {name: logit_scale * TERMS[name](inputs) for name in PAPER}
    return SemanticReward(paper_total(terms, cos_weight, clip_weight), **terms)
