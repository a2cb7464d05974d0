"""Picture files: which files are pictures, how one is opened, and why one cannot be."""

from __future__ import annotations

import base64
import importlib.util
import io
import logging
import os
import struct
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from cgtgan.data.picture_archives import picture_content
from cgtgan.data.user_files import broken_file, foreign_content, printable
from cgtgan.errors import InputError, MissingFileError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
_HEIC = frozenset({".heic", ".heif"})
PHOTO_SUFFIXES = IMAGE_SUFFIXES | _HEIC | {".avif"}  # what may be among a user's own pictures
# Pictures that are not read from a folder: they are counted.
_OTHER_PICTURES = frozenset(
    {".jp2", ".jxl", ".svg", ".psd", ".eps", ".ppm", ".ico", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf"}
)

# CLIP scales the short side before it crops the long one: 1 x 600,000 pixels would become 13 billion.
MAX_ASPECT = 50
PIXEL_ART = 96  # pages enlarge a picture up to this side with hard pixels instead of a blur
_STRIP = 1 << 22  # pixels converted at once

# What is opened, whatever a file's name says: of what Pillow reads, none that starts another program (EPS).
_FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "AVIF", "WEBP", "HEIF", "MPO", "JPEG2000", "PPM", "TGA", "ICO", "DIB")

# What Pillow raises for a damaged picture: it depends on the format.
DAMAGED_IMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, MemoryError, RuntimeError, TypeError),
    *(AttributeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)

# Here, and not where a picture is opened, so that each worker process has it. Pillow itself reads no HEIC.
_READS_HEIC = importlib.util.find_spec("pillow_heif") is not None
if _READS_HEIC:
    importlib.import_module("pillow_heif").register_heif_opener()


@cache
def picture_formats() -> tuple[str, ...]:
    """Those that Pillow can open here."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def decoder_hint(path: Path) -> str:
    """What the file is instead of a picture, or what to install to read it, to follow the reason; or nothing."""
    try:
        with path.open("rb") as file:
            kind = foreign_content(file.read(256))
    except OSError:
        kind = None
    if kind:
        return f"; it {kind}"
    return "; HEIC needs: pip install pillow-heif" if path.suffix.lower() in _HEIC and not _READS_HEIC else ""


def open_image(path: Path, draft: int = 0) -> Image.Image:
    """The picture as CLIP's pipeline opens it: in the file's mode (RGB comes after the resize), not turned by EXIF.

    But 16-bit, 32-bit, float and transparent ones are as `plain_picture` makes them.
    draft: if above 0, a JPEG is decoded at the smallest scale (1/1 to 1/8) that leaves so many pixels per side.
    Raises `MissingFileError` or `InputError` with the file's name.
    """
    if path.exists() and not path.is_file():  # opening a named pipe would wait for a writer
        raise InputError(f"the image {printable(path)} is a folder or a device, and a picture file is needed")
    try:
        content = picture_content(path)
        with Image.open(path if content is None else io.BytesIO(content), formats=picture_formats()) as image:
            check_shape(image)
            if draft:
                image.draft(None, (draft, draft))
            image.load()
    except FileNotFoundError as error:
        raise MissingFileError(f"the image {printable(path)} does not exist") from error
    except DAMAGED_IMAGE as error:
        problem = str(error)[:300] or type(error).__name__
        raise InputError(f"the image {printable(path)} cannot be read: {problem}{decoder_hint(path)}") from error
    return plain_picture(image)


def data_uri(kind: str, raw: bytes) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode('ascii')}"


def check_shape(image: Image.Image) -> None:
    """Raise `InputError` for a picture too narrow to be scaled by its short side."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        width, height = image.size
        raise InputError(f"it is {width:,} x {height:,} pixels: one side may be at most {MAX_ASPECT} times the other")


def plain_picture(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode -> one that `convert("RGB")` does not turn white or black.

    16-bit, 32-bit and float pixels become 8-bit grey; what is transparent is laid on white. Others stay as they are.
    """
    if image.mode.startswith("I") or image.mode == "F":
        plain = _eight_bit(image)
    elif image.has_transparency_data:
        plain = _on_white(image)
    else:
        return image
    plain.getexif().update(image.getexif())  # which way is up
    return plain


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, made strip by strip; the picture itself where nothing of it is transparent."""
    width, height = image.size
    rows = max(1, _STRIP // max(1, width))
    laid = Image.new("RGB", image.size, "white")
    opaque = True
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows))).convert("RGBA")
        alpha = strip.getchannel("A")
        opaque = opaque and alpha.getextrema() == (255, 255)
        laid.paste(strip, (0, top), alpha)
    return image if opaque else laid


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of more bits, scaled by the range of its kind; where the kind has several, by the smallest that fits."""
    pixels = np.asarray(image)
    if image.mode == "I" and _is_unsigned(image):
        pixels = pixels.view(np.uint32)
    low, high = _range(image.mode, pixels)
    rows = max(1, _STRIP // max(1, pixels.shape[1]))
    grey = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(pixels), rows):
        part = np.nan_to_num(pixels[top : top + rows].astype(np.float64), nan=low, posinf=high, neginf=low)
        grey[top : top + rows] = np.clip((part - low) * (255.0 / (high - low)) + 0.5, 0, 255)
    return Image.fromarray(grey)


def _is_unsigned(image: Image.Image) -> bool:
    """Pillow reads 32 bits as signed; TIFF's tag 339 says what they are (1 unsigned, its default; 2 signed)."""
    tags = getattr(image, "tag_v2", None)
    kinds = tags.get(339, 1) if tags is not None else 2
    return 1 in (kinds if isinstance(kinds, tuple) else (kinds,))


def _range(mode: str, pixels: np.ndarray) -> tuple[float, float]:
    """The values of black and of white."""
    if mode.startswith("I;16"):
        return 0.0, 65535.0
    finite = pixels[np.isfinite(pixels)] if mode == "F" else pixels
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0:  # such as -1 to 1: only its own range is known
        return (low, high) if high > low else (low - 1.0, low)
    whole = float(np.iinfo(pixels.dtype).max) if mode == "I" else high
    tops = (*((1.0,) if mode == "F" else ()), 255.0, 65535.0, high if high < whole / 16 else whole)
    return 0.0, next(top for top in tops if high <= top)


def pictures_below(base: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files with such an ending, folder by folder in name order, no hidden ones. Linked folders are read, each once.

    Pictures and folders that are left out are counted in a log line. Raises `InputError` if `base` cannot be read.
    """
    paths: list[Path] = []
    seen: set[str] = set()
    skipped: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == base:
            raise broken_file(base, error) from error
        skipped["folders that cannot be read"] += 1

    for folder, folders, names in os.walk(base, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden = [f for f in folders if f.startswith((".", "__"))]
        skipped["hidden folders"] += len(hidden)
        folders[:] = sorted(set(folders).difference(hidden))
        for path in (Path(folder, name) for name in sorted(names)):
            suffix = path.suffix.lower()
            if suffix in suffixes and not path.name.startswith("."):
                paths.append(path)
            elif suffix in PHOTO_SUFFIXES | _OTHER_PICTURES:
                skipped["hidden pictures" if path.name.startswith(".") else f"{suffix} files"] += 1
    count_skipped(base, skipped)
    return paths


def count_skipped(place: Path, skipped: Counter[str]) -> None:
    """A log line, the first time in this process: how many pictures and folders of `place` are left out, by reason."""
    if counts := ", ".join(f"{why} ({number:,})" for why, number in sorted(skipped.items()) if number):
        _warn_once(f"{printable(place)}: left out: {counts}")


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)
