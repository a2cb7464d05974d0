"""caption: a checkpoint and one's own pictures -> captions.json and a gallery page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from cgtgan.artifacts import file_fingerprint, fingerprint, read_json, write_json, write_text
from cgtgan.config import Config, DecodeConfig, as_dict
from cgtgan.data.image_folder import IMAGE_SUFFIXES
from cgtgan.data.loading import load_pixels
from cgtgan.errors import InputError, MissingFileError
from cgtgan.evaluation.report import GalleryItem, render_gallery
from cgtgan.models.generator_bundle import load_generator
from cgtgan.stages.backbone import reopen_backbone
from cgtgan.stages.decoding import caption_embeddings
from cgtgan.stages.evaluate import find_checkpoint
from cgtgan.stages.workspace import Workspace

GALLERY_LIMIT = 500  # pictures on the page; captions.json has all


def run(cfg: Config) -> None:
    caption(Workspace(cfg))


def find_images(paths: list[str]) -> list[Path]:
    """Picture files named, and those below folders named, in name order. Raises `MissingFileError` or `InputError`."""
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
            if not below:
                raise InputError(f"images={name}: the folder holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise MissingFileError(f"images={name} does not exist: name a picture or a folder of pictures")
    return list(dict.fromkeys(found))


def caption(ws: Workspace) -> None:
    """A killed job goes on where it stopped: captions are kept as they come. A picture that cannot be read is listed and left out."""
    cfg = ws.cfg
    images = find_images(cfg.image_paths)
    checkpoint = find_checkpoint(ws)
    bundle = load_generator(checkpoint)
    description = read_json(checkpoint / "checkpoint.json")
    decode = cfg.decode if cfg.decode.name != "greedy" else DecodeConfig(**description["decode"])
    backbone = reopen_backbone(description["clip_backbone"], checkpoint / "clip", ws.device)
    output = Path(cfg.output).expanduser() if cfg.output else _beside(checkpoint)
    output.mkdir(parents=True, exist_ok=True)

    made_from = fingerprint([file_fingerprint(checkpoint / "generator.safetensors"), as_dict(decode), cfg.seed])
    partial = output / ".captions.partial.jsonl"
    done = _resumed(partial, made_from)
    pending = [p for p in images if _key(p) not in done]
    size = min(cfg.clip_backbone.image_batch_size, decode.batch_size)
    with partial.open("a", encoding="utf-8") as kept, ws.tracker.progress("captioning", len(images), len(images) - len(pending)) as bar:
        for start in range(0, len(pending), size):
            batch, pixels = [], []
            rows: list[dict[str, Any]] = []
            for path in pending[start : start + size]:
                try:
                    pixels.append(load_pixels(path, backbone.pixels))
                    batch.append(path)
                except (InputError, MissingFileError) as e:
                    rows.append({"key": _key(path), "error": str(e)})
            if batch:
                texts = caption_embeddings(bundle, backbone.encode_images(torch.stack(pixels)), decode, ws.device, seed=cfg.seed)
                rows += [{"key": _key(p), "caption": text} for p, text in zip(batch, texts, strict=True)]
            for row in rows:
                kept.write(json.dumps(row) + "\n")
                done[row["key"]] = row
            kept.flush()
            os.fsync(kept.fileno())
            bar.advance(len(pending[start : start + size]))

    captions = [{"image_id": str(p), "caption": done[_key(p)]["caption"]} for p in images if "caption" in done[_key(p)]]
    broken = [{"image_id": str(p), "error": done[_key(p)]["error"]} for p in images if "error" in done[_key(p)]]
    if not captions:
        raise InputError(f"none of the {len(images)} pictures can be read; the first: {broken[0]['error']}")
    write_json(output / "captions.json", captions)
    items = [GalleryItem(Path(c["image_id"]).name, Path(c["image_id"]), c["caption"]) for c in captions[:GALLERY_LIMIT]]
    write_text(output / "gallery.html", render_gallery(f"Captions of {len(captions):,} pictures", items))
    if broken:
        write_json(output / "unreadable.json", broken)
        ws.tracker.say(f"{len(broken)} of {len(images)} pictures cannot be read and are left out: {output / 'unreadable.json'}")
    else:
        (output / "unreadable.json").unlink(missing_ok=True)
    partial.unlink()
    for row in captions[:20]:
        ws.tracker.say(f"{row['image_id']}: {row['caption']}")
    ws.tracker.say(f"{len(captions):,} captions: {output / 'captions.json'} and {output / 'gallery.html'}")


def _beside(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    return (folder.parent if folder.name == "checkpoints" else checkpoint) / "captions"


def _key(path: Path) -> str:
    """A picture as it is now: replaced by another one, it is captioned again."""
    state = path.stat()
    return f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}"


def _resumed(partial: Path, made_from: str) -> dict[str, dict[str, Any]]:
    """Rows of a killed job with the same checkpoint and decoding; others are dropped. The file is left ready to append to."""
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
    return {row["key"]: row for row in rows[1:]}
