"""caption: a checkpoint and your pictures -> captions.json (or .csv) and a gallery page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cgtgan.assets.checkpoints import find_checkpoint
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.caption_files import CaptionedPicture, KeptCaptions, picture_key, write_captions
from cgtgan.captioning.captioner import DRAWINGS, Captioner
from cgtgan.captioning.decoding import ScoredCaption, chosen_decode
from cgtgan.config import Config, as_dict
from cgtgan.data.image_files import DAMAGED_IMAGE, picture_formats
from cgtgan.data.loading import decoded
from cgtgan.data.named_pictures import find_images
from cgtgan.data.picture_archives import picture_bytes
from cgtgan.data.user_files import printable
from cgtgan.errors import InputError
from cgtgan.reporting.page import GalleryItem, render_gallery
from cgtgan.runtime.artifacts import file_fingerprint, fingerprint, write_json, write_text
from cgtgan.runtime.store import locked

GALLERY_LIMIT = 500  # pictures on the page; captions.json has all
CONSOLE_LIMIT = 20  # captions, and pictures that cannot be read, on the console


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    if ws.rank.number == 0:  # one process captions; its workers decode
        caption(ws)


def caption(ws: Workspace) -> None:
    """A killed job continues where it stopped. A picture that cannot be read is listed and left out."""
    cfg = ws.cfg
    images = find_images(cfg.image_paths, cfg.dataset.image_column)
    checkpoint = find_checkpoint(ws)
    captioner = Captioner.load(checkpoint, device=str(ws.device))
    captioner.decode = chosen_decode(captioner.decode, cfg.decode, cfg.typed_decode)
    captioner.seed, captioner.batch_size = cfg.seed, cfg.clip_backbone.image_batch_size
    run_folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    output = Path(cfg.output).expanduser() if cfg.output else run_folder / "captions"
    output.mkdir(parents=True, exist_ok=True)
    if any(captioner.is_foreign(_size(path)) for path in images[:CONSOLE_LIMIT]):
        ws.tracker.say(DRAWINGS)
    with locked(output / "captions", lambda: ws.tracker.say(f"waiting for another process that writes into {output}")):
        weights = file_fingerprint(checkpoint / "generator.safetensors")
        made_from = fingerprint([weights, as_dict(captioner.decode), cfg.seed, cfg.caption.num])
        kept = KeptCaptions(output / "captions.partial.jsonl", made_from)
        rows = list(zip(images, _caption_all(ws, captioner, images, kept), strict=True))
        captions = [(path, row["captions"]) for path, row in rows if "captions" in row]
        unreadable = [{"image_id": printable(path), "error": row["error"]} for path, row in rows if "error" in row]
        if not captions:
            raise InputError(f"none of the {len(images)} pictures can be read; the first: {unreadable[0]['error']}")
        target = output / f"captions.{cfg.caption.format}"
        write_captions(target, captions, several=cfg.caption.num is not None)
        _write_gallery(output / "gallery.html", captions)
        for path, (best, *_) in captions[:CONSOLE_LIMIT]:
            ws.tracker.say(f"{printable(path)}: {best['caption']}")
        _report_unreadable(ws, output / "unreadable.json", unreadable, len(images))
        ws.tracker.say(f"captions of {len(captions):,} pictures: {target} and {output / 'gallery.html'}")
        ws.tracker.say(f"look at them: {(output / 'gallery.html').resolve().as_uri()}")
        kept.remove()


def _size(path: Path) -> tuple[int, int]:
    """Width and height; 0 of a picture that cannot be read, of which another sentence tells."""
    try:
        with Image.open(io.BytesIO(picture_bytes(path)), formats=picture_formats()) as image:
            return image.size
    except DAMAGED_IMAGE:
        return 0, 0


def _caption_all(ws: Workspace, captioner: Captioner, images: list[Path], kept: KeptCaptions) -> list[dict[str, Any]]:
    """Each picture's row of `kept`, which gets every batch as it is done."""
    keys = [picture_key(path) for path in images]
    pending = [i for i, key in enumerate(keys) if key not in kept.rows]
    done, size = len(images) - len(pending), captioner.batch_size
    if done:
        ws.tracker.say(f"going on after {done:,} of {len(images):,} pictures")
    batches = (pending[i : i + size] for i in range(0, len(pending), size))
    workers = ws.workers(len(pending)) if captioner.backbone.ahead else 0
    with ws.tracker.progress("captioning", len(images), done) as bar:
        for batch in decoded(images, captioner.backbone.pixels, batches, workers=workers):
            rows: list[dict[str, Any]] = [{"key": keys[i], "error": why} for i, why in batch.unreadable]
            if batch.pixels is not None:
                for i, captions in zip(batch.rows, _captions(captioner, batch.pixels, ws.cfg.caption.num), strict=True):
                    rows.append({"key": keys[i], "captions": captions})
            kept.add(rows)
            bar.advance(len(rows))
    return [kept.rows[key] for key in keys]


def _captions(captioner: Captioner, pixels: Tensor, num: int | None) -> list[list[dict[str, Any]]]:
    if num is None:
        return [[{"caption": text}] for text in captioner.caption(pixels)]
    return [[_scores(captioner, scored) for scored in ranked] for ranked in captioner.captions(pixels, num)]


def _scores(captioner: Captioner, scored: ScoredCaption) -> dict[str, Any]:
    """Of a backbone such as SigLIP also the probability that caption and picture belong together."""
    probability = captioner.backbone.probability(scored.clip_similarity)
    return scored._asdict() | ({} if probability is None else {"probability": probability})


def _write_gallery(target: Path, captions: list[CaptionedPicture]) -> None:
    items = []
    for path, (best, *others) in captions[:GALLERY_LIMIT]:
        ranked = {f"{i}.": (row["caption"], {}) for i, row in enumerate(others, 2)}
        items.append(GalleryItem(path.name, path, best["caption"], others=ranked))
    write_text(target, render_gallery("Captions", items, len(captions)))


def _report_unreadable(ws: Workspace, target: Path, unreadable: list[dict[str, str]], images: int) -> None:
    for row in unreadable[:CONSOLE_LIMIT]:
        ws.tracker.say(f"left out: {row['error']}")
    if unreadable:
        write_json(target, unreadable)
        ws.tracker.say(f"{len(unreadable)} of {images} pictures cannot be read and are left out: {target}")
    else:
        target.unlink(missing_ok=True)
