"""A folder of pictures as a data set: ids, references, splits."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from cgtgan.config import SPLITS, DatasetConfig
from cgtgan.data.annotations import (
    CaptionsById,
    ImageId,
    as_number,
    captions_by_image,
    captions_in_file,
    id_order,
    images_in_file,
    is_karpathy,
    split_list,
)
from cgtgan.data.image_files import IMAGE_SUFFIXES, pictures_below
from cgtgan.data.user_files import missing_file, printable, read_user_json
from cgtgan.errors import InputError, MissingFileError

log = logging.getLogger(__name__)


def folder_split(
    config: DatasetConfig, name: str, root: Path, *, captions_wanted: bool
) -> tuple[dict[ImageId, Path], CaptionsById]:
    """Pictures of a split, and all captions. An id is the references' where a picture has some, else its relative path.

    So the references are read even where no captions are wanted.
    """
    usual = root / "images"
    base = root / config.images if config.images is not None else usual if usual.is_dir() else root
    if not base.is_dir():
        raise missing_file(base, "dataset.images")
    files = _pictures(base)
    if not files:
        endings = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{base} holds no picture ({endings}): set dataset.images to a folder that does")
    captions: CaptionsById = {}
    if config.references is not None:
        files, captions = _with_references(files, base, root / config.references)
    if config.karpathy is not None:
        lines = split_list(root / config.karpathy, name, "dataset.karpathy")
        return _listed(files, base, lines, config), captions
    chosen = {i: p for i, p in files.items() if _drawn_split(i, config) == name}
    share = {"train": 1.0, "val": config.val_fraction, "test": config.test_fraction}[name]
    if not chosen and share > 0:
        none = f"none of the {len(files)} pictures in {base} falls in {name}"
        raise InputError(f"{none}: raise its dataset.*_fraction or name lists")
    return chosen, captions


def _pictures(base: Path) -> dict[ImageId, Path]:
    """Relative path without ending -> path; pictures that differ in the ending alone keep it."""
    by_stem: dict[ImageId, list[Path]] = {}
    for path in pictures_below(base, IMAGE_SUFFIXES):
        by_stem.setdefault(printable(path.relative_to(base).with_suffix("")), []).append(path)
    alone = {stem: paths[0] for stem, paths in by_stem.items() if len(paths) == 1}
    alike = [path for paths in by_stem.values() if len(paths) > 1 for path in paths]
    return alone | {printable(path.relative_to(base)): path for path in alike}


def _with_references(files: dict[ImageId, Path], base: Path, path: Path) -> tuple[dict[ImageId, Path], CaptionsById]:
    """The pictures under the ids of the reference file at `path`, and its captions."""
    content = read_user_json(path, "dataset.references")
    captions: CaptionsById = {}
    names: dict[ImageId, str | None] = {}
    for split in SPLITS if is_karpathy(content) else ("all",):
        captions.update(captions_by_image(captions_in_file(content, path, split), path))
        names |= {as_number(i): file_name for i, file_name in images_in_file(content, path, split).items()}
    files = _under_reference_ids(files, {i: names.get(as_number(i)) or str(i) for i in captions}, base, path)
    stray = captions.keys() - files.keys()
    if captions and len(stray) == len(captions):
        raise InputError(
            f"{path} (dataset.references) has captions for {len(captions)} images, such as {next(iter(captions))}, and "
            f"none of the {len(files)} pictures in {base}, such as {next(iter(files))}: its ids, or file_name, must "
            "name these pictures"
        )
    if stray:
        message = "%s: %d of %d images with captions are not in %s, %s first"
        log.warning(message, path, len(stray), len(captions), base, min(stray, key=id_order))
    return files, captions


def _under_reference_ids(
    files: dict[ImageId, Path], reference_names: dict[ImageId, str], base: Path, path: Path
) -> dict[ImageId, Path]:
    """The same pictures under the ids of the references, each of which comes with its picture's name (or its id).

    A picture is recognised by its path below `base`, else by the last part of it, else by the number that ends it; the
    ending may be left out.
    """
    reference_of: dict[ImageId, ImageId] = {}
    keys_of = {
        i: [_name_keys(printable(f.relative_to(base))), _name_keys(printable(f.relative_to(base).with_suffix("")))]
        for i, f in files.items()
    }
    for way in range(3):
        free: dict[str | None, list[ImageId]] = {}
        for reference_id in reference_names.keys() - set(reference_of.values()):
            free.setdefault(_name_keys(reference_names[reference_id])[way], []).append(reference_id)
        free.pop(None, None)
        for image_id in files.keys() - reference_of.keys():
            fitting = {reference_id for keys in keys_of[image_id] for reference_id in free.get(keys[way], [])}
            if len(fitting) == 1:
                reference_of[image_id] = fitting.pop()
    renamed: dict[ImageId, Path] = {}
    for image_id, file in files.items():
        new_id = reference_of.get(image_id, image_id)
        if new_id in renamed:
            raise InputError(f"{path} (dataset.references): image {new_id} fits both {renamed[new_id]} and {file}")
        renamed[new_id] = file
    return renamed


def _name_keys(name: str) -> tuple[str, str, str | None]:
    """A picture's path, its last part, and the number that ends this."""
    name = name.replace("\\", "/")
    last = name.rsplit("/", 1)[-1]
    stem, dot, ending = last.rpartition(".")
    number = re.search(r"[0-9]+$", stem if dot + ending.lower() in IMAGE_SUFFIXES else last)
    return name, last, number and (number[0].lstrip("0") or "0")


def _listed(files: dict[ImageId, Path], base: Path, lines: list[str], config: DatasetConfig) -> dict[ImageId, Path]:
    """The pictures that the lines of a split list name."""
    exact: dict[str, ImageId] = {}
    loose: dict[str, set[ImageId]] = {}
    for image_id, file in files.items():
        relative = file.relative_to(base)
        exact |= {printable(relative): image_id, str(image_id): image_id}
        for key in (printable(relative.with_suffix("")), file.name):
            loose.setdefault(key, set()).add(image_id)
    lists = f"listed by dataset.karpathy={config.karpathy}"
    chosen: dict[str, ImageId] = {}
    for line in lines:
        fitting = {exact[line]} if line in exact else loose.get(line, set())
        if len(fitting) > 1:
            one, two = sorted(str(files[i]) for i in fitting)[:2]
            raise InputError(f"{line}, {lists}, may be {one} or {two}: list its path below {base}")
        chosen.update((line, i) for i in fitting)
    absent = [line for line in lines if line not in chosen]
    if len(absent) > config.max_bad_images:
        raise MissingFileError(
            f"{len(absent)} of {len(lines)} images {lists} are not in {base}, first {', '.join(absent[:3])}: set "
            "dataset.images to where they are, or allow some with dataset.max_bad_images"
        )
    return {i: files[i] for i in chosen.values()}


def _drawn_split(image_id: ImageId, config: DatasetConfig) -> str:
    """A picture's split depends on its own id alone, so further pictures move none."""
    digest = hashlib.blake2b(str(image_id).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < config.test_fraction:
        return "test"
    return "val" if share < config.test_fraction + config.val_fraction else "train"
