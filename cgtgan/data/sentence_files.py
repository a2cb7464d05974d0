"""corpus.kind=text_file: sentences as text (one per line), CSV or TSV, JSON Lines, a JSON list or Parquet.

Each may be compressed. The kind is recognised by the content. `corpus.column` names the column of a table, or a key of
JSON's objects; a number counts the columns of a CSV without a header, from 1. A list in a cell of it is several
sentences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cgtgan.data.tables import TEXT, layout, read_table
from cgtgan.data.user_files import text_lines
from cgtgan.errors import InputError

FIELD = "corpus.path"
_FIX = (
    "set corpus.column to the one with the sentences (to its number, from 1, where the first line has no names), or "
    "use corpus=coco for a caption file"
)


def read_sentences(path: Path, column: str | None, notes: Counter[str]) -> Iterator[Any]:
    """Raw sentences in the file's order; of JSON and Parquet a value may be of any type.

    notes: counts as of `tables.read_table`. Raises `MissingFileError` or `InputError`: a table without `column`, or
    with another one, is refused and its columns are named.
    """
    if column is None and layout(path, FIELD) == "text":
        yield from text_lines(path, FIELD, notes)
        return
    table = read_table(path, FIELD, header=not (column and column.isdigit()), notes=notes)
    if table is None:
        hint = "use corpus=coco or corpus=flickr30k for caption files"
        raise InputError(f"{path} ({FIELD}) is JSON, not a list or one sentence per line: {hint}")
    if column is None and table.plain:
        column = TEXT
    if column is None:
        raise InputError(f"{path} ({FIELD}) {table.columns_sentence()}, not one sentence per line: {_FIX}")
    if column not in table.columns:
        raise InputError(f"{path} ({FIELD}) {table.columns_sentence()}: corpus.column={column} is none of them")
    for (value,) in table.values([column]):
        yield from value if isinstance(value, list) else [value]
