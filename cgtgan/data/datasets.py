"""Images, their splits and the reference captions: COCO, Flickr30k, a folder of one's own, and the demo world.

The training split of unpaired training carries no caption; `load_pairs` reads them for the supervised upper bound alone.
"""

from __future__ import annotations

import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cgtgan.config import SPLITS, DatasetConfig
from cgtgan.data.annotations import (
    WHERE,
    WHERE_IMAGES,
    Captions,
    ImageId,
    as_number,
    captions_by_image,
    captions_in_file,
    id_order,
    images_in_file,
    missing_file,
    printable,
    read_json,
)
from cgtgan.data.image_folder import IMAGE_SUFFIXES, folder_split, list_file, list_path, mend, name_lines
from cgtgan.errors import InputError, MissingFileError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    image_id: ImageId
    path: Path


@dataclass(frozen=True)
class Split:
    """`images` sorted by id, integers first. `references` id -> captions: of all images, or {} (train, folders without any).

    `bare`: images of the split that are left out because they have no caption.
    """

    name: str
    images: list[ImageRecord]
    references: Captions
    bare: tuple[ImageId, ...] = ()


def load_split(config: DatasetConfig, name: str, root: Path) -> Split:
    """List a split (train, val or test) of the dataset under `root`; folders are scanned, no image is opened.

    train: references is {} and captions in its files are not kept. val, test: images without captions are left out and logged.
    Raises `MissingFileError` for absent files or more than `max_bad_images` absent images, `InputError` for wrong content.
    """
    if name not in SPLITS:
        raise InputError(f"split '{name}' is not accepted: one of {', '.join(SPLITS)}")
    captions: Captions = {}
    if config.kind == "folder":
        paths, captions = folder_split(config, name, root)
    else:
        ids, captions = _listed(config, name, root)
        index = _index(config, name, root)
        ids = sorted(ids, key=id_order)[: config.max_images]
        paths = {i: index[as_number(i)] for i in ids if as_number(i) in index}
        absent = [i for i in ids if i not in paths]
        if len(absent) > config.max_bad_images:
            raise _absent_images(config, name, root, absent, len(ids))
        if name != "train" and not captions:
            raise InputError(
                f"the annotations of the {name} split of dataset.kind={config.kind} under {root} hold no caption of it"
            )
        if absent:
            log.warning(
                "%s: %d of %d images are not on disk and left out (dataset.max_bad_images)", name, len(absent), len(ids)
            )
    captions = {} if name == "train" else captions
    bare: tuple[ImageId, ...] = ()
    ids = sorted(paths, key=id_order)
    if captions:
        bare = tuple(i for i in ids if not captions.get(i))
        if bare:
            log.warning(
                "%s: %d of %d images have no caption and are left out, %s first", name, len(bare), len(ids), bare[0]
            )
        ids = [i for i in ids if captions.get(i)]
    ids = ids[: config.max_images]
    if not ids:
        raise InputError(f"the {name} split of dataset.kind={config.kind} under {root} has no image")
    return Split(name, [ImageRecord(i, paths[i]) for i in ids], {i: captions[i] for i in ids} if captions else {}, bare)


def load_pairs(config: DatasetConfig, root: Path) -> Captions:
    """Captions of the training images, id -> captions, for the supervised upper bound only; ids as `load_split` has."""
    if config.kind == "folder":
        paths, captions = folder_split(config, "train", root)
        return {i: captions[i] for i in sorted(paths, key=id_order)[: config.max_images] if i in captions}
    ids, captions = _listed(config, "train", root, captions_wanted=True)
    return {i: captions[i] for i in sorted(ids, key=id_order)[: config.max_images] if i in captions}


def training_caption_files(config: DatasetConfig, root: Path) -> list[Path]:
    """The files that `training_captions` reads."""
    lists = _split_lists(config, root)
    files = [list_path(lists, "train", "dataset.karpathy")] if lists is not None else []
    return files + [path for path, _ in _caption_files(config, "train", root, lists is not None)]


def training_captions(config: DatasetConfig, root: Path) -> list[Any]:
    """Raw captions of the training images alone, in any layout of coco and flickr30k, as its files have them: a corpus for any use."""
    lists = _split_lists(config, root)
    rows: list[tuple[ImageId, Any]] = []
    for path, field in _caption_files(config, "train", root, lists is not None):
        rows += captions_in_file(read_json(path, field, WHERE[config.kind]), path, "train")
    if lists is not None:
        listed = {_id_in_name(config.kind, line) for line in list_file(lists, "train", "dataset.karpathy")}
        own = [row for row in rows if as_number(row[0]) in listed]
        bare = listed - {as_number(image_id) for image_id, _ in own}
        if not own:
            raise InputError(
                f"{lists} (dataset.karpathy) lists train images such as {min(bare, key=id_order, default=None)!r} and the caption files "
                f"(dataset.train_annotations) have none of them, but such as {rows[0][0] if rows else None!r}: give matching files"
            )
        if bare:
            log.warning(
                "%s: %d of %d listed train images have no caption, %s first",
                lists,
                len(bare),
                len(listed),
                min(bare, key=id_order),
            )
        rows = own
    return [caption for _, caption in rows]


