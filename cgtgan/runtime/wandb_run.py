"""One run in W&B, told by a thread of its own: the work it watches never waits for it, and what W&B cannot take stays on disk.

W&B's own process writes every record to `<run folder>/wandb/` before it sends anything, so a run that goes offline, at its start or on its
way, is whole there but for what a kill takes from that process's memory (some 15 s); the next start logs that again from `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from cgtgan.config import WandbConfig
from cgtgan.runtime.artifacts import read_json, write_json, write_text

TRAIN_AXIS, EVAL_AXIS = "train/step", "eval/epoch"  # what the curves are drawn over
AXES = dict.fromkeys(("train/*", "reward/*", "advantage/*", "caption/*", "time/*", "memory/*"), TRAIN_AXIS) | {
    "eval/*": EVAL_AXIS
}
PROBE_SECONDS = 3.0
INIT_SECONDS = 10.0
GRACE_SECONDS = 5.0  # beyond its own time limit, after which W&B's process is taken for stuck and ended


@dataclass(frozen=True)
class About:
    """What W&B is told of a run at its start; `job_type` None leaves what an earlier start said."""

    name: str
    config: Mapping[str, Any]
    job_type: str | None = None
    rows: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl: those W&B lacks are logged again


def under_agent() -> bool:
    """Whether an agent of a W&B sweep started this process, and waits for its result."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def stored_wandb_id(run_folder: Path, otherwise: str | None = None) -> str:
    """The run's W&B id, kept in its folder from the first start or submission on: also a run killed before its first checkpoint stays one.

    An agent of a W&B sweep names the run itself. `otherwise`: the id to keep where the folder has none.
    """
    path = run_folder / "wandb_id.txt"
    stored = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    named = os.environ.get("WANDB_RUN_ID") if under_agent() else None
    wandb_id = named or stored or otherwise or secrets.token_hex(4)
    if wandb_id != stored:
        write_text(path, wandb_id + "\n")
    return wandb_id


