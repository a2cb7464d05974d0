"""Scores of the paper (ViT-L/14, greedy, Karpathy's test images), to stand beside a run's own; docs/reproduction.md has the same table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
DECODING = "greedy"
# (test images, corpus): figures as printed, x 100. Where the two differ the generator was trained on the corpus' own data set.
FIGURES = {
    ("coco", "coco"): (30.3, 26.9, 54.5, 108.1, 20.5),
    ("flickr30k", "flickr30k"): (24.1, 22.6, 48.2, 64.9, 16.1),
    ("flickr30k", "coco"): (17.3, 19.6, 43.9, 47.5, 12.9),
    ("coco", "flickr30k"): (15.2, 19.4, 40.9, 58.7, 13.4),
}


def published_scores(settings: Mapping[str, Any], split: str, *, trained_here: bool) -> dict[str, float] | None:
    """The paper's scores, as fractions, of a run with these `settings`; None where its setting is not one of the paper's.

    Not the paper's: another backbone, other images than all of the test split's, or, for the rows of transfer, a run that was trained
    on the images it is tested on.
    """
    dataset, corpus = settings["dataset.name"], settings["corpus.name"]
    figures = FIGURES.get((dataset, corpus))
    backbone = (settings["clip_backbone.kind"], settings["clip_backbone.model"])
    if (
        figures is None
        or backbone != ("openai", "ViT-L/14")
        or split != "test"
        or settings["dataset.max_images"] is not None
    ):
        return None
    if dataset != corpus and trained_here:
        return None
    return {column: figure / 100 for column, figure in zip(COLUMNS, figures, strict=True)}
