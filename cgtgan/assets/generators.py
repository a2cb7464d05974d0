"""Generators trained by cross-entropy: the initial one, and how any is made (training/supervised.py has the bound)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.checkpoints import init_checkpoint
from cgtgan.assets.consensus import most_agreed
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.gap import check_gap, gap_identity, gap_of, read_images
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.optimizer import Optimizer
from cgtgan.assets.prompts import check_prompts, prompt_identity, prompts_of
from cgtgan.assets.released import generator_producer
from cgtgan.assets.training_state import load_state, save_state, state_tensors
from cgtgan.assets.workspace import Workspace
from cgtgan.config import InitializeConfig, TrainConfig
from cgtgan.method.batches import EpochOrder, stable_seed
from cgtgan.method.gap import Gap, noised
from cgtgan.method.pairs import pseudo_pairs
from cgtgan.models.attention import use_float32_attention
from cgtgan.models.chunks import pad_rows
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator, make_generator, make_tokenizer
from cgtgan.models.prompted import Read, read_on
from cgtgan.runtime.artifacts import atomic_path, read_json, write_json
from cgtgan.runtime.devices import Devices, best_precision, keep_freed_memory, on_device
from cgtgan.runtime.fingerprints import check_as_written
from cgtgan.runtime.producers import settings_of, with_format
from cgtgan.runtime.shards import POLL_SECONDS
from cgtgan.runtime.stopwatch import Stopwatch

GENERATORS_FORMAT = 1  # raise it where the same settings train another generator (runtime/producers.py)

TRAINING_FILE = "training.json"  # beside the weights

Batch = tuple[Read, Tensor, Tensor, Tensor | None]  # B vectors, tokens and mask (B, L), weights (B,)


@dataclass(frozen=True)
class Pairs:
    """texts[i] is to be rebuilt from read(vectors[rows[i]]); vectors (N, D), weights (len(texts),): of its tokens"""

    texts: Sequence[str]
    vectors: Tensor
    rows: Sequence[int]
    read: Callable[[Tensor], Tensor] = Tensor.float
    weights: Tensor | None = None


@dataclass(frozen=True)
class Validation:
    """`score` of the generator every `every` steps and after the last one; the step with the highest one is kept."""

    every: int
    score: Callable[[GeneratorBundle], float]


@dataclass(frozen=True)
class GeneratorRecipe:
    """How a generator is trained; without a validation the last step is kept."""

    config: InitializeConfig
    dropout: bool
    validation: Validation | None = None


@dataclass
class BestStep:
    """A copy of the weights with the highest score so far, and every score: [step, score]"""

    model: CaptionGenerator
    validation: Validation
    scores: list[list[float]] = field(default_factory=list)

    def look(self, bundle: GeneratorBundle, step: int, steps: int) -> None:
        """Validate after `step` of `steps` if it is due. The model is left in evaluation mode then."""
        if step % self.validation.every and step != steps:
            return
        score = self.validation.score(bundle)
        if not self.scores or score > max(value for _, value in self.scores):
            self.model.load_state_dict(bundle.model.state_dict())
        self.scores.append([step, score])

    @property
    def step(self) -> int:
        """The first with the highest score."""
        return int(max(self.scores, key=lambda pair: pair[1])[0])


def initial_generator(ws: Workspace, devices: Devices | None = None, gap: Gap | None = None) -> GeneratorBundle:
    """The generator that knows the corpus and no pair: from text alone, or from pseudo-pairs; or `train.init_from`.

    devices: all processes of the job, which then make it together; None where this process comes here alone. gap: how
    it reads texts; None: as the run does.
    """
    gap = gap_of(ws) if gap is None else gap
    if ws.cfg.train.init_from:
        folder = init_checkpoint(ws)
        check_gap(folder, gap)
        check_prompts(folder, ws.cfg.prompt)
        return load_generator(folder)
    sentences, _, _ = corpus_sentences(ws)
    if not ws.cfg.train.use_initialization:
        return _fresh(ws, sentences, sentence_embeddings(ws).header.dim)
    producer, recipe = _initial_recipe(ws, gap)
    if (kind := ws.cfg.initialize.pairs) != "text":
        found = partial(_found_pairs, ws, kind, sentences, gap)
        return made_generator(ws, "initial", producer, sentences, found, recipe, devices)
    pairs = Pairs(sentences, sentence_embeddings(ws).vectors, range(len(sentences)), read=gap.texts)
    return made_generator(ws, "initial", producer, sentences, pairs, recipe, devices)


def initial_path(ws: Workspace, gap: Gap) -> Path | None:
    """The folder of `initial_generator` among the artifacts; None where it is not trained, or elsewhere."""
    if ws.cfg.train.init_from or not ws.cfg.train.use_initialization:
        return None
    return generator_path(ws, "initial", _initial_recipe(ws, gap)[0])


def _initial_recipe(ws: Workspace, gap: Gap) -> tuple[dict[str, Any], GeneratorRecipe]:
    """What the initial generator is made from, and how it is trained."""
    dropout = ws.cfg.train.dropout if ws.cfg.initialize.dropout is None else ws.cfg.initialize.dropout
    recipe = GeneratorRecipe(ws.cfg.initialize, dropout)
    producer = generator_settings(ws, recipe.config, dropout=recipe.dropout)
    producer |= {"sentences": sentence_embeddings(ws).header.fingerprint} | gap_identity(ws, gap)
    if ws.cfg.initialize.pairs != "text":
        producer |= {"images": image_embeddings(ws, "train").header.fingerprint, "gap": gap.kind}
    return producer, recipe


def _found_pairs(ws: Workspace, kind: str, sentences: Sequence[str], gap: Gap) -> Pairs:
    """The pairs of `initialize.pairs=pseudo` or `consensus`: training images and sentences that CLIP finds for them."""
    if kind == "consensus":
        rows = most_agreed(ws, "train")
        chosen, images = rows.flatten(), torch.arange(len(rows)).repeat_interleave(rows.shape[1])
        weights = None
    else:
        chosen, images, weights = pseudo_pairs(
            image_embeddings(ws, "train").vectors, sentence_embeddings(ws).vectors, ws.device
        )
    read = read_images(ws, "train", gap)
    return Pairs([sentences[int(i)] for i in chosen], read.vectors, images.tolist(), read.gap.images, weights)


def initialization_steps(c: InitializeConfig, sentences: int) -> int:
    return c.steps or math.ceil(sentences * c.epochs / c.batch_size)


def total_steps(t: TrainConfig, images: int) -> int:
    """Optimiser steps of GAN training."""
    return t.steps or math.ceil(images / t.batch_size) * t.epochs


def generator_settings(ws: Workspace, recipe: InitializeConfig, *, dropout: bool) -> dict[str, Any]:
    """What a generator trained by `recipe` is made from, without its data."""
    config = settings_of(replace(recipe, precision=best_precision(recipe.precision, ws.device)))
    del config["checkpoint_every"]
    producer = generator_producer(ws.cfg.generator, ws.store) | {
        "initialize": config,
        "dropout": dropout,
        "seed": ws.cfg.seed,
    }
    return with_format(producer | prompt_identity(ws), GENERATORS_FORMAT)


def _fresh(ws: Workspace, sentences: Sequence[str], dim: int) -> GeneratorBundle:
    tokenizer = make_tokenizer(ws.cfg.generator, sentences)
    seed = stable_seed(ws.cfg.seed, "generator")
    return make_generator(ws.cfg.generator, tokenizer, dim, seed, ws.cfg.prompt.length)


def generator_path(ws: Workspace, kind: str, producer: dict[str, Any]) -> Path:
    return ws.store.path(f"generator_{kind}", producer, "")


def made_generator(
    ws: Workspace, kind: str, producer: dict[str, Any], sentences: Sequence[str], pairs: Pairs | Callable[[], Pairs],
    recipe: GeneratorRecipe, devices: Devices | None = None,
) -> GeneratorBundle:  # fmt: skip
    """The generator of `producer` from the artifacts, trained on `pairs` by `recipe` if it is not there yet."""
    path = generator_path(ws, kind, producer)
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
    ws: Workspace, kind: str, bundle: GeneratorBundle, pairs: Pairs, recipe: GeneratorRecipe, path: Path,
    devices: Devices,
) -> None:  # fmt: skip
    """Cross-entropy of each text given its vector; a killed run goes on from its last state."""
    seed, c = ws.cfg.seed, recipe.config
    if c.noise == "unit" and not bundle.config.normalize_prefix:
        ws.tracker.say(
            "initialize.noise=unit: the generator reads vectors of length 1 here and raw ones later; with "
            "generator.normalize_prefix=true it reads vectors of length 1 everywhere"
        )
    if devices.device.type == "cpu":
        keep_freed_memory()
    model = bundle.model.to(devices.device)
    devices.precision = best_precision(c.precision, devices.device)
    if devices.precision == "bf16" and devices.device.type == "cpu":
        use_float32_attention(model.gpt)
    best = None if recipe.validation is None else BestStep(copy.deepcopy(model), recipe.validation)
    row_of = torch.as_tensor(list(pairs.rows))
    steps = initialization_steps(c, len(pairs.texts))
    optimizer = Optimizer(model, c.optimizer, steps)
    order = EpochOrder(len(pairs.texts), seed, kind)
    prompts = prompts_of(ws)
    # an image is as far from the corpus as it will be
    query_noise = ws.cfg.prompt.noise_std if (kind, c.pairs) == ("initial", "text") else 0.0
    state = path.with_name(f"{path.name}.training")
    modules = {"generator": model} | ({} if best is None else {"best": best.model})
    there = devices.from_first(state.is_file)
    meta: dict[str, Any] = (
        load_state(state, modules, {"generator": optimizer}) if there else {"step": 0, "seconds": 0.0}
    )
    done, watch = meta["step"], Stopwatch(meta.get("seconds"))
    if best is not None:
        best.scores += meta.get("scores", [])
    with ws.tracker.progress("initialising on text" if kind == "initial" else "supervised bound", steps, done) as bar:
        for step in range(done + 1, steps + 1):
            model.train(recipe.dropout)
            chosen = order.batch(step, c.batch_size)
            texts, rows = [pairs.texts[int(i)] for i in chosen], row_of[torch.from_numpy(chosen)]
            vectors = pairs.read(pairs.vectors[rows])
            vectors = noised(vectors, c.noise_std, c.noise, stable_seed(seed, "noise", step))
            if prompts is not None:
                wanted = prompts.of_texts(texts, pairs.vectors[rows], query_noise, seed, step)
                vectors = bundle.prompted(vectors, wanted, ws.cfg.prompt.tokens)
            tokens, mask = pad_rows(_tokenized(bundle, texts, ws.cfg.prompt.length))
            if recipe.dropout and devices.world > 1:  # each process has its own masks
                torch.manual_seed(stable_seed(seed, "initialize dropout", step, devices.number))
            weights = None if pairs.weights is None else pairs.weights[torch.from_numpy(chosen)]
            loss = _update(model, optimizer, devices, step, (vectors, tokens, mask, weights), c.label_smoothing)
            if best is not None:
                best.look(bundle, step, steps)
            if step % c.checkpoint_every == 0 and step < steps and devices.first:
                meta = {"step": step} | watch.named("seconds") | ({} if best is None else {"scores": best.scores})
                with atomic_path(state) as beside:
                    save_state(beside, state_tensors(modules, {"generator": optimizer}), meta)
            bar.advance(note=f"loss {loss:.3f}")
    if devices.first:
        _finish(bundle, best, steps, path, watch)
        state.unlink(missing_ok=True)


def _finish(bundle: GeneratorBundle, best: BestStep | None, steps: int, path: Path, watch: Stopwatch) -> None:
    """Write the generator that is kept, and how it came about."""
    kept, scores = (steps, []) if best is None else (best.step, best.scores)
    with atomic_path(path) as beside:
        (bundle if best is None else replace(bundle, model=best.model)).save(beside)
        training = {"updates": steps, "kept_step": kept, "validation": scores}
        write_json(beside / TRAINING_FILE, training | watch.named("seconds"))


def training_of(folder: Path) -> dict[str, Any]:
    """`updates`, `kept_step` and `seconds` of a generator among the artifacts, as far as its version noted them."""
    file = folder / TRAINING_FILE
    return {key: value for key, value in read_json(file).items() if key != "validation"} if file.is_file() else {}


def _update(
    model: CaptionGenerator, optimizer: Optimizer, devices: Devices, step: int, batch: Batch, smoothing: float
) -> float:
    """One optimiser step on a batch, shared by the processes; the whole batch's loss."""
    if devices.world == 1:
        optimizer.adamw.zero_grad(set_to_none=True)
        loss = _loss(model, devices, batch, slice(None), smoothing)
        loss.backward()
        value = loss.item()  # here the device is waited for, and not once more behind the update
        optimizer.finish_step(value, step)
        return value
    rows = devices.share(range(len(batch[0])))
    optimizer.adamw.zero_grad(set_to_none=True)
    share = torch.zeros((), device=devices.device)
    if rows:  # the mean over this process's tokens, weighted by their number
        mine = slice(rows[0], rows[-1] + 1)
        share = _loss(model, devices, batch, mine, smoothing) * (batch[2][mine].sum() / batch[2].sum().item())
        share.backward()
    devices.sum_gradients(optimizer.parameters)
    loss = devices.sum(share.detach().clone()).item()
    optimizer.finish_step(loss, step)
    return loss


def _loss(model: CaptionGenerator, devices: Devices, batch: Batch, rows: slice, smoothing: float) -> Tensor:
    device = devices.device
    vectors = read_on(batch[0][rows], device)
    tokens, mask = (on_device(x[rows], device) for x in batch[1:3])
    weights = None if batch[3] is None else on_device(batch[3][rows], device)
    with devices.autocast():
        return model.reconstruction_loss(vectors, tokens, mask, weights, smoothing)


def _tokenized(bundle: GeneratorBundle, texts: Sequence[str], prompt_length: int) -> list[list[int]]:
    """Ids of each text; one too long for the language model's positions is cut, and then ends without a stop token."""
    positions = getattr(bundle.model.gpt.config, "max_position_embeddings", None)
    room = positions - prompt_length - bundle.config.prefix_length if positions else None
    return [ids[:room] for ids in bundle.tokenizer.encode(texts)]
