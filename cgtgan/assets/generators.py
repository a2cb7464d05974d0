"""Generators trained by cross-entropy: the initial one on text alone, and the supervised bound on pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.checkpoints import init_checkpoint
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.images import data_root, image_embeddings
from cgtgan.assets.optimizer import Optimizer
from cgtgan.assets.training_state import load_state, save_state, state_tensors
from cgtgan.assets.workspace import Workspace
from cgtgan.config import InitializeConfig, TrainConfig, as_dict
from cgtgan.data.corpora import clean_captions
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.datasets import load_pairs
from cgtgan.errors import InputError
from cgtgan.method.batches import EpochOrder, stable_seed
from cgtgan.models.chunks import pad_rows
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator, make_generator, make_tokenizer
from cgtgan.runtime.artifacts import atomic_path, fingerprint


@dataclass(frozen=True)
class Pairs:
    """texts[i] is to be rebuilt from vectors[rows[i]]; vectors (N, D)"""

    texts: Sequence[str]
    vectors: Tensor
    rows: Sequence[int]


def initial_generator(ws: Workspace) -> GeneratorBundle:
    """The generator that knows the corpus and no image: text only; or the one that `train.init_from` names."""
    if ws.cfg.train.init_from:
        return load_generator(init_checkpoint(ws))
    sentences, _, _ = corpus_sentences(ws)
    if not ws.cfg.train.use_initialization:
        return _fresh(ws, sentences, sentence_embeddings(ws).header.dim)
    embeddings = sentence_embeddings(ws)
    producer = _producer(ws) | {"sentences": embeddings.header.fingerprint}
    return _made(
        ws,
        "initial",
        producer,
        sentences,
        Pairs(sentences, embeddings.vectors, range(len(sentences))),
        ws.cfg.initialize,
    )


def supervised_generator(ws: Workspace) -> GeneratorBundle:
    """The same generator trained on (image embedding, caption) pairs: a bound.

    By the recipe of `initialize` without its noise, for as many updates as initialisation and GAN training have together.
    """
    sentences, _, _ = corpus_sentences(ws)
    texts, rows, source = caption_pairs(ws)
    images = image_embeddings(ws, "train")
    c = ws.cfg.initialize
    steps = initialization_steps(c, len(sentences)) + total_steps(ws.cfg.train, len(images.ids))
    producer = (
        _producer(ws)
        | source
        | {"images": images.header.fingerprint, "tokens_from": fingerprint(list(sentences)), "steps": steps}
    )
    return _made(
        ws,
        "supervised",
        producer,
        sentences,
        Pairs(texts, images.vectors, rows),
        replace(c, steps=steps, noise_std=0.0),
    )


def caption_pairs(ws: Workspace) -> tuple[list[str], list[int], dict[str, Any]]:
    """Captions of the train images and the embedding row of each, for the supervised bound alone, and what they come from."""
    captions = load_pairs(ws.cfg.dataset, data_root(ws))
    rows = {image_id: row for row, image_id in enumerate(image_embeddings(ws, "train").ids)}
    # cleaned by the data set's own rule, whatever the corpus is, so that a caption ends in the stop token
    rule = KINDS[ws.cfg.dataset.kind].caption_rule
    listed = [(text, rows[i]) for i, texts in captions.items() if i in rows for text in clean_captions(rule, texts)]
    if not listed:
        raise InputError("evaluate.baselines has 'supervised' and no train image has a caption: leave 'supervised' out")
    texts, places = [t for t, _ in listed], [r for _, r in listed]
    return texts, places, {"pairs": fingerprint(listed)}


def initialization_steps(c: InitializeConfig, sentences: int) -> int:
    return c.steps or math.ceil(sentences * c.epochs / c.batch_size)


def total_steps(t: TrainConfig, images: int) -> int:
    """Optimiser steps of GAN training."""
    return t.steps or math.ceil(images / t.batch_size) * t.epochs


def _producer(ws: Workspace) -> dict[str, Any]:
    config = as_dict(ws.cfg.initialize)
    del config["checkpoint_every"]
    return {
        "generator": as_dict(ws.cfg.generator),
        "initialize": config,
        "dropout": ws.cfg.train.dropout,
        "seed": ws.cfg.seed,
    }


def _fresh(ws: Workspace, sentences: Sequence[str], dim: int) -> GeneratorBundle:
    tokenizer = make_tokenizer(ws.cfg.generator, sentences)
    return make_generator(ws.cfg.generator, tokenizer, dim, stable_seed(ws.cfg.seed, "generator"))


def _made(
    ws: Workspace, kind: str, producer: dict[str, Any], sentences: Sequence[str], pairs: Pairs, recipe: InitializeConfig
) -> GeneratorBundle:
    path = ws.store.path(f"generator_{kind}", producer, "")

    def write(folder: Path) -> None:
        bundle = _fresh(ws, sentences, pairs.vectors.shape[1])
        _reconstruct(ws, kind, bundle, pairs, recipe, folder)

    ws.store.make(path, write)
    return load_generator(path)


def _reconstruct(
    ws: Workspace, kind: str, bundle: GeneratorBundle, pairs: Pairs, c: InitializeConfig, path: Path
) -> None:
    """Cross-entropy of each text given its vector; a killed run goes on from its last state."""
    seed, device = ws.cfg.seed, ws.device
    model = bundle.model.to(device).train(ws.cfg.train.dropout)
    row_of = torch.as_tensor(list(pairs.rows))
    steps = initialization_steps(c, len(pairs.texts))
    optimizer = Optimizer(model, c.optimizer, steps)
    order = EpochOrder(len(pairs.texts), seed, kind)
    state = path.with_name(f"{path.name}.training")
    done = load_state(state, {"generator": model}, {"generator": optimizer})["step"] if state.is_file() else 0
    with ws.tracker.progress("initialising on text" if kind == "initial" else "supervised bound", steps, done) as bar:
        for step in range(done + 1, steps + 1):
            chosen = order.batch(step, c.batch_size)
            embedding = pairs.vectors[row_of[torch.from_numpy(chosen)]].float()
            if c.noise_std:
                noise = torch.Generator().manual_seed(stable_seed(seed, "noise", step))
                embedding = embedding + c.noise_std * torch.randn(embedding.shape, generator=noise)
            tokens, mask = pad_rows(_tokenized(bundle, [pairs.texts[int(i)] for i in chosen]))
            loss = model.reconstruction_loss(embedding.to(device), tokens.to(device), mask.to(device))
            optimizer.step(loss, step)
            if step % c.checkpoint_every == 0 and step < steps:
                with atomic_path(state) as beside:
                    save_state(beside, state_tensors({"generator": model}, {"generator": optimizer}), {"step": step})
            bar.advance(note=f"loss {loss.item():.3f}")
    with atomic_path(path) as beside:
        bundle.save(beside)
    state.unlink(missing_ok=True)


def _tokenized(bundle: GeneratorBundle, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text; one too long for the language model's positions is cut, without a stop token that it does not have there."""
    positions = getattr(bundle.model.gpt.config, "max_position_embeddings", None)
    room = positions - bundle.config.prefix_length if positions else None
    return [ids[:room] for ids in bundle.tokenizer.encode(texts)]
