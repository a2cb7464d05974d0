"""Tables and JSON Lines, recognised where sentences or one JSON value are needed, so that the error can name them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

LOOKED_AT = 20  # lines at the start of a file
# Usual names of a column of captions, and of the columns beside it.
_TEXT_COLUMNS = re.compile(r"captions?|caption_text|comments?|description|raw|sentences?|text|title|tokens")
_OTHER_COLUMNS = re.compile(
    r"id|(?:image|img)s?|(?:image|img)_?(?:id|name|file|path|url)|file|file_?(?:name|path)|path|url|sent_?id|"
    r"(?:comment|caption)_number|split|width|height|labels?"
)
DELIMITERS = "\t|;,"
_FILE_NAME = re.compile(r"[^\t|;,]*\.(?:jpe?g|png|webp|gif|tiff?|bmp|avif|heic)(?:#\d+)?[\"']?\s*[\t|;, ]", re.I)
_NUMBER = re.compile(r"[\"']?\d+[\"']?\s*[\t|;,]")
_ADDRESS = re.compile(r"(?:^|[\t|;,])\s*[\"']?https?://")
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f]")
_JSON = re.compile(r"\s*(?:\[\s*(?:$|[\[{\"])|\{\s*(?:$|\"))")


def table_columns(lines: Sequence[str]) -> list[str] | None:
    """The first row of a table, cell by cell, where the first lines of a file are one; None where they are not."""
    rows = [line.strip().removeprefix("\ufeff") for line in lines if line.strip()][:LOOKED_AT]
    if not rows or any(map(_NO_TEXT.search, rows)):
        return None
    first, below = rows[0], rows[1:]
    if below and _TEXT_COLUMNS.fullmatch(_word(first)):
        return [first]
    for delimiter in DELIMITERS:
        cells = [_word(cell) for cell in first.split(delimiter)]
        known = [cell for cell in cells if _TEXT_COLUMNS.fullmatch(cell) or _OTHER_COLUMNS.fullmatch(cell)]
        is_header = len(cells) > 1 and all(re.fullmatch(r"[\w#.:-]*", cell) for cell in cells)
        if is_header and (len(known) > 1 or (known and below and all(delimiter in row for row in below))):
            return [cell.strip() for cell in first.split(delimiter)]
    if _are_rows(rows) or (len(below) > 1 and _are_rows(below)):
        return _cells(first)
    return None


def _are_rows(rows: Sequence[str]) -> bool:
    if all(map(_FILE_NAME.match, rows)):
        return True
    if len(rows) < 2:
        return False
    if all(map(_NUMBER.match, rows)) or (all(map(_ADDRESS.search, rows)) and len(_cells(rows[0])) > 1):
        return True
    if any(len({row.count(delimiter) for row in rows}) == 1 and delimiter in rows[0] for delimiter in "\t|"):
        return True
    return all(re.match(r"\".*\"\s*[;,]\s*\"", row) for row in rows)


def _word(cell: str) -> str:
    return cell.strip().strip("\"'").strip().lower().replace(" ", "_")


def _cells(row: str) -> list[str]:
    delimiter = next((d for d in DELIMITERS if d in row), " ")
    return [cell.strip() for cell in row.split(delimiter, 3 if delimiter != " " else 1)]


def columns_sentence(columns: Sequence[str]) -> str:
    """'is a table with the columns a, b': long cells are cut."""
    return "is a table with the columns " + ", ".join(repr(column[:30]) for column in columns)


def is_json(line: str) -> bool:
    """Whether the first line of a file begins a JSON list or object, not a sentence."""
    return _JSON.match(line) is not None


def is_json_lines(lines: Sequence[str]) -> bool:
    """Whether each of the first lines is a JSON object of its own."""
    rows = [line for line in lines if line.strip()][:2]
    try:
        return len(rows) == 2 and all(isinstance(json.loads(row), dict) for row in rows)
    except (ValueError, RecursionError):
        return False
