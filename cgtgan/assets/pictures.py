"""The pictures in `images` that captions made elsewhere belong to, and their embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgtgan.assets.workspace import Workspace
from cgtgan.data.annotations import ImageId
from cgtgan.data.image_names import match_names
from cgtgan.data.named_pictures import find_images

if TYPE_CHECKING:  # which picture a caption means is known without torch
    from torch import Tensor


def pictures_of(ws: Workspace, names: Mapping[Any, Iterable[str]]) -> dict[Any, Path]:
    """Image id -> its picture in `images`, of the ids that have one.

    names: of each id, the names by which the picture may be found (data/image_names.py), perhaps without its ending.
    """
    files = ws.once("pictures", lambda: find_images(ws.cfg.image_paths, ws.cfg.dataset.image_column))
    wanted = {i: list(each) for i, each in names.items()}
    whole: dict[ImageId, str] = {str(file): str(file) for file in files}
    matched = match_names(wanted, whole)
    stems: dict[ImageId, str] = {str(f): str(f.with_suffix("")) for f in files if str(f) not in matched.values()}
    matched |= match_names({i: each for i, each in wanted.items() if i not in matched}, stems)
    return {i: Path(str(file)) for i, file in matched.items()}


def picture_embeddings(ws: Workspace, pictures: Mapping[Any, Path]) -> dict[Any, Tensor]:
    """Image id -> embedding (D,) float16 of its picture, each file encoded once; one that cannot be read has none."""
    known: dict[Path, Tensor] = ws.once("picture embeddings", dict)
    if paths := [path for path in dict.fromkeys(pictures.values()) if path not in known]:
        _embed(ws, paths, known)
    return {i: known[path] for i, path in pictures.items() if path in known}


def _embed(ws: Workspace, paths: list[Path], known: dict[Path, Tensor]) -> None:
    import torch

    from cgtgan.assets.backbone import open_backbone
    from cgtgan.assets.encoding import Encoder
    from cgtgan.data.loading import decoded

    backbone, size = open_backbone(ws), ws.cfg.clip_backbone.image_batch_size
    encode = Encoder(ws, backbone.encode_images, "clip_backbone.image_batch_size", size)
    batches = (list(range(i, min(i + size, len(paths)))) for i in range(0, len(paths), size))
    workers = ws.workers(len(paths)) if backbone.ahead else 0
    with ws.tracker.progress("embedding pictures", len(paths)) as bar:
        for batch in decoded(paths, backbone.pixels, batches, workers=workers):
            if batch.pixels is not None:
                known |= dict(zip((paths[row] for row in batch.rows), torch.unbind(encode(batch.pixels)), strict=True))
            for _, why in batch.unreadable:
                ws.tracker.say(f"left out: {why}")
            bar.advance(len(batch.rows) + len(batch.unreadable))
