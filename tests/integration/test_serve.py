"""stage=serve as people meet it: a real server process on a tiny model, asked by httpx and by a headless Chromium."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.captioner import Captioner
from cgtgan.checks import validate
from cgtgan.config import Config, ServeConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.errors import InputError
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.runtime.artifacts import load_sentences
from cgtgan.stages.serve import listening, open_demo
from tests.program import Program, run_program

ROOT = Path(__file__).parents[2]


def command(home: Path, *overrides: str) -> list[str]:
    settings = ("threads=1", f"artifacts_dir={home / 'artifacts'}", f"runs_dir={home / 'runs'}")
    return [sys.executable, str(ROOT / "run.py"), *settings, *overrides]


def run_folder(home: Path) -> Path:
    (folder,) = (home / "runs" / "demo_tiny").glob("*/seed=0")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home where a tiny demo was trained."""
    home = tmp_path_factory.mktemp("trained")
    done = run_program(command(home, "experiment=demo_tiny", "stage=train", "wandb=disabled"), cwd=home, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return home


class Server:
    """A server process: `url` once it listens, and all that it `printed`."""

    def __init__(self, home: Path, *overrides: str):
        self.process = Program(command(home, "stage=serve", "serve.port=0", *overrides), cwd=home)
        deadline = time.monotonic() + 120
        while not (found := re.search(r"^(http://\S+)/ shows the page", self.printed, re.MULTILINE)):
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.05)
        self.url = found[1]

    @property
    def printed(self) -> str:
        return self.process.stdout + self.process.stderr

    def end(self, by: signal.Signals) -> int:
        self.process.send_signal(by)
        return self.process.wait(20)


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    server = Server(home, "experiment=demo_tiny", "serve.max_megabytes=0.5")
    yield server
    assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "Traceback" not in server.printed
    assert server.printed.endswith("received SIGTERM: the page is closed\n")


@pytest.fixture(scope="module")
def pictures(home: Path) -> list[Path]:
    return sorted((home / "artifacts" / "demo_world").glob("*/images/test/*.png"))


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A PNG whose header has these sizes, and hardly any pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------------------------------------------------- its answers


def test_a_picture_is_captioned_as_the_captioner_does(home: Path, server: Server, pictures: list[Path]) -> None:
    answer = httpx.post(f"{server.url}/caption", content=pictures[0].read_bytes()).json()
    captioner = Captioner.load(run_folder(home))
    vector = captioner.embed(pictures[0])[0]

    def similarity(sentence: str) -> float:
        text = captioner.backbone.encode_texts([embedded_text(sentence)])[0]
        return float(text @ vector / text.norm() / vector.norm())

    assert answer["captions"][0][0] == captioner.caption(pictures[0])[0]
    assert len({caption for caption, _ in answer["captions"]}) == len(answer["captions"]) <= 3
    for caption, found in answer["captions"]:
        assert found == pytest.approx(similarity(caption), abs=1e-5)
    assert Image.open(io.BytesIO(base64.b64decode(answer["picture"].partition("base64,")[2]))).size == (48, 48)

    (corpus,) = (home / "artifacts" / "sentences").glob("*.safetensors")
    best = sorted({s: similarity(s) for s in set(load_sentences(corpus)[0])}.items(), key=lambda row: -row[1])[:5]
    assert [s for s, _ in answer["nearest"]] == [s for s, _ in best]
    assert [c for _, c in answer["nearest"]] == pytest.approx(
        [c for _, c in best], abs=1e-3
    )  # the corpus's are kept in float16


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_answered_or_refused_in_a_sentence(
    server: Server, pictures: list[Path], mode: str
) -> None:
    image = Image.open(pictures[0])
    image = Image.new("I;16", (40, 30), 40000) if mode == "I;16" else image.convert("RGBA").convert(mode)
    answer = httpx.post(f"{server.url}/caption", content=encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert (answer.status_code, set(answer.json())) in [
        (200, {"captions", "nearest", "picture", "pixelated", "note"}),
        (415, {"error"}),
    ]
    assert answer.status_code == 200 or mode == "I;16"


def test_an_example_is_captioned_as_its_upload_and_its_alt_text_is_the_caption(
    server: Server, pictures: list[Path]
) -> None:
    page = httpx.get(server.url).text
    captions = re.findall(r'<button [^>]*data-example="\d+"[^>]*><img [^>]*alt="([^"]*)"', page)
    assert len(captions) == len(pictures) == 12
    for index in (0, 7):
        answer = httpx.post(f"{server.url}/examples/{index}").json()
        assert answer == httpx.post(f"{server.url}/caption", content=pictures[index].read_bytes()).json()
        assert answer["captions"][0][0] == captions[index]
    refused = httpx.post(f"{server.url}/examples/12")
    assert (refused.status_code, refused.json()) == (404, {"error": "There is no example 12."})


REFUSED: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "nothing": (lambda: b"", 415, "cannot be read as a picture (JPEG, PNG,"),
    "a text": (lambda: b"hello\n" * 100, 415, "cannot be read as a picture"),
    "half a picture": (lambda: encoded(Image.effect_noise((200, 200), 50))[:3000], 415, "cannot be read as a picture"),
    "a program": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "cannot be read as a picture"),
    "a bomb": (lambda: png_that_says(9000, 9000), 413, "too many pixels: 64 million are the limit"),
    "a bomb that Pillow itself refuses": (lambda: png_that_says(60000, 60000), 413, "too many pixels: 64 million"),
    "a thread that a resize makes a bomb": (
        lambda: encoded(Image.new("1", (1, 200_000))),
        422,
        "has 1 x 200000 pixels: it is too narrow",
    ),
    "too large a file": (lambda: b"x" * 500_001, 413, "The file is larger than 0.5 MB, the limit."),
    "far too large a file": (lambda: b"x" * 20_000_000, 413, "The file is larger than 0.5 MB, the limit."),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_upload_is_refused_in_a_sentence_without_a_path(home: Path, server: Server, what: str) -> None:
    content, status, sentence = REFUSED[what]
    try:
        answer = httpx.post(f"{server.url}/caption", content=content(), headers={"X-File": "../../etc/passwd"})
    except httpx.HTTPError:  # cut off beyond ten times the limit
        assert what == "far too large a file"
    else:
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
        assert sentence in answer.json()["error"]
        assert "/" not in answer.json()["error"]
    assert httpx.get(server.url).status_code == 200


