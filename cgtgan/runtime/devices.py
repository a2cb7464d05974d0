"""The processes of one job: accelerate's process group, autocast, and the sums that data parallelism needs.

One process loads nothing of accelerate.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cgtgan.errors import OtherProcessLost
from cgtgan.runtime.shards import Rank

T = TypeVar("T")
_BUCKET = 25_000_000  # numbers of a gradient that travel at once: 100 MB of float32
_TIMEOUT = datetime.timedelta(minutes=30)  # a process that is silent for so long counts as dead
# Kept for the backward pass of one token in one layer of width 1, float32: states, projections, MLP, attention, norms.
_BYTES_PER_UNIT = 34 * 4
_FEW_ROWS = 256  # they are done before a worker process has started


class Devices:
    """This process's device, its number in the job, and what the processes exchange. `precision`: float32 or bf16."""

    def __init__(self, device: torch.device | None = None, precision: str = "float32", rank: Rank | None = None):
        self.device = device or torch.device("cpu")
        self.precision = precision
        self.rank = rank or Rank()
        self._accelerator: Any = None
        if self.rank.world > 1:
            from accelerate import Accelerator, InitProcessGroupKwargs

            _announce(self.rank)
            kinds = {"cpu": self.device.type == "cpu", "kwargs_handlers": [InitProcessGroupKwargs(timeout=_TIMEOUT)]}
            self._accelerator = self._guarded(lambda: Accelerator(**kinds))
            use_device(self.device)  # accelerate has chosen by the process's number

    @property
    def number(self) -> int:
        return self.rank.number

    @property
    def world(self) -> int:
        return self.rank.world

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and scores."""
        return self.rank.number == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in bf16 where that is the precision; weights, log-probs, rewards and losses stay float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's part of `rows`: consecutive ones, parts of equal size but for one row."""
        start, end = (len(rows) * (self.number + i) // self.world for i in (0, 1))
        return rows[start:end]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """The gradient of every parameter becomes its sum over the processes, in buckets."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for p in parameters:
            if p.grad is None:  # the others may have one
                p.grad = torch.zeros_like(p)
            bucket.append(p.grad)
            if sum(g.numel() for g in bucket) >= _BUCKET:
                self._sum_bucket(bucket)
                bucket = []
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: list[Tensor]) -> None:
        flat = self.sum(torch.cat([g.flatten() for g in gradients]))
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.world > 1:
            self._guarded(lambda: dist.all_reduce(values))
        return values

    def gather(self, rows: Sequence[T]) -> list[T]:
        """Every process's rows, in the order of the processes: what `share` took apart, put together again."""
        if self.world == 1:
            return list(rows)
        parts: list[Any] = [None] * self.world
        self._guarded(lambda: dist.all_gather_object(parts, list(rows)))
        return [row for part in parts for row in part]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes; the others wait for it."""
        if self.world == 1:
            return make()
        made: list[Any] = [make() if self.first else None]
        self._guarded(lambda: dist.broadcast_object_list(made))
        return made[0]

    def close(self) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()
            if dist.is_initialized():
                dist.destroy_process_group()
            self._accelerator = None

    def _guarded(self, call: Callable[[], T]) -> T:
        """A process that died shows as a broken connection: its reason is in the job's output."""
        try:
            return call()
        except (RuntimeError, ValueError) as error:  # gloo, NCCL and the rendezvous raise these
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OtherProcessLost(
                f"process {self.number} of {self.world} lost another one of this job ({first}); the reason is in the "
                "last lines of that one. The same command goes on from the last checkpoint"
            ) from None


def _announce(rank: Rank) -> None:
    """Set torch's variables from `srun`'s; `torchrun` has set them already."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        command = ["scontrol", "show", "hostnames", nodes]
        try:
            hosts = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
        except (OSError, subprocess.TimeoutExpired):
            hosts = []
        os.environ["MASTER_ADDR"] = hosts[0] if hosts else "127.0.0.1"
    port = 20_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20_000
    values = (rank.number, rank.world, rank.local, rank.neighbours, port)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    for name, value in zip(names, values, strict=True):
        os.environ.setdefault(name, str(value))


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From the host to a GPU through pinned memory: the copy queues up, and nobody waits for it."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


def use_device(device: torch.device) -> None:
    """Make `device` torch's current one, if it is a GPU: streams, events and what names no device belong to that."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: by default every large tensor is a new mapping, whose first touch is a tenth of a
    step on a CPU (docs/negative_results.md, 15). Does nothing where there is no glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back before the end
    except (OSError, AttributeError):
        pass


def best_precision(wanted: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, `native` on a CPU too; float32 elsewhere."""
    if wanted not in ("auto", "native"):
        return wanted
    return "bf16" if has_bf16(device) and (device.type == "cuda" or wanted == "native") else "float32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 itself: elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def tokens_that_fit(layers: int, width: int, vocab: int, memory_gb: float | None, device: torch.device) -> int:
    """Positions of a language model whose states fit into `memory_gb`; None: 1 GB, or a third of a GPU's memory.

    Only from sizes that are the same at every start of a run, so that a resumed run cuts the same chunks.
    """
    if memory_gb is None:
        memory_gb = torch.cuda.get_device_properties(device).total_memory / 3e9 if device.type == "cuda" else 1.0
    return max(1, int(memory_gb * 1e9 / (layers * width * _BYTES_PER_UNIT + 3 * 4 * vocab)))


def auto_workers(device: torch.device, rows: int, ranks_here: int = 1) -> int:
    """How many worker processes are useful: none for few rows; with a GPU one per core.

    Where the CPU encodes, a worker takes time from the encoder's threads. On 2 cores with ViT-B/32: decoding between
    the batches 61 ms per image, one worker 67 ms, two 74 ms (benchmarks/preprocess.py).
    """
    if rows < _FEW_ROWS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= max(1, ranks_here)
    return min(16, max(1, cores)) if device.type == "cuda" else cores // 4
