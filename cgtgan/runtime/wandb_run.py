"""One W&B run per run folder, in a thread: training never waits for W&B, and what W&B does not take stays on disk.

W&B's process writes every record to `<run folder>/wandb/` before it sends it; a kill takes at most its last seconds.
`wandb/logged.json` holds the last step that is surely written: a later start logs the rows after it again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

from cgtgan.config import WandbConfig
from cgtgan.runtime.artifacts import read_json, write_json, write_text

TRAIN_AXIS, EVAL_AXIS = "train/step", "eval/epoch"  # the x axes of the curves
AXES = dict.fromkeys(("train/*", "reward/*", "advantage/*", "caption/*", "time/*", "memory/*"), TRAIN_AXIS) | {
    "eval/*": EVAL_AXIS
}
PROBE_SECONDS = 3.0
INIT_SECONDS = 10.0
GRACE_SECONDS = 5.0  # beyond its own time limit, after which W&B's process counts as stuck and is killed
FLUSH_SECONDS = 30.0  # W&B's process writes to its file every 15 s
_EMPTY_BYTES = 100  # a `.wandb` file without a record is smaller
_DATA_FOLDER = "wandb/data"
_LOCAL = "metrics.jsonl has everything"


@dataclass(frozen=True)
class About:
    """What W&B learns of a run at its start; `job_type` None keeps the one of an earlier start."""

    name: str
    config: Mapping[str, Any]
    job_type: str | None = None
    rows: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl: those that W&B lacks are logged again


def under_agent() -> bool:
    """Whether an agent of a W&B sweep started this process, and waits for its result."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def stored_wandb_id(run_folder: Path, otherwise: str | None = None) -> str:
    """The id of the run in W&B, kept in its folder from the first start or submission on; a sweep's agent may set it.

    otherwise: the id where the folder has none.
    """
    path = run_folder / "wandb_id.txt"
    stored = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    from_agent = os.environ.get("WANDB_RUN_ID") if under_agent() else None
    wandb_id = from_agent or stored or otherwise or secrets.token_hex(4)
    if wandb_id != stored:
        write_text(path, wandb_id + "\n")
    return wandb_id


