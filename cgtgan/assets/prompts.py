"""The run's prompts: the corpus in which they are looked for, as a file that artifacts and checkpoints share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.config import PromptConfig, as_dict
from cgtgan.errors import InputError
from cgtgan.method.batches import stable_seed
from cgtgan.method.prompts import (
    entities_in,
    entity_prompt,
    entity_vocabulary,
    frequent_entities,
    kept_entities,
    nearest_sentences,
    retrieval_prompt,
    retrieval_queries,
)
from cgtgan.runtime.artifacts import Sentences, atomic_path
from cgtgan.runtime.producers import settings_of, with_format

FILE = "prompts.safetensors"
PROMPTS_FORMAT = 1  # raise it where the same corpus gives other prompts (runtime/producers.py)


@dataclass(frozen=True)
class Prompts:
    """Texts that the generator reads before the prefix. vectors (M, D) float16: of the corpus `sentences`, of whose
    words `entities` are nouns. file: where they lie.
    """

    settings: PromptConfig
    vectors: Tensor
    sentences: Sequence[str]
    entities: frozenset[str]
    file: Path
    device: torch.device | None = None  # where neighbours are looked for

    def of_images(self, images: Tensor) -> list[str]:
        """One prompt per image embedding (N, D)."""
        settings = self.settings
        each = self._nearest(images)
        if settings.kind == "retrieval":
            return [retrieval_prompt(near) for near in each]
        limits = settings.at_least, settings.at_most
        return [entity_prompt(frequent_entities(near, self.entities, *limits)) for near in each]

    def of_texts(self, texts: Sequence[str], vectors: Tensor, noise_std: float, *seed: object) -> list[str]:
        """One prompt per text to rebuild from its vector (N, D): its own nouns without those that are dropped, or the
        sentences that are nearest to the noised vector, without the text itself.
        """
        settings = self.settings
        seeds = [stable_seed(*seed, "prompt", i) for i in range(len(texts))]
        if settings.kind == "retrieval":
            queries = retrieval_queries(vectors, noise_std, seeds)
            return [retrieval_prompt(near) for near in self._nearest(queries, texts)]
        nouns = (entities_in(text, self.entities)[: settings.at_most] for text in texts)
        return [entity_prompt(kept_entities(each, settings.drop, s)) for each, s in zip(nouns, seeds, strict=True)]

    def _nearest(self, queries: Tensor, left_out: Sequence[str] | None = None) -> list[list[str]]:
        count, device = self.settings.nearest, self.device
        return nearest_sentences(queries, self.vectors, self.sentences, count, left_out, device)


def prompts_of(ws: Workspace) -> Prompts | None:
    """The run's prompts, by its corpus; None for `prompt=none`."""
    if ws.cfg.prompt.kind == "none":
        return None
    return ws.once("prompts", lambda: _made(ws))


def prompt_identity(ws: Workspace) -> dict[str, Any]:
    """What a generator that reads prompts was made from; nothing for one that reads none."""
    if ws.cfg.prompt.kind == "none":
        return {}
    settings = {name: value for name, value in settings_of(ws.cfg.prompt).items() if name != "name"}
    return {"prompt": settings, "prompts_from": sentence_embeddings(ws).header.fingerprint}


def _made(ws: Workspace) -> Prompts:
    path = ws.store.path("prompts", with_format(prompt_identity(ws), PROMPTS_FORMAT), ".safetensors")
    vectors, sentences = sentence_embeddings(ws).vectors, corpus_sentences(ws)[0]
    ws.store.make(path, lambda path: write_prompts(path, ws.cfg.prompt, vectors, sentences))
    return _read(path, ws.device)


def write_prompts(path: Path, settings: PromptConfig, vectors: Tensor, sentences: Sequence[str]) -> None:
    """The file of `Prompts`: vectors (M, D) float16 of the sentences, these as UTF-8 text and its ends, the nouns."""
    pieces = [sentence.encode("utf-8", "surrogatepass") for sentence in sentences]
    tensors = {
        "vectors": vectors.contiguous(),
        "text": torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8),
        "ends": torch.from_numpy(np.cumsum([len(piece) for piece in pieces], dtype=np.int64)),
    }
    entities = sorted(entity_vocabulary(sentences)) if settings.kind == "entity" else []
    described = {"settings": as_dict(settings), "entities": entities}
    with atomic_path(path) as beside:
        save_file(tensors, beside, {"prompts": json.dumps(described)})


def save_prompts(folder: Path, prompts: Prompts | None) -> None:
    """Beside a generator's weights, so that captioning needs nothing else.

    It is another name of the artifact's file, which takes no room, or a copy where the disk knows no such names.
    """
    if prompts is None:
        return
    try:
        os.link(prompts.file, folder / FILE)
    except OSError:
        shutil.copyfile(prompts.file, folder / FILE)


def load_prompts(folder: Path, device: torch.device | None = None) -> Prompts | None:
    """What `save_prompts` wrote; None where there is no file. Raises `InputError` for a damaged one."""
    path = folder / FILE
    return _read(path, device) if path.is_file() else None


def _read(path: Path, device: torch.device | None) -> Prompts:
    try:
        with safe_open(path, framework="pt") as f:
            vectors, text, ends = (f.get_tensor(name) for name in ("vectors", "text", "ends"))
            described = json.loads(f.metadata()["prompts"])
        settings, entities = PromptConfig(**described["settings"]), frozenset(described["entities"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not whole ({error}): remove it, and name another checkpoint or train again"
        ) from None
    if device is not None and device.type == "cuda" and 2 * vectors.nbytes < torch.cuda.mem_get_info(device)[0]:
        vectors = vectors.to(device)  # once, not for every batch
    return Prompts(settings, vectors, Sentences(text, ends), entities, path, device)


def check_prompts(folder: Path, config: PromptConfig) -> None:
    """Raise `InputError` if the generator in `folder` was not trained to read this run's kind of prompts."""
    prompts = load_prompts(folder)
    stored = PromptConfig() if prompts is None else prompts.settings
    if (stored.kind, stored.length) != (config.kind, config.length):
        raise InputError(
            f"the generator in {folder} was trained with prompt={stored.kind} of {stored.length} tokens and this run "
            f"has prompt={config.kind} of {config.length}: set the same, or start from another generator"
        )
