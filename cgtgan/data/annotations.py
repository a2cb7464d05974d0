"""Caption files of the three known layouts, and lists of image names.

paper:     [{"image_id": 1 or "1", "caption": "..."}, ...]
COCO:      {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy:  {"images": [{"split", "filename", "cocoid"?, "sentences": [{"raw"}]}]}, 'restval' counts as train
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from cgtgan.config import SPLITS
from cgtgan.data.user_files import quoted, text_lines
from cgtgan.errors import InputError

ImageId: TypeAlias = int | str
CaptionsById: TypeAlias = dict[ImageId, list[str]]
LONGEST_NAME = 1024  # characters of an id or a path


# ---------------------------------------------------------------------------------------------- caption files


def is_karpathy(content: Any) -> bool:
    """Whether the JSON has Karpathy's layout."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def captions_in_file(content: Any, path: Path, split: str) -> list[tuple[ImageId, Any]]:
    """(image id, caption) in the file's order; of Karpathy's file only `split`. A caption may be of any type.

    Raises `InputError` naming the entry whose keys are wrong.
    """
    rows = _karpathy_rows(content, path, split) if is_karpathy(content) else _listed_rows(content, path)
    unified = unify_ids(image_id for image_id, _ in rows)
    return [(unified[image_id], caption) for image_id, caption in rows]


def _karpathy_rows(content: dict[str, Any], path: Path, split: str) -> list[tuple[ImageId, Any]]:
    rows: list[tuple[ImageId, Any]] = []
    for place, image in _karpathy_images(content, path, split):
        image_id, sentences = _karpathy_id(image, place), image.get("sentences")
        if not isinstance(sentences, list) or not all(isinstance(s, dict) and "raw" in s for s in sentences):
            raise InputError(f"{place}: 'sentences' must be a list of objects with 'raw'")
        rows += [(image_id, s["raw"]) for s in sentences]
    return rows


