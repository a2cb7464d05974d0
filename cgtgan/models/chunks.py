"""Which rows go through a model together: as many as fit, of like length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def chunks_by_length(lengths: Tensor, max_tokens: int) -> Iterator[Tensor]:
    """Places of `lengths` (R,), short ones first, as many at a time as have `max_tokens` positions when padded to the longest of them;
    at least one, however long."""
    order = torch.argsort(lengths, stable=True)
    widths = lengths[order].tolist()
    start = 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or (end + 1 - start) * widths[end] > max_tokens:
            yield order[start:end]
            start = end
