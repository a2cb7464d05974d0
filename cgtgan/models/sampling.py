"""Drawing tokens so that rounding hardly ever changes the draw: a race of exponential clocks, seeded per caption."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cgtgan.runtime.devices import on_device

_AHEAD = 4  # places that a GPU draws at once: for 320 captions of GPT-2's vocabulary 257 MB
_AT_ONCE = 64  # captions whose float64 numbers lie in memory at once


class Clocks:
    """Exp(1) numbers, one per token of the vocabulary at each place of a caption, from one generator per caption.

    The token with the smallest clock / probability is drawn: token i with probability p_i. Another batch size or number
    of processes changes p by some 1e-7 of rounding, and the winner with a probability of that order. A search in the
    cumulative probabilities has such an error at each border between two tokens, and GPT-2 has 50,257
    (docs/negative_results.md, 17).

    Numbers are drawn in float64: in float32 one in 2^23 is 0, and its token would win whatever its probability. These
    are drawn on the host, for a model on a CPU: numpy's generators take a quarter of the time of torch's.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [np.random.Generator(np.random.SFC64(seed)) for seed in seeds]

    def next(self, captions: Sequence[int], vocab: int) -> Tensor:
        """The next (len(captions), vocab) numbers, float32, of these captions."""
        out = torch.empty(len(captions), vocab)
        rows = out.numpy()

        def fill(part: range) -> None:
            scratch = np.empty(vocab)
            for i in part:
                rows[i] = self.generators[captions[i]].standard_exponential(out=scratch)

        threads = min(torch.get_num_threads(), len(captions))
        if threads * vocab < 10_000:  # threads would take longer
            fill(range(len(captions)))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, (range(i, len(captions), threads) for i in range(threads))))
        return out


class DeviceClocks:
    """Clocks that a GPU draws: each caption's generator is a kernel of its own, so it draws several places at once.

    From one call to the next captions may leave; none may come back, and none may be added.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.device, self.place = device, 0
        self.ahead = torch.empty(0)  # (_AHEAD, captions, vocab)
        self.row_of: dict[int, int] = {}  # of a caption in it

    def next(self, captions: Sequence[int], vocab: int) -> Tensor:
        """As `Clocks.next`, on the device."""
        if self.place % _AHEAD == 0:
            self.ahead, self.row_of = self._drawn(captions, vocab), {caption: i for i, caption in enumerate(captions)}
        numbers, rows = self.ahead[self.place % _AHEAD], [self.row_of[caption] for caption in captions]
        self.place += 1
        if rows == list(range(len(numbers))):
            return numbers
        return numbers.index_select(0, on_device(torch.tensor(rows, dtype=torch.long), self.device))

    def _drawn(self, captions: Sequence[int], vocab: int) -> Tensor:
        out = torch.empty(_AHEAD, len(captions), vocab, device=self.device)
        exact = torch.empty(min(_AT_ONCE, len(captions)), _AHEAD, vocab, dtype=torch.float64, device=self.device)
        for start in range(0, len(captions), _AT_ONCE):
            part = captions[start : start + _AT_ONCE]
            for row, caption in zip(exact, part, strict=False):
                row.exponential_(generator=self.generators[caption])
            out[:, start : start + len(part)] = exact[: len(part)].transpose(0, 1)
        return out


def race(logits: Tensor, clocks: Tensor, temperature: float = 1.0) -> Tensor:
    """(R, V) logits and clocks -> (R,) token ids, from the softmax at `temperature`"""
    warm = logits.detach() if temperature == 1 else logits.detach() / temperature
    return torch.softmax(warm, dim=-1).div_(clocks).argmax(-1)
