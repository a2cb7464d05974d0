"""What the baselines of an evaluation caption with: sentences that are there already, or a generator and its input."""

from __future__ import annotations

from torch import Tensor

from cgtgan.assets.aggregated import aggregated_embeddings
from cgtgan.assets.consensus import most_agreed
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.gap import gap_of
from cgtgan.assets.generators import initial_generator
from cgtgan.assets.images import data_root, image_embeddings
from cgtgan.assets.prompts import prompts_of
from cgtgan.assets.reader import Reader
from cgtgan.assets.workspace import Workspace
from cgtgan.evaluation.coco_files import load_results
from cgtgan.method.aggregation import nearest_texts
from cgtgan.method.gap import Gap
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.models.prompted import Read


def written_captions(ws: Workspace, method: str, split: str) -> list[str] | None:
    """One caption per image of the split for `nearest`, `consensus` and `human`; None for a method with a generator."""
    images = image_embeddings(ws, split)
    if method == "human":
        captions = load_results(data_root(ws) / f"human_{split}.json")
        return [captions[i] for i in images.ids]
    if method == "nearest":
        rows = nearest_texts(images.vectors, sentence_embeddings(ws).vectors, 1, device=ws.device)[:, 0]
        sentences = corpus_sentences(ws)[0]
        return [sentences[int(i)] for i in rows]
    if method == "consensus":
        sentences = corpus_sentences(ws)[0]
        return [sentences[int(i)] for i in most_agreed(ws, split)[:, 0]]
    return None


def baseline_generator(ws: Workspace, method: str, split: str) -> tuple[GeneratorBundle, Read]:
    """The generator of `init`, `mean_shift` or `projection`, and the images of the split as it reads them."""
    bundle, vectors = _generator_and_vectors(ws, method, split)
    images = image_embeddings(ws, split).vectors
    return bundle, Reader(bundle, prompts=prompts_of(ws)).prompted(vectors, images)


def _generator_and_vectors(ws: Workspace, method: str, split: str) -> tuple[GeneratorBundle, Tensor]:
    images = image_embeddings(ws, split).vectors
    bundle = initial_generator(ws, gap=Gap())
    if method == "projection":
        return bundle, aggregated_embeddings(ws, split, ws.cfg.evaluate.projection_t).vectors
    if method == "mean_shift":
        return bundle, gap_of(ws, "mean").images(images)
    return bundle, images
