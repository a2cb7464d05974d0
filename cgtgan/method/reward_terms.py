"""Reward terms: how well captions fit their images, one number per caption (CgT-GAN, section 3.3; METHOD: GAN training,
step 3).

A new term is one function `name(inputs: RewardInputs) -> Tensor` here, and its entry in `TERMS`.
"""

from __future__ import annotations

import math
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
    pool (J, D) float32: embeddings of unlabelled images, None where no term asks for it. log_prior, log_policy (R,)
    float32: the caption's summed token log-probs under the initial generator and under the generator that drew it;
    tokens (R,): their number; consensus (R,): `Consensus.scores` with the corpus sentences nearest to the image. None
    where no term asks for them, and for captions that nobody drew.
    """

    texts: Sequence[str]
    text: Tensor
    aggregated: Tensor
    image: Tensor
    logit_scale: float = 100.0
    pool: Tensor | None = None
    log_prior: Tensor | None = None
    log_policy: Tensor | None = None
    tokens: Tensor | None = None
    consensus: Tensor | None = None


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


def pmi(inputs: RewardInputs) -> Tensor:
    """log p(image | caption) - log p(image) by CLIP's own softmax over a pool of images v_j, as a share of the logit
    scale s: cos(v, g) - log mean_j exp(s * cos(v_j, g)) / s. (R,) float32. A caption that fits every image earns 0.
    """
    assert inputs.pool is not None
    text, scale = F.normalize(inputs.text, dim=-1), inputs.logit_scale
    others = scale * text @ F.normalize(inputs.pool, dim=-1).T
    evidence = torch.logsumexp(others, dim=-1) - math.log(len(inputs.pool))
    return clip(inputs) - evidence / scale


def prior(inputs: RewardInputs) -> Tensor:
    """Summed log-prob of the caption under the initial generator, (R,) float32: a noisy channel's language model."""
    assert inputs.log_prior is not None
    return inputs.log_prior


def fluency(inputs: RewardInputs) -> Tensor:
    """`prior` per token, (R,) float32: it pays neither for short nor for long captions."""
    assert inputs.log_prior is not None
    assert inputs.tokens is not None
    return inputs.log_prior / inputs.tokens


def entropy(inputs: RewardInputs) -> Tensor:
    """Minus the caption's summed log-prob under the generator that drew it, (R,) float32: its mean is the entropy."""
    assert inputs.log_policy is not None
    return -inputs.log_policy


def consensus(inputs: RewardInputs) -> Tensor:
    """Mean CIDEr-D of the caption and the k corpus sentences nearest to the image, (R,) float32, 1 for 100 points."""
    assert inputs.consensus is not None
    return inputs.consensus


TERMS: dict[str, RewardTerm] = {
    "cos": cos, "l1": l1, "clip": clip, "pmi": pmi, "prior": prior, "fluency": fluency, "entropy": entropy,
    "consensus": consensus,
}  # fmt: skip
OF_IMAGES = ("pmi",)  # they read the pool
OF_PRIOR = ("prior", "fluency")  # they read the initial generator's log-probs
LIKELIHOODS = (*OF_PRIOR, "entropy")  # their scale is 1, not the logit scale
OF_DRAWN = (*LIKELIHOODS, "consensus")  # captions that nobody drew have none
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
