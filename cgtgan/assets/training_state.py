"""Training state as safetensors, without pickle: modules, optimisers, every random generator, and the step."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cgtgan.assets.optimizer import Optimizer
from cgtgan.errors import InputError, MissingFileError


@dataclass(frozen=True)
class State:
    """A copy of everything a step depends on, in host memory."""

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


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of `save_state`. Raises `MissingFileError` or `InputError` naming the file."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing: there is no training state to continue from")
    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads(f.metadata()["meta"])
        if not isinstance(meta, dict):
            raise TypeError("its description is no JSON object")
        return meta
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise InputError(
            f"{path} is not a whole training state ({e}): remove this file, and its training starts again"
        ) from None


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
