"""The folder of artifacts: one process makes each, once, while the others wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock

from cgtgan.errors import MissingFileError
from cgtgan.runtime.artifacts import fingerprint, remove_path, sweep_leftovers


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(
    path: Path, when_waiting: Callable[[], object], when_free: Callable[[float], object] = lambda _seconds: None
) -> Iterator[None]:
    """Hold the lock of `path`, a file `.<name>.lock` beside it.

    If another process holds it, `when_waiting` is called, and then `when_free` with the seconds waited.

    The system drops the lock (`flock`) of a process that dies, so nobody waits for a dead job.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_file(path))
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        when_waiting()
        started = time.monotonic()
        lock.acquire()
        when_free(time.monotonic() - started)
    try:
        yield
    finally:
        lock.release()


class ArtifactStore:
    """A folder of artifacts; the name of each carries the fingerprint of the settings and inputs it was made from."""

    def __init__(self, root: Path, say: Callable[[str], None] = lambda _: None):
        self.root = root
        self.say = say

    def will_make(self, path: Path) -> None:
        """Called before the first work on an artifact that is not there."""

    def path(self, kind: str, producer: Mapping[str, Any], suffix: str) -> Path:
        return self.root / kind / f"{kind}-{fingerprint(producer)}{suffix}"

    def lock(self, path: Path) -> AbstractContextManager[None]:
        self.will_make(path)
        return locked(
            path,
            lambda: self.say(f"waiting for another job that makes {path}"),
            lambda seconds: self.say(f"waited {seconds:.1f} s for another job that made {path}"),
        )

    def make(self, path: Path, write: Callable[[Path], object]) -> bool:
        """Make `path` with `write(path)` unless it is there; False if it was. `write` must write atomically."""
        if path.exists():
            self.tidy(path)
            return False
        with self.lock(path):
            if path.exists():  # another job made it while we waited
                return False
            sweep_leftovers(path.parent, f"{path.name}.")
            write(path)
        return True

    def claim(self, path: Path, held: ExitStack) -> str:
        """`made` if `path` is there, `busy` while another job makes it, else `free`: the lock is in `held` now."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not path.exists():
                held.enter_context(FileLock(_lock_file(path)).acquire(timeout=0))
        except TimeoutError:
            return "busy"
        return "made" if path.exists() else "free"

    def tidy(self, path: Path) -> None:
        """Remove what a job left that was killed just after it had made `path`: states, pieces, half-written files."""
        if path.exists() and _leftovers(path):
            try:
                with FileLock(_lock_file(path)).acquire(timeout=0):
                    for stale in _leftovers(path):
                        remove_path(stale)
            except (TimeoutError, OSError):  # a job is still at it, or nothing can be removed here
                pass


class ReadOnlyStore(ArtifactStore):
    """A store that makes nothing: `MissingFileError` is raised in its place."""

    def will_make(self, path: Path) -> None:
        raise MissingFileError(f"{path} is missing: stage=preprocess makes it")


def _leftovers(path: Path) -> list[Path]:
    name, stem = escape(path.name), escape(path.stem)
    patterns = (f".{name}.*.tmp", f"{name}.training", f"{stem}.shards-*")
    return [leftover for pattern in patterns for leftover in path.parent.glob(pattern)]
