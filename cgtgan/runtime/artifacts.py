"""Files that other stages and other runs build on: named by fingerprint, with a header, written whole or not at all.

Embeddings are safetensors with the header and the row ids in the file's metadata, so one `rename` makes both visible.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from cgtgan.errors import InputError, MissingFileError
from cgtgan.runtime.fingerprints import check_as_written, forget_fingerprint
from cgtgan.runtime.fingerprints import file_fingerprint as file_fingerprint
from cgtgan.runtime.versions import __version__

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
ROW_NUMBERS = "row numbers"  # what stands for the ids 0, 1, 2 ... of a corpus of millions
_FIX = "delete the file and it is made again"


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no blanks, tuples as lists. Raises `TypeError` for what JSON does not know:
    another text of it could change from process to process."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(value: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:12]


# -------------------------------------------------------------------------------------------------------- atomic writes


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to; it takes `path`'s name only if the block ends well.

    Its files then have the rights that the umask gives. A full disk is an `OSError` naming `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a folder: safetensors writes into a nameless file of its own beside the one that it is given
    place = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    remove_path(place)
    place.mkdir()
    beside = place / path.name
    try:
        yield beside
        for file in [beside] if beside.is_file() else [p for p in beside.rglob("*") if p.is_file()]:
            file.chmod(file.stat().st_mode | place.stat().st_mode & 0o666)  # safetensors gives the owner alone rights
            _sync(file)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        beside.replace(path)
        _sync(path.parent)
    except Exception as error:
        raise _named_disk_error(error, path) from None
    finally:
        remove_path(place)


def _named_disk_error(error: Exception, path: Path) -> Exception:
    """What safetensors says of a disk, as the `OSError` that everybody else raises, and with the file's name."""
    if type(error).__name__ == "SafetensorError" and (number := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    if isinstance(error, OSError) and error.errno and error.filename is None:
        error.filename = str(path)
    return error


def remove_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed writers of `atomic_path` left in `folder`, of `name` only, which nobody may write to now."""
    for stale in folder.glob(f".{escape(name)}*.tmp"):
        remove_path(stale)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file of our own: an object, or a list with `kind=list`.

    Raises `MissingFileError`, or `InputError` as `parse_json` does.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        message = f"{path} is missing: run the stage that writes it (stage=pipeline runs them all)"
        raise MissingFileError(message) from None
    return parse_json(content, str(path), kind)


def parse_json(
    text: str | bytes, place: str, kind: type = dict, fix: str = "delete it and run the stage that writes it again"
) -> Any:
    """The JSON object in `text`, or list with `kind=list`; `InputError` names the place, what is wrong, and the fix."""
    try:
        value = json.loads(text)
    except RecursionError:
        problem = "is nested too deeply"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
    except json.JSONDecodeError as error:
        problem = f"is not whole ({error})"
    except ValueError:  # Python's own limit
        problem = "has a number of thousands of digits"
    else:
        if isinstance(value, kind):
            return value
        problem = f"holds no JSON {'list' if kind is list else 'object'}"
    raise InputError(f"{place} {problem}: {fix}")


# -------------------------------------------------------------------------------------------------------------- headers


@dataclass(frozen=True)
class Header:
    """What every artifact says of itself."""

    kind: str
    fingerprint: str
    producer: dict[str, Any]
    rows: int
    dim: int
    dtype: str
    format_version: int = FORMAT_VERSION
    package_version: str = __version__

    def expect(self, path: Path, **wanted: Any) -> None:
        """Raise `InputError` naming both values where the header differs from `wanted`."""
        for name, value in {"format_version": FORMAT_VERSION, **wanted}.items():
            stored = getattr(self, name)
            if stored != value:
                raise InputError(f"{path} has {name}={stored} and {name}={value} is expected: {_FIX}")


def _open(path: Path, *names: str) -> tuple[Header, dict[str, Any], list[torch.Tensor]]:
    """The header, the rest of the metadata, and the named tensors, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingFileError(f"{path} is missing: run stage=preprocess (or stage=pipeline) first")
    try:
        with safe_open(path, framework="pt" if names else "numpy") as f:  # a header alone needs no torch
            meta, tensors = f.metadata() or {}, [f.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path} cannot be read ({e}): {_FIX}") from None
    if "header" not in meta:
        raise InputError(f"{path} has no header: it was not written by cgtgan")
    fields = parse_json(meta["header"], f"{path}: its header", fix=_FIX)
    counts = fields.pop("counts", None)
    try:
        return Header(**fields), {"ids": meta.get("ids"), "counts": counts}, tensors
    except TypeError:  # other fields
        raise InputError(f"{path} has a header this version cannot read: {_FIX}") from None


@dataclass(frozen=True)
class Embeddings:
    """`vectors` (N, D) float16, memory-mapped, unnormalised; `ids[i]` names row i."""

    vectors: torch.Tensor
    ids: Sequence[Any]
    header: Header


def save_embeddings(
    path: Path, vectors: torch.Tensor, ids: Sequence[Any], *, kind: str, producer: Mapping[str, Any]
) -> Header:
    """Write `vectors` (N, D) as float16.

    Raises `InputError` if a row is not finite in float16, or if there are more or fewer rows than ids.
    """
    if len(ids) != len(vectors):
        raise InputError(f"{path}: {len(vectors)} rows and {len(ids)} ids do not fit together")
    return write_embeddings(path, [vectors], vectors.shape[1], ids, kind=kind, producer=producer)


def write_embeddings(
    path: Path, pieces: Iterable[torch.Tensor], dim: int, ids: Sequence[Any], *, kind: str, producer: Mapping[str, Any]
) -> Header:
    """`save_embeddings` of `pieces` (n, D) that are len(ids) rows in all; only one of them is in memory at a time."""
    import torch

    header = Header(kind, fingerprint(producer), dict(producer), len(ids), dim, "float16")
    listed = ROW_NUMBERS if isinstance(ids, range) and ids == range(len(ids)) else json.dumps(list(ids))
    # the safetensors format itself (a length, a JSON header, the bytes): its package wants the whole tensor at once
    place = {"dtype": "F16", "shape": [len(ids), dim], "data_offsets": [0, 2 * len(ids) * dim]}
    head = json.dumps(
        {"__metadata__": {"header": canonical_json(asdict(header)), "ids": listed}, "embeddings": place}
    ).encode()
    head += b" " * (-len(head) % 8)
    row = 0
    with atomic_path(path) as beside, beside.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for piece in pieces:
            stored = piece.detach().to("cpu", torch.float16).contiguous()
            bad = (~torch.isfinite(stored).all(dim=1)).nonzero()
            if len(bad):
                first = ids[row + int(bad[0])]
                raise InputError(
                    f"{path}: the embedding of {first!r} (and {len(bad) - 1} more) is not finite in float16"
                )
            stored.numpy().tofile(file)
            row += len(stored)
        assert row == len(ids), f"{row} rows for {len(ids)} ids"
        forget_fingerprint(path)
    check_as_written(path, _FIX)
    return header


def read_header(path: Path) -> tuple[Header, Sequence[Any]]:
    """Header and ids of embeddings, without torch. Raises `MissingFileError` or `InputError`."""
    header, meta, _ = _open(path)
    return header, _ids(meta["ids"], header.rows)


def _ids(listed: str, rows: int) -> Sequence[Any]:
    return range(rows) if listed == ROW_NUMBERS else json.loads(listed)


def load_embeddings(path: Path, **wanted: Any) -> Embeddings:
    """Map the file. `wanted`: header fields that must agree (kind, dim, rows ...); `InputError` names both values."""
    header, meta, (vectors,) = _open(path, "embeddings")
    ids = _ids(meta["ids"], len(vectors))
    for rows in (len(vectors), len(ids)):
        header.expect(path, dtype="float16", rows=rows)
    header.expect(path, **wanted)
    check_as_written(path, _FIX)
    return Embeddings(vectors, ids, header)


class Sentences(Sequence[str]):
    """A corpus on disk: UTF-8 text, memory-mapped, and where each sentence ends. Processes share its pages."""

    def __init__(self, text: torch.Tensor, ends: torch.Tensor):
        self._text, self._ends = text.numpy(), ends.numpy()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = operator.index(index)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        start = int(self._ends[row - 1]) if row else 0
        return self._text[start : int(self._ends[row])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def save_sentences(
    path: Path, sentences: Sequence[str], *, producer: Mapping[str, Any], counts: Mapping[str, int]
) -> Header:
    """Clean sentences with their header and the counts of the cleaning, as safetensors: `text` uint8, `ends` int64."""
    import numpy as np
    from safetensors.numpy import save_file

    header = Header("sentences", fingerprint(producer), dict(producer), len(sentences), 0, "utf-8")
    pieces = [s.encode("utf-8", "surrogatepass") for s in sentences]
    ends = np.cumsum([len(p) for p in pieces], dtype=np.int64)
    tensors = {"text": np.frombuffer(b"".join(pieces), dtype=np.uint8), "ends": ends}
    with atomic_path(path) as beside:
        # one key: its package writes several in an order that changes from process to process
        save_file(tensors, beside, {"header": canonical_json(asdict(header) | {"counts": dict(counts)})})
        forget_fingerprint(path)
    check_as_written(path, _FIX)
    return header


def load_sentences(path: Path) -> tuple[Sentences, dict[str, int]]:
    """(sentences, counts of the cleaning)."""
    header, meta, (text, ends) = _open(path, "text", "ends")
    header.expect(path, kind="sentences", rows=len(ends))
    check_as_written(path, _FIX)
    return Sentences(text, ends), meta["counts"]
