"""Which pictures an archive holds (`picture_archives.py` reads them), and their captions where they are asked for."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cgtgan.data.caption_tables import IDS
from cgtgan.data.image_files import IMAGE_SUFFIXES, PHOTO_SUFFIXES
from cgtgan.data.picture_archives import ARCHIVES, FIELD, is_tar, read_columns, row_count, table_schema, tar_index
from cgtgan.data.tables import column_names
from cgtgan.data.user_files import missing_file
from cgtgan.errors import InputError, UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ArchivedPicture(NamedTuple):
    """`name`: what its id is made of. `captions`: those that were asked for."""

    name: str
    path: Path
    captions: list[str]


def archives_of(place: Path, field: str = FIELD) -> list[Path]:
    """What a setting names: an archive, `{00000..00099}.tar`, a pattern with `*`, a Hugging Face data set's folder.

    Empty where it names no archive. Raises `MissingFileError` for a file of a range that is not there, `InputError` for
    a data set with several splits. field: the setting, for these sentences.
    """
    if place.is_dir():
        if (place / "dataset_dict.json").is_file():
            splits = ", ".join(sorted(state.parent.name for state in place.glob("*/state.json")))
            raise InputError(f"{place} ({field}) is a data set with the splits {splits}: name one, as {place}/SPLIT")
        return sorted(place.glob("*.arrow")) if (place / "state.json").is_file() else []
    texts = [str(place)]
    while not place.exists() and (numbers := _RANGE.search(texts[0])):
        digits = [str(n).zfill(len(numbers[1])) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
        texts = [text.replace(numbers[0], number, 1) for text in texts for number in digits]
    paths = [Path(name) for text in texts for name in (sorted(glob.glob(text)) or [text])]  # noqa: PTH207
    archives = [path for path in paths if path.suffix.lower() in ARCHIVES]
    for path in archives:
        if not path.is_file():
            raise missing_file(path, field)
    return archives


def missing_pictures(place: Path) -> str | None:
    """Why there is no folder, list or archive of pictures at `place`, which may be a pattern; None where there is."""
    try:
        is_there = place.exists() or bool(archives_of(place))
    except UserError as error:
        return str(error)
    return None if is_there else str(missing_file(place, FIELD))


def archived_pictures(
    archive: Path, image_column: str | None, caption_column: str | None, skipped: Counter[str]
) -> Iterator[ArchivedPicture]:
    """The pictures of an archive, in its order.

    image_column: of a table; null: the only one with pictures. caption_column: of a table; of a tar file, the ending of
    the members with captions, one per line. skipped: counts what is left out. Raises `InputError`.
    """
    if is_tar(archive):
        return _tar_pictures(archive, caption_column, skipped)
    return _table_pictures(archive, image_column, caption_column)


def _tar_pictures(archive: Path, caption_ending: str | None, skipped: Counter[str]) -> Iterator[ArchivedPicture]:
    """As webdataset has it, a sample's key goes to the first dot of a name: `12.jpg` and `12.txt` belong together."""
    index = tar_index(archive)
    for name in index:
        path = PurePosixPath(name)
        if path.suffix.lower() not in PHOTO_SUFFIXES:
            continue
        if path.name.startswith("."):
            skipped["hidden files"] += 1
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            skipped[f"{path.suffix.lower()} files"] += 1
            continue
        if len(path.suffixes) > 1:
            skipped["further pictures of a sample"] += 1
            continue
        captions: list[str] = []
        if caption_ending is not None and (beside := f"{path.with_suffix('')}.{caption_ending.lstrip('.')}") in index:
            offset, size = index[beside]
            with archive.open("rb") as file:
                file.seek(offset)
                text = file.read(size).decode("utf-8-sig", "replace")
            captions = [line.strip() for line in text.splitlines() if line.strip()]
        yield ArchivedPicture(name, archive / name, captions)


def _table_pictures(archive: Path, image_column: str | None, caption_column: str | None) -> Iterator[ArchivedPicture]:
    schema = table_schema(archive)
    image = _image_column(archive, schema, image_column)
    if caption_column is not None and caption_column not in schema.names:
        columns = column_names(schema.names)
        raise InputError(
            f"{archive} has the columns {columns}: dataset.caption_column={caption_column} is none of them"
        )
    known = {column.lower(): column for column in reversed(schema.names) if _is_name(schema.field(column).type)}
    id_column = next((known[name] for name in IDS if name in known), None)
    file_names = f"{image}.path" if "path" in _fields(schema.field(image).type) else None
    wanted = [column for column in (id_column, file_names, caption_column) if column is not None]
    values = dict(zip(wanted, read_columns(archive, wanted), strict=True)) if wanted else {}
    for row in range(row_count(archive)):
        named = (values[column][row] for column in (id_column, file_names) if column is not None)
        name = next((str(name) for name in named if name not in (None, "")), str(row))
        last = PurePosixPath(name.replace("\\", "/")).name
        captions = values[caption_column][row] if caption_column is not None else None
        texts = [text for text in (captions if isinstance(captions, list) else [captions]) if isinstance(text, str)]
        yield ArchivedPicture(name, archive / image / str(row) / last, texts)


def _image_column(archive: Path, schema: Any, given: str | None) -> str:
    fields = [schema.field(n) for n in range(len(schema.names))]
    fitting = [field.name for field in fields if "bytes" in _fields(field.type) or str(field.type).endswith("binary")]
    if given in fitting or (given is None and len(fitting) == 1):
        return given or fitting[0]
    problem = f"dataset.image_column={given} is none of them" if given else "set dataset.image_column to one of them"
    columns = f"the columns with pictures {', '.join(map(repr, fitting))}" if fitting else "no column with pictures"
    raise InputError(f"{archive} ({FIELD}) has {columns}, of {column_names(schema.names)}: {problem}")


def _is_name(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "int32", "int64")


def _fields(kind: Any) -> list[str]:
    """The names of the fields of pyarrow's type of a column; empty for a type without fields."""
    return [kind.field(n).name for n in range(kind.num_fields)]
