"""A multirun in one process: a line per run, and at the end the command that compares them. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cgtgan.config import Config
from cgtgan.errors import program
from cgtgan.run_identity import run_folder
from cgtgan.runtime.artifacts import read_json


class Points:
    """The runs of this process that are done."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.split = ""

    def done(self, cfg: Config, number: int, overrides: Sequence[str], seconds: float) -> str:
        """'run 2, seed=1: CIDEr 45.6 of the test images, 73 s'; without a score the run's time alone."""
        self.folders.append(run_folder(cfg))
        self.split = cfg.evaluate.split
        file = self.folders[-1] / "evaluation" / self.split / "cgtgan" / "scores.json"
        cider = read_json(file)["scores"].get("CIDEr") if file.is_file() else None
        score = "" if cider is None else f"CIDEr {100 * cider:.1f} of the {self.split} images, "
        return f"run {number}, {' '.join(overrides) or 'no overrides'}: {score}{seconds:.0f} s"

    def command(self) -> str:
        """How to compare the runs; empty where fewer than two have scores."""
        scored = [folder for folder in self.folders if (folder / "evaluation" / self.split).is_dir()]
        homes = list(dict.fromkeys(str(folder.parent.parent) for folder in scored))
        if len(scored) < 2:
            return ""
        runs = f"runs={homes[0]}" if len(homes) == 1 else f"runs=[{','.join(homes)}]"
        split = "" if self.split == "test" else f" evaluate.split={self.split}"
        return f"compare them: {program()} stage=report {shlex.quote(runs)}{split}"
