"""Image and sentence embeddings -> one aggregated text embedding per image, rows as the images.

Work is cut into blocks of images by parts of the corpus, which any number of processes share; the parts of a block
merge exactly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cgtgan.assets.corpus import sentence_embeddings
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.released import released_aggregated
from cgtgan.assets.workspace import Workspace
from cgtgan.config import AggregationConfig
from cgtgan.method.aggregation import (
    PartialAggregate,
    aggregate_at_temperatures,
    aggregate_nearest,
    aggregate_part,
    image_block,
)
from cgtgan.runtime.artifacts import Embeddings, fingerprint, load_embeddings, read_json, write_embeddings, write_json
from cgtgan.runtime.bars import Bar
from cgtgan.runtime.producers import with_format
from cgtgan.runtime.shards import Shards, read_meta

AGGREGATED_FORMAT = 1  # raise it where the same embeddings give other targets (runtime/producers.py)
BLOCK = 4096  # images of a piece of work
PART = 2**20  # sentences of a piece of work: all of COCO's, a third of Conceptual Captions


def aggregated_embeddings(ws: Workspace, name: str, t: float | None = None) -> Embeddings:
    """(N, D) of a split: the corpus as its images see it (METHOD: Aggregation); `t` replaces the run's temperature."""
    if t is not None and t != ws.cfg.aggregation_t.temperatures[0]:
        return aggregated_at_temperatures(ws, name, replace(ws.cfg.aggregation_t, t=t))[0]
    if (given := released_aggregated(ws, name)) is not None:
        return given
    return aggregated_at_temperatures(ws, name)[0]


def aggregated_at_temperatures(ws: Workspace, name: str, config: AggregationConfig | None = None) -> list[Embeddings]:
    """`aggregated_embeddings` at each of `aggregation_t.t`; missing ones are made in one pass over the corpus."""
    config = config or ws.cfg.aggregation_t
    images, texts = image_embeddings(ws, name), sentence_embeddings(ws)
    producers = {t: _producer(images, texts, config, t) for t in config.temperatures}
    paths = {t: ws.store.path("aggregated_embeddings", producer, ".safetensors") for t, producer in producers.items()}
    wanted = [t for t, path in paths.items() if not path.exists()]
    if wanted:
        ws.store.will_make(paths[wanted[0]])
        started = time.perf_counter()
        shards = _shards(ws, images, texts, config, wanted, [paths[t] for t in wanted])
        shards.discard(lambda piece: read_meta(piece) is None)
        blocks = [images.vectors[i : i + BLOCK] for i in range(0, len(images.ids), BLOCK)]
        parts = shards.count // len(blocks)
        temperatures = ", ".join(f"{t:g}" for t in wanted)
        with ws.tracker.progress(f"aggregating {name}, t={temperatures}", len(images.ids) * parts) as bar:
            shards.fill(
                lambda claims: _make_pieces(ws, shards, blocks, texts.vectors, wanted, claims, bar),
                lambda found: bar.reach(min(len(images.ids) * parts, found * BLOCK)),
                lambda text: ws.tracker.say(f"aggregating {name}: {text}"),
            )
        for i, t in enumerate(wanted):
            ws.store.make(paths[t], lambda path, i=i, t=t: _join(shards, len(blocks), i, path, images, producers[t]))
        shards.remove()
        seconds = time.perf_counter() - started
        ws.tracker.say(
            f"aggregated {len(images.ids):,} {name} images over {len(texts.ids):,} sentences at t={temperatures} "
            f"in {seconds:.1f} s"
        )
    # what a job left that was killed after the last rename
    _shards(ws, images, texts, config, config.temperatures, list(paths.values())).remove()
    for t, path in paths.items():
        if config.top_k:
            ws.once(("message", path), lambda t=t, path=path: _say_dropped(ws, name, t, path))
    return [
        load_embeddings(
            paths[t], kind="aggregated_embeddings", fingerprint=fingerprint(producers[t]), rows=len(images.ids)
        )
        for t in config.temperatures
    ]


def _producer(images: Embeddings, texts: Embeddings, config: AggregationConfig, t: float) -> dict[str, Any]:
    producer = {"images": images.header.fingerprint, "sentences": texts.header.fingerprint, "t": t}
    producer |= {"top_k": config.top_k} if config.top_k else {}
    return with_format(producer, AGGREGATED_FORMAT)


