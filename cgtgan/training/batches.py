"""What a training step reads: a function of (seed, step), whatever the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cgtgan.config import Config
from cgtgan.method.batches import EpochOrder, sampling_seeds
from cgtgan.runtime.artifacts import Embeddings
from cgtgan.runtime.devices import Devices


@dataclass(frozen=True)
class Batch:
    """What a step reads, this process's share: image, target (B, D), K seeds an image, B*K corpus sentences; `total` images in all."""

    ids: list[Any]
    image: Tensor
    target: Tensor
    seeds: list[list[int]]
    real: list[str]
    total: int

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` consecutive parts of equal size but for one image; an empty part is left out."""
        if count == 1:
            return [self]
        samples = len(self.real) // max(1, len(self.ids))
        cuts = [len(self.ids) * i // count for i in range(count + 1)]
        return [
            Batch(
                self.ids[a:b],
                self.image[a:b],
                self.target[a:b],
                self.seeds[a:b],
                self.real[a * samples : b * samples],
                self.total,
            )
            for a, b in pairwise(cuts)
            if b > a
        ]


class Batches:
    """The batch of each step: a function of (seed, step), whatever the number of processes."""

    def __init__(
        self, cfg: Config, devices: Devices, images: Embeddings, targets: Embeddings, sentences: Sequence[str]
    ):
        self.cfg, self.devices = cfg, devices
        self.images, self.targets, self.sentences = images, targets, sentences
        self.image_order = EpochOrder(len(images.ids), cfg.seed, "images")
        self.text_order = EpochOrder(len(sentences), cfg.seed, "real")

    def batch(self, step: int) -> Batch:
        t, device = self.cfg.train, self.devices.device
        rows = self.image_order.batch(step, t.batch_size)
        if "text_order" in t.released:  # METHOD, slip 4: an image's sentences are those at its own place, each epoch
            real = [(t.num_samples * int(row) + k) % len(self.sentences) for row in rows for k in range(t.num_samples)]
        else:
            real = self.text_order.batch(step, t.batch_size * t.num_samples).tolist()
        places = self.devices.share(range(t.batch_size))
        own = rows[places[0] : places[-1] + 1]
        index = torch.from_numpy(own)
        ids = [self.images.ids[i] for i in own]
        seeds = sampling_seeds(self.cfg.seed, step, ids, t.num_samples)
        sentences = [self.sentences[i] for i in real[places[0] * t.num_samples : (places[-1] + 1) * t.num_samples]]
        image, target = self.images.vectors[index].float(), self.targets.vectors[index].float()
        return Batch(ids, image.to(device), target.to(device), seeds, sentences, t.batch_size)
