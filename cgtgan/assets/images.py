"""The images of a data set: where they lie, their splits, and their embeddings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.backbone import open_backbone
from cgtgan.assets.embedded import image_producer, report_of
from cgtgan.assets.encoding import Encoder, check_finite, fill_shards, read_vectors
from cgtgan.assets.released import released_images
from cgtgan.assets.splits import data_root as data_root
from cgtgan.assets.splits import dataset_split as dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.data.annotations import ImageId
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.datasets import ImageRecord, Split
from cgtgan.data.image_files import open_image
from cgtgan.data.loading import decoded
from cgtgan.data.picture_archives import picture_state
from cgtgan.errors import InputError, MissingFileError
from cgtgan.runtime.artifacts import (
    Embeddings,
    fingerprint,
    load_embeddings,
    read_json,
    save_embeddings,
    write_embeddings,
    write_json,
)
from cgtgan.runtime.bars import Bar
from cgtgan.runtime.shards import Shards, read_meta


def image_embeddings(ws: Workspace, name: str) -> Embeddings:
    """(N, D) of a split, ids in `ids`; up to `dataset.max_bad_images` that cannot be read are left out."""
    if (given := released_images(ws, name)) is not None:
        return given
    split = dataset_split(ws, name)
    if split.embeddings is not None:
        return _without_pictures(ws, split, split.embeddings)
    images = split.images
    # COCO's and Flickr30k's ids name one picture everywhere; in a user's own folder 1.jpg may be any
    size = (lambda _path: None) if KINDS[ws.cfg.dataset.kind].public_ids else _size
    listed = fingerprint([[i.image_id, i.path.name, *filter(None, [size(i.path)])] for i in images])
    jpegs = KINDS[ws.cfg.dataset.kind].public_ids or all(i.path.suffix.lower() in (".jpg", ".jpeg") for i in images)
    producer = image_producer(ws, name, other_formats=not jpegs) | {"images": listed}
    path = ws.store.path("image_embeddings", producer, ".safetensors")
    if repaired := _repaired(path, images):
        return _with_repaired(ws, name, path, producer | {"repaired": [[i, _size(p)] for i, p in repaired.items()]})
    report = report_of(path)
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
                write_json(report, [_reported(images[b["row"]], b["why"], b["state"]) for b in bad])
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


def _without_pictures(ws: Workspace, split: Split, path: Path) -> Embeddings:
    message = f"{split.name}: not all pictures are on this machine; their stored embeddings are used: {path}"
    ws.once(("message", path), lambda: ws.tracker.say(message))
    if report_of(path).is_file():
        _check_bad(ws, split.name, report_of(path), len(split.images))
    return load_embeddings(path, kind="image_embeddings")


def _reported(image: ImageRecord, why: str, state: list[int] | None) -> dict[str, Any]:
    return {"image_id": image.image_id, "why": why, "state": state}


def _repaired(path: Path, images: list[ImageRecord]) -> dict[ImageId, Path]:
    """Pictures that were left out of the embeddings in `path`, are other files now, and can be read."""
    report = report_of(path)
    if not (path.is_file() and report.is_file()):
        return {}
    bad = {row["image_id"]: row.get("state") for row in read_json(report, list)}
    written = report.stat().st_mtime_ns
    repaired: dict[ImageId, Path] = {}
    for image in images:
        if image.image_id not in bad or (now := picture_state(image.path)) is None:
            continue
        then = bad[image.image_id]  # version 0.1 did not record it
        if now == then or (then is None and now[1] <= written):
            continue
        try:
            open_image(image.path)
        except (InputError, MissingFileError):
            continue
        repaired[image.image_id] = image.path
    return repaired


def _with_repaired(ws: Workspace, name: str, old: Path, producer: dict[str, Any]) -> Embeddings:
    """The embeddings in `old` and those of the pictures that were repaired since, which alone are encoded."""
    images, path = dataset_split(ws, name).images, ws.store.path("image_embeddings", producer, ".safetensors")
    wanted = [image_id for image_id, _ in producer["repaired"]]

    def write(path: Path) -> None:
        known = load_embeddings(old, kind="image_embeddings")
        rows = dict(zip(known.ids, known.vectors, strict=True))
        bad = {row["image_id"]: row for row in read_json(report_of(old), list)}
        chosen = [image for image in images if image.image_id in wanted]
        backbone = open_backbone(ws)
        encoder = Encoder(
            ws, backbone.encode_images, "clip_backbone.image_batch_size", ws.cfg.clip_backbone.image_batch_size
        )
        draft = 2 * backbone.image_size if ws.cfg.dataset.jpeg_draft else 0
        batches = ([i] for i in range(len(chosen)))
        for batch in decoded([i.path for i in chosen], backbone.pixels, batches, workers=0, draft=draft):
            for row, why in batch.unreadable:
                bad[chosen[row].image_id] = _reported(chosen[row], why, picture_state(chosen[row].path))
            if batch.pixels is not None:
                image = chosen[batch.rows[0]]
                (rows[image.image_id],) = encoder(batch.pixels)
                check_finite(rows[image.image_id][None], [image.path])
                del bad[image.image_id]
        report_of(path).unlink(missing_ok=True)
        if bad:
            write_json(report_of(path), list(bad.values()))
            _check_bad(ws, name, report_of(path), len(images))
        ids = [image.image_id for image in images if image.image_id in rows]
        save_embeddings(path, torch.stack([rows[i] for i in ids]), ids, kind="image_embeddings", producer=producer)

    if ws.store.make(path, write):
        ws.tracker.say(f"{len(wanted)} {name} images that could not be read before can be read now")
    if report_of(path).is_file():
        _check_bad(ws, name, report_of(path), len(images))
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
            {"row": row, "why": why, "path": str(paths[row]), "state": picture_state(paths[row])}
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
    state = picture_state(path)
    return None if state is None else state[0]


def _is_stale(piece: Path) -> bool:
    """Whether a piece is damaged, or has a bad image that is another file now."""
    meta = read_meta(piece)
    return meta is None or any(picture_state(Path(b["path"])) != b["state"] for b in meta["bad"])