def open_image(path: Path, draft: int = 0) -> Image.Image:
    """The picture as CLIP's own pipeline opens it: in the file's own mode (RGB comes after the resize), not turned by its EXIF entry.

    draft: if above 0, a JPEG is decoded at the smallest of its scales 1/1, 1/2, 1/4, 1/8 that leaves so many pixels a side.
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
    # What a damaged picture raises depends on its format.
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        LookupError,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"the image {printable(path)} cannot be read: {error}{mend(path)}") from error


# ------------------------------------------------------------------------------------------------ coco, flickr30k and demo


def _listed(
    config: DatasetConfig, name: str, root: Path, captions_wanted: bool = False
) -> tuple[list[ImageId], Captions]:
    """Ids of a split and, of val and test or where wanted, their captions."""
    captions_wanted = captions_wanted or name != "train"
    lists = _split_lists(config, root)
    if lists is not None:
        ids = list(dict.fromkeys(_id_in_name(config.kind, line) for line in list_file(lists, name, "dataset.karpathy")))
        captions = (
            _captions(config, name, root, _caption_files(config, name, root, split_lists=True))
            if captions_wanted
            else {}
        )
        captions = _under_listed_ids(captions, ids)
        return ids, {i: captions[i] for i in ids if i in captions}
    if config.kind == "demo" and name == "train" and not captions_wanted:
        list_path = root / (config.train_annotations or "train_images.txt")
        return [_id_in_name("demo", line) for line in name_lines(list_path, "dataset.train_annotations")], {}
    path, field = _caption_files(config, name, root, split_lists=False)[0]
    content = read_json(path, field, WHERE.get(config.kind))
    ids = list(images_in_file(content, path, name))
    if not captions_wanted:
        return ids, {}
    captions = _under_listed_ids(captions_by_image(captions_in_file(content, path, name), path), ids)
    if captions and not captions.keys() & set(ids):
        raise InputError(
            f"{path} ({field}): no caption belongs to a listed image; its captions have ids as {next(iter(captions))!r}, its images "
            f"as {next(iter(ids), None)!r}"
        )
    stray = captions.keys() - set(ids)
    if stray:
        log.warning(
            "%s: captions of %d ids belong to no listed image, %s first", path, len(stray), min(stray, key=id_order)
        )
    return ids, captions


def _split_lists(config: DatasetConfig, root: Path) -> Path | None:
    """The folder of split lists, None where the annotations make the split."""
    if config.karpathy is None:
        return None
    lists = root / config.karpathy
    if not lists.exists():
        raise missing_file(lists, "dataset.karpathy", WHERE.get(config.kind))
    return lists if lists.is_dir() else None


def _under_listed_ids(captions: Captions, ids: list[ImageId]) -> Captions:
    """The same captions under the ids of the list: one of both may have names where the other has numbers."""
    listed = {as_number(i): i for i in ids}
    return {listed.get(as_number(i), i): texts for i, texts in captions.items()}


def _caption_files(config: DatasetConfig, name: str, root: Path, split_lists: bool) -> list[tuple[Path, str]]:
    """(file, config field) of the captions of a split: as set, or the usual places."""
    field = f"dataset.{name}_annotations"
    given = {"train": config.train_annotations, "val": config.val_annotations, "test": config.test_annotations}[name]
    if given is not None and not (config.kind == "demo" and given.endswith(".txt")):
        return [(root / given, field)]
    if config.karpathy is not None and not split_lists:
        return [(root / config.karpathy, "dataset.karpathy")]
    if (
        split_lists and config.kind == "coco"
    ):  # the validation part of the training split ('restval') has its captions in val2014
        years = ("train2014", "val2014") if name == "train" else ("val2014",)
        return [(root / "annotations" / f"captions_{year}.json", field) for year in years]
    usual = "train_caption.json" if name == "train" else f"{name}_caption_coco_format.json"
    places = [root / "annotations" / usual, root / usual]
    if config.kind != "demo":
        places += [root / "annotations" / f"dataset_{config.kind}.json", root / f"dataset_{config.kind}.json"]
    return [(next((place for place in places if place.is_file()), places[0]), field)]


def _captions(config: DatasetConfig, name: str, root: Path, files: list[tuple[Path, str]]) -> Captions:
    merged: Captions = {}
    for path, field in files:
        for image_id, texts in captions_by_image(
            captions_in_file(read_json(path, field, WHERE.get(config.kind)), path, name), path
        ).items():
            merged.setdefault(image_id, []).extend(texts)
    return merged


def _folders(config: DatasetConfig, name: str, root: Path) -> list[Path]:
    if config.kind == "coco":
        base = root / (config.images or ".")
        return [base / "train2014", base / "val2014"] if name == "train" else [base / "val2014"]
    if config.kind == "flickr30k":
        return [root / (config.images or "flickr30k_images")]
    return [root / (config.images or "images") / name]


def _index(config: DatasetConfig, name: str, root: Path) -> dict[ImageId, Path]:
    """id -> path of every picture in the split's folders: one scan a folder, no look at single files."""
    index: dict[ImageId, Path] = {}
    for folder in _folders(config, name, root):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 (120,000 Path objects would take seconds)
                    if suffix.lower() in IMAGE_SUFFIXES and not stem.startswith("."):
                        index[_id_in_name(config.kind, entry.name)] = folder / entry.name
    return index


def _id_in_name(kind: str, name: str) -> ImageId:
    """COCO, demo: the number ending the name (COCO_val2014_000000000042.jpg -> 42); else the name without folder and ending."""
    stem = name.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
    digits = stem if kind == "flickr30k" else stem.rsplit("_", 1)[-1]
    return as_number(digits) if isinstance(as_number(digits), int) else stem


def _absent_images(config: DatasetConfig, name: str, root: Path, absent: list[ImageId], total: int) -> MissingFileError:
    folders = _folders(config, name, root)
    gone = [str(folder) for folder in folders if not folder.is_dir()]
    where = " and ".join(map(str, folders)) + (f" (no such folder: {', '.join(gone)})" if gone else "")
    return MissingFileError(
        f"{len(absent)} of {total} {name} images are not in {where}, first {', '.join(map(str, absent[:3]))}: get them from "
        f"{WHERE_IMAGES[config.kind]}, set dataset.images to where they are, or allow some with dataset.max_bad_images"
    )
