"""What every stage works with: the device, the artifact store, the run folder, and the parts that several stages make on demand."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cgtgan.artifacts import ArtifactStore, fingerprint, locked, read_json, write_json
from cgtgan.config import Config, as_dict, run_folder
from cgtgan.data.datasets import Split, load_split
from cgtgan.data.demo_world import write_demo_world
from cgtgan.data.loading import auto_workers
from cgtgan.errors import InputError
from cgtgan.models.clip_backbone import ClipBackbone
from cgtgan.shards import Rank
from cgtgan.stages.released import Imported, released_split
from cgtgan.tracking import Tracker


@dataclass
class Workspace:
    """Opened once a stage (or once for the whole pipeline); costs nothing until a part is asked for."""

    cfg: Config
    tracker: Tracker = field(default_factory=Tracker)
    said: set[object] = field(default_factory=set)  # what is said once
    backbone: ClipBackbone | None = None  # once it is loaded (stages/backbone.py)
    imported: list[Imported] | None = None  # the authors' files, once they are read
    _splits: dict[str, Split] = field(default_factory=dict)

    @cached_property
    def store(self) -> ArtifactStore:
        return ArtifactStore(Path(self.cfg.artifacts_dir), self.tracker.say)

    @cached_property
    def run(self) -> Path:
        return run_folder(self.cfg)

    def hold_run(self) -> AbstractContextManager[None]:
        """One job at a time in a run folder: the child of a killed `make` may still be at work there. A job's first process holds it."""
        if self.rank.number:
            return nullcontext()
        return locked(self.run, lambda: self.tracker.say(f"waiting for another process that works in {self.run}"))

    @cached_property
    def rank(self) -> Rank:
        return Rank.here()

    @cached_property
    def device(self) -> torch.device:
        if self.cfg.threads is not None:
            torch.set_num_threads(self.cfg.threads)
        name = self.cfg.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":  # a card for each process of this machine, where a scheduler gives them all to see
            name = f"cuda:{self.rank.local % max(1, torch.cuda.device_count())}"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"device={self.cfg.device}: torch sees no CUDA device here; set device=cpu or device=auto")
        return torch.device(name)

    def workers(self, rows: int) -> int:
        """How many processes prepare `rows` images or texts ahead of the encoder."""
        return auto_workers(self.device, rows, self.rank.neighbours) if self.cfg.workers is None else self.cfg.workers

    @cached_property
    def data_root(self) -> Path:
        """Where the dataset lies; the demo world is drawn there when first needed."""
        if self.cfg.dataset.kind != "demo":
            return Path(self.cfg.dataset.root).expanduser()
        world = self.cfg.dataset.world
        root = self.store.root / "demo_world" / f"world-{fingerprint(as_dict(world))}"
        if not (root / "world.json").is_file():
            images = world.train_images + world.val_images + world.test_images
            with self.store.lock(root), self.tracker.progress("drawing the demo world", images) as bar:
                write_demo_world(world, root, lambda _done: bar.advance())
        return root

    def split(self, name: str) -> Split:
        if name not in self._splits:
            self._splits[name] = released_split(self, name) or load_split(self.cfg.dataset, name, self.data_root)
        return self._splits[name]

    def identity(self) -> dict[str, Any]:
        """What makes the images of a dataset what they are, beside their list."""
        d = self.cfg.dataset
        return {"kind": d.kind} | ({"world": as_dict(d.world)} if d.kind == "demo" else {})

    def check_same_run(self, name: str, wanted: Mapping[str, Any]) -> None:
        """A run folder belongs to one set of scientific settings and inputs; others are refused, and what differs is named."""
        path = self.run / f"{name}.json"
        if not path.is_file():
            write_json(path, wanted)
            return
        found: Mapping[str, Any] = read_json(path)
        changed = [f"{k} was {found.get(k)}, is {wanted.get(k)}" for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
        if changed:
            raise InputError(
                f"{self.run} holds a run with other {name} ({'; '.join(changed)}): give this one a folder of its own with variant=NAME, "
                "or remove that folder"
            )
