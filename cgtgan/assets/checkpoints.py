"""Which checkpoint a setting names (a folder, a run, a hub name, the authors' model.pt); where a run's links belong."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from cgtgan.assets.released import imported_checkpoint
from cgtgan.assets.training_state import read_meta
from cgtgan.assets.workspace import Workspace
from cgtgan.errors import InputError, MissingFileError, UserError
from cgtgan.models.hub import CHECKPOINT_FILES, cached_snapshot, fetch_model
from cgtgan.runtime.artifacts import read_json
from cgtgan.runtime.fingerprints import kept_fingerprint

LINKS = ("best", "last")
STATE = "training.safetensors"  # what only training needs of a checkpoint


def step_folders(checkpoints: Path) -> list[Path]:
    """The folders `step_<n>` of a run's `checkpoints/`, the newest first. Each is whole: a rename makes it."""
    folders = [p for p in checkpoints.glob("step_*") if p.name[5:].isdigit()]
    return sorted(folders, key=lambda p: int(p.name[5:]), reverse=True)


def link_targets(checkpoints: Path) -> dict[str, Path]:
    """Where `last` and `best` belong: the newest folder, and what it says is the best. Empty where none has a state."""
    for newest in step_folders(checkpoints):
        try:
            meta = read_meta(newest / STATE)
        except UserError:
            continue
        best = checkpoints / f"step_{meta['best_step']:06d}" if meta.get("best_step") else newest
        return {"last": newest, **({"best": best} if best.is_dir() else {})}
    return {}


def settle_links(checkpoints: Path) -> None:
    """Let `last` and `best` point to where they belong; a kill may come between the newest folder and its links.

    Looked at again after each change, so that a reader and the training job may both call this at any moment.
    """
    while wrong := _wrong_links(checkpoints):
        for link, target in wrong.items():
            beside = checkpoints / f".{link}.{os.getpid()}.tmp"
            beside.unlink(missing_ok=True)
            beside.symlink_to(target.name)  # relative: the run folder may be moved
            beside.replace(checkpoints / link)


def _wrong_links(checkpoints: Path) -> dict[str, Path]:
    """Links that point elsewhere or are not there; a folder in the place of one, as some copies have it, is left."""
    places = {checkpoints / link: target for link, target in link_targets(checkpoints).items()}
    return {
        place.name: target
        for place, target in places.items()
        if place.resolve() != target.resolve() and (place.is_symlink() or not place.exists())
    }


def checkpoint_in(start: Path, which: str = "best") -> Path | None:
    """The checkpoint folder: `start` itself, or below it if that is a `checkpoints` or a run folder. Follows links.

    Raises `InputError` if a file of it is not as it was written.
    """
    above = (start.parent, start.name) if start.name in LINKS else (start, which)
    for checkpoints, link in (above, (start / "checkpoints", which)):
        if target := link_targets(checkpoints).get(link):
            with suppress(OSError):  # a folder that may only be read
                settle_links(checkpoints)
            return _as_written(target.resolve())
    places = (start, start / which, start / "checkpoints" / which)
    found = next((place.resolve() for place in places if (place / "generator.json").is_file()), None)
    return found and _as_written(found)


def _as_written(folder: Path) -> Path:
    """`folder`, whose fingerprints are compared once with those in its checkpoint.json."""
    description = folder / "checkpoint.json"
    listed = read_json(description).get("files") if description.is_file() else None
    for name, wanted in listed.items() if isinstance(listed, dict) else ():
        file = folder / name
        if name != STATE and file.is_file() and kept_fingerprint(file) != wanted:
            raise InputError(
                f"{file} is not as it was written, {description} has another fingerprint: stage=train makes a run's "
                "newest checkpoint again, else name another one with checkpoint=FOLDER"
            )
    return folder


def find_checkpoint(ws: Workspace) -> Path:
    """The checkpoint folder that `checkpoint=` names, or this run's.

    `checkpoint=` is a checkpoint, a `checkpoints` or a run folder, or the authors' model.pt.
    """
    which = ws.cfg.evaluate.which
    given = ws.cfg.checkpoint
    start = Path(given).expanduser() if given else ws.run
    if given and start.is_file():
        return imported_checkpoint(ws, start, "checkpoint")
    if checkpoint := checkpoint_in(start, which):
        return checkpoint
    if given:
        raise MissingFileError(
            f"checkpoint={given}: no checkpoint is found there; name a run folder, a checkpoint or the authors' "
            "model.pt"
        )
    raise MissingFileError(
        f"{start / 'checkpoints' / which} is missing: run stage=train first, or name one with checkpoint=FOLDER"
    )


def init_checkpoint(ws: Workspace) -> Path:
    """The checkpoint folder of `train.init_from`: itself, that of a run folder, or made from the authors' model.pt."""
    given = str(ws.cfg.train.init_from)
    start = Path(given).expanduser()
    if not start.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        start = _from_hub(given)
    if start.is_file():
        return imported_checkpoint(ws, start, "train.init_from")
    if checkpoint := checkpoint_in(start):
        return checkpoint
    raise MissingFileError(
        f"train.init_from={given}: no checkpoint is found there; name a run folder, a checkpoint, the authors' "
        "model.pt, or a hub's owner/name that holds a checkpoint or a model.pt"
    )


def _from_hub(name: str) -> Path:
    """The checkpoint folder, or the model.pt, of this name on a hub. A download made before needs no network."""
    whole = ("generator.safetensors", "model.pt")
    if cached_snapshot(name, whole) is None:
        fetch_model(name, "train.init_from", CHECKPOINT_FILES)
    folder = cached_snapshot(name, whole)
    if folder is None:
        raise MissingFileError(
            f"train.init_from={name}: that repository of the hub has neither a checkpoint nor a model.pt: name another "
            "one, a run folder, a checkpoint or the authors' model.pt"
        )
    return folder / "model.pt" if (folder / "model.pt").is_file() else folder
