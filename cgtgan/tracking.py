"""What a run tells: progress and tables on the console, every metric in `metrics.jsonl`, and the same in W&B. One object."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cgtgan.artifacts import write_text
from cgtgan.config import WandbConfig
from cgtgan.shards import Rank


class Bar:
    """One progress bar; without a terminal, a line every quarter."""

    def __init__(self, console: Console, description: str, total: int, completed: int):
        self._console, self._description = console, description
        self._total, self._done, self._note = total, completed, ""
        self._said = completed * 4 // max(total, 1)
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = [
                TextColumn("{task.description:<28}"),
                BarColumn(30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            ]
            self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self._task = self._progress.add_task(description, total=total, completed=completed, note="")
            self._progress.start()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self._done += steps
        self._note = self._note if note is None else note
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, note=self._note)
        elif (quarter := self._done * 4 // max(self._total, 1)) > self._said:
            self._said = quarter
            self._console.print(f"{self._description} {self._done}/{self._total} {self._note}".rstrip(), highlight=False)

    def reach(self, done: int) -> None:
        """Advance to `done`; what others did counts too."""
        if done > self._done:
            self.advance(done - self._done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class Tracker:
    """Console for every stage; with `start_run`, also the run's `metrics.jsonl` and its W&B run."""

    def __init__(self, console: Console | None = None):
        terminal = sys.stdout.isatty()
        # of several processes of one job the first one speaks; an error is said by whoever meets it
        self.console = console or Console(width=None if terminal else 110, soft_wrap=not terminal, quiet=Rank.here().number > 0)
        self._file: Path | None = None
        self._wandb: Any = None
        self.wandb_id: str | None = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def show(self, what: RenderableType) -> None:
        self.console.print(what)

    @contextmanager
    def progress(self, description: str, total: int, completed: int = 0) -> Iterator[Bar]:
        bar = Bar(self.console, description, total, completed)
        try:
            yield bar
        finally:
            bar.close()

    # --------------------------------------------------------------------------------------------------------- one run

    def start_run(
        self, folder: Path, wandb: WandbConfig, *, config: Mapping[str, Any], job_type: str, step: int = 0, wandb_id: str | None = None
    ) -> None:
        """Log into `folder`, continuing after `step`: rows of `metrics.jsonl` that a killed process wrote beyond it are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(self._file) if row["step"] <= step]
        write_text(self._file, "".join(json.dumps(row) + "\n" for row in rows))
        if wandb.mode != "disabled":
            self._start_wandb(folder, wandb, config, job_type, wandb_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row: `step` and metrics by `group/name`. A NaN is kept as null."""
        if self._file is None:  # of several processes of one job the first one writes
            return
        row = {"step": step} | {k: (v if v == v and abs(v) != float("inf") else None) for k, v in metrics.items()}
        with self._file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        self._call_wandb(lambda run: run.log(dict(metrics), step=step))

    def summarize(self, values: Mapping[str, float]) -> None:
        self._call_wandb(lambda run: run.summary.update(dict(values)))

    def finish(self, failed: bool = False) -> None:
        self._call_wandb(lambda run: run.finish(exit_code=int(failed)))
        self._wandb = None

    # ------------------------------------------------------------------------------------------------------------ W&B

    def _start_wandb(self, folder: Path, settings: WandbConfig, config: Mapping[str, Any], job_type: str, wandb_id: str | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
        except ImportError:
            self.say("W&B is not installed: metrics go to metrics.jsonl only (pip install wandb, or set wandb=disabled)")
            return
        mode = settings.mode
        if mode == "online" and not _has_wandb_key():
            self.say(
                "wandb=online: no API key is found (WANDB_API_KEY or ~/.netrc), so this run is written offline; `wandb sync` sends it later"
            )
            mode = "offline"
        self.wandb_id = wandb_id or _stored_id(folder / "wandb_id.txt")
        attempts: tuple[Literal["online", "offline"], ...] = ("online", "offline") if mode == "online" else ("offline",)
        for attempt in attempts:
            try:
                self._wandb = wandb.init(
                    mode=attempt, project=settings.project, entity=settings.entity, group=settings.group, tags=list(settings.tags),
                    job_type=job_type, dir=str(folder), id=self.wandb_id, resume="allow", config=dict(config),
                    name="/".join(folder.parts[-3:]),
                    settings=wandb.Settings(silent=True, console="off", init_timeout=30, x_disable_stats=True),
                )  # fmt: skip
                return
            except Exception as e:  # W&B may fail in any way; a run never ends for it
                self.say(f"W&B ({attempt}) did not start: {type(e).__name__}: {e}")
        self._wandb = None

    def _call_wandb(self, call: Any) -> None:
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as e:  # said once, then left alone
            self.say(f"W&B stopped taking metrics ({type(e).__name__}: {e}); the run goes on, metrics.jsonl has everything")
            self._wandb = None


def _stored_id(path: Path) -> str:
    """The run's W&B id, kept from the very first start on: also a run killed before its first checkpoint stays one run."""
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    fresh = secrets.token_hex(4)
    write_text(path, fresh + "\n")
    return fresh


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a half-written last line of a killed process is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
