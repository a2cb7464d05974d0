"""Which checkpoint a setting names: a folder, a run, a hub name, or the authors' model.pt."""

from __future__ import annotations

import re
from pathlib import Path

from cgtgan.assets.released import imported_checkpoint
from cgtgan.assets.workspace import Workspace
from cgtgan.errors import MissingFileError


def checkpoint_in(start: Path, which: str = "best") -> Path | None:
    """The checkpoint folder: `start` itself, or below it if that is a `checkpoints` or a run folder. Follows links."""
    places = (start, start / which, start / "checkpoints" / which)
    return next((place.resolve() for place in places if (place / "generator.json").is_file()), None)


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
    for place in (start, start / "best", start / "checkpoints" / "best"):
        if (place / "generator.json").is_file():
            return place.resolve()
    raise MissingFileError(
        f"train.init_from={given}: no checkpoint is found there; name a run folder, a checkpoint, the authors' "
        "model.pt, or a hub's owner/name that holds a checkpoint or a model.pt"
    )


def _from_hub(name: str) -> Path:
    """The checkpoint folder, or the model.pt, of this name on a hub. A download made before needs no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["generator.json", "generator.safetensors", "tokenizer.json", "checkpoint.json", "model.pt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingFileError(
            f"train.init_from={name}: no such file or folder here, and no hub has it ({first}); name a run folder, a "
            "checkpoint or the authors' model.pt"
        ) from None
    return folder / "model.pt" if (folder / "model.pt").is_file() else folder
