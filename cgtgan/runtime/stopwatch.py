"""How long a piece of work took, over all processes that went on with it."""

from __future__ import annotations

import time

TRAINING_SECONDS = "train/seconds_total"  # in metrics.jsonl


class Stopwatch:
    """Starts with `before`, the seconds of earlier processes; None: they did not count, so neither does this."""

    def __init__(self, before: float | None = 0.0):
        self._before, self._started = before, time.perf_counter()

    @property
    def seconds(self) -> float | None:
        return None if self._before is None else self._before + time.perf_counter() - self._started

    def named(self, key: str) -> dict[str, float]:
        """{key: seconds}; empty where they are not known."""
        seconds = self.seconds
        return {} if seconds is None else {key: seconds}
