"""The checkpoint that is scored: whose it is, its name in tables, and what the run's usual scores are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgtgan.assets.checkpoints import checkpoint_in
from cgtgan.assets.workspace import Workspace
from cgtgan.errors import UserError
from cgtgan.runtime.artifacts import file_fingerprint, read_json


@dataclass(frozen=True)
class ScoredCheckpoint:
    """name: for tables, 'step 6'. usual: what the run's usual scores, of its best and of its last checkpoint, have in
    `made_from`; nothing in a run without checkpoints. foreign: it is neither the best nor the last of this run.
    """

    name: str
    usual: Sequence[Mapping[str, Any]]
    foreign: bool


def scored_checkpoint(ws: Workspace, checkpoint: Path) -> ScoredCheckpoint:
    """`checkpoint` as this run sees it. Its own is recognised by content, wherever it lies.

    The usual scores are of the best or the last checkpoint with the decoding that it was trained with. A run without
    checkpoints, such as a transfer row, scores those of a run with its own seed.
    """
    best, last = (_own(ws, which) for which in ("best", "last"))
    home = next((p for p in checkpoint.parents if (p / "settings.json").is_file()), None)
    foreign_name = f"{home.parent.name}/{home.name}, {_step(checkpoint)}" if home else checkpoint.name
    if ws.cfg.checkpoint and Path(ws.cfg.checkpoint).expanduser().is_file():
        foreign_name = Path(ws.cfg.checkpoint).name
    if best is None and last is None:
        seed = read_json(home / "settings.json").get("seed") if home else None
        return ScoredCheckpoint(foreign_name, (), foreign=seed not in (None, ws.cfg.seed))
    weights = {fingerprint_of(own): own for own in (best, last) if own is not None}
    own = weights.get(fingerprint_of(checkpoint))
    usual = [_usual(place) for place in weights.values()]
    if own is None and home != ws.run.resolve():
        return ScoredCheckpoint(foreign_name, usual, foreign=True)
    return ScoredCheckpoint(_step(own or checkpoint), usual, foreign=own is None)


def _usual(checkpoint: Path) -> dict[str, Any]:
    made_from = {"checkpoint": fingerprint_of(checkpoint), "projection_t": None}
    with suppress(UserError, KeyError):  # the authors' files have none
        made_from["decode"] = read_json(checkpoint / "checkpoint.json")["decode"]
    return made_from


def fingerprint_of(checkpoint: Path) -> str:
    return file_fingerprint(checkpoint / "generator.safetensors")


def _own(ws: Workspace, which: str) -> Path | None:
    try:
        return checkpoint_in(ws.run, which)
    except UserError:  # a damaged one is named where it is used
        return None


def _step(checkpoint: Path) -> str:
    name = checkpoint.resolve().name
    return f"step {int(name[5:])}" if name.startswith("step_") and name[5:].isdigit() else name
