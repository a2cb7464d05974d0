"""COCO's two caption formats: results (image id and caption) and references, read with errors that name the place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cgtgan.data.annotations import ImageId
from cgtgan.data.user_files import read_user_json
from cgtgan.errors import InputError
from cgtgan.runtime.artifacts import write_text


def id_list(ids: Sequence[Any]) -> str:
    """'7 images (1, 2, 3, 4, 5, ...) have': the start of an error message about them."""
    shown = ", ".join(repr(i) for i in ids[:5]) + (", ..." if len(ids) > 5 else "")
    return f"{len(ids)} image{'s' if len(ids) > 1 else ''} ({shown}) {'have' if len(ids) > 1 else 'has'}"


def _rows(rows: Any, path: Path, where: str) -> list[tuple[ImageId, str]]:
    """(image id, caption) of each row of a COCO list; InputError that names the first row of another shape."""
    if not isinstance(rows, list):
        kind = type(rows).__name__
        raise InputError(f"{path}: {where} is a JSON {kind}, not a list of {{image_id, caption}}: see the COCO format")
    for n, row in enumerate(rows):
        good = isinstance(row, dict) and isinstance(row.get("caption"), str) and type(row.get("image_id")) in (int, str)
        if not good:
            raise InputError(
                f"{path}: {where}[{n}] is {str(row)[:80]!r}: an entry needs an image_id (integer or string) and a "
                "caption (string)"
            )
    return [(row["image_id"], row["caption"]) for row in rows]


def load_results(path: str | Path) -> dict[ImageId, str]:
    """Read captions in COCO's results format, a JSON list of {"image_id", "caption"}, plain or gzip: image id ->
    caption.

    Raises: MissingFileError; InputError for HTML, broken JSON, rows of another shape, or two captions for one image.
    """
    path = Path(path)
    captions: dict[ImageId, str] = {}
    twice: dict[ImageId, None] = {}
    for image, caption in _rows(read_user_json(path, "captions"), path, "the file"):
        if image in captions:
            twice[image] = None
        captions[image] = caption
    if twice:
        raise InputError(f"{path}: {id_list(list(twice))} more than one caption: keep one for each image")
    return captions


def save_results(path: str | Path, captions: Mapping[Any, str]) -> None:
    """Write captions in COCO's results format; the file appears whole or not at all.

    Raises InputError for a wrong type.
    """
    path = Path(path)
    rows = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
    _rows(rows, path, "captions")
    write_text(path, json.dumps(rows) + "\n")  # ASCII escapes: a lone surrogate in a caption has no UTF-8


def load_references(path: str | Path) -> dict[ImageId, list[str]]:
    """Read references in COCO's captions format ({"images", "annotations"}), plain or gzip: image id -> captions, file
    order.

    An image listed under "images" without any annotation gets an empty list, so that scoring can report it; "images"
    may be absent. Raises: MissingFileError; InputError for HTML, broken JSON or another shape.
    """
    path = Path(path)
    document = read_user_json(path, "evaluate.references")
    if not isinstance(document, dict) or "annotations" not in document:
        raise InputError(f"{path} has no list 'annotations' at its top: give a file in COCO's captions format")
    images = document.get("images") or []
    if not isinstance(images, list) or not all(isinstance(i, dict) and type(i.get("id")) in (int, str) for i in images):
        raise InputError(
            f"{path}: 'images' is not a list of entries with an 'id': give a file in COCO's captions format"
        )
    references: dict[ImageId, list[str]] = {image["id"]: [] for image in images}
    for image, caption in _rows(document["annotations"], path, "annotations"):
        references.setdefault(image, []).append(caption)
    return references
