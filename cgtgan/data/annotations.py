"""Caption files of the three known layouts, read with errors that say what is wrong and where.

paper:     [{"image_id": 1 or "1", "caption": "..."}, ...]
COCO:      {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy:  {"images": [{"split", "filename", "cocoid"?, "sentences": [{"raw"}]}]}, 'restval' counts as train
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from cgtgan.errors import InputError, MissingFileError

ImageId: TypeAlias = int | str
Captions: TypeAlias = dict[ImageId, list[str]]

LONGEST_LINE = 1_000_000  # characters: no sentence and no file name is as long
_ARCHIVES = (b"PK\x03\x04", b"BZh91AY&SY", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")
_PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<!--", b"<?xml")
_BAD_BYTES = re.compile("[\udc80-\udcff]+")

_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
# Where annotations and corpora are to be had ...
WHERE = {
    "coco": f"https://biglmdiag.blob.core.windows.net/oscar/datasets/coco_caption.zip (or dataset_coco.json of {_KARPATHY}, "
    "or captions_{train,val}2014.json of http://images.cocodataset.org/annotations/annotations_trainval2014.zip with dataset.karpathy)",
    "flickr30k": f"{_KARPATHY} (its dataset_flickr30k.json, put into the same folder, takes this one's place)",
    "gcc": "https://ai.google.com/research/ConceptualCaptions/download (Train_GCC-training.tsv)",
    "shutterstock": "https://github.com/fengyang0317/unsupervised_captioning/issues/42 (sentences.pkl)",
    "demo": "the preprocess stage, which draws the demo world",
}
# ... and images.
WHERE_IMAGES = {
    "coco": "http://images.cocodataset.org/zips/train2014.zip and val2014.zip",
    "flickr30k": "https://shannon.cs.illinois.edu/DenotationGraph (on request) or kaggle.com/datasets/hsankesara/flickr-image-dataset",
    "demo": WHERE["demo"],
}


def printable(path: Path) -> str:
    """With `/`; bytes of a file's name that are not UTF-8 as \\x.., for ids and messages go into files that are UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def missing_file(path: Path, field: str, where: str | None = None) -> MissingFileError:
    """The error for a file or folder that is not there: which, where to get it, which config field moves it."""
    if field.startswith("dataset."):
        field += " (or dataset.root)"
    for above in (path, *path.parents):
        if above.is_file():
            return MissingFileError(
                f"{path} cannot be there: {above} is a file and a folder is needed; unpack it, or set {field}"
            )
    if path.is_dir():
        return MissingFileError(f"{path} is a folder and a file is needed: set {field} to the file")
    if path.is_symlink():
        return MissingFileError(
            f"{path} is a link to {path.readlink()}, which does not exist: mend it, or set {field} to where it is"
        )
    get = f"get it from {where}, or " if where else ""
    return MissingFileError(f"{path} does not exist: {get}set {field} to where it is")


def open_bytes(path: Path, field: str, where: str | None = None) -> BinaryIO:
    """Open a plain or gzip file (told by its first bytes, not its name). Web pages, archives and UTF-16 are an `InputError`."""
    if not path.is_file():
        raise missing_file(path, field, where)
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        stream = cast(BinaryIO, gzip.open(path, "rb")) if zipped else path.open("rb")  # noqa: SIM115 (the caller closes it)
        head = stream.read(256)
        stream.seek(0)
    except (OSError, EOFError, zlib.error) as error:
        raise broken(path, error) from error
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    problem = None
    if not head:
        problem = "is empty: download or make it again"
    elif start.startswith(_PAGES):
        problem = "holds a web page, not the data: the download was answered with a page"
    elif head.startswith(_ARCHIVES):
        problem = "is an archive: unpack it and name the file inside"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        problem = "is UTF-16 text: save it as UTF-8"
    elif path.name.endswith(".gz") and not zipped:
        problem = "ends in .gz but is not a gzip file: download it again, or drop the ending if it is plain text"
    if problem:
        stream.close()
        raise InputError(f"{path} ({field}) {problem}")
    return stream


def broken(path: Path, error: Exception) -> InputError:
    """The error for a file that stops before its end, or that the system does not let us read."""
    if isinstance(error, OSError) and error.errno:
        return InputError(f"{path} cannot be read ({error.strerror}): mend its permissions, or the disk it is on")
    problem = str(error) or type(error).__name__
    return InputError(f"{path} cannot be read to its end ({problem}): it is damaged or cut off, download it again")


def read_json(path: Path, field: str, where: str | None = None) -> Any:
    """The content of a .json or .json.gz file; `InputError` if it is cut off or no JSON, `MissingFileError` if it is not there."""
    with open_bytes(path, field, where) as stream:
        try:
            return json.loads(stream.read().decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            at = f"line {error.lineno}, column {error.colno}: {error.msg}"
            raise InputError(
                f"{path} ({field}) is not whole JSON ({at}): it is damaged or cut off, download it again"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} ({field}) is not UTF-8 text at byte {error.start}: {error.reason}") from error
        except RecursionError as error:
            raise InputError(f"{path} ({field}) is JSON nested too deeply to be a caption file") from error
        except ValueError as error:  # Python's own limit on the digits of a number
            raise InputError(
                f"{path} ({field}) has a number of thousands of digits: it is damaged, download it again"
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise broken(path, error) from error


def text_lines(path: Path, field: str, notes: Counter[str] | None = None) -> Iterator[str]:
    """Lines of a UTF-8 text file, plain or gzip, without their ends: LF, CR LF or CR, whatever else Python takes for one.

    notes: counts `bad_bytes`, lines with bytes that are not UTF-8, which become U+FFFD.
    Raises `MissingFileError` or `InputError` where the reading begins, `InputError` where it reaches what is no text.
    """
    with io.TextIOWrapper(open_bytes(path, field), "utf-8-sig", "surrogateescape") as stream:
        try:
            for n, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), ""), 1):
                if len(line) == LONGEST_LINE or (n <= 100 and "\0" in line):
                    wrong = "has zero bytes" if "\0" in line else f"has {LONGEST_LINE:,} characters or more"
                    raise InputError(
                        f"{path} ({field}) is no text: line {n} {wrong}; one sentence or name a line, in UTF-8, is needed"
                    )
                if not line.isascii() and _BAD_BYTES.search(line):
                    line = _BAD_BYTES.sub("\ufffd", line)
                    if notes is not None:
                        notes["bad_bytes"] += 1
                yield line.removesuffix("\n")
        except (OSError, EOFError, zlib.error) as error:
            raise broken(path, error) from error


