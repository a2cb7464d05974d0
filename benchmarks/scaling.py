"""How time, memory and disk grow with N images and M sentences: sizes in, fitted exponents out.

Usage: nice python benchmarks/scaling.py [--only preprocess aggregate ...] [--images 1000 10000 100000 1000000]
                                         [--sentences 10000 100000 1000000 3000000] [--output scaling]

Writes OUTPUT.json and OUTPUT.md after each size. Embeddings are drawn at random, D = 768; pictures are drawn JPEGs and
captions are of a handful of words. Parts, with what grows:
  preprocess   N  image files to their embeddings, with a tiny CLIP: what lies around the encoder
  aggregate    M  2,048 images over the corpus
  initialize   M  one step: the batch of 16 sentences out of M and their embeddings
  train        N  one step: the batch of 128 images out of N, with 640 sentences out of 5 N
  evaluate     N  BLEU, ROUGE-L and CIDEr of N captions with 5 references each
  report       N  writing the page of a run with its thumbnails, and opening it in Chromium (seconds on the clock)
Seconds are those of the CPU, which other work on the machine changes least; of a step the median of 50. Memory is the
peak of anonymous memory above that before: mapped pages of a file belong to the system. The exponent is that of a power
law fitted to the logarithms; 1 is linear, 0 is flat.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them

import argparse
import contextlib
import ctypes
import importlib.util
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aggregate import cone, peak_memory
from preprocess import WORDS, settings, write_captions, write_images

from cgtgan.assets.images import image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.evaluation.metrics import score_captions
from cgtgan.method.aggregation import aggregate_text_embeddings
from cgtgan.method.batches import EpochOrder
from cgtgan.method.gap import noised
from cgtgan.reporting.one_run import LISTED, THUMBNAIL_BYTES
from cgtgan.reporting.page import About, GalleryItem, Pictures, Report, render_report
from cgtgan.runtime.artifacts import Embeddings, load_embeddings, write_embeddings
from cgtgan.runtime.devices import Devices
from cgtgan.training.batches import Batches

DIM, PIECE, COLUMNS = 768, 50_000, ("seconds", "memory_mb", "disk_mb", "opens_in")
Row = dict[str, Any]


def _embeddings(home: Path, name: str, rows: int) -> Embeddings:
    """Drawn and written in pieces: three million of them are 4.6 GB."""
    path = home / f"{name}.safetensors"
    pieces = (cone(min(PIECE, rows - first), DIM, 2 + first) for first in range(0, rows, PIECE))
    write_embeddings(path, pieces, DIM, range(rows), kind=name, producer={"rows": rows})
    return load_embeddings(path, kind=name)


def _disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peak(work: Callable[[], object]) -> float:
    """Megabytes at most, sampled every 20 ms, once what was freed before has gone back to the system (glibc)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return peak_memory(work, 0.02) / 1e6


def _measured(work: Callable[[], object]) -> Row:
    started = time.process_time()
    memory = _peak(work)
    return {"seconds": time.process_time() - started, "memory_mb": memory}


def _per_step(step: Callable[[int], object]) -> Row:
    taken: list[float] = []

    def steps() -> None:
        for number in range(1, 51):
            started = time.process_time()
            step(number)
            taken.append(time.process_time() - started)

    memory = _peak(steps)
    return {"seconds": statistics.median(taken), "memory_mb": memory}


def preprocess(home: Path, images: int) -> Row:
    write_images(home / "drawn", 16, None)
    write_images(home / "photos", images, str(home / "drawn"))
    write_captions(home / "captions.txt", 10)
    cfg = settings(home, "tiny", "cpu")
    cfg.clip_backbone.kind = "random"
    ws = Workspace(cfg)
    return _measured(lambda: image_embeddings(ws, "train")) | {"disk_mb": _disk(home / "artifacts") / 1e6}


def aggregate(home: Path, sentences: int) -> Row:
    corpus, images = _embeddings(home, "corpus", sentences), cone(min(2048, sentences), DIM, 1)
    return _measured(lambda: aggregate_text_embeddings(images, corpus.vectors, 100.0)) | {"disk_mb": _disk(home) / 1e6}


