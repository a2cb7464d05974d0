"""serve: a checkpoint -> a local page to try it on pictures of one's own.

A page of another site may send requests to this machine, and a file may be made to harm. So: the `Host` header must name this machine
(else a foreign name could be bound to 127.0.0.1), a `POST` of another origin is refused, and no other origin may read an answer. An
upload is the body itself, without a name: it is counted while it comes, and its pixels before they are decoded. Nothing is written, no
file of the host has an address, and the sentences for what is refused are written here: they hold no path.
"""

from __future__ import annotations

import base64
import io
import re
import secrets
import signal
import socket
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cgtgan.errors import InputError, MissingFileError, Stopped, UserError

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as e:  # before torch is loaded
    raise UserError(
        f"stage=serve needs the extra `serve` ({e.name} is not installed): pip install 'cgtgan[serve]'"
    ) from None

import torch
import torch.nn.functional as F
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from cgtgan.assets.backbone import backbone_producer
from cgtgan.assets.checkpoints import find_checkpoint
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.images import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.captioner import Captioner
from cgtgan.captioning.decoding import describe
from cgtgan.config import ClipBackboneConfig, Config, DemoClipConfig, ServeConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.data.image_folder import find_images
from cgtgan.method.aggregation import nearest_texts
from cgtgan.models.clip_backbone import backbone_identity
from cgtgan.reporting.page import TEMPLATES
from cgtgan.runtime.artifacts import ArtifactStore, file_fingerprint, read_json
from cgtgan.runtime.interrupts import stop_requests

# Of what Pillow reads: no format that starts another program (EPS) or follows names in the file. HEIC where a plugin is loaded.
FORMATS = {
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "GIF": "GIF",
    "TIFF": "TIFF",
    "BMP": "BMP",
    "AVIF": "AVIF",
    "HEIF": "HEIC",
}
MAX_PIXELS = 64_000_000  # a telephone's 50 megapixels pass; 200 MB when decoded
MAX_ASPECT = (
    50  # CLIP brings the short side to its size before it crops: of 1 x 1,000,000 pixels that would make 50 gigapixels
)
PREVIEW = 640  # longest side of the picture that is shown
PIXEL_ART = 96  # up to here it is enlarged with hard pixels instead of a blur
THUMBNAIL = 240
EXAMPLES = 12
CONNECTIONS = 64  # beyond these a request is answered 503: each may hold an upload
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
NO_CORPUS = (
    "Corpus sentences near to a picture are not shown: the corpus that the settings name is not at hand, embedded with this checkpoint's "
    "CLIP. Give the experiment= that it was trained with, after its stage=preprocess."
)
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    with listening(cfg.serve) as sock:  # a port that is taken is said before the models are loaded
        page = Page.open(ws)
        app, host = create_app(page), _in_address(cfg.serve.host)
        kept_out: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None, "server_header": False}
        config = uvicorn.Config(app, **kept_out, limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=3)
        if host not in ("127.0.0.1", "localhost", "[::1]"):
            ws.tracker.say(
                f"serve.host={cfg.serve.host}: whoever reaches this machine by that address can use the page"
            )
        ws.tracker.say(f"http://{host}:{sock.getsockname()[1]}/ shows the page; Ctrl-C ends it")
        with stop_requests() as request:  # uvicorn closes the page on SIGINT and SIGTERM, then passes them on
            uvicorn.Server(config).run(sockets=[sock])
    if request.code:
        raise Stopped(f"{signal.Signals(request.signal).name} came: the page is closed", request.code)


def listening(serve: ServeConfig) -> socket.socket:
    try:
        return socket.create_server(
            (serve.host, serve.port), family=socket.AF_INET6 if ":" in serve.host else socket.AF_INET
        )
    except OSError as e:
        raise InputError(
            f"serve.host={serve.host} serve.port={serve.port} cannot be listened on ({e.strerror or e}): free it, choose another, or "
            "serve.port=0 for any free one"
        ) from None


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()


# ------------------------------------------------------------------------------------------------------------------ pictures


