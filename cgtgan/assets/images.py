"""The images of a data set: where they lie, their splits, and their embeddings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.backbone import backbone_producer, open_backbone
from cgtgan.assets.encoding import Encoder, check_finite, fill_shards, read_vectors
from cgtgan.assets.released import released_images, released_split
from cgtgan.assets.workspace import Workspace
from cgtgan.data.custom_reader import reader_identity
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.datasets import ImageRecord, Split, load_split
from cgtgan.data.demo_world import world_folder, world_producer, write_demo_world
from cgtgan.data.loading import decoded
from cgtgan.errors import InputError
from cgtgan.runtime.artifacts import Embeddings, fingerprint, load_embeddings, read_json, write_embeddings, write_json
from cgtgan.runtime.producers import with_format
from cgtgan.runtime.shards import Shards, read_meta
from cgtgan.runtime.tracking import Bar

IMAGE_EMBEDDINGS_FORMAT = 1  # raise it where the same pictures get other vectors (runtime/producers.py)


def data_root(ws: Workspace) -> Path:
    """The folder of the data set; the demo world is drawn there when first needed."""
    if not KINDS[ws.cfg.dataset.kind].drawn:
        return Path(ws.cfg.dataset.root).expanduser()
    return ws.once("data root", lambda: _demo_world(ws))


def _demo_world(ws: Workspace) -> Path:
    world = ws.cfg.dataset.world
    root = world_folder(ws.store.root, world)
    if not (root / "world.json").is_file():
        images = world.train_images + world.val_images + world.test_images
        with ws.store.lock(root), ws.tracker.progress("drawing the demo world", images) as bar:
            write_demo_world(world, root, lambda _done: bar.advance())
    return root


def dataset_split(ws: Workspace, name: str) -> Split:
    """Images and references of a split: of the authors' files where they are given, else of the data set."""
    return ws.once(("split", name), lambda: released_split(ws, name) or load_split(ws.cfg.dataset, name, data_root(ws)))


def dataset_identity(ws: Workspace) -> dict[str, Any]:
    """What the images of a data set depend on, apart from their list."""
    config = ws.cfg.dataset
    kind = KINDS[config.kind]
    identity: dict[str, Any] = {"kind": config.kind}
    identity |= {"world": world_producer(config.world)} if kind.drawn else {}
    return identity | ({"reader": reader_identity(config)} if kind.listing == "reader" else {})


