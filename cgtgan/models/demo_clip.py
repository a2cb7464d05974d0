"""The demo world's CLIP: a small convolutional image tower and a small causal text tower with one fixed logit scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgtgan.config import DemoClipConfig
from cgtgan.models.chunks import pad_rows
from cgtgan.models.tokenizers import END_OF_TEXT, TextTokenizer

MAX_TOKENS = 77


class DemoClip(nn.Module):
    """Two towers into `config.dim` dimensions; raw projections, not normalised."""

    def __init__(self, config: DemoClipConfig, tokenizer: TextTokenizer, image_size: int):
        super().__init__()
        self.config, self.tokenizer, self.image_size = config, tokenizer, image_size
        self.end = tokenizer.id_of(END_OF_TEXT)
        w, d = config.width, config.dim
        widths = [3, w, 2 * w, 4 * w, 4 * w]
        blocks: list[nn.Module] = []
        for i in range(4):
            blocks += [
                nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i < 3 else 1, padding=1),
                nn.GroupNorm(8, widths[i + 1]),
                nn.GELU(),
            ]
        self.image_tower = nn.Sequential(*blocks)
        # as in CLIP, a norm before the projection: raw image and text vectors are then of like length
        pooled = [
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(widths[-1] * 16, 4 * d),
            nn.GELU(),
            nn.LayerNorm(4 * d),
        ]
        self.image_head = nn.Sequential(*pooled, nn.Linear(4 * d, d, bias=False))
        self.words = nn.Embedding(len(tokenizer), d)
        self.positions = nn.Parameter(torch.randn(MAX_TOKENS, d) * 0.01)
        layer = nn.TransformerEncoderLayer(
            d, 4, 4 * d, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.text_tower = nn.TransformerEncoder(
            layer, config.text_layers, norm=nn.LayerNorm(d), enable_nested_tensor=False
        )
        self.text_head = nn.Linear(d, d, bias=False)
        for head in (self.image_head[-1], self.text_head):
            nn.init.normal_(cast(nn.Linear, head).weight, std=cast(nn.Linear, head).in_features ** -0.5)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)"""
        return self.image_head(self.image_tower(pixels))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts -> ids, the end token last"""
        return [[*ids[: MAX_TOKENS - 1], self.end] for ids in self.tokenizer.encode([t.lower() for t in texts])]

    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of `tokens` -> (B, D), the state at the end token: padding after it does not count"""
        tokens, _ = pad_rows(rows, self.end)
        width, device = tokens.shape[1], self.words.weight.device
        causal = torch.full((width, width), -math.inf, device=device).triu(1)
        states = self.text_tower(self.words(tokens.to(device)) + self.positions[:width], mask=causal, is_causal=True)
        return self.text_head(states[torch.arange(len(rows)), [len(row) - 1 for row in rows]])

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, D)"""
        return self.encode_tokens(self.tokens(texts))


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: float) -> Tensor:
    """Symmetric cross-entropy over the cosines of a batch of pairs (Radford et al. 2021). (B, D), (B, D) -> scalar"""
    logits = logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