class Refused(Exception):
    """An upload that is not captioned: the HTTP status, and why in a sentence for whoever sent it."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


# What a damaged picture raises depends on its format.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


def accepted_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_picture(raw: bytes) -> Image.Image:
    """The picture, decoded, in the file's own mode and not turned, as `open_image` has it. Raises `Refused`."""
    try:
        with Image.open(io.BytesIO(raw), formats=accepted_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise Refused(
                    422, f"The picture has {width} x {height} pixels: it is too narrow, {MAX_ASPECT} to 1 is the limit."
                )
            image.load()
            return image
    except Image.DecompressionBombError:
        raise Refused(413, f"The picture has too many pixels: {MAX_PIXELS // 10**6} million are the limit.") from None
    except _DAMAGED:
        names = ", ".join(FORMATS[name] for name in accepted_formats())
        raise Refused(415, f"The file cannot be read as a picture ({names}).") from None


def data_uri(image: Image.Image, longest: int) -> str:
    """As CLIP sees it: RGB as Pillow converts it, not turned."""
    shown = image.convert("RGB")
    shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    kind, buffer = "PNG" if max(image.size) <= PIXEL_ART else "JPEG", io.BytesIO()
    shown.save(buffer, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


# -------------------------------------------------------------------------------------------------------------------- corpus


class AtHand(ArtifactStore):
    """A store that makes nothing: a page does not wait for hours of encoding. Raises `MissingFileError` for what is not there."""

    def path(self, kind: str, producer: Mapping[str, Any], suffix: str) -> Path:
        path = super().path(kind, producer, suffix)
        if not path.exists():
            raise MissingFileError(f"{path} is missing: stage=preprocess makes it")
        return path

    def lock(self, path: Path) -> AbstractContextManager[None]:
        raise MissingFileError(f"{path} is missing: stage=preprocess makes it")


def check_same_clip(ws: Workspace, told: dict[str, Any], checkpoint: Path) -> None:
    """Raise `InputError` where the settings' CLIP, which made the corpus's embeddings, is not the checkpoint's, which it has `told`."""
    given = ws.cfg.clip_backbone
    same = given.kind == told["kind"]
    if same and given.kind == "demo":
        folders = ws.store.path("clip", backbone_producer(ws), ""), checkpoint / "clip"
        same = len({file_fingerprint(folder / "clip.safetensors") for folder in folders}) == 1
    elif same:
        fields: dict[str, Any] = told | {"demo": DemoClipConfig()}
        same = backbone_identity(given) == backbone_identity(ClipBackboneConfig(**fields))
    if not same:
        raise InputError(f"clip_backbone={given.name} of these settings is not the CLIP of the checkpoint")


# ---------------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Example:
    image: Image.Image
    caption: str

    @property
    def picture(self) -> str:
        return data_uri(self.image, THUMBNAIL)

    @property
    def pixelated(self) -> bool:
        return max(self.image.size) <= PIXEL_ART


@dataclass
class Page:
    """What the page answers with. `sentences` and `vectors` (M, D) are the corpus; `no_corpus` says why there is none."""

    captioner: Captioner
    serve: ServeConfig
    about: str
    examples: list[Example] = field(default_factory=list)
    sentences: Sequence[str] = ()
    vectors: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    no_corpus: str = ""
    # one picture at a time: torch has the cores already, and so many decoded pictures are in memory
    turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, ws: Workspace) -> Page:
        cfg = ws.cfg
        named = find_images(cfg.image_paths) if cfg.image_paths else []
        checkpoint = find_checkpoint(ws)
        told = read_json(checkpoint / "checkpoint.json")
        captioner = Captioner.load(
            checkpoint, device=str(ws.device), decode=None if cfg.decode.name == "greedy" else cfg.decode
        )
        captioner.seed = cfg.seed
        about = f"CLIP: {told['clip_backbone']['name']}. Checkpoint of step {told['step']}. Decoding: {describe(captioner.decode)}."
        about += " It only knows the demo's drawings." if told["clip_backbone"]["kind"] == "demo" else ""
        page = cls(captioner, cfg.serve, about)
        at_hand = Workspace(cfg, ws.tracker)
        at_hand.store = AtHand(ws.store.root)
        try:
            check_same_clip(at_hand, told["clip_backbone"], checkpoint)
            page.vectors, page.sentences = sentence_embeddings(at_hand).vectors, corpus_sentences(at_hand)[0]
        except UserError as e:
            ws.tracker.say(f"no corpus sentences are shown: {e}")
            page.no_corpus = NO_CORPUS
        try:
            # where the settings are those of another checkpoint, so are their images
            named = named or (
                [] if page.no_corpus else [image.path for image in dataset_split(at_hand, cfg.evaluate.split).images]
            )
        except UserError as e:
            ws.tracker.say(f"no examples are shown: {e}")
        page.examples = page._examples(named)
        return page

    def _examples(self, paths: Sequence[Path]) -> list[Example]:
        """Some of the pictures, evenly spread; those that the page would refuse are left out."""
        images: list[Image.Image] = []
        for path in paths[:: max(1, len(paths) // EXAMPLES)][:EXAMPLES]:
            try:
                image = read_picture(path.read_bytes())
                self.captioner.backbone.pixels(image)
            except (Refused, OSError, ValueError):
                continue
            images.append(image)
        return [Example(*both) for both in zip(images, self.captioner.caption(images), strict=True)]

    def answer_upload(self, raw: bytes) -> dict[str, Any]:
        with self.turn:
            return self._answer(read_picture(raw))

    def answer_example(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.examples):
            raise Refused(404, f"There is no example {index}.")
        with self.turn:
            return self._answer(self.examples[index].image)

    def _answer(self, image: Image.Image) -> dict[str, Any]:
        captioner = self.captioner
        try:
            pixels = [captioner.backbone.pixels(image)]
        except (ValueError, OSError):  # a mode that Pillow cannot resize
            raise Refused(415, f"The picture's kind of pixels ({image.mode}) cannot be resized.") from None
        vector = captioner.embed(pixels)
        first = captioner.caption(pixels)[0]
        text = captioner.backbone.encode_texts([embedded_text(first)]).cpu()
        captions = [(first, float(F.cosine_similarity(text, vector)))]
        if self.serve.captions > 1:
            ranked = captioner.captions(pixels, self.serve.captions)[0]
            captions += [(one.caption, one.clip_similarity) for one in ranked if one.caption != first][
                : self.serve.captions - 1
            ]
        return {
            "captions": captions,
            "nearest": self._nearest(vector),
            "picture": data_uri(image, PREVIEW),
            "pixelated": max(image.size) <= PIXEL_ART,
        }

    def _nearest(self, vector: Tensor) -> list[tuple[str, float]]:
        if not self.sentences:
            return []
        # a corpus says some sentences often: some more are taken, and each is shown once
        rows = nearest_texts(vector, self.vectors, 10 * self.serve.nearest, device=self.captioner.backbone.device)[
            0
        ].cpu()
        cosines = F.cosine_similarity(self.vectors[rows].float(), vector).tolist()
        found = dict(reversed([(self.sentences[int(row)], cosine) for row, cosine in zip(rows, cosines, strict=True)]))
        return list(reversed(found.items()))[: self.serve.nearest]


# --------------------------------------------------------------------------------------------------------------------- server


def create_app(page: Page) -> FastAPI:
    # no pages of documentation: FastAPI's load their script from elsewhere
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    limit = int(page.serve.max_megabytes * 1e6)
    too_large = f"The file is larger than {page.serve.max_megabytes:g} MB, the limit."
    # autoescape must be True and not select_autoescape(), which does not know the ending .j2
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("serve.html.j2")

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Any:
        sentence = _foreign(request, page.serve.host)
        response = JSONResponse({"error": sentence}, 403) if sentence else await call_next(request)
        response.headers.update({"Content-Security-Policy": POLICY} | HEADERS | dict(response.headers))
        if response.status_code >= 400:  # whoever is refused may send on for ever
            response.headers["Connection"] = "close"
        return response

    @app.exception_handler(Refused)
    async def refused(_request: Request, why: Refused) -> JSONResponse:
        return JSONResponse({"error": str(why)}, why.status)

    @app.get("/")
    def index() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        text = template.render(
            nonce=nonce,
            about=page.about,
            formats=", ".join(FORMATS[name] for name in accepted_formats()),
            max_megabytes=f"{page.serve.max_megabytes:g}",
            max_bytes=limit,
            too_large=too_large,
            no_corpus=page.no_corpus,
            examples=page.examples,
        )
        policy = f"{POLICY}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        return HTMLResponse(text.encode("utf-8", "replace"), headers={"Content-Security-Policy": policy})

    @app.post("/caption")
    async def caption(request: Request) -> JSONResponse:
        raw, size = bytearray(), 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    raw += chunk
                elif (
                    size > 10 * limit
                ):  # up to here what comes is dropped: a client cut off while it sends does not see the answer
                    break
        except ClientDisconnect:
            raise Refused(400, "The upload was broken off.") from None
        if size > limit:
            raise Refused(413, too_large)
        return JSONResponse(await run_in_threadpool(page.answer_upload, bytes(raw)))

    @app.post("/examples/{index}")
    def example(index: int) -> JSONResponse:
        return JSONResponse(page.answer_example(index))

    return app


def _foreign(request: Request, host: str) -> str:
    """Why a request is not answered; '' if it comes from a page of ours, or from no page."""
    given = request.headers.get("host", "")
    named = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/@\s]+)(:\d+)?", given)
    here = (request.scope.get("server") or ("",))[0]  # the address that was reached: what 0.0.0.0 stands for
    if named is None or named[1].lower() not in {
        "localhost",
        "127.0.0.1",
        "[::1]",
        _in_address(host),
        _in_address(here),
    }:
        return "The Host header does not name this machine: open the page by the address that the command printed."
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != given.lower():
        return "Pages of another site cannot use this one."
    return ""