def image_embeddings(ws: Workspace, name: str) -> Embeddings:
    """(N, D) of a split, ids in `ids`; up to `dataset.max_bad_images` that cannot be read are left out."""
    if (given := released_images(ws, name)) is not None:
        return given
    images = dataset_split(ws, name).images
    # COCO's and Flickr30k's ids name one picture everywhere; in a user's own folder 1.jpg may be any
    size = (lambda _path: None) if KINDS[ws.cfg.dataset.kind].public_ids else _size
    listed = fingerprint([[i.image_id, i.path.name, *filter(None, [size(i.path)])] for i in images])
    producer = dataset_identity(ws) | {"split": name, "images": listed, "backbone": backbone_producer(ws)}
    producer |= {"jpeg_draft": True} if ws.cfg.dataset.jpeg_draft else {}
    producer = with_format(producer, IMAGE_EMBEDDINGS_FORMAT)
    path = ws.store.path("image_embeddings", producer, ".safetensors")
    report = path.with_suffix(".bad.json")
    cut = ws.cfg.clip_backbone.image_shard
    shards = Shards(path, -(-len(images) // cut), cut, path.exists)
    ws.store.tidy(path)
    if not path.exists():
        shards.discard(_is_stale)

        def encode(claims: Iterator[int], bar: Bar) -> None:
            _encode_images(ws, shards, images, claims, bar)

        fill_shards(ws, shards, f"{name} images", len(images), encode)

        def write(path: Path) -> None:
            metas = [read_meta(shards.file(i)) or {} for i in range(shards.count)]
            bad = [b for meta in metas for b in meta["bad"]]
            ids = [images[row].image_id for meta in metas for row in meta["rows"]]
            report.unlink(missing_ok=True)  # of an earlier try
            if bad:
                write_json(report, [{"image_id": images[b["row"]].image_id, "why": b["why"]} for b in bad])
                _check_bad(ws, name, report, len(images), none_left=not ids)
            pieces = (read_vectors(shards, i) for i in range(shards.count))
            write_embeddings(
                path, pieces, read_vectors(shards, 0).shape[1], ids, kind="image_embeddings", producer=producer
            )

        ws.store.make(path, write)
        shards.remove()
    if report.is_file():
        _check_bad(ws, name, report, len(images))
    return load_embeddings(path, kind="image_embeddings", fingerprint=fingerprint(producer))


def _check_bad(ws: Workspace, name: str, report: Path, images: int, *, none_left: bool = False) -> None:
    bad, allowed = read_json(report, list), ws.cfg.dataset.max_bad_images
    if len(bad) > allowed or none_left:
        allow = "" if none_left else f", or allow them with dataset.max_bad_images={len(bad)} (now {allowed})"
        raise InputError(
            f"{len(bad)} of {images} {name} images cannot be read, the first: {bad[0]['why']}; "
            f"all are listed in {report}; fix them{allow}"
        )
    message = f"{len(bad)} of {images} {name} images cannot be read and are left out: {report}"
    ws.once(("message", report), lambda: ws.tracker.say(message))


def _encode_images(ws: Workspace, shards: Shards, images: list[ImageRecord], claims: Iterator[int], bar: Bar) -> None:
    backbone = open_backbone(ws)
    size, paths = ws.cfg.clip_backbone.image_batch_size, [i.path for i in images]
    encoder = Encoder(ws, backbone.encode_images, "clip_backbone.image_batch_size", size)
    claimed: deque[int] = deque()  # the loader reads the claims ahead of what it has decoded

    def batches() -> Iterator[list[int]]:
        for piece in claims:
            claimed.append(piece)
            rows = range(piece * shards.cut, min((piece + 1) * shards.cut, len(images)))
            yield from (list(rows[i : i + size]) for i in range(0, len(rows), size))

    vectors: list[Tensor] = []
    rows: list[int] = []
    bad: list[dict[str, Any]] = []
    workers = ws.workers(len(images)) if backbone.ahead else 0
    draft = 2 * backbone.image_size if ws.cfg.dataset.jpeg_draft else 0
    for batch in decoded(paths, backbone.pixels, batches(), workers=workers, draft=draft):
        if batch.pixels is not None:
            vectors.append(encoder(batch.pixels))
            check_finite(vectors[-1], [paths[row] for row in batch.rows])
        rows += batch.rows
        bad += [
            {"row": row, "why": why, "path": str(paths[row]), "state": _state(paths[row])}
            for row, why in batch.unreadable
        ]
        bar.advance(len(batch.rows) + len(batch.unreadable))
        piece = claimed[0]
        if len(rows) + len(bad) == min((piece + 1) * shards.cut, len(images)) - piece * shards.cut:
            whole = torch.cat(vectors) if vectors else torch.empty(0, backbone.dim, dtype=torch.float16)
            shards.keep(piece, {"vectors": whole}, {"rows": rows, "bad": bad})
            claimed.popleft()
            vectors, rows, bad = [], [], []


def _size(path: Path) -> int | None:
    state = _state(path)
    return None if state is None else state[0]


def _state(path: Path) -> list[int] | None:
    """What tells whether a file was changed since."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _is_stale(piece: Path) -> bool:
    """Whether a piece is damaged, or has a bad image that is another file now."""
    meta = read_meta(piece)
    return meta is None or any(_state(Path(b["path"])) != b["state"] for b in meta["bad"])
