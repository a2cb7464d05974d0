"""The supervised bound: the same generator trained by cross-entropy on image embeddings and their captions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cgtgan.assets.corpus import corpus_sentences
from cgtgan.assets.generators import (
    GeneratorRecipe,
    Pairs,
    Validation,
    generator_path,
    generator_settings,
    initialization_steps,
    made_generator,
    total_steps,
)
from cgtgan.assets.images import data_root, dataset_split, image_embeddings
from cgtgan.assets.prompts import prompts_of
from cgtgan.assets.reader import Reader
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import Decoder
from cgtgan.data.corpora import clean_captions
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.datasets import load_pairs
from cgtgan.errors import InputError
from cgtgan.evaluation.metrics import score_captions
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.runtime.artifacts import fingerprint

KIND = "supervised"


@dataclass(frozen=True)
class SupervisedBound:
    """Where the generator lies, or will lie, and all that it is made of."""

    path: Path
    producer: dict[str, Any]
    pairs: Pairs
    recipe: GeneratorRecipe


def supervised_generator(ws: Workspace) -> GeneratorBundle:
    """Trained as `evaluate.supervised` says, or taken from the artifacts."""
    bound = _bound(ws)
    return made_generator(ws, KIND, bound.producer, corpus_sentences(ws)[0], bound.pairs, bound.recipe)


def supervised_path(ws: Workspace) -> Path:
    """The artifact's folder, whether it is made yet or not."""
    return _bound(ws).path


def _bound(ws: Workspace) -> SupervisedBound:
    return ws.once("supervised bound", lambda: _described(ws))


def _described(ws: Workspace) -> SupervisedBound:
    """By the recipe of `initialize` without its noise, with what `evaluate.supervised` sets in its place."""
    chosen, sentences, images = ws.cfg.evaluate.supervised, corpus_sentences(ws)[0], image_embeddings(ws, "train")
    pairs, source = _caption_pairs(ws)
    config = ws.cfg.initialize
    if chosen.lr is not None:
        config = replace(config, optimizer=replace(config.optimizer, lr=chosen.lr))
    if chosen.label_smoothing is not None:
        config = replace(config, label_smoothing=chosen.label_smoothing)
    dropout = ws.cfg.train.dropout if chosen.dropout is None else chosen.dropout
    both = initialization_steps(config, len(sentences)) + total_steps(ws.cfg.train, len(images.ids))
    steps = chosen.steps or both
    made_of = {"images": images.header.fingerprint, "tokens_from": fingerprint(list(sentences)), "steps": steps}
    producer = generator_settings(ws, config, dropout=dropout) | source | made_of
    validation = None
    if chosen.validate_every:
        validation, scored = _validation(ws, chosen.validate_every)
        producer |= {"validation": scored}
    recipe = GeneratorRecipe(replace(config, steps=steps, noise_std=0.0, noise="raw"), dropout, validation)
    return SupervisedBound(generator_path(ws, KIND, producer), producer, pairs, recipe)


def _caption_pairs(ws: Workspace) -> tuple[Pairs, dict[str, Any]]:
    """Captions of the train images, each one's embedding row, and what they come from."""
    known = {image.image_id for image in dataset_split(ws, "train").images}
    captions = load_pairs(ws.cfg.dataset, data_root(ws), known)
    images = image_embeddings(ws, "train")
    rows = {image_id: row for row, image_id in enumerate(images.ids)}
    # cleaned by the data set's own rule, whatever the corpus is, so that a caption ends in the stop token
    rule = KINDS[ws.cfg.dataset.kind].caption_rule
    listed = [(text, rows[i]) for i, texts in captions.items() if i in rows for text in clean_captions(rule, texts)]
    if not listed:
        raise InputError("evaluate.baselines has 'supervised' and no train image has a caption: leave 'supervised' out")
    texts, places = [t for t, _ in listed], [r for _, r in listed]
    return Pairs(texts, images.vectors, places), {"pairs": fingerprint(listed)}


def _validation(ws: Workspace, every: int) -> tuple[Validation, dict[str, Any]]:
    """CIDEr of greedy captions of the validation images, and what it depends on."""
    images, references = image_embeddings(ws, "val"), dataset_split(ws, "val").references
    if not references:
        raise InputError(
            f"evaluate.supervised.validate_every={every} needs references of the val images: leave it out, and the "
            "last step is kept"
        )
    listed = {i: references[i] for i in images.ids}

    def cider(bundle: GeneratorBundle) -> float:
        read = Reader(bundle, prompts=prompts_of(ws)).images(images.vectors)
        captions = Decoder(bundle, ws.cfg.decode, ws.device).greedy(read)
        return score_captions(dict(zip(images.ids, captions, strict=True)), listed, ("cider",)).corpus["CIDEr"]

    scored = {"every": every, "images": images.header.fingerprint, "references": fingerprint(list(listed.items()))}
    return Validation(every, cider), scored
