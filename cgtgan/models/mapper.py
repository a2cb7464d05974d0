"""Mappers from a CLIP embedding to the language model's prefix. Parameters are named as in the released checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLPMapper(nn.Module):
    """D -> (E*P)/2 -> E*P with tanh between, both layers with bias (METHOD: Generator)."""

    def __init__(self, clip_dim: int, width: int, prefix_length: int):
        super().__init__()
        self.clip_dim, self.prefix_length = clip_dim, prefix_length
        hidden = width * prefix_length // 2
        self.model = nn.Sequential(nn.Linear(clip_dim, hidden), nn.Tanh(), nn.Linear(hidden, width * prefix_length))

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, D) -> (B, P, E)"""
        return self.model(embedding).unflatten(-1, (self.prefix_length, -1))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        keys, values = self.to_keys_values(x_BTE).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(split(self.to_queries(x_BTE)), split(keys), split(values))
        return self.project(mixed.transpose(1, 2).flatten(-2))


class _Feedforward(nn.Module):
    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Feedforward(width, ratio=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Stack(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TransformerMapper(nn.Module):
    """Linear D -> (clip_length, E), then P learned constants, pre-norm layers; the last P outputs are the prefix."""

    def __init__(
        self, clip_dim: int, width: int, prefix_length: int, clip_length: int, layers: int = 8, heads: int = 8
    ):
        super().__init__()
        self.clip_dim, self.prefix_length = clip_dim, prefix_length
        self.clip_length, self.width = clip_length, width
        self.linear = nn.Linear(clip_dim, clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))
        self.transformer = _Stack(width, layers, heads)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, D) -> (B, P, E)"""
        clip_tokens = self.linear(embedding).unflatten(-1, (self.clip_length, self.width))
        constants = self.prefix_const.expand(len(embedding), -1, -1)
        return self.transformer(torch.cat([clip_tokens, constants], dim=1))[:, self.clip_length :]
