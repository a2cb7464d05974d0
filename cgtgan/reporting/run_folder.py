"""One run folder as it lies on the disk: settings, logged rows, scores, captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cgtgan.evaluation.coco_files import load_results
from cgtgan.reporting.methods import METHODS, published_scores, reward_title, with_defaults
from cgtgan.reporting.tables import MethodRow, Origin
from cgtgan.runtime.artifacts import read_json
from cgtgan.runtime.tracking import read_metrics


@dataclass(frozen=True)
class Run:
    """The files of a run folder; scores and captions are those of `split`."""

    folder: Path
    split: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_json(self.folder / "settings.json")

    def _file(self, method: str, name: str) -> Path:
        return self.folder / "evaluation" / self.split / method / name

    @property
    def scored(self) -> list[str]:
        return [method for method in METHODS if self._file(method, "scores.json").is_file()]

    def scores(self, method: str) -> dict[str, Any]:
        return read_json(self._file(method, "scores.json"))

    def captions(self, method: str) -> Mapping[Any, str]:
        return load_results(self._file(method, "captions.json"))

    def per_image(self, method: str) -> dict[Any, dict[str, float]]:
        rows = read_json(self._file(method, "per_image.json"), list)
        return {row["image_id"]: {m: value for m, value in row.items() if m != "image_id"} for row in rows}

    def decoding(self, method: str) -> str:
        return "none" if method in ("nearest", "human") else self.scores(method)["decoding"]

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def last_step(self) -> int | None:
        """The last logged one."""
        return self.history[-1]["step"] if self.history else None

    def validations(self) -> dict[int, Path]:
        return {int(p.stem.removeprefix("step_")): p for p in sorted((self.folder / "validation").glob("step_*.json"))}

    def title(self, method: str) -> str:
        if method != "cgtgan":
            return METHODS[method].title
        return f"CgT-GAN ({', '.join(self._training)})"

    @cached_property
    def _training(self) -> list[str]:
        initialized = with_defaults(self.settings)["train.use_initialization"]
        return reward_title(self.settings) + ([] if initialized else ["no initialisation"])

    @property
    def ablated(self) -> bool:
        """Whether a part of the method is missing."""
        return any(part.startswith("no ") for part in self._training)

    def published(self, suffix: str = "") -> MethodRow | None:
        """The paper's row, where the run's setting is the paper's; `suffix` tells several of them apart."""
        settings, trained_here = self.settings, (self.folder / "metrics.jsonl").is_file()
        scores = published_scores(settings, self.split, trained_here=trained_here)
        if scores is None:
            return None
        images = f"{settings['dataset.name']} test images"
        note = f"the paper's figures; {images}, {settings['corpus.name']} corpus, ViT-L/14"
        values, origin = {metric: [value] for metric, value in scores.items()}, Origin("published")
        name = f"CgT-GAN as published{suffix}"
        return MethodRow(name, note, values, "published", decoding="greedy", origin=origin)
