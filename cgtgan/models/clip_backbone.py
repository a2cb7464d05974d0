"""The frozen CLIP that joins images and sentences: OpenAI's archives, transformers', open_clip's, a random one, or the demo's own.

One interface: `encode_images`, `encode_texts`, `logit_scale`, `dim`, `image_size`. Embeddings are raw projections, float32, unnormalised.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cgtgan.config import ClipBackboneConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.clip_inputs import (
    CLIP_MEAN,
    CLIP_STD,
    CONTEXT,
    ClipPixels,
    OpenAITokens,
    TransformersPixels,
    TransformersTokens,
    by_length,
    clip_module,
    normalise,
    padded,
    unpack_patches,
)
from cgtgan.models.demo_clip import DemoClip

_OPENAI_FILES = {"ViT-L/14": "ViT-L-14.pt", "ViT-B/32": "ViT-B-32.pt", "RN50x4": "RN50x4.pt"}


class ClipBackbone(ABC):
    """A frozen dual encoder. Subclasses give `dim`, `image_size`, `logit_scale`, what makes their inputs, and the two towers.

    pixels: image -> (3, S, S) uint8, or whatever float tensor the image tower reads. tokens: texts -> rows of ids. Both can be pickled.
    """

    dim: int
    image_size: int
    logit_scale: float
    pixels: Callable[[Image.Image], Tensor]
    tokens: Callable[[Sequence[str]], list[list[int]]]
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    ahead: bool = True  # whether worker processes may make pixels; they get a copy of `pixels`
    device: torch.device

    def preprocess(self, image: Image.Image) -> Tensor:
        """What the image tower reads of one image, float32."""
        pixels = self.pixels(image)
        return normalise(pixels, self.mean, self.std) if pixels.dtype == torch.uint8 else pixels

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """PIL images, or a batch of `pixels`, or of preprocessed ones -> (B, D) float32"""
        pixels = (images if isinstance(images, Tensor) else torch.stack([self.pixels(i) for i in images])).to(
            self.device
        )
        return self._images(normalise(pixels, self.mean, self.std) if pixels.dtype == torch.uint8 else pixels).float()

    @torch.no_grad()
    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids as `tokens` makes them, one batch -> (B, D) float32"""
        return self._tokens(rows).float()

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts -> (B, D) float32. Identical texts are encoded once; batches go by length and are cut to their longest text."""
        rows = self.tokens(texts)
        out = torch.empty(len(rows), self.dim, device=self.device)
        for places in by_length(rows, batch_size):
            found = self.encode_tokens([rows[same[0]] for same in places])
            owner = [i for i, same in enumerate(places) for _ in same]
            out[[place for same in places for place in same]] = found[owner]
        return out

    @abstractmethod
    def _images(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor: ...


def _frozen(model: nn.Module, device: torch.device, dtype: str) -> Any:
    return model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


class DemoBackbone(ClipBackbone):
    """`model` is trained by the stage that first needs it (stages/backbone.py)."""

    def __init__(self, model: DemoClip, device: torch.device):
        self.model = _frozen(model, device, "float32")
        self.device = device
        self.dim, self.image_size, self.logit_scale = model.config.dim, model.image_size, model.config.logit_scale
        self.pixels, self.tokens = ClipPixels(model.image_size), model.tokens

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return self.model.encode_tokens(rows)


# ---------------------------------------------------------------------------------------------------- OpenAI's architecture


class OpenAIBackbone(ClipBackbone):
    """OpenAI's CLIP: a `.pt` archive by name or path, or (kind random) the same architecture small, with weights drawn from seed 0."""

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        bpe = Path(config.tokenizer).expanduser() if config.tokenizer else None
        if bpe is not None and not bpe.is_file():
            raise MissingFileError(
                f"clip_backbone.tokenizer={bpe} is missing: it is OpenAI's bpe_simple_vocab_16e6.txt.gz"
            )
        self.tokens = OpenAITokens(str(bpe) if bpe else None)
        build = clip_module("model")
        if config.kind == "random":
            model = self._random(build)
        else:
            try:
                model = build.build_model(_openai_state(config))
            except (KeyError, RuntimeError) as e:
                first = str(e).strip().splitlines()[0]
                raise InputError(
                    f"clip_backbone.model={config.model}: its weights are no CLIP of OpenAI's ({first})"
                ) from None
        self.model = _frozen(model.float(), device, config.dtype)
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()  # clip's own computes in float32 whatever it is given
        self.device = device
        self.image_size = int(self.model.visual.input_resolution)
        self.pixels = ClipPixels(self.image_size)
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
        return self.model.encode_image(pixels)

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """clip's `encode_text` at a width below 77: the tower is causal, so what is left out behind the end token does not count."""
        tokens = padded(rows, 0).to(self.device)
        m, width = self.model, tokens.shape[1]
        for block in m.transformer.resblocks:
            block.attn_mask = self._mask[:width, :width]
        x = m.token_embedding(tokens) + m.positional_embedding[:width]
        x = m.transformer(x.transpose(0, 1).to(m.positional_embedding.dtype)).transpose(0, 1)
        return m.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)] @ m.text_projection


