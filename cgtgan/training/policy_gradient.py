"""The generator's part of a GAN step: drawn captions, their advantages, and REINFORCE's gradient (METHOD: one step)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgtgan.config import Config, TrainConfig
from cgtgan.method.reinforce import advantages, kl_to_reference, normalised, policy_gradient_loss
from cgtgan.method.reward_terms import OF_PRIOR
from cgtgan.models.generator import Captions
from cgtgan.training.batches import Batch
from cgtgan.training.meters import Means
from cgtgan.training.parts import TrainingParts
from cgtgan.training.rewards import OfDrawn, term_weights


@dataclass
class DrawnBatch:
    """A micro-batch with its captions. sampled (B, K), greedy (B,). reference (B, K+1, L): their token log-probs under
    the initial generator, the greedy caption's last; None where nothing asks for them. rewards: name -> (B*K + B,).
    """

    batch: Batch
    sampled: Captions
    greedy: Captions
    reference: Tensor | None
    rewards: Mapping[str, Tensor]


def draw(cfg: Config, parts: TrainingParts, batch: Batch) -> tuple[Captions, Captions]:
    """K samples and the greedy caption per image, of the generator as it is. What is printed lies on the host.

    It is the one thing of a step, besides the metrics, for which the host waits: both texts and all lengths follow.
    """
    t, generator = cfg.train, parts.bundle.model
    with parts.devices.autocast():
        if t.dropout:
            sampled = generator.train().sample_with_graph(batch.read, batch.seeds)
            greedy = generator.eval().greedy(batch.read, log_probs=False)
        else:
            needs_log_probs = (bool(t.kl_weight) and t.kl == "k1_reward") or "entropy" in cfg.reward_weights.terms
            sampled, greedy = generator.eval().sample_and_greedy(batch.read, batch.seeds, log_probs=needs_log_probs)
    printed = torch.cat([sampled.token_ids, greedy.token_ids[:, None]], dim=1).cpu()
    return sampled._replace(token_ids=printed[:, :-1]), greedy._replace(token_ids=printed[:, -1])


@torch.no_grad()
def reference_log_probs(
    cfg: Config, parts: TrainingParts, batch: Batch, sampled: Captions, greedy: Captions, *, detailed: bool
) -> Tensor | None:
    """`DrawnBatch.reference`: for the KL penalty, for a reward term, and for watching the distance on a logged row."""
    of_prior = any(name in OF_PRIOR for name in cfg.reward_weights.terms)
    if parts.reference is None or not (cfg.train.kl_weight or of_prior or detailed):
        return None
    drawn, printed = sampled.drawn, sampled.token_ids
    if of_prior:
        drawn = torch.cat([drawn, greedy.drawn[:, None]], dim=1)
        printed = torch.cat([printed, greedy.token_ids[:, None]], dim=1)
    with parts.devices.autocast():
        lengths = _lengths(parts, printed)
        return parts.reference.token_log_probs(batch.read, drawn, lengths=lengths)[0]


def _lengths(parts: TrainingParts, printed: Tensor) -> Tensor:
    """(..., L) printed ids -> (...) int64: up to the stop token, a forced one too: up to there the drawn ones count."""
    return parts.bundle.model.up_to_stop(printed).sum(-1)


def of_drawn(
    cfg: Config, parts: TrainingParts, batch: Batch, sampled: Captions, greedy: Captions, texts: Sequence[str],
    reference: Tensor | None,
) -> OfDrawn:  # fmt: skip
    """What the reward terms read of B*K samples and B greedy captions, in this order; `texts` are the captions."""
    drawn = torch.cat([sampled.drawn.flatten(0, 1), greedy.drawn])
    tokens = parts.bundle.model.up_to_stop(drawn).sum(-1).float()
    prior = policy = None
    if reference is not None and reference.shape[1] > sampled.drawn.shape[1]:
        summed = reference.sum(-1)
        prior = torch.cat([summed[:, :-1].flatten(), summed[:, -1]])
    if "entropy" in cfg.reward_weights.terms:
        policy = torch.cat([sampled.log_probs.flatten(), greedy.log_probs]) * tokens
    agreement = None
    if parts.consensus is not None and parts.nearest is not None:
        nearest = torch.stack([parts.nearest[i] for i in batch.ids])[batch.owner()]
        agreement = parts.consensus.scores(texts, nearest).to(tokens.device)
    return OfDrawn(prior, policy, tokens, agreement)


# ----------------------------------------------------------------------------------------------------------- advantages


def batch_advantages(
    cfg: Config, parts: TrainingParts, drawn: Sequence[DrawnBatch], w: Sequence[float]
) -> list[dict[str, Tensor]]:
    """Per micro-batch, the advantages (B, K) of every reward, and of `total`, which the generator follows.

    w: the semantic reward's weight in each micro-batch. With `train.advantage_norm`, every reward term and the
    naturalness are normalised, then summed by their weights; for `batch` the step's moments are those of all processes.
    """
    t = cfg.train
    names = list(drawn[0].rewards)
    plain = [{name: _advantages(d.rewards[name], d.batch, t.baseline) for name in names} for d in drawn]
    each: list[dict[str, Tensor]] = []
    weights = term_weights(cfg.reward_weights)
    moments = _moments(parts, plain) if t.advantage_norm == "batch" else {}
    for of, weight in zip(plain, w, strict=True):
        semantic, natural = of["semantic"], of["naturalness"]
        if t.advantage_norm != "none":
            scaled = {name: normalised(a, t.advantage_norm, moments.get(name)) for name, a in of.items()}
            semantic = torch.stack([share * scaled[name] for name, share in weights.items()]).sum(0)
            natural = scaled["naturalness"]
        each.append(of | {"total": weight * semantic + (1 - weight) * natural})
    return each


def _advantages(rewards: Tensor, batch: Batch, baseline: str) -> Tensor:
    """(B*K + B,) rewards, samples then greedy -> (B, K)"""
    of_samples, of_greedy = rewards[: -len(batch.seeds)], rewards[-len(batch.seeds) :]
    return advantages(of_samples.view(len(batch.seeds), -1), of_greedy if baseline == "greedy" else None)


def _moments(parts: TrainingParts, each: Sequence[Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (mean, mean square) of a reward's advantages over the whole step."""
    names = list(each[0])
    of = {name: torch.cat([advantage[name].flatten() for advantage in each]).float() for name in names}
    sums = torch.stack([torch.stack([a.sum(), a.square().sum(), a.new_full((), len(a))]) for a in of.values()])
    total, square, count = (sums if parts.devices.world == 1 else parts.devices.sum(sums)).unbind(1)
    return {name: (total[i] / count[i], square[i] / count[i]) for i, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------------------- gradient


def step_tokens(parts: TrainingParts, drawn: Sequence[DrawnBatch]) -> Tensor:
    """How many tokens the step's samples have, over all micro-batches and processes: a scalar float32."""
    generator = parts.bundle.model
    count = torch.stack([generator.up_to_stop(d.sampled.drawn).sum() for d in drawn]).sum().float()
    return count if parts.devices.world == 1 else parts.devices.sum(count)


def reinforce(
    t: TrainConfig, parts: TrainingParts, work: DrawnBatch, advantage_of: Mapping[str, Tensor], means: Means,
    tokens: Tensor | None = None,
) -> None:  # fmt: skip
    """Add G's gradient of the `total` advantage, and of the KL penalty, over this micro-batch's captions.

    tokens: `step_tokens`, which `train.loss_norm=tokens` needs. `accumulate_gradient` calls `chunk_loss` and its
    backward pass for as many captions at a time as memory holds.
    """
    batch, sampled, generator = work.batch, work.sampled, parts.bundle.model
    semantic, natural = advantage_of["semantic"], advantage_of["naturalness"]
    advantage = advantage_of["total"].flatten()
    drawn = sampled.drawn.flatten(0, 1)
    mask = generator.up_to_stop(drawn)
    num_captions = batch.total * batch.samples  # of the whole step, over all micro-batches and processes
    reference = torch.empty(0)
    if work.reference is not None:
        reference = work.reference[:, : batch.samples].flatten(0, 1)
    kl_is_loss, kl_advantage = bool(t.kl_weight) and t.kl != "k1_reward", torch.empty(0)
    if t.kl_weight and not kl_is_loss:
        k1 = sampled.log_probs - (reference.sum(-1) / mask.sum(-1)).view_as(sampled.log_probs)
        kl_advantage = (advantages(-k1) if batch.samples > 1 else -k1).flatten()
        advantage = advantage + t.kl_weight * kl_advantage

    def chunk_loss(token_log_probs: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        summed = token_log_probs.sum(-1)
        if t.loss_norm == "tokens" and tokens is not None:
            log_probs = summed * (num_captions / tokens)
        else:
            log_probs = summed / (generator.max_length if t.loss_norm == "constant" else mask.sum(-1))
        loss = policy_gradient_loss(advantage[rows], log_probs) * len(rows)
        if kl_is_loss:
            loss = loss + t.kl_weight * kl_to_reference(token_log_probs, reference[rows], mask, t.kl).sum()
        return loss / num_captions

    if t.dropout:
        token_log_probs = _released_gradient(sampled, advantage, num_captions, mask)
    else:
        with parts.devices.autocast():
            lengths = _lengths(parts, sampled.token_ids.flatten(0, 1))
            token_log_probs = generator.eval().accumulate_gradient(
                batch.read, drawn, chunk_loss, parts.g_chunk, lengths
            )
    log_probs = token_log_probs.sum(-1) / mask.sum(-1)
    means.add("train/semantic_loss", -semantic.flatten() * log_probs)
    means.add("train/naturalness_loss", -natural.flatten() * log_probs)
    means.add("train/caption_tokens", mask.sum(-1))
    means.add("train/entropy", -log_probs)
    means.add("advantage/all_equal", advantage_of["total"].amax(-1) - advantage_of["total"].amin(-1) < 1e-6)
    means.add("caption/finished", (drawn == generator.stop_token_id).any(-1))
    if len(reference) and not t.dropout:
        means.add("train/kl", kl_to_reference(token_log_probs, reference, mask))  # k3 is the estimate to look at
        if t.kl_weight and t.kl != "k3":
            penalty = (
                kl_to_reference(token_log_probs, reference, mask, t.kl) if kl_is_loss else -kl_advantage * log_probs
            )
            means.add("train/kl_loss", penalty)
    means.add_rewards(work.rewards, advantage_of)


def _released_gradient(sampled: Captions, advantage: Tensor, num_captions: int, mask: Tensor) -> Tensor:
    """The gradient through the pass that drew, with dropout (released program); each token has the mean log-prob."""
    log_probs = sampled.log_probs.flatten()
    (policy_gradient_loss(advantage, log_probs) * len(log_probs) / num_captions).backward()
    return log_probs.detach()[:, None] * mask
