"""The web application of stage=serve: it answers with the captions of one picture.

Another site's page may send requests to this machine, and a picture file may be made to harm. So the `Host` header must
name this machine (else a foreign name could be bound to 127.0.0.1), a POST of another origin is refused, and no other
origin may read an answer. An upload is the request's body, without a name: its bytes are counted while they arrive, its
pixels before they are decoded. Nothing is written, no file has an address, and no error sentence holds a path.
"""

from __future__ import annotations

import io
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from starlette.requests import ClientDisconnect
from torch import Tensor

from cgtgan.captioning.captioner import DRAWINGS, Captioner
from cgtgan.captioning.decoding import describe
from cgtgan.config import ServeConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.data.image_files import DAMAGED_IMAGE, MAX_ASPECT, PIXEL_ART, data_uri, plain_picture
from cgtgan.data.picture_archives import picture_bytes
from cgtgan.errors import InputError
from cgtgan.method.aggregation import nearest_texts

# Pillow's format -> its usual name; of what Pillow reads, none that starts another program (EPS) or follows file names.
FORMATS = {name: name for name in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "AVIF")} | {"WEBP": "WebP", "HEIF": "HEIC"}
MAX_PIXELS = 64_000_000  # a telephone's 50 megapixels pass; 200 MB when decoded
PREVIEW = 640  # longest side, in pixels, of the picture in an answer
THUMBNAIL = 240  # the same of an example
NEAREST_FACTOR = 10  # a corpus repeats sentences: this many times more are fetched, and each is listed once
NEARER = "One of the other captions is nearer to the picture by CLIP."
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Refused(Exception):
    """An upload that is not captioned: the HTTP status and a sentence for the person who sent it."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


# ------------------------------------------------------------------------------------------------------------ pictures


def format_names() -> dict[str, str]:
    """Pillow's name -> the usual name of every format that is accepted and that Pillow can open here."""
    Image.init()
    return {name: usual for name, usual in FORMATS.items() if name in Image.OPEN}


def read_picture(raw: bytes) -> Image.Image:
    """The decoded picture as `open_image` gives it: not rotated. Raises `Refused`."""
    try:
        with Image.open(io.BytesIO(raw), formats=list(format_names())) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if max(width, height) > MAX_ASPECT * min(width, height):
                why = f"it is too narrow, {MAX_ASPECT} to 1 is the limit"
                raise Refused(422, f"The picture has {width} x {height} pixels: {why}.")
            image.load()
            return plain_picture(image)
    except Image.DecompressionBombError:
        raise Refused(413, f"The picture has too many pixels: {MAX_PIXELS // 10**6} million are the limit.") from None
    except DAMAGED_IMAGE:
        raise Refused(415, f"The file cannot be read as a picture ({', '.join(format_names().values())}).") from None


def shrunk(image: Image.Image, longest: int) -> tuple[str, bool]:
    """(data URI, whether it is pixel art) of the picture as CLIP reads it: Pillow's RGB, not rotated."""
    preview, pixelated = image.convert("RGB"), max(image.size) <= PIXEL_ART
    preview.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    kind, buffer = "PNG" if pixelated else "JPEG", io.BytesIO()
    preview.save(buffer, kind, quality=88)
    return data_uri(kind, buffer.getvalue()), pixelated


# ------------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Example:
    """A picture of the page's list: the picture, its caption, a thumbnail as data URI, and how to enlarge it."""

    image: Image.Image
    caption: str
    thumbnail: str
    pixelated: bool


