"""aggregate: image and sentence embeddings -> one aggregated text embedding an image, rows as the images."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from cgtgan.artifacts import Embeddings, fingerprint, load_embeddings, save_embeddings
from cgtgan.config import Config
from cgtgan.method.aggregation import aggregate_text_embeddings
from cgtgan.stages.preprocess import SPLITS, image_embeddings, sentence_embeddings
from cgtgan.stages.workspace import Workspace

BLOCK = 4096  # images between two moves of the progress bar


def run(cfg: Config) -> None:
    aggregate(Workspace(cfg))


def aggregate(ws: Workspace) -> None:
    for name in SPLITS:
        aggregated_embeddings(ws, name)


def aggregated_embeddings(ws: Workspace, name: str) -> Embeddings:
    """(N, D) of a split: the corpus as its images see it (METHOD: Aggregation)"""
    images, texts = image_embeddings(ws, name), sentence_embeddings(ws)
    t = ws.cfg.aggregation_t.t
    producer = {"images": images.header.fingerprint, "sentences": texts.header.fingerprint, "t": t}

    def write(path: Path) -> None:
        start, parts = time.perf_counter(), []
        with ws.tracker.progress(f"aggregating {name}, t={t:g}", len(images.ids)) as bar:
            for first in range(0, len(images.ids), BLOCK):
                block = images.vectors[first : first + BLOCK]
                parts.append(
                    aggregate_text_embeddings(block, texts.vectors, t, chunk_bytes=ws.cfg.aggregation_t.chunk_mb * 2**20, device=ws.device)
                )
                bar.advance(len(block))
        save_embeddings(path, torch.cat(parts), images.ids, kind="aggregated_embeddings", producer=producer)
        seconds = time.perf_counter() - start
        ws.tracker.say(f"aggregated {len(images.ids):,} {name} images over {len(texts.ids):,} sentences in {seconds:.1f} s")

    path = ws.store.path("aggregated_embeddings", producer, ".safetensors")
    ws.store.make(path, write)
    return load_embeddings(path, kind="aggregated_embeddings", fingerprint=fingerprint(producer), rows=len(images.ids))
