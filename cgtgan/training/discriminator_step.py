"""The discriminator's part of a GAN step: the naturalness reward, and the gradient of its own update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.config import Config
from cgtgan.models.discriminator import Discriminator, discriminator_loss, naturalness_rewards, pairwise_loss
from cgtgan.runtime.devices import on_device
from cgtgan.training.batches import Batch
from cgtgan.training.meters import Means
from cgtgan.training.parts import TrainingParts


def update_discriminator(
    cfg: Config, parts: TrainingParts, batch: Batch, sampled: list[str], greedy: list[str], means: Means
) -> Tensor:
    """Naturalness (B*K + B,) of samples and greedy captions, by the discriminator before its update.

    Adds the gradient of that update on real and sampled sentences. Without dropout one pass serves both, and equal
    texts are scored once.
    """
    discriminator, devices, real = parts.discriminator, parts.devices, batch.real
    if discriminator is None:
        return torch.zeros(len(sampled) + len(greedy), device=devices.device)
    config, dropout = cfg.discriminator, cfg.train.dropout
    if config.loss == "pairwise":
        logits = _pairwise_update(parts, discriminator, batch, sampled, greedy, means)
        return naturalness_rewards(logits, config.reward, batch.samples)
    naturalness = None
    if dropout:
        with devices.autocast():
            naturalness = discriminator.eval().score([*sampled, *greedy])
        fakes, repeats = sampled, [1] * len(sampled)
    else:
        counts = Counter(sampled)
        fakes, repeats = list(counts), list(counts.values())
    sentences = batch.total * len(sampled) // max(1, len(greedy))  # of each kind in the whole step
    smoothed = torch.tensor([1.0 - config.label_smoothing] * len(real) + [0.0] * len(fakes))
    counted = torch.tensor([1.0] * len(real) + [float(n) for n in repeats])
    labels, weights = on_device(torch.stack([smoothed, counted / (2 * sentences)]), devices.device)

    def chunk_loss(logits: Tensor, rows: Tensor) -> Tensor:
        return (F.binary_cross_entropy_with_logits(logits, labels[rows], reduction="none") * weights[rows]).sum()

    discriminator.train(dropout)
    with devices.autocast():
        logits = discriminator.accumulate_gradient([*real, *fakes], chunk_loss, parts.d_chunk)
        discriminator.eval()
        if naturalness is None:
            naturalness = _scores(discriminator, fakes, logits[len(real) :], sampled, greedy)
    each = torch.arange(len(fakes)).repeat_interleave(torch.tensor(repeats))
    fake_logits = logits[len(real) :][on_device(each, devices.device)]
    loss = discriminator_loss(logits[: len(real)], fake_logits)
    _log(means, loss, logits[: len(real)], fake_logits)
    return naturalness_rewards(naturalness, config.reward, batch.samples)


def _pairwise_update(
    parts: TrainingParts, discriminator: Discriminator, batch: Batch, sampled: list[str], greedy: list[str],
    means: Means,
) -> Tensor:  # fmt: skip
    """The same with the pairwise loss, whose pairs no chunk may part: the logits come first, the gradient second.

    Returns the logits (B*K + B,) of samples and greedy captions.
    """
    real, pairs = batch.real, batch.total * batch.samples
    with parts.devices.autocast():
        logits = discriminator.eval().score([*real, *sampled, *greedy])
    leaf = logits[: 2 * len(real)].detach().requires_grad_()
    loss = pairwise_loss(leaf[: len(real)], leaf[len(real) :])
    (loss * len(real) / pairs).backward()
    slope = leaf.grad
    assert slope is not None
    with parts.devices.autocast():
        discriminator.accumulate_gradient(
            [*real, *sampled], lambda chunk, rows: (chunk * slope[rows]).sum(), parts.d_chunk
        )
    _log(means, loss, logits[: len(real)], logits[len(real) : 2 * len(real)])
    return logits[len(real) :]


def _scores(
    discriminator: Discriminator, fakes: Sequence[str], logits: Tensor, sampled: Sequence[str], greedy: Sequence[str]
) -> Tensor:
    """Logits of `sampled` and `greedy` in order, from those of the distinct samples `fakes`; others are scored."""
    row = {text: i for i, text in enumerate(fakes)}
    others = [text for text in dict.fromkeys(greedy) if text not in row]
    all_logits = torch.cat([logits, discriminator.score(others)]) if others else logits
    row |= {text: len(row) + i for i, text in enumerate(others)}
    return all_logits[on_device(torch.tensor([row[text] for text in (*sampled, *greedy)]), all_logits.device)]


def _log(means: Means, loss: Tensor, real_logits: Tensor, fake_logits: Tensor) -> None:
    means.add("train/d_loss", loss[None].expand(len(real_logits)))
    means.add("train/d_accuracy_real", real_logits > 0)
    means.add("train/d_accuracy_generated", fake_logits <= 0)
    means.add("train/d_accuracy", torch.cat([real_logits > 0, fake_logits <= 0]))
    means.add("reward/real_logit", real_logits)
