"""Training state as safetensors, without pickle: modules, optimisers, every random generator, and where the work stands.

A checkpoint of a run is a folder `step_<n>` (the generator's own files beside `training.safetensors`); `last` and `best` are
links to such folders, swapped by a rename, so they always point to a whole one.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cgtgan.artifacts import atomic_path, sweep_leftovers
from cgtgan.config import OptimizerConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.method.reinforce import learning_rate_factor


class Optimizer:
    """AdamW with its learning-rate schedule and gradient clipping; weight decay on matrices only, never on biases and norms."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, total_steps: int):
        self.config, self.total_steps = config, total_steps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        matrices, vectors = [p for p in self.parameters if p.dim() >= 2], [p for p in self.parameters if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, eps=config.eps)

    def step(self, loss: Tensor, step: int) -> float:
        """One update at optimiser step `step`, counted from 1; returns the gradient norm before clipping.

        A loss or gradient that is not finite raises `InputError` before any weight is touched."""
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.config.grad_clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not np.isfinite(loss.item()):
            raise InputError(
                f"the loss at step {step} is {loss.item()} (learning rate {self.config.lr:g}): training diverged, lower the rate"
            )
        if not np.isfinite(norm):
            raise InputError(
                f"the gradient norm at step {step} is {norm} (learning rate {self.config.lr:g}): training diverged, lower the rate"
            )
        c = self.config
        factor = learning_rate_factor(step, warmup_steps=c.warmup_steps, total_steps=self.total_steps, final_ratio=c.final_lr_ratio)
        for group in self.adamw.param_groups:
            group["lr"] = c.lr * factor
        self.adamw.step()
        return norm


def save_state(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], meta: Mapping[str, Any]) -> None:
    """Write everything a step hangs on into one file (not atomic by itself: write into an `atomic_path`)."""
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
    copies = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    save_file(copies, path, {"meta": json.dumps(meta), "rng": json.dumps(rng)})


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
    """Make `folder/step_<n>` with `write(path)` and let `links` (last, best) point to it; what no link needs any more is removed."""
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
    for old in folder.glob("step_*"):
        if old.name not in needed:
            shutil.rmtree(old)
    return target
