"""Caption files of the three known layouts, read with errors that say what is wrong and where.

paper:     [{"image_id": 1 or "1", "caption": "..."}, ...]
COCO:      {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy:  {"images": [{"split", "filename", "cocoid"?, "sentences": [{"raw"}]}]}, 'restval' counts as train
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from cgtgan.errors import InputError, MissingFileError

ImageId: TypeAlias = int | str
Captions: TypeAlias = dict[ImageId, list[str]]

_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
# Where annotations and corpora are to be had ...
WHERE = {
    "coco": f"https://biglmdiag.blob.core.windows.net/oscar/datasets/coco_caption.zip (or dataset_coco.json of {_KARPATHY}, "
    "or captions_{train,val}2014.json of https://cocodataset.org with dataset.karpathy)",
    "flickr30k": f"dataset_flickr30k.json of {_KARPATHY}",
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


def missing_file(path: Path, field: str, where: str | None = None) -> MissingFileError:
    """The error for a file or folder that is not there: which, where to get it, which config field moves it."""
    for above in (path, *path.parents):
        if above.is_file():
            return MissingFileError(f"{path} cannot be there: {above} is a file and a folder is needed; unpack it, or set {field}")
    if path.is_dir():
        return MissingFileError(f"{path} is a folder and a file is needed: set {field} to the file")
    get = f"get it from {where}, or " if where else ""
    return MissingFileError(f"{path} does not exist: {get}set {field} to where it is")


def open_bytes(path: Path, field: str, where: str | None = None) -> BinaryIO:
    """Open a plain or gzip file (told by its first bytes, not its name). Web pages, zip archives and UTF-16 are an `InputError`."""
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
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        problem = "holds a web page, not the data: the download was answered with a page"
    elif head.startswith(b"PK\x03\x04"):
        problem = "is a zip archive: unpack it and name the file inside"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        problem = "is UTF-16 text: save it as UTF-8"
    elif path.name.endswith(".gz") and not zipped:
        problem = "ends in .gz but is not a gzip file: download it again, or drop the ending if it is plain text"
    if problem:
        stream.close()
        raise InputError(f"{path} ({field}) {problem}")
    return stream


def broken(path: Path, error: Exception) -> InputError:
    """The error for a file that stops before its end."""
    problem = str(error) or type(error).__name__
    return InputError(f"{path} cannot be read to its end ({problem}): it is damaged or cut off, download it again")


def read_json(path: Path, field: str, where: str | None = None) -> Any:
    """The content of a .json or .json.gz file; `InputError` if it is cut off or no JSON, `MissingFileError` if it is not there."""
    with open_bytes(path, field, where) as stream:
        try:
            return json.loads(stream.read().decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            at = f"line {error.lineno}, column {error.colno}: {error.msg}"
            raise InputError(f"{path} ({field}) is not whole JSON ({at}): it is damaged or cut off, download it again") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} ({field}) is not UTF-8 text at byte {error.start}: {error.reason}") from error
        except RecursionError as error:
            raise InputError(f"{path} ({field}) is JSON nested too deeply to be a caption file") from error
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
        listed = {_karpathy_id(image, where): image["filename"] for where, image in _karpathy_images(content, path, split)}
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
    """Map every id to itself, or to its integer if all of them are integers or strings of ASCII digits."""
    distinct = set(ids)
    if all(isinstance(i, int) or (i.isascii() and i.isdigit()) for i in distinct):
        return {i: int(i) for i in distinct}
    return {i: i for i in distinct}


def id_order(image_id: ImageId) -> tuple[bool, ImageId]:
    """Sort key: integers first, then names."""
    return isinstance(image_id, str), image_id


def _checked_id(value: Any, where: str) -> ImageId:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise InputError(f"{where}: the image id {value!r} must be an integer or a name")
    return value


def _karpathy_images(content: dict[str, Any], path: Path, split: str) -> list[tuple[str, dict[str, Any]]]:
    wanted = ("train", "restval") if split == "train" else (split,)
    images = []
    for n, image in enumerate(content["images"]):
        where = f"{path}, entry images[{n}]"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str) or "split" not in image:
            raise InputError(f"{where}: 'filename', 'split' and 'sentences' are needed, as in Karpathy's dataset_*.json")
        if image["split"] in wanted:
            images.append((where, image))
    return images


def _karpathy_id(image: dict[str, Any], where: str) -> ImageId:
    """COCO's own id where there is one; else the file's name without its ending, by which Flickr30k is known."""
    return _checked_id(image["cocoid"] if "cocoid" in image else Path(image["filename"]).stem, where)
