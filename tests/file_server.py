"""For tests of downloads: a file server on 127.0.0.1 that may fail in every way, and files in the genuine formats."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field

from PIL import Image

from cgtgan.runtime.sources import COCO_IMAGES, KARPATHY, Source
from tests.loopback import LoopbackServer, QuietHandler


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


class FileServer(LoopbackServer):
    """`files`: path -> what is served; `requests`: (path, Range header) of each request."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str | None]] = []
        super().__init__(_Handler)


class _Handler(QuietHandler):
    server: FileServer  # pyright: ignore[reportIncompatibleVariableOverride]

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


# ---------------------------------------------------------------------------------------------------------------- files


def publish(server: FileServer, source: Source, content: bytes) -> None:
    """Serve it where `mirror` has it."""
    server.files["/" + source.address.partition("://")[2]] = Served(content)


def archive_of(members: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return file.getvalue()


def jpeg(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (number * 7 % 256, number * 31 % 256, 90)).save(file, "jpeg")
    return file.getvalue()


def karpathy(*splits: str) -> bytes:
    """Karpathy's dataset_coco.json: image n is of the n-th split; restval, val and test lie in val2014."""
    images = [
        {
            "filename": f"COCO_{'train' if split == 'train' else 'val'}2014_{n:012d}.jpg",
            "cocoid": n,
            "split": split,
            "sentences": [{"raw": f"A {colour} wall near tree number {n}."} for colour in ("red", "blue")],
        }
        for n, split in enumerate(splits, 1)
    ]
    return json.dumps({"images": images, "dataset": "coco"}).encode()


def publish_coco(server: FileServer, *splits: str) -> None:
    """Image n is of the n-th split: Karpathy's archive, and the two archives of pictures."""
    publish(server, KARPATHY, archive_of({"dataset_coco.json": karpathy(*splits)}))
    for folder, source in COCO_IMAGES.items():
        names = {
            n: f"{folder}/COCO_{folder}_{n:012d}.jpg"
            for n, split in enumerate(splits, 1)
            if (split == "train") == (folder == "train2014")
        }
        publish(server, source, archive_of({name: jpeg(n) for n, name in names.items()}))
