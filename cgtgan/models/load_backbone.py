"""The CLIP that the settings name: opened, and what tells its embeddings from another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cgtgan.config import ClipBackboneConfig
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.models.custom_backbone import CustomBackbone, custom_identity
from cgtgan.models.hub_backbones import HuggingFaceBackbone, OpenClipBackbone
from cgtgan.models.openai_clip import OpenAIBackbone, archive_identity, archive_path


def load_backbone(config: ClipBackboneConfig, device: torch.device) -> ClipBackbone:
    """The backbone of every kind but `demo`, which is an artifact (assets/backbone.py)."""
    kinds = {
        "openai": OpenAIBackbone,
        "random": OpenAIBackbone,
        "huggingface": HuggingFaceBackbone,
        "open_clip": OpenClipBackbone,
        "custom": CustomBackbone,
    }
    return kinds[config.kind](config, device)


def backbone_identity(config: ClipBackboneConfig) -> dict[str, Any]:
    """What an embedding's fingerprint must know of the backbone: the weights by content where they are a local file."""
    if config.kind == "custom":
        return custom_identity(config)
    identity: dict[str, Any] = {key: getattr(config, key) for key in ("kind", "model", "pretrained", "dtype")}
    if config.kind == "openai" and (path := archive_path(config)).is_file():
        identity |= archive_identity(path)
    if config.tokenizer:
        identity["tokenizer"] = Path(config.tokenizer).name
    return identity
