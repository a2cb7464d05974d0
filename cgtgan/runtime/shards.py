"""One artifact made in pieces by any number of processes: each piece is a file, whole or absent, claimed by a lock.

A killed process leaves its finished pieces and no lock, so the same command, or another rank, makes what is missing.
Pieces are cut by rows and put together in order: the artifact's bytes do not depend on the number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from cgtgan.runtime.artifacts import atomic_path

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Rank:
    """This process's number in a job of `world`, from `torchrun` or `srun`; `local` of `neighbours` on this machine."""

    number: int = 0
    world: int = 1
    local: int = 0
    neighbours: int = 1

    @classmethod
    def here(cls) -> Rank:
        # SLURM's step variables only: a batch script outside `srun` is one process, whatever was allotted to it
        for number, world, local, neighbours in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
        ):
            values = [os.environ.get(name, "") for name in (number, world, local)]
            if all(value.isdigit() for value in values) and int(values[0]) < int(values[1]):
                here = os.environ.get(neighbours, "")
                values.append(here if here.isdigit() else values[1])
                return cls(*(int(value) for value in values))
        return cls()


@dataclass
class Shards:
    """The pieces 0 .. count-1 of the artifact `path`, in a folder beside it; `cut`: rows per piece.

    made: whether the artifact is there, so that no piece is needed.
    """

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
        return self.folder / _name(index)

    def missing(self) -> list[int]:
        """Pieces that are not there: first every `world`th, which are this rank's, then the others'."""
        try:
            there = {entry.name for entry in os.scandir(self.folder)}
        except FileNotFoundError:  # nothing is made yet, or all is and the folder gone
            there = set()
        missing = [i for i in range(self.count) if _name(i) not in there]
        return sorted(missing, key=lambda i: not self._is_own(i))

    def _is_own(self, index: int) -> bool:
        return index % self.rank.world == self.rank.number

    def claimed(self, missing: Sequence[int] | None = None) -> Iterator[int]:
        """Missing pieces that nobody else works on; each belongs to this process until `keep` or the end of `fill`.

        missing: what `missing()` said just now; None: it is asked.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in self._candidates(self.missing() if missing is None else missing):
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

    def _candidates(self, missing: Sequence[int]) -> Iterator[int]:
        """This rank's pieces, then the others' that are still missing by then: most are made meanwhile."""
        own = [i for i in missing if self._is_own(i)]
        yield from own
        yield from (i for i in (self.missing() if own else missing) if not self._is_own(i))

    def keep(self, index: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Write a claimed piece and give up its lock."""
        from safetensors.torch import save_file

        with atomic_path(self.file(index)) as beside:
            save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"meta": json.dumps(meta)})
        self._claims.pop(index).release()

    def fill(
        self, make: Callable[[Iterator[int]], None], finished: Callable[[int], object], say: Callable[[str], object]
    ) -> None:
        """Until every piece is there, `make` what can be claimed (it calls `keep` for each) and wait for the others'.

        finished: called with the number of pieces that are there. say: told, where others work on all that is missing,
        that this process waits, and at the end how long it did.
        """
        waited, missing = 0.0, self.missing()
        while missing and not self.made():
            finished(self.count - len(missing))
            claims = self.claimed(missing)
            first = next(claims, None)
            if first is not None:
                try:
                    make(chain([first], claims))
                finally:
                    for lock in self._claims.values():
                        lock.release()
                    self._claims.clear()
                missing = self.missing()
            else:
                if not waited:
                    say(f"waiting for other processes that work on {len(missing)} pieces")
                started = time.monotonic()
                time.sleep(POLL_SECONDS)
                waited += time.monotonic() - started
                # a hundred processes that list a hundred thousand pieces twice a second would keep a server busy
                missing = [i for i in missing if not self.file(i).exists()]
        finished(self.count)
        if waited:
            say(f"waited {waited:.1f} s for other processes")

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


def _name(index: int) -> str:
    return f"{index:06d}.safetensors"


def read_meta(file: Path) -> dict[str, Any] | None:
    """The `meta` of a piece; None if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            return json.loads(f.metadata()["meta"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
        return None
