"""What every stage works with: run folder, device, the process's rank, artifact store, tracker."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cgtgan.config import Config
from cgtgan.errors import InputError
from cgtgan.run_identity import run_folder, scientific_settings
from cgtgan.runtime.artifacts import read_json, write_json
from cgtgan.runtime.shards import Rank
from cgtgan.runtime.store import ArtifactStore, locked
from cgtgan.runtime.tracking import Tracker

if TYPE_CHECKING:  # scoring a file of captions needs no device: it starts without torch
    import torch

    from cgtgan.runtime.devices import Devices

T = TypeVar("T")


@dataclass
class Workspace:
    """Opened once per stage, or once for the whole pipeline.

    Costs nothing until a part is used, and reads no data itself.
    """

    cfg: Config
    tracker: Tracker = field(default_factory=Tracker)
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, called the first time that `key` is asked for and kept from then on."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def store(self) -> ArtifactStore:
        return ArtifactStore(Path(self.cfg.artifacts_dir), self.tracker.say)

    @cached_property
    def run(self) -> Path:
        return run_folder(self.cfg)

    def hold_run(self) -> AbstractContextManager[None]:
        """Lock the run folder, so that one job works there: a child of a killed `make` may still run.

        The first process locks.
        """
        if self.rank.number:
            return nullcontext()
        return locked(self.run, lambda: self.tracker.say(f"waiting for another process that works in {self.run}"))

    @cached_property
    def rank(self) -> Rank:
        return Rank.here()

    @cached_property
    def device(self) -> torch.device:
        import torch

        from cgtgan.runtime.devices import use_device

        if self.cfg.threads is not None:
            torch.set_num_threads(self.cfg.threads)
        name = self.cfg.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":  # one card per process of this machine, where a scheduler shows all of them
            name = f"cuda:{self.rank.local % max(1, torch.cuda.device_count())}"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"device={self.cfg.device}: torch sees no CUDA device here; set device=cpu or device=auto")
        device = torch.device(name)
        if device.type == "cuda" and not (device.index or 0) < (count := torch.cuda.device_count()):
            raise InputError(
                f"device={self.cfg.device}: torch sees {count} CUDA device{'s' * (count > 1)} here, cuda:0"
                f"{f' to cuda:{count - 1}' * (count > 1)}"
            )
        if self.cfg.device.startswith("cuda:") and self.rank.neighbours > 1:
            raise InputError(
                f"device={self.cfg.device} is one device for {self.rank.neighbours} processes of this machine: set "
                "device=cuda, which gives each process its own"
            )
        use_device(device)
        return device

    @cached_property
    def devices(self) -> Devices:
        """The processes of the job, in one group: every one of them must come here. `close` ends it."""
        from cgtgan.runtime.devices import Devices

        return Devices(self.device, rank=self.rank)

    def close(self) -> None:
        if "devices" in vars(self):
            self.devices.close()
            del self.devices

    def workers(self, rows: int) -> int:
        """How many processes prepare `rows` images or texts ahead of the encoder."""
        from cgtgan.runtime.devices import auto_workers

        return auto_workers(self.device, rows, self.rank.neighbours) if self.cfg.workers is None else self.cfg.workers

    def check_same_settings(self) -> None:
        """As `check_same_run`, for the scientific settings; one that the file does not have counts as its default."""
        self.check_same_run("settings", scientific_settings(self.cfg), scientific_settings(Config()))

    def check_same_run(self, name: str, expected: Mapping[str, Any], missing: Mapping[str, Any] | None = None) -> None:
        """Record `expected` in `<name>.json` of the run folder, or compare with what is there.

        A run folder belongs to one set of scientific settings and inputs. `missing`: what a key stands for that the
        file does not have. Raises `InputError` naming what differs.
        """
        path = self.run / f"{name}.json"
        if not path.is_file():
            write_json(path, expected)
            return
        stored: Mapping[str, Any] = {**(missing or {}), **read_json(path)}
        keys = sorted({*stored, *expected})
        changed = [f"{k} was {stored.get(k)}, is {expected.get(k)}" for k in keys if stored.get(k) != expected.get(k)]
        if changed:
            raise InputError(
                f"{self.run} holds a run with other {name} ({'; '.join(changed)}): give this one a folder of its own "
                "with variant=NAME, or remove that folder"
            )
