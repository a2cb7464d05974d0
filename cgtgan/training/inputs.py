"""What GAN training is made from: embeddings, sentences, and how many steps they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cgtgan.assets.aggregated import aggregated_embeddings
from cgtgan.assets.checkpoints import init_checkpoint
from cgtgan.assets.corpus import corpus_sentences
from cgtgan.assets.generators import total_steps
from cgtgan.assets.images import dataset_split, image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.config import TrainConfig
from cgtgan.errors import InputError
from cgtgan.models.discriminator import discriminator_identity
from cgtgan.models.generator_bundle import generator_identity
from cgtgan.runtime.artifacts import Embeddings, file_fingerprint, fingerprint
from cgtgan.runtime.devices import best_precision
from cgtgan.training.own_terms import own_term_fingerprints


@dataclass(frozen=True)
class TrainingInputs:
    """Embeddings (N, D) of the training images, their targets and the validation images; the corpus sentences.

    scored: the validation images have references. made_from: fingerprints of everything, and the precision.
    """

    images: Embeddings
    targets: Embeddings
    val: Embeddings
    sentences: Sequence[str]
    scored: bool
    steps: int
    made_from: dict[str, Any]

    @property
    def precision(self) -> str:
        return self.made_from["precision"]

    def validate_every(self, t: TrainConfig) -> int:
        """Steps between two validations: an epoch, unless the settings name a number."""
        return t.validate_every or math.ceil(len(self.images.ids) / t.batch_size)


def _pretrained_models(ws: Workspace) -> dict[str, str]:
    """Fingerprints of the models that generator and discriminator start from, where they start from any."""
    cfg, records = ws.cfg, ws.store.root / "fingerprints"
    named = {"language_model": generator_identity(cfg.generator, records)}
    if cfg.train.use_discriminator:
        named["encoder"] = discriminator_identity(cfg.discriminator, records)
    return {name: fingerprint(identity) for name, identity in named.items() if identity}


def training_inputs(ws: Workspace) -> TrainingInputs:
    """Make or load everything. Raises `InputError` if the run folder was begun with other settings or inputs."""
    cfg, t = ws.cfg, ws.cfg.train
    ws.check_same_settings()
    sentences, _, corpus = corpus_sentences(ws)
    images, targets = image_embeddings(ws, "train"), aggregated_embeddings(ws, "train")
    precision = best_precision(t.precision, ws.device)
    made_from = {"images": images.header.fingerprint, "aggregated": targets.header.fingerprint, "precision": precision}
    if t.init_from:
        made_from["init_from"] = file_fingerprint(init_checkpoint(ws) / "generator.safetensors")
    made_from |= own_term_fingerprints(cfg.reward_weights)
    models = _pretrained_models(ws)
    made_from |= models
    ws.check_same_run("inputs", made_from, missing=models)  # version 0.1 did not write them
    made_from["sentences"] = fingerprint(corpus)
    val = image_embeddings(ws, "val")
    scored = bool(dataset_split(ws, "val").references)
    if not scored:
        ws.tracker.say(
            "train: the val images have no references: nothing is validated, checkpoints/best is the last step"
        )
    if ws.rank.world > t.batch_size // t.accumulation:
        raise InputError(
            f"train.batch_size={t.batch_size} in {t.accumulation} parts is less than one image for each of "
            f"{ws.rank.world} processes: raise it, or start fewer"
        )
    steps = total_steps(t, len(images.ids))
    return TrainingInputs(images, targets, val, sentences, scored, steps, made_from)
