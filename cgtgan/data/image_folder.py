"""Pictures of one's own as a data set, in a folder, a list or archives: ids, references, splits."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cgtgan.config import DatasetConfig
from cgtgan.data.annotations import CaptionsById, ImageId, captions_and_names, id_order, name_lines, split_list
from cgtgan.data.archive_listing import archived_pictures, archives_of
from cgtgan.data.caption_tables import read_captions
from cgtgan.data.image_files import IMAGE_SUFFIXES, PHOTO_SUFFIXES, count_skipped, pictures_below
from cgtgan.data.image_names import match_names, plain_name
from cgtgan.data.user_files import missing_file, printable
from cgtgan.errors import InputError, MissingFileError

log = logging.getLogger(__name__)


def folder_split(
    config: DatasetConfig, name: str, root: Path, *, captions_wanted: bool
) -> tuple[dict[ImageId, Path], CaptionsById]:
    """Pictures of a split, and all captions.

    An id is the references' where a picture has some, else its relative path.

    So the references are read even where no captions are wanted.
    """
    usual = root / "images"
    place = root / config.images if config.images is not None else usual if usual.is_dir() else root
    base, files, captions = _gathered(config, place)
    if not files:
        endings = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{place} holds no picture ({endings}): set dataset.images to a folder that does")
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


class _Pictures(NamedTuple):
    """All pictures by id, the captions that lie in archives with them, and the folder that they lie below."""

    base: Path
    files: dict[ImageId, Path]
    captions: CaptionsById


def _gathered(config: DatasetConfig, place: Path) -> _Pictures:
    if archives := archives_of(place):
        skipped: Counter[str] = Counter()
        columns = config.image_column, config.caption_column
        listed = [picture for archive in archives for picture in archived_pictures(archive, *columns, skipped)]
        count_skipped(place, skipped)
        base = Path(os.path.commonpath([archive.parent for archive in archives]))
        files = _by_id(((Path(picture.name), picture.path) for picture in listed), base)
        captions = {picture.path: picture.captions for picture in listed if picture.captions}
        if config.caption_column is not None and not captions:
            raise InputError(f"{place}: dataset.caption_column={config.caption_column} has no caption of any picture")
        return _Pictures(base, files, {i: captions[path] for i, path in files.items() if path in captions})
    if config.caption_column is not None or config.image_column is not None:
        raise InputError(f"{place} is no archive: dataset.caption_column and image_column are for tar files and tables")
    if config.images is not None and place.is_file():
        named = ((_below(path, place.parent), path) for path in _paths_in_list(config, place))
        return _Pictures(place.parent, _by_id(named, place.parent), {})
    if not place.is_dir():
        raise missing_file(place, "dataset.images")
    paths = pictures_below(place, IMAGE_SUFFIXES)
    return _Pictures(place, _by_id(((path.relative_to(place), path) for path in paths), place), {})


def _paths_in_list(config: DatasetConfig, place: Path) -> list[Path]:
    """The pictures of a text file with a path per line, relative ones below the file's folder."""
    paths = [place.parent / Path(line).expanduser() for line in dict.fromkeys(name_lines(place, "dataset.images"))]
    absent = [path for path in paths if not path.is_file()]
    if len(absent) > config.max_bad_images:
        raise MissingFileError(
            f"{len(absent)} of {len(paths)} images listed in {place} (dataset.images) do not exist, first {absent[0]}: "
            "correct the list, or allow some with dataset.max_bad_images"
        )
    count_skipped(place, Counter({"listed images that do not exist": len(absent)}))
    return [path for path in paths if path not in set(absent)]


def _by_id(named: Iterable[tuple[Path, Path]], base: Path) -> dict[ImageId, Path]:
    """Name without its ending -> path; pictures that differ in the ending alone go by their path below `base`."""
    by_stem: dict[ImageId, list[Path]] = {}
    for name, path in named:
        stem = printable(name.with_suffix("") if name.suffix.lower() in PHOTO_SUFFIXES else name)
        by_stem.setdefault(unicodedata.normalize("NFC", stem), []).append(path)  # a Mac's names are NFD
    alone = {stem: paths[0] for stem, paths in by_stem.items() if len(paths) == 1}
    alike = [path for paths in by_stem.values() if len(paths) > 1 for path in paths]
    return alone | {printable(_below(path, base)): path for path in alike}


def _below(path: Path, base: Path) -> Path:
    """Relative to `base` where it lies below it."""
    return path.relative_to(base) if path.is_relative_to(base) else path


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
    relative = {i: _below(file, base) for i, file in files.items()}
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
        relative = _below(file, base)
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
