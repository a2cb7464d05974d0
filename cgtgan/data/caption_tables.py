"""Caption files: the layouts of `annotations.py`, `{id: caption}`, `{id: [captions]}`, and tables with columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cgtgan.data.image_files import PHOTO_SUFFIXES
from cgtgan.data.tables import Table, layout, read_table
from cgtgan.data.user_files import read_user_json
from cgtgan.errors import InputError

# The names of a column of image ids or names, and of one of captions; the first that a table has is meant.
IDS = (
    *("image_id", "img_id", "imageid", "imgid", "image", "img", "image_name", "file_name", "filename", "image_file"),
    *("file", "image_path", "file_path", "filepath", "path", "key", "name", "id"),
)
CAPTIONS = (
    *("caption", "captions", "references", "reference", "comment", "comments", "sentence", "sentences", "text"),
    *("raw", "description", "title"),
)
_NO_IDS = {"annotations", "images", "info", "licenses", "captions", "caption", "image_id", "data"}  # keys of layouts


def read_captions(path: Path, field: str, where: str | None = None) -> Any:
    """The JSON of a caption file, plain or compressed. Tables, and JSON with ids for keys, become COCO's layout.

    Raises `MissingFileError`; `InputError` for a damaged file, or a table without a column of ids and one of captions.
    """
    kind = layout(path, field, where)
    if kind in ("json", "text"):  # text is an error that says what it is
        content = read_user_json(path, field, where)
        return _coco(list(content.items())) if _is_by_id(content) else content
    table = read_table(path, field)
    assert table is not None, "only JSON is no table"
    columns = [_column(table, names) for names in (IDS, CAPTIONS)]
    if None in columns:
        wanted = "one of image_id, file_name, image, id, and one of caption, captions, comment, text"
        raise InputError(f"{path} ({field}) {table.columns_sentence()}: {wanted}, are needed")
    return _coco(list(table.values([column for column in columns if column is not None])))


def _column(table: Table, names: Sequence[str]) -> str | None:
    known = {column.lower().replace(" ", "_"): column for column in reversed(table.columns)}
    return next((known[name] for name in names if name in known), None)


def _is_by_id(content: Any) -> bool:
    """Whether it is `{id: caption}` or `{id: [captions]}`."""
    if not isinstance(content, dict) or not content or not _NO_IDS.isdisjoint(content):
        return False
    return all(
        isinstance(v, str) or (isinstance(v, list) and all(isinstance(t, str) for t in v)) for v in content.values()
    )


def _coco(rows: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """(id, caption or list of captions) of each row in COCO's layout. A file's name is the id without its ending."""
    stems: dict[str, set[str]] = {}
    for name in {image_id for image_id, _ in rows if isinstance(image_id, str)}:
        stems.setdefault(_stem(name), set()).add(name)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for given, captions in rows:
        is_name = isinstance(given, str) and given != _stem(given)
        image_id = (
            _stem(given) if is_name and len(stems[_stem(given)]) == 1 else given
        )  # a.jpg beside a.png keep theirs
        images.append({"id": image_id, **({"file_name": given} if is_name else {})})
        texts = captions if isinstance(captions, list) else [captions]
        annotations += [{"image_id": image_id, "caption": text} for text in texts]
    return {"images": images, "annotations": annotations}


def _stem(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if dot + ending.lower() in PHOTO_SUFFIXES else name
