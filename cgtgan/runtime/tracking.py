"""What a run reports: progress and tables on the console, every metric in `metrics.jsonl` and in W&B."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from cgtgan.config import WandbConfig
from cgtgan.errors import InputError, Stopped
from cgtgan.runtime.artifacts import parse_json, write_text
from cgtgan.runtime.bars import Bar
from cgtgan.runtime.shards import Rank
from cgtgan.runtime.wandb_run import About, WandbRun, stored_wandb_id


class Tracker:
    """Console for every stage; with `start_run`, also the run's `metrics.jsonl` and its W&B run."""

    def __init__(self, console: Console | None = None):
        terminal = sys.stdout.isatty()
        quiet = Rank.here().number > 0  # only the first process of a job prints; an error comes from whoever meets it
        self.console = console or Console(width=None if terminal else 110, soft_wrap=not terminal, quiet=quiet)
        self._bar: Bar | None = None
        self._file: Path | None = None
        self._wandb: WandbRun | None = None
        self.wandb_id: str | None = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def show(self, what: RenderableType) -> None:
        self.console.print(what)

    @contextmanager
    def progress(self, description: str, total: int, completed: int = 0) -> Iterator[Bar]:
        """A bar, in the place of the one around it, which returns at the end."""
        outer = self._bar
        if outer is not None:
            outer.hide()
        self._bar = Bar(self.console, description, total, completed)
        try:
            yield self._bar
        finally:
            self._bar.close()
            self._bar = outer
            if outer is not None:
                outer.show()

    # ----------------------------------------------------------------------------------------------------- one run

    def start_run(
        self,
        folder: Path,
        wandb: WandbConfig,
        *,
        config: Mapping[str, Any],
        job_type: str,
        step: int = 0,
        wandb_id: str | None = None,
    ) -> None:
        """Log into `folder` after `step`: rows of `metrics.jsonl` beyond it, which a killed process wrote, are dropped.

        wandb_id: the checkpoint's, for a folder that lost its wandb_id.txt.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(self._file) if row["step"] <= step]
        write_text(self._file, "".join(json.dumps(row) + "\n" for row in rows))
        self.open_wandb(folder, wandb, config=config, job_type=job_type, rows=rows, wandb_id=wandb_id)

    def open_wandb(
        self,
        folder: Path,
        wandb: WandbConfig,
        *,
        config: Mapping[str, Any],
        job_type: str | None,
        rows: Sequence[Mapping[str, Any]] = (),
        wandb_id: str | None = None,
    ) -> None:
        """Start or continue the folder's run in W&B; `rows`: logged before; job_type None keeps the earlier one."""
        if wandb.mode == "disabled":
            return
        self.wandb_id = stored_wandb_id(folder, wandb_id)
        about = About("/".join(folder.parts[-3:]), config, job_type, rows)
        self._wandb = WandbRun(folder, wandb, self.wandb_id, about, self.say)

    @property
    def wandb(self) -> WandbRun | None:
        """The run in W&B, where there is one: None with wandb=disabled, and in all processes of a job but the first."""
        return self._wandb

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row: `step` and metrics by `group/name`. A NaN is kept as null."""
        if self._file is None:  # of several processes of one job the first one writes
            return
        row = {"step": step} | {k: (v if v == v and abs(v) != float("inf") else None) for k, v in metrics.items()}
        with self._file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log(step, dict(metrics))

    def summarize(self, values: Mapping[str, float]) -> None:
        if self._wandb is not None:
            self._wandb.summarize(values)

    def finish(self, error: BaseException | None = None) -> None:
        """End the run in W&B; `error`: what ends it early. A job that was asked to stop will be started again."""
        if self._wandb is not None:
            code = 0 if error is None else error.code if isinstance(error, Stopped) else 1
            self._wandb.finish(code, goes_on=isinstance(error, Stopped))
        self._wandb = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a half-written last line of a killed process is left out.

    Raises `InputError` naming any other line that is no row.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, f"{path}, line {number}", fix="delete this line")
        except InputError:
            if number == len(lines):
                break
            raise
        if not isinstance(row.get("step"), int):
            raise InputError(f"{path}, line {number} has no step: delete this line")
        rows.append(row)
    return rows
