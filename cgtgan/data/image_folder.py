"""A folder of pictures as a data set: ids, references, splits."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from pathlib import Path

from cgtgan.config import DatasetConfig
from cgtgan.data.annotations import CaptionsById, ImageId, captions_and_names, id_order, split_list
from cgtgan.data.caption_tables import read_captions
from cgtgan.data.image_files import IMAGE_SUFFIXES, pictures_below
from cgtgan.data.image_names import match_names, plain_name
from cgtgan.data.user_files import missing_file, printable
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
        stem = unicodedata.normalize("NFC", printable(path.relative_to(base).with_suffix("")))  # a Mac's names are NFD
        by_stem.setdefault(stem, []).append(path)
    alone = {stem: paths[0] for stem, paths in by_stem.items() if len(paths) == 1}
    alike = [path for paths in by_stem.values() if len(paths) > 1 for path in paths]
    return alone | {printable(path.relative_to(base)): path for path in alike}


def _with_references(files: dict[ImageId, Path], base: Path, path: Path) -> tuple[dict[ImageId, Path], CaptionsById]:
    """The pictures under the ids of the reference file at `path`, and its captions."""
    captions, names = captions_and_names(read_captions(path, "dataset.references"), path)
    files = _under_reference_ids(files, {i: names.get(i) or str(i) for i in captions}, base, path)
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
    """The same pictures under the ids of the references, each of which comes with its picture's name (or its id)."""
    relative = {i: file.relative_to(base) for i, file in files.items()}
    names = {i: (printable(below), printable(below.with_suffix(""))) for i, below in relative.items()}
    reference_of = match_names(names, reference_names)
    renamed: dict[ImageId, Path] = {}
    for image_id, file in files.items():
        new_id = reference_of.get(image_id, image_id)
        if new_id in renamed:
            raise InputError(f"{path} (dataset.references): image {new_id} fits both {renamed[new_id]} and {file}")
        renamed[new_id] = file
    return renamed


def _listed(files: dict[ImageId, Path], base: Path, lines: list[str], config: DatasetConfig) -> dict[ImageId, Path]:
    """The pictures that the lines of a split list name."""
    exact: dict[str, ImageId] = {}
    loose: dict[str, set[ImageId]] = {}
    for image_id, file in files.items():
        relative = file.relative_to(base)
        exact |= {printable(relative): image_id, str(image_id): image_id}
        for key in (printable(relative), printable(relative.with_suffix("")), file.name):
            loose.setdefault(plain_name(key), set()).add(image_id)
    lists = f"listed by dataset.karpathy={config.karpathy}"
    chosen: dict[str, ImageId] = {}
    for line in lines:
        fitting = {exact[line]} if line in exact else loose.get(plain_name(line), set())
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
