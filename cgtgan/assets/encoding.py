"""Rows into embeddings, in pieces that survive a kill and that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cgtgan.assets.workspace import Workspace
from cgtgan.errors import InputError, UserError
from cgtgan.runtime.bars import Bar
from cgtgan.runtime.shards import Shards


def fill_shards(
    ws: Workspace, shards: Shards, what: str, rows: int, make: Callable[[Iterator[int], Bar], None]
) -> None:
    ws.store.will_make(shards.path)
    there = min(rows, (shards.count - len(shards.missing())) * shards.cut)
    if there:
        ws.tracker.say(f"encoding {what}: going on after {there:,} of {rows:,}")
    with ws.tracker.progress(f"encoding {what}", rows, there) as bar:
        shards.fill(
            lambda claims: make(claims, bar),
            lambda found: bar.reach(min(rows, found * shards.cut)),
            lambda text: ws.tracker.say(f"encoding {what}: {text}"),
        )


def read_vectors(shards: Shards, index: int) -> Tensor:
    with safe_open(shards.file(index), framework="pt") as f:
        return f.get_tensor("vectors")


def check_finite(vectors: Tensor, names: Sequence[object]) -> None:
    bad = (~torch.isfinite(vectors).all(dim=1)).nonzero()
    if len(bad):
        raise InputError(
            f"the embedding of {str(names[int(bad[0])])!r} is not finite in float16: the backbone's weights are "
            "damaged, or its numbers "
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
                raise UserError(
                    f"{self.field}: memory does not even hold a batch of one; use a smaller backbone or another device"
                )
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
