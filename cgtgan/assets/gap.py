"""The run's closure of the modality gap, made from its unlabelled images and its corpus, and kept in checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cgtgan.assets.aggregated import aggregated_embeddings
from cgtgan.assets.consensus import most_agreed, sentence_table
from cgtgan.assets.corpus import sentence_embeddings
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.errors import InputError
from cgtgan.method.consensus import SentenceTable
from cgtgan.method.gap import Gap, closed_gap

FILE = "gap.safetensors"


def gap_of(ws: Workspace, kind: str | None = None) -> Gap:
    """The run's closure, or the one of another `kind`, by its training images and its corpus."""
    kind = kind or ws.cfg.gap.kind
    if kind == "none":
        return Gap()
    return ws.once(("gap", kind), lambda: _closed(ws, kind))


def _closed(ws: Workspace, kind: str) -> Gap:
    t = ws.cfg.gap.t or ws.cfg.aggregation_t.temperatures[0]
    table = sentence_table(ws) if kind == "agreement" else None
    return closed_gap(kind, image_embeddings(ws, "train").vectors, sentence_embeddings(ws).vectors, t, table)


def gap_identity(ws: Workspace, gap: Gap) -> dict[str, Any]:
    """What an initial generator that reads changed texts was made from; nothing for one that reads them as they are."""
    return {"gap": gap.kind, "images": image_embeddings(ws, "train").header.fingerprint} if gap.changes_texts else {}


@dataclass(frozen=True)
class ReadImages:
    """A split as the generator reads it: `[rows]` gives (n, D) float32, closed when it is asked for."""

    vectors: Tensor
    gap: Gap

    def __getitem__(self, rows: Any) -> Tensor:
        return self.gap.images(self.vectors[rows])

    def __len__(self) -> int:
        return len(self.vectors)


def read_images(ws: Workspace, split: str, gap: Gap | None = None) -> ReadImages:
    """The images of a split as a generator with `gap`, or the run's, reads them; what is slow is made once."""
    gap = gap_of(ws) if gap is None else gap
    if gap.kind == "projection":
        return ReadImages(aggregated_embeddings(ws, split, gap.t).vectors, Gap())
    if gap.kind == "agreement":
        return ReadImages(sentence_embeddings(ws).vectors[most_agreed(ws, split)].float().mean(1), Gap())
    return ReadImages(image_embeddings(ws, split).vectors, gap)


def save_gap(folder: Path, gap: Gap) -> None:
    """Beside a generator's weights, so that captioning needs nothing else; no file where the gap is left as it is."""
    if gap.kind != "none":
        settings = {"kind": gap.kind, "unit": gap.unit, "t": gap.t}
        save_file(gap.tensors(), folder / FILE, {"gap": json.dumps(settings)})


def load_gap(folder: Path) -> Gap:
    """What `save_gap` wrote; the open gap where there is no file. Raises `InputError` for a damaged one."""
    path = folder / FILE
    if not path.is_file():
        return Gap()
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
            table = {name.removeprefix("table."): tensors.pop(name) for name in [*tensors] if name.startswith("table.")}
            settings = json.loads(f.metadata()["gap"])
            return Gap(**settings, **tensors, table=SentenceTable(**table) if table else None)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not whole ({error}): take the checkpoint before it, or train again") from None


def check_gap(folder: Path, gap: Gap) -> None:
    """Raise `InputError` if the generator in `folder` was trained to read images with another closure than the run's.

    One without a closure may go on with any: the initial generator has none either.
    """
    stored = load_gap(folder)
    if stored.kind not in ("none", gap.kind):
        raise InputError(
            f"the generator in {folder} was trained with gap={stored.kind} and this run has gap={gap.kind}: set "
            f"gap={stored.kind}, or start from another generator"
        )
