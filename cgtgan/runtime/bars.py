"""Progress bars of a terminal, in columns that are the same for all of them; elsewhere a line every quarter."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

COUNT, TIMES = 15, 25  # columns of '566,747/566,747' and of 'elapsed 12:34  left 56:07'
LABEL, LEAST_LABEL, LEAST_BAR = 38, 20, 8


class Bar:
    """One progress bar. The one around it is hidden (`hide`, `show`) while it runs."""

    def __init__(self, console: Console, description: str, total: int, completed: int):
        self._console, self._description = console, description
        self._total, self._first, self._done, self._note = total, completed, completed, ""
        self._quarter = completed * 4 // max(total, 1)
        self._started = time.monotonic()
        self._live: Live | None = None
        self.show()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self._done += steps
        self._note = self._note if note is None else note
        if self._console.is_terminal:
            return  # drawn again several times per second
        if (quarter := self._done * 4 // max(self._total, 1)) > self._quarter:
            self._quarter = quarter
            line = f"{self._description} {self._done}/{self._total} {self._note}"
            self._console.print(line.rstrip(), highlight=False)

    def reach(self, done: int) -> None:
        """Advance to `done`; what others did counts too."""
        if done > self._done:
            self.advance(done - self._done)

    def show(self) -> None:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._lines, transient=True, refresh_per_second=10)
            self._live.start(refresh=True)

    def hide(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None

    def close(self) -> None:
        """What the bar says last stays on the terminal."""
        if self._live is not None:
            self.hide()
            self._console.print(self._lines())

    def _lines(self) -> Group:
        """Label, bar, count and times; the note on a line of its own."""
        columns, room = Table.grid(padding=(0, 1), expand=True), self._console.width - COUNT - TIMES - LEAST_BAR - 4
        columns.add_column(width=max(LEAST_LABEL, min(LABEL, room)), no_wrap=True, overflow="ellipsis")
        columns.add_column(ratio=1)
        columns.add_column(min_width=COUNT, no_wrap=True, justify="right")
        columns.add_column(min_width=TIMES, no_wrap=True)
        bar, count = ProgressBar(max(self._total, 1), self._done), f"{self._done:,}/{self._total:,}"
        columns.add_row(Text(self._description), bar, count, self._times())
        return Group(columns, *([Text(f"  {self._note}", no_wrap=True, overflow="ellipsis")] if self._note else []))

    def _times(self) -> str:
        """'elapsed 1:23  left 4:10', by the mean speed since this process began."""
        elapsed, done, missing = time.monotonic() - self._started, self._done - self._first, self._total - self._done
        left = _clock(elapsed * missing / done) if done > 0 else "-:--"
        return f"elapsed {_clock(elapsed):>5}" + (f"  left {left:>5}" if missing > 0 else "")


def _clock(seconds: float) -> str:
    """1:23 (minutes, seconds), from an hour on 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
