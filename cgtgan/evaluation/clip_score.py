"""CLIPScore and RefCLIPScore (Hessel et al., 2021, "CLIPScore: A Reference-free Evaluation Metric for Image
Captioning").

Pure functions of embeddings. The published numbers are of ViT-B/32; another backbone's live on another scale and
compare among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cgtgan.evaluation.java import clean_line

PREFIX = "A photo depicts "
W = 2.5


def prompt(text: str) -> str:
    """What is embedded of a caption or reference: the authors' prefix and the text as it is, case and full stop
    included, on one line.

    Their program puts the prefix before the references too, and cuts what is beyond CLIP's context, as every backbone
    of ours does.
    """
    return PREFIX + clean_line(text)


def clip_scores(images: Tensor, captions: Tensor) -> Tensor:
    """CLIP-S = 2.5 * max(cos(image, caption), 0) (their eq. 1).

    (N, D), (N, D) of any float dtype and length -> (N,) float32, 0 to 2.5
    """
    return W * cosine_similarity(images.float(), captions.float(), dim=1).clamp(min=0)


def ref_clip_scores(scores: Tensor, captions: Tensor, references: Sequence[Tensor]) -> Tensor:
    """RefCLIP-S (their eq. 2): the harmonic mean of CLIP-S and the largest max(cos(caption, reference), 0); 0 where one
    of them is 0.

    Args: `clip_scores` (N,), their captions (N, D), and N tensors (R_i, D) with at least one reference each. Returns:
    (N,) float32
    """
    pairs = zip(captions.float(), references, strict=True)
    nearest = torch.stack(
        [cosine_similarity(caption[None], refs.float(), dim=1).max() for caption, refs in pairs]
    ).clamp(min=0)
    total = scores + nearest
    return torch.where(total > 0, 2 * scores * nearest / total, 0.0)
