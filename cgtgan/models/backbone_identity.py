"""What tells the embeddings of one CLIP from another's: its settings, and its weights by content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from cgtgan.config import ClipBackboneConfig, custom_parts
from cgtgan.errors import MissingFileError
from cgtgan.models.weights import model_identity
from cgtgan.runtime.custom import custom_file, load_custom
from cgtgan.runtime.fingerprints import file_fingerprint, kept_fingerprint
from cgtgan.runtime.sources import CLIP_ARCHIVES

CUSTOM_FIELD = "clip_backbone.model"
# fingerprints of OpenAI's files: those that version 0.1 knew, and the BPE file of the clip package
RELEASED = tuple(str(CLIP_ARCHIVES[name].sha256)[:12] for name in ("ViT-L/14", "ViT-B/32", "RN50x4"))
RELEASED_BPE = "924691ac288e"


def backbone_identity(config: ClipBackboneConfig, records: Path | None = None) -> dict[str, Any]:
    """What an embedding's fingerprint must know of the backbone: weights by content, or by a hub's commit.

    records: a folder for fingerprints of files where none can be written beside them.
    """
    if config.kind == "custom":
        return _custom_identity(config)
    identity: dict[str, Any] = {key: getattr(config, key) for key in ("kind", "model", "pretrained", "dtype")}
    if config.kind == "openai" and (path := archive_path(config)).is_file():
        identity |= _archive_identity(path, records)
    elif config.kind == "huggingface":
        del identity["model"]
        identity |= model_identity(config.model, records)
    elif config.kind == "open_clip":
        identity |= _open_clip_identity(config, records)
    if config.tokenizer:
        identity |= _bpe_identity(Path(config.tokenizer).expanduser())
    return identity


def archive_path(config: ClipBackboneConfig) -> Path:
    """Where the archive is expected: in `cache` for a released name, else `model` itself."""
    if config.model in CLIP_ARCHIVES:
        return Path(config.cache).expanduser() / CLIP_ARCHIVES[config.model].file_name
    return Path(config.model).expanduser()


def missing_archive(config: ClipBackboneConfig) -> str | None:
    """One sentence where OpenAI's archive is not there; None: it is."""
    path, source = archive_path(config), CLIP_ARCHIVES.get(config.model)
    if path.is_file():
        return None
    archive = f"OpenAI's archive ({source.address})" if source else "OpenAI's archive"
    names = "" if source else f" or to one of {', '.join(CLIP_ARCHIVES)}"
    return (
        f"clip_backbone.model={config.model}: {path} is missing; get {archive} and put it there, or set "
        f"clip_backbone.model to the .pt file{names}, or clip_backbone.cache to its folder"
    )


def _archive_identity(path: Path, records: Path | None = None) -> dict[str, Any]:
    """Name, size and content of an archive. records: as in `kept_fingerprint`.

    Version 0.1 hashed the first and last MiB. OpenAI's own archives, known by all of their bytes, keep that name of
    their content, so that embeddings made by 0.1 stay valid; it took no other archive of this name and these ends.
    """
    size, weights = path.stat().st_size, kept_fingerprint(path, records)
    if weights in RELEASED:
        with path.open("rb") as f:
            head = f.read(1 << 20)
            f.seek(-min(1 << 20, size), 2)
            weights = hashlib.sha256(head + f.read()).hexdigest()[:12]
    return {"model": path.name, "weights": weights, "bytes": size}


def _bpe_identity(path: Path) -> dict[str, str]:
    """Name of a BPE file, and the content of one that is not OpenAI's."""
    content = file_fingerprint(path) if path.is_file() else None
    return {"tokenizer": path.name} | ({"words": content} if content not in (None, RELEASED_BPE) else {})


def _open_clip_identity(config: ClipBackboneConfig, records: Path | None = None) -> dict[str, Any]:
    """The content of a file or folder that `model` or `pretrained` names, and the commit of a hub's model."""
    identity: dict[str, Any] = {}
    for prefix in ("local-dir:", "hf-hub:"):
        if config.model.startswith(prefix):
            identity |= model_identity(config.model.removeprefix(prefix), records)
    if (file := Path(config.pretrained).expanduser()).is_file():
        identity["pretrained"] = kept_fingerprint(file, records)
    return identity


def _custom_identity(config: ClipBackboneConfig) -> dict[str, Any]:
    """What tells this encoder's embeddings from another's: name, and content of its source and weight files.

    The weight files are the class's `files`, paths relative to the source. Without it, they are the files in the
    source's folder that have its stem, such as encoder.safetensors for encoder.py.
    """
    kind, source = load_custom(config.model, CUSTOM_FIELD), custom_file(config.model, CUSTOM_FIELD)
    names = getattr(kind, "files", None)
    if names is None:
        names = [p.name for p in sorted(source.parent.glob(f"{source.stem}.*")) if p.is_file() and p != source]
    weights: dict[str, str] = {}
    for name in map(str, names):
        if not (source.parent / name).is_file():
            raise MissingFileError(
                f"{CUSTOM_FIELD}={config.model}: its `files` names {source.parent / name}, which is missing"
            )
        weights[name] = file_fingerprint(source.parent / name)
    return {
        "kind": "custom",
        "name": custom_parts(config.model)[1],
        "source": file_fingerprint(source),
        **({"weights": weights} if weights else {}),
    }
