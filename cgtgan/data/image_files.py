"""Picture files: which files are pictures, how one is opened, and why one cannot be."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
import zlib
from pathlib import Path

from PIL import Image

from cgtgan.data.user_files import broken_file, printable
from cgtgan.errors import InputError, MissingFileError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
_HEIC = frozenset({".heic", ".heif"})
PHOTO_SUFFIXES = IMAGE_SUFFIXES | _HEIC | {".avif"}  # what may be among a user's own pictures

# What Pillow raises for a damaged picture: it depends on the format.
DAMAGED_IMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, MemoryError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

# Here, and not where a picture is opened, so that each worker process has it. Pillow itself reads no HEIC.
_READS_HEIC = importlib.util.find_spec("pillow_heif") is not None
if _READS_HEIC:
    importlib.import_module("pillow_heif").register_heif_opener()


def decoder_hint(path: Path) -> str:
    """What to install to read a file of this kind, to follow the reason; or nothing."""
    return "; HEIC needs: pip install pillow-heif" if path.suffix.lower() in _HEIC and not _READS_HEIC else ""


def open_image(path: Path, draft: int = 0) -> Image.Image:
    """The picture as CLIP's pipeline opens it: in the file's mode (RGB comes after the resize), not turned by EXIF.

    draft: if above 0, a JPEG is decoded at the smallest scale (1/1 to 1/8) that leaves so many pixels per side.
    Raises `MissingFileError` or `InputError` with the file's name.
    """
    try:
        with Image.open(path) as image:
            if draft:
                image.draft(None, (draft, draft))
            image.load()
            return image
    except FileNotFoundError as error:
        raise MissingFileError(f"the image {printable(path)} does not exist") from error
    except DAMAGED_IMAGE as error:
        raise InputError(f"the image {printable(path)} cannot be read: {error}{decoder_hint(path)}") from error


def find_images(paths: list[str]) -> list[Path]:
    """Pictures named, or below a folder named, in name order; for `-`, those that standard input lists, one per line.

    Raises `MissingFileError` or `InputError`; a listed file that does not exist is left to whoever opens it.
    """
    images: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if name == "-":
            images += _listed_on_standard_input()
        elif path.is_dir():
            below = pictures_below(path, PHOTO_SUFFIXES)
            if not below:
                raise InputError(f"images={name}: the folder holds no picture ({', '.join(sorted(PHOTO_SUFFIXES))})")
            images += below
        elif path.is_file():
            images.append(path)
        else:
            raise MissingFileError(f"images={name} does not exist: name a picture or a folder of pictures")
    return list(dict.fromkeys(images))


def _listed_on_standard_input() -> list[Path]:
    lines = [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().splitlines() if line.strip()]
    if not lines:
        problem = "standard input lists no picture; give a path per line, as of `find photos -name '*.jpg'`"
        raise InputError(f"images=-: {problem}")
    listed = [pictures_below(line, PHOTO_SUFFIXES) if line.is_dir() else [line] for line in lines]
    return [picture for pictures in listed for picture in pictures]


def pictures_below(base: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files with such an ending, folder by folder in name order, no hidden ones. Linked folders are read, each once."""
    paths: list[Path] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        raise broken_file(Path(error.filename), error) from error

    for folder, folders, names in os.walk(base, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith((".", "__")))
        if real in seen:
            continue
        seen.add(real)
        pictures = (Path(folder, n) for n in sorted(names) if not n.startswith("."))
        paths += [path for path in pictures if path.suffix.lower() in suffixes]
    return paths
