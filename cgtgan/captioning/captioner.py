"""Captions of your pictures, in three lines of Python:

from cgtgan import Captioner
captioner = Captioner.load("runs/demo/NAME/seed=0")
print(captioner.caption(["a.jpg", "b.png"]))
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cgtgan.assets.backbone import reopen_backbone
from cgtgan.assets.checkpoints import checkpoint_in
from cgtgan.assets.reader import Reader, load_reader
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import Decoder, ScoredCaption, describe
from cgtgan.checks import validate
from cgtgan.config import Config, DecodeConfig
from cgtgan.data.image_files import PIXEL_ART, check_shape, plain_picture
from cgtgan.data.loading import load_pixels
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.clip_backbone import ClipBackbone, DemoBackbone
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator
from cgtgan.models.prompted import Read
from cgtgan.runtime.artifacts import read_json

DRAWINGS = "This checkpoint knows the demo's small drawings alone: its captions of other pictures mean nothing."
# A file or a picture in memory. Or, as a tensor, the pixels that `backbone.pixels` makes.
PictureFile = str | os.PathLike[str] | Image.Image
Picture = PictureFile | Tensor


class Encoded(NamedTuple):
    """Pictures that CLIP has read: embeddings (B, D), and a key per picture that seeds its samples."""

    vectors: Tensor
    sample_keys: list[str]


@dataclass
class Captioner:
    """A trained generator, its CLIP and how captions are drawn. With one `seed`, an image has the same captions in any
    batch.
    """

    bundle: GeneratorBundle
    backbone: ClipBackbone
    decode: DecodeConfig
    seed: int = 0
    batch_size: int = 64  # pictures that CLIP encodes at once
    reader: Reader | None = None  # how the generator reads their embeddings; None: as they are

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: str = "auto", decode: DecodeConfig | None = None
    ) -> Captioner:
        """`path`: a checkpoint, a link to one, or a run folder, whose best checkpoint is taken. decode: None for the
        checkpoint's. Raises `MissingFileError` or `InputError`, with what to do about it.
        """
        start = Path(path).expanduser()
        if start.is_file():
            raise InputError(
                f"{start} is a file and a checkpoint is a folder; `run.py stage=caption "
                f"{shlex.quote(f'checkpoint={start}')} images=A.jpg` makes one of the authors' model.pt, with the "
                "tokenizer and the CLIP of its settings, below artifacts/released_generator"
            )
        folder = checkpoint_in(start)
        if folder is None:
            raise MissingFileError(f"{start}: no checkpoint is found there; name a run folder or a checkpoint")
        description = read_json(folder / "checkpoint.json")
        try:
            # how keys and values are kept is of the machine that wrote it
            decode = decode or replace(DecodeConfig(**description["decode"]), cache=DecodeConfig.cache)
            clip = description["clip_backbone"]
        except (KeyError, TypeError) as e:
            raise InputError(
                f"{folder / 'checkpoint.json'} does not say its CLIP and decoding ({e}): another version wrote it"
            ) from None
        cfg = Config(device=device, decode=decode)
        validate(cfg)
        bundle = load_generator(folder)
        made_from = description.get("clip_made_from")
        backbone = reopen_backbone(clip, folder / "clip", Workspace(cfg).device, made_from)
        if backbone.dim != bundle.clip_dim:
            raise InputError(
                f"{folder} reads embeddings of {bundle.clip_dim} numbers and its CLIP, {clip['name']}, gives "
                f"{backbone.dim}"
            )
        bundle.model.to(backbone.device).eval()
        return cls(bundle, backbone, decode, reader=load_reader(folder, bundle, backbone.device))

    def __repr__(self) -> str:
        models = f"generator {self.bundle.config.name}, CLIP of {self.backbone.dim} dimensions, {self.backbone.device}"
        return f"<Captioner: {models}; {describe(self.decode)}, seed {self.seed}>"

    def is_foreign(self, size: tuple[int, int]) -> bool:
        """Whether a picture of this width and height is none of the drawings that the demo's CLIP alone knows."""
        return isinstance(self.backbone, DemoBackbone) and max(size) > max(PIXEL_ART, self.backbone.image_size)

    def caption(self, images: Iterable[Picture] | PictureFile | Encoded) -> list[str]:
        """One caption per picture, by `decode`. Raises `MissingFileError` or `InputError` naming an unreadable file."""
        captions: list[str] = []
        for vectors, sample_keys in self._encoded(images):
            captions += self._decoder().captions(self._read(vectors), sample_keys, images=vectors)
        return captions

    def captions(self, images: Iterable[Picture] | PictureFile | Encoded, n: int = 5) -> list[list[ScoredCaption]]:
        """Per picture, the n captions nearest by CLIP among the greedy one and n samples at `decode.temperature`, the
        nearest first.

        Fewer than n where samples are equal. Where `decode` is best-of-n, its number of samples is drawn, at least n.
        """
        if n < 1:
            raise InputError(f"n={n} is not accepted: it must be 1 or more")
        draws = max(n, self.decode.best_of) if self.decode.name == "best_of_n" else n
        ranked: list[list[ScoredCaption]] = []
        for vectors, sample_keys in self._encoded(images):
            ranked += self._decoder().ranked(self._read(vectors), draws, sample_keys, images=vectors)
        return [captions[:n] for captions in ranked]

    def _read(self, vectors: Tensor) -> Read:
        return (self.reader or Reader(self.bundle)).images(vectors)

    def _decoder(self) -> Decoder:
        return Decoder(self.bundle, self.decode, self.backbone.device, self.seed, self.backbone)

    def embed(self, images: Iterable[Picture] | PictureFile) -> Tensor:
        """CLIP's raw embeddings (N, D) float32, on the CPU"""
        return torch.cat([torch.empty(0, self.backbone.dim), *(vectors.cpu() for vectors, _ in self._encoded(images))])

    def encode(self, pictures: Sequence[Picture]) -> Encoded:
        """One batch of pictures, to be captioned more than once. A picture's key is the hash of its pixels."""
        pixels = [self._pixels(picture) for picture in pictures]
        keys = [hashlib.blake2b(p.contiguous().numpy().tobytes(), digest_size=16).hexdigest() for p in pixels]
        return Encoded(self.backbone.encode_images(torch.stack(pixels)), keys)

    def _encoded(self, images: Iterable[Picture] | PictureFile | Encoded) -> Iterator[Encoded]:
        if isinstance(images, Encoded):
            yield images
            return
        each = iter([images] if isinstance(images, str | os.PathLike | Image.Image) else images)
        while batch := list(islice(each, self.batch_size)):
            yield self.encode(batch)

    def _pixels(self, image: Picture) -> Tensor:
        if isinstance(image, Tensor):
            return image
        if isinstance(image, Image.Image):
            check_shape(image)
            return self.backbone.pixels(plain_picture(image))
        return load_pixels(Path(image).expanduser(), self.backbone.pixels)
