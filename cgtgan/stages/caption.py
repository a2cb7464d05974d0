"""caption: a checkpoint and one's own pictures -> captions.json (or .csv) and a gallery page."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from cgtgan.assets.checkpoints import find_checkpoint
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.captioner import Captioner
from cgtgan.config import Config, as_dict
from cgtgan.data.image_files import find_images
from cgtgan.data.loading import decoded
from cgtgan.data.user_files import printable
from cgtgan.errors import InputError
from cgtgan.reporting.page import GalleryItem, render_gallery
from cgtgan.runtime.artifacts import file_fingerprint, fingerprint, locked, write_json, write_text

GALLERY_LIMIT = 500  # pictures on the page; captions.json has all
SAID = 20  # captions, and pictures that cannot be read, on the console


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    if ws.rank.number == 0:  # one process captions; its workers decode
        caption(ws)


def caption(ws: Workspace) -> None:
    """A killed job goes on where it stopped: captions are kept as they come. A picture that cannot be read is listed and left out."""
    cfg = ws.cfg
    images = find_images(cfg.image_paths)
    checkpoint = find_checkpoint(ws)
    captioner = Captioner.load(
        checkpoint, device=str(ws.device), decode=cfg.decode if cfg.decode.name != "greedy" else None
    )
    captioner.seed, captioner.batch_size = cfg.seed, cfg.clip_backbone.image_batch_size
    output = Path(cfg.output).expanduser() if cfg.output else _beside(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / "captions", lambda: ws.tracker.say(f"waiting for another process that writes into {output}")):
        made_from = [
            file_fingerprint(checkpoint / "generator.safetensors"),
            as_dict(captioner.decode),
            cfg.seed,
            cfg.caption.num,
        ]
        partial = output / "captions.partial.jsonl"
        rows = _captioned(ws, captioner, images, partial, fingerprint(made_from))
        _write(ws, output, images, rows)
        partial.unlink()


def _captioned(
    ws: Workspace, captioner: Captioner, images: list[Path], partial: Path, made_from: str
) -> list[dict[str, Any]]:
    """Of each picture its `captions`, with scores where asked for, or its `error`. Every batch is kept in `partial`."""
    done = _resumed(partial, made_from)
    keys = [_key(path) for path in images]
    pending = [i for i, key in enumerate(keys) if key not in done]
    if len(pending) < len(images):
        ws.tracker.say(f"going on after {len(images) - len(pending):,} of {len(images):,} pictures")
    batches = (
        list(range(i, min(i + captioner.batch_size, len(pending))))
        for i in range(0, len(pending), captioner.batch_size)
    )
    workers = ws.workers(len(pending)) if captioner.backbone.ahead else 0
    read = decoded([images[i] for i in pending], captioner.backbone.pixels, batches, workers=workers)
    with (
        partial.open("a", encoding="utf-8") as kept,
        ws.tracker.progress("captioning", len(images), len(images) - len(pending)) as bar,
    ):
        for batch in read:
            rows: list[dict[str, Any]] = [{"key": keys[pending[i]], "error": why} for i, why in batch.unreadable]
            if batch.pixels is not None:
                if ws.cfg.caption.num is None:
                    found = [[{"caption": text}] for text in captioner.caption(batch.pixels)]
                else:
                    found = [
                        [one._asdict() for one in ranked]
                        for ranked in captioner.captions(batch.pixels, ws.cfg.caption.num)
                    ]
                rows += [
                    {"key": keys[pending[i]], "captions": captions}
                    for i, captions in zip(batch.rows, found, strict=True)
                ]
            for row in rows:
                kept.write(json.dumps(row) + "\n")
                done[row["key"]] = row
            kept.flush()
            os.fsync(kept.fileno())
            bar.advance(len(rows))
    return [done[key] for key in keys]


def _write(ws: Workspace, output: Path, images: list[Path], rows: list[dict[str, Any]]) -> None:
    told = [(path, row["captions"]) for path, row in zip(images, rows, strict=True) if "captions" in row]
    broken = [
        {"image_id": printable(path), "error": row["error"]}
        for path, row in zip(images, rows, strict=True)
        if "error" in row
    ]
    if not told:
        raise InputError(f"none of the {len(images)} pictures can be read; the first: {broken[0]['error']}")
    target = output / f"captions.{ws.cfg.caption.format}"
    if ws.cfg.caption.format == "csv":  # a line a caption
        text = io.StringIO()
        table = csv.DictWriter(text, ["image_id", *told[0][1][0]], lineterminator="\n")
        table.writeheader()
        table.writerows({"image_id": printable(path)} | one for path, captions in told for one in captions)
        write_text(target, text.getvalue())
    else:  # COCO's results format: an entry a picture, with its best caption
        several = ws.cfg.caption.num is not None
        write_json(target, [{"image_id": printable(p)} | c[0] | ({"captions": c} if several else {}) for p, c in told])
    items = [
        GalleryItem(
            path.name, path, best["caption"], extra={f"{i}.": one["caption"] for i, one in enumerate(others, 2)}
        )
        for path, (best, *others) in told[:GALLERY_LIMIT]
    ]
    write_text(output / "gallery.html", render_gallery("Captions", items, len(told)))
    for path, captions in told[:SAID]:
        ws.tracker.say(f"{printable(path)}: {captions[0]['caption']}")
    for one in broken[:SAID]:
        ws.tracker.say(f"left out: {one['error']}")
    if broken:
        write_json(output / "unreadable.json", broken)
        ws.tracker.say(
            f"{len(broken)} of {len(images)} pictures cannot be read and are left out: {output / 'unreadable.json'}"
        )
    else:
        (output / "unreadable.json").unlink(missing_ok=True)
    ws.tracker.say(f"captions of {len(told):,} pictures: {target} and {output / 'gallery.html'}")


def _beside(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    return (folder.parent if folder.name == "checkpoints" else checkpoint) / "captions"


def _key(path: Path) -> str:
    """A picture as it is now: replaced by another one, it is captioned again."""
    try:
        state = path.stat()
    except OSError:  # whoever opens it says why
        return f"{path.absolute()}|"
    return f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}"


def _resumed(partial: Path, made_from: str) -> dict[str, dict[str, Any]]:
    """Rows of a killed job with the same checkpoint, decoding and number; others are dropped. The file is left ready to append to."""
    rows: list[dict[str, Any]] = []
    if partial.is_file():
        for line in partial.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the line that the kill cut
                break
    if not rows or rows[0].get("made_from") != made_from:
        rows = [{"made_from": made_from}]
    write_text(partial, "".join(json.dumps(row) + "\n" for row in rows))
    return {
        row["key"]: row for row in rows[1:] if "captions" in row
    }  # what could not be read may be mended, or Pillow be
