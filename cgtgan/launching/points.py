"""A multirun in one process: a line per run, and at the end the command that compares them. Imports no torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cgtgan.config import Config
from cgtgan.errors import program
from cgtgan.run_identity import run_folder
from cgtgan.runtime.artifacts import read_json


class Points:
    """The runs of this process that are done."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.folders: list[Path] = []
        self.split = ""
        self.best: tuple[float, str, Path] | None = None  # CIDEr, the run in words, its folder

    def done(self, cfg: Config, number: str, overrides: Sequence[str], seconds: float) -> str:
        """'run 2/6, seed=1: CIDEr 45.6 of the test images, 73 s'; without a score the run's time alone."""
        self.folders.append(run_folder(cfg))
        self.split = cfg.evaluate.split
        file = self.folders[-1] / "evaluation" / self.split / "cgtgan" / "scores.json"
        cider = read_json(file)["scores"].get("CIDEr") if file.is_file() else None
        score = "" if cider is None else f"CIDEr {100 * cider:.1f} of the {self.split} images, "
        label = f"run {number}, {' '.join(overrides) or 'no overrides'}"
        if cider is not None and (self.best is None or cider > self.best[0]):
            self.best = (cider, label, self.folders[-1])
        return f"{label}: {score}{seconds:.0f} s"

    def last_words(self) -> list[str]:
        """The page of the best run, and how to compare all; empty where fewer than two have scores."""
        if not (command := self._command()):
            return []
        page = self.best and self.best[2].resolve() / "report.html"
        best = [f"highest CIDEr: {self.best[1]}, {page.as_uri()}"] if self.best and page and page.is_file() else []
        return [*best, f"compare them: {command}"]

    def _command(self) -> str:
        scored = [folder for folder in self.folders if (folder / "evaluation" / self.split).is_dir()]
        homes = list(dict.fromkeys(str(folder.parent.parent) for folder in scored))
        if len(scored) < 2:
            return ""
        runs = f"runs={homes[0]}" if len(homes) == 1 else f"runs=[{','.join(homes)}]"
        split = "" if self.split == "test" else f" evaluate.split={self.split}"
        return f"{program()} stage=report {shlex.quote(runs)}{split}"


def numbered(number: int, sweeper: Any, words: Sequence[str]) -> str:
    """'2/6': of the points that Hydra's basic sweeper makes of the command line, or of a search's trials; else '2'.

    sweeper: `hydra.sweeper`; words: those of the command line.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    if total := sweeper.get("n_trials"):
        return f"{number}/{total}"
    given = [f"{name}={values}" for name, values in (sweeper.get("params") or {}).items()]
    given += [word for word in words if "=" in word and not word.startswith(("-", "hydra.", "hydra/"))]
    sizes: dict[str, int] = {}
    for override in OverridesParser.create().parse_overrides(given):
        if isinstance(override.value(), Glob):
            return str(number)
        is_swept = override.is_sweep_override()
        sizes[override.get_key_element()] = len(list(override.sweep_iterator())) if is_swept else 1
    return f"{number}/{math.prod(sizes.values())}"
