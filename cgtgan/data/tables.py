"""Tables in a user's files: CSV and TSV, JSON Lines, JSON lists, Parquet. Rows are read one after another.

CSV with `,` or `;` is read as the standard has it, with quotes around what holds the delimiter or a new line. With tabs
or `|` one line is one row.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from cgtgan.data.other_layouts import DELIMITERS, LOOKED_AT, is_json, is_json_lines, table_columns
from cgtgan.data.user_files import (
    LONGEST_LINE,
    PACKED_ENDINGS,
    START,
    broken_file,
    first_bytes,
    open_bytes,
    quoted,
    read_user_json,
    text_lines,
)
from cgtgan.errors import InputError

UNEVEN = "uneven_row"  # a row with more or fewer cells than the first one: it is counted and left out
TEXT = "text"  # the column of rows that are a string alone
_TABLES = (".csv", ".tsv")
_LINES = (".jsonl", ".ndjson")

Values = Callable[[Sequence[str]], Iterator[tuple[Any, ...]]]


@dataclass(frozen=True)
class Table:
    """`kind` in words; `values(columns)` reads the rows, the values of these columns of each (None: it has no such).

    plain: the rows are strings, under the column `TEXT`.
    """

    kind: str
    columns: Sequence[str]
    values: Values
    plain: bool = False

    def columns_sentence(self) -> str:
        """`is a table with the columns 'a', 'b'`."""
        return f"is {self.kind} with the columns {column_names(self.columns)}"


def column_names(columns: Sequence[str]) -> str:
    """`'a', 'b'`: long names and more than 30 are cut."""
    more = f" and {len(columns) - 30:,} more" if len(columns) > 30 else ""
    return ", ".join(repr(column[:30]) for column in columns[:30]) + more


def file_ending(path: Path) -> str:
    """In small letters; of a compressed file the one before .gz and the like; '' for none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED_ENDINGS), "")


def read_table(
    path: Path, field: str, *, header: bool = True, where: str | None = None, notes: Counter[str] | None = None
) -> Table | None:
    """The table in a file, plain or compressed; None where it holds one JSON object. Text is a CSV table.

    header: whether the first line of a CSV names its columns; else they are '1', '2' and so on.
    where: the file can be got from. notes: counts `uneven_row`, and `bad_bytes` (lines that are not UTF-8).
    Raises `MissingFileError` or `InputError` at once, `InputError` where the reading of rows reaches the damage.
    """
    notes = Counter() if notes is None else notes
    kind = layout(path, field, where)
    if kind == "parquet":
        return _parquet_table(path, field)
    if kind == "json lines":
        return _json_table("a JSON Lines file", _json_lines(path, field))
    if kind == "json":
        content = read_user_json(path, field, where)
        return _json_table("a JSON list", content) if isinstance(content, list) else None
    return _csv_table(path, field, header, notes)


def layout(path: Path, field: str, where: str | None = None) -> str:
    """What the start and the ending of a file say: parquet, json, json lines, table (of text) or text.

    Raises `MissingFileError` or `InputError`, as `user_files.open_bytes` does.
    """
    start = first_bytes(path, field, where)
    if start.startswith(b"PAR1"):
        return "parquet"
    lines = re.split(r"\r\n?|\n", start.decode("utf-8-sig", "replace").lstrip())
    if file_ending(path) in _LINES:
        return "json lines"
    if lines and is_json(lines[0]):
        return "json lines" if _has_json_lines(path, field) else "json"
    if file_ending(path) in _TABLES or table_columns(lines[:-1] if len(start) == START and lines[1:] else lines):
        return "table"
    return "text"


