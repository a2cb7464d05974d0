"""Generators trained by cross-entropy: the initial one on text alone, and the supervised bound on pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.checkpoints import init_checkpoint
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.gap import check_gap, gap_identity, gap_of
from cgtgan.assets.images import data_root, image_embeddings
from cgtgan.assets.optimizer import Optimizer
from cgtgan.assets.released import generator_producer
from cgtgan.assets.training_state import load_state, save_state, state_tensors
from cgtgan.assets.workspace import Workspace
from cgtgan.config import InitializeConfig, TrainConfig
from cgtgan.data.corpora import clean_captions
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.datasets import load_pairs
from cgtgan.errors import InputError
from cgtgan.method.batches import EpochOrder, stable_seed
from cgtgan.method.gap import Gap, noised
from cgtgan.method.pairs import pseudo_pairs
from cgtgan.models.chunks import pad_rows
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator, make_generator, make_tokenizer
from cgtgan.runtime.artifacts import atomic_path, fingerprint
from cgtgan.runtime.devices import Devices
from cgtgan.runtime.fingerprints import check_as_written
from cgtgan.runtime.producers import settings_of, with_format
from cgtgan.runtime.shards import POLL_SECONDS

GENERATORS_FORMAT = 1  # raise it where the same settings train another generator (runtime/producers.py)

Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]  # vectors (B, D), tokens and mask (B, L), weights (B,)


@dataclass(frozen=True)
class Pairs:
    """texts[i] is to be rebuilt from read(vectors[rows[i]]); vectors (N, D), weights (len(texts),): of its tokens"""

    texts: Sequence[str]
    vectors: Tensor
    rows: Sequence[int]
    read: Callable[[Tensor], Tensor] = Tensor.float
    weights: Tensor | None = None


def initial_generator(ws: Workspace, devices: Devices | None = None, gap: Gap | None = None) -> GeneratorBundle:
    """The generator that knows the corpus and no pair: from text alone, or from pseudo-pairs; or `train.init_from`.

    devices: all processes of the job, which then make it together; None where this process comes here alone. gap: how
    it reads texts; None: as the run does.
    """
    gap = gap_of(ws) if gap is None else gap
    if ws.cfg.train.init_from:
        folder = init_checkpoint(ws)
        check_gap(folder, gap)
        return load_generator(folder)
    sentences, _, _ = corpus_sentences(ws)
    if not ws.cfg.train.use_initialization:
        return _fresh(ws, sentences, sentence_embeddings(ws).header.dim)
    embeddings = sentence_embeddings(ws)
    producer = _producer(ws) | {"sentences": embeddings.header.fingerprint} | gap_identity(ws, gap)
    if ws.cfg.initialize.pairs == "pseudo":
        producer |= {"images": image_embeddings(ws, "train").header.fingerprint, "gap": gap.kind}
        return _made(
            ws, "initial", producer, sentences, lambda: _pseudo(ws, sentences, gap), ws.cfg.initialize, devices
        )
    pairs = Pairs(sentences, embeddings.vectors, range(len(sentences)), read=gap.texts)
    return _made(ws, "initial", producer, sentences, pairs, ws.cfg.initialize, devices)


def supervised_generator(ws: Workspace) -> GeneratorBundle:
    """The same generator trained on (image embedding, caption) pairs: a bound.

    By the recipe of `initialize` without its noise, for as many updates as initialisation and GAN training have
    together.
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
        replace(c, steps=steps, noise_std=0.0, noise="raw"),
    )


def _pseudo(ws: Workspace, sentences: Sequence[str], gap: Gap) -> Pairs:
    """Sentences, and the unlabelled images that CLIP finds for them."""
    images = image_embeddings(ws, "train").vectors
    found = pseudo_pairs(images, sentence_embeddings(ws).vectors, ws.device)
    texts = [sentences[int(i)] for i in found.sentence]
    return Pairs(texts, images, found.image.tolist(), gap.images, found.weight)


def caption_pairs(ws: Workspace) -> tuple[list[str], list[int], dict[str, Any]]:
    """Captions of the train images, each one's embedding row, and what they come from: for the supervised bound."""
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
    config = settings_of(ws.cfg.initialize)
    del config["checkpoint_every"]
    producer = generator_producer(ws.cfg.generator, ws.store) | {
        "initialize": config,
        "dropout": ws.cfg.train.dropout,
        "seed": ws.cfg.seed,
    }
    return with_format(producer, GENERATORS_FORMAT)


def _fresh(ws: Workspace, sentences: Sequence[str], dim: int) -> GeneratorBundle:
    tokenizer = make_tokenizer(ws.cfg.generator, sentences)
    return make_generator(ws.cfg.generator, tokenizer, dim, stable_seed(ws.cfg.seed, "generator"))


