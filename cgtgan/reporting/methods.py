"""The rows of a comparison, by their name in run folders and settings: the captioner, its baselines, and the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A row of the comparison: its name on the page, what it learns from, and its part of the table (tables.PARTS)."""

    title: str
    note: str
    part: str = ""


# The order is the table's.
METHODS = {
    "init": Method("Initialisation only", "text only; reads the image embedding"),
    "mean_shift": Method("+ mean shift", "text only; image embedding moved by the mean modality gap"),
    "nearest": Method("Nearest sentence", "the corpus sentence nearest to the image"),
    "projection": Method("Projection (as DeCap)", "text only; reads the aggregated embedding"),
    "cgtgan": Method("CgT-GAN", "images and sentences, unpaired"),
    "supervised": Method("Supervised", "the same generator trained on pairs", "bound"),
    "human": Method("Human", "a fresh sentence of the grammar", "bound"),
}

# Scores of the paper (ViT-L/14, greedy, Karpathy's test images); docs/reproduction.md has the same table.
COLUMNS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
# (test images, corpus): figures as printed, x 100. Where they differ, the images for training were the corpus' own.
FIGURES = {
    ("coco", "coco"): (30.3, 26.9, 54.5, 108.1, 20.5),
    ("flickr30k", "flickr30k"): (24.1, 22.6, 48.2, 64.9, 16.1),
    ("flickr30k", "coco"): (17.3, 19.6, 43.9, 47.5, 12.9),
    ("coco", "flickr30k"): (15.2, 19.4, 40.9, 58.7, 13.4),
}


def published_scores(settings: Mapping[str, Any], split: str, *, trained_here: bool) -> dict[str, float] | None:
    """The paper's scores, as fractions, for a run with these `settings`; None where they are not the paper's.

    Not the paper's: another backbone, another split or a part of it, and a transfer row whose run was trained here.
    """
    dataset, corpus = settings["dataset.name"], settings["corpus.name"]
    figures = FIGURES.get((dataset, corpus))
    backbone = (settings["clip_backbone.kind"], settings["clip_backbone.model"])
    whole_test_split = split == "test" and settings["dataset.max_images"] is None
    transfer_trained_here = dataset != corpus and trained_here
    if figures is None or backbone != ("openai", "ViT-L/14") or not whole_test_split or transfer_trained_here:
        return None
    return {column: figure / 100 for column, figure in zip(COLUMNS, figures, strict=True)}
