"""A folder of pictures as a dataset: ids, references, splits; and lists of image names."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import sys
from pathlib import Path

from cgtgan.config import SPLITS, DatasetConfig
from cgtgan.data.annotations import (
    Captions,
    ImageId,
    as_number,
    broken,
    captions_by_image,
    captions_in_file,
    id_order,
    images_in_file,
    is_karpathy,
    missing_file,
    printable,
    read_json,
    text_lines,
)
from cgtgan.errors import InputError, MissingFileError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
_HEIC = frozenset({".heic", ".heif"})
PHOTO_SUFFIXES = IMAGE_SUFFIXES | _HEIC | {".avif"}  # what may be among one's own pictures

# Here, and not where a picture is opened, so that each worker process has it. Pillow itself reads no HEIC.
if importlib.util.find_spec("pillow_heif"):
    importlib.import_module("pillow_heif").register_heif_opener()


def mend(path: Path) -> str:
    """What makes a file of this kind readable that is not, to go behind the reason; or nothing."""
    return (
        "; HEIC needs: pip install pillow-heif"
        if path.suffix.lower() in _HEIC and not importlib.util.find_spec("pillow_heif")
        else ""
    )


def folder_split(config: DatasetConfig, name: str, root: Path) -> tuple[dict[ImageId, Path], Captions]:
    """Pictures of a split and every caption there is; ids are the references' where a picture has some, else its relative path."""
    base = (
        root / config.images if config.images is not None else (root / "images" if (root / "images").is_dir() else root)
    )
    if not base.is_dir():
        raise missing_file(base, "dataset.images")
    files = _pictures(base)
    if not files:
        raise InputError(
            f"{base} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}): set dataset.images to a folder that does"
        )
    captions: Captions = {}
    if config.references is not None:
        path = root / config.references
        content = read_json(path, "dataset.references")
        names: dict[ImageId, str | None] = {}
        for part in SPLITS if is_karpathy(content) else ("all",):
            captions.update(captions_by_image(captions_in_file(content, path, part), path))
            names |= {as_number(i): file_name for i, file_name in images_in_file(content, path, part).items()}
        files = _with_reference_ids(files, {i: names.get(as_number(i)) or str(i) for i in captions}, base, path)
        stray = captions.keys() - files.keys()
        if captions and len(stray) == len(captions):
            raise InputError(
                f"{path} (dataset.references) has captions for {len(captions)} images, such as {next(iter(captions))}, and none of the "
                f"{len(files)} pictures in {base}, such as {next(iter(files))}: its ids, or file_name, must name these pictures"
            )
        if stray:
            first = min(stray, key=id_order)
            log.warning(
                "%s: %d of %d images with captions are not in %s, %s first",
                path,
                len(stray),
                len(captions),
                base,
                first,
            )
    if config.karpathy is not None:
        lines = list_file(root / config.karpathy, name, "dataset.karpathy")
        chosen = _picked(files, base, lines, config)
    else:
        chosen = {i: p for i, p in files.items() if _drawn_split(i, config) == name}
        share = {"train": 1.0, "val": config.val_fraction, "test": config.test_fraction}[name]
        if not chosen and share > 0:
            raise InputError(
                f"none of the {len(files)} pictures in {base} falls in {name}: raise its dataset.*_fraction or name lists"
            )
    return chosen, captions


def find_images(paths: list[str]) -> list[Path]:
    """Picture files named, and those below folders named, in name order; of `-`, those that standard input lists, a path a line.

    Raises `MissingFileError` or `InputError`; what standard input lists and is not there is left to whoever opens it.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if name == "-":
            lines = [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().splitlines() if line.strip()]
            if not lines:
                raise InputError(
                    "images=-: standard input lists no picture; give a path a line, as of `find photos -name '*.jpg'`"
                )
            found += [
                picture
                for line in lines
                for picture in (pictures_below(line, PHOTO_SUFFIXES) if line.is_dir() else [line])
            ]
        elif path.is_dir():
            below = pictures_below(path, PHOTO_SUFFIXES)
            if not below:
                raise InputError(f"images={name}: the folder holds no picture ({', '.join(sorted(PHOTO_SUFFIXES))})")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise MissingFileError(f"images={name} does not exist: name a picture or a folder of pictures")
    return list(dict.fromkeys(found))


def pictures_below(base: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files with such an ending, folder by folder in name order, hidden ones left out. Linked folders are read, each once."""
    paths: list[Path] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        raise broken(Path(error.filename), error) from error

    for folder, folders, names in os.walk(base, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith((".", "__")))
        if real in seen:
            continue
        seen.add(real)
        paths += [
            Path(folder, n) for n in sorted(names) if not n.startswith(".") and Path(n).suffix.lower() in suffixes
        ]
    return paths


