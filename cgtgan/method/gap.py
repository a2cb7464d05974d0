"""The modality gap between CLIP's image and text embeddings: closed by a shift, or made small by noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def noised(embeddings: Tensor, std: float, kind: str, seed: int) -> Tensor:
    """(N, D) float32 with Gaussian noise of standard deviation `std` in every number, drawn from `seed`.

    `raw` adds it to the vectors as they are. `unit` normalises, adds, and normalises again, as CapDec (Nukrai et al.,
    2022), ViECap and IFCap do.
    """
    if kind == "unit":
        embeddings = F.normalize(embeddings, dim=-1)
    if std:
        noise = torch.Generator().manual_seed(seed)
        embeddings = embeddings + std * torch.randn(embeddings.shape, generator=noise)
    return F.normalize(embeddings, dim=-1) if kind == "unit" else embeddings


def mean_shifted(images: Tensor, train_images: Tensor, sentences: Tensor) -> Tensor:
    """images + mean(sentences) - mean(train_images): the modality gap closed to first order (Liang et al., 2022).

    (N, D), (T, D), (M, D) of any float dtype -> (N, D) float32.
    """
    return images.float() + (sentences.float().mean(0) - train_images.float().mean(0))