def _listed_rows(content: Any, path: Path) -> list[tuple[ImageId, Any]]:
    key, entries = ("annotations", content.get("annotations")) if isinstance(content, dict) else ("", content)
    if not isinstance(entries, list):
        kind = f"the keys {quoted(sorted(content)[:6])}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"{path} holds {kind}: a list of image_id/caption, a COCO or a Karpathy file is accepted")
    rows: list[tuple[ImageId, Any]] = []
    for n, entry in enumerate(entries):
        place = f"{path}, entry {key}[{n}]"
        if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
            keys = quoted(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
            raise InputError(f"{place}: 'image_id' and 'caption' are needed, found {keys}")
        rows.append((checked_id(entry["image_id"], place), entry["caption"]))
    return rows


def captions_by_image(rows: Iterable[tuple[ImageId, object]], path: Path) -> CaptionsById:
    """Group by image, in order; `InputError` for a caption that is no string."""
    captions: CaptionsById = {}
    for image_id, caption in rows:
        if not isinstance(caption, str):
            raise InputError(f"{path}: a caption of image {image_id} is {quoted(caption)}, it must be a string")
        captions.setdefault(image_id, []).append(caption)
    return captions


def images_in_file(content: Any, path: Path, split: str) -> dict[ImageId, str | None]:
    """id -> file name (None where the file gives none) of the images of `split`, captions left alone."""
    names: dict[ImageId, str | None] = {}
    if is_karpathy(content):
        for place, image in _karpathy_images(content, path, split):
            names[_karpathy_id(image, place)] = image["filename"]
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        for n, image in enumerate(content["images"]):
            place = f"{path}, entry images[{n}]"
            if not isinstance(image, dict) or "id" not in image:
                raise InputError(f"{place}: an object with 'id' is needed")
            name = image.get("file_name")
            names[checked_id(image["id"], place)] = name if isinstance(name, str) else None
    else:
        names = {image_id: None for image_id, _ in captions_in_file(content, path, split)}
    unified = unify_ids(names)
    return {unified[image_id]: name for image_id, name in names.items()}


def domains_in_file(content: Any) -> dict[ImageId, str]:
    """id -> NoCaps' domain of each image of a file in COCO's layout that names one; ids as in `images_in_file`."""
    images = content.get("images") if isinstance(content, dict) and not is_karpathy(content) else None
    entries = [i for i in images if isinstance(i, dict)] if isinstance(images, list) else []
    domains = {i["id"]: i.get("domain") for i in entries if isinstance(i.get("id"), (int, str))}
    unified = unify_ids(domains)
    return {unified[image_id]: domain for image_id, domain in domains.items() if isinstance(domain, str)}


def captions_and_names(content: Any, path: Path) -> tuple[CaptionsById, dict[ImageId, str | None]]:
    """Of a whole file, every split: captions by id; and the file name (or None) of each image it lists, same ids."""
    captions: CaptionsById = {}
    names: dict[ImageId, str | None] = {}
    for split in SPLITS if is_karpathy(content) else ("all",):
        captions |= captions_by_image(captions_in_file(content, path, split), path)
        names |= images_in_file(content, path, split)
    meant = numbers_of(captions)
    return captions, {i if i in captions else meant.get(as_number(i), i): name for i, name in names.items()}


def _karpathy_images(content: dict[str, Any], path: Path, split: str) -> list[tuple[str, dict[str, Any]]]:
    """(its place in the file, the image's entry) of every image of `split`."""
    images: list[tuple[str, dict[str, Any]]] = []
    split_of: dict[str, str] = {}
    for n, image in enumerate(content["images"]):
        place = f"{path}, entry images[{n}]"
        if not isinstance(image, dict) or not all(isinstance(image.get(key), str) for key in ("filename", "split")):
            raise InputError(
                f"{place}: 'filename', 'split' and 'sentences' are needed, as in Karpathy's dataset_*.json"
            )
        part = "train" if image["split"] == "restval" else image["split"]
        if part != (other := split_of.setdefault(image["filename"], part)):
            raise InputError(
                f"{place}: {image['filename']:.200} is in {part:.40} and in {other:.40}: take it out of one"
            )
        if part == split:
            images.append((place, image))
    return images


def _karpathy_id(image: dict[str, Any], place: str) -> ImageId:
    """COCO's own id where there is one; else the file's name without its ending, as in Flickr30k."""
    stem = PurePosixPath(image["filename"].replace("\\", "/")).stem
    return checked_id(image.get("cocoid", stem), place)


# ---------------------------------------------------------------------------------------------------- image ids


def unify_ids(ids: Iterable[ImageId]) -> dict[ImageId, ImageId]:
    """Map every id to its integer if all of them are integers or digits and stay apart, else to itself.

    007 and 7 beside each other are two names.
    """
    distinct = set(ids)
    numbers = {i: as_number(i) for i in distinct}
    if not all(isinstance(i, int) for i in numbers.values()):
        return {i: i for i in distinct}
    if len({numbers[i] for i in distinct if isinstance(i, str)}) < sum(isinstance(i, str) for i in distinct):
        return {i: str(i) for i in distinct}
    return numbers


def as_number(image_id: ImageId) -> ImageId:
    """A name of ASCII digits as its integer, another with composed letters; more than 18 digits are a hash: a name."""
    if not isinstance(image_id, str):
        return image_id
    if len(image_id) <= 18 and image_id.isascii() and image_id.isdigit():
        return int(image_id)
    return unicodedata.normalize("NFC", image_id)


def numbers_of(ids: Iterable[ImageId]) -> dict[ImageId, ImageId]:
    """Number -> the id that it means, names under themselves; a number that two ids share (007 and 7) is left out."""
    meant: dict[ImageId, set[ImageId]] = {}
    for image_id in ids:
        meant.setdefault(as_number(image_id), set()).add(image_id)
    return {number: same.pop() for number, same in meant.items() if len(same) == 1}


def id_order(image_id: ImageId) -> tuple[bool, ImageId]:
    """Sort key: integers first, then names."""
    return isinstance(image_id, str), image_id


def checked_id(value: Any, place: str) -> ImageId:
    """`value` if it is an id; `InputError` naming the place where it is not."""
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise InputError(f"{place}: the image id {quoted(value)} must be an integer or a name")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise InputError(f"{place}: the image id {str(value)[:30]}... is no number of 64 bits: write it as a string")
    if isinstance(value, str) and len(value) > LONGEST_NAME:
        raise InputError(f"{place}: the image id {quoted(value)} is longer than any name of a file")
    if isinstance(value, str) and not value.isprintable() and re.search("[\ud800-\udfff\x00]", value):
        raise InputError(f"{place}: the image id {quoted(value)} has characters that no file name has")
    return value


# ------------------------------------------------------------------------------------------ lists of image names


def name_lines(path: Path, field: str) -> list[str]:
    """Lines of a list of image names, stripped, empty ones left out. Raises `InputError` for one that is no name."""
    lines = [line.strip() for line in text_lines(path, field) if line.strip()]
    if endless := next((line for line in lines if len(line) > LONGEST_NAME), None):
        raise InputError(f"{path} ({field}): the line {quoted(endless)} is longer than any name of a file")
    return lines


def split_list(folder: Path, name: str, field: str) -> list[str]:
    """Lines of the split's list in `folder`. Raises `InputError` if another split's list has one of them too."""
    lines = name_lines(split_list_file(folder, name, field), field)
    for other in (split for split in SPLITS if split != name and len(_list_files(folder, split)) == 1):
        if both := set(lines).intersection(name_lines(_list_files(folder, other)[0], field)):
            shared = f"{min(both)} (and {len(both) - 1} more)"
            raise InputError(f"{folder} ({field}) lists {shared} in {name} and in {other}: take it out of one")
    return lines


def split_list_file(folder: Path, name: str, field: str) -> Path:
    """The one file *_{name}.txt (or {name}.txt) in `folder`. Raises `InputError` if there is none, or several."""
    files = _list_files(folder, name)
    if len(files) != 1:
        problem = f"has {len(files)} files" if folder.is_dir() else "is no folder with the file"
        raise InputError(f"{folder} ({field}) {problem} *_{name}.txt: one list of image names per split is needed")
    return files[0]


def _list_files(folder: Path, name: str) -> list[Path]:
    return sorted(p for p in folder.glob("*.txt") if p.stem == name or p.stem.endswith(f"_{name}"))
