"""Greedy captions of the validation images and their CIDEr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cgtgan.assets.images import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import Decoder
from cgtgan.evaluation.coco_files import save_results
from cgtgan.evaluation.metrics import score_captions
from cgtgan.runtime.artifacts import Embeddings
from cgtgan.training.parts import TrainingParts


@dataclass(frozen=True)
class Validation:
    """CIDEr and captions of the validation images; `per_image` CIDEr in the first process alone."""

    cider: float
    captions: dict[Any, str]
    per_image: dict[Any, float]


def validate(ws: Workspace, parts: TrainingParts, val: Embeddings, step: int) -> Validation:
    """Score greedy captions of the validation images and write them; each process captions its share."""
    devices, read = parts.devices, parts.read.get("val")
    rows = devices.share(range(len(val.ids)))
    share = slice(rows[0], rows[-1] + 1) if rows else slice(0)
    vectors = val.vectors[share] if read is None else read[share]
    with devices.autocast():
        captions = Decoder(parts.averaged, ws.cfg.decode, ws.device).greedy(vectors)
    by_id = dict(zip(val.ids, devices.gather(captions), strict=True))
    per_image: dict[Any, float] = {}

    def score() -> float:
        save_results(ws.run / "validation" / f"step_{step:06d}.json", by_id)
        references = {i: dataset_split(ws, "val").references[i] for i in by_id}
        scores = score_captions(by_id, references, ("cider",))
        per_image.update({i: columns["CIDEr"] for i, columns in scores.per_image.items()})
        return scores.corpus["CIDEr"]

    return Validation(devices.from_first(score), by_id, per_image)
