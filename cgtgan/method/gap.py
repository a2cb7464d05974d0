"""The modality gap between CLIP's image and text embeddings."""

from __future__ import annotations

from torch import Tensor


def mean_shifted(images: Tensor, train_images: Tensor, sentences: Tensor) -> Tensor:
    """images + mean(sentences) - mean(train_images): the modality gap closed to first order (Liang et al., 2022).

    (N, D), (T, D), (M, D) of any float dtype -> (N, D) float32.
    """
    return images.float() + (sentences.float().mean(0) - train_images.float().mean(0))
