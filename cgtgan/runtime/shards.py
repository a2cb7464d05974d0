"""One artifact made in pieces by any number of processes that never talk: each piece is a file, whole or absent, claimed by a lock.

A killed process leaves its finished pieces and no lock, so the same command, or another rank, goes on with what is missing. Pieces are
cut by the artifact's rows alone, and put together in order: the result is the same, byte for byte, however many processes made it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from cgtgan.runtime.artifacts import atomic_path

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this one is, as `torchrun` or `srun` tell it; `local` of `neighbours` on this machine."""

    number: int = 0
    world: int = 1
    local: int = 0
    neighbours: int = 1

    @classmethod
    def here(cls) -> Rank:
        # of SLURM only what a step says: a batch script outside `srun` is one process, whatever was allotted to it
        for number, world, local, neighbours in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
        ):
            found = [os.environ.get(name, "") for name in (number, world, local)]
            if all(value.isdigit() for value in found) and int(found[0]) < int(found[1]):
                beside = os.environ.get(neighbours, "")
                return cls(
                    int(found[0]), int(found[1]), int(found[2]), int(beside) if beside.isdigit() else int(found[1])
                )
        return cls()


@dataclass
class Shards:
    """The pieces 0 .. count-1 of what is made at `path`, in a folder beside it named after the cut; `made`: no piece is needed any more."""

    path: Path
    count: int
    cut: int
    made: Callable[[], bool]
    rank: Rank = field(default_factory=Rank.here)
    _claims: dict[int, FileLock] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.shards-{self.cut}")

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    def missing(self) -> list[int]:
        """Pieces that are not there, this rank's own first: every `world`th, then the others'."""
        try:
            there = {entry.name for entry in os.scandir(self.folder)}
        except FileNotFoundError:  # nothing is made yet, or all is and the folder gone
            there = set()
        own = range(self.rank.number, self.count, self.rank.world)
        others = (i for i in range(self.count) if i % self.rank.world != self.rank.number)
        return [i for i in (*own, *others) if self.file(i).name not in there]

    def claimed(self) -> Iterator[int]:
        """Missing pieces that nobody else works on, one after the other; each is this process's until `keep` or its end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in self.missing():
            lock = FileLock(self.folder / f".{index:06d}.lock")
            try:
                lock.acquire(timeout=0)
            except (TimeoutError, FileNotFoundError):  # somebody's, or all is made and the folder gone
                continue
            if self.file(index).exists() or self.made():  # since we looked
                lock.release()
                continue
            self._claims[index] = lock
            yield index

    def keep(self, index: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Write a claimed piece and give up its lock."""
        from safetensors.torch import save_file

        with atomic_path(self.file(index)) as beside:
            save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"meta": json.dumps(meta)})
        self._claims.pop(index).release()

    def fill(
        self, make: Callable[[Iterator[int]], None], finished: Callable[[int], object], waiting: Callable[[int], object]
    ) -> None:
        """Until every piece is there: `make` what can be claimed (it calls `keep` for each), wait for what others work on.

        finished: told the number of pieces found, whoever made them; waiting: told once how many pieces others are still busy with.
        """
        said = False
        while not self.made() and (missing := self.missing()):
            finished(self.count - len(missing))
            claims = self.claimed()
            first = next(claims, None)
            if first is not None:
                try:
                    make(_with_first(first, claims))
                finally:
                    for lock in self._claims.values():
                        lock.release()
                    self._claims.clear()
            else:
                if not said:
                    waiting(len(missing))
                said = True
                time.sleep(POLL_SECONDS)
        finished(self.count)

    def remove(self) -> None:
        """Once the artifact is there its pieces are not needed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self, stale: Callable[[Path], bool]) -> None:
        """Remove pieces that must be made again, unless another process is at them; before `fill`."""
        for index in set(range(self.count)).difference(self.missing()):
            if stale(self.file(index)):
                lock = FileLock(self.folder / f".{index:06d}.lock")
                try:
                    with lock.acquire(timeout=0):
                        self.file(index).unlink(missing_ok=True)
                except (TimeoutError, FileNotFoundError):
                    continue


def _with_first(first: int, rest: Iterator[int]) -> Iterator[int]:
    yield first
    yield from rest


def read_meta(file: Path) -> dict[str, Any] | None:
    """The `meta` of a piece; None if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            return json.loads(f.metadata()["meta"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
