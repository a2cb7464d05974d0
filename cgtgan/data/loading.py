"""Images and texts made ready for an encoder by worker processes, ahead of it and in order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

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


def decoded(
    paths: Sequence[Path],
    transform: Callable[[Image.Image], Tensor],
    batches: Iterable[list[int]],
    *,
    workers: int,
    draft: int = 0,
) -> Iterator[PixelBatch]:
    """The pictures of each batch of rows, in the batches' order; a bad picture is listed, not raised."""
    return _made_ahead(partial(_pixel_batch, paths, transform, draft), batches, workers)


def tokenised(
    texts: Sequence[str], tokens: Callable[[Sequence[str]], list[list[int]]], parts: Iterable[range], *, workers: int
) -> Iterator[tuple[range, list[list[int]]]]:
    """(rows, token ids of each) of every part, in the parts' order."""
    return _made_ahead(partial(_tokens, texts, tokens), parts, workers)


def _pixel_batch(
    paths: Sequence[Path], transform: Callable[[Image.Image], Tensor], draft: int, rows: list[int]
) -> PixelBatch:
    good: list[int] = []
    pixels: list[Tensor] = []
    unreadable: list[Unreadable] = []
    for row in rows:
        try:
            pixels.append(load_pixels(paths[row], transform, draft))
            good.append(row)
        except (InputError, MissingFileError) as e:
            unreadable.append(Unreadable(row, str(e)))
    return PixelBatch(good, torch.stack(pixels) if pixels else None, unreadable)


def _tokens(
    texts: Sequence[str], tokens: Callable[[Sequence[str]], list[list[int]]], rows: range
) -> tuple[range, list[list[int]]]:
    return rows, tokens([texts[i] for i in rows])


@dataclass(frozen=True)
class _Source:
    """A function as torch's data set: `make` of an item, a batch or part."""

    make: Callable[[Any], Any]

    def __getitem__(self, item: Any) -> Any:
        return self.make(item)


def _made_ahead(make: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`make` of every item, in order. `items` may be endless: it is read in this process, two per worker ahead."""
    if workers == 0:
        yield from map(make, items)
        return
    options = {"num_workers": workers, "collate_fn": _as_is, "worker_init_fn": _quiet_worker}
    try:
        yield from DataLoader(cast(Any, _Source(make)), batch_size=None, sampler=items, **options)
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise UserError(
            f"a worker process was ended from outside ({str(e).splitlines()[0]}): memory, or /dev/shm, may be short; "
            "try workers=0 or a smaller clip_backbone.image_batch_size; what is made is kept"
        ) from None


def _as_is(item: Any) -> Any:
    return item


def _quiet_worker(_number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
