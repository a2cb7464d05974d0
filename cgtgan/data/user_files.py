"""A user's files, read with errors that name the file, the setting and the fix: JSON and text, plain or compressed."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from cgtgan.data.other_layouts import LOOKED_AT, columns_sentence, is_json_lines, table_columns
from cgtgan.errors import InputError, MissingFileError

# A compressed JSON file may grow to 100 times its size, which no real one does, or to this many bytes.
SMALL_JSON = 2**28
START = 4096  # bytes from which the kind of a file is seen
LONGEST_LINE = 1_000_000  # characters: no sentence and no file name is as long
_ARCHIVE = "is an archive: unpack it and name the file inside"
_OTHER_KINDS = {  # the first bytes of a file -> what it is, and the fix
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository",
    **dict.fromkeys((b"PK\x03\x04", b"BZh91AY&SY", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"), _ARCHIVE),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "is UTF-16 text: save it as UTF-8"),
    b"%PDF": "is a PDF: save its text as UTF-8",
    b"PAR1": "is a Parquet table: export the captions as text or JSON",
    b"SQLite format 3": "is a database: export the captions as text or JSON",
    b"\xd0\xcf\x11\xe0": "is an Office file: export it as UTF-8 text",
}
_PARQUET = b"PAR1"


def _zstd() -> ModuleType | None:
    """Python's own module (3.14), or the same one for older Pythons (backports.zstd); None without either."""
    for name in ("compression.zstd", "backports.zstd"):
        with suppress(ImportError):
            return importlib.import_module(name)
    return None


_ZSTD = _zstd()
_OPEN: dict[str, Callable[..., Any] | None] = {  # the ending of a compressed file -> what opens it
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _ZSTD.open if _ZSTD else None,
}
_PACKED = {  # its first bytes -> its ending
    b"\x1f\x8b": ".gz",
    **{b"BZh%d1AY" % level: ".bz2" for level in range(1, 10)},
    b"\xfd7zXZ": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}
PACKED_ENDINGS = frozenset(_OPEN)
# What reading a compressed file raises where it is damaged.
DAMAGED_FILE = (OSError, EOFError, zlib.error, lzma.LZMAError, *((_ZSTD.ZstdError,) if _ZSTD else ()))
_PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<!--", b"<?xml")
_BAD_BYTES = re.compile("[\udc80-\udcff]+")


def quoted(value: Any, longest: int = 80) -> str:
    """The start of what a file holds, for a message."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."


def printable(path: Path) -> str:
    """With `/`; bytes of a name that are not UTF-8 as \\x.., for ids and messages go into files that are UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def missing_file(path: Path, field: str, where: str | None = None) -> MissingFileError:
    """The error for a file or folder that is not there: which, where to get it, which config field moves it."""
    if field.startswith("dataset."):
        field += " (or dataset.root)"
    for above in (path, *path.parents):
        if above.is_file():
            problem = f"cannot be there: {above} is a file and a folder is needed; unpack it, or set {field}"
            return MissingFileError(f"{path} {problem}")
    if path.is_dir():
        return MissingFileError(f"{path} is a folder and a file is needed: set {field} to the file")
    if path.is_symlink():
        problem = f"is a link to {path.readlink()}, which does not exist: fix it, or set {field} to where it is"
        return MissingFileError(f"{path} {problem}")
    get = f"get it from {where}, or " if where else ""
    return MissingFileError(f"{path} does not exist: {get}set {field} to where it is")


def broken_file(path: Path, error: Exception) -> InputError:
    """The error for a file that stops before its end, or that the system does not let us read."""
    if isinstance(error, OSError) and error.errno:
        return InputError(f"{path} cannot be read ({error.strerror}): fix its permissions, or the disk it is on")
    problem = str(error) or type(error).__name__
    return InputError(f"{path} cannot be read to its end ({problem}): it is damaged or cut off, download it again")


