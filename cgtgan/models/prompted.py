"""Embeddings with words before them: what the generator reads where `prompt` is not none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cgtgan.runtime.devices import on_device


@dataclass(frozen=True)
class Prompted:
    """Rows of `embedding` (N, D), each behind the tokens of its prompt (N, T) int64.

    It stands wherever the generator takes embeddings, and is cut, moved and repeated by rows as a tensor is.
    """

    embedding: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, rows: Any) -> Prompted:
        return Prompted(self.embedding[rows], self.prompt[rows])

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def float(self) -> Prompted:
        return Prompted(self.embedding.float(), self.prompt)

    def to(self, device: torch.device) -> Prompted:
        return Prompted(on_device(self.embedding, device), on_device(self.prompt, device))

    def repeat_interleave(self, copies: int, dim: int = 0) -> Prompted:
        return Prompted(self.embedding.repeat_interleave(copies, dim), self.prompt.repeat_interleave(copies, dim))


Read = Tensor | Prompted


def embedding_of(read: Read) -> Tensor:
    """(N, D), without the prompts."""
    return read.embedding if isinstance(read, Prompted) else read


def read_on(read: Read, device: torch.device) -> Read:
    """`on_device` of either kind."""
    return read.to(device) if isinstance(read, Prompted) else on_device(read, device)


def filled_prompts(token_ids: Sequence[Sequence[int]], length: int, end_token_id: int) -> Tensor:
    """(N, length) int64: cut behind `length` tokens, or filled in front with the end-of-text token.

    A prompt always has the same number of tokens, so a caption does not depend on the batch that it is drawn in, and
    prefix and caption stand at the places they are trained for. The generator learns to skip what fills.
    """
    rows = [list(ids[:length]) for ids in token_ids]
    filled = [[end_token_id] * (length - len(row)) + row for row in rows]
    return torch.tensor(filled, dtype=torch.long).view(-1, length)