class WandbRun:
    """Calls are taken at once and made in order by the thread; nothing they do, or fail to do, reaches the caller."""

    def __init__(self, folder: Path, settings: WandbConfig, wandb_id: str, about: About, say: Callable[[str], None]):
        self._folder, self._settings, self._id, self._about, self._say = (
            folder.resolve(),
            settings,
            wandb_id,
            about,
            say,
        )
        self._summary = self._folder / "wandb" / "summary.json"
        os.environ["WANDB_SILENT"] = "true"
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # what it sends of itself would hold the end of the program
        if os.environ.get("WANDB_DATA_DIR", "").endswith(_OWN_DATA) or "WANDB_DATA_DIR" not in os.environ:
            os.environ["WANDB_DATA_DIR"] = str(
                self._folder / _OWN_DATA
            )  # pictures and files that wait to be sent: not in the home folder
        self._calls: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._held = 0  # the last step that W&B has
        self._exit_code = 0
        self._told = False
        self.opened = False
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------------------- calls

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step; a step that W&B has already is left out."""
        self._calls.put(lambda run: self._row(run, step, values))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table beside the numbers of its step; a `Path` in it is a picture."""
        self._calls.put(lambda run: self._row(run, step, {name: _table(columns, rows)}) if step > self._held else None)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Numbers of the whole run. Later starts say them again: `wandb sync` takes the last start's summary for the run's."""

        def update(run: Any) -> None:
            run.summary.update(dict(values))
            write_json(self._summary, self._summarized() | dict(values))

        self._calls.put(update)

    def _summarized(self) -> dict[str, Any]:
        return read_json(self._summary) if self._summary.is_file() else {}

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[tuple[str, Path]],
        made_from: Mapping[str, Any],
        alias: str,
        uses: tuple[str, str] | None = None,
    ) -> None:
        """`files` as (name in it, path), with what they were made from as metadata; `uses`: name and alias of this run's artifact that they
        came from. W&B draws that line online alone: offline it refuses inputs, and the metadata tells it."""

        def log(run: Any) -> None:
            import wandb

            made = wandb.Artifact(f"{name}-{self._id}", kind, metadata=dict(made_from))
            for within, path in files:
                made.add_file(
                    str(path), within, policy="immutable", skip_cache=True
                )  # no copy: it lies in the run folder
            if uses is not None and not run.offline:
                with contextlib.suppress(Exception):  # there is none, if the switch was off while it trained
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
            self._tell(
                "W&B's own process does not end and was stopped, so W&B may lack the end of this run; metrics.jsonl has everything"
            )
            _stop_service()

    # ------------------------------------------------------------------------------------------------------------ thread

    def _work(self) -> None:
        try:
            run = self._start()
        except ImportError:
            self._tell(
                "W&B is not installed: metrics go to metrics.jsonl only (pip install wandb, or set wandb=disabled)"
            )
            return
        except Exception as error:  # W&B may fail in any way; a run never ends for it
            self._tell(f"W&B did not start ({_reason(error)}); the run goes on, metrics.jsonl has everything")
            return
        self.opened = True
        self._make(lambda run: self._catch_up(run), run)
        while (call := self._calls.get()) is not None:
            self._make(call, run)
        try:
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            self._tell(self._unsent(_reason(error)))
        if not run.offline and "fatal error" in _read(run.settings.log_internal):
            self._tell(self._unsent("it refused some of it"))
        with contextlib.suppress(Exception):
            _teardown()

    def _make(self, call: Callable[[Any], object], run: Any) -> None:
        try:
            call(run)
        except Exception as error:
            self._tell(f"W&B did not take something ({_reason(error)}); the run goes on, metrics.jsonl has everything")

    def _tell(self, sentence: str) -> None:
        if not self._told:
            self._told = True
            self._say(sentence)

    def _sync(self) -> str:
        return f"`wandb sync --include-online {self._folder / 'wandb'}`"

    def _unsent(self, why: str) -> str:
        return f"W&B did not take all of this run ({why}); it is whole on disk, and {self._sync()} sends it"

    def _start(self) -> Any:
        import wandb

        for empty in self._files():  # of a run killed in its first seconds: `wandb sync` would stop at it
            if empty.stat().st_size <= _FILE_HEADER:
                shutil.rmtree(empty.parent)
        if self._settings.mode == "online":
            before = set(self._files())
            host = wandb.setup().settings.base_url
            problem = _no_key(host) or _no_answer(host)
            try:
                if problem is None:
                    return self._init(wandb, "online")
            except Exception as error:
                problem = f"W&B at {host} did not take the run ({_reason(error)})"
                _teardown()
                for begun in set(self._files()) - before:
                    shutil.rmtree(begun.parent, ignore_errors=True)
            self._tell(f"wandb=online: {problem}, so this run is written offline; {self._sync()} sends it later")
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, init_timeout=INIT_SECONDS,
            finish_timeout=self._settings.finish_seconds, finish_timeout_raises=True,
        )  # fmt: skip
        run = wandb.init(
            mode=mode, project=self._settings.project, entity=self._settings.entity, group=self._settings.group,
            tags=list(self._settings.tags), job_type=self._about.job_type, dir=str(self._folder), id=self._id, resume="allow",
            config=_beside_sweep(self._about.config), name=self._about.name, settings=settings,
        )  # fmt: skip
        for axis in dict.fromkeys(AXES.values()):
            run.define_metric(axis, hidden=True)
        for name, axis in AXES.items():
            run.define_metric(name, step_metric=axis)
        return run

    def _catch_up(self, run: Any) -> None:
        """Log the rows that a killed process no longer brought to W&B."""
        own = Path(run.settings.sync_file).resolve()
        earlier = (
            [f for f in self._files() if f.name == own.name and f.resolve() != own] if run.offline else []
        )  # online the server says it
        self._held = max([run.starting_step - 1, *map(last_step, earlier)])
        last: dict[str, Any] = {}
        for row in self._about.rows:
            last |= {k: v for k, v in row.items() if k != "step" and row["step"] <= self._held}
        run.summary.update(last | self._summarized())
        for row in self._about.rows:
            self._row(run, row["step"], {k: v for k, v in row.items() if k != "step" and v is not None})

    def _row(self, run: Any, step: int, values: Mapping[str, Any]) -> None:
        if step > self._held:
            run.log({**values, TRAIN_AXIS: step}, step=step)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("wandb/*run-2*/run-*.wandb"))


_OWN_DATA = "wandb/data"


def _reason(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(
        list(columns), [[wandb.Image(str(cell)) if isinstance(cell, Path) else cell for cell in row] for row in rows]
    )


def _no_key(host: str) -> str | None:
    """What is wrong with the key; None: there is one. Asked before W&B is, which would ask the person at the terminal."""
    from wandb.sdk.lib import wbauth

    try:
        found = wbauth.authenticate_session(host=host, source="cgtgan", prompt=False)
    except Exception as error:
        return _reason(error)
    return None if found else "no API key is found (WANDB_API_KEY or ~/.netrc)"


def _no_answer(host: str) -> str | None:
    """Why the server gives no answer within seconds; None: it does. In a thread, since a name server that hangs has no time limit."""
    answers: list[str | None] = []

    def ask() -> None:
        import requests

        try:
            answer = requests.post(
                f"{host}/graphql", json={"query": "{__typename}"}, timeout=PROBE_SECONDS, stream=True
            )
            answers.append(f"answers with {answer.status_code} {answer.reason}" if answer.status_code >= 500 else None)
        except requests.exceptions.SSLError:  # W&B may be told to take it
            answers.append(None)
        except requests.RequestException as error:
            answers.append("cannot be reached" if isinstance(error, requests.ConnectionError) else "does not answer")

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS + 1)
    problem = answers[0] if answers else "does not answer"
    return problem and f"W&B at {host} {problem}"


def _beside_sweep(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by full path under an agent of a W&B sweep, which holds names such as `reward_weights` for its own values."""
    if not under_agent():
        return dict(config)
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= (
            {f"{name}.{k}": v for k, v in _beside_sweep(value).items()} if isinstance(value, Mapping) else {name: value}
        )
    return flat


