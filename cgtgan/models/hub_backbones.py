"""Dual encoders that other packages load: transformers, open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cgtgan.config import ClipBackboneConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.chunks import pad_rows
from cgtgan.models.clip_backbone import ClipBackbone, frozen
from cgtgan.models.clip_inputs import (
    CLIP_MEAN,
    CLIP_STD,
    ClipPixels,
    TransformersPixels,
    TransformersTokens,
    unpack_patches,
)
from cgtgan.models.weights import load_pretrained
from cgtgan.runtime.devices import on_device

FIELD = "clip_backbone.model"
_SIGMOID = ("siglip", "siglip2")  # a SigLIP 2 of fixed resolution has type siglip


class HuggingFaceBackbone(ClipBackbone):
    """A dual encoder of transformers (CLIP, SigLIP 1 and 2 ...), by hub name or folder, with its own processors."""

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        settings, tokenizer, processor, model = _from_pretrained(config.model)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise InputError(
                f"clip_backbone.model={config.model} is a {type(model).__name__}: a dual encoder of images and texts, "
                "such as CLIP or SigLIP, is needed"
            )
        self.model, self.device = frozen(model, device, config.dtype), device
        vision, text = settings.vision_config, settings.text_config
        self._patches = settings.model_type == "siglip2"  # NaFlex; a SigLIP 2 of fixed resolution has type siglip
        self.image_size = int(getattr(vision, "image_size", 0) or round(vision.num_patches**0.5) * vision.patch_size)
        if not self._patches:
            _set_image_size(processor, self.image_size)
        self.pixels = TransformersPixels(processor)
        # the text towers of SigLIP are not causal, and pool the last position
        self._whole = settings.model_type in _SIGMOID
        length = min(int(text.max_position_embeddings), int(tokenizer.model_max_length))
        # SigLIP was trained on lower-cased text, and the tokenizer of some checkpoints leaves that to its user
        lower = self._whole and getattr(tokenizer, "do_lower_case", None) is not False
        self.tokens = TransformersTokens(tokenizer, length, self._whole, lower)
        self._masked, self._pad = "attention_mask" in tokenizer.model_input_names, tokenizer.pad_token_id or 0
        scale = getattr(self.model, "logit_scale", None)
        self.logit_scale = 100.0 if scale is None else float(scale.float().exp())
        bias = getattr(self.model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.float())
        self.dim = self.encode_tokens(self.tokens(["a"])).shape[1]

    def _images(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.dtype)
        inputs = unpack_patches(pixels) if self._patches else {"pixel_values": pixels}
        return _features(self.model.get_image_features(**inputs))

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        # by length where texts are padded here: a text may hold the padding's own id, as CLIP's end token is
        tokens, mask = pad_rows(rows, self._pad)
        inputs = {"input_ids": on_device(tokens, self.device)}
        if self._masked:
            mask = tokens != self._pad if self._whole else mask
            inputs["attention_mask"] = on_device(mask.long(), self.device)
        return _features(self.model.get_text_features(**inputs))


def _from_pretrained(name: str) -> tuple[Any, Any, Any, Any]:
    """Config, tokenizer, image processor and model."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    settings = load_pretrained(AutoConfig.from_pretrained, name, FIELD, "dual encoder")
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, name, FIELD, "tokenizer")
    # the PIL kind everywhere: the other kind's pixels differ a little, and need torchvision
    processor = load_pretrained(AutoImageProcessor.from_pretrained, name, FIELD, "image processor", backend="pil")
    model = load_pretrained(AutoModel.from_pretrained, name, FIELD, "dual encoder", dtype=torch.float32)
    return settings, tokenizer, processor, model


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _set_image_size(processor: Any, size: int) -> None:
    """A processor whose file gives no size has its class's default; the tower's size is meant."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    sides = [value for part in (processor.size, crop) if part for value in dict(part).values() if value]
    if size not in sides:
        processor.size = {key: size for key, value in dict(processor.size).items() if value}
        if crop:
            processor.crop_size = {"height": size, "width": size}


class OpenClipBackbone(ClipBackbone):
    """A model of the open_clip package, where it is installed (it needs torchvision)."""

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        try:
            import open_clip  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingFileError(
                "clip_backbone=open_clip needs the package open_clip_torch (with torchvision): "
                "pip install open_clip_torch"
            ) from None
        model = open_clip.create_model(config.model, pretrained=config.pretrained or None)
        self.model, self.device = frozen(model, device, config.dtype), device
        size = model.visual.image_size
        self.image_size = int(size[0] if isinstance(size, tuple | list) else size)
        cfg = getattr(model.visual, "preprocess_cfg", {})
        resample = Image.Resampling.BILINEAR if cfg.get("interpolation") == "bilinear" else Image.Resampling.BICUBIC
        self.pixels = ClipPixels(self.image_size, resample, squash=cfg.get("resize_mode") == "squash")
        self.mean = cfg.get("mean") or getattr(model.visual, "image_mean", None) or CLIP_MEAN
        self.std = cfg.get("std") or getattr(model.visual, "image_std", None) or CLIP_STD
        self.tokens = _OpenClipTokens(config.model)
        self.logit_scale = float(model.logit_scale.float().exp())
        self.dim = self.encode_tokens(self.tokens(["a"])).shape[1]

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(next(self.model.parameters()).dtype))

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return self.model.encode_text(torch.tensor(rows, device=self.device))


class _OpenClipTokens:
    """open_clip's tokenizer of a model: texts -> rows of its whole context."""

    def __init__(self, model: str):
        self.model = model

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        import open_clip  # pyright: ignore[reportMissingImports]

        if not hasattr(self, "_tokenizer"):
            self._tokenizer = open_clip.get_tokenizer(self.model)
        return self._tokenizer(list(texts)).tolist() if texts else []
