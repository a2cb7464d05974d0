"""For the tests of W&B: a local server that answers as W&B's does, refuses or hangs; and what `.wandb` files hold."""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.loopback import LoopbackServer, QuietHandler


@dataclass
class SentRun:
    """What the server was sent of a run."""

    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    variables: list[dict[str, Any]] = field(default_factory=list)  # of each upsert
    states: list[Any] = field(default_factory=list)


class Server(LoopbackServer):
    """`mode`: ok, hang (takes a request and never answers), or a status such as 403; `only`: for paths that hold it."""

    def __init__(self) -> None:
        self.mode, self.only = "ok", ""
        self.runs: dict[str, SentRun] = {}
        self.sweeps: list[dict[str, Any]] = []
        self.commands: list[list[dict[str, Any]]] = []  # what an agent is sent, one heartbeat after the other
        super().__init__(_Handler)


class _Handler(QuietHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        if self.server.mode != "ok" and self.server.only in self.path:
            if self.server.mode == "hang":
                self.server.closed.wait()
                self.close_connection = True
                return
            self._answer({"errors": [{"message": "no"}]}, int(self.server.mode))
        elif self.path == "/graphql":
            query = json.loads(raw)
            named = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            data = self._data(named[1] if named else "", query.get("variables") or {})
            self._answer({"data": data} if data else {"data": None, "errors": [{"message": "unknown here"}]})
        elif "file_stream" in self.path:
            self._stream(self.server.runs[self.path.split("/")[-2]], json.loads(raw))
            self._answer({})
        else:
            self._answer({})

    def _answer(self, body: Any, status: int = 200) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _stream(self, run: SentRun, body: dict[str, Any]) -> None:
        for name, chunk in (body.get("files") or {}).items():
            rows = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = rows
            elif name == "wandb-summary.json":
                run.summary = rows[-1]

    def _data(self, name: str, v: dict[str, Any]) -> dict[str, Any] | None:
        project = {"id": "p", "name": v.get("project") or "cgtgan", "entity": {"id": "e", "name": "us"}}
        runs = self.server.runs
        if name == "RunResumeStatus":
            if (run := runs.get(v["name"])) is None:
                return {"model": {**project, "bucket": None}}
            lines = {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0}
            tail = {"historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]"}
            known = {
                "id": "b",
                "name": v["name"],
                "displayName": v["name"],
                "tags": [],
                "notes": "",
                "wandbConfig": '{"t": 1}',
            }
            bucket = {**known, **lines, **tail, "summaryMetrics": json.dumps(run.summary), "config": "{}"}
            return {"model": {**project, "bucket": bucket}}
        if name == "UpsertBucket":
            fresh = v["name"] not in runs
            runs.setdefault(v["name"], SentRun()).variables.append(v)
            lines = {"historyLineCount": len(runs[v["name"]].history)}
            bucket = {
                "id": "b",
                "name": v["name"],
                "displayName": v["name"],
                "description": None,
                "config": "{}",
                "sweepName": v.get("sweep"),
            }
            return {"upsertBucket": {"bucket": {**bucket, **lines, "project": project}, "inserted": fresh}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.server.url}/upload/{f}"} for f in v["files"]]
            return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}
        return None


# ---------------------------------------------------------------------------------------------------- .wandb files


def records(path: Path) -> Iterator[Any]:
    """Every record of a `.wandb` file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2
    data, at, content = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if room < 7 or not kind:
            at += room
            continue
        content = (content if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):
            record = proto.Record()
            record.ParseFromString(content)
            yield record


@dataclass
class Written:
    """What one `.wandb` file says."""

    run: Any = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None
    preempting: bool = False


def _items(entries: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entries:
        inner, (*parts, last) = found, list(entry.nested_key) or [entry.key]
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = json.loads(entry.value_json)
    return found


def written(path: Path) -> Written:
    """The content of one file."""
    found = Written()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= _items(record.run.config.update)
        elif kind == "config":
            found.config |= _items(record.config.update)
        elif kind == "history":
            found.rows.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= {k: v for k, v in _items(record.summary.update).items() if k != "_wandb"}
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        elif kind == "preempting":
            found.preempting = True
    return found


def files(run: Path) -> list[Path]:
    """The `.wandb` files of a run folder, in the order of their starts."""
    return sorted(run.glob("wandb/*run-2*/run-*.wandb"), key=lambda path: path.parent.name.removeprefix("offline-"))
