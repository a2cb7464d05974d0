"""Rows of tokens that go through a model together: padded to one width, and chosen so that little of it is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of ids -> (B, L) int64, as wide as the longest row, and the bool mask (B, L) of the real ids.

    The mask goes by length: no id serves as padding (METHOD: Initialisation).
    """
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), max(map(len, rows), default=1)), pad_id, dtype=torch.long)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = torch.tensor(row)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def chunks_by_length(lengths: Tensor, max_tokens: int) -> Iterator[Tensor]:
    """Places of `lengths` (R,), short ones first, in chunks of at most `max_tokens` positions when padded.

    A chunk holds at least one row, however long.
    """
    order = torch.argsort(lengths, stable=True)
    widths = lengths[order].tolist()
    start = 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or (end + 1 - start) * widths[end] > max_tokens:
            yield order[start:end]
            start = end