def parquet_file(path: Path, field: str, *, memory_map: bool = False) -> Any:
    """pyarrow's `ParquetFile`. Raises `InputError` without pyarrow, or for a damaged file.

    memory_map: for processes that read it at the same time; the file must not be compressed as a whole.
    """
    parquet = needed("pyarrow.parquet", "tables", f"{path} ({field}) is a Parquet table")
    try:
        source = path if memory_map else open_bytes(path, field, parquet=True)
        return parquet.ParquetFile(source, memory_map=memory_map)
    except (needed("pyarrow", "tables", "").ArrowException, OSError) as error:
        raise broken_file(path, error) from error


def needed(module: str, extra: str, reason: str) -> ModuleType:
    """A library that is no part of the usual installation. Raises `InputError` that names the extra with it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{reason}, which needs the extra `{extra}`: pip install 'cgtgan[{extra}]'") from error


# ----------------------------------------------------------------------------------------------------------------- CSV


def _csv_table(path: Path, field: str, header: bool, notes: Counter[str]) -> Table:
    lines = text_lines(path, field, notes)
    start = list(islice(lines, LOOKED_AT))
    delimiter = _delimiter([line for line in start if line.strip()], header)
    rows = _cells(path, field, chain(start, lines), delimiter)
    first = next(rows, [])
    columns = first if header else [str(n) for n, _ in enumerate(first, 1)]

    def values(wanted: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        places = [columns.index(column) for column in wanted]
        for row in rows if header else chain([first], rows):
            if len(row) == len(columns):
                yield tuple(row[place] for place in places)
            else:
                notes[UNEVEN] += 1

    return Table("a table", columns, values)


def _delimiter(lines: Sequence[str], header: bool) -> str:
    """The most frequent one in the header, or in every line where there is none."""
    counted = lines[:1] if header else lines
    counts = {delimiter: min((line.count(delimiter) for line in counted), default=0) for delimiter in DELIMITERS}
    return max(DELIMITERS, key=lambda delimiter: counts[delimiter]) if any(counts.values()) else ","


def _cells(path: Path, field: str, lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """The cells of each row that is not empty, without the blanks around them."""
    if delimiter in "\t|":
        yield from ([_unquoted(cell.strip(" ")) for cell in line.split(delimiter)] for line in lines if line.strip())
        return
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        yield from ([cell.strip(" ") for cell in row] for row in reader if row)
    except csv.Error as error:
        fix = "quotes inside a quoted cell are doubled, and every quoted cell ends with one"
        raise InputError(f"{path} ({field}) is no whole CSV table, line {reader.line_num}: {error}; {fix}") from error


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


# ----------------------------------------------------------------------------------------------------- JSON and Parquet


def _json_table(kind: str, rows: Iterable[Any]) -> Table:
    rows = iter(rows)
    first = list(islice(rows, 1))
    plain = not any(isinstance(row, dict) for row in first)

    def values(wanted: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for row in chain(first, rows):
            if plain:
                yield tuple(row for _ in wanted)
            else:
                yield tuple(row.get(column) if isinstance(row, dict) else None for column in wanted)

    return Table(kind, [TEXT] if plain else [str(key) for key in first[0]], values, plain)


def _has_json_lines(path: Path, field: str) -> bool:
    with open_bytes(path, field) as stream:
        start = (stream.readline(LONGEST_LINE) for _ in range(LOOKED_AT))
        return is_json_lines([line.decode("utf-8-sig", "replace") for line in start])


def _json_lines(path: Path, field: str) -> Iterator[Any]:
    for n, line in enumerate(text_lines(path, field), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{path} ({field}), line {n} is no JSON: {quoted(line)}") from None


def _parquet_table(path: Path, field: str) -> Table:
    file = parquet_file(path, field)

    def values(wanted: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        try:
            for batch in file.iter_batches(batch_size=4096, columns=list(dict.fromkeys(wanted))):
                yield from (tuple(row[column] for column in wanted) for row in batch.to_pylist())
        except (needed("pyarrow", "tables", "").ArrowException, OSError) as error:
            raise broken_file(path, error) from error

    return Table("a Parquet table", file.schema_arrow.names, values)
