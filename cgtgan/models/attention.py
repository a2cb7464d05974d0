"""Attention in float32 inside bf16 autocast: on a CPU torch's bf16 backward pass of it takes more than twice as long as
the float32 one (docs/negative_results.md, 16), while all matrix products around it gain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_float32"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast(query.device.type, enabled=False):
        mixed, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)
    return mixed.to(query.dtype), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_float32_attention(*models: PreTrainedModel) -> None:
    """Where a model computes attention by torch's fused function, let it do so in float32."""
    for model in models:
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(NAME)
