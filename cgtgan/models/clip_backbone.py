"""The frozen CLIP that joins images and sentences: what every kind of it has in common, and the demo's."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cgtgan.models.backbone_identity import backbone_identity as backbone_identity
from cgtgan.models.clip_inputs import CLIP_MEAN, CLIP_STD, ClipPixels, by_length, normalise
from cgtgan.models.demo_clip import DemoClip
from cgtgan.runtime.devices import on_device


class ClipBackbone(ABC):
    """A frozen dual encoder: `dim`, `image_size`, `logit_scale`, the two towers and what makes their inputs.

    pixels: image -> (3, S, S) uint8, or whatever float tensor the image tower reads. tokens: texts -> rows of ids.
    Embeddings are raw projections, float32, unnormalised.
    """

    dim: int
    image_size: int
    logit_scale: float
    logit_bias: float | None = None  # of a model trained by a sigmoid for each pair, such as SigLIP
    pixels: Callable[[Image.Image], Tensor]
    tokens: Callable[[Sequence[str]], list[list[int]]]
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    ahead: bool = True  # whether worker processes may make pixels; they get a pickled copy of `pixels`
    device: torch.device

    def preprocess(self, image: Image.Image) -> Tensor:
        """What the image tower reads of one image, float32."""
        return self._normalised(self.pixels(image))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """PIL images, or a batch of `pixels`, or of preprocessed ones -> (B, D) float32"""
        pixels = images if isinstance(images, Tensor) else torch.stack([self.pixels(i) for i in images])
        return self._images(self._normalised(on_device(pixels, self.device))).float()

    @torch.no_grad()
    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids as `tokens` makes them, one batch -> (B, D) float32"""
        return self._tokens(rows).float()

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts -> (B, D) float32. Identical texts are encoded once; batches go by length."""
        rows = self.tokens(texts)
        out = torch.empty(len(rows), self.dim, device=self.device)
        for batch in by_length(rows, batch_size):
            vectors = self.encode_tokens([rows[places[0]] for places in batch])
            pairs = [(place, row) for row, places in enumerate(batch) for place in places]
            places, rows_of = on_device(torch.tensor(pairs).T, self.device)
            out[places] = vectors.index_select(0, rows_of)
        return out

    def probability(self, cosine: float) -> float | None:
        """Of picture and text belonging together, where the model was trained to tell it; None where it was not.

        sigmoid(logit_scale * cosine + logit_bias) (Zhai et al. 2023, section 3.2).
        """
        if self.logit_bias is None:
            return None
        return 1 / (1 + math.exp(-max(-700.0, self.logit_scale * cosine + self.logit_bias)))

    def _normalised(self, pixels: Tensor) -> Tensor:
        return normalise(pixels, self.mean, self.std) if pixels.dtype == torch.uint8 else pixels

    @abstractmethod
    def _images(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor: ...


def frozen(model: nn.Module, device: torch.device, dtype: str) -> Any:
    return model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


class DemoBackbone(ClipBackbone):
    """`model` is trained when it is first needed (assets/backbone.py)."""

    def __init__(self, model: DemoClip, device: torch.device):
        self.model = frozen(model, device, "float32")
        self.device = device
        self.dim, self.logit_scale = model.config.dim, model.config.logit_scale
        self.image_size = model.image_size
        self.pixels, self.tokens = ClipPixels(model.image_size), model.tokens

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return self.model.encode_tokens(rows)
