"""Embeddings -> captions by the run's decoding, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.config import DecodeConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.method.batches import sampling_seeds
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.runtime.devices import Devices, best_precision


class Scored(NamedTuple):
    """clip_similarity: cosine of the caption's and the picture's embedding; log_prob: mean over its tokens, up to the stop token."""

    caption: str
    clip_similarity: float
    log_prob: float


def caption_embeddings(
    bundle: GeneratorBundle,
    vectors: Tensor,
    decode: DecodeConfig,
    device: torch.device,
    *,
    greedy: bool = False,
    seed: int = 0,
    names: Sequence[object] | None = None,
    backbone: ClipBackbone | None = None,
    images: Tensor | None = None,
    captioned: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """One caption a row of `vectors` (N, D); `greedy` overrides the decoding and its precision (validation is always greedy).

    names: what an image's draws hang on beside `seed`, its row where not given. Best-of-n needs the `backbone`, and ranks by `images`
    (N, D), the pictures' own embeddings, where `vectors` are others. `captioned` is called with the size of each finished batch.
    """
    if decode.name == "best_of_n" and not greedy:
        assert backbone is not None
        ranked = scored_captions(
            bundle,
            vectors,
            decode,
            backbone,
            decode.best_of,
            device,
            seed=seed,
            names=names,
            images=images,
            captioned=captioned,
        )
        return [best.caption for best, *_ in ranked]
    model = bundle.model.to(device).eval()
    names = range(len(vectors)) if names is None else names
    captions: list[str] = []
    for start in range(0, len(vectors), decode.batch_size):
        rows = slice(start, start + decode.batch_size)
        batch = vectors[rows].float().to(device)
        with nullcontext() if greedy else _autocast(decode, device):
            if greedy or decode.name == "greedy":
                drawn = model.greedy(batch, log_probs=False)
            elif decode.name == "beam":
                drawn = model.beam(batch, decode.beam_size, length_penalty=decode.length_penalty)
            else:
                drawn = model.sample(
                    batch, 1, seeds=sampling_seeds(seed, 0, names[rows], 1), temperature=decode.temperature
                )
        captions += bundle.texts(drawn.token_ids)
        captioned(len(batch))
    return captions


def scored_captions(
    bundle: GeneratorBundle,
    vectors: Tensor,
    decode: DecodeConfig,
    backbone: ClipBackbone,
    num_samples: int,
    device: torch.device,
    *,
    seed: int = 0,
    names: Sequence[object] | None = None,
    images: Tensor | None = None,
    captioned: Callable[[int], object] = lambda _: None,
) -> list[list[Scored]]:
    """What best-of-n chooses from: the greedy caption and `num_samples` samples of each row, each caption once, the nearest first.

    Near is the cosine of the caption's embedding, made as the reward makes it, and the picture's. Other arguments: `caption_embeddings`.
    """
    model = bundle.model.to(device).eval()
    names = range(len(vectors)) if names is None else names
    images = vectors if images is None else images
    found: list[list[Scored]] = []
    size = max(1, decode.batch_size // (num_samples + 1))
    for start in range(0, len(vectors), size):
        rows = slice(start, start + size)
        batch = vectors[rows].float().to(device)
        with torch.no_grad(), _autocast(decode, device):
            likeliest = model.greedy(batch)
            seeds = sampling_seeds(seed, 0, names[rows], num_samples)
            samples = model.sample(batch, num_samples, seeds=seeds, temperature=decode.temperature)
            token_ids, drawn, log_probs = (
                torch.cat([a[:, None], b], dim=1) for a, b in zip(likeliest, samples, strict=True)
            )
            if decode.temperature != 1:  # the samples' are those of the warmed distribution
                log_probs = model.log_probs(batch, drawn)
        texts = bundle.texts(token_ids)
        embedded = (
            backbone.encode_texts([embedded_text(text) for text in texts]).to(device).unflatten(0, drawn.shape[:2])
        )
        cosines = F.cosine_similarity(embedded, images[rows].float().to(device)[:, None], dim=-1)
        every = [
            Scored(*one) for one in zip(texts, cosines.flatten().tolist(), log_probs.flatten().tolist(), strict=True)
        ]
        for i in range(0, len(every), num_samples + 1):
            distinct = {one.caption: one for one in every[i : i + num_samples + 1]}
            found.append(sorted(distinct.values(), key=lambda one: -one.clip_similarity))
        captioned(len(batch))
    return found


def _autocast(decode: DecodeConfig, device: torch.device):
    return Devices(device, best_precision(decode.precision, device)).autocast()


def describe(decode: DecodeConfig) -> str:
    """`beam 3 (length penalty 1)`"""
    if decode.name == "beam":
        return f"beam {decode.beam_size} (length penalty {decode.length_penalty:g})"
    if decode.name == "best_of_n":
        return f"greedy and {decode.best_of} samples at temperature {decode.temperature:g}, the nearest by CLIP"
    return "greedy" if decode.name == "greedy" else f"one sample at temperature {decode.temperature:g}"
