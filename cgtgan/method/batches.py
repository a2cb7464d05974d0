"""Which rows a step sees and which numbers it draws: functions of (seed, step, row), so that resuming needs no stored
place and the number of processes changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def stable_seed(*parts: object) -> int:
    """63 bits from the parts' text; not Python's `hash`, which changes from process to process."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1


class EpochOrder:
    """An endless order of `size` rows: a fresh seeded permutation per epoch, each row once per epoch."""

    def __init__(self, size: int, *seed: object):
        if size < 1:
            raise ValueError("there are no rows to put in order")
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Rows at places start .. start+count-1 of the endless order, int64; they may run over the end of an epoch."""
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, place = divmod(start + filled, self.size)
            if epoch != self._epoch:
                rng = np.random.Generator(np.random.PCG64(stable_seed(*self.seed, epoch)))
                self._epoch, self._permutation = epoch, rng.permutation(self.size)
            take = min(count - filled, self.size - place)
            out[filled : filled + take] = self._permutation[place : place + take]
            filled += take
        return out

    def batch(self, step: int, size: int) -> np.ndarray:
        """The rows of optimiser step `step`, counted from 1."""
        return self.rows((step - 1) * size, size)


def sampling_seeds(seed: int, step: int, image_ids: Sequence[object], num_samples: int) -> list[list[int]]:
    """K seeds per image: what an image draws depends on (seed, step, image), not on its batch or process."""
    return [[stable_seed(seed, step, image_id, k) for k in range(num_samples)] for image_id in image_ids]
