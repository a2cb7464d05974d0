"""Embeddings -> captions by the run's decoding, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.config import DecodeConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.method.batches import sampling_seeds
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.models.generator import CaptionGenerator, Captions
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.models.prompted import Read, embedding_of, read_on
from cgtgan.runtime.devices import Devices, best_precision, on_device


class ScoredCaption(NamedTuple):
    """clip_similarity: cosine of caption and picture; log_prob: mean over its tokens up to the stop token."""

    caption: str
    clip_similarity: float
    log_prob: float


@dataclass(frozen=True)
class Decoder:
    """How embeddings become captions.

    Best-of-n needs the `backbone`; `on_batch` is called with the size of each finished batch.
    """

    bundle: GeneratorBundle
    decode: DecodeConfig
    device: torch.device
    seed: int = 0
    backbone: ClipBackbone | None = None
    on_batch: Callable[[int], object] = lambda _: None

    def greedy(self, vectors: Read) -> list[str]:
        """One greedy caption per row of `vectors` (N, D), whatever `decode` is, without autocast: for validation."""
        return self._each_batch(vectors, lambda batch, _rows: self._model().greedy(batch, log_probs=False))

    def captions(
        self, vectors: Read, sample_keys: Sequence[object] | None = None, images: Tensor | None = None
    ) -> list[str]:
        """One caption per row of `vectors` (N, D).

        sample_keys: what a row's draws depend on together with `seed`; None: its number. images (N, D): the pictures'
        embeddings, by which best-of-n ranks, where `vectors` are others.
        """
        if self.decode.name == "best_of_n":
            return [best.caption for best, *_ in self.ranked(vectors, self.decode.best_of, sample_keys, images)]
        keys = range(len(vectors)) if sample_keys is None else sample_keys
        return self._each_batch(vectors, lambda batch, rows: self._decoded(batch, keys[rows]))

    def ranked(
        self, vectors: Read, num_samples: int, sample_keys: Sequence[object] | None = None, images: Tensor | None = None
    ) -> list[list[ScoredCaption]]:
        """What best-of-n chooses from: per row the greedy caption and `num_samples` samples, each caption once.

        The nearest stands first: by the cosine of the picture's embedding and the caption's, as the reward makes it.
        """
        keys = range(len(vectors)) if sample_keys is None else sample_keys
        images = embedding_of(vectors) if images is None else images
        ranked: list[list[ScoredCaption]] = []
        size = max(1, self.decode.batch_size // (num_samples + 1))
        for start in range(0, len(vectors), size):
            rows = slice(start, start + size)
            texts, log_probs = self._candidates(read_on(vectors[rows].float(), self.device), num_samples, keys[rows])
            cosines = self._similarities(texts, on_device(images[rows].float(), self.device), num_samples + 1)
            scored = [ScoredCaption(*fields) for fields in zip(texts, cosines, log_probs, strict=True)]
            for i in range(0, len(scored), num_samples + 1):
                different = {caption.caption: caption for caption in scored[i : i + num_samples + 1]}
                ranked.append(sorted(different.values(), key=lambda caption: -caption.clip_similarity))
            self.on_batch(len(vectors[rows]))
        return ranked

    def _model(self) -> CaptionGenerator:
        model = self.bundle.model.to(self.device).eval()
        model.decode_cache = self.decode.cache
        return model

    def _autocast(self) -> AbstractContextManager[object]:
        return Devices(self.device, best_precision(self.decode.precision, self.device)).autocast()

    def _each_batch(self, vectors: Read, draw: Callable[[Read, slice], Captions]) -> list[str]:
        captions: list[str] = []
        for start in range(0, len(vectors), self.decode.batch_size):
            rows = slice(start, start + self.decode.batch_size)
            batch = read_on(vectors[rows].float(), self.device)
            captions += self.texts(draw(batch, rows).token_ids)
            self.on_batch(len(batch))
        return captions

    def texts(self, token_ids: Tensor) -> list[str]:
        """A caption that is cut at `max_length` may end inside a character of several tokens: that one is dropped."""
        texts = self.bundle.texts(token_ids)
        return [text.rstrip("\ufffd").rstrip() if text.endswith("\ufffd") else text for text in texts]

    def _decoded(self, batch: Read, keys: Sequence[object]) -> Captions:
        model, decode = self._model(), self.decode
        with self._autocast():
            if decode.name == "greedy":
                return model.greedy(batch, log_probs=False)
            if decode.name == "beam":
                return model.beam(batch, decode.beam_size, length_penalty=decode.length_penalty)
            seeds = sampling_seeds(self.seed, 0, keys, 1)
            return model.sample(batch, 1, seeds=seeds, temperature=decode.temperature)

    @torch.no_grad()
    def _candidates(self, batch: Read, num_samples: int, keys: Sequence[object]) -> tuple[list[str], list[float]]:
        """Per row the greedy caption and its samples, flattened in order, and the mean log-prob of each."""
        model, temperature = self._model(), self.decode.temperature
        with self._autocast():
            greedy = model.greedy(batch)
            seeds = sampling_seeds(self.seed, 0, keys, num_samples)
            samples = model.sample(batch, num_samples, seeds=seeds, temperature=temperature)
            both = (torch.cat([a[:, None], b], dim=1) for a, b in zip(greedy, samples, strict=True))
            token_ids, drawn, log_probs = both
            if temperature != 1:  # the samples' are those of the distribution at this temperature
                log_probs = model.log_probs(batch, drawn)
        return self.texts(token_ids), log_probs.flatten().tolist()

    def _similarities(self, texts: Sequence[str], images: Tensor, per_image: int) -> list[float]:
        assert self.backbone is not None
        embedded = self.backbone.encode_texts([embedded_text(text) for text in texts]).to(self.device)
        return F.cosine_similarity(embedded.unflatten(0, (-1, per_image)), images[:, None], dim=-1).flatten().tolist()


def chosen_decode(stored: DecodeConfig, given: DecodeConfig, typed: Sequence[str]) -> DecodeConfig:
    """The checkpoint's decoding, `stored`, unless the settings choose one; what a person typed wins in both cases.

    given: the settings' `decode`. typed: `decode` and its fields that the command line names.
    """
    if "decode" in typed or given.name != DecodeConfig.name:
        return given
    return replace(stored, **{name: getattr(given, name) for name in (t.partition(".")[2] for t in typed)})


def describe(decode: DecodeConfig) -> str:
    """`beam 3 (length penalty 1)`"""
    if decode.name == "beam":
        return f"beam {decode.beam_size} (length penalty {decode.length_penalty:g})"
    if decode.name == "best_of_n":
        return f"greedy and {decode.best_of} samples at temperature {decode.temperature:g}, the nearest by CLIP"
    return "greedy" if decode.name == "greedy" else f"one sample at temperature {decode.temperature:g}"
