"""The frozen CLIP that joins images and sentences: OpenAI's archives, transformers', open_clip's, a random one, or the demo's own.

One interface: `encode_images`, `encode_texts`, `logit_scale`, `dim`, `image_size`. Embeddings are raw projections, float32, unnormalised.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cgtgan.config import ClipBackboneConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.demo_clip import DemoClip

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONTEXT = 77
_OPENAI_FILES = {"ViT-L/14": "ViT-L-14.pt", "ViT-B/32": "ViT-B-32.pt", "RN50x4": "RN50x4.pt"}


def preprocess(image: Image.Image, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """CLIP's own pipeline, bit for bit: short side to `size` with BICUBIC, centre crop, RGB, scale, normalise.

    An image of any mode -> (3, size, size) float32. It becomes RGB after the resize, as in clip's pipeline.
    """
    width, height = image.size
    short = min(width, height)
    resized = (size if width == short else int(size * width / short), size if height == short else int(size * height / short))
    image = image.resize(resized, Image.Resampling.BICUBIC) if resized != image.size else image
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    return normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1), mean, std)


def normalise(pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(..., 3, H, W) uint8 -> float32, scaled to 0..1, less the mean, by the standard deviation of each channel"""
    channels = [torch.tensor(x, device=pixels.device)[:, None, None] for x in (mean, std)]
    return (pixels.float().div(255) - channels[0]) / channels[1]


class ClipBackbone(ABC):
    """A frozen dual encoder. Subclasses give `dim`, `image_size`, `logit_scale` and the two towers."""

    dim: int
    image_size: int
    logit_scale: float
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    def preprocess(self, image: Image.Image) -> Tensor:
        return preprocess(image, self.image_size, self.mean, self.std)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """PIL images, or preprocessed pixels (B, 3, H, W) -> (B, D) float32"""
        pixels = images if isinstance(images, Tensor) else torch.stack([self.preprocess(i) for i in images])
        return self._images(pixels).float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts -> (B, D) float32. Identical texts are encoded once; batches go by length and are cut to their longest text."""
        unique = sorted(set(texts), key=lambda t: (len(t), t))
        if not unique:
            return torch.empty(0, self.dim)
        encoded = torch.cat([self._texts(unique[i : i + batch_size]).float() for i in range(0, len(unique), batch_size)])
        place = {text: i for i, text in enumerate(unique)}
        return encoded[torch.tensor([place[t] for t in texts], device=encoded.device)]

    @abstractmethod
    def _images(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _texts(self, texts: Sequence[str]) -> Tensor: ...


def _frozen(model: nn.Module, device: torch.device, dtype: str) -> Any:
    return model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


class DemoBackbone(ClipBackbone):
    """`model` is trained by the stage that first needs it (stages/backbone.py)."""

    def __init__(self, model: DemoClip, device: torch.device):
        self.model = _frozen(model, device, "float32")
        self.device = device
        self.dim, self.image_size, self.logit_scale = model.config.dim, model.image_size, model.config.logit_scale

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.device))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(texts)


# ---------------------------------------------------------------------------------------------------- OpenAI's architecture


def _clip_module(name: str) -> ModuleType:
    """`clip.<name>` without clip's `__init__`, which wants torchvision and pkg_resources."""
    spec = importlib.util.find_spec("clip") if "clip" not in sys.modules else None
    if "clip" not in sys.modules:
        if spec is None or not spec.submodule_search_locations:
            raise MissingFileError("clip_backbone: OpenAI's clip package is not installed; run: pip install 'cgtgan[clip]'")
        package = ModuleType("clip")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["clip"] = package
    return importlib.import_module(f"clip.{name}")


class OpenAIBackbone(ClipBackbone):
    """OpenAI's CLIP: a `.pt` archive by name or path, or (kind random) the same architecture small, with weights drawn from seed 0."""

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        bpe = Path(config.tokenizer).expanduser() if config.tokenizer else None
        if bpe is not None and not bpe.is_file():
            raise MissingFileError(f"clip_backbone.tokenizer={bpe} is missing: it is OpenAI's bpe_simple_vocab_16e6.txt.gz")
        words = _clip_module("simple_tokenizer")
        self.tokenizer = words.SimpleTokenizer(str(bpe)) if bpe else words.SimpleTokenizer()
        self.begin, self.end = self.tokenizer.encoder["<|startoftext|>"], self.tokenizer.encoder["<|endoftext|>"]
        build = _clip_module("model")
        model = self._random(build) if config.kind == "random" else build.build_model(_openai_state(config))
        self.model = _frozen(model.float(), device, config.dtype)
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()  # clip's own computes in float32 whatever it is given
        self.device = device
        self.image_size = int(self.model.visual.input_resolution)
        self.dim = int(self.model.text_projection.shape[1])
        self.logit_scale = 100.0 if config.kind == "random" else float(self.model.logit_scale.float().exp())
        self._mask = self.model.transformer.resblocks[0].attn_mask.clone()

    @staticmethod
    def _random(build: ModuleType) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build.CLIP(
                embed_dim=64, image_resolution=96, vision_layers=2, vision_width=64, vision_patch_size=32,
                context_length=CONTEXT, vocab_size=49408, transformer_width=64, transformer_heads=2, transformer_layers=2,
            )  # fmt: skip

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.device))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        rows = [[self.begin, *self.tokenizer.encode(t), self.end] for t in texts]
        rows = [row if len(row) <= CONTEXT else [*row[: CONTEXT - 1], self.end] for row in rows]
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        return self._text_tower(tokens)

    def _text_tower(self, tokens: Tensor) -> Tensor:
        """clip's `encode_text` at a width below 77: the tower is causal, so what is left out behind the end token does not count."""
        m, width = self.model, tokens.shape[1]
        for block in m.transformer.resblocks:
            block.attn_mask = self._mask[:width, :width]
        x = m.token_embedding(tokens) + m.positional_embedding[:width]
        x = m.transformer(x.transpose(0, 1).to(m.positional_embedding.dtype)).transpose(0, 1)
        return m.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)] @ m.text_projection


