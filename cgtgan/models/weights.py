"""Models of transformers, in a folder or by hub name: what tells one from another, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from cgtgan.errors import InputError, MissingFileError, UserError
from cgtgan.models.hub import CONFIGS, DESCRIPTIONS, WEIGHTS, cached_snapshot, how_to_fetch, is_hub_name, newest_commit
from cgtgan.runtime.fingerprints import file_fingerprint, kept_fingerprint

T = TypeVar("T")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BUILT_IN = ("scratch", "corpus", "pretrained")  # values of `language_model`, `encoder` and `tokenizer`


def model_identity(name: str, records: Path | None = None) -> dict[str, Any]:
    """Content of each file of a model's folder, wherever it lies, or the commit of a hub name.

    records: a folder for fingerprints where none can be written beside the files.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return {"files": _files_identity(folder, records)}
    if folder.is_file():
        return {"files": {folder.name: kept_fingerprint(folder, records)}}
    commit = hub_commit(name)
    return {"model": name.partition("@")[0]} | ({"commit": commit} if commit else {})


def model_identities(named: Mapping[str, str], records: Path | None = None) -> dict[str, Any]:
    """Field -> `model_identity`, of the fields that name a folder or a model of a hub."""
    return {field: model_identity(name, records) for field, name in named.items() if name not in _BUILT_IN}


def _files_identity(folder: Path, records: Path | None) -> dict[str, str]:
    identity: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file():
            continue
        if file.suffix in WEIGHTS:
            identity[file.name] = kept_fingerprint(file, records)
        elif file.suffix in DESCRIPTIONS:
            identity[file.name] = file_fingerprint(file)
    return identity


def pinned(name: str) -> str:
    """The full path of a model's folder; a hub name with its commit, `owner/name@commit`."""
    place = Path(name).expanduser()
    if place.exists():
        return str(place.resolve())
    commit = hub_commit(name)
    return f"{name.partition('@')[0]}@{commit}" if commit else name


def hub_commit(name: str) -> str | None:
    """The commit of a hub name, which its snapshot's folder carries: the one downloaded before, else the newest.

    That behind the @ of `owner/name@commit`. None where neither the local copy nor a hub has it: what loads the model
    says so.
    """
    if "@" in name:
        return name.partition("@")[2]
    snapshot = cached_snapshot(name, CONFIGS)
    return snapshot.name if snapshot else newest_commit(name)[0]


def load_pretrained(load: Callable[..., T], name: str, field: str, what: str, **settings: Any) -> T:
    """`load(place, **settings)`, a `from_pretrained` of transformers: of a folder, or of a hub name at `hub_commit`.

    Raises `MissingFileError` or `InputError` with `field`, and what is wrong with the `what` there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        refuse_pointers(folder, f"{field}={name}")
        place = str(folder)
    else:
        place, settings = name.partition("@")[0], {"revision": hub_commit(name) or "main", **settings}
        if cached_snapshot(name):  # a whole local copy needs no network
            with suppress(OSError):
                return load(place, local_files_only=True, **settings)
        if is_hub_name(name) and (why := newest_commit(place)[1]):  # asked once: transformers would ask many times
            raise MissingFileError(
                f"{field}={name}: no whole {what} is in the hub's cache, and no hub answers ({why}): "
                + how_to_fetch(name)
            )
    try:
        return load(place, **settings)
    except Exception as error:  # every way in which foreign bytes can fail to be a model
        raise _sentence(error, folder, f"{field}={name}", what) from None


def refuse_pointers(folder: Path, given: str) -> None:
    """Raise `MissingFileError` where git-lfs left its pointer in the place of a file."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (*WEIGHTS, *DESCRIPTIONS):
            with file.open("rb") as f:
                is_pointer = f.read(len(_LFS_POINTER)) == _LFS_POINTER
            if is_pointer:
                raise MissingFileError(
                    f"{given}: {file.name} there is a git-lfs pointer and not the file itself: run `git lfs pull` in "
                    "that folder, or download the file"
                )


def _sentence(error: Exception, folder: Path, given: str, what: str) -> UserError:
    """What kept `folder`, or a hub's model, from being loaded."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    is_damage = not isinstance(error, OSError | ValueError | KeyError | ImportError) or isinstance(error, UnicodeError)
    if isinstance(error, ImportError):
        return InputError(f"{given} needs another package ({reason}): install it, or choose another {what}")
    if folder.is_dir() and (folder / "config.json").is_file() and not _is_json(folder / "config.json"):
        return InputError(f"{given}: config.json there is no JSON: download it again")
    if is_damage:
        return InputError(f"{given}: the {what} there is damaged ({type(error).__name__}: {reason}): download it again")
    if isinstance(error, OSError) or (folder.is_dir() and not (folder / "config.json").is_file()):
        return MissingFileError(
            f"{given}: no {what} is found there ({reason}); give a folder with config.json, weights and tokenizer "
            "downloaded beforehand, or a hub name"
        )
    return InputError(f"{given}: what is there cannot be used as {what} ({reason}): choose another")


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False
