"""Embeddings -> captions by the run's decoding, in batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cgtgan.config import DecodeConfig
from cgtgan.method.batches import stable_seed
from cgtgan.models.generator_bundle import GeneratorBundle


def caption_embeddings(
    bundle: GeneratorBundle,
    vectors: Tensor,
    decode: DecodeConfig,
    device: torch.device,
    *,
    greedy: bool = False,
    seed: int = 0,
    captioned: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """One caption a row of `vectors` (N, D); `greedy` overrides the decoding (validation is always greedy).

    `captioned` is called with the size of each finished batch."""
    model = bundle.model.to(device).eval()
    captions: list[str] = []
    for start in range(0, len(vectors), decode.batch_size):
        batch = vectors[start : start + decode.batch_size].float().to(device)
        if greedy or decode.name == "greedy":
            drawn = model.greedy(batch, log_probs=False)
        elif decode.name == "beam":
            drawn = model.beam(batch, decode.beam_size, length_penalty=decode.length_penalty)
        else:
            seeds = [[stable_seed(seed, "decode", start + i)] for i in range(len(batch))]
            drawn = model.sample(batch, 1, seeds=seeds, temperature=decode.temperature)
        captions += bundle.texts(drawn.token_ids)
        captioned(len(batch))
    return captions


def describe(decode: DecodeConfig) -> str:
    """`beam 3 (length penalty 1)`"""
    if decode.name == "beam":
        return f"beam {decode.beam_size} (length penalty {decode.length_penalty:g})"
    return "greedy" if decode.name == "greedy" else f"one sample at temperature {decode.temperature:g}"