class WandbRun:
    """Calls return at once, and the thread makes them in order. A failure of W&B never reaches the caller."""

    def __init__(self, folder: Path, settings: WandbConfig, wandb_id: str, about: About, say: Callable[[str], None]):
        self._folder, self._settings = folder.resolve(), settings
        self._id, self._about, self._say = wandb_id, about, say
        self._sync = f"`wandb sync --include-online {shlex.quote(str(self._folder / 'wandb'))}`"
        self._summary, self._logged = (self._folder / "wandb" / f"{name}.json" for name in ("summary", "logged"))
        self._calls: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._known_step = -1  # the last one that W&B had before this start
        self._step = -1  # the last one it was given
        self._unwritten: list[tuple[float, int]] = []  # (time, step) of rows that may not be in W&B's file yet
        self._exit_code = 0
        self._reported = False
        self.opened = False
        os.environ["WANDB_SILENT"] = "true"
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own reports would delay the end of the program
        if os.environ.get("WANDB_DATA_DIR", _DATA_FOLDER).endswith(_DATA_FOLDER):  # pictures and files that wait to be
            os.environ["WANDB_DATA_DIR"] = str(self._folder / _DATA_FOLDER)  # sent: by default in the home folder
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step; a step that W&B has already is left out."""
        self._calls.put(lambda run: self._log_row(run, step, values))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table beside the numbers of its step; a `Path` in it is a picture."""
        self._calls.put(
            lambda run: self._log_row(run, step, {name: _table(columns, rows)}) if step > self._known_step else None
        )

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Numbers of the whole run. Later starts repeat them: `wandb sync` keeps the last start's summary."""

        def update(run: Any) -> None:
            run.summary.update(dict(values))
            write_json(self._summary, self._stored(self._summary) | dict(values))

        self._calls.put(update)

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[tuple[str, Path]],
        made_from: Mapping[str, Any],
        alias: str,
        uses: tuple[str, str] | None = None,
    ) -> None:
        """`files` as (name in it, path), with `made_from` as metadata.

        uses: name and alias of this run's artifact that they come from; W&B takes it online only.
        """

        def log(run: Any) -> None:
            import wandb

            made = wandb.Artifact(f"{name}-{self._id}", kind, metadata=dict(made_from))
            for within, path in files:  # no copy: the file stays in the run folder
                made.add_file(str(path), within, policy="immutable", skip_cache=True)
            if uses is not None and not run.offline:
                with contextlib.suppress(Exception):  # there is none if wandb.artifacts was off in training
                    run.use_artifact(f"{uses[0]}-{self._id}:{uses[1]}")
            run.log_artifact(made, aliases=[alias])

        self._calls.put(log)

    def finish(self, exit_code: int = 0, *, goes_on: bool = False) -> None:
        """End the run and wait, some seconds at most. `goes_on`: it was asked to stop and will be started again."""
        if goes_on:
            self._calls.put(lambda run: run.mark_preempting())
        self._exit_code = exit_code
        self._calls.put(None)
        limit = self._settings.finish_seconds + GRACE_SECONDS
        self._thread.join(limit if self.opened else limit + PROBE_SECONDS + INIT_SECONDS)
        if self._thread.is_alive():
            self._report(f"W&B's process does not end and was killed, so W&B may lack the end of this run; {_LOCAL}")
            _kill_service()
            self._thread.join(GRACE_SECONDS)  # what it waited for has failed now

    # ------------------------------------------------------------------------------------------------------ the thread

    def _work(self) -> None:
        try:
            import wandb

            run = self._start()
        except Exception as error:  # W&B may fail in any way; a run never ends because of it
            if isinstance(error, ModuleNotFoundError) and error.name == "wandb":
                self._report(f"W&B is not installed (pip install wandb, or set wandb=disabled); {_LOCAL}")
            else:
                self._report(f"W&B did not start ({_reason(error)}); the run goes on, {_LOCAL}")
            return
        self.opened = True
        self._make(self._catch_up, run)
        while (call := self._calls.get()) is not None:
            self._make(call, run)
        try:
            run.finish(exit_code=self._exit_code)
            if self._step > self._known_step:
                self._keep(self._step)
        except Exception as error:
            self._report_unsent(_reason(error))
        if not run.offline and _has_failed(Path(run.settings.log_internal)):
            self._report_unsent("it refused some of it")
        with contextlib.suppress(Exception):  # its files are complete then, and the program does not wait for it
            wandb.teardown()

    def _make(self, call: Callable[[Any], object], run: Any) -> None:
        try:
            call(run)
        except Exception as error:  # as above
            self._report(f"W&B did not take something ({_reason(error)}); the run goes on, {_LOCAL}")

    def _report(self, problem: str) -> None:
        """Tell the user the first problem; the later ones follow from it."""
        if not self._reported:
            self._reported = True
            self._say(problem)

    def _report_unsent(self, why: str) -> None:
        self._report(f"W&B did not take all of this run ({why}); it is complete on disk, and {self._sync} sends it")

    def _start(self) -> Any:
        import wandb

        for file in self._files():  # of a run killed in its first seconds: `wandb sync` would stop at it
            if file.stat().st_size < _EMPTY_BYTES:
                shutil.rmtree(file.parent)
        if self._settings.mode == "online":
            before = set(self._files())
            host = wandb.setup(wandb.Settings(mode="online")).settings.base_url
            problem = _no_key() or _no_answer(host)
            try:
                if problem is None:
                    return self._init("online")
            except Exception as error:  # a wrong key, a full quota, a server that does not speak W&B
                problem = f"W&B at {host} did not take the run ({_reason(error)})"
                wandb.teardown()
                for begun in set(self._files()) - before:
                    shutil.rmtree(begun.parent, ignore_errors=True)
            self._report(f"wandb=online: {problem}, so this run is written offline; {self._sync} sends it later")
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, init_timeout=INIT_SECONDS,
            finish_timeout=self._settings.finish_seconds, finish_timeout_raises=True,
        )  # fmt: skip
        run = wandb.init(
            mode=mode, project=self._settings.project, entity=self._settings.entity, group=self._settings.group,
            tags=list(self._settings.tags), name=self._about.name, job_type=self._about.job_type, dir=str(self._folder),
            id=self._id, resume="allow", config=_agent_config(self._about.config), settings=settings,
        )  # fmt: skip
        self._file = Path(run.settings.sync_file)
        for axis in (TRAIN_AXIS, EVAL_AXIS):
            run.define_metric(axis, hidden=True)
        for name, axis in AXES.items():
            run.define_metric(name, step_metric=axis)
        return run

    def _catch_up(self, run: Any) -> None:
        """Log the rows that W&B lacks: online the server knows them, offline our own file does."""
        kept = self._stored(self._logged)
        on_disk = kept["step"] if kept.get("id") == self._id else -1
        self._known_step = self._step = on_disk if run.offline else run.starting_step - 1
        latest: dict[str, Any] = {}
        for row in self._about.rows:
            latest |= {k: v for k, v in row.items() if k != "step" and row["step"] <= self._known_step}
        run.summary.update(latest | self._stored(self._summary))
        for row in self._about.rows:
            self._log_row(run, row["step"], {k: v for k, v in row.items() if k != "step" and v is not None})

    def _log_row(self, run: Any, step: int, values: Mapping[str, Any]) -> None:
        if step <= self._known_step:
            return
        run.log({**values, TRAIN_AXIS: step}, step=step)
        if step > self._step:  # W&B's process gets a row when the next one begins
            self._unwritten.append((time.time(), self._step))
            self._step = step
        written = self._file.stat().st_mtime - FLUSH_SECONDS
        if on_disk := [done for at, done in self._unwritten if at < written]:
            self._unwritten = self._unwritten[len(on_disk) :]
            self._keep(on_disk[-1])

    def _keep(self, step: int) -> None:
        write_json(self._logged, {"id": self._id, "step": step})

    def _stored(self, path: Path) -> dict[str, Any]:
        return read_json(path) if path.is_file() else {}

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("wandb/*run-2*/run-*.wandb"))