def is_karpathy(content: Any) -> bool:
    """Whether the JSON has Karpathy's layout."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def captions_in_file(content: Any, path: Path, split: str) -> list[tuple[ImageId, Any]]:
    """(image id, caption) in the file's order; of Karpathy's file only `split`. A caption is returned as it is, even if no string.

    Raises `InputError` naming the entry whose keys are wrong.
    """
    if is_karpathy(content):
        rows = []
        for where, image in _karpathy_images(content, path, split):
            image_id, sentences = _karpathy_id(image, where), image.get("sentences")
            if not isinstance(sentences, list) or not all(isinstance(s, dict) and "raw" in s for s in sentences):
                raise InputError(f"{where}: 'sentences' must be a list of objects with 'raw'")
            rows += [(image_id, s["raw"]) for s in sentences]
    else:
        key, entries = ("annotations", content.get("annotations")) if isinstance(content, dict) else ("", content)
        if not isinstance(entries, list):
            found = f"the keys {sorted(content)[:6]}" if isinstance(content, dict) else f"a {type(content).__name__}"
            raise InputError(f"{path} holds {found}: a list of image_id/caption, a COCO or a Karpathy file is accepted")
        rows = []
        for n, entry in enumerate(entries):
            if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
                found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
                raise InputError(f"{path}, entry {key}[{n}]: 'image_id' and 'caption' are needed, found {found}")
            rows.append((_checked_id(entry["image_id"], f"{path}, entry {key}[{n}]"), entry["caption"]))
    unified = unify_ids(image_id for image_id, _ in rows)
    return [(unified[image_id], caption) for image_id, caption in rows]


def captions_by_image(rows: Iterable[tuple[ImageId, object]], path: Path) -> Captions:
    """Group by image, in order; `InputError` for a caption that is no string."""
    captions: Captions = {}
    for image_id, caption in rows:
        if not isinstance(caption, str):
            raise InputError(f"{path}: a caption of image {image_id} is {caption!r}, it must be a string")
        captions.setdefault(image_id, []).append(caption)
    return captions


def images_in_file(content: Any, path: Path, split: str) -> dict[ImageId, str | None]:
    """id -> file name (None where the file gives none) of the images of `split`, captions left alone."""
    if is_karpathy(content):
        listed = {
            _karpathy_id(image, where): image["filename"] for where, image in _karpathy_images(content, path, split)
        }
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        listed = {}
        for n, image in enumerate(content["images"]):
            if not isinstance(image, dict) or "id" not in image:
                raise InputError(f"{path}, entry images[{n}]: an object with 'id' is needed")
            name = image.get("file_name")
            listed[_checked_id(image["id"], f"{path}, entry images[{n}]")] = name if isinstance(name, str) else None
    else:
        listed = {image_id: None for image_id, _ in captions_in_file(content, path, split)}
    unified = unify_ids(listed)
    return {unified[image_id]: name for image_id, name in listed.items()}


def unify_ids(ids: Iterable[ImageId]) -> dict[ImageId, ImageId]:
    """Map every id to itself, or to its integer if all of them are integers or digits."""
    distinct = set(ids)
    numbers = {i: as_number(i) for i in distinct}
    return numbers if all(isinstance(i, int) for i in numbers.values()) else {i: i for i in distinct}


def as_number(image_id: ImageId) -> ImageId:
    """A name of ASCII digits as its integer, anything else as it is; more than 18 digits are a hash, which is a name."""
    if isinstance(image_id, str) and len(image_id) <= 18 and image_id.isascii() and image_id.isdigit():
        return int(image_id)
    return image_id


def id_order(image_id: ImageId) -> tuple[bool, ImageId]:
    """Sort key: integers first, then names."""
    return isinstance(image_id, str), image_id


def _checked_id(value: Any, where: str) -> ImageId:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise InputError(f"{where}: the image id {value!r} must be an integer or a name")
    return value


def _karpathy_images(content: dict[str, Any], path: Path, split: str) -> list[tuple[str, dict[str, Any]]]:
    images, found_in = [], {}
    for n, image in enumerate(content["images"]):
        where = f"{path}, entry images[{n}]"
        if not isinstance(image, dict) or not all(isinstance(image.get(key), str) for key in ("filename", "split")):
            raise InputError(
                f"{where}: 'filename', 'split' and 'sentences' are needed, as in Karpathy's dataset_*.json"
            )
        part = "train" if image["split"] == "restval" else image["split"]
        if part != (other := found_in.setdefault(image["filename"], part)):
            raise InputError(f"{where}: {image['filename']} is in {part} and in {other}: take it out of one")
        if part == split:
            images.append((where, image))
    return images


def _karpathy_id(image: dict[str, Any], where: str) -> ImageId:
    """COCO's own id where there is one; else the file's name without its ending, by which Flickr30k is known."""
    return _checked_id(image["cocoid"] if "cocoid" in image else Path(image["filename"]).stem, where)
