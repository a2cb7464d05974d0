"""Results files (image id and caption, COCO's format) and references, read with errors that name the place."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cgtgan.data.annotations import ImageId, as_number, captions_and_names, checked_id, numbers_of
from cgtgan.data.caption_tables import read_captions
from cgtgan.data.image_names import match_names
from cgtgan.data.user_files import quoted
from cgtgan.errors import InputError
from cgtgan.runtime.artifacts import write_text

log = logging.getLogger(__name__)


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
                f"{path}: {where}[{n}] is {quoted(row)}: an entry needs an image_id (integer or string) and a "
                "caption (string)"
            )
    return [(checked_id(row["image_id"], f"{path}, {where}[{n}]"), row["caption"]) for n, row in enumerate(rows)]


def load_results(path: str | Path) -> dict[ImageId, str]:
    """Read captions in COCO's results format, a JSON list of {"image_id", "caption"}, or in another layout of
    `data/caption_tables.py`, plain or compressed: image id -> caption.

    Raises: MissingFileError; InputError for HTML, broken JSON, rows of another shape, or two captions for one image.
    """
    path = Path(path)
    captions: dict[ImageId, str] = {}
    twice: dict[ImageId, None] = {}
    content = read_captions(path, "captions")
    rows, where = (content["annotations"], "annotations") if _is_coco(content) else (content, "the file")
    for image, caption in _rows(rows, path, where):
        if image in captions:
            twice[image] = None
        captions[image] = caption
    if twice:
        raise InputError(f"{path}: {id_list(list(twice))} more than one caption: keep one for each image")
    return captions


def _is_coco(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("annotations"), list)


def save_results(path: str | Path, captions: Mapping[Any, str]) -> None:
    """Write captions in COCO's results format; the file appears whole or not at all.

    Raises InputError for a wrong type.
    """
    path = Path(path)
    rows = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
    _rows(rows, path, "captions")
    write_text(path, json.dumps(rows) + "\n")  # ASCII escapes: a lone surrogate in a caption has no UTF-8


def load_references(path: str | Path) -> dict[ImageId, list[str]]:
    """References in a layout of `data/annotations.py` or `data/caption_tables.py`: id -> captions, in the file's order.

    An image without a caption has an empty list, so that scoring can report it; "images" may be absent.
    Raises: MissingFileError; InputError for HTML, broken JSON or another shape.
    """
    return load_named_references(path)[0]


def load_named_references(path: str | Path) -> tuple[dict[ImageId, list[str]], dict[ImageId, str]]:
    """`load_references`, and the file name of each image whose name the file gives."""
    path = Path(path)
    document = read_captions(path, "evaluate.references")
    if isinstance(document, dict) and not isinstance(document.get("images", []), list):
        raise InputError(f"{path}: 'images' is not a list of entries with an 'id': give a file in COCO's format")
    captions, names = captions_and_names(document, path)
    references = {image: captions.get(image, []) for image in names} | captions
    if not references:
        raise InputError(f"{path} (evaluate.references) has no caption")
    return references, {image: name for image, name in names.items() if name}


def under_reference_ids(
    captions: Mapping[ImageId, str], references: Iterable[ImageId], names: Mapping[ImageId, str], path: Path
) -> dict[ImageId, str]:
    """The captions of `path` under the ids of the references: 42, "42", "000000000042" and photos/42.jpg are one image.

    names: the file names of images whose name is known; another is known by its id. Captions that fit no reference
    keep their ids. What is matched by value or by name is counted in a log line. Raises `InputError` where two captions
    belong to one image.
    """
    ids = list(references)
    listed, meant = set(ids), numbers_of(ids)
    target = {key: key if key in listed else meant.get(as_number(key), key) for key in captions}
    unknown = [key for key, image in target.items() if image not in listed]
    target |= match_names({key: [str(key)] for key in unknown}, {i: names.get(i, str(i)) for i in ids if unknown})
    key_of: dict[ImageId, ImageId] = {}
    for key, image in target.items():
        if key != (other := key_of.setdefault(image, key)):
            raise InputError(f"{path}: the captions of {other!r} and {key!r} are of one image, {image!r}: keep one")
    if renamed := {key: image for key, image in target.items() if image != key}:
        message = "%s: %d of %d image ids are those of the references by value or by file name, such as %r for %r"
        log.warning(message, path, len(renamed), len(captions), *next(iter(renamed.items())))
    return {image: captions[key] for image, key in key_of.items()}
