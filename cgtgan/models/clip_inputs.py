"""What a CLIP reads: pixels and token ids, made by small callables without the model, in worker processes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cgtgan.errors import MissingFileError
from cgtgan.models.tokenizers import without_endless_words

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONTEXT = 77


@dataclass(frozen=True)
class ClipPixels:
    """CLIP's pipeline up to the scaling, bit for bit: short side to `size` (`squash`: both sides), centre crop, RGB.

    An image of any mode -> (3, size, size) uint8. It becomes RGB after the resize, as in clip's pipeline.
    """

    size: int
    resample: Image.Resampling = Image.Resampling.BICUBIC
    squash: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        size, short = self.size, min(image.size)
        width, height = (size if self.squash or side == short else int(size * side / short) for side in image.size)
        resized = (width, height)
        image = image.resize(resized, self.resample) if resized != image.size else image
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size)).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def preprocess(
    image: Image.Image, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """An image of any mode -> (3, size, size) float32, as clip's own `preprocess`."""
    return normalise(ClipPixels(size)(image), mean, std)


def normalise(pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(..., 3, H, W) uint8 -> float32: scaled to 0..1, then normalised with the mean and std of each channel"""
    channels = [torch.tensor(x, device=pixels.device)[:, None, None] for x in (mean, std)]
    return (pixels.float().div(255) - channels[0]) / channels[1]


@dataclass(frozen=True)
class TransformersPixels:
    """A transformers image processor (its PIL kind): image -> float32, scaled and normalised by its settings.

    NaFlex processors give patches (P, C), a mask and the grid. They are packed as (P + 1, C + 1), the grid in the
    last row and the mask in the last column; `unpack_patches` takes them apart.
    """

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        made = self.processor(images=image.convert("RGB"), return_tensors="pt")
        pixels = made["pixel_values"][0].float()
        if "spatial_shapes" not in made:
            return pixels
        packed = torch.zeros(len(pixels) + 1, pixels.shape[1] + 1)
        packed[:-1, :-1], packed[:-1, -1] = pixels, made["pixel_attention_mask"][0]
        packed[-1, :2] = made["spatial_shapes"][0]
        return packed


def unpack_patches(packed: Tensor) -> dict[str, Tensor]:
    """(B, P + 1, C + 1) -> the keyword arguments of a NaFlex model"""
    return {
        "pixel_values": packed[:, :-1, :-1],
        "pixel_attention_mask": packed[:, :-1, -1].int(),
        "spatial_shapes": packed[:, -1, :2].long(),
    }


def clip_module(name: str) -> ModuleType:
    """`clip.<name>` without clip's `__init__`, which wants torchvision and pkg_resources."""
    if "clip" not in sys.modules:
        spec = importlib.util.find_spec("clip")
        if spec is None or not spec.submodule_search_locations:
            raise MissingFileError(
                "clip_backbone: OpenAI's clip package is not installed; run: pip install 'cgtgan[clip]'"
            )
        package = ModuleType("clip")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["clip"] = package
    return importlib.import_module(f"clip.{name}")


@dataclass(frozen=True)
class OpenAITokens:
    """OpenAI's tokenizer, built on first use: texts -> ids from the start to the end token, cut to 77 as in clip."""

    bpe: str | None = None  # another BPE file than the one in the clip package

    @cached_property
    def _tokenizer(self) -> Any:
        words = clip_module("simple_tokenizer")
        return words.SimpleTokenizer(self.bpe) if self.bpe else words.SimpleTokenizer()

    def __getstate__(self) -> dict[str, Any]:
        return {"bpe": self.bpe}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        begin, end = (self._tokenizer.encoder[f"<|{name}oftext|>"] for name in ("start", "end"))
        rows = [[begin, *self._tokenizer.encode(without_endless_words(text)), end] for text in texts]
        return [row if len(row) <= CONTEXT else [*row[: CONTEXT - 1], end] for row in rows]


@dataclass(frozen=True)
class TransformersTokens:
    """A transformers tokenizer: texts -> ids, cut to `length`.

    whole: padded to it, for a tower that pools its last position. lower: in lower case first.
    """

    tokenizer: Any
    length: int
    whole: bool
    lower: bool = False

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        padding = "max_length" if self.whole else False
        texts = [text.lower() for text in texts] if self.lower else list(texts)
        return self.tokenizer(texts, padding=padding, truncation=True, max_length=self.length)["input_ids"]


def by_length(rows: Sequence[Sequence[int]], size: int) -> list[list[list[int]]]:
    """Places of equal rows together, shortest rows first, in batches of at most `size` different ones.

    A batch is as long as its longest row, and what occurs twice is encoded once.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(tuple(row), []).append(place)
    ordered = [places[row] for row in sorted(places, key=lambda row: (len(row), row))]
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