def foreign_content(head: bytes) -> str | None:
    """'is an archive: unpack it ...': what the first 256 bytes of a file show it to be, with the fix; None: no such."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "is empty: download or make it again"
    if start.startswith(_PAGES):
        return "holds a web page, not the data: the download was answered with a page"
    if head.startswith(b"PK") and (b"[Content_Types]" in head or b"mimetypeapplication/vnd" in head):
        return "is an Office file: export it as UTF-8 text"
    return next((kind for first, kind in _OTHER_KINDS.items() if head.startswith(first)), None)


def open_bytes(path: Path, field: str, where: str | None = None, *, parquet: bool = False) -> BinaryIO:
    """Open a plain or compressed file (gzip, bz2, xz, zst), recognised by its first bytes.

    Raises `MissingFileError`; `InputError` for web pages, archives, UTF-16 and, unless they are wanted, Parquet tables.
    """
    if not path.is_file():
        raise missing_file(path, field, where)
    try:
        with path.open("rb") as plain:
            start = plain.read(8)
        packing = next((ending for first, ending in _PACKED.items() if start.startswith(first)), None)
        unpack = _OPEN[packing] if packing else Path.open
        if unpack is None:
            fix = "pip install 'cgtgan[tables]', which reads it, or unpack it"
            raise InputError(f"{path} ({field}) is compressed with Zstandard: {fix}")
        stream = cast(BinaryIO, unpack(path, "rb"))
        head = stream.read(256)
        stream.seek(0)
    except DAMAGED_FILE as error:
        raise broken_file(path, error) from error
    problem = None if parquet and head.startswith(_PARQUET) else foreign_content(head)
    ending = path.suffix.lower()
    if problem is None and ending in _OPEN and ending != packing:
        kind = {".gz": "gzip"}.get(ending, ending[1:])
        problem = (
            f"ends in {ending} but is not a {kind} file: download it again, or drop the ending if it is plain text"
        )
    if problem:
        stream.close()
        raise InputError(f"{path} ({field}) {problem}")
    return stream


def first_bytes(path: Path, field: str, where: str | None = None) -> bytes:
    """The first `START` bytes of what a file holds, unpacked. Raises as `open_bytes`; a Parquet table is accepted."""
    with open_bytes(path, field, where, parquet=True) as stream:
        try:
            return stream.read(START)
        except DAMAGED_FILE as error:
            raise broken_file(path, error) from error


def read_user_json(path: Path, field: str, where: str | None = None) -> Any:
    """The content of a JSON file, plain or compressed, that the setting `field` names, or that can be got from `where`.

    Raises `MissingFileError`; `InputError` with the place where it is cut off or is no JSON.
    """
    with open_bytes(path, field, where) as stream:
        try:
            limit = max(SMALL_JSON, 100 * path.stat().st_size)
            content = stream.read(limit + 1)
            if len(content) <= limit:
                return json.loads(content.decode("utf-8-sig"))
            problem = f"expands to more than {limit:,} bytes: it is no caption file"
        except json.JSONDecodeError as error:
            problem = _no_json(error)
        except UnicodeDecodeError as error:
            is_pickle = error.object[:1] == b"\x80" and error.start == 0
            problem = (
                "is a pickle, not JSON" if is_pickle else f"is not UTF-8 text at byte {error.start}: {error.reason}"
            )
        except RecursionError:
            problem = "is JSON nested too deeply to be a caption file"
        except ValueError:  # Python's own limit on the digits of a number
            problem = "has a number of thousands of digits: it is damaged, download it again"
        except DAMAGED_FILE as error:
            raise broken_file(path, error) from error
    raise InputError(f"{path} ({field}) {problem}")


def _no_json(error: json.JSONDecodeError) -> str:
    lines = error.doc[:100_000].splitlines()[:LOOKED_AT]
    if is_json_lines(lines):
        return "is JSON Lines (one object per line), not one JSON value: make it a list, as `jq -s . FILE` does"
    if columns := table_columns(lines):
        return f"{columns_sentence(columns)}, not JSON: write it as a JSON list of objects with image_id and caption"
    if not error.doc[: error.pos].strip() and error.doc.strip():
        return f"is no JSON: it begins with {error.doc.strip()[:30]!r}"
    place = f"line {error.lineno}, column {error.colno}: {error.msg}"
    return f"is not whole JSON ({place}): it is damaged or cut off, download it again"


def text_lines(path: Path, field: str, notes: Counter[str] | None = None) -> Iterator[str]:
    """Lines of a UTF-8 text file, plain or compressed, without their ends: LF, CR LF or CR, no other.

    notes: counts `bad_bytes`, lines with bytes that are not UTF-8, which become U+FFFD.
    Raises `MissingFileError` or `InputError` when the reading begins, `InputError` when it reaches what is no text.
    """
    with io.TextIOWrapper(open_bytes(path, field), "utf-8-sig", "surrogateescape") as stream:
        try:
            for n, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), ""), 1):
                if len(line) == LONGEST_LINE or (n <= 100 and "\0" in line):
                    problem = "has zero bytes" if "\0" in line else f"has {LONGEST_LINE:,} characters or more"
                    raise InputError(
                        f"{path} ({field}) is no text: line {n} {problem}; "
                        "one sentence or name per line, in UTF-8, is needed"
                    )
                if not line.isascii() and _BAD_BYTES.search(line):
                    line = _BAD_BYTES.sub("\ufffd", line)
                    if notes is not None:
                        notes["bad_bytes"] += 1
                yield line.removesuffix("\n")
        except DAMAGED_FILE as error:
            raise broken_file(path, error) from error
