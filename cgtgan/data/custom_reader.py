"""A data set that a user's own function reads: `dataset.reader=path.py:name`.

`reader(root: Path, split: str)` gives (image_id: str, path: Path | str, captions: list[str]) of every image of train,
val or test. A relative path lies under `root`. Captions of train serve the supervised bound alone; they may be [].
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cgtgan.config import DatasetConfig, custom_name
from cgtgan.data.annotations import CaptionsById, ImageId, checked_id
from cgtgan.errors import InputError, MissingFileError
from cgtgan.runtime.custom import custom_errors, custom_fingerprint, load_custom

FIELD = "dataset.reader"
ROW = "a row is (image_id, path, captions)"


def reader_identity(config: DatasetConfig) -> list[str]:
    """Fingerprint of the reader's file, and its name: what is made of its images is made anew when they change."""
    return [custom_fingerprint(config.reader, FIELD), custom_name(config.reader)]


def reader_split(
    config: DatasetConfig, name: str, root: Path, *, captions_wanted: bool
) -> tuple[dict[ImageId, Path], CaptionsById]:
    """Pictures and captions of a split by id, as the reader gives them; ones that do not exist are left out.

    Raises `InputError` naming the row of a wrong shape, or the file and line of an error in the reader;
    `MissingFileError` for more than `max_bad_images` absent images.
    """
    called = f"{FIELD}={config.reader}, split {name}"
    reader, root = load_custom(config.reader, FIELD), root.absolute()  # so that root / file is found from here too
    with custom_errors(config.reader, FIELD):
        returned = reader(root, name)
        rows = list(returned) if isinstance(returned, Iterable) and not isinstance(returned, str) else None
    if rows is None:
        raise InputError(f"{called}: it returned {returned!r:.80}, which is not iterable; {ROW}")
    paths: dict[ImageId, Path] = {}
    captions: CaptionsById = {}
    row_of: dict[ImageId, int] = {}
    absent: list[str] = []
    for n, row in enumerate(rows):
        place = f"{called}, row {n}"
        image_id, path, texts = _checked(row, place)
        if n != (earlier := row_of.setdefault(image_id, n)):
            raise InputError(f"{place}: image id {image_id!r} is that of row {earlier} too; each image needs its own")
        path = root / path.expanduser()
        if not path.is_file():
            absent.append(f"row {n}: {path}")
            continue
        paths[image_id] = path
        if texts:
            captions[image_id] = texts
    if len(absent) > config.max_bad_images:
        count = f"{len(absent)} of {len(rows)} image files do not exist"
        raise MissingFileError(
            f"{called}, {absent[0]} does not exist ({count}); correct the reader or dataset.root={config.root}, "
            "or allow some with dataset.max_bad_images"
        )
    return paths, captions if captions_wanted else {}


def _checked(row: Any, place: str) -> tuple[ImageId, Path, list[str]]:
    if not isinstance(row, (tuple, list)) or len(row) != 3:
        raise InputError(f"{place} is {row!r:.80}; {ROW}")
    image_id, path, captions = row
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{place}: the path {path!r:.80} must be a Path or a string; {ROW}")
    if not isinstance(captions, (list, tuple)) or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{place}: the captions {captions!r:.80} must be a list of strings; {ROW}")
    return checked_id(image_id, place), Path(path), list(captions)