@dataclass
class Demo:
    """What the page answers with. `sentences` and `vectors` (M, D) are the corpus; `no_corpus` says why it is empty."""

    captioner: Captioner
    serve: ServeConfig
    about: str = ""
    sentences: Sequence[str] = ()
    vectors: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    no_corpus: str = ""
    examples: list[Example] = field(default_factory=list)
    # one picture at a time: torch uses every core already, and memory holds few decoded pictures
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add_examples(self, paths: Sequence[Path]) -> None:
        """Caption these pictures; a file that would be refused as an upload is left out."""
        images, pixels = [], []
        for path in paths:
            try:
                image = read_picture(picture_bytes(path))
                pixels.append(self._pixels(image))
            except (Refused, InputError, OSError):
                continue
            images.append(image)
        for image, caption in zip(images, self.captioner.caption(pixels), strict=True):
            self.examples.append(Example(image, caption, *shrunk(image, THUMBNAIL)))

    def answer_upload(self, raw: bytes) -> dict[str, Any]:
        with self.lock:
            return self.answer(read_picture(raw))

    def answer_example(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.examples):
            raise Refused(404, f"There is no example {index}.")
        with self.lock:
            return self.answer(self.examples[index].image)

    def answer(self, image: Image.Image) -> dict[str, Any]:
        """Captions and corpus sentences with their cosine to the picture, as JSON. The picture is encoded once."""
        captioner, count = self.captioner, self.serve.captions
        encoded = captioner.encode([self._pixels(image)])
        vector = encoded.vectors.cpu()
        first = captioner.caption(encoded)[0]
        text = captioner.backbone.encode_texts([embedded_text(first)]).cpu()
        captions = [self._rated(first, float(F.cosine_similarity(text, vector)))]
        if count > 1:
            others = [scored for scored in captioner.captions(encoded, count)[0] if scored.caption != first]
            captions += [self._rated(scored.caption, scored.clip_similarity) for scored in others[: count - 1]]
        picture, pixelated = shrunk(image, PREVIEW)
        nearest = self._nearest(vector)
        answer = {"captions": captions, "nearest": nearest, "picture": picture, "pixelated": pixelated}
        return answer | {"note": self._note(captions, image.size)}

    def _note(self, captions: Sequence[tuple[Any, ...]], size: tuple[int, int]) -> str:
        """What to know about the first caption; empty where there is nothing."""
        notes = [DRAWINGS] if self.captioner.is_foreign(size) else []
        if any(cosine > captions[0][1] for _, cosine, *_ in captions[1:]):
            notes.append(f"This caption is the checkpoint's usual one ({describe(self.captioner.decode)}). {NEARER}")
        return " ".join(notes)

    def _pixels(self, image: Image.Image) -> Tensor:
        try:
            return self.captioner.backbone.pixels(image)
        except (ValueError, OSError):  # a mode that Pillow cannot resize
            raise Refused(415, f"The picture's kind of pixels ({image.mode}) cannot be resized.") from None

    def _rated(self, text: str, cosine: float) -> tuple[Any, ...]:
        """Text, cosine, and the probability of fitting the picture where the backbone was trained to tell it."""
        probability = self.captioner.backbone.probability(cosine)
        return (text, cosine) if probability is None else (text, cosine, probability)

    def _nearest(self, vector: Tensor) -> list[tuple[Any, ...]]:
        """The corpus sentences nearest to `vector` (1, D), each once, `_rated`."""
        if not self.sentences:
            return []
        device = self.captioner.backbone.device
        rows = nearest_texts(vector, self.vectors, NEAREST_FACTOR * self.serve.nearest, device=device)[0].cpu()
        cosines: dict[str, float] = {}
        for row, cosine in zip(rows, F.cosine_similarity(self.vectors[rows].float(), vector).tolist(), strict=True):
            cosines.setdefault(self.sentences[int(row)], cosine)
        return [self._rated(text, cosine) for text, cosine in list(cosines.items())[: self.serve.nearest]]


# -------------------------------------------------------------------------------------------------------------- server


def create_app(demo: Demo, render: Callable[..., str]) -> FastAPI:
    """The page, its examples and its uploads. `render` makes the page's HTML from the values its template names."""
    # no pages of documentation: FastAPI's load their script from elsewhere
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    limit = int(demo.serve.max_megabytes * 1e6)
    too_large = f"The file is larger than {demo.serve.max_megabytes:g} MB, the limit."

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Any:
        sentence = _foreign(request, demo.serve.host)
        response = JSONResponse({"error": sentence}, 403) if sentence else await call_next(request)
        response.headers.update(HEADERS | dict(response.headers))
        if response.status_code >= 400:  # a refused client may go on sending without end
            response.headers["Connection"] = "close"
        return response

    @app.exception_handler(Refused)
    async def refused(_request: Request, why: Refused) -> JSONResponse:
        return JSONResponse({"error": str(why)}, why.status)

    @app.get("/")
    def index() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        formats = ", ".join(format_names().values())
        limits = {"formats": formats, "max_bytes": limit, "max_megabytes": f"{demo.serve.max_megabytes:g}"}
        html = render(nonce=nonce, demo=demo, too_large=too_large, **limits)
        policy = f"{POLICY}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    @app.post("/caption")
    async def caption(request: Request) -> JSONResponse:
        raw = await _body(request, limit, too_large)
        return JSONResponse(await run_in_threadpool(demo.answer_upload, raw))

    @app.post("/examples/{index}")
    def example(index: int) -> JSONResponse:
        return JSONResponse(demo.answer_example(index))

    return app


async def _body(request: Request, limit: int, too_large: str) -> bytes:
    raw, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                raw += chunk
            elif size > 10 * limit:  # below, bytes are dropped: a client that is cut off while sending sees no answer
                break
    except ClientDisconnect:
        raise Refused(400, "The upload was broken off.") from None
    if size > limit:
        raise Refused(413, too_large)
    return bytes(raw)


def in_address(host: str) -> str:
    """`host` as it is written in an address: an IPv6 number in brackets."""
    return f"[{host}]" if ":" in host else host.lower()


def _foreign(request: Request, host: str) -> str:
    """Why a request is refused; '' if it comes from this page, or from no page."""
    given = request.headers.get("host", "")
    named = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/@\s]+)(:\d+)?", given)
    reached = (request.scope.get("server") or ("",))[0]  # the address that was reached: one of those behind 0.0.0.0
    accepted = {"localhost", "127.0.0.1", "[::1]", in_address(host), in_address(reached)}
    if named is None or named[1].lower() not in accepted:
        return "The Host header does not name this machine: open the page by the address that the command printed."
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != given.lower():
        return "Pages of another site cannot use this one."
    return ""
