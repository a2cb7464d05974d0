"""A folder with the scores of captions made elsewhere, which stands in a comparison as a run does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cgtgan.reporting.methods import FROM_FILE
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.tables import MethodRow

SCORES = "_scores"  # behind the name of the file, it names the folder


@dataclass(frozen=True)
class ScoreFolder(Run):
    """The files that `stage=evaluate captions=FILE` writes. Their one method is `FROM_FILE`, of no training."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {"name": "", "seed": 0}

    def _file(self, method: str, name: str) -> Path:
        return self.folder / name

    @property
    def scored(self) -> list[str]:
        return [FROM_FILE]

    def records(self) -> list[Run]:
        return [replace(self, record=FROM_FILE)]

    def differs(self, *skip: str) -> str:
        return ""

    def decoding(self, method: str) -> str:
        return ""

    @property
    def against(self) -> str:
        """What the captions were scored against, in words; empty in a folder of version 0.1."""
        return self.scores(FROM_FILE).get("against", "")

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        return []

    def title(self, method: str) -> str:
        return ""

    def published(self, suffix: str = "") -> MethodRow | None:
        return None


def is_score_folder(folder: Path) -> bool:
    return (folder / "scores.json").is_file() and (folder / "per_image.json").is_file()


def without_parents(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its last part, with as many parents in front as tell it apart from the others."""
    parts = [path.absolute().parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        counts = range(1, len(own) + 1)
        return "/".join(next(own[-n:] for n in counts if all(other[-n:] != own[-n:] for other in others)))

    return [name(own) for own in parts]
