"""Pseudo-pairs: images and sentences that CLIP finds for each other, to train on as if a person had paired them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.method.aggregation import nearest_texts

IMAGES_PER_SENTENCE, SENTENCES_PER_IMAGE, KEPT = 15, 2, 0.9


class PseudoPairs(NamedTuple):
    """P pairs, in the order of the sentences: rows (P,) int64 of sentence and image, weight (P,) float32 in [0, 1]."""

    sentence: Tensor
    image: Tensor
    weight: Tensor


def pseudo_pairs(images: Tensor, sentences: Tensor, device: torch.device | None = None) -> PseudoPairs:
    """Images (N, D) and sentences (M, D) of any float dtype -> pairs of them (after SynC, arXiv 2507.18616).

    Of a sentence's 15 nearest images, the one whose 2 nearest sentences are most like it by their mean cosine; the 90%
    of the sentences that are most alike are kept. A pair weighs clamp(4 cos, 0, 1) of image and sentence.
    """
    near_images = nearest_texts(sentences, images, min(IMAGES_PER_SENTENCE, len(images)), device=device)
    near_sentences = nearest_texts(images, sentences, min(SENTENCES_PER_IMAGE, len(sentences)), device=device)
    chosen, likeness, cosine = [], [], []
    for start in range(0, len(sentences), 1024):
        candidates = near_images[start : start + 1024]  # (m, 15)
        own = F.normalize(sentences[start : start + 1024].float(), dim=-1)
        of_images = F.normalize(sentences[near_sentences[candidates]].float(), dim=-1)  # (m, 15, 2, D)
        alike = torch.einsum("md,mksd->mks", own, of_images).mean(-1)
        best = alike.argmax(-1, keepdim=True)
        image = candidates.gather(1, best)[:, 0]
        chosen.append(image)
        likeness.append(alike.gather(1, best)[:, 0])
        cosine.append((own * F.normalize(images[image].float(), dim=-1)).sum(-1))
    kept = torch.cat(likeness).topk(max(1, round(KEPT * len(sentences)))).indices.sort().values
    return PseudoPairs(kept, torch.cat(chosen)[kept], (4 * torch.cat(cosine)[kept]).clamp(0, 1))
