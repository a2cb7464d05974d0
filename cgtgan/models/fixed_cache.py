"""A key/value cache of fixed size: every token step has the same shapes and addresses, so it can be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticLayer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cgtgan.errors import InputError

GROWING, STATIC, COMPILED = "growing", "static", "compiled"  # the values of decode.cache


class FixedCache:
    """Keys and values (rows, H, positions, E/H) of every layer, filled in place; empty positions are masked.

    compiled: the token step is one graph without breaks; on a GPU inductor compiles it and CUDA graphs replay it,
    elsewhere it is traced and runs as it is. A compiled step belongs to its buffers, so the cache is used again:
    fewer rows than it has are filled up, and what the rows that fill it say is cut off.
    """

    def __init__(self, gpt: PreTrainedModel, rows: int, positions: int, *, compiled: bool):
        self.gpt, self.rows, self.positions = gpt, rows, positions
        self.cache = Cache(layers=[])
        self.used, self.worked = rows, False
        self.step: Callable[[PreTrainedModel, Tensor, Cache], Tensor] = _next_logits
        if compiled:
            # isolated: torch counts the versions of a function, and other models and sizes would use up its limit
            how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True}
            how |= {"mode": "reduce-overhead"} if gpt.device.type == "cuda" else {"backend": "eager"}
            self.step = torch.compile(_next_logits, **how)

    def fits(self, rows: int, positions: int, states: Tensor) -> bool:
        """Whether so many rows and positions of states of this dtype and device have room."""
        layers: list[Any] = list(self.cache.layers)
        kept = layers[0].keys
        if (kept.dtype, kept.device) != (states.dtype, states.device):
            return False
        return rows <= self.rows and positions <= self.positions

    def begin(self, read: DynamicCache, copies: int) -> None:
        """Take the states of a prefix, read once per image, `copies` times each; what was there before is forgotten."""
        if not self.cache.layers:
            self.cache = Cache(layers=[StaticLayer(self.positions) for _ in read.layers])
        self.cache.reset()
        layers: list[Any] = list(read.layers)
        for number, layer in enumerate(layers):
            self.used = len(layer.keys) * copies
            fill = (*[0] * 7, self.rows - self.used)
            keys, values = (F.pad(x.repeat_interleave(copies, dim=0), fill) for x in (layer.keys, layer.values))
            self.cache.update(keys, values, number)

    def next_logits(self, tokens: Tensor) -> Tensor:
        """(R,) tokens, which the cache takes in -> (R, V) float32, which the next call may overwrite.

        Raises `InputError` where torch cannot make one graph of the step.
        """
        filled = F.pad(tokens, (0, self.rows - self.used))
        if self.step is _next_logits:
            return self.step(self.gpt, filled, self.cache)[: self.used]
        torch.compiler.cudagraph_mark_step_begin()
        try:
            logits = self.step(self.gpt, filled, self.cache)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.worked:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"decode.cache={COMPILED}: torch cannot compile the token step of the language model, a "
                f"{type(self.gpt).__name__} ({reason}): set decode.cache={STATIC} or {GROWING}"
            ) from error
        self.worked = True
        return logits[: self.used]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row `indices[i]` is, for all R rows."""
        rest = torch.arange(self.used, self.rows, device=indices.device)
        rows = torch.cat([indices, rest])
        layers: list[Any] = list(self.cache.layers)
        for layer in layers:
            layer.keys.copy_(layer.keys.index_select(0, rows))
            layer.values.copy_(layer.values.index_select(0, rows))


def check_fits(gpt: PreTrainedModel, kind: str) -> None:
    """Raise `InputError` for a language model that keeps something else than the keys and values of all positions."""
    layers = DynamicCache(config=gpt.config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise InputError(
            f"decode.cache={kind} does not fit the language model, a {type(gpt).__name__}, which keeps other states "
            f"than keys and values: set decode.cache={GROWING}"
        )


def _next_logits(gpt: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    words = gpt.get_input_embeddings()(tokens[:, None])  # ids would be looked at for padding, on the host
    return gpt(inputs_embeds=words, past_key_values=cache, use_cache=True).logits[:, -1].float()
