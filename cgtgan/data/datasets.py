"""Images, their splits and the reference captions, of every kind of data set (`dataset_kinds.py`).

The training split carries no caption; `load_pairs` reads them for the supervised upper bound alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from cgtgan.config import SPLITS, DatasetConfig
from cgtgan.data.annotated_images import annotated_split
from cgtgan.data.annotations import CaptionsById, ImageId, id_order
from cgtgan.data.custom_reader import reader_split
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.image_folder import folder_split
from cgtgan.errors import InputError, MissingFileError

log = logging.getLogger(__name__)

# (config, split, root, captions_wanted=) -> pictures by id, and captions by id (of train only where wanted)
_LISTINGS: dict[str, Callable[..., tuple[dict[ImageId, Path], CaptionsById]]] = {
    "annotations": annotated_split,
    "folder": folder_split,
    "reader": reader_split,
}


@dataclass(frozen=True)
class ImageRecord:
    image_id: ImageId
    path: Path


@dataclass(frozen=True)
class Split:
    """`images` sorted by id, integers first. `references` id -> captions: of all images, or {} (train; no captions).

    `bare`: images of the split that are left out because they have no caption. `embeddings`: those that were made
    earlier, where not all of the pictures are on disk; paths of the others lead nowhere.
    """

    name: str
    images: list[ImageRecord]
    references: CaptionsById
    bare: tuple[ImageId, ...] = ()
    embeddings: Path | None = None


def load_split(config: DatasetConfig, name: str, root: Path, known: Set[ImageId] = frozenset()) -> Split:
    """List a split (train, val or test) of the data set under `root`; folders are scanned, no image is opened.

    train: references is {}. val, test: images without captions are left out and logged where others have some.
    known: images that need not be on disk, of a data set that annotation files list.
    Raises `MissingFileError` for an absent file, a split that the kind does not have, or more than `max_bad_images`
    absent images, else `InputError`.
    """
    if name not in SPLITS:
        raise InputError(f"split '{name}' is not accepted: one of {', '.join(SPLITS)}")
    kind = KINDS[config.kind]
    if name not in kind.splits:
        fix = "train with another data set, such as dataset=coco, and score with stage=evaluate checkpoint=RUN"
        raise MissingFileError(f"dataset.kind={config.kind} has no {name} split: {fix}")
    paths, captions = _listed(config, name, root, known, captions_wanted=name != "train")
    ids = sorted(paths, key=id_order)
    captions = {} if name == "train" else captions
    bare = tuple(i for i in ids if not captions.get(i)) if captions else ()
    if bare:
        message = "%s: %d of %d images have no caption and are left out, %s first"
        log.warning(message, name, len(bare), len(ids), bare[0])
        ids = [i for i in ids if captions.get(i)]
    ids = ids[: config.max_images]
    if not ids:
        raise InputError(f"the {name} split of dataset.kind={config.kind} under {root} has no image")
    return Split(name, [ImageRecord(i, paths[i]) for i in ids], {i: captions[i] for i in ids} if captions else {}, bare)


def load_pairs(config: DatasetConfig, root: Path, known: Set[ImageId] = frozenset()) -> CaptionsById:
    """Captions of the training images, id -> captions, for the supervised upper bound only; ids as `load_split` has."""
    paths, captions = _listed(config, "train", root, known, captions_wanted=True)
    return {i: captions[i] for i in sorted(paths, key=id_order)[: config.max_images] if i in captions}


def _listed(
    config: DatasetConfig, name: str, root: Path, known: Set[ImageId], *, captions_wanted: bool
) -> tuple[dict[ImageId, Path], CaptionsById]:
    kind = KINDS[config.kind].listing
    more = {"known": known} if kind == "annotations" else {}
    return _LISTINGS[kind](config, name, root, captions_wanted=captions_wanted, **more)
