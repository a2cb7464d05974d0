"""The semantic reward as the settings describe it: the paper's terms, and those of `reward_weights.terms`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.config import Config, RewardWeightsConfig, custom_name
from cgtgan.data.corpora import embedded_text
from cgtgan.method.reward_terms import (
    LIKELIHOODS,
    OF_DRAWN,
    PAPER,
    TERMS,
    RewardInputs,
    RewardTerm,
    paper_total,
    paper_weights,
    weighted_sum,
)
from cgtgan.training.parts import TrainingParts


class OfDrawn(NamedTuple):
    """Of R drawn captions: summed token log-probs under the initial generator and under the one that drew them, their
    numbers of tokens, and their consensus; each (R,) float32, None where no term asks for it.
    """

    prior: Tensor | None = None
    policy: Tensor | None = None
    tokens: Tensor | None = None
    consensus: Tensor | None = None


@torch.no_grad()
def semantic_rewards(
    cfg: Config,
    parts: TrainingParts,
    texts: Sequence[str],
    image: Tensor,
    target: Tensor,
    of_drawn: OfDrawn | None = None,
) -> dict[str, Tensor]:
    """Rewards of R captions, given the embedding and the target (R, D) of each one's image: name -> (R,) float32.

    Every term, scaled, and `semantic`, their weighted sum. Equal texts are embedded once. Captions that nobody drew
    have no `of_drawn`: the terms made of them are left out.
    """
    if "l1_target" in cfg.train.released:  # a slip of the released program: only the L1 term's target is normalised
        target = F.normalize(target, dim=-1)
    with parts.devices.autocast():
        embedded = parts.backbone.encode_texts([embedded_text(text) for text in texts], parts.clip_batch)
    scale = cfg.train.reward_scale or parts.backbone.logit_scale
    text = embedded.to(parts.devices.device).float()
    inputs = RewardInputs(texts, text, target.float(), image.float(), scale, parts.pool, *(of_drawn or OfDrawn()))
    return weighted_terms(cfg.reward_weights, parts.own_terms, inputs)


def weighted_terms(
    weights: RewardWeightsConfig, own_terms: Mapping[str, RewardTerm], inputs: RewardInputs
) -> dict[str, Tensor]:
    """Every term by its name, and `semantic`, their weighted sum, each (R,) float32.

    A term's value is multiplied by its `scale`; null is the logit scale for a built-in term and 1 for a user's own and
    for a likelihood.
    """
    drawn = any(x is not None for x in (inputs.log_prior, inputs.log_policy, inputs.consensus))
    named = {name: TERMS[name] for name in TERMS if name in PAPER or name in weights.terms}
    functions = {name: term for name, term in named.items() if drawn or name not in OF_DRAWN} | dict(own_terms)
    scales = {name: 1.0 if name in own_terms or name in LIKELIHOODS else inputs.logit_scale for name in functions}
    scales |= {custom_name(key): term.scale for key, term in weights.terms.items() if term.scale is not None}
    terms = {name: scales[name] * function(inputs) for name, function in functions.items()}
    if not weights.terms:
        return {**terms, "semantic": paper_total(terms, weights.cos_weight, weights.clip_weight)}
    shares = {name: share for name, share in term_weights(weights).items() if name in terms}
    return {**terms, "semantic": weighted_sum(terms, shares)}


def term_weights(weights: RewardWeightsConfig) -> dict[str, float]:
    """The weight of every term in the semantic reward, by the term's name."""
    shares = paper_weights(weights.cos_weight, weights.clip_weight)
    return shares | {custom_name(key): term.weight for key, term in weights.terms.items()}
