"""preprocess: images, annotations and raw corpus -> image embeddings, clean sentences, sentence embeddings."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cgtgan.artifacts import (
    Embeddings,
    file_fingerprint,
    fingerprint,
    load_embeddings,
    load_sentences,
    read_json,
    save_sentences,
    write_embeddings,
    write_json,
)
from cgtgan.config import Config, as_dict
from cgtgan.data.annotations import Captions
from cgtgan.data.corpora import CleanedCorpus, clean_captions, corpus_path, embedded_text, is_beside_its_images, load_corpus
from cgtgan.data.datasets import ImageRecord, load_pairs, training_caption_files, training_captions
from cgtgan.data.loading import decoded, tokenised
from cgtgan.errors import InputError, UserError
from cgtgan.models.clip_inputs import by_length
from cgtgan.shards import Shards, read_meta
from cgtgan.stages.backbone import backbone_producer, open_backbone
from cgtgan.stages.released import released_corpus, released_images, released_sentence_embeddings
from cgtgan.stages.workspace import Workspace
from cgtgan.tracking import Bar

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


def corpus_sentences(ws: Workspace) -> tuple[Sequence[str], dict[str, int], dict[str, Any]]:
    """(clean sentences, counts of the cleaning, what they were made from)."""
    if (given := released_corpus(ws)) is not None:
        return given
    config = ws.cfg.corpus
    own = is_beside_its_images(config, ws.cfg.dataset)
    files = training_caption_files(ws.cfg.dataset, ws.data_root) if own else [corpus_path(config, ws.data_root)]
    if not all(file.is_file() for file in files):
        # raises the sentence that says where to get it
        training_captions(ws.cfg.dataset, ws.data_root) if own else load_corpus(config, files[0])
    fingerprints = [file_fingerprint(file) for file in files]
    producer = as_dict(config) | {"file": fingerprints if len(files) > 1 else fingerprints[0]}
    for name in ("path", "name"):
        del producer[name]

    def write(path: Path) -> None:
        corpus = load_corpus(config, files[-1], training_captions(ws.cfg.dataset, ws.data_root) if own else None)
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
    path = ws.store.path("sentence_embeddings", producer, ".safetensors")
    cut = ws.cfg.clip_backbone.text_shard
    shards = Shards(path, -(-len(sentences) // cut), cut, path.exists)
    if not path.exists():
        shards.discard(lambda piece: read_meta(piece) is None)
        _fill(ws, shards, "sentences", len(sentences), lambda claims, bar: _encode_texts(ws, shards, sentences, claims, bar))

        def write(path: Path) -> None:
            dim = _vectors(shards, 0).shape[1]
            pieces = (_vectors(shards, i) for i in range(shards.count))
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
        _check_finite(vectors, [sentences[i] for i in part])
        shards.keep(part.start // shards.cut, {"vectors": vectors}, {})


# ------------------------------------------------------------------------------------------------------------------ images


def image_embeddings(ws: Workspace, name: str) -> Embeddings:
    """(N, D) of a split, ids in `ids`; images that cannot be read are left out, as far as `dataset.max_bad_images` allows."""
    if (given := released_images(ws, name)) is not None:
        return given
    images = ws.split(name).images
    # COCO's and Flickr30k's ids name one picture everywhere; in folders of one's own 1.jpg may be any
    told_by = _size if ws.cfg.dataset.kind == "folder" else lambda _path: None
    listed = fingerprint([[i.image_id, i.path.name, *filter(None, [told_by(i.path)])] for i in images])
    producer = ws.identity() | {"split": name, "images": listed, "backbone": backbone_producer(ws)}
    producer |= {"jpeg_draft": True} if ws.cfg.dataset.jpeg_draft else {}
    path = ws.store.path("image_embeddings", producer, ".safetensors")
    report = path.with_suffix(".bad.json")
    cut = ws.cfg.clip_backbone.image_shard
    shards = Shards(path, -(-len(images) // cut), cut, path.exists)
    if not path.exists():
        shards.discard(_is_stale)
        _fill(ws, shards, f"{name} images", len(images), lambda claims, bar: _encode_images(ws, shards, images, claims, bar))

        def write(path: Path) -> None:
            metas = [read_meta(shards.file(i)) or {} for i in range(shards.count)]
            bad = [b for meta in metas for b in meta["bad"]]
            ids = [images[row].image_id for meta in metas for row in meta["rows"]]
            report.unlink(missing_ok=True)  # of an earlier try
            if bad:
                write_json(report, [{"image_id": images[b["row"]].image_id, "why": b["why"]} for b in bad])
                _check_bad(ws, name, report, len(images), none_left=not ids)
            pieces = (_vectors(shards, i) for i in range(shards.count))
            write_embeddings(path, pieces, _vectors(shards, 0).shape[1], ids, kind="image_embeddings", producer=producer)

        ws.store.make(path, write)
        shards.remove()
    if report.is_file():
        _check_bad(ws, name, report, len(images))
    return load_embeddings(path, kind="image_embeddings", fingerprint=fingerprint(producer))


def _check_bad(ws: Workspace, name: str, report: Path, images: int, *, none_left: bool = False) -> None:
    bad, allowed = read_json(report), ws.cfg.dataset.max_bad_images
    if len(bad) > allowed or none_left:
        mend = "mend them" if none_left else f"mend them, or allow them with dataset.max_bad_images={len(bad)} (now {allowed})"
        raise InputError(
            f"{len(bad)} of {images} {name} images cannot be read, the first: {bad[0]['why']}; all are listed in {report}; {mend}"
        )
    if report not in ws.said:
        ws.said.add(report)
        ws.tracker.say(f"{len(bad)} of {images} {name} images cannot be read and are left out: {report}")


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
    draft = 2 * backbone.image_size if ws.cfg.dataset.jpeg_draft else 0
    for batch in decoded(paths, backbone.pixels, batches(), workers=ws.workers(len(images)), draft=draft):
        if batch.pixels is not None:
            vectors.append(encoder(batch.pixels))
            _check_finite(vectors[-1], [paths[row] for row in batch.rows])
        rows += batch.rows
        bad += [{"row": row, "why": why, "path": str(paths[row]), "state": _state(paths[row])} for row, why in batch.unreadable]
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
    """What tells whether a file was mended since."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _is_stale(piece: Path) -> bool:
    """Whether a piece is damaged, or has a bad image that is another file now."""
    meta = read_meta(piece)
    return meta is None or any(_state(Path(b["path"])) != b["state"] for b in meta["bad"])