def _reason(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")


def _has_failed(log: Path) -> bool:
    """Whether W&B's process gave up: its log is the only place that says so when the server refuses rows."""
    return log.is_file() and "fatal error" in log.read_text(encoding="utf-8", errors="replace")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    cells = [[wandb.Image(str(cell)) if isinstance(cell, Path) else cell for cell in row] for row in rows]
    return wandb.Table(list(columns), cells)


def _no_key() -> str | None:
    """What is wrong with the key; None: there is one. `wandb.init` would ask the person at the terminal for it."""
    import wandb

    try:
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:  # a key of a wrong form, among others
        return _reason(error)
    return None if has_key else "no API key is found (WANDB_API_KEY or ~/.netrc)"


def _no_answer(host: str) -> str | None:
    """Why the server gives no answer within seconds; None: it does. In a thread: a name look-up has no time limit."""
    problem: str | None = "does not answer"

    def ask() -> None:
        import requests

        nonlocal problem
        try:
            query = {"query": "{__typename}"}
            answer = requests.post(f"{host}/graphql", json=query, timeout=PROBE_SECONDS, stream=True)
            problem = f"answers with {answer.status_code} {answer.reason}" if answer.status_code >= 500 else None
        except requests.exceptions.SSLError:  # W&B may have been set to accept it
            problem = None
        except requests.ConnectionError:
            problem = "cannot be reached"
        except requests.RequestException:
            pass

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS + 1)
    return problem and f"W&B at {host} {problem}"


def _agent_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings; by full path under an agent of a W&B sweep, which needs names such as `reward_weights` itself."""
    if not under_agent():
        return dict(config)
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = {f"{name}.{k}": v for k, v in _agent_config(value).items()} if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else inner
    return flat


def _kill_service() -> None:
    """Kill W&B's process, a child of this one."""
    import psutil

    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("wandb-core"):
                process.kill()
                process.wait(1)
