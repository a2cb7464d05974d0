"""Fixtures of every test: where the shared real data lies, and a browser."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import program
from tests.small_meteor import make_small_meteor

# what a shell starts in the background ignores SIGINT, and so would all that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# before torch: under load, threads that spin while they wait take several times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_sessionfinish() -> None:
    program.end_server()


@pytest.fixture(scope="session")
def folder_of_small_meteor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meteor")
    make_small_meteor(folder)
    return folder


@pytest.fixture
def small_meteor(folder_of_small_meteor: Path) -> Iterator[None]:
    """In this process METEOR starts quickly, with few paraphrases; the programs that tests start have it always."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder_of_small_meteor)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data: folder $CGTGAN_SHARED, else `shared` in the repository. Missing: skip, or fail if CI=true."""
    folder = Path(os.environ.get("CGTGAN_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not (folder / "data").is_dir():
        reason = "left out: no shared data (set CGTGAN_SHARED to its folder)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models on one thread: on a busy machine OpenMP's threads wait for each other longer than they work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium through playwright. Absent: skip, or fail where CI=true."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if chromium is None or sync_playwright is None:
        reason = (
            f"left out: {'no Chromium on the PATH' if chromium is None else 'no playwright (pip install -e .[dev])'}"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
