"""The modality gap between CLIP's image and text embeddings: closed wherever the generator reads one, or made small by
noise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.method.aggregation import aggregate_text_embeddings
from cgtgan.method.consensus import AGREED, SentenceTable, consensus_sentences


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


@dataclass(frozen=True)
class Gap:
    """How the generator reads an embedding: `images(v)` and `texts(c)`, (N, D) of any float dtype -> (N, D) float32.

    unit: vectors are normalised first. image_scale, image_shift, text_shift (D,) float32: v * scale + shift, c + shift.
    corpus (M, D), t: an image is read as its aggregated text embedding at temperature t. corpus, table: as the mean of
    the sentences that agree most among those nearest to it. None: not done.
    """

    kind: str = "none"
    unit: bool = False
    image_scale: Tensor | None = None
    image_shift: Tensor | None = None
    text_shift: Tensor | None = None
    corpus: Tensor | None = None
    t: float | None = None
    table: SentenceTable | None = None

    def images(self, vectors: Tensor) -> Tensor:
        vectors = F.normalize(vectors.float(), dim=-1) if self.unit else vectors.float()
        if self.corpus is not None and self.t is not None:
            aggregated = aggregate_text_embeddings(vectors, self.corpus.to(vectors.device), self.t)
            return aggregated.half().float()  # as the embeddings of a split are stored
        if self.corpus is not None and self.table is not None:
            rows = consensus_sentences(vectors, self.corpus, self.table, AGREED, vectors.device)
            return self.corpus[rows].float().mean(1).to(vectors.device)
        if self.image_scale is not None:
            vectors = vectors * self.image_scale.to(vectors.device)
        return vectors if self.image_shift is None else vectors + self.image_shift.to(vectors.device)

    def texts(self, vectors: Tensor) -> Tensor:
        vectors = F.normalize(vectors.float(), dim=-1) if self.unit else vectors.float()
        return vectors if self.text_shift is None else vectors + self.text_shift.to(vectors.device)

    @property
    def changes_texts(self) -> bool:
        """Whether the initial generator, which reads texts alone, is another one."""
        return self.unit or self.text_shift is not None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.table is not None:
            values |= {f"table.{name}": value for name, value in vars(self.table).items()}
        return {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}


def closed_gap(
    kind: str, images: Tensor, sentences: Tensor, t: float | None = None, table: SentenceTable | None = None
) -> Gap:
    """The closure `kind` of the gap between unlabelled images (N, D) and sentences (M, D), with no pair of the two.

    With means m and deviations s, number by number: `mean` reads an image v as v + (m_T - m_I) (Liang et al., 2022);
    `mean_std` as (v - m_I) * s_T / s_I + m_T (TOMCap, arXiv 2512.04309); `c3` normalises, and reads v - m_I and c - m_T
    (Zhang et al., 2024); `projection` reads the sentences as v sees them at temperature t (DeCap, Li et al., 2023);
    `agreement` those of the sentences nearest to v that agree most with the others, by their `table`.
    Raises `ValueError` for another kind, for a projection without t, and for agreement without a table.
    """
    if kind == "none":
        return Gap()
    if kind == "projection" and t is not None:
        return Gap(kind, corpus=sentences, t=t)
    if kind == "agreement" and table is not None:
        return Gap(kind, corpus=sentences, table=table)
    images, sentences = images.float(), sentences.float()
    if kind == "c3":
        shifts = [-F.normalize(vectors, dim=-1).mean(0) for vectors in (images, sentences)]
        return Gap(kind, unit=True, image_shift=shifts[0], text_shift=shifts[1])
    image_mean, text_mean = images.mean(0), sentences.mean(0)
    if kind == "mean":
        return Gap(kind, image_shift=text_mean - image_mean)
    if kind == "mean_std":
        image_std, text_std = images.std(0, correction=0), sentences.std(0, correction=0)
        scale = torch.where(image_std > 0, text_std / image_std, 1.0)
        return Gap(kind, image_scale=scale, image_shift=text_mean - image_mean * scale)
    raise ValueError(f"{kind} with t={t} is no closure of the gap")
