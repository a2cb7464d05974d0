"""Splits that annotation files or lists of names make: COCO, Flickr30k and the demo world."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from cgtgan.config import DatasetConfig
from cgtgan.data.annotations import (
    CaptionsById,
    ImageId,
    as_number,
    captions_by_image,
    captions_in_file,
    id_order,
    images_in_file,
    name_lines,
    numbers_of,
    split_list,
    split_list_file,
)
from cgtgan.data.caption_tables import read_captions
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.image_files import IMAGE_SUFFIXES
from cgtgan.data.user_files import missing_file
from cgtgan.errors import InputError, MissingFileError

log = logging.getLogger(__name__)

LISTS = "dataset.karpathy"


class AbsentImages(MissingFileError):
    """More than `dataset.max_bad_images` pictures of a split are not on disk: those of `ids`."""

    def __init__(self, message: str, ids: Iterable[ImageId]):
        super().__init__(message)
        self.ids = frozenset(ids)


def annotated_split(
    config: DatasetConfig, name: str, root: Path, *, captions_wanted: bool, known: Set[ImageId] = frozenset()
) -> tuple[dict[ImageId, Path], CaptionsById]:
    """Pictures of a split by id, and its captions where they are wanted; folders are scanned, no image is opened.

    known: images that need not be on disk; then their paths lead nowhere. Raises `AbsentImages` for more than
    `max_bad_images` other images that are not, `MissingFileError` for an absent file, else `InputError`.
    """
    ids, captions = _listed(config, name, root, captions_wanted)
    index = (_by_file_name if KINDS[config.kind].names_files else _scan)(config, name, root)
    ids = sorted(ids, key=id_order)[: config.max_images]
    alone = numbers_of(ids)
    paths = {i: path for i in ids if (path := index.get(i) or index.get(as_number(i) if as_number(i) in alone else i))}
    nowhere = image_folders(config, name, root)[0]
    names = _file_names(config, name, root) if known and KINDS[config.kind].names_files else {}
    paths |= {i: nowhere / (names.get(i) or str(i)) for i in ids if i in known and i not in paths}
    absent = [i for i in ids if i not in paths]
    if len(absent) > config.max_bad_images:
        raise _absent_images(config, name, root, absent, len(ids))
    if name != "train" and not captions:
        where = f"of the {name} split of dataset.kind={config.kind} under {root}"
        raise InputError(f"the annotations {where} hold no caption of it")
    if absent:
        message = "%s: %d of %d images are not on disk and left out (dataset.max_bad_images)"
        log.warning(message, name, len(absent), len(ids))
    return paths, captions


def training_caption_files(config: DatasetConfig, root: Path) -> list[Path]:
    """The files that `training_captions` reads."""
    lists = _lists_folder(config, root)
    files = [] if lists is None else [split_list_file(lists, "train", LISTS)]
    return files + [path for path, _ in _caption_files(config, "train", root, lists is not None)]


def split_files(config: DatasetConfig, name: str, root: Path) -> list[tuple[Path, str]]:
    """(file, config field) of what lists a split and its captions. Raises `InputError` for a folder without lists."""
    if config.karpathy is not None and not (root / config.karpathy).exists():
        return [(root / config.karpathy, LISTS)]
    lists, kind = _lists_folder(config, root), KINDS[config.kind]
    if lists is not None:
        return [(split_list_file(lists, name, LISTS), LISTS), *_caption_files(config, name, root, True)]
    if kind.train_list and name == "train":
        return [(root / kind.train_list, "dataset.root")]
    return _caption_files(config, name, root, False)


def training_captions(config: DatasetConfig, root: Path) -> list[Any]:
    """Raw captions of the training images, as the files have them and in their order: a corpus."""
    lists = _lists_folder(config, root)
    rows: list[tuple[ImageId, Any]] = []
    for path, field in _caption_files(config, "train", root, lists is not None):
        rows += captions_in_file(_read(config, path, field), path, "train")
    return [caption for _, caption in (rows if lists is None else _of_listed_images(config, lists, rows))]


def _of_listed_images(config: DatasetConfig, lists: Path, rows: list[tuple[ImageId, Any]]) -> list[tuple[ImageId, Any]]:
    listed = set(KINDS[config.kind].image_ids(split_list(lists, "train", LISTS)).values())
    chosen = [row for row in rows if not listed.isdisjoint((row[0], as_number(row[0])))]
    bare = listed - {same for image_id, _ in chosen for same in (image_id, as_number(image_id))}
    first = min(bare, key=id_order, default=None)
    if not chosen:
        raise InputError(
            f"{lists} ({LISTS}) lists train images such as {first!r} and the caption files (dataset.train_annotations) "
            f"have none of them, but such as {rows[0][0] if rows else None!r}: give matching files"
        )
    if bare:
        message = "%s: %d of %d listed train images have no caption, %s first"
        log.warning(message, lists, len(bare), len(listed), first)
    return chosen


def _listed(config: DatasetConfig, name: str, root: Path, captions_wanted: bool) -> tuple[list[ImageId], CaptionsById]:
    """Ids of a split and, where wanted, their captions."""
    kind, lists = KINDS[config.kind], _lists_folder(config, root)
    if lists is not None:
        ids = list(dict.fromkeys(kind.image_ids(split_list(lists, name, LISTS)).values()))
        captions: CaptionsById = {}
        for path, field in _caption_files(config, name, root, True) if captions_wanted else ():
            rows = captions_in_file(_read(config, path, field), path, name)
            for image_id, texts in captions_by_image(rows, path).items():
                captions.setdefault(image_id, []).extend(texts)
        captions = _under_listed_ids(captions, ids)
        return ids, {i: captions[i] for i in ids if i in captions}
    if kind.train_list and name == "train" and not captions_wanted:
        return [kind.image_id(line) for line in name_lines(root / kind.train_list, "dataset.root")], {}
    path, field = _caption_files(config, name, root, False)[0]
    content = _read(config, path, field)
    ids = list(images_in_file(content, path, name))
    if not captions_wanted:
        return ids, {}
    captions = _under_listed_ids(captions_by_image(captions_in_file(content, path, name), path), ids)
    stray = captions.keys() - set(ids)
    if captions and len(stray) == len(captions):
        raise InputError(
            f"{path} ({field}): no caption belongs to a listed image; its captions have ids as "
            f"{next(iter(captions))!r}, its images as {next(iter(ids), None)!r}"
        )
    if stray:
        message = "%s: captions of %d ids belong to no listed image, %s first"
        log.warning(message, path, len(stray), min(stray, key=id_order))
    return ids, captions


def _read(config: DatasetConfig, path: Path, field: str) -> Any:
    return read_captions(path, field, KINDS[config.kind].annotations_from)


def _lists_folder(config: DatasetConfig, root: Path) -> Path | None:
    """The folder of split lists, None where the annotations make the split."""
    if config.karpathy is None:
        return None
    lists = root / config.karpathy
    if not lists.exists():
        raise missing_file(lists, LISTS, KINDS[config.kind].annotations_from)
    return lists if lists.is_dir() else None


def _under_listed_ids(captions: CaptionsById, ids: list[ImageId]) -> CaptionsById:
    """The same captions under the ids of the list: one of both may have names where the other has numbers."""
    listed, meant = set(ids), numbers_of(ids)
    under: CaptionsById = {}
    for image_id, texts in captions.items():
        under.setdefault(image_id if image_id in listed else meant.get(as_number(image_id), image_id), []).extend(texts)
    return under


def _caption_files(config: DatasetConfig, name: str, root: Path, split_lists: bool) -> list[tuple[Path, str]]:
    """(file, config field) of the captions of a split: as set, or the usual places."""
    kind, field = KINDS[config.kind], f"dataset.{name}_annotations"
    given = {"train": config.train_annotations, "val": config.val_annotations, "test": config.test_annotations}[name]
    if given is not None:
        return [(root / given, field)]
    if config.karpathy is not None and not split_lists:
        return [(root / config.karpathy, LISTS)]
    if split_lists and kind.listed_caption_files:
        return [(root / place, field) for place in kind.listed_caption_files[name]]
    places = [root / place for place in kind.caption_files[name]]
    return [(next((place for place in places if place.is_file()), places[0]), field)]


def image_folders(config: DatasetConfig, name: str, root: Path) -> list[Path]:
    """Where the pictures of a split are looked for."""
    kind = KINDS[config.kind]
    return [root / (config.images or kind.images) / folder for folder in kind.image_folders[name]]


def _scan(config: DatasetConfig, name: str, root: Path) -> dict[ImageId, Path]:
    """id -> path of every picture in the split's folders: one scan per folder, no look at single files."""
    kind = KINDS[config.kind]
    found: dict[str, Path] = {}
    for folder in image_folders(config, name, root):
        found |= {file: folder / file for file in picture_names(folder)}
    index: dict[ImageId, Path] = {}
    if not kind.id_ends_name:
        index |= {os.path.splitext(file)[0]: path for file, path in found.items()}  # noqa: PTH122
    return index | {image_id: found[file] for file, image_id in kind.image_ids(found).items()}


