"""Pictures in tar files (webdataset's shards), Parquet tables and Hugging Face data sets on disk, without unpacking.

Such a picture has a path as others have: `00000.tar/000000012.jpg` is a member of a tar file, and
`train.parquet/image/17/dog.jpg` is row 17 of the column `image` of a table. Archives are opened for one reading or
mapped into memory, so that processes share no place in a file.
"""

from __future__ import annotations

import tarfile
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from cgtgan.data.tables import needed, parquet_file
from cgtgan.data.user_files import broken_file
from cgtgan.errors import InputError

ARCHIVES = (".tar", ".parquet", ".arrow")
FIELD = "dataset.images"


def picture_content(path: Path) -> bytes | None:
    """The bytes of a picture in an archive; None where the path lies in none.

    Raises `FileNotFoundError` where the archive has no such picture, `InputError` for a damaged archive.
    """
    archive = _archive_of(path.parent)
    if archive is None:
        return None
    member = path.relative_to(archive)
    if is_tar(archive):
        if member.as_posix() not in (index := tar_index(archive)):
            raise FileNotFoundError(path)
        offset, size = index[member.as_posix()]
        with archive.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    column, row, *_ = member.parts
    cell = _cell(archive, column, int(row))
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is None and isinstance(cell, dict) and cell.get("path"):
        return Path(cell["path"]).read_bytes()
    if content is None:
        raise FileNotFoundError(path)
    return content


def picture_bytes(path: Path) -> bytes:
    """What a picture's file holds, in an archive or by itself. Raises `OSError`, or `InputError` as above."""
    content = picture_content(path)
    return path.read_bytes() if content is None else content


def picture_state(path: Path) -> list[int] | None:
    """[size, time of the last change], by which a changed picture is known; None where it is not there.

    The size is the picture's own, for a row of a table that of the table. The time is that of the file.
    """
    archive = _archive_of(path.parent)
    try:
        stat = (archive or path).stat()
        if archive is None or not is_tar(archive):
            return [stat.st_size, stat.st_mtime_ns]
        return [tar_index(archive)[path.relative_to(archive).as_posix()][1], stat.st_mtime_ns]
    except (OSError, KeyError):
        return None


def is_tar(archive: Path) -> bool:
    return archive.suffix.lower() == ".tar"


def is_parquet(archive: Path) -> bool:
    return archive.suffix.lower() == ".parquet"


def tar_index(archive: Path) -> dict[str, tuple[int, int]]:
    """Name -> (place, size) of the files in it; a name that leads out of it is left out. Raises `InputError`."""
    return _tar_index(archive, *_version(archive))


def read_columns(archive: Path, columns: list[str]) -> list[list[Any]]:
    """The values of each of these columns of a table; `image.path` is a field of a column. Raises `InputError`."""
    table, names = _table(archive), table_schema(archive).names
    parts = [[column] if column in names else column.split(".") for column in columns]
    if is_parquet(archive):
        table = table.read(columns=columns, use_threads=False)
    values: list[list[Any]] = []
    for name, *field in parts:
        column = table.column(name)
        column = needed("pyarrow.compute", "tables", "").struct_field(column, field) if field else column
        values.append(column.to_pylist())
    return values


def row_count(archive: Path) -> int:
    """Of a table."""
    return _table(archive).metadata.num_rows if is_parquet(archive) else _table(archive).num_rows


def table_schema(archive: Path) -> Any:
    """pyarrow's schema of a table. Raises `InputError`."""
    return _table(archive).schema_arrow if is_parquet(archive) else _table(archive).schema


@lru_cache(maxsize=1024)
def _archive_of(folder: Path) -> Path | None:
    places = (folder, *folder.parents)
    return next((place for place in places if place.suffix.lower() in ARCHIVES and place.is_file()), None)


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=8)
def _tar_index(archive: Path, _size: int, _time: int) -> dict[str, tuple[int, int]]:
    index: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isfile() and not member.issparse() and not name.is_absolute() and ".." not in name.parts:
                    index[name.as_posix()] = member.offset_data, member.size
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        problem = f"cannot be read as a tar file ({error}): it is compressed, damaged or cut off"
        raise InputError(f"{archive} ({FIELD}) {problem}; unpack it, or download it again") from error
    return index


def _table(archive: Path) -> Any:
    """pyarrow's `ParquetFile`, or the `Table` of an Arrow stream, which is mapped into memory."""
    return (_parquet if is_parquet(archive) else _stream)(archive, *_version(archive))


@lru_cache(maxsize=16)
def _parquet(archive: Path, _size: int, _time: int) -> Any:
    return parquet_file(archive, FIELD, memory_map=True)


@lru_cache(maxsize=64)
def _stream(archive: Path, _size: int, _time: int) -> Any:
    arrow = needed("pyarrow", "tables", f"{archive} ({FIELD}) is a Hugging Face data set")
    try:
        return arrow.ipc.open_stream(arrow.memory_map(str(archive))).read_all()
    except (arrow.ArrowException, OSError) as error:
        raise broken_file(archive, error) from error


@lru_cache(maxsize=16)
def _group_starts(archive: Path, _size: int, _time: int) -> list[int]:
    metadata = _table(archive).metadata
    return [0, *accumulate(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))]


@lru_cache(maxsize=2)  # the rows are asked for in order
def _row_group(archive: Path, column: str, group: int, _size: int, _time: int) -> Any:
    return _table(archive).read_row_group(group, columns=[column], use_threads=False).column(0)


def _cell(archive: Path, column: str, row: int) -> Any:
    try:
        if not is_parquet(archive):
            return _table(archive).column(column)[row].as_py()
        version = _version(archive)
        starts = _group_starts(archive, *version)
        group = bisect_right(starts, row) - 1
        return _row_group(archive, column, group, *version)[row - starts[group]].as_py()
    except (IndexError, KeyError) as error:
        raise FileNotFoundError(archive / column / str(row)) from error
    except (needed("pyarrow", "tables", "").ArrowException, OSError) as error:
        raise broken_file(archive, error) from error
