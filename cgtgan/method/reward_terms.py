"""Reward terms: how well captions fit their images, one number per caption (CgT-GAN, section 3.3; METHOD: GAN training,
step 3).

A new term is one function `name(inputs: RewardInputs) -> Tensor` here, and its entry in `TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RewardInputs:
    """What a term may read of R captions. Rows belong together: caption r was written for the image of row r.

    texts: the captions as they are printed. text, aggregated, image (R, D) float32, on one device, not normalised: the
    CLIP embedding of the caption (without its final stop), the image's aggregated text embedding, the image's own
    embedding. logit_scale: the factor of a cosine in CLIP's logits, as `train.reward_scale` or the backbone has it.
    """

    texts: Sequence[str]
    text: Tensor
    aggregated: Tensor
    image: Tensor
    logit_scale: float = 100.0


RewardTerm = Callable[[RewardInputs], Tensor]


def cos(inputs: RewardInputs) -> Tensor:
    """Cosine of caption and aggregated embedding: (R,) float32 in [-1, 1]."""
    return F.cosine_similarity(inputs.aggregated, inputs.text, dim=-1)


def l1(inputs: RewardInputs) -> Tensor:
    """1 minus the mean absolute difference of caption and aggregated embedding: (R,) float32, at most 1."""
    return 1 - (inputs.aggregated - inputs.text).abs().mean(dim=-1)


def clip(inputs: RewardInputs) -> Tensor:
    """Cosine of caption and image: (R,) float32 in [-1, 1]."""
    return F.cosine_similarity(inputs.image, inputs.text, dim=-1)


TERMS: dict[str, RewardTerm] = {"cos": cos, "l1": l1, "clip": clip}
PAPER = ("cos", "l1", "clip")  # always computed and logged; any other term only where the settings name it


def paper_weights(cos_weight: float, clip_weight: float) -> dict[str, float]:
    """The weights of the paper's three terms, from the two numbers it sets."""
    agg = 1 - clip_weight
    return {"cos": agg * cos_weight, "l1": agg * (1 - cos_weight), "clip": clip_weight}


def paper_total(terms: Mapping[str, Tensor], cos_weight: float, clip_weight: float) -> Tensor:
    """(1-clip_weight)*(cos_weight*cos + (1-cos_weight)*l1) + clip_weight*clip, in the order of operations of the
    paper's formula.
    """
    agg = cos_weight * terms["cos"] + (1 - cos_weight) * terms["l1"]
    return (1 - clip_weight) * agg + clip_weight * terms["clip"]


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of weight * term over the names in `weights`, (R,) each."""
    return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum(dim=0)