def picture_names(folder: Path) -> list[str]:
    """Names of the pictures in a folder; empty where there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # 120,000 Path objects would take seconds
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    return [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]  # noqa: PTH122


def _by_file_name(config: DatasetConfig, name: str, root: Path) -> dict[ImageId, Path]:
    """id -> path of every picture in the split's folders that the caption file names."""
    files = {file.name: file for file in _scan(config, name, root).values()}
    names = _file_names(config, name, root)
    return {image_id: files[file] for image_id, file in names.items() if file in files}


def _file_names(config: DatasetConfig, name: str, root: Path) -> Mapping[ImageId, str | None]:
    path, field = domain_file(config, name, root)
    return images_in_file(_read(config, path, field), path, name)


def domain_file(config: DatasetConfig, name: str, root: Path) -> tuple[Path, str]:
    """(file, config field) of the captions of a split of a kind whose one caption file names files and domains."""
    return _caption_files(config, name, root, False)[0]


def _absent_images(config: DatasetConfig, name: str, root: Path, absent: list[ImageId], total: int) -> AbsentImages:
    folders = image_folders(config, name, root)
    gone = [str(folder) for folder in folders if not folder.is_dir()]
    where = " and ".join(map(str, folders)) + (f" (no such folder: {', '.join(gone)})" if gone else "")
    first, kind = ", ".join(map(str, absent[:3])), KINDS[config.kind]
    return AbsentImages(
        f"{len(absent)} of {total} {name} images are not in {where}, first {first}: get them from "
        f"{kind.images_from or kind.annotations_from}, set dataset.images to where they are, or allow some with "
        "dataset.max_bad_images",
        absent,
    )
