"""What a training step reads: a function of (seed, step), whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.gap import ReadImages
from cgtgan.assets.reader import PromptedImages
from cgtgan.config import Config
from cgtgan.method.batches import EpochOrder, sampling_seeds
from cgtgan.models.prompted import Read, read_on
from cgtgan.runtime.artifacts import Embeddings
from cgtgan.runtime.devices import Devices, on_device


@dataclass(frozen=True)
class Batch:
    """A process's share of a step's `total` images: image, target (B, D), K seeds per image, B*K corpus sentences."""

    ids: list[Any]
    image: Tensor
    target: Tensor
    seeds: list[list[int]]
    real: list[str]
    total: int
    closed: Read | None = None  # the images as the generator reads them; None: as they are

    @property
    def read(self) -> Read:
        """B rows, float32: the images as the generator reads them."""
        return self.image if self.closed is None else self.closed

    @property
    def samples(self) -> int:
        """K, the captions that are sampled per image."""
        return len(self.seeds[0])

    def owner(self) -> Tensor:
        """(B*K + B,) int64: the row of the image of each caption, K samples per image, then one greedy caption each."""
        rows = torch.arange(len(self.seeds))
        return torch.cat([rows.repeat_interleave(self.samples), rows])

    def split(self, count: int) -> list[Batch]:
        """The batch as up to `count` consecutive micro-batches, whose sizes differ by one image at most."""
        if count == 1:
            return [self]
        samples = len(self.real) // max(1, len(self.ids))
        cuts = [len(self.ids) * i // count for i in range(count + 1)]
        return [self._rows(slice(a, b), slice(a * samples, b * samples)) for a, b in pairwise(cuts) if b > a]

    def _rows(self, rows: slice, sentences: slice) -> Batch:
        image, target, seeds = self.image[rows], self.target[rows], self.seeds[rows]
        closed = None if self.closed is None else self.closed[rows]
        return Batch(self.ids[rows], image, target, seeds, self.real[sentences], self.total, closed)


class Batches:
    """The batch of each step: a function of (seed, step), whatever the number of processes."""

    def __init__(
        self,
        cfg: Config,
        devices: Devices,
        images: Embeddings,
        targets: Embeddings,
        sentences: Sequence[str],
        read: ReadImages | PromptedImages | None = None,
    ):
        self.cfg, self.devices, self.read = cfg, devices, read
        self.images, self.targets, self.sentences = images, targets, sentences
        self.image_order = EpochOrder(len(images.ids), cfg.seed, "images")
        self.text_order = EpochOrder(len(sentences), cfg.seed, "real")

    def batch(self, step: int) -> Batch:
        t, device = self.cfg.train, self.devices.device
        rows = self.image_order.batch(step, t.batch_size)
        if "text_order" in t.released:  # the released program pairs an image with the same sentences in each epoch
            real = [(t.num_samples * int(row) + k) % len(self.sentences) for row in rows for k in range(t.num_samples)]
        else:
            real = self.text_order.batch(step, t.batch_size * t.num_samples).tolist()
        places = self.devices.share(range(t.batch_size))
        share = rows[places[0] : places[-1] + 1]
        index = torch.from_numpy(share)
        ids = [self.images.ids[i] for i in share]
        seeds = sampling_seeds(self.cfg.seed, step, ids, t.num_samples)
        sentences = [self.sentences[i] for i in real[places[0] * t.num_samples : (places[-1] + 1) * t.num_samples]]
        image, target = self.images.vectors[index].float(), self.targets.vectors[index].float()
        closed = None if self.read is None else read_on(self.read[index], device)
        vectors = on_device(image, device), on_device(target, device)
        return Batch(ids, *vectors, seeds, sentences, t.batch_size, closed)


def prefetched(batches: Batches, first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """Steps `first` to `last` with their batches; the next batch is put together while a step works."""
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(batches.batch, first)
        for step in range(first, last + 1):
            batch = coming.result()
            if step < last:
                coming = ahead.submit(batches.batch, step + 1)
            yield step, batch
