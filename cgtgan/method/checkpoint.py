"""Training state as safetensors, without pickle: modules, optimisers, every random generator, and where the work stands.

A checkpoint of a run is a folder `step_<n>` (the generator's own files beside `training.safetensors`); `last` and `best` are
links to such folders, swapped by a rename, so they always point to a whole one.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cgtgan.artifacts import atomic_path, sweep_leftovers
from cgtgan.errors import InputError, MissingFileError
from cgtgan.method.optimizer import Optimizer


@dataclass(frozen=True)
class State:
    """A copy of everything a step hangs on, in the memory of the host."""

    tensors: dict[str, Tensor]
    rng: str


def state_tensors(modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> State:
    """Copy modules, optimisers and random generators as they are now."""
    tensors: dict[str, Tensor] = {"rng/torch": torch.get_rng_state()}
    for i, state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        tensors[f"rng/cuda/{i}"] = state
    for name, module in modules.items():
        tensors |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.adamw.state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
    kind, keys, *rest = np.random.get_state()
    rng = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    # tied weights share memory, which safetensors refuses: each gets its own copy
    copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    return State(copies, json.dumps(rng))


def save_state(path: Path, state: State, meta: Mapping[str, Any]) -> None:
    """Write a state into one file (not atomic by itself: write into an `atomic_path`)."""
    save_file(state.tensors, path, {"meta": json.dumps(meta), "rng": state.rng})


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


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of `save_state`. Raises `MissingFileError` or `InputError` naming the file."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing: there is no training state to continue from")
    try:
        with safe_open(path, framework="pt") as f:
            return json.loads(f.metadata()["meta"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path} is not a whole training state ({e}): remove this file, and its training starts again") from None


def load_state(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """Put everything back as `save_state` found it, the random generators too; returns `meta`."""
    meta = read_meta(path)
    with safe_open(path, framework="pt") as f:
        rng = json.loads(f.metadata()["rng"])
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no mapping)

    def below(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    for name, module in modules.items():
        module.load_state_dict(below(f"module/{name}/"))
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in below(f"optimizer/{name}/").items():
            index, field = key.split("/")
            state.setdefault(int(index), {})[field] = value
        optimizer.adamw.load_state_dict({"state": state, "param_groups": optimizer.adamw.state_dict()["param_groups"]})
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = rng["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["rng/torch"])
    if torch.cuda.is_available() and (cuda := below("rng/cuda/")):
        torch.cuda.set_rng_state_all([cuda[key] for key in sorted(cuda, key=int)][: torch.cuda.device_count()])
    return meta


# -------------------------------------------------------------------------------------------------- folders of a run


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None], links: Iterable[str]) -> Path:
    """Make `folder/step_<n>` with `write(path)` and let `links` (last, best) point to it; the two newest and what a link needs are kept."""
    target = folder / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(folder)
    if not target.exists():
        with atomic_path(target) as beside:
            beside.mkdir()
            write(beside)
    for link in links:
        beside = folder / f".{link}.tmp"
        beside.unlink(missing_ok=True)
        beside.symlink_to(target.name)
        beside.replace(folder / link)
    needed = {p.readlink().name for p in folder.iterdir() if p.is_symlink()}
    needed |= {p.name for p in sorted(folder.glob("step_*"))[-2:]}  # should the newest be damaged, the one before it is used
    for old in folder.glob("step_*"):
        if old.name not in needed:
            shutil.rmtree(old)
    return target