def _teardown() -> None:
    """End W&B's process: then its files are whole, and nothing is left to do when the program ends."""
    import wandb

    wandb.teardown()


def _stop_service() -> None:
    """Kill W&B's process, and have the program's end not wait for it."""
    with contextlib.suppress(Exception):
        from wandb.sdk import wandb_setup

        connection: Any = wandb_setup.singleton()._connection
        connection._cleanup()
        connection._torn_down = True
        connection._proc._process.kill()
        os.environ.pop("WANDB_SERVICE", None)
    with contextlib.suppress(Exception):
        _teardown()


# -------------------------------------------------------------------------------------------------------- W&B's files

_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7


def last_step(file: Path) -> int:
    """The last step with a row in a `.wandb` file; 0 if there is none. What a killed process left unfinished is not there."""
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2  # its names are made at run time

    last = 0
    for content in _records(file.read_bytes()):
        record = proto.Record()
        record.ParseFromString(content)
        for item in record.history.item:
            if "_step" in (item.key, *item.nested_key):
                last = max(last, int(json.loads(item.value_json)))
    return last


def _records(data: bytes) -> Iterator[bytes]:
    """The file is a header, then LevelDB's log format: blocks of 32 KiB, in them pieces (checksum 4, length 2, kind 1, bytes)."""
    place, parts = _FILE_HEADER, b""
    while place + _RECORD_HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        length, kind = struct.unpack("<HB", data[place + 4 : place + _RECORD_HEADER])
        if left < _RECORD_HEADER or kind == 0:  # the rest of a block is filled up with zeros
            place += left
            continue
        place += _RECORD_HEADER
        if place + length > len(data):
            return
        parts = (b"" if kind in (1, 2) else parts) + data[place : place + length]
        place += length
        if kind in (1, 4):  # whole, or its last piece
            yield parts
