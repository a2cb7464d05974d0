"""Images and texts made ready for an encoder by worker processes, ahead of it and in order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from cgtgan.data.image_files import open_image
from cgtgan.data.user_files import printable
from cgtgan.errors import InputError, MissingFileError, UserError


class Unreadable(NamedTuple):
    """A picture that could not be read: its row, and why in a sentence."""

    row: int
    why: str


class PixelBatch(NamedTuple):
    """rows[i] of the list has the pixels[i] (B, 3, S, S) uint8; rows in order, those of `unreadable` left out."""

    rows: list[int]
    pixels: Tensor | None
    unreadable: list[Unreadable]


def load_pixels(path: Path, transform: Callable[[Image.Image], Tensor], draft: int = 0) -> Tensor:
    """The pixels of an image file as `transform` makes them. Raises `MissingFileError` or `InputError` naming it.

    draft: as `open_image` has it.
    """
    image = open_image(path, draft)
    try:
        return transform(image)
    except (ValueError, OSError) as e:
        size = f"{image.size[0]} x {image.size[1]}"
        raise InputError(f"the image {printable(path)} ({image.mode}, {size}) cannot be resized: {e}") from None


@dataclass(frozen=True)
class _Pictures:
    """One item is a whole batch: a list of rows."""

    paths: Sequence[Path]
    transform: Callable[[Image.Image], Tensor]
    draft: int

    def __getitem__(self, rows: list[int]) -> PixelBatch:
        good: list[int] = []
        pixels: list[Tensor] = []
        unreadable: list[Unreadable] = []
        for row in rows:
            try:
                pixels.append(load_pixels(self.paths[row], self.transform, self.draft))
                good.append(row)
            except (InputError, MissingFileError) as e:
                unreadable.append(Unreadable(row, str(e)))
        return PixelBatch(good, torch.stack(pixels) if pixels else None, unreadable)


@dataclass(frozen=True)
class _Texts:
    texts: Sequence[str]
    tokens: Callable[[Sequence[str]], list[list[int]]]

    def __getitem__(self, rows: range) -> tuple[range, list[list[int]]]:
        return rows, self.tokens([self.texts[i] for i in rows])


def decoded(
    paths: Sequence[Path],
    transform: Callable[[Image.Image], Tensor],
    batches: Iterable[list[int]],
    *,
    workers: int,
    draft: int = 0,
) -> Iterator[PixelBatch]:
    """The pictures of each batch of rows, in the batches' order; a bad picture is listed, not raised."""
    return _ahead(_Pictures(paths, transform, draft), batches, workers)


def tokenised(
    texts: Sequence[str], tokens: Callable[[Sequence[str]], list[list[int]]], parts: Iterable[range], *, workers: int
) -> Iterator[tuple[range, list[list[int]]]]:
    """(rows, token ids of each) of every part, in the parts' order."""
    return _ahead(_Texts(texts, tokens), parts, workers)


def _ahead(source: Any, items: Iterable[Any], workers: int) -> Iterator[Any]:
    if workers == 0:
        for item in items:
            yield source[item]
        return
    # `items` may be endless or claim work as it is read: the loader reads it here, two items per worker ahead
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=_Once(items),
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_quiet_worker,
    )
    try:
        yield from loader
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise UserError(
            f"a worker process was ended from outside ({str(e).splitlines()[0]}): memory, or /dev/shm, may be short; "
            "try workers=0 or a smaller clip_backbone.image_batch_size; what is made is kept"
        ) from None


class _Once:
    """An iterable as torch's sampler, which needs no length."""

    def __init__(self, items: Iterable[Any]):
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _as_is(item: Any) -> Any:
    return item


def _quiet_worker(_number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
