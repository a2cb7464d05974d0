"""The rows of a comparison: the captioner and its baselines, by their name in run folders and settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A row of the comparison: its name on the page and what it learns from."""

    title: str
    note: str
    bound: bool = False


# The order is the table's.
METHODS = {
    "init": Method("Initialisation only", "text only; reads the image embedding"),
    "mean_shift": Method("+ mean shift", "text only; image embedding moved by the mean modality gap"),
    "nearest": Method("Nearest sentence", "the corpus sentence nearest to the image"),
    "projection": Method("Projection (as DeCap)", "text only; reads the aggregated embedding"),
    "cgtgan": Method("CgT-GAN", "images and sentences, unpaired"),
    "supervised": Method("Supervised", "the same generator trained on pairs", bound=True),
    "human": Method("Human", "a fresh sentence of the grammar", bound=True),
}
