"""Aggregated text embeddings: attention over the corpus, tiled, with a running maximum; its parts merge exactly.

One pass serves several temperatures: similarities, the reading and the normalising of the corpus are shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgtgan.errors import InputError

TILE = 2048  # sentences whose similarities are in memory at once
DECISIVE = 0.1  # share of an image's weight from which a sentence's cosine is computed once more, in float64
PAIRS = 4096  # cosines computed once more at a time


def aggregate_text_embeddings(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    t: float,
    *,
    chunk_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
) -> Tensor:
    """a_i = sum_j softmax_j(t * cos(v_i, c_j)) * c_j with unnormalised c_j (CgT-GAN, section 3.2; METHOD: Aggregation).

    image_embeddings (N, D) and text_embeddings (M, D): any float dtype; the text may be memory-mapped, it is read once
    for each block of images, in tiles, so memory is bounded by about `chunk_bytes` and does not grow with M. Returns
    (N, D) float32 on the CPU when `device` is None and the images are there, else on `device`. t = 0 is the mean, a
    large t the nearest sentence: the running maximum keeps every exponent at 0 or below, so no t overflows.

    A zero vector has cosine 0 with everything. Raises `InputError` for shapes that do not fit, an empty corpus, a
    negative or not finite t, and rows that are not finite.
    """
    return aggregate_at_temperatures(image_embeddings, text_embeddings, [t], chunk_bytes=chunk_bytes, device=device)[0]


def aggregate_at_temperatures(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperatures: Sequence[float],
    *,
    chunk_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
) -> Tensor:
    """`aggregate_text_embeddings` for T temperatures in one pass over the corpus: (T, N, D) float32."""
    _check(image_embeddings, text_embeddings, temperatures)
    target = torch.device(device) if device is not None else image_embeddings.device
    out = torch.empty(len(temperatures), *image_embeddings.shape, dtype=torch.float32, device=target)
    rows = image_block(image_embeddings, text_embeddings, len(temperatures), chunk_bytes)
    for start in range(0, len(image_embeddings), rows):
        block = image_embeddings[start : start + rows]
        part = aggregate_part(
            block, text_embeddings, temperatures, chunk_bytes=chunk_bytes, device=target, first_image=start
        )
        out[:, start : start + rows] = part.result()
    return out


@dataclass(frozen=True)
class PartialAggregate:
    """What a part of the corpus contributes, for T temperatures and N images; sums are relative to `highest`.

    highest (N, 1) float64: the largest cosine; total (T, N, 1) and weighted (T, N, D), float64: sums of exp(t (cos -
    highest)) and of the same times c_j.
    """

    temperatures: tuple[float, ...]
    highest: Tensor
    total: Tensor
    weighted: Tensor

    def merge(self, other: PartialAggregate) -> PartialAggregate:
        """The aggregate over both parts, as one pass over them would have it (up to the rounding of a float64 sum)."""
        assert self.temperatures == other.temperatures
        highest = torch.maximum(self.highest, other.highest)
        total, weighted = torch.zeros_like(self.total), torch.zeros_like(self.weighted)
        for part in (self, other):
            shrink = _shrink(part.temperatures, part.highest, highest)
            total += part.total * shrink
            weighted += part.weighted * shrink
        return PartialAggregate(self.temperatures, highest, total, weighted)

    def result(self) -> Tensor:
        """(T, N, D) float32: the aggregated embeddings, if this is the whole corpus."""
        return (self.weighted / self.total).float()


@torch.no_grad()
def aggregate_part(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperatures: Sequence[float],
    *,
    chunk_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
    first_image: int = 0,
    first_text: int = 0,
) -> PartialAggregate:
    """One pass of these images (N, D) over this part of the corpus (M, D), M >= 1.

    N is what `chunk_bytes` must hold at once.

    first_image, first_text: what row 0 is called where a row is not finite. Raises `InputError` as
    `aggregate_text_embeddings` does.
    """
    _check(image_embeddings, text_embeddings, temperatures)
    target = torch.device(device) if device is not None else image_embeddings.device
    # in units of the sharpest temperature: what is multiplied into the queries need not be multiplied into N x M
    # similarities
    sharpest = max(temperatures, default=0) or 1.0
    ratios = [t / sharpest for t in temperatures]
    exact_queries = _unit(image_embeddings.to(target), "image", first_image)
    exact_scaled = sharpest * exact_queries
    queries = exact_scaled.float()
    highest = torch.full((len(queries), 1), -torch.inf, device=target)
    total = torch.zeros(len(temperatures), len(queries), 1, dtype=torch.float64, device=target)
    weighted = torch.zeros(len(temperatures), *queries.shape, dtype=torch.float64, device=target)
    centre = _centre(text_embeddings, target, chunk_bytes, first_text)
    # in fresh memory for every tile some of this would take longer than the work itself
    room, sums = (
        torch.empty(len(queries), _tile(text_embeddings, chunk_bytes), device=target),
        torch.empty_like(queries),
    )
    for values, keys in _tiles(text_embeddings, centre, chunk_bytes, first_text):
        scores = torch.mm(queries, keys.T, out=room[:, : len(keys)])
        in_tile = scores.amax(dim=1, keepdim=True)
        before, highest = highest, torch.maximum(highest, in_tile)
        scores.sub_(highest)
        risen = (highest > before).nonzero()[:, 0]  # few, after the first tiles
        shrink = _shrink(ratios, before[risen], highest[risen])
        total[:, risen] *= shrink
        weighted[:, risen] *= shrink
        _refine(scores, in_tile - highest, exact_scaled, keys, highest, total, ratios)
        for i, ratio in enumerate(ratios):
            # in place for the last one: the scores are not needed any more
            in_place = i == len(ratios) - 1
            weights = (
                scores if ratio == 1 and in_place else torch.mul(scores, ratio, out=scores if in_place else None)
            ).exp_()
            # Sums of very many terms lose digits in float32: the partial sums of the tiles are added up in float64.
            total[i] += weights.sum(dim=1, keepdim=True)
            weighted[i] += torch.mm(weights, values, out=sums)
    return PartialAggregate(
        tuple(temperatures), highest.double() / sharpest + exact_queries @ centre.T, total, weighted
    )


@torch.no_grad()
def aggregate_nearest(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperatures: Sequence[float],
    k: int,
    *,
    chunk_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """`aggregate_at_temperatures` over the k nearest sentences of each image alone, found exactly in one pass.

    Returns the aggregated embeddings (T, N, D) float32 and the mass that the other sentences have in the full softmax,
    (T, N) float32.
    """
    target = torch.device(device) if device is not None else image_embeddings.device
    aggregated = torch.empty(len(temperatures), *image_embeddings.shape, dtype=torch.float32, device=target)
    dropped = torch.empty(len(temperatures), len(image_embeddings), dtype=torch.float32, device=target)
    t = torch.tensor(temperatures, dtype=torch.float64, device=target)[:, None, None]
    rows = image_block(image_embeddings, text_embeddings, k, chunk_bytes)
    for start in range(0, len(image_embeddings), rows):
        block = image_embeddings[start : start + rows].to(target)
        cosines, texts, total = _nearest(block, text_embeddings, temperatures, k, chunk_bytes, start)
        # the k sentences alone: exact cosines, and a softmax of (T, N, k)
        values = text_embeddings[texts.flatten().cpu()].to(target).double().view(*texts.shape, -1)
        exact = torch.einsum(
            "nd,nkd->nk", _unit(block, "image", start), _unit(values.flatten(0, 1), "text", 0).view_as(values)
        )
        weights = torch.exp(t * (exact - cosines[:, :1]))
        kept = weights.sum(dim=-1)
        mean = torch.einsum("tnk,nkd->tnd", weights, values) / kept[..., None]
        aggregated[:, start : start + rows] = mean.float()
        dropped[:, start : start + rows] = (1 - kept / torch.maximum(total, kept)).float()
    return aggregated, dropped


def nearest_texts(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    k: int,
    *,
    chunk_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
) -> Tensor:
    """(N, k) int64: rows of the k sentences with the highest cosine, the nearest first. k is cut to M."""
    target = torch.device(device) if device is not None else image_embeddings.device
    rows = image_block(image_embeddings, text_embeddings, k, chunk_bytes)
    nearest = [torch.empty(0, min(k, len(text_embeddings)), dtype=torch.long, device=target)]
    for start in range(0, len(image_embeddings), rows):
        block = image_embeddings[start : start + rows].to(target)
        nearest.append(_nearest(block, text_embeddings, [], k, chunk_bytes, start)[1])
    return torch.cat(nearest)


@torch.no_grad()
def _nearest(
    images: Tensor, texts: Tensor, temperatures: Sequence[float], k: int, chunk_bytes: int, first_image: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (N, k) float64 and rows (N, k) of the nearest sentences; sums (T, N) float64 of exp(t (cos - highest))
    over all.
    """
    _check(images, texts, temperatures)
    exact_queries = _unit(images, "image", first_image)
    queries = exact_queries.float()
    best = torch.full((len(images), 0), -torch.inf, device=images.device)
    rows = torch.zeros(len(images), 0, dtype=torch.long, device=images.device)
    total = torch.zeros(len(temperatures), len(images), 1, dtype=torch.float64, device=images.device)
    highest = torch.full((len(images), 1), -torch.inf, device=images.device)
    centre, first = _centre(texts, images.device, chunk_bytes, 0), 0
    for values, keys in _tiles(texts, centre, chunk_bytes, 0):
        cosines = queries @ keys.T
        in_tile, places = cosines.topk(min(k, len(values)), dim=1)
        best, order = torch.cat([best, in_tile], dim=1).topk(min(k, first + len(values)), dim=1)
        rows = torch.cat([rows, places + first], dim=1).gather(1, order)
        first += len(values)
        if temperatures:
            before, highest = highest, best[:, :1]
            total *= _shrink(temperatures, before, highest)
            for i, t in enumerate(temperatures):
                total[i] += torch.exp(t * (cosines - highest)).sum(dim=1, keepdim=True)
    return best.double() + exact_queries @ centre.T, rows, total[..., 0]


