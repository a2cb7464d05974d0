"""`checkpoints/` of a run: whole folders `step_<n>`, and the links `last` and `best` to two of them."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from torch import nn

from cgtgan.assets.backbone import backbone_description, backbone_producer, save_demo_clip
from cgtgan.assets.checkpoints import LINKS, STATE, link_targets, settle_links, step_folders
from cgtgan.assets.gap import save_gap
from cgtgan.assets.prompts import save_prompts
from cgtgan.assets.training_state import load_state, read_meta, save_state, state_tensors
from cgtgan.assets.workspace import Workspace
from cgtgan.config import as_dict
from cgtgan.errors import InputError, UserError
from cgtgan.models.clip_backbone import ClipBackbone, DemoBackbone
from cgtgan.runtime.artifacts import atomic_path, read_json, sweep_leftovers, write_json
from cgtgan.runtime.fingerprints import kept_fingerprint
from cgtgan.training.parts import TrainingParts


class Background:
    """One piece of work at a time on a thread of its own; what it raises comes with the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], object]) -> None:
        self.wait()

        def run() -> None:
            try:
                work()
            except Exception as error:  # raised where it is waited for
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


def write_checkpoint(checkpoints: Path, step: int, write: Callable[[Path], None]) -> None:
    """Make `checkpoints/step_<n>` with `write(path)`, unless it is there, and settle the links."""
    target = checkpoints / f"step_{step:06d}"
    if not target.exists():
        with atomic_path(target) as beside:
            beside.mkdir()
            write(beside)
    settle(checkpoints)


def settle(checkpoints: Path) -> None:
    """Bring the folder into order, whenever the last job was killed: links, and no folder that nothing needs.

    The two newest folders and those with a link are kept: should the newest be damaged, the one before it is used.
    """
    sweep_leftovers(checkpoints)
    for link, target in link_targets(checkpoints).items():
        place = checkpoints / link
        if place.is_dir() and not place.is_symlink() and target.is_dir():  # a copy that followed the links
            shutil.rmtree(place)
    settle_links(checkpoints)
    for link in (checkpoints / name for name in LINKS):
        if link.is_symlink() and not link.exists():  # to a folder that was damaged
            link.unlink()
    needed = {p.readlink().name for p in checkpoints.iterdir() if p.is_symlink()}
    folders = step_folders(checkpoints)
    needed |= {p.name for p in folders[:2]}
    for old in folders:
        if old.name not in needed:
            shutil.rmtree(old)


class Checkpoints:
    """`checkpoints/` of a run: whole folders `step_<n>`, written while training goes on."""

    def __init__(self, ws: Workspace):
        self.ws, self.folder = ws, ws.run / "checkpoints"
        self.writer = Background()
        self.written = time.monotonic()
        self.newest = self._newest()
        if self.newest is not None and ws.rank.number == 0:
            settle(self.folder)

    def _newest(self) -> Path | None:
        """The newest whole folder; damaged ones are named, and set aside."""
        damaged = None
        for folder in step_folders(self.folder):
            try:
                for name, wanted in read_json(folder / "checkpoint.json").get("files", {}).items():
                    if kept_fingerprint(folder / name) != wanted:
                        raise InputError(f"{folder / name} is not as it was written")
                read_meta(folder / STATE)
            except (UserError, OSError) as error:
                damaged = folder
                if self.ws.rank.number == 0 and folder.exists():
                    aside = folder.with_name(f"damaged_{folder.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
                    self.ws.tracker.say(f"damaged checkpoint, set aside as damaged_{folder.name}: {error}")
                continue
            return folder
        if damaged is not None:
            raise InputError(
                f"{self.folder} has no whole checkpoint any more: remove it, and training starts again from its "
                "first step"
            )
        return None

    def steps_done(self) -> int:
        return 0 if self.newest is None else int(self.newest.name.removeprefix("step_"))

    def meta(self) -> dict[str, Any]:
        """What the newest checkpoint says of the run."""
        return read_meta((self.newest or self.folder / "last") / STATE)

    def resume(self, parts: TrainingParts) -> dict[str, Any]:
        """Put everything back as the newest checkpoint has it; returns what it says of the run."""
        newest = parts.devices.from_first(lambda: self.newest)
        fresh = {"step": 0, "best": -1.0, "best_step": 0, "wandb_id": None, "collapses": {}, "seconds": None}
        if newest is None:
            return fresh | {"seconds": 0.0}
        load_model(parts.averaged.model, str(newest / "generator.safetensors"))
        modules = _beside_the_weights(parts)
        return fresh | load_state(newest / STATE, modules, parts.optimizers)

    def due(self, step: int) -> bool:
        t = self.ws.cfg.train
        late = t.checkpoint_minutes is not None and time.monotonic() - self.written > 60 * t.checkpoint_minutes
        return step % t.checkpoint_every == 0 or late

    def write(self, parts: TrainingParts, meta: Mapping[str, Any]) -> None:
        """Copy the state now, write it while the next steps go on."""
        self.written = time.monotonic()
        if not parts.devices.first:
            return
        self.writer.wait()  # one at a time: a second copy of the state is enough
        bundle, meta, gap, prompts = parts.averaged.copy(), dict(meta), parts.gap, parts.prompts
        tensors = state_tensors(_beside_the_weights(parts), parts.optimizers)

        def write(path: Path) -> None:
            bundle.save(path)
            save_gap(path, gap)
            save_prompts(path, prompts)
            save_state(path / STATE, tensors, meta)
            describe_checkpoint(self.ws, path, parts.backbone, meta["step"])

        self.writer.start(lambda: write_checkpoint(self.folder, meta["step"], write))

    def finish(self) -> None:
        """Wait until everything is on disk; raises what went wrong there."""
        self.writer.wait()

    def close(self) -> None:
        self.writer.join()


def _beside_the_weights(parts: TrainingParts) -> dict[str, nn.Module]:
    """What the training state holds: the discriminator; with a moving average, also the weights that are trained."""
    return {name: m for name, m in parts.modules.items() if name != "generator" or parts.average is not None}


def best_validation(ws: Workspace) -> float | None:
    """The run's best validation CIDEr, a fraction; None without validation, and in every process but the first."""
    if ws.rank.number:
        return None
    best = read_meta(ws.run / "checkpoints" / "last" / STATE)["best"]
    return None if best < 0 else float(best)


def describe_checkpoint(ws: Workspace, path: Path, backbone: ClipBackbone, step: int) -> None:
    """What `caption` needs: the backbone (the demo's comes along), the decoding, the files' fingerprints."""
    if isinstance(backbone, DemoBackbone):
        save_demo_clip(path / "clip", backbone.model)
    files = {str(file.relative_to(path)): kept_fingerprint(file) for file in sorted(path.rglob("*")) if file.is_file()}
    description = {
        "step": step,
        "clip_backbone": backbone_description(ws.cfg.clip_backbone),
        "clip_made_from": backbone_producer(ws),
        "decode": as_dict(ws.cfg.decode),
        "files": files,
    }
    write_json(path / "checkpoint.json", description)