def _made(
    ws: Workspace, kind: str, producer: dict[str, Any], sentences: Sequence[str], pairs: Pairs | Callable[[], Pairs],
    recipe: InitializeConfig, devices: Devices | None = None,
) -> GeneratorBundle:  # fmt: skip
    path = ws.store.path(f"generator_{kind}", producer, "")
    devices = devices or Devices(ws.device)

    def write(folder: Path) -> None:
        given = pairs() if callable(pairs) else pairs
        bundle = _fresh(ws, sentences, given.vectors.shape[1])
        _reconstruct(ws, kind, bundle, given, recipe, folder, devices)

    _make_together(ws, devices, path, write)
    check_as_written(path / "generator.safetensors", f"remove {path} and it is made again")
    return load_generator(path)


def _make_together(ws: Workspace, devices: Devices, path: Path, write: Callable[[Path], None]) -> None:
    """`ArtifactStore.make` by all processes of a job: the first one holds the lock, `write` is called in each."""
    if devices.world == 1:
        ws.store.make(path, write)
        return
    with ExitStack() as held:
        # nobody waits in the group for another job's lock: that would look like a process that died
        while (claim := devices.from_first(lambda: ws.store.claim(path, held))) == "busy":
            time.sleep(POLL_SECONDS)
        if claim == "free":
            write(path)
        devices.from_first(path.exists)  # nobody goes on before it is there


def _reconstruct(
    ws: Workspace, kind: str, bundle: GeneratorBundle, pairs: Pairs, c: InitializeConfig, path: Path, devices: Devices
) -> None:
    """Cross-entropy of each text given its vector; a killed run goes on from its last state."""
    seed = ws.cfg.seed
    if c.noise == "unit" and not bundle.config.normalize_prefix:
        ws.tracker.say(
            "initialize.noise=unit: the generator reads vectors of length 1 here and raw ones later; with "
            "generator.normalize_prefix=true it reads vectors of length 1 everywhere"
        )
    model = bundle.model.to(devices.device).train(ws.cfg.train.dropout)
    row_of = torch.as_tensor(list(pairs.rows))
    steps = initialization_steps(c, len(pairs.texts))
    optimizer = Optimizer(model, c.optimizer, steps)
    order = EpochOrder(len(pairs.texts), seed, kind)
    state = path.with_name(f"{path.name}.training")
    there = devices.from_first(state.is_file)
    done = load_state(state, {"generator": model}, {"generator": optimizer})["step"] if there else 0
    with ws.tracker.progress("initialising on text" if kind == "initial" else "supervised bound", steps, done) as bar:
        for step in range(done + 1, steps + 1):
            chosen = order.batch(step, c.batch_size)
            vectors = pairs.read(pairs.vectors[row_of[torch.from_numpy(chosen)]])
            vectors = noised(vectors, c.noise_std, c.noise, stable_seed(seed, "noise", step))
            tokens, mask = pad_rows(_tokenized(bundle, [pairs.texts[int(i)] for i in chosen]))
            if ws.cfg.train.dropout and devices.world > 1:  # each process has its own masks
                torch.manual_seed(stable_seed(seed, "initialize dropout", step, devices.number))
            weights = None if pairs.weights is None else pairs.weights[torch.from_numpy(chosen)]
            loss = _update(model, optimizer, devices, step, (vectors, tokens, mask, weights), c.label_smoothing)
            if step % c.checkpoint_every == 0 and step < steps and devices.first:
                with atomic_path(state) as beside:
                    save_state(beside, state_tensors({"generator": model}, {"generator": optimizer}), {"step": step})
            bar.advance(note=f"loss {loss:.3f}")
    if devices.first:
        with atomic_path(path) as beside:
            bundle.save(beside)
        state.unlink(missing_ok=True)


def _update(
    model: CaptionGenerator, optimizer: Optimizer, devices: Devices, step: int, batch: Batch, smoothing: float
) -> float:
    """One optimiser step on a batch, shared by the processes; the whole batch's loss."""
    if devices.world == 1:
        loss = _loss(model, batch, slice(None), smoothing)
        optimizer.step(loss, step)
        return loss.item()
    rows = devices.share(range(len(batch[0])))
    optimizer.adamw.zero_grad(set_to_none=True)
    share = torch.zeros((), device=devices.device)
    if rows:  # the mean over this process's tokens, weighted by their number
        mine = slice(rows[0], rows[-1] + 1)
        share = _loss(model, batch, mine, smoothing) * (batch[2][mine].sum() / batch[2].sum().item())
        share.backward()
    devices.sum_gradients(optimizer.parameters)
    loss = devices.sum(share.detach().clone()).item()
    optimizer.finish_step(loss, step)
    return loss


def _loss(model: CaptionGenerator, batch: Batch, rows: slice, smoothing: float) -> Tensor:
    device = next(model.parameters()).device
    vectors, tokens, mask = (x[rows].to(device) for x in batch[:3])
    weights = None if batch[3] is None else batch[3][rows].to(device)
    return model.reconstruction_loss(vectors, tokens, mask, weights, smoothing)


def _tokenized(bundle: GeneratorBundle, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text; one too long for the language model's positions is cut, and then ends without a stop token."""
    positions = getattr(bundle.model.gpt.config, "max_position_embeddings", None)
    room = positions - bundle.config.prefix_length if positions else None
    return [ids[:room] for ids in bundle.tokenizer.encode(texts)]
