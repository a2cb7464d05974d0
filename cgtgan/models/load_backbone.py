"""The CLIP that the settings name, opened."""

from __future__ import annotations

import torch

from cgtgan.config import ClipBackboneConfig
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.models.custom_backbone import CustomBackbone
from cgtgan.models.hub_backbones import HuggingFaceBackbone, OpenClipBackbone
from cgtgan.models.openai_clip import OpenAIBackbone


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
