"""The discriminator's part of a GAN step: the naturalness reward, and the gradient of its own update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.models.discriminator import Discriminator, discriminator_loss
from cgtgan.training.batches import Batch
from cgtgan.training.meters import Means
from cgtgan.training.parts import TrainingParts


def update_discriminator(
    parts: TrainingParts, batch: Batch, sampled: list[str], greedy: list[str], means: Means, *, dropout: bool
) -> Tensor:
    """Naturalness (B*K + B,) of samples and greedy captions, by the discriminator before its update.

    Adds the gradient of that update on real and sampled sentences. Without dropout one pass serves both, and equal
    texts are scored once.
    """
    discriminator, devices, real = parts.discriminator, parts.devices, batch.real
    if discriminator is None:
        return torch.zeros(len(sampled) + len(greedy), device=devices.device)
    naturalness = None
    if dropout:
        with devices.autocast():
            naturalness = discriminator.eval().score([*sampled, *greedy])
        fakes, repeats = sampled, [1] * len(sampled)
    else:
        counts = Counter(sampled)
        fakes, repeats = list(counts), list(counts.values())
    sentences = batch.total * len(sampled) // max(1, len(greedy))  # of each kind in the whole step
    labels = torch.tensor([1.0] * len(real) + [0.0] * len(fakes), device=devices.device)
    weights = torch.tensor([1.0] * len(real) + [float(n) for n in repeats], device=devices.device) / (2 * sentences)

    def chunk_loss(logits: Tensor, rows: Tensor) -> Tensor:
        return (F.binary_cross_entropy_with_logits(logits, labels[rows], reduction="none") * weights[rows]).sum()

    discriminator.train(dropout)
    with devices.autocast():
        logits = discriminator.accumulate_gradient([*real, *fakes], chunk_loss, parts.d_chunk)
        discriminator.eval()
        if naturalness is None:
            naturalness = _scores(discriminator, fakes, logits[len(real) :], sampled, greedy)
    fake_logits = logits[len(real) :].repeat_interleave(torch.tensor(repeats, device=devices.device))
    _log(means, logits[: len(real)], fake_logits)
    return naturalness


def _scores(
    discriminator: Discriminator, fakes: Sequence[str], logits: Tensor, sampled: Sequence[str], greedy: Sequence[str]
) -> Tensor:
    """Logits of `sampled` and `greedy` in order, from those of the distinct samples `fakes`; others are scored."""
    row = {text: i for i, text in enumerate(fakes)}
    others = [text for text in dict.fromkeys(greedy) if text not in row]
    all_logits = torch.cat([logits, discriminator.score(others)]) if others else logits
    row |= {text: len(row) + i for i, text in enumerate(others)}
    return all_logits[torch.tensor([row[text] for text in (*sampled, *greedy)], device=all_logits.device)]


def _log(means: Means, real_logits: Tensor, fake_logits: Tensor) -> None:
    means.add("train/d_loss", discriminator_loss(real_logits, fake_logits)[None].expand(len(real_logits)))
    means.add("train/d_accuracy_real", real_logits > 0)
    means.add("train/d_accuracy_generated", fake_logits <= 0)
    means.add("train/d_accuracy", torch.cat([real_logits > 0, fake_logits <= 0]))
    means.add("reward/real_logit", real_logits)
