"""One run folder as it lies on the disk: settings, logged rows, scores, captions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cgtgan.assets.scores import per_image_rows
from cgtgan.evaluation.coco_files import load_results
from cgtgan.evaluation.records import WITHOUT_GENERATOR, differences, method_of, records_of
from cgtgan.reporting.methods import METHODS, published_scores, reward_title, with_defaults
from cgtgan.reporting.tables import MethodRow, Origin
from cgtgan.runtime.artifacts import read_json
from cgtgan.runtime.stopwatch import TRAINING_SECONDS
from cgtgan.runtime.tracking import read_metrics

VALIDATION_BASELINES = Path("validation", "baselines.json")
SECONDS = "seconds.json"  # of the baselines' generators, by their names
_TERM_WEIGHT = re.compile(r"reward_weights\.terms\.[^.]+\.weight")


@dataclass(frozen=True)
class Run:
    """The files of a run folder; scores and captions are those of `split`.

    record: the one that is looked at in the place of its method's usual one (evaluation/records.py); "": none.
    """

    folder: Path
    split: str
    record: str = ""

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_json(self.folder / "settings.json")

    @property
    def _home(self) -> Path:
        return self.folder / "evaluation" / self.split

    def _file(self, method: str, name: str) -> Path:
        if method_of(self.record) == method:
            return self._home / self.record / name
        # where only others were scored, the first of them stands for the method
        return next(iter(records_of(self._home, method)), self._home / method) / name

    @property
    def scored(self) -> list[str]:
        return [method for method in METHODS if self._file(method, "scores.json").is_file()]

    def records(self) -> list[Run]:
        """The run as each of its score records shows it: of every method the usual one first."""
        places = [place for method in METHODS for place in records_of(self._home, method)]
        return [replace(self, record=place.name) for place in places]

    @property
    def method(self) -> str:
        return method_of(self.record)

    def differs(self, *skip: str) -> str:
        """What the captions of `record` are made of that those of the usual one are not; the decoding has a column."""
        if self.record in METHODS:
            return ""
        record, usual = self.scores(self.method), self._home / self.method / "scores.json"
        known = read_json(usual) if usual.is_file() else {"made_from": {"checkpoint": None}}
        different = differences(self.method, record, known, skip=("decode", *skip))
        if known["made_from"] == {"checkpoint": None}:
            different = {key: text for key, text in different.items() if key == "checkpoint"}
        return ", ".join(different.values())

    def scores(self, method: str) -> dict[str, Any]:
        return read_json(self._file(method, "scores.json"))

    def captions(self, method: str) -> Mapping[Any, str]:
        return load_results(self._file(method, "captions.json"))

    def per_image(self, method: str) -> dict[Any, dict[str, float]]:
        rows = read_json(self._file(method, "per_image.json"), list)
        return {row["image_id"]: {m: value for m, value in row.items() if m != "image_id"} for row in rows}

    def counts(self, method: str) -> dict[Any, dict[str, list[int]]]:
        """What BLEU and METEOR of each image are made of (evaluation/counts.py); empty in a run of version 0.1."""
        return per_image_rows(self._file(method, "counts.json").parent, "counts.json")

    def decoding(self, method: str) -> str:
        return "none" if method in WITHOUT_GENERATOR else self.scores(method)["decoding"]

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def last_step(self) -> int | None:
        """The last logged one."""
        return self.history[-1]["step"] if self.history else None

    def training(self, method: str) -> dict[str, Any]:
        """`updates`, `kept_step` and `seconds` of the training behind a method's captions, as far as they are known."""
        record = self.scores(method)
        if method != "cgtgan":
            training, file = record.get("training") or {}, self.folder / SECONDS
            seconds = (read_json(file) if file.is_file() else {}).get(training.get("generator"))
            return training if seconds is None else {**training, "seconds": seconds}
        kept = re.fullmatch(r"step (\d+)", str(record.get("checkpoint")))  # another run's has its folder in front
        if not kept or not self.last_step:
            return {}
        seconds = [row[TRAINING_SECONDS] for row in self.history if row.get(TRAINING_SECONDS) is not None]
        return {"updates": self.last_step, "kept_step": int(kept[1])} | ({"seconds": seconds[-1]} if seconds else {})

    def validation_baselines(self) -> dict[str, float]:
        """Method -> CIDEr (a fraction) of the baselines on the validation images, in the order of the tables."""
        file = self.folder / VALIDATION_BASELINES
        cider = read_json(file).get("CIDEr", {}) if file.is_file() else {}
        return {method: cider[method] for method in METHODS if method in cider}

    def validations(self) -> dict[int, Path]:
        return {int(p.stem.removeprefix("step_")): p for p in sorted((self.folder / "validation").glob("step_*.json"))}

    def title(self, method: str) -> str:
        if method != "cgtgan":
            return METHODS[method].title
        return f"CgT-GAN ({', '.join(self._training)})"

    def record_title(self) -> str:
        """The title of the record's method, and what differs from the usual record."""
        return ", ".join(filter(None, (self.title(self.method), self.differs())))

    @cached_property
    def _training(self) -> list[str]:
        initialized = with_defaults(self.settings)["train.use_initialization"]
        return reward_title(self.settings) + ([] if initialized else ["no initialisation"])

    @property
    def ablated(self) -> bool:
        """Whether a part of the method is missing; one whose reward has terms of its own does not miss naturalness."""
        weights = {key.split(".")[2]: value for key, value in self.settings.items() if _TERM_WEIGHT.fullmatch(key)}
        another_reward = any(weight for name, weight in weights.items() if name not in ("cos", "l1", "clip"))
        missing = {part for part in self._training if part.startswith("no ")}
        return bool(missing - ({"no naturalness"} if another_reward else set()))

    def published(self, suffix: str = "") -> MethodRow | None:
        """The paper's row, where the run's settings and decoding are the paper's; `suffix` tells several apart."""
        place = self._file("cgtgan", "scores.json").parent.name
        if "cgtgan" not in self.scored or self.decoding("cgtgan") != "greedy" or replace(self, record=place).differs():
            return None
        settings, trained_here = self.settings, (self.folder / "metrics.jsonl").is_file()
        scores = published_scores(settings, self.split, trained_here=trained_here)
        if scores is None:
            return None
        images = f"{settings['dataset.name']} test images"
        note = f"the paper's figures; {images}, {settings['corpus.name']} corpus, ViT-L/14"
        values, origin = {metric: [value] for metric, value in scores.items()}, Origin("published")
        name = f"CgT-GAN as published{suffix}"
        return MethodRow(name, note, values, "published", decoding="greedy", origin=origin)
