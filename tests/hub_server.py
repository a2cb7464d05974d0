"""A hub of models on 127.0.0.1 for tests: it answers what the client of Hugging Face asks for to download a model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tests.loopback import LoopbackServer, QuietHandler

COMMIT = "a" * 40


class HubServer(LoopbackServer):
    """`models`: owner/name -> file -> content; `requests`: 'METHOD path' of each request; `away`: it answers 503."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.away = False
        super().__init__(_Handler)


class _Handler(QuietHandler):
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].removeprefix("/")
        model = "/".join(path.removeprefix("api/models/").split("/")[:2])
        files = self.server.models.get(model)
        if self.server.away or files is None:
            self.send_response(503 if self.server.away else 404)
            self.send_header("X-Error-Code", "" if self.server.away else "RepoNotFound")
            self._send(b"")
        elif path.startswith("api/models/") and "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
            self._send_json(rows)
        elif path.startswith("api/models/"):
            self._send_json({"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        else:
            content = files.get(path.partition("/resolve/")[2].partition("/")[2])
            self.send_response(404 if content is None else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Error-Code", "EntryNotFound" if content is None else "")
            self.send_header("ETag", f'"{_oid(content or b"")}"')
            self._send(content or b"")

    def _send_json(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._send(json.dumps(value).encode())

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