def _openai_state(config: ClipBackboneConfig) -> dict[str, Tensor]:
    path = _openai_path(config)
    if not path.is_file():
        raise MissingFileError(
            f"clip_backbone.model={config.model}: {path} is missing; get OpenAI's archive (its address stands in the clip package's "
            "clip.py) and put it there, or set clip_backbone.model to the .pt file, or clip_backbone.cache to its folder"
        )
    try:
        return torch.jit.load(str(path), map_location="cpu").eval().state_dict()
    except RuntimeError as e:
        first = str(e).strip().splitlines()[0]
        raise InputError(
            f"clip_backbone.model={config.model}: {path} is not a CLIP archive in OpenAI's TorchScript format ({first})"
        ) from None


def _openai_path(config: ClipBackboneConfig) -> Path:
    if config.model in _OPENAI_FILES:
        return Path(config.cache).expanduser() / _OPENAI_FILES[config.model]
    return Path(config.model).expanduser()


# -------------------------------------------------------------------------------------------------------- other packages


class HuggingFaceBackbone(ClipBackbone):
    """A CLIP that transformers loads, from a hub name or a folder; its tokenizer and pixel statistics come from the same place."""

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils.hub import cached_file

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(config.model)
            model = AutoModel.from_pretrained(config.model, dtype=torch.float32)
            settings = AutoConfig.from_pretrained(config.model)
            pixels = json.loads(Path(str(cached_file(config.model, "preprocessor_config.json"))).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            reason = str(e).strip().splitlines()[0]
            raise MissingFileError(
                f"clip_backbone.model={config.model}: no dual encoder is found there ({reason}); give a hub name with the network up, or a "
                "folder with config.json, weights, tokenizer and preprocessor_config.json"
            ) from None
        self.model, self.device = _frozen(model, device, config.dtype), device
        self.image_size = int(settings.vision_config.image_size)
        self.mean, self.std = pixels.get("image_mean", CLIP_MEAN), pixels.get("image_std", CLIP_STD)
        self.logit_scale = float(self.model.logit_scale.float().exp())
        self.dim = int(settings.projection_dim)

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels.to(self.device, self.model.dtype)).pooler_output

    def _texts(self, texts: Sequence[str]) -> Tensor:
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt").to(self.device)
        return self.model.get_text_features(**batch).pooler_output


class OpenClipBackbone(ClipBackbone):
    """A model of the open_clip package, where it is installed (it needs torchvision)."""

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        try:
            import open_clip  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingFileError(
                "clip_backbone=open_clip needs the package open_clip_torch (with torchvision): pip install open_clip_torch"
            ) from None
        model, _, _ = open_clip.create_model_and_transforms(config.model, pretrained=config.pretrained or None)
        self.model, self.device = _frozen(model, device, config.dtype), device
        self.tokenizer = open_clip.get_tokenizer(config.model)
        size = model.visual.image_size
        self.image_size = int(size[0] if isinstance(size, tuple | list) else size)
        self.mean, self.std = model.visual.image_mean or CLIP_MEAN, model.visual.image_std or CLIP_STD
        self.logit_scale = float(model.logit_scale.float().exp())
        self.dim = len(self._texts(["a"])[0])

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.device))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device))


def load_backbone(config: ClipBackboneConfig, device: torch.device) -> ClipBackbone:
    """The backbone of every kind but `demo`, which is an artifact (stages/backbone.py)."""
    kinds = {"openai": OpenAIBackbone, "random": OpenAIBackbone, "huggingface": HuggingFaceBackbone, "open_clip": OpenClipBackbone}
    return kinds[config.kind](config, device)


def backbone_identity(config: ClipBackboneConfig) -> dict[str, Any]:
    """What an embedding's fingerprint must know of the backbone: the weights by content where they are a local file."""
    identity: dict[str, Any] = {"kind": config.kind, "model": config.model, "pretrained": config.pretrained, "dtype": config.dtype}
    if config.kind == "openai" and (path := _openai_path(config)).is_file():
        # a gigabyte takes seconds to hash and never changes in place: its name, size and first and last MiB tell files apart
        with path.open("rb") as f:
            head = f.read(1 << 20)
            f.seek(-min(1 << 20, path.stat().st_size), 2)
            identity |= {"model": path.name, "weights": hashlib.sha256(head + f.read()).hexdigest()[:12], "bytes": path.stat().st_size}
    if config.tokenizer:
        identity["tokenizer"] = Path(config.tokenizer).name
    return identity
