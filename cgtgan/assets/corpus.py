"""The corpus: clean sentences and their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cgtgan.assets.backbone import backbone_producer, open_backbone
from cgtgan.assets.encoding import Encoder, check_finite, fill_shards, read_vectors
from cgtgan.assets.images import data_root
from cgtgan.assets.released import released_corpus, released_sentence_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.data.annotated_images import training_caption_files, training_captions
from cgtgan.data.corpora import corpus_path, embedded_text, has_entities, is_beside_its_images, load_corpus
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.loading import tokenised
from cgtgan.models.clip_inputs import by_length
from cgtgan.runtime.artifacts import (
    Embeddings,
    file_fingerprint,
    fingerprint,
    load_embeddings,
    load_sentences,
    read_json,
    save_sentences,
    write_embeddings,
)
from cgtgan.runtime.bars import Bar
from cgtgan.runtime.producers import settings_of, with_format
from cgtgan.runtime.shards import Shards, read_meta

# Raise them where the same text is cleaned, or the same sentence embedded, in another way (runtime/producers.py).
SENTENCES_FORMAT = 1
ENTITIES_FORMAT = 2  # of files with HTML entities, which 2 replaces
SENTENCE_EMBEDDINGS_FORMAT = 1


def demo_overlap(ws: Workspace) -> dict[str, Any] | None:
    """How many test references are also corpus sentences, as counted when the demo was drawn; None of other data."""
    if not (KINDS[ws.cfg.dataset.kind].drawn and ws.cfg.corpus.kind.startswith("demo")):
        return None
    world = read_json(data_root(ws) / "world.json")
    return world["overlap"]["external" if ws.cfg.corpus.kind == "demo_external" else "corpus"]


def corpus_sentences(ws: Workspace) -> tuple[Sequence[str], dict[str, int], dict[str, Any]]:
    """(clean sentences, counts of the cleaning, what they were made from)."""
    if (given := released_corpus(ws)) is not None:
        return given
    config = ws.cfg.corpus
    own = is_beside_its_images(config, ws.cfg.dataset)
    files = training_caption_files(ws.cfg.dataset, data_root(ws)) if own else [corpus_path(config, data_root(ws))]
    if not all(file.is_file() for file in files):
        # raises the sentence that says where to get it
        training_captions(ws.cfg.dataset, data_root(ws)) if own else load_corpus(config, files[0])
    fingerprints = [file_fingerprint(file) for file in files]
    producer = settings_of(config) | {"file": fingerprints if len(files) > 1 else fingerprints[0]}
    for name in ("path", "name"):
        del producer[name]
    cleaned_anew = (
        not config.released
        and not config.column
        and ws.once(("entities", *files), lambda: any(map(has_entities, files)))
    )
    producer = with_format(producer, ENTITIES_FORMAT if cleaned_anew else SENTENCES_FORMAT)

    def write(path: Path) -> None:
        corpus = load_corpus(config, files[-1], training_captions(ws.cfg.dataset, data_root(ws)) if own else None)
        save_sentences(path, corpus.sentences, producer=producer, counts=corpus.counts)

    path = ws.store.path("sentences", producer, ".safetensors")
    ws.store.make(path, write)
    sentences, counts = load_sentences(path)
    return sentences, counts, producer


def sentence_embeddings(ws: Workspace) -> Embeddings:
    """(M, D), rows as the corpus's sentences, which are embedded without their final '.'"""
    if (given := released_sentence_embeddings(ws)) is not None:
        return given
    sentences, _, corpus = corpus_sentences(ws)
    producer = {"sentences": fingerprint(corpus), "backbone": backbone_producer(ws)}
    producer = with_format(producer, SENTENCE_EMBEDDINGS_FORMAT)
    path = ws.store.path("sentence_embeddings", producer, ".safetensors")
    cut = ws.cfg.clip_backbone.text_shard
    shards = Shards(path, -(-len(sentences) // cut), cut, path.exists)
    ws.store.tidy(path)
    if not path.exists():
        shards.discard(lambda piece: read_meta(piece) is None)
        fill_shards(
            ws,
            shards,
            "sentences",
            len(sentences),
            lambda claims, bar: _encode_texts(ws, shards, sentences, claims, bar),
        )

        def write(path: Path) -> None:
            dim = read_vectors(shards, 0).shape[1]
            pieces = (read_vectors(shards, i) for i in range(shards.count))
            write_embeddings(path, pieces, dim, range(len(sentences)), kind="sentence_embeddings", producer=producer)

        ws.store.make(path, write)
        shards.remove()
    return load_embeddings(path, kind="sentence_embeddings", fingerprint=fingerprint(producer))


def _encode_texts(ws: Workspace, shards: Shards, sentences: Sequence[str], claims: Iterator[int], bar: Bar) -> None:
    backbone = open_backbone(ws)
    encoder = Encoder(ws, backbone.encode_tokens, "clip_backbone.text_batch_size", ws.cfg.clip_backbone.text_batch_size)
    parts = (range(i * shards.cut, min((i + 1) * shards.cut, len(sentences))) for i in claims)
    texts = [embedded_text(s) for s in sentences]
    for part, rows in tokenised(texts, backbone.tokens, parts, workers=ws.workers(len(sentences))):
        vectors = torch.empty(len(rows), backbone.dim, dtype=torch.float16)
        # a batch is as long as its longest text, and what is said twice is encoded once
        for places in by_length(rows, encoder.size):
            found = encoder([rows[same[0]] for same in places])
            for vector, same in zip(found, places, strict=True):
                vectors[same] = vector
            bar.advance(sum(map(len, places)))
        check_finite(vectors, [sentences[i] for i in part])
        shards.keep(part.start // shards.cut, {"vectors": vectors}, {})
