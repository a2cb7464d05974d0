"""Pictures as data URIs, whole or shrunk; thumbnails within a budget; the choice of the pictures of a gallery."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps

from cgtgan.data.image_files import DAMAGED_IMAGE, PIXEL_ART, data_uri, picture_formats, plain_picture
from cgtgan.data.picture_archives import picture_bytes
from cgtgan.errors import InputError

Id = TypeVar("Id", int, str, int | str)

EMBED_PIXELS = 320  # longest side of an embedded picture
THUMBNAIL_PIXELS = (200, 144, 112, 88)  # longest side: the first with which all fit the budget, else the last
EMBED_AS_IS_BYTES = 200_000


def pick_gallery(per_image_cider: Mapping[Id, float], n: int, seed: int) -> tuple[list[Id], list[Id], list[Id]]:
    """`n` ids each: best first, worst first, and random ones drawn with `seed`, whatever the order of the mapping.

    The three are disjoint when at least 3 n images have a finite score; with fewer they overlap. An image whose score
    is not finite can only be among the random ones. Raises InputError when `n` is negative.
    """
    if n < 0:
        raise InputError(f"the gallery's size n is {n}; it must be 0 or more")
    everything = sorted(per_image_cider, key=lambda image_id: (str(image_id), isinstance(image_id, str)))
    ranked = sorted((i for i in everything if math.isfinite(per_image_cider[i])), key=lambda i: -per_image_cider[i])
    best, worst = ranked[:n], ranked[::-1][:n]
    chosen = {*best, *worst}
    rest = [image_id for image_id in everything if image_id not in chosen]
    pool = rest if len(rest) >= n else everything
    return best, worst, random.Random(seed).sample(pool, min(n, len(pool)))


def thumbnails(
    images: Mapping[Any, Path], budget: int, advance: Callable[[], None] = lambda: None
) -> dict[Any, tuple[str, bool]]:
    """(data URI, whether it is pixel art) by id, of as many of `images` as fit `budget` bytes of text; a fixed draw.

    Pictures that cannot be read are left out. 24 pictures decide the side: the largest with which all would fit.
    """
    order = list(images)
    random.Random(0).shuffle(order)  # when not all fit, those without come from everywhere in the split
    side = THUMBNAIL_PIXELS[-1]
    for side in THUMBNAIL_PIXELS:
        sample = [len(small[0]) for i in order[:24] if (small := _thumbnail(images[i], side))]
        if sum(sample) * len(order) <= budget * max(len(sample), 1):
            break
    made, spent = {}, 0
    for image_id in order:
        small = _thumbnail(images[image_id], side)
        advance()
        if small is None:
            continue
        spent += len(small[0])
        if spent > budget:
            break
        made[image_id] = small
    return made


def _thumbnail(path: Path, side: int) -> tuple[str, bool] | None:
    try:
        return embed(path, side, quality=70)
    except DAMAGED_IMAGE:
        return None


def embed(path: Path, side: int = EMBED_PIXELS, quality: int = 85) -> tuple[str, bool]:
    """(data URI, whether it is pixel art). Small plain files go in whole; others shrunk, upright, as CLIP sees them."""
    raw = picture_bytes(path)
    with Image.open(io.BytesIO(raw), formats=picture_formats()) as image:
        longest = max(image.size)
        small = longest <= side
        plain = image.format in ("PNG", "JPEG") and image.mode in ("1", "L", "P", "RGB")
        plain = plain and not image.has_transparency_data and not image.getexif() and getattr(image, "n_frames", 1) == 1
        if small and plain and len(raw) <= EMBED_AS_IS_BYTES:
            image.load()  # a truncated file shows here, not as a broken picture in the page
            return data_uri(image.format or "", raw), longest <= PIXEL_ART
        image.draft("RGB", (2 * side, 2 * side))  # JPEG only: decodes a large one at a fraction of the cost
        image.seek(0)
        image.load()
        upright = ImageOps.exif_transpose(plain_picture(image)).convert("RGB")
    upright.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "PNG" if small else "JPEG"
    upright.save(buffer, kind, quality=quality, optimize=True)
    return data_uri(kind, buffer.getvalue()), longest <= PIXEL_ART
