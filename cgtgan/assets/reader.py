"""How a generator reads images: the gap closed, behind a prompt. Training, scoring and captioning all come here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.gap import ReadImages, load_gap
from cgtgan.assets.gap import read_images as closed_images
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.prompts import Prompts, load_prompts, prompts_of
from cgtgan.assets.workspace import Workspace
from cgtgan.method.gap import Gap
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.models.prompted import Read


@dataclass(frozen=True)
class Reader:
    """CLIP's embeddings of images -> what this generator takes."""

    bundle: GeneratorBundle
    gap: Gap = field(default_factory=Gap)
    prompts: Prompts | None = None

    def images(self, vectors: Tensor) -> Read:
        """(N, D) of any float dtype -> float32, the gap closed, prompted."""
        return self.prompted(self.gap.images(vectors), vectors)

    def prompted(self, closed: Tensor, images: Tensor) -> Read:
        """Embeddings (N, D) that are closed already, behind the prompts of `images` (N, D)."""
        if self.prompts is None:
            return closed
        return self.bundle.prompted(closed, self.prompts.of_images(images), self.prompts.settings.tokens)


def load_reader(folder: Path, bundle: GeneratorBundle, device: torch.device) -> Reader:
    """How the generator of a checkpoint reads images. Raises `InputError` for a damaged file."""
    return Reader(bundle, load_gap(folder), load_prompts(folder, device))


@dataclass(frozen=True)
class PromptedImages:
    """A split as the generator reads it behind prompts: `[rows]` gives n rows, made when they are asked for."""

    vectors: Tensor
    closed: ReadImages
    reader: Reader

    def __getitem__(self, rows: Any) -> Read:
        return self.reader.prompted(self.closed[rows], self.vectors[rows])

    def __len__(self) -> int:
        return len(self.vectors)


def read_images(ws: Workspace, split: str, bundle: GeneratorBundle) -> ReadImages | PromptedImages | None:
    """The images of a split as the run's generator reads them; None where that is as they are."""
    prompts = prompts_of(ws)
    if prompts is None:
        return None if ws.cfg.gap.kind == "none" else closed_images(ws, split)
    return PromptedImages(
        image_embeddings(ws, split).vectors, closed_images(ws, split), Reader(bundle, prompts=prompts)
    )
