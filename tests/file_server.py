"""A file server on 127.0.0.1 for tests of downloads: ranges, redirects, and every way in which it may fail."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """A file, and how it is answered for. `breaks`: bytes after which an answer breaks off, one entry per request."""

    content: bytes
    ranges: bool = True
    tagged: bool = True  # has an ETag
    breaks: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)  # of the next answers, in the place of 200
    hangs: int = 0  # so many answers stop after the head
    length: int | None = None  # what the head says, in the place of the true length
    kind: str = "application/octet-stream"
    redirect: str = ""


class FileServer(ThreadingHTTPServer):
    """`files`: path -> what is served; `requests`: (path, Range header) of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""

    def close(self) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        served = self.server.files.get(self.path)
        status = 404 if served is None else served.status.pop(0) if served.status else 200
        if served is None or status >= 400:
            self.send_error(status)
        elif served.redirect:
            self.send_response(302)
            self.send_header("Location", served.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(served, asked)

    def _send(self, served: Served, asked: str | None) -> None:
        size, tag = len(served.content), f'"{hashlib.md5(served.content).hexdigest()}"'
        condition = self.headers.get("If-Range")
        is_part = asked is not None and served.ranges and condition in (None, tag if served.tagged else None)
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if is_part and asked else 0
        if is_part and start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if served.tagged:
            self.send_header("ETag", tag)
        self.send_header("Content-Type", served.kind)
        self.send_header("Content-Length", str(served.length or size - start))
        self.end_headers()
        if served.hangs:
            served.hangs -= 1
            self.server.closed.wait(20)
            return
        count = served.breaks.pop(0) if served.breaks else size - start
        self.wfile.write(served.content[start : start + count])
        self.close_connection = start + count < size
