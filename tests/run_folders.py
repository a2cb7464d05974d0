"""Run folders as a run leaves them, with made-up scores: for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cgtgan.config import Config
from cgtgan.run_identity import scientific_settings

STEPS = (10, 20, 30)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_run(
    root: Path,
    variant: str,
    seed: int,
    scores: Mapping[str, Sequence[float]],
    *,
    experiment: str = "exp",
    split: str = "test",
    decoding: str = "greedy",
    references: str = "abc",
    ids: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    steps: Sequence[int] = STEPS,
) -> Path:
    """A run whose methods have these CIDErs per image; ROUGE-L is half of it, corpus BLEU-4 no mean of the images."""
    folder = root / experiment / variant / f"seed={seed}"
    given = {
        "dataset.name": "demo",
        "dataset.kind": "demo",
        "corpus.name": "demo",
        "clip_backbone.kind": "demo",
    } | dict(settings or {})
    write(folder / "settings.json", scientific_settings(Config()) | {"name": experiment, "seed": seed} | given)
    for method, cider in scores.items():
        home = folder / "evaluation" / split / method
        rows = [
            {"image_id": i, "BLEU-4": 0.3, "METEOR": 0.2, "ROUGE-L": v / 2, "CIDEr": v}
            for i, v in zip(ids or range(len(cider)), cider, strict=True)
        ]
        corpus = {"BLEU-4": 0.25, "METEOR": 0.2, "ROUGE-L": float(np.mean(cider)) / 2, "CIDEr": float(np.mean(cider))}
        about = {"failed": {}, "excluded": [], "tokenizer": "ptb", "images": len(cider), "decoding": decoding}
        write(home / "per_image.json", rows)
        write(
            home / "captions.json",
            [{"image_id": r["image_id"], "caption": f"{method} of {variant}, {r['image_id']}"} for r in rows],
        )
        write(home / "scores.json", {"scores": corpus} | about | {"made_from": {"references": references}})
    history = [{"step": s, "eval/CIDEr": s / 100 + seed, "train/kl": 0.1 * seed, "reward/cos": None} for s in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    return folder