def _shards(
    ws: Workspace,
    images: Embeddings,
    texts: Embeddings,
    config: AggregationConfig,
    wanted: list[float],
    paths: list[Path],
) -> Shards:
    """A piece for each block of images and part of the corpus; the k nearest sentences are searched in all of it."""
    blocks = -(-len(images.ids) // BLOCK)
    parts = 1 if config.top_k else -(-len(texts.ids) // PART)
    together = {"t": wanted} | {k: v for k, v in _producer(images, texts, config, 0).items() if k != "t"}
    return Shards(
        ws.store.path("aggregated_embeddings", together, ""),
        blocks * parts,
        BLOCK,
        lambda: all(path.exists() for path in paths),
    )


def _make_pieces(
    ws: Workspace,
    shards: Shards,
    blocks: list[Tensor],
    texts: Tensor,
    wanted: list[float],
    claims: Iterator[int],
    bar: Bar,
) -> None:
    config = ws.cfg.aggregation_t
    chunk_bytes, parts = config.chunk_mb * 2**20, shards.count // len(blocks)
    if ws.device.type == "cuda" and 2 * texts.nbytes < torch.cuda.mem_get_info(ws.device)[0]:
        texts = texts.to(ws.device)  # once, not for every block
    for piece in claims:
        block, part = piece // parts, piece % parts
        images = blocks[block]
        if config.top_k:
            found, dropped = aggregate_nearest(
                images, texts, wanted, config.top_k, chunk_bytes=chunk_bytes, device=ws.device
            )
            tensors = {"result": found.half(), "dropped": dropped}
        elif parts == 1:
            tensors = {
                "result": aggregate_at_temperatures(
                    images, texts, wanted, chunk_bytes=chunk_bytes, device=ws.device
                ).half()
            }
        else:
            tensors = _part_of(images, texts, wanted, part, chunk_bytes, ws.device)
        shards.keep(piece, {name: tensor.cpu() for name, tensor in tensors.items()}, {})
        bar.advance(len(images))


def _part_of(
    images: Tensor, texts: Tensor, wanted: list[float], part: int, chunk_bytes: int, device: torch.device
) -> dict[str, Tensor]:
    """A `PartialAggregate` of these images over one part of the corpus, as tensors."""
    first = part * PART
    rows = image_block(images, texts, len(wanted), chunk_bytes)
    found = [
        aggregate_part(
            images[i : i + rows],
            texts[first : first + PART],
            wanted,
            chunk_bytes=chunk_bytes,
            device=device,
            first_text=first,
        )
        for i in range(0, len(images), rows)
    ]
    return {
        "highest": torch.cat([p.highest for p in found]),
        "total": torch.cat([p.total for p in found], dim=1),
        "weighted": torch.cat([p.weighted for p in found], dim=1),
    }


def _join(shards: Shards, blocks: int, index: int, path: Path, images: Embeddings, producer: dict[str, Any]) -> None:
    """The embeddings at one temperature, from the pieces in their order."""
    parts = shards.count // blocks

    def block_results() -> Iterator[Tensor]:
        for block in range(blocks):
            # one after the other: a piece is 25 MB, and a corpus may have a hundred of them
            pieces = (_read(shards.file(block * parts + part), index) for part in range(parts))
            first = next(pieces)
            if "result" in first:
                yield first["result"]
                continue
            merged = _partial(first, producer["t"])
            for piece in pieces:
                merged = merged.merge(_partial(piece, producer["t"]))
            yield merged.result()[0]

    if "top_k" in producer:
        _keep_dropped(shards, index, path)
    dim = images.vectors.shape[1]
    write_embeddings(path, block_results(), dim, images.ids, kind="aggregated_embeddings", producer=producer)


def _partial(piece: dict[str, Tensor], t: float) -> PartialAggregate:
    return PartialAggregate((t,), piece["highest"], piece["total"][None], piece["weighted"][None])


def _read(piece: Path, index: int) -> dict[str, Tensor]:
    """The tensors of a piece at one temperature."""
    with safe_open(piece, framework="pt") as f:
        return {name: f.get_tensor(name) if name == "highest" else f.get_slice(name)[index] for name in f.keys()}  # noqa: SIM118


def _keep_dropped(shards: Shards, index: int, path: Path) -> None:
    """What the sentences beyond the k nearest weigh, beside the embeddings."""
    dropped = torch.cat([_read(shards.file(i), index)["dropped"] for i in range(shards.count)])
    write_json(path.with_suffix(".dropped.json"), {"mean": dropped.mean().item(), "max": dropped.max().item()})


def _say_dropped(ws: Workspace, name: str, t: float, path: Path) -> None:
    dropped = read_json(path.with_suffix(".dropped.json"))
    ws.tracker.say(
        f"{name}, t={t:g}: outside the {ws.cfg.aggregation_t.top_k} nearest sentences lies {dropped['mean']:.2%} "
        "of the weight "
        f"(at most {dropped['max']:.2%}), which is dropped"
    )