def memory_mb(server: Server) -> float:
    """The most that the process had in memory (VmHWM)."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1000


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="left out: the system does not tell a process's memory"
)
def test_bombs_and_endless_uploads_take_no_memory(server: Server) -> None:
    before = memory_mb(server)
    for what in ("a bomb", "a bomb that Pillow itself refuses", "a thread that a resize makes a bomb"):
        httpx.post(f"{server.url}/caption", content=REFUSED[what][0]())
    for path in ("/caption", "/no"):
        sent = 0
        with connected(server) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**12}\r\n\r\n".encode())
            while sent < 200_000_000:
                sent += sock.send(b"x" * 65536)
        assert sent < 100_000_000  # the server closed it
    assert memory_mb(server) - before < 30


def test_an_upload_that_breaks_off_is_no_bug_of_ours(server: Server) -> None:
    with connected(server) as sock:
        sock.sendall(b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
        time.sleep(0.2)
    assert httpx.get(server.url).status_code == 200
    assert "Traceback" not in server.printed


def test_half_sent_requests_do_not_keep_others_out(home: Path) -> None:
    """64 connections are the limit.

    Some send half a head, some half a body, some nothing; each is closed after a time.
    """
    server = Server(home, "experiment=demo_tiny", "serve.request_seconds=2")
    half = (
        b"POST /caption HTTP/1.1\r\nHost: loc",
        b"POST /caption HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx",
        b"",
    )
    with contextlib.ExitStack() as held:
        for number in range(64):
            held.enter_context(connected(server)).sendall(half[number % 3])
        deadline = time.monotonic() + 30
        statuses = set()
        while 200 not in statuses:
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.TransportError):
                statuses.add(httpx.get(server.url).status_code)
            time.sleep(0.1)
        with httpx.Client() as client:  # a connection that waits between two whole requests is not closed for it
            assert client.get(server.url).status_code == 200
            time.sleep(2.5)
            assert client.get(server.url).status_code == 200
    assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "Traceback" not in server.printed


# ----------------------------------------------------------------------------------------------------------- its guards


def test_the_headers_let_nothing_in(server: Server) -> None:
    first, second = httpx.get(server.url), httpx.get(server.url)
    policy = first.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; img-src data:;")
    assert "unsafe" not in policy
    (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
    assert first.text.count(f'nonce="{nonce}"') == first.text.count("<style") + first.text.count("<script") == 2
    assert nonce not in second.text
    assert not re.search(
        r"https?://|//\w|\son\w+=|style=", re.sub(r"data:[^\"]*", "", first.text).replace("//  answers", "")
    )
    for answer in (first, httpx.post(f"{server.url}/caption"), httpx.get(f"{server.url}/no")):
        assert not [h for h in answer.headers if h.startswith("access-control") or h == "server"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "localhost@evil.example", "[::1].evil"]
)
def test_a_foreign_host_is_refused(server: Server, host: str) -> None:
    for answer in (
        httpx.get(server.url, headers={"Host": host}),
        httpx.post(f"{server.url}/examples/0", headers={"Host": host}),
    ):
        assert answer.status_code in (400, 403)
        assert "captions" not in answer.text


def test_a_page_of_another_site_is_refused_and_our_own_is_not(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    for host in (f"localhost:{port}", f"LOCALHOST:{port}", "127.0.0.1"):
        assert (
            httpx.post(f"{server.url}/examples/0", headers={"Host": host, "Origin": f"http://{host}"}).status_code
            == 200
        )
    for origin in ("http://evil.example", "null", f"http://localhost:{int(port) + 1}", "file://"):
        assert (
            httpx.post(f"{server.url}/examples/0", headers={"Host": f"localhost:{port}", "Origin": origin}).status_code
            == 403
        )


def test_no_path_of_the_host_can_be_read(server: Server) -> None:
    for path in (
        *(
            "/../../../../etc/passwd",
            "/examples/../../etc/passwd",
            "/examples/%2e%2e%2fetc%2fpasswd",
            "//etc/passwd",
            "/run.py",
        ),
        *(
            "/static/../run.py",
            "/examples/0/../../runs",
            "/docs",
            "/redoc",
            "/openapi.json",
            "/examples/-1",
            "/examples/0x1",
        ),
    ):
        for method in ("GET", "POST"):
            with connected(server) as sock:  # as it is: httpx would tidy the path up
                headers = "Host: localhost\r\nContent-Length: 0\r\nConnection: close"
                sock.sendall(f"{method} {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
            assert int(answer.split()[1]) in (404, 405, 422), (path, answer)
            assert b"root:" not in answer


# -------------------------------------------------------------------------------------------------------- start and end


def test_a_checkpoint_alone_is_served_without_a_corpus_and_with_ones_own_examples(
    home: Path, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    Image.open(pictures[3]).convert("RGB").resize((90, 90)).save(tmp_path / "photos" / "secret-name.jpg")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    (empty := tmp_path / "empty").mkdir()
    server = Server(empty, f"checkpoint={run_folder(home)}", f"images={tmp_path / 'photos'}")
    try:
        page = httpx.get(server.url).text
        assert "Corpus sentences near to a picture are not shown" in page
        assert page.count("data-example=") == 1
        assert "secret-name" not in page
        answer = httpx.post(f"{server.url}/examples/0").json()
        assert answer["nearest"] == []
        assert answer["captions"][0][0]
    finally:
        assert server.end(signal.SIGINT) == 128 + signal.SIGINT
    assert not list(empty.iterdir())
    assert (
        "no corpus sentences are shown: clip_backbone=vit_l14 of these settings is not the CLIP of the checkpoint"
        in server.printed
    )
    assert "Traceback" not in server.printed


def test_what_is_not_available_is_not_made(home: Path, tmp_path: Path) -> None:
    cfg = Config(stage="serve", checkpoint=str(run_folder(home)), artifacts_dir=str(tmp_path / "artifacts"))
    demo = open_demo(Workspace(cfg))
    assert demo.no_corpus
    assert demo.examples == []
    assert list(tmp_path.iterdir()) == []


def test_a_decoding_that_a_person_types_is_used(home: Path) -> None:
    cfg = Config(stage="serve", checkpoint=str(run_folder(home)), artifacts_dir=str(home / "artifacts"))
    cfg.decode.temperature, cfg.typed_decode = 0.5, ["decode.temperature"]
    demo = open_demo(Workspace(cfg))
    stored = Captioner.load(run_folder(home)).decode
    assert stored.temperature == 1
    assert demo.captioner.decode == replace(stored, temperature=0.5)


def test_probabilities_of_a_backbone_trained_by_a_sigmoid(
    home: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DemoBackbone, "logit_bias", -2.0)
    cfg = Config(stage="serve", checkpoint=str(run_folder(home)), artifacts_dir=str(home / "artifacts"))
    answer = open_demo(Workspace(cfg)).answer(Image.open(pictures[0]))
    for _, cosine, probability in answer["captions"]:
        assert probability == pytest.approx(1 / (1 + math.exp(2.0 - 100.0 * cosine)), rel=1e-6)


def test_a_port_that_is_taken_is_said_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"serve\.port={port} cannot be listened on \(Address already in use"):
            listening(ServeConfig(port=port))


@pytest.mark.parametrize(
    ("serve", "sentence"),
    [
        (ServeConfig(port=70000), "serve.port=70000 is not accepted: it must be 0 (any free one) to 65535"),
        (ServeConfig(max_megabytes=0), "serve.max_megabytes=0 is not accepted: it must be a number above 0"),
        (ServeConfig(host=""), "serve.host= is not accepted: it must be an address or a name of this machine"),
        (ServeConfig(captions=0), "serve.captions=0 is not accepted: it must be 1 or more"),
        (ServeConfig(nearest=0), "serve.nearest=0 is not accepted: it must be 1 or more"),
    ],
)
def test_a_wrong_setting_is_said_in_a_sentence(serve: ServeConfig, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        validate(Config(serve=serve))


def test_without_the_extra_one_sentence_names_it(tmp_path: Path) -> None:
    for name in ("uvicorn", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    done = subprocess.run(
        command(tmp_path, "stage=serve", "experiment=demo_tiny"),
        cwd=tmp_path,
        timeout=60,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: stage=serve needs the extra `serve` (uvicorn is not installed): pip install 'cgtgan[serve]'\n"
    )


# ------------------------------------------------------------------------------------------------------------ a browser


@pytest.fixture
def view(browser: Any, server: Server) -> Iterator[Any]:
    """The page in a telephone's width. At the end: no error but statuses of refused uploads, no foreign request."""
    view = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    errors: list[str] = []
    asked: list[str] = []
    view.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(server.url)
    yield view
    narrow = view.evaluate("document.documentElement.scrollWidth")
    view.close()
    assert [
        e
        for e in errors
        if not re.match(r"Failed to load resource: the server responded with a status of 4(13|15|22)", e)
    ] == []
    assert [url for url in asked if not url.startswith((f"{server.url}/", "data:"))] == []
    assert narrow == 360


