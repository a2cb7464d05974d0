"""How often a GAN step reads a value from its device: on a GPU, the host then waits until the queue has run empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.tiny_gan import one_step, tiny_parts

READS = (
    *("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "masked_scatter"),
    *("__bool__", "__int__", "__float__", "__index__"),
)


def on_gpu(values: Any) -> list[Any]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and getattr(x, "on_gpu", False)]


class DeviceReads(TorchFunctionMode):
    """Counts reads, and indexing by masks, of tensors that would lie on a GPU, by the function's name.

    Those are the weights, what a call with `device` or `.to` puts there, and what is made from them; they are marked.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.seen: Counter[str] = Counter()
        for module in modules:
            self.mark([*module.parameters(), *module.buffers()])

    def mark(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                tensor.on_gpu = True  # pyright: ignore[reportAttributeAccessIssue]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        is_there = bool(on_gpu((args, kwargs)))
        masks = on_gpu(args[1]) if name in ("__getitem__", "__setitem__") else []
        if (is_there and name in READS) or any(mask.dtype == torch.bool for mask in masks):
            self.seen[name] += 1
        result = func(*args, **kwargs)
        moved = kwargs.get("device") is not None or (name == "to" and isinstance(args[1], torch.device))
        if (moved or name == "cpu") and args and result is args[0]:
            result = result.view_as(result)  # a GPU would have made a copy
        if name != "cpu" and (is_there or moved):
            self.mark(result)
        return result


def test_what_counts_as_a_read() -> None:
    with DeviceReads() as reads:
        host = torch.arange(4)
        host.tolist()
        device = host.to(torch.device("cpu")) * 2
        device[host > 1] = 0  # the mask is of the host
        assert reads.seen == {}
        device[device > 1] = 0
        assert int(device.sum()) == 0
        device.cpu().tolist()
    assert reads.seen == {"__setitem__": 1, "__int__": 1, "cpu": 1}


@pytest.mark.parametrize(("cache", "expected"), [("growing", {"tolist": 19}), ("static", {"__bool__": 2})])
def test_drawing_20_tokens_asks_after_each_one_or_after_8_and_16(cache: str, expected: dict[str, int]) -> None:
    model = tiny_parts()[1].bundle.model.eval()
    model.decode_cache = cache
    with DeviceReads(model) as reads:
        x = torch.zeros(2, model.clip_project.clip_dim).to(torch.device("cpu"))
        drawn = model.greedy(x, 20).drawn
    assert reads.seen == expected
    assert not bool((drawn == model.stop_token_id).any())  # an ended caption would have been asked about less often


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_a_step_reads_ended_captions_printed_tokens_and_metrics(cache: str) -> None:
    cfg, parts = tiny_parts(kl_weight=0.1)
    assert parts.reference is not None
    parts.bundle.model.decode_cache = cache
    one_step(cfg, parts, 1)  # what is tried once per model
    clip: Any = parts.backbone
    with DeviceReads(*parts.modules.values(), clip.model, parts.reference) as reads:
        metrics = one_step(cfg, parts, 2)
    assert metrics["train/caption_tokens"] > cfg.generator.max_length - 2
    ended = cfg.generator.max_length - 1 if cache == "growing" else 0  # 6 tokens are less than 8
    assert reads.seen == {"tolist": ended + 1, "cpu": 1}
