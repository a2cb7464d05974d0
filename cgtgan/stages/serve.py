"""serve: a checkpoint -> a local web page that captions one's own pictures."""

from __future__ import annotations

import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

from cgtgan.errors import InputError, Stopped, UserError

try:
    import fastapi  # noqa: F401
    import uvicorn
except ModuleNotFoundError as e:  # before torch is loaded
    missing = f"stage=serve needs the extra `serve` ({e.name} is not installed)"
    raise UserError(f"{missing}: pip install 'cgtgan[serve]'") from None

from cgtgan.assets.backbone import backbone_producer
from cgtgan.assets.checkpoints import find_checkpoint
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.images import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.captioner import Captioner
from cgtgan.captioning.decoding import chosen_decode, describe
from cgtgan.captioning.request_timeout import protocol
from cgtgan.captioning.web import Demo, create_app, in_address
from cgtgan.config import ClipBackboneConfig, Config, DemoClipConfig, ServeConfig
from cgtgan.data.named_pictures import find_images
from cgtgan.models.backbone_identity import backbone_identity
from cgtgan.reporting.page import render_template
from cgtgan.runtime.artifacts import file_fingerprint, read_json
from cgtgan.runtime.interrupts import stop_requests
from cgtgan.runtime.store import ReadOnlyStore

EXAMPLES = 12
CONNECTIONS = 64  # a request beyond these is answered 503: each may hold an upload in memory
UVICORN: dict[str, Any] = {
    **{"ws": "none", "lifespan": "off", "log_config": None, "server_header": False},
    **{"limit_concurrency": CONNECTIONS, "timeout_graceful_shutdown": 3},
}
NO_CORPUS = (
    "Corpus sentences near to a picture are not shown. They need the corpus of these settings, embedded with this "
    "checkpoint's CLIP: give the experiment= that the checkpoint was trained with, after its stage=preprocess."
)


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    with listening(cfg.serve) as sock:  # an error about a port that is taken comes before the models are loaded
        app = create_app(open_demo(ws), partial(render_template, "serve.html.j2"))
        host = in_address(cfg.serve.host)
        if host not in ("127.0.0.1", "localhost", "[::1]"):
            ws.tracker.say(f"serve.host={cfg.serve.host}: everybody who reaches this machine there can use the page")
        ws.tracker.say(f"http://{host}:{sock.getsockname()[1]}/ shows the page; Ctrl-C ends it")
        with stop_requests() as request:  # uvicorn closes the page on SIGINT and SIGTERM, then passes them on
            settings: dict[str, Any] = UVICORN | {"http": protocol(cfg.serve.request_seconds)}
            uvicorn.Server(uvicorn.Config(app, **settings)).run(sockets=[sock])
    if request.code:
        raise Stopped(f"received {signal.Signals(request.signal).name}: the page is closed", request.code)


def listening(serve: ServeConfig) -> socket.socket:
    """The open port. Raises `InputError` where the address cannot be used."""
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    try:
        return socket.create_server((serve.host, serve.port), family=family)
    except OSError as e:
        raise InputError(
            f"serve.host={serve.host} serve.port={serve.port} cannot be listened on ({e.strerror or e}): free it, "
            "choose another, or serve.port=0 for any free one"
        ) from None


def open_demo(ws: Workspace) -> Demo:
    """The checkpoint's captioner; corpus and examples as far as they were made before."""
    cfg = ws.cfg
    named = find_images(cfg.image_paths, cfg.dataset.image_column) if cfg.image_paths else []
    checkpoint = find_checkpoint(ws)
    stored = read_json(checkpoint / "checkpoint.json")
    captioner = Captioner.load(checkpoint, device=str(ws.device))
    captioner.decode = chosen_decode(captioner.decode, cfg.decode, cfg.typed_decode)
    captioner.seed = cfg.seed
    clip = stored["clip_backbone"]
    about = f"CLIP: {clip['name']}. Checkpoint of step {stored['step']}. Decoding: {describe(captioner.decode)}."
    about += " It only knows the demo's drawings." if clip["kind"] == "demo" else ""
    demo = Demo(captioner, cfg.serve, about)
    available = Workspace(cfg, ws.tracker)
    available.store = ReadOnlyStore(ws.store.root)  # a page does not wait for hours of encoding
    try:
        check_same_clip(available, clip, checkpoint)
        demo.vectors, demo.sentences = sentence_embeddings(available).vectors, corpus_sentences(available)[0]
    except UserError as e:
        ws.tracker.say(f"no corpus sentences are shown: {e}")
        demo.no_corpus = NO_CORPUS
    if not named and not demo.no_corpus:  # settings of another checkpoint would name other images
        try:
            named = [image.path for image in dataset_split(available, cfg.evaluate.split).images]
        except UserError as e:
            ws.tracker.say(f"no examples are shown: {e}")
    demo.add_examples(named[:: max(1, len(named) // EXAMPLES)][:EXAMPLES])
    return demo


def check_same_clip(ws: Workspace, clip: dict[str, Any], checkpoint: Path) -> None:
    """Raise `InputError` if the settings' CLIP, which embedded the corpus, is not `clip`, the checkpoint's."""
    given = ws.cfg.clip_backbone
    same = given.kind == clip["kind"]
    if same and given.kind == "demo":
        kept = ws.store.path("clip", backbone_producer(ws), "")
        if not kept.exists():
            ws.store.will_make(kept)
        same = len({file_fingerprint(folder / "clip.safetensors") for folder in (kept, checkpoint / "clip")}) == 1
    elif same:
        fields: dict[str, Any] = clip | {"demo": DemoClipConfig()}
        same = backbone_identity(given) == backbone_identity(ClipBackboneConfig(**fields))
    if not same:
        raise InputError(f"clip_backbone={given.name} of these settings is not the CLIP of the checkpoint")