def test_a_picture_chosen_in_the_browser_gets_its_caption_and_sentences(
    view: Any, server: Server, pictures: list[Path]
) -> None:
    answer = httpx.post(f"{server.url}/caption", content=pictures[4].read_bytes()).json()
    view.set_input_files("#file", pictures[4])
    view.wait_for_selector("#answer:not([hidden])")
    caption, similarity = answer["captions"][0]
    assert view.inner_text("#caption") == caption
    assert view.get_attribute("#picture", "alt") == caption
    assert view.inner_text("#similarity") == f"CLIP similarity {similarity:.3f}"
    assert view.evaluate("document.getElementById('picture').naturalWidth") == 48
    rows = view.locator("#nearest li").all_inner_texts()
    assert [re.sub(r"\s+", " ", row) for row in rows] == [f"{s} {c:.3f}" for s, c in answer["nearest"]]
    assert view.locator("#others li").count() == len(answer["captions"]) - 1
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"


def test_an_example_is_reached_by_keyboard_and_answered(view: Any) -> None:
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.id") == "file"
    for _ in range(3):
        view.keyboard.press("Tab")
    caption = view.evaluate("document.activeElement.querySelector('img').alt")
    view.keyboard.press("Enter")
    view.wait_for_selector("#answer:not([hidden])")
    assert view.inner_text("#caption") == caption
    assert view.locator(".example[aria-pressed=true]").count() == 1
    assert view.get_attribute(".example >> nth=2", "aria-pressed") == "true"


def test_a_dropped_picture_is_taken(view: Any, pictures: list[Path]) -> None:
    raw = base64.b64encode(pictures[1].read_bytes()).decode()
    view.evaluate(
        """raw => {
            const bytes = Uint8Array.from(atob(raw), (c) => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "../../a.png"));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
        }""",
        raw,
    )
    view.wait_for_selector("#answer:not([hidden])")
    assert view.inner_text("#caption")


def test_a_bad_file_is_answered_on_the_page_and_a_good_one_after_it_too(
    view: Any, pictures: list[Path], tmp_path: Path
) -> None:
    for what in ("a text", "a bomb", "a thread that a resize makes a bomb", "too large a file"):
        content, _, sentence = REFUSED[what]
        (tmp_path / "file.png").write_bytes(content())
        view.set_input_files("#file", pictures[0])
        view.wait_for_selector("#answer:not([hidden]):not(.stale)")
        view.set_input_files("#file", tmp_path / "file.png")
        view.wait_for_selector("#status.wrong")
        assert sentence in view.inner_text("#status")
        assert not view.is_visible("#answer")
