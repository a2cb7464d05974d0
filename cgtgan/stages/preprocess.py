"""preprocess: images, annotations and raw corpus -> image embeddings, clean sentences, sentence embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cgtgan.artifacts import (
    Embeddings,
    file_fingerprint,
    fingerprint,
    load_embeddings,
    load_sentences,
    save_embeddings,
    save_sentences,
    write_json,
)
from cgtgan.config import Config, as_dict
from cgtgan.data.annotations import Captions
from cgtgan.data.corpora import CleanedCorpus, clean_captions, corpus_path, embedded_text, load_corpus
from cgtgan.data.datasets import ImageRecord, load_pairs, open_image
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.stages.backbone import backbone_producer, open_backbone
from cgtgan.stages.workspace import Workspace

SPLITS = ("train", "val", "test")


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    preprocess(ws)


def preprocess(ws: Workspace) -> None:
    # inputs first: a missing file is said before an hour of encoding, not after
    for name in SPLITS:
        ws.split(name)
    sentences, counts, _ = corpus_sentences(ws)
    ws.tracker.say(f"corpus: {CleanedCorpus(sentences, counts).summary()}")
    _say_overlap(ws)
    for name in SPLITS:
        embeddings = image_embeddings(ws, name)
        ws.tracker.say(f"{name}: {len(embeddings.ids):,} image embeddings of {embeddings.header.dim} numbers")
    sentence_embeddings(ws)


def _say_overlap(ws: Workspace) -> None:
    if ws.cfg.dataset.kind == "demo" and ws.cfg.corpus.kind.startswith("demo"):
        found = demo_overlap(ws)
        ws.tracker.say(
            f"overlap: {found['references_in_corpus']} of {found['references']} test references stand in the corpus word for word "
            f"({found['scenes_in_corpus']} of {found['scenes']} test images have one)"
        )


def demo_overlap(ws: Workspace) -> dict[str, Any]:
    """How many test references stand in the corpus word for word, as counted when the world was drawn."""
    world = json.loads((ws.data_root / "world.json").read_text(encoding="utf-8"))
    return world["overlap"]["external" if ws.cfg.corpus.kind == "demo_external" else "corpus"]


# ------------------------------------------------------------------------------------------------------------------ corpus


def corpus_sentences(ws: Workspace) -> tuple[list[str], dict[str, int], dict[str, Any]]:
    """(clean sentences, counts of the cleaning, what they were made from)."""
    config = ws.cfg.corpus
    source = corpus_path(config, ws.data_root)
    if not source.is_file():
        load_corpus(config, source)  # raises the sentence that says where to get it
    producer = as_dict(config) | {"file": file_fingerprint(source)}
    for name in ("path", "name"):
        del producer[name]

    def write(path: Path) -> None:
        corpus = load_corpus(config, source)
        save_sentences(path, corpus.sentences, producer=producer, counts=corpus.counts)

    path = ws.store.path("sentences", producer, ".json")
    ws.store.make(path, write)
    sentences, counts = load_sentences(path)
    return sentences, counts, producer


def sentence_embeddings(ws: Workspace) -> Embeddings:
    """(M, D), rows as the corpus's sentences, which are embedded without their final '.'"""
    sentences, _, corpus = corpus_sentences(ws)
    producer = {"sentences": fingerprint(corpus), "backbone": backbone_producer(ws)}

    def write(path: Path) -> None:
        save_embeddings(path, _encode_texts(ws, sentences), range(len(sentences)), kind="sentence_embeddings", producer=producer)

    path = ws.store.path("sentence_embeddings", producer, ".safetensors")
    ws.store.make(path, write)
    return load_embeddings(path, kind="sentence_embeddings", fingerprint=fingerprint(producer))


