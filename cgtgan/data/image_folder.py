"""A folder of pictures as a dataset: ids, references, splits; and lists of image names."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

from cgtgan.config import DatasetConfig
from cgtgan.data.annotations import (
    Captions,
    ImageId,
    captions_by_image,
    captions_in_file,
    id_order,
    images_in_file,
    is_karpathy,
    missing_file,
    read_json,
)
from cgtgan.errors import InputError, MissingFileError

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"})


def folder_split(config: DatasetConfig, name: str, root: Path) -> tuple[dict[ImageId, Path], Captions]:
    """Pictures of a split and every caption there is; ids are the references' where a picture has some, else its relative path."""
    base = root / config.images if config.images is not None else (root / "images" if (root / "images").is_dir() else root)
    if not base.is_dir():
        raise missing_file(base, "dataset.images (or dataset.root)")
    files = _pictures(base)
    if not files:
        raise InputError(f"{base} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}): set dataset.images to a folder that does")
    captions: Captions = {}
    if config.references is not None:
        path = root / config.references
        content = read_json(path, "dataset.references")
        for part in SPLITS if is_karpathy(content) else ("all",):
            captions.update(captions_by_image(captions_in_file(content, path, part), path))
        known = {} if is_karpathy(content) else {n: i for i, n in images_in_file(content, path, "all").items() if n is not None}
        files = _with_reference_ids(files, captions, known, path)
        stray = captions.keys() - files.keys()
        if stray:
            log.warning("%s: captions of %d ids belong to no picture in %s, %s first", path, len(stray), base, min(stray, key=id_order))
        if captions and not captions.keys() & files.keys():
            raise InputError(
                f"{path} (dataset.references) has captions for {len(captions)} images, such as {next(iter(captions))}, and none of the "
                f"{len(files)} pictures in {base}, such as {next(iter(files))}: its ids, or file_name, must name these pictures"
            )
    if config.karpathy is not None:
        lines = list_file(root / config.karpathy, name, "dataset.karpathy")
        chosen = _picked(files, base, lines, config)
    else:
        chosen = {i: p for i, p in files.items() if _drawn_split(i, config) == name}
        share = {"train": 1.0, "val": config.val_fraction, "test": config.test_fraction}[name]
        if not chosen and share > 0:
            raise InputError(f"none of the {len(files)} pictures in {base} falls in {name}: raise its dataset.*_fraction or name lists")
    return chosen, captions


def _pictures(base: Path) -> dict[ImageId, Path]:
    """Relative path without ending -> path; pictures that differ in the ending alone keep it."""
    paths: list[Path] = []
    for folder, folders, names in os.walk(base):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
        paths += [Path(folder, n) for n in sorted(names) if not n.startswith(".") and Path(n).suffix.lower() in IMAGE_SUFFIXES]
    stems: dict[ImageId, list[Path]] = {}
    for path in paths:
        stems.setdefault(path.relative_to(base).with_suffix("").as_posix(), []).append(path)
    alone = {stem: found[0] for stem, found in stems.items() if len(found) == 1}
    return alone | {path.relative_to(base).as_posix(): path for found in stems.values() if len(found) > 1 for path in found}


def _with_reference_ids(files: dict[ImageId, Path], captions: Captions, known: dict[str, ImageId], path: Path) -> dict[ImageId, Path]:
    """The same pictures under the ids of the references: by file name, relative path, or the number that ends the name."""
    by_name = {n: i for full, i in known.items() for n in (full, full.replace("\\", "/").rsplit("/", 1)[-1])}
    renamed: dict[ImageId, Path] = {}
    for own, file in files.items():
        number = re.search(r"[0-9]+$", file.stem)
        names = [by_name.get(f"{own}{file.suffix}"), by_name.get(file.name), own, file.stem, int(number[0]) if number else None]
        image_id = next((i for i in names if i is not None and i in captions), own)
        if image_id in renamed:
            raise InputError(f"{path} (dataset.references): image {image_id} fits both {renamed[image_id]} and {file}")
        renamed[image_id] = file
    return renamed


def _picked(files: dict[ImageId, Path], base: Path, lines: list[str], config: DatasetConfig) -> dict[ImageId, Path]:
    by_name: dict[str, ImageId] = {}
    for image_id, file in files.items():
        relative = file.relative_to(base)
        for key in (relative.as_posix(), relative.with_suffix("").as_posix(), file.name, str(image_id)):
            by_name.setdefault(key, image_id)
    absent = [line for line in lines if line not in by_name]
    if len(absent) > config.max_bad_images:
        raise MissingFileError(
            f"{len(absent)} of {len(lines)} images listed by dataset.karpathy={config.karpathy} are not in {base}, first "
            f"{', '.join(absent[:3])}: set dataset.images to where they are, or allow some with dataset.max_bad_images"
        )
    return {by_name[line]: files[by_name[line]] for line in lines if line in by_name}


def _drawn_split(image_id: ImageId, config: DatasetConfig) -> str:
    """A picture's split hangs on its own id alone, so further pictures move none."""
    share = int.from_bytes(hashlib.blake2b(str(image_id).encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") / 2**64
    if share < config.test_fraction:
        return "test"
    return "val" if share < config.test_fraction + config.val_fraction else "train"


def list_file(folder: Path, name: str, field: str) -> list[str]:
    """Lines of the split's list in `folder`. Raises `InputError` if another split's list there has one of them too."""
    lines = name_lines(list_path(folder, name, field), field)
    for other in (split for split in SPLITS if split != name and len(_lists(folder, split)) == 1):
        if both := set(lines).intersection(name_lines(_lists(folder, other)[0], field)):
            raise InputError(
                f"{folder} ({field}) lists {min(both)} (and {len(both) - 1} more) in {name} and in {other}: take it out of one"
            )
    return lines


def list_path(folder: Path, name: str, field: str) -> Path:
    """The one file *_{name}.txt (or {name}.txt) in `folder`."""
    found = _lists(folder, name)
    if len(found) != 1:
        here = f"has {len(found)} files" if folder.is_dir() else "is no folder with the file"
        raise InputError(f"{folder} ({field}) {here} *_{name}.txt: one list of image names a split is needed")
    return found[0]


def _lists(folder: Path, name: str) -> list[Path]:
    return sorted(p for p in folder.glob("*.txt") if p.stem == name or p.stem.endswith(f"_{name}"))


def name_lines(path: Path, field: str) -> list[str]:
    """Lines of a list of image names, stripped, empty ones left out."""
    if not path.is_file():
        raise missing_file(path, field)
    return [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]
