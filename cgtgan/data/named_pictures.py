"""The pictures that `images` names: files, folders, archives (`picture_archives.py`), a list on standard input."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

from cgtgan.data.archive_listing import archived_pictures, archives_of
from cgtgan.data.image_files import PHOTO_SUFFIXES, count_skipped, pictures_below
from cgtgan.errors import InputError, MissingFileError


def find_images(names: list[str], image_column: str | None = None) -> list[Path]:
    """Pictures named, or in a folder or an archive named, in their order there; for `-`, those that standard input
    lists, one per line.

    image_column: of tables with several columns of pictures. Raises `MissingFileError` or `InputError`; a listed file
    that does not exist is left to whoever opens it.
    """
    images: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if name == "-":
            images += _listed_on_standard_input()
        elif archives := archives_of(path, "images"):
            images += _archived(path, archives, image_column)
        elif path.is_dir():
            below = pictures_below(path, PHOTO_SUFFIXES)
            if not below:
                raise InputError(f"images={name}: the folder holds no picture ({', '.join(sorted(PHOTO_SUFFIXES))})")
            images += below
        elif path.is_file():
            images.append(path)
        else:
            raise MissingFileError(f"images={name} does not exist: name a picture, a folder or an archive of pictures")
    return list(dict.fromkeys(images))


def _archived(place: Path, archives: list[Path], image_column: str | None) -> list[Path]:
    skipped: Counter[str] = Counter()
    paths = [picture.path for file in archives for picture in archived_pictures(file, image_column, None, skipped)]
    count_skipped(place, skipped)
    if not paths:
        raise InputError(f"images={place}: the archive holds no picture")
    return paths


def _listed_on_standard_input() -> list[Path]:
    lines = [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().splitlines() if line.strip()]
    if not lines:
        problem = "standard input lists no picture; give a path per line, as of `find photos -name '*.jpg'`"
        raise InputError(f"images=-: {problem}")
    listed = [pictures_below(line, PHOTO_SUFFIXES) if line.is_dir() else [line] for line in lines]
    return [picture for pictures in listed for picture in pictures]