def initialize(home: Path, sentences: int) -> Row:
    corpus, order = _embeddings(home, "corpus", sentences), EpochOrder(sentences, 0, "initial")
    return _per_step(
        lambda step: noised(corpus.vectors[torch.from_numpy(order.batch(step, 16))].float(), 0.1, "raw", 0)
    )


def train(home: Path, images: int) -> Row:
    vectors, corpus = _embeddings(home, "images", images), [f"sentence {i}" for i in range(5 * images)]
    batches = Batches(Config(), Devices(), vectors, vectors, corpus)
    return _per_step(batches.batch)


def evaluate(_home: Path, images: int) -> Row:
    words = np.array(WORDS)
    drawn = np.random.default_rng(0).choice(words, (images, 6, 10))
    texts = [[" ".join(row) for row in rows] for rows in drawn]
    captions, references = {i: t[0] for i, t in enumerate(texts)}, {i: t[1:] for i, t in enumerate(texts)}
    return _measured(lambda: score_captions(captions, references, ("bleu", "rouge_l", "cider")))


def report(home: Path, images: int) -> Row:
    words, metrics = sorted(set(WORDS)), ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
    rng, listed = random.Random(0), range(min(images, LISTED))  # as stage=report lists them

    def written() -> tuple[str, dict[str, float]]:
        return " ".join(rng.choices(words, k=10)), {metric: rng.random() for metric in metrics}

    items = []
    for i in listed:
        caption, scores = written()
        others = {name: written() for name in ("init", "projection", "supervised")}
        items.append(GalleryItem(i, None, caption, [written()[0] for _ in range(5)], scores, others))
    thumbnail = "data:image/jpeg;base64," + "A" * (4 * THUMBNAIL_BYTES // 3 // LISTED)
    pictures = Pictures(items, "CgT-GAN", dict.fromkeys(listed, (thumbnail, False)))
    page = home / "report.html"
    row = _measured(lambda: page.write_text(render_report(Report(About("", "", ""), pictures=pictures))))
    return row | {"disk_mb": page.stat().st_size / 1e6} | _opened(page)


def _opened(page: Path) -> Row:
    """Seconds on the clock from the start of loading until the cards are there; empty without a Chromium."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None or importlib.util.find_spec("playwright") is None:
        return {}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page()
        started = time.perf_counter()
        tab.goto(page.as_uri())
        tab.wait_for_selector("#found .card")
        seconds = time.perf_counter() - started
        browser.close()
    return {"opens_in": seconds}


PARTS: dict[str, tuple[Callable[[Path, int], Row], str]] = {
    "preprocess": (preprocess, "images"), "aggregate": (aggregate, "sentences"),
    "initialize": (initialize, "sentences"), "train": (train, "images"), "evaluate": (evaluate, "images"),
    "report": (report, "images"),
}  # fmt: skip


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """Of the power law through the points, by least squares of the logarithms; None for fewer than two sizes."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def markdown(found: dict[str, list[Row]], fitted: dict[str, Row]) -> str:
    lines = ["| part | size | seconds of CPU | memory, MB | disk, MB | opens in, s |", "|" + "---|" * 6]
    for part, rows in found.items():
        for row in rows:
            values = [f"{row[key]:.3g}" if key in row else "-" for key in COLUMNS]
            lines.append(f"| {part} | {row['size']:,} {PARTS[part][1]} | {' | '.join(values)} |")
        powers = [fitted[part].get(key) for key in COLUMNS]
        lines.append(f"| | exponent | {' | '.join('-' if x is None else f'{x:.2f}' for x in powers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--sentences", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 3_000_000])
    parser.add_argument("--output", type=Path, default=Path("scaling"))
    args = parser.parse_args()
    found: dict[str, list[Row]] = {}
    fitted: dict[str, Row] = {}
    for part in args.only:
        measure, of = PARTS[part]
        for size in sorted(args.images if of == "images" else args.sentences):
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(part, []).append({"size": size} | measure(Path(folder), size))
            sizes, *columns = zip(*(row.values() for row in found[part]), strict=True)
            names = list(found[part][0])[1:]
            fitted[part] = {name: exponent(sizes, column) for name, column in zip(names, columns, strict=True)}
            args.output.with_suffix(".json").write_text(json.dumps({"rows": found, "exponents": fitted}, indent=1))
            args.output.with_suffix(".md").write_text(markdown(found, fitted))
    print(markdown(found, fitted))


if __name__ == "__main__":
    main()
