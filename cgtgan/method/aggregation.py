"""Aggregated text embeddings: attention over the corpus, one tiled float32 pass with a running maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from cgtgan.errors import InputError


def aggregate_text_embeddings(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    t: float,
    *,
    chunk_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
) -> Tensor:
    """a_i = sum_j softmax_j(t * cos(v_i, c_j)) * c_j with unnormalised c_j (CgT-GAN, section 3.2; METHOD: Aggregation).

    image_embeddings (N, D) and text_embeddings (M, D): any float dtype; the text may be memory-mapped, it is read once for each
    block of images, in tiles, so memory is bounded by about `chunk_bytes` and does not grow with M. Returns (N, D) float32 on the CPU
    when `device` is None and the images are there, else on `device`. t = 0 is the mean, a large t the nearest sentence: the running
    maximum keeps every exponent at 0 or below, so no t overflows.

    A zero vector has cosine 0 with everything. Raises `InputError` for shapes that do not fit, an empty corpus, a negative or not
    finite t, and rows that are not finite.
    """
    if image_embeddings.dim() != 2 or text_embeddings.dim() != 2 or image_embeddings.shape[1] != text_embeddings.shape[1]:
        raise InputError(
            f"embeddings of shapes {tuple(image_embeddings.shape)} and {tuple(text_embeddings.shape)} do not fit: (N, D) and (M, D)"
        )
    if len(text_embeddings) == 0:
        raise InputError("the corpus has no embeddings: there is nothing to aggregate over")
    t = float(t)
    if not 0 <= t < float("inf"):
        raise InputError(f"t={t} is not accepted: it must be a finite number of 0 or more")
    target = torch.device(device) if device is not None else image_embeddings.device
    rows, dim = image_embeddings.shape
    # a tile holds (text, D) vectors and (images, text) cosines, in float32 and a few times over
    tile = int(max(64, min(8192, len(text_embeddings), chunk_bytes // (16 * dim))))
    block = int(max(1, min(max(rows, 1), chunk_bytes // (16 * (tile + dim)))))
    out = torch.empty(rows, dim, dtype=torch.float32, device=target)
    for start in range(0, rows, block):
        out[start : start + block] = _aggregate_block(image_embeddings[start : start + block].to(target), text_embeddings, t, tile, start)
    return out


@torch.no_grad()
def _aggregate_block(images: Tensor, texts: Tensor, t: float, tile: int, first_row: int) -> Tensor:
    queries = _normalised(images.float(), "image", first_row)
    highest = torch.full((len(images), 1), -torch.inf, device=images.device)
    # Sums of very many terms lose digits in float32: the partial sums of the tiles are added up in float64.
    total = torch.zeros(len(images), 1, dtype=torch.float64, device=images.device)
    weighted = torch.zeros(images.shape, dtype=torch.float64, device=images.device)
    for start in range(0, len(texts), tile):
        values = texts[start : start + tile].to(images.device).float()
        cosines = queries @ _normalised(values, "text", start).T
        new_highest = torch.maximum(highest, cosines.amax(dim=1, keepdim=True))
        # The maximum comes off before the multiplication by t: near it, where the weight is, the difference of cosines is exact.
        shrink = torch.exp(t * (highest - new_highest).double()) if start else torch.zeros_like(total)
        weights = (cosines - new_highest).mul_(t).exp_()
        total = total * shrink + weights.sum(dim=1, keepdim=True)
        weighted = weighted * shrink + weights @ values
        highest = new_highest
    return (weighted / total).float()


def _normalised(x: Tensor, name: str, first_row: int) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not torch.isfinite(norm).all():
        row = first_row + int((~torch.isfinite(norm)).nonzero()[0, 0])
        raise InputError(f"{name} embedding {row} (counted from 0) is not finite: make the embeddings again")
    return x / norm.clamp_min(torch.finfo(torch.float32).tiny)
