"""Drawing tokens so that rounding hardly ever changes the draw: a race of exponential clocks, seeded per caption."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


class Clocks:
    """Exp(1) numbers, one per token of the vocabulary at each place of a caption, from one generator per caption.

    The token with the smallest clock / probability is drawn: token i with probability p_i. Another batch size or number
    of processes changes p by some 1e-7 of rounding, and the winner with a probability of that order. A search in the
    cumulative probabilities has such an error at each border between two tokens, and GPT-2 has 50,257
    (docs/negative_results.md, 17).

    Numbers are drawn in float64: in float32 one in 2^23 is 0, and its token would win whatever its probability.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.device = device
        self.on_host: list[np.random.Generator] = []
        self.on_device: list[torch.Generator] = []
        if device.type == "cpu":  # numpy's take a quarter of the time of torch's
            self.on_host = [np.random.Generator(np.random.SFC64(seed)) for seed in seeds]
        else:
            self.on_device = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def next(self, captions: Sequence[int], vocab: int) -> Tensor:
        """The next (len(captions), vocab) numbers, float32, of these captions."""
        if self.on_device:
            exact = torch.empty(len(captions), vocab, dtype=torch.float64, device=self.device)
            for row, caption in zip(exact, captions, strict=True):
                row.exponential_(generator=self.on_device[caption])
            return exact.float()
        out = torch.empty(len(captions), vocab)
        rows = out.numpy()

        def fill(part: range) -> None:
            scratch = np.empty(vocab)
            for i in part:
                rows[i] = self.on_host[captions[i]].standard_exponential(out=scratch)

        threads = min(torch.get_num_threads(), len(captions))
        if threads * vocab < 10_000:  # threads would take longer
            fill(range(len(captions)))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, (range(i, len(captions), threads) for i in range(threads))))
        return out


def race(logits: Tensor, clocks: Tensor, temperature: float = 1.0) -> Tensor:
    """(R, V) logits and clocks -> (R,) token ids, from the softmax at `temperature`"""
    warm = logits.detach() if temperature == 1 else logits.detach() / temperature
    return torch.softmax(warm, dim=-1).div_(clocks).argmax(-1)