def _encode_texts(ws: Workspace, sentences: list[str]) -> torch.Tensor:
    backbone, size = open_backbone(ws), ws.cfg.clip_backbone.text_batch_size
    texts = [embedded_text(s) for s in sentences]
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # a batch is as long as its longest text
    out = torch.empty(len(texts), backbone.dim, dtype=torch.float16)
    with ws.tracker.progress("encoding sentences", len(texts)) as bar:
        for start in range(0, len(texts), size):
            rows = by_length[start : start + size]
            out[rows] = backbone.encode_texts([texts[i] for i in rows], size).to("cpu", torch.float16)
            bar.advance(len(rows))
    return out


# ------------------------------------------------------------------------------------------------------------------ images


def image_embeddings(ws: Workspace, name: str) -> Embeddings:
    """(N, D) of a split, ids in `ids`"""
    images = ws.split(name).images
    listed = fingerprint([[i.image_id, i.path.name] for i in images])
    producer = ws.identity() | {"split": name, "images": listed, "backbone": backbone_producer(ws)}
    path = ws.store.path("image_embeddings", producer, ".safetensors")
    ws.store.make(path, lambda p: _encode_images(ws, name, images, producer, p))
    return load_embeddings(path, kind="image_embeddings", fingerprint=fingerprint(producer))


def _encode_images(ws: Workspace, name: str, images: list[ImageRecord], producer: dict[str, Any], path: Path) -> None:
    backbone, size = open_backbone(ws), ws.cfg.clip_backbone.image_batch_size
    vectors: list[torch.Tensor] = []
    ids: list[Any] = []
    bad: list[dict[str, Any]] = []
    with ws.tracker.progress(f"encoding {name} images", len(images)) as bar:
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            pixels = []
            for record in batch:
                try:
                    pixels.append(load_pixels(backbone, record.path))
                    ids.append(record.image_id)
                except (InputError, MissingFileError) as e:
                    bad.append({"image_id": record.image_id, "why": str(e)})
            if pixels:
                vectors.append(backbone.encode_images(torch.stack(pixels)).to("cpu", torch.float16))
            bar.advance(len(batch))
    allowed = ws.cfg.dataset.max_bad_images
    if bad:
        report = path.with_suffix(".bad.json")
        write_json(report, bad)
        if len(bad) > allowed or not vectors:
            raise InputError(
                f"{len(bad)} of {len(images)} {name} images cannot be read, the first: {bad[0]['why']}; all are listed in {report}; "
                f"mend them, or allow them with dataset.max_bad_images={len(bad)} (now {allowed})"
            )
        ws.tracker.say(f"{len(bad)} of {len(images)} {name} images cannot be read and are left out: {report}")
    save_embeddings(path, torch.cat(vectors), ids, kind="image_embeddings", producer=producer)


def load_pixels(backbone: ClipBackbone, path: Path) -> torch.Tensor:
    """(3, S, S) of an image file. Raises `MissingFileError` or `InputError` naming it."""
    image = open_image(path)
    try:
        return backbone.preprocess(image)
    except (ValueError, OSError) as e:
        raise InputError(f"the image {path} ({image.mode}, {image.size[0]} x {image.size[1]}) cannot be resized: {e}") from None


# ------------------------------------------------------------------------------------------------ pairs (supervised bound)


def caption_pairs(ws: Workspace) -> tuple[list[str], list[int], dict[str, Any]]:
    """Captions of the train images and the embedding row of each, for the supervised bound alone, and what they come from."""
    captions: Captions = load_pairs(ws.cfg.dataset, ws.data_root)
    rows = {image_id: row for row, image_id in enumerate(image_embeddings(ws, "train").ids)}
    # cleaned by the data set's own rule, whatever the corpus is, so that a caption ends in the stop token
    rule = "none" if ws.cfg.dataset.kind == "demo" else "coco"
    listed = [(text, rows[i]) for i, texts in captions.items() if i in rows for text in clean_captions(rule, texts)]
    if not listed:
        raise InputError("evaluate.baselines has 'supervised' and no train image has a caption: leave 'supervised' out")
    texts, places = [t for t, _ in listed], [r for _, r in listed]
    return texts, places, {"pairs": fingerprint(listed)}
