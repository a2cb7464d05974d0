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
        d = config.dim
        towers = _sharp_towers if config.towers == "sharp" else _plain_towers
        self.image_tower, self.image_head, self.near_words = towers(config, image_size)
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
        read = self.near_words(self.words(tokens.to(device)) + self.positions[:width])
        states = self.text_tower(read, mask=causal, is_causal=True)
        return self.text_head(states[torch.arange(len(rows)), [len(row) - 1 for row in rows]])

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, D)"""
        return self.encode_tokens(self.tokens(texts))


def _plain_towers(config: DemoClipConfig, image_size: int) -> tuple[nn.Sequential, nn.Sequential, nn.Module]:
    """Image tower, image head and what is done with the words before the text tower: those of version 0.1."""
    w, d = config.width, config.dim
    widths = [3, w, 2 * w, 4 * w, 4 * w]
    blocks: list[nn.Module] = []
    for i in range(4):
        blocks += [
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i < 3 else 1, padding=1),
            nn.GroupNorm(8, widths[i + 1]),
            nn.GELU(),
        ]
    # as in CLIP, a norm before the projection: raw image and text vectors are then of like length
    pooled = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(widths[-1] * 16, 4 * d), nn.GELU(), nn.LayerNorm(4 * d)]
    return nn.Sequential(*blocks), nn.Sequential(*pooled, nn.Linear(4 * d, d, bias=False)), nn.Identity()


def _sharp_towers(config: DemoClipConfig, image_size: int) -> tuple[nn.Sequential, nn.Sequential, nn.Module]:
    """As `_plain_towers`. Nothing is pooled, so the head knows where a texture is; words are joined with the few before
    them, so the text tower need not learn which adjectives belong to a noun.
    """
    w, d = config.width, config.dim
    blocks: list[nn.Module] = []
    for number, (inner, outer, kernel) in enumerate(((3, w, 5), (w, 2 * w, 3), (2 * w, 4 * w, 3), (4 * w, 2 * w, 3))):
        stride = 2 if number < 3 else 1
        blocks += [nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    places = math.ceil(image_size / 8) ** 2
    head = [nn.Flatten(), nn.Linear(2 * w * places, 4 * d), nn.GELU(), nn.LayerNorm(4 * d)]
    return nn.Sequential(*blocks), nn.Sequential(*head, nn.Linear(4 * d, d, bias=False)), NearWords(d)


class NearWords(nn.Module):
    """Adds to each token's vector a convolution over it and the four before it."""

    WIDTH = 5  # tokens: an article, three adjectives and a noun

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Conv1d(dim, 2 * dim, self.WIDTH)
        self.outer = nn.Linear(2 * dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)"""
        before = F.pad(self.norm(states).transpose(1, 2), (self.WIDTH - 1, 0))
        return states + self.outer(F.gelu(self.inner(before)).transpose(1, 2))


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: float) -> Tensor:
    """Symmetric cross-entropy over the cosines of a batch of pairs (Radford et al. 2021). (B, D), (B, D) -> scalar"""
    logits = logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
