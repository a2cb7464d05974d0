"""Which picture a name in a list, a caption file or a results file means."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from cgtgan.data.annotations import ImageId
from cgtgan.data.image_files import PHOTO_SUFFIXES

Key = TypeVar("Key", bound=Hashable)
# A number ends a name where it is the whole of it, or follows a mark or the usual word of a camera: IMG12, photo 12. It
# does not follow another letter, as in the hash e3b0c44298fc1.
_ENDING_NUMBER = re.compile(
    r"(?:.*[\W_])?(?:img|image|im|photo|picture|pic|dsc|dscn|frame|p)?([0-9]{1,18})", re.IGNORECASE | re.DOTALL
)

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)


def plain_name(name: str) -> str:
    """Windows' `\\` as `/`, a Mac's decomposed letters composed, no `./` at the start."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def match_names(names: Mapping[Key, Sequence[str]], references: Mapping[ImageId, str]) -> dict[Key, ImageId]:
    """Key -> the reference that one of its names means; keys that fit none, or several equally well, are left out.

    references: the name of each, or its id. A name is recognised by its path, else by the last part of it, else by
    both without regard to capitals, else by the number that ends it. The ending may be left out.
    """
    matched: dict[Key, ImageId] = {}
    reference_keys = {reference: _keys(name) for reference, name in references.items()}
    keys = {key: [_keys(name) for name in given] for key, given in names.items()}
    for way in range(len(_keys(""))):
        free: dict[str | None, list[ImageId]] = {}
        for reference in references.keys() - set(matched.values()):
            free.setdefault(reference_keys[reference][way], []).append(reference)
        free.pop(None, None)
        for key in names.keys() - matched.keys():
            fitting = {reference for each in keys[key] for reference in free.get(each[way], [])}
            if len(fitting) == 1:
                matched[key] = fitting.pop()
    return matched


def _keys(name: str) -> tuple[str | None, ...]:
    """What is compared, way by way."""
    name = plain_name(name)
    last = name.rsplit("/", 1)[-1]
    stem, dot, ending = last.rpartition(".")
    stem = stem if dot + ending.lower() in PHOTO_SUFFIXES else last
    number = None if _UUID.fullmatch(stem) else _ENDING_NUMBER.fullmatch(stem)
    return name, last, name.casefold(), last.casefold(), number and str(int(number[1]))
