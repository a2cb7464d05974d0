"""How a long job is asked to stop: a signal or a time limit. It ends where its state is complete."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from cgtgan.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EX_TEMPFAIL = 75  # of sysexits.h: a temporary failure, try again; `os` has it on Unix only


@dataclass
class StopRequest:
    """`code`: the exit code once the job is asked to stop, 128 + signal, or 75 when the time is up; 0 until then."""

    deadline: float | None = None
    started: float = field(default_factory=time.monotonic)
    signal: int = 0

    @property
    def signal_code(self) -> int:
        """`code` of a signal alone: a time limit that comes after the last step stops nothing."""
        return 128 + self.signal if self.signal else 0

    @property
    def code(self) -> int:
        if self.signal:
            return self.signal_code
        return EX_TEMPFAIL if self.deadline is not None and time.monotonic() - self.started > self.deadline else 0


def stopped(code: int, where: str) -> Stopped:
    """The exception that ends a job with `code`, once its state is on disk."""
    why = "the time limit is reached" if code == EX_TEMPFAIL else f"received {signal.Signals(code - 128).name}"
    return Stopped(f"{why}: stopped {where}; the same command goes on from there", code)


@contextmanager
def stop_requests(minutes: float | None = None) -> Iterator[StopRequest]:
    """Inside, a signal only sets the request, and a second one acts at once; `minutes` from now the time is up."""
    request = StopRequest(None if minutes is None else 60 * minutes)
    if threading.current_thread() is not threading.main_thread():  # Python only lets the main thread handle signals
        yield request
        return
    before: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        signal.signal(number, before[number])

    for number in SIGNALS:
        before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