def _centre(texts: Tensor, device: torch.device, chunk_bytes: int, first_text: int) -> Tensor:
    """(1, D) float64: the mean direction of the first sentences.

    CLIP's sentences lie in a narrow cone. What they have in common shifts all cosines of an image by one number, which
    a softmax does not see; with it taken off, the float32 products are several times more exact.
    """
    return _unit(texts[: _tile(texts, chunk_bytes)].to(device), "text", first_text).mean(dim=0, keepdim=True)


def _tiles(texts: Tensor, centre: Tensor, chunk_bytes: int, first_text: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sentences (R, D) and their unit vectors less `centre`, both float32, tile after tile, each in the place of the
    one before.
    """
    rows = _tile(texts, chunk_bytes)
    minus_centre = -centre.float()
    values, keys = (torch.empty(rows, texts.shape[1], device=centre.device) for _ in range(2))
    for start in range(0, len(texts), rows):
        tile = texts[start : start + rows]
        values, keys = values[: len(tile)], keys[: len(tile)]
        values.copy_(tile)
        reciprocal = _reciprocal_norms(values, "text", first_text + start).float()
        yield values, torch.addcmul(minus_centre, values, reciprocal, out=keys)


def _shrink(temperatures: Sequence[float], before: Tensor, after: Tensor) -> Tensor:
    """(T, N, 1) float64: what sums relative to the maximum `before` are multiplied by to be relative to `after`."""
    t = torch.tensor(temperatures, dtype=torch.float64, device=before.device)
    gap = torch.where(
        before == -torch.inf, 0.0, before.double() - after.double()
    )  # nothing is summed before the first tile
    return torch.exp(t[:, None, None] * gap)


def _refine(
    scores: Tensor,
    tile_highest: Tensor,
    exact: Tensor,
    keys: Tensor,
    highest: Tensor,
    total: Tensor,
    ratios: Sequence[float],
) -> None:
    """Give the scores that decide an image's answer the accuracy of a float64 product, in place.

    A float32 cosine of D terms is wrong by some 3e-8; t times that is the relative error of a weight. Over many small
    weights such errors cancel; the few sentences with more than `DECISIVE` of an image's weight (at most 1/`DECISIVE`
    of them) are worth a second look.
    """
    cut = torch.full_like(highest, torch.inf)
    for i, ratio in enumerate(ratios):
        if ratio > 0:
            mass = total[i].float()
            mass = (
                torch.where(mass > 0, mass, (scores * ratio).exp_().sum(dim=1, keepdim=True))
                if not mass.all()
                else mass
            )
            cut = torch.minimum(cut, torch.log(DECISIVE * mass) / ratio)
    rows = (tile_highest >= cut).nonzero()[:, 0]
    row, column = (scores[rows] >= cut[rows]).nonzero(as_tuple=True)
    row = rows[row]
    for r, c in zip(row.split(PAIRS), column.split(PAIRS), strict=True):
        scores[r, c] = ((exact[r] * keys[c]).sum(dim=1) - highest[r, 0]).float()


def _unit(x: Tensor, name: str, first_row: int) -> Tensor:
    """Rows of length 1, float64; a zero vector stays one."""
    return x.double() * _reciprocal_norms(x, name, first_row)


def _reciprocal_norms(x: Tensor, name: str, first_row: int) -> Tensor:
    """(N, 1) float64, 0 for a zero vector. In float64 no square of a float32 overflows or vanishes."""
    # few rows at a time: torch makes a float64 copy of them
    norm = torch.cat(
        [torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64) for rows in x.split(256)]
    )
    if not torch.isfinite(norm).all():
        row = first_row + int((~torch.isfinite(norm)).nonzero()[0, 0])
        raise InputError(f"{name} embedding {row} (counted from 0) is not finite: make the embeddings again")
    return torch.where(norm > 0, 1 / norm, 0.0)


def _check(images: Tensor, texts: Tensor, temperatures: Sequence[float]) -> None:
    if images.dim() != 2 or texts.dim() != 2 or images.shape[1] != texts.shape[1]:
        raise InputError(
            f"embeddings of shapes {tuple(images.shape)} and {tuple(texts.shape)} do not fit: (N, D) and (M, D)"
        )
    if len(texts) == 0:
        raise InputError("the corpus has no embeddings: there is nothing to aggregate over")
    for t in temperatures:
        if not 0 <= float(t) < float("inf"):
            raise InputError(f"t={float(t)} is not accepted: it must be a finite number of 0 or more")


def _tile(texts: Tensor, chunk_bytes: int) -> int:
    return int(max(64, min(TILE, len(texts), chunk_bytes // (16 * texts.shape[1]))))


def image_block(images: Tensor, texts: Tensor, temperatures: int, chunk_bytes: int) -> int:
    """How many images `aggregate_part` can take at once within `chunk_bytes`."""
    an_image = 4 * images.shape[1] + 16 * temperatures * images.shape[1] + 8 * _tile(texts, chunk_bytes)
    return int(max(1, min(max(len(images), 1), chunk_bytes // an_image)))
