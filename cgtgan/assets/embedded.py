"""What image embeddings are made from, and stored ones in the place of pictures that are not on this machine."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cgtgan.assets.backbone import backbone_producer
from cgtgan.assets.workspace import Workspace
from cgtgan.data.annotated_images import AbsentImages
from cgtgan.data.annotations import ImageId
from cgtgan.data.custom_reader import reader_identity
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.datasets import Split, load_split
from cgtgan.data.demo_world import world_producer
from cgtgan.errors import UserError
from cgtgan.runtime.artifacts import Header, fingerprint, read_header, read_json
from cgtgan.runtime.producers import with_format

# Raise it where the same pictures get other vectors (runtime/producers.py).
IMAGE_EMBEDDINGS_FORMAT = 1
# Of a user's own pictures other than JPEGs: since 2 those of many bits are scaled, and what is transparent is white.
OWN_PICTURES_FORMAT = 2
# What an artifact's header has of its files: it is not known without them.
_OF_FILES = ("images", "repaired")


def image_producer(ws: Workspace, name: str, *, other_formats: bool = False) -> dict[str, Any]:
    """What the image embeddings of a split depend on, apart from the list of its files.

    other_formats: there are pictures of a user's own that are no JPEGs.
    """
    config = ws.cfg.dataset
    kind = KINDS[config.kind]
    producer: dict[str, Any] = {"kind": config.kind, "split": name, "backbone": backbone_producer(ws)}
    producer |= {"world": world_producer(config.world)} if kind.drawn else {}
    producer |= {"reader": reader_identity(config)} if kind.listing == "reader" else {}
    producer |= {"jpeg_draft": True} if config.jpeg_draft else {}
    return with_format(producer, OWN_PICTURES_FORMAT if other_formats else IMAGE_EMBEDDINGS_FORMAT)


def report_of(path: Path) -> Path:
    """The pictures that could not be read, beside the embeddings of the others."""
    return path.with_suffix(".bad.json")


def embedded_split(ws: Workspace, name: str, root: Path, absent: AbsentImages) -> Split:
    """The split whose stored embeddings were made with these settings from exactly the images that are listed now.

    For data sets whose ids name one picture everywhere: names of files cannot be compared without the files. Raises
    `absent` where no embeddings fit, or several and nothing tells which is meant.
    """
    folder = ws.store.root / "image_embeddings"
    stored = [(path, *content) for path in sorted(folder.glob("*.safetensors")) if (content := _content(path, name))]
    wanted, fitting = fingerprint(image_producer(ws, name)) if stored else "", list[tuple[int, str, Split]]()
    for path, header, ids in stored:
        made_with = {key: value for key, value in header.producer.items() if key not in _OF_FILES}
        if fingerprint(made_with) == wanted and (split := _with_ids(ws, name, root, ids)):
            fitting.append((header.rows, header.producer["images"], replace(split, embeddings=path)))
    # embeddings that pictures were added to after a repair take the place of the ones before
    most = max((rows for rows, _, _ in fitting), default=0)
    fullest = [split for rows, _, split in fitting if rows == most]
    if len(fullest) == 1 and len({images for _, images, _ in fitting}) == 1:
        return fullest[0]
    if any(header.producer.get("kind") == ws.cfg.dataset.kind for _, header, _ in stored):
        problem = "none that were made with these settings from exactly the listed images" if not fitting else "several"
        raise AbsentImages(f"{absent}; of their embeddings {folder} has {problem}", absent.ids)
    raise absent


def _content(path: Path, name: str) -> tuple[Header, set[ImageId]] | None:
    """Header of the embeddings and ids of the images they were made from; None for another split, or damaged ones."""
    with suppress(UserError):
        header, ids = read_header(path)
        is_named = path.stem == f"image_embeddings-{fingerprint(header.producer)}"
        if is_named and header.producer.get("split") == name:
            report = report_of(path)
            return header, {*ids, *(row["image_id"] for row in (read_json(report, list) if report.is_file() else ()))}
    return None


def _with_ids(ws: Workspace, name: str, root: Path, ids: set[ImageId]) -> Split | None:
    with suppress(AbsentImages):
        split = load_split(ws.cfg.dataset, name, root, known=ids)
        return split if ids == {image.image_id for image in split.images} else None
    return None