def _openai_state(config: ClipBackboneConfig) -> dict[str, Tensor]:
    path, name = _openai_path(config), f"clip_backbone.model={config.model}"
    if not path.is_file():
        address = _openai_address(config.model)
        raise MissingFileError(
            f"{name}: {path} is missing; get OpenAI's archive{f' ({address})' if address else ''} and put it there, or set "
            "clip_backbone.model to the .pt file, or clip_backbone.cache to its folder"
        )
    try:
        return torch.jit.load(str(path), map_location="cpu").eval().state_dict()
    except RuntimeError as e:
        first = str(e).strip().splitlines()[0].split(". ")[0]
    try:  # people keep the plain weights of a CLIP too
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # every way in which foreign bytes can fail to be weights
        state = None
    if (
        isinstance(state, dict)
        and "token_embedding.weight" in state
        and any(key.startswith("visual.") for key in state)
    ):
        return state
    raise InputError(
        f"{name}: {path} is not a CLIP archive in OpenAI's TorchScript format ({first}): download it again"
    )


def _openai_address(model: str) -> str | None:
    """Where OpenAI has the archive of this name, as the clip package says it."""
    try:
        spec = importlib.util.find_spec("clip.clip")  # imports our stand-in for the package, nothing of clip.py itself
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    except (ImportError, OSError, ValueError):
        return None
    found = re.search(rf'"{re.escape(model)}": "(https://[^"]+)"', source)
    return found[1] if found else None


def _openai_path(config: ClipBackboneConfig) -> Path:
    if config.model in _OPENAI_FILES:
        return Path(config.cache).expanduser() / _OPENAI_FILES[config.model]
    return Path(config.model).expanduser()


# -------------------------------------------------------------------------------------------------------- other packages


class HuggingFaceBackbone(ClipBackbone):
    """A dual encoder that transformers loads (CLIP, SigLIP 1 and 2 ...), from a hub name or a folder, with its own processors."""

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

        name = f"clip_backbone.model={config.model}"
        try:
            settings = AutoConfig.from_pretrained(config.model)
            tokenizer = AutoTokenizer.from_pretrained(config.model)
            # the PIL kind everywhere: the other one's pixels differ a little, and need torchvision
            processor = AutoImageProcessor.from_pretrained(config.model, backend="pil")
            model = AutoModel.from_pretrained(config.model, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise MissingFileError(
                f"{name}: no dual encoder is found there ({reason}); give a hub name with the network up, or a "
                "folder with config.json, weights, tokenizer and preprocessor_config.json"
            ) from None
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise InputError(
                f"{name} is a {type(model).__name__}: a dual encoder of images and texts, such as CLIP or SigLIP, is needed"
            )
        self.model, self.device = _frozen(model, device, config.dtype), device
        vision, text = settings.vision_config, settings.text_config
        self._patches = settings.model_type == "siglip2"  # NaFlex; the SigLIP 2 of fixed resolution are of type siglip
        self.image_size = int(getattr(vision, "image_size", 0) or round(vision.num_patches**0.5) * vision.patch_size)
        if not self._patches:
            _fit_processor(processor, self.image_size)
        self.pixels = TransformersPixels(processor)
        length = min(int(text.max_position_embeddings), int(tokenizer.model_max_length))
        whole = settings.model_type in (
            "siglip",
            "siglip2",
        )  # their text towers are not causal, and pool the last position
        self.tokens = TransformersTokens(tokenizer, length, whole)
        self._masked, self._pad = "attention_mask" in tokenizer.model_input_names, tokenizer.pad_token_id or 0
        scale = getattr(self.model, "logit_scale", None)
        self.logit_scale = 100.0 if scale is None else float(scale.float().exp())
        self.dim = self.encode_tokens(self.tokens(["a"])).shape[1]

    def _images(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.dtype)
        return _features(
            self.model.get_image_features(**(unpack_patches(pixels) if self._patches else {"pixel_values": pixels}))
        )

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        tokens = padded(rows, self._pad).to(self.device)
        if not self._masked:
            return _features(self.model.get_text_features(input_ids=tokens))
        if isinstance(self.tokens, TransformersTokens) and self.tokens.whole:
            mask = tokens != self._pad
        else:  # by length: a text may hold the padding's own id, as CLIP's end token is
            mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return _features(self.model.get_text_features(input_ids=tokens, attention_mask=mask.long().to(self.device)))


def _features(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output


def _fit_processor(processor: Any, size: int) -> None:
    """Where its file does not say the size, a processor has its class's default; the tower's own is meant."""
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
                "clip_backbone=open_clip needs the package open_clip_torch (with torchvision): pip install open_clip_torch"
            ) from None
        model = open_clip.create_model(config.model, pretrained=config.pretrained or None)
        self.model, self.device = _frozen(model, device, config.dtype), device
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


def load_backbone(config: ClipBackboneConfig, device: torch.device) -> ClipBackbone:
    """The backbone of every kind but `demo`, which is an artifact (stages/backbone.py)."""
    kinds = {
        "openai": OpenAIBackbone,
        "random": OpenAIBackbone,
        "huggingface": HuggingFaceBackbone,
        "open_clip": OpenClipBackbone,
    }
    return kinds[config.kind](config, device)


def backbone_identity(config: ClipBackboneConfig) -> dict[str, Any]:
    """What an embedding's fingerprint must know of the backbone: the weights by content where they are a local file."""
    identity: dict[str, Any] = {
        "kind": config.kind,
        "model": config.model,
        "pretrained": config.pretrained,
        "dtype": config.dtype,
    }
    if config.kind == "openai" and (path := _openai_path(config)).is_file():
        # a gigabyte takes seconds to hash and never changes in place: its name, size and first and last MiB tell files apart
        with path.open("rb") as f:
            head = f.read(1 << 20)
            f.seek(-min(1 << 20, path.stat().st_size), 2)
            identity |= {
                "model": path.name,
                "weights": hashlib.sha256(head + f.read()).hexdigest()[:12],
                "bytes": path.stat().st_size,
            }
    if config.tokenizer:
        identity["tokenizer"] = Path(config.tokenizer).name
    return identity