# ----------------------------------------------------------------------------------------------------- both kinds of pieces


def _fill(ws: Workspace, shards: Shards, what: str, rows: int, make: Callable[[Iterator[int], Bar], None]) -> None:
    there = min(rows, (shards.count - len(shards.missing())) * shards.cut)
    if there:
        ws.tracker.say(f"encoding {what}: going on after {there:,} of {rows:,}")
    with ws.tracker.progress(f"encoding {what}", rows, there) as bar:
        shards.fill(
            lambda claims: make(claims, bar),
            lambda found: bar.reach(min(rows, found * shards.cut)),
            lambda missing: ws.tracker.say(f"encoding {what}: waiting for other processes that work on {missing} pieces of {shards.cut}"),
        )


def _vectors(shards: Shards, index: int) -> Tensor:
    with safe_open(shards.file(index), framework="pt") as f:
        return f.get_tensor("vectors")


def _check_finite(vectors: Tensor, names: Sequence[object]) -> None:
    bad = (~torch.isfinite(vectors).all(dim=1)).nonzero()
    if len(bad):
        raise InputError(
            f"the embedding of {str(names[int(bad[0])])!r} is not finite in float16: the backbone's weights are damaged, or its numbers "
            "too large for clip_backbone.dtype (try float32)"
        )


class Encoder:
    """Encodes in batches that fit: when memory runs out, in halves from then on. `size` is what fitted last."""

    def __init__(self, ws: Workspace, encode: Callable[[Any], Tensor], field: str, size: int):
        self.encode, self.field, self.size, self.say = encode, field, size, ws.tracker.say

    def __call__(self, batch: Any) -> Tensor:
        """A batch (B, ...) or list of B -> (B, D) float16 on the CPU. Raises `UserError` if not even one item fits."""
        parts: list[Tensor] = []
        done = 0
        while done < len(batch):
            part = self._try(batch[done : done + self.size])
            if part is not None:
                parts.append(part)
                done += len(part)
            elif self.size == 1:
                raise UserError(f"{self.field}: memory does not even hold a batch of one; use a smaller backbone or another device")
            else:
                self.size = max(1, min(self.size, len(batch) - done) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self.say(f"memory ran out: going on with {self.field}={self.size}")
        return torch.cat(parts)

    def _try(self, batch: Any) -> Tensor | None:
        try:
            return self.encode(batch).to("cpu", torch.float16)
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except RuntimeError as e:
            if "can't allocate memory" not in str(e):  # torch's own allocator on the CPU
                raise
            return None


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
