"""OpenAI's CLIP architecture: its released archives, or a small one with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cgtgan.config import ClipBackboneConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.backbone_identity import archive_path, missing_archive
from cgtgan.models.chunks import pad_rows
from cgtgan.models.clip_backbone import ClipBackbone, frozen
from cgtgan.models.clip_inputs import CONTEXT, ClipPixels, OpenAITokens, clip_module
from cgtgan.runtime.devices import on_device


class OpenAIBackbone(ClipBackbone):
    """OpenAI's CLIP: a `.pt` archive by name or path; kind random: the architecture small, weights from seed 0."""

    def __init__(self, config: ClipBackboneConfig, device: torch.device):
        bpe = Path(config.tokenizer).expanduser() if config.tokenizer else None
        if bpe is not None and not bpe.is_file():
            raise MissingFileError(
                f"clip_backbone.tokenizer={bpe} is missing: it is OpenAI's bpe_simple_vocab_16e6.txt.gz"
            )
        self.tokens = OpenAITokens(str(bpe) if bpe else None)
        model = _random_model() if config.kind == "random" else _released_model(config)
        self.model = frozen(model.float(), device, config.dtype)
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()  # clip's own layer norm computes in float32 in any dtype
        self.device = device
        self.image_size = int(self.model.visual.input_resolution)
        self.pixels = ClipPixels(self.image_size)
        self.dim = int(self.model.text_projection.shape[1])
        self.logit_scale = 100.0 if config.kind == "random" else float(self.model.logit_scale.float().exp())
        self._mask = self.model.transformer.resblocks[0].attn_mask.clone().to(device)

    def _images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """clip's `encode_text` at a width below 77: the tower is causal, what follows the end token does not count."""
        tokens = on_device(pad_rows(rows)[0], self.device)
        m, width = self.model, tokens.shape[1]
        for block in m.transformer.resblocks:
            block.attn_mask = self._mask[:width, :width]
        x = m.token_embedding(tokens) + m.positional_embedding[:width]
        x = m.transformer(x.transpose(0, 1).to(m.positional_embedding.dtype)).transpose(0, 1)
        return m.ln_final(x)[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)] @ m.text_projection


def _random_model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return clip_module("model").CLIP(
            embed_dim=64, image_resolution=96, vision_layers=2, vision_width=64, vision_patch_size=32,
            context_length=CONTEXT, vocab_size=49408, transformer_width=64, transformer_heads=2, transformer_layers=2,
        )  # fmt: skip


def _released_model(config: ClipBackboneConfig) -> Any:
    build = clip_module("model")
    try:
        return build.build_model(_state(config))
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"clip_backbone.model={config.model}: its weights are no CLIP of OpenAI's ({_first_line(error)})"
        ) from None


def _state(config: ClipBackboneConfig) -> dict[str, Tensor]:
    path, name = archive_path(config), f"clip_backbone.model={config.model}"
    if sentence := missing_archive(config):
        raise MissingFileError(sentence)
    try:
        return torch.jit.load(str(path), map_location="cpu").eval().state_dict()
    except RuntimeError as error:
        reason = _first_line(error).split(". ")[0]
    try:  # people keep the plain weights of a CLIP too
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # every way in which foreign bytes can fail to be weights
        state = None
    if isinstance(state, dict) and "token_embedding.weight" in state and any(k.startswith("visual.") for k in state):
        return state
    raise InputError(
        f"{name}: {path} is not a CLIP archive in OpenAI's TorchScript format ({reason}): download it again"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
