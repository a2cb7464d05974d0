"""A user's own dual encoder, `clip_backbone.model=path.py:Name` or `package.module:Name` (docs/extending.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cgtgan.config import ClipBackboneConfig, custom_parts
from cgtgan.errors import InputError
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.runtime.custom import custom_errors, load_custom

FIELD = "clip_backbone.model"
_NEEDED = ("encode_images", "encode_texts")


class CustomBackbone(ClipBackbone):
    """An encoder with `encode_images` and `encode_texts`, perhaps `pixels` with `encode_pixels` or `tokens` with
    `encode_tokens`. A plain one gets one picture at a time, and the picture's embedding stands for its pixels.

    It runs on `device` where its `load` takes one, else where `load` puts it: a plain encoder makes its own tensors.
    Raises `InputError` where it fails on a picture or a text.
    """

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        self.spec, self.device = config.model, device
        encoder, takes_device = _load(config.model, device)
        self.encoder, self.encoder_device = encoder, device if takes_device else torch.device("cpu")
        self.image_size = int(getattr(encoder, "image_size", 224))
        self.logit_scale = float(getattr(encoder, "logit_scale", 100.0))
        self.has_pixels = hasattr(encoder, "pixels") and hasattr(encoder, "encode_pixels")
        self.pixels = _Guarded(encoder.pixels, self.spec) if self.has_pixels else self._embed
        self.ahead = self.has_pixels
        self.has_tokens = hasattr(encoder, "tokens") and hasattr(encoder, "encode_tokens")
        self.tokens = _Guarded(encoder.tokens, self.spec) if self.has_tokens else _utf8
        with torch.no_grad():
            self.dim = self.encode_tokens(self.tokens(["a"])).shape[1]
        self.encode_images([Image.linear_gradient("L").convert("RGB")])

    @torch.no_grad()
    def _embed(self, image: Image.Image) -> Tensor:
        """(D,) float32 on the CPU"""
        return self._checked("encode_images", [image], 1)[0].cpu()

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels  # `encode_pixels` reads what `pixels` makes, of any type

    def _images(self, pixels: Tensor) -> Tensor:
        if self.has_pixels:
            return self._checked("encode_pixels", pixels.to(self.encoder_device), len(pixels)).to(self.device)
        return pixels

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        if self.has_tokens:
            return self._checked("encode_tokens", rows, len(rows)).to(self.device)
        texts = [bytes(row).decode() for row in rows]
        return self._checked("encode_texts", texts, len(rows)).to(self.device)

    def _checked(self, method: str, batch: Any, rows: int) -> Tensor:
        """(rows, D) float32 of the encoder's `method`. Raises `InputError` for another shape or type."""
        with custom_errors(self.spec, FIELD):
            vectors = getattr(self.encoder, method)(batch)
        wanted = f"{FIELD}={self.spec}: {method} must return a float tensor ({rows}, D)"
        if not isinstance(vectors, Tensor):
            raise InputError(f"{wanted}, not a {type(vectors).__name__}")
        dim = getattr(self, "dim", vectors.shape[-1] if vectors.dim() else 0)
        if vectors.dim() != 2 or vectors.shape != (rows, dim) or not vectors.is_floating_point():
            known = f" with D={dim}, as for texts" if hasattr(self, "dim") else ""
            raise InputError(f"{wanted}{known}, not {vectors.dtype} of shape {tuple(vectors.shape)}")
        if not vectors.isfinite().all():
            raise InputError(f"{wanted} of finite numbers; some are NaN or infinite")
        return vectors.float()


@dataclass(frozen=True)
class _Guarded:
    """A function of the encoder whose errors name its file. Worker processes get a copy."""

    function: Callable[[Any], Any]
    spec: str

    def __call__(self, argument: Any) -> Any:
        with custom_errors(self.spec, FIELD):
            return self.function(argument)


def _utf8(texts: Sequence[str]) -> list[list[int]]:
    """A text's bytes stand for its tokens, so that equal texts are encoded once and long ones come together."""
    return [list(text.encode()) for text in texts]


def _load(spec: str, device: torch.device) -> tuple[Any, bool]:
    """The encoder, frozen, and whether its `load` takes the device."""
    kind = load_custom(spec, FIELD)
    with custom_errors(spec, FIELD):
        load = getattr(kind, "load", kind)
        takes_device = "device" in inspect.signature(load).parameters
        encoder = load(device=device) if takes_device else load()
    missing = [name for name in _NEEDED if not callable(getattr(encoder, name, None))]
    if missing:
        raise InputError(
            f"{FIELD}={spec} has no {' and no '.join(missing)}: a dual encoder has encode_images(pictures) and "
            "encode_texts(texts), each returning a float tensor (B, D)"
        )
    if isinstance(encoder, nn.Module):
        encoder.eval().requires_grad_(False)
    return encoder, takes_device


def absolute_spec(spec: str) -> str:
    """`spec` with the full path of its file, so that it holds in any working directory."""
    source, name = custom_parts(spec)
    return f"{Path(source).expanduser().resolve()}:{name}" if source.endswith(".py") else spec
