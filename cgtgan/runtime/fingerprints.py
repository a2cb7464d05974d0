"""Fingerprints of whole files, kept beside them, so that a file is read for its fingerprint once."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from cgtgan.errors import InputError


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """12 hexadecimal digits of the SHA-256 of the file's bytes."""
    return file_sha256(path)[:12]


def kept_fingerprint(path: Path, elsewhere: Path | None = None) -> str:
    """`file_fingerprint(path)`; read from the record beside it while the file's size, time and inode are the same.

    elsewhere: a folder for the record where nothing can be written beside the file.
    """
    state = _state(path)
    for record in (_record(path), _record(path, elsewhere) if elsewhere else None):
        if record and record["state"] == state:
            return record["fingerprint"]
    return _fingerprint_and_keep(path, elsewhere)


def check_as_written(path: Path, fix: str) -> None:
    """Raise `InputError` if the file is not what it was when its record was made. Without a record, make one."""
    record, state = _record(path), _state(path)
    if record is None:
        if os.access(path.parent, os.W_OK):
            _fingerprint_and_keep(path)
    elif record["state"] != state:
        if file_fingerprint(path) != record["fingerprint"]:
            raise InputError(f"{path} is not as it was written: {fix}")
        _keep(path, state, record["fingerprint"])


def forget_fingerprint(path: Path) -> None:
    """Before another file takes this name."""
    _record_file(path).unlink(missing_ok=True)


def _fingerprint_and_keep(path: Path, elsewhere: Path | None = None) -> str:
    state = _state(path)
    fingerprint = file_fingerprint(path)
    if _state(path) == state and not _keep(path, state, fingerprint) and elsewhere:  # nobody wrote meanwhile
        _keep(path, state, fingerprint, elsewhere)
    return fingerprint


def _record_file(path: Path, elsewhere: Path | None = None) -> Path:
    """Beside the file, or in `elsewhere` under a name that the file's path gives."""
    if elsewhere is None:
        return path.with_name(f".{path.name}.sha256")
    return elsewhere / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.sha256"


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _record(path: Path, elsewhere: Path | None = None) -> dict[str, Any] | None:
    """The record; None where there is none, or no whole one."""
    try:
        record = json.loads(_record_file(path, elsewhere).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = isinstance(record, dict) and isinstance(record.get("fingerprint"), str) and "state" in record
    return record if is_whole else None


def _keep(path: Path, state: list[int], fingerprint: str, elsewhere: Path | None = None) -> bool:
    """Whether the record is written. Where it cannot be, the file is read again next time."""
    record = _record_file(path, elsewhere)
    beside = record.with_name(f"{record.name}.{os.getpid()}.tmp")
    try:
        if elsewhere:
            elsewhere.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"state": state, "fingerprint": fingerprint}), encoding="utf-8")
        beside.replace(record)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        return False
    return True
