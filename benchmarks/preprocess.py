"""preprocess against encoding one image and one caption at a time, as the released program does, in one run.

Usage: python benchmarks/preprocess.py [--images 512] [--captions 2048] [--model ViT-B/32] [--photos FOLDER]
                                       [--device auto]

The CLIP has OpenAI's sizes and random weights. Photographs are those of --photos, repeated, or drawn JPEGs of 640 x 480
pixels; captions have the length of COCO's. Prints for images and for captions
  one at a time   clip's own pipeline: decode, resize, encode a batch of one; captions padded to 77 tokens (a sample)
  ours            the stage itself, from files to the written artifact, in the default configuration
  encoder alone   the same batches from memory, nothing else; the rest of ours is overhead
and, for --jpeg-draft, what decoding JPEGs at half their size saves and changes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cgtgan.assets.backbone import open_backbone
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.images import dataset_split, image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.data.corpora import embedded_text
from cgtgan.models.clip_inputs import CONTEXT, by_length, clip_module, preprocess

SIZES: dict[str, dict[str, Any]] = {
    "ViT-B/32": {
        "embed_dim": 512,
        "vision_layers": 12,
        "vision_width": 768,
        "vision_patch_size": 32,
        "image_resolution": 224,
    },
    "ViT-L/14": {
        "embed_dim": 768,
        "vision_layers": 24,
        "vision_width": 1024,
        "vision_patch_size": 14,
        "image_resolution": 224,
    },
    "RN50x4": {
        "embed_dim": 640,
        "vision_layers": (4, 6, 10, 6),
        "vision_width": 80,
        "vision_patch_size": None,
        "image_resolution": 288,
    },
}
WIDTHS = {"ViT-B/32": 512, "ViT-L/14": 768, "RN50x4": 640}
WORDS = [
    "a",
    "man",
    "riding",
    "wave",
    "on",
    "top",
    "of",
    "the",
    "surfboard",
    "two",
    "dogs",
    "with",
    "red",
    "ball",
    "in",
    "street",
]


def write_weights(name: str, path: Path) -> None:
    width = WIDTHS[name]
    text = {"vocab_size": 49408, "transformer_width": width, "transformer_heads": width // 64, "transformer_layers": 12}
    torch.manual_seed(0)
    torch.save(clip_module("model").CLIP(**SIZES[name], context_length=CONTEXT, **text).half().state_dict(), path)


def write_images(folder: Path, count: int, photos: str | None) -> None:
    folder.mkdir()
    found = sorted(p for p in Path(photos).rglob("*.jpg")) if photos else []
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if found:
            path.write_bytes(found[i % len(found)].read_bytes())
            continue
        layers = [Image.fromarray(random.integers(0, 256, (h, 4 * h // 3, 3), dtype=np.uint8)) for h in (6, 30, 120)]
        scaled = [np.asarray(layer.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32) for layer in layers]
        pixels = 0.6 * scaled[0] + 0.3 * scaled[1] + 0.1 * scaled[2]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_captions(path: Path, count: int) -> None:
    random = np.random.default_rng(1)
    lengths = np.clip(np.round(random.normal(10.5, 2.4, count)), 6, 40).astype(int)  # of COCO's captions
    path.write_text(
        "".join(" ".join(random.choice(WORDS, n)) + f" {i}.\n" for i, n in enumerate(lengths)), encoding="utf-8"
    )


def settings(home: Path, model: str, device: str, **dataset: Any) -> Config:
    cfg = Config(device=device, artifacts_dir=str(home / "artifacts"))
    cfg.dataset.kind, cfg.dataset.root, cfg.dataset.val_fraction, cfg.dataset.test_fraction = (
        "folder",
        str(home / "photos"),
        0.0,
        0.0,
    )
    for name, value in dataset.items():
        setattr(cfg.dataset, name, value)
    cfg.corpus.kind, cfg.corpus.rule, cfg.corpus.path = "text_file", "coco", str(home / "captions.txt")
    cfg.clip_backbone.kind, cfg.clip_backbone.model, cfg.clip_backbone.name = "openai", str(home / "clip.pt"), model
    return cfg


def table(title: str, unit: str, one: float, ours: float, alone: float) -> None:
    print(f"{title:<9} one at a time {one:7.2f} {unit}/s   ours {ours:7.2f}   encoder alone {alone:7.2f}", end="   ")
    share = ours / alone
    print(
        f"ours is {ours / one:.2f} times as fast; encoder {share:.0%} of our time, overhead {1 - share:.0%}", flush=True
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--captions", type=int, default=2048)
    parser.add_argument("--model", default="ViT-B/32", choices=list(SIZES))
    parser.add_argument("--photos")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jpeg-draft", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_weights(args.model, home / "clip.pt")
        write_images(home / "photos", args.images, args.photos)
        write_captions(home / "captions.txt", args.captions)
        ws = Workspace(settings(home, args.model, args.device))
        backbone: Any = open_backbone(ws)
        paths = [i.path for i in dataset_split(ws, "train").images]
        sentences = corpus_sentences(ws)[0]
        threads, workers = torch.get_num_threads(), ws.workers(len(paths))
        print(f"{args.model}, random weights, {ws.device}, {threads} threads, {workers} workers")

        few = paths[: min(48, len(paths))]
        started = time.perf_counter()
        for path in few:
            with Image.open(path) as image:
                backbone.model.encode_image(preprocess(image, backbone.image_size)[None].to(ws.device)).cpu()
        one = len(few) / (time.perf_counter() - started)
        started = time.perf_counter()
        image_embeddings(ws, "train")
        ours = len(paths) / (time.perf_counter() - started)
        size = ws.cfg.clip_backbone.image_batch_size
        batch = torch.stack([backbone.pixels(Image.open(p)) for p in paths[:size]])
        started = time.perf_counter()
        for _ in range(3):
            backbone.encode_images(batch).cpu()
        table("images", "image", one, ours, 3 * len(batch) / (time.perf_counter() - started))

        texts = [embedded_text(s) for s in sentences]
        few_texts = texts[:64]
        started = time.perf_counter()
        for text in few_texts:
            (row,) = backbone.tokens([text])
            backbone.encode_tokens([row + [0] * (CONTEXT - len(row))]).cpu()
        one = len(few_texts) / (time.perf_counter() - started)
        started = time.perf_counter()
        sentence_embeddings(ws)
        ours = len(texts) / (time.perf_counter() - started)
        rows = backbone.tokens(texts)
        batches = [
            [rows[same[0]] for same in places] for places in by_length(rows, ws.cfg.clip_backbone.text_batch_size)
        ]
        started = time.perf_counter()
        for ids in batches:
            backbone.encode_tokens(ids).cpu()
        table("captions", "caption", one, ours, sum(map(len, batches)) / (time.perf_counter() - started))

        if args.jpeg_draft:
            exact = image_embeddings(ws, "train").vectors.float()
            draft_ws = Workspace(settings(home, args.model, args.device, jpeg_draft=True))
            started = time.perf_counter()
            draft = image_embeddings(draft_ws, "train").vectors.float()
            rate = len(paths) / (time.perf_counter() - started)
            cosine = torch.nn.functional.cosine_similarity(exact, draft)
            agreement = f"cosine with the exact embedding {cosine.mean():.6f}, at least {cosine.min():.6f}"
            print(f"jpeg_draft: {rate:.2f} images/s; {agreement}")


if __name__ == "__main__":
    main()