def _pictures(base: Path) -> dict[ImageId, Path]:
    """Relative path without ending -> path; pictures that differ in the ending alone keep it."""
    stems: dict[ImageId, list[Path]] = {}
    for path in pictures_below(base, IMAGE_SUFFIXES):
        stems.setdefault(printable(path.relative_to(base).with_suffix("")), []).append(path)
    alone = {stem: found[0] for stem, found in stems.items() if len(found) == 1}
    return alone | {
        printable(path.relative_to(base)): path for found in stems.values() if len(found) > 1 for path in found
    }


def _with_reference_ids(
    files: dict[ImageId, Path], references: dict[ImageId, str], base: Path, path: Path
) -> dict[ImageId, Path]:
    """The same pictures under the ids of the references, which come with the name that each gives its picture (or its id).

    A picture is found by its path below `base`, else by the last part of it, else by the number that ends it; the ending may be left out.
    """
    fitting: dict[ImageId, ImageId] = {}
    names = {
        own: [_ways(printable(f.relative_to(base))), _ways(printable(f.relative_to(base).with_suffix("")))]
        for own, f in files.items()
    }
    for way in range(3):
        free: dict[str | None, list[ImageId]] = {}
        for image_id in references.keys() - set(fitting.values()):
            free.setdefault(_ways(references[image_id])[way], []).append(image_id)
        free.pop(None, None)
        for own in files.keys() - fitting.keys():
            found = {image_id for ways in names[own] for image_id in free.get(ways[way], [])}
            if len(found) == 1:
                fitting[own] = found.pop()
    renamed: dict[ImageId, Path] = {}
    for own, file in files.items():
        image_id = fitting.get(own, own)
        if image_id in renamed:
            raise InputError(f"{path} (dataset.references): image {image_id} fits both {renamed[image_id]} and {file}")
        renamed[image_id] = file
    return renamed


def _ways(name: str) -> tuple[str, str, str | None]:
    """A picture's path, its last part, and the number that ends this."""
    name = name.replace("\\", "/")
    last = name.rsplit("/", 1)[-1]
    stem, dot, ending = last.rpartition(".")
    number = re.search(r"[0-9]+$", stem if dot + ending.lower() in IMAGE_SUFFIXES else last)
    return name, last, number and (number[0].lstrip("0") or "0")


def _picked(files: dict[ImageId, Path], base: Path, lines: list[str], config: DatasetConfig) -> dict[ImageId, Path]:
    exact: dict[str, ImageId] = {}
    loose: dict[str, set[ImageId]] = {}
    for image_id, file in files.items():
        relative = file.relative_to(base)
        exact |= {printable(relative): image_id, str(image_id): image_id}
        for key in (printable(relative.with_suffix("")), file.name):
            loose.setdefault(key, set()).add(image_id)
    found: dict[str, ImageId] = {}
    for line in lines:
        fitting = {exact[line]} if line in exact else loose.get(line, set())
        if len(fitting) > 1:
            one, two = sorted(str(files[i]) for i in fitting)[:2]
            raise InputError(
                f"{line}, listed by dataset.karpathy={config.karpathy}, may be {one} or {two}: list its path below {base}"
            )
        found.update((line, i) for i in fitting)
    absent = [line for line in lines if line not in found]
    if len(absent) > config.max_bad_images:
        raise MissingFileError(
            f"{len(absent)} of {len(lines)} images listed by dataset.karpathy={config.karpathy} are not in {base}, first "
            f"{', '.join(absent[:3])}: set dataset.images to where they are, or allow some with dataset.max_bad_images"
        )
    return {i: files[i] for i in found.values()}


def _drawn_split(image_id: ImageId, config: DatasetConfig) -> str:
    """A picture's split hangs on its own id alone, so further pictures move none."""
    share = (
        int.from_bytes(hashlib.blake2b(str(image_id).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        / 2**64
    )
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
    return [line.strip() for line in text_lines(path, field) if line.strip()]
