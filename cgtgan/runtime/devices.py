"""The processes of one job and how they compute: a process group and autocast from accelerate, and the few sums that data parallelism
needs. Alone, on a CPU, in float32, nothing of it is loaded."""

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
_PATIENCE = datetime.timedelta(minutes=30)  # a process that says nothing for so long is taken for dead
# Bytes kept for the backward pass of one token in one layer of width 1, in float32: states, projections, MLP, attention, norms.
_BYTES_A_UNIT = 34 * 4
FEW = 256  # rows that are done before a worker process has started


class Devices:
    """This process's device, its number among the job's, and what the processes tell each other. `precision`: float32 or bf16."""

    def __init__(self, device: torch.device | None = None, precision: str = "float32", rank: Rank | None = None):
        self.device = device or torch.device("cpu")
        self.precision = precision
        self.rank = rank or Rank()
        self._accelerator: Any = None
        if self.rank.world > 1:
            from accelerate import Accelerator, InitProcessGroupKwargs

            _announce(self.rank)
            kinds = {"cpu": self.device.type == "cpu", "kwargs_handlers": [InitProcessGroupKwargs(timeout=_PATIENCE)]}
            self._accelerator = self._guarded(lambda: Accelerator(**kinds))

    @property
    def number(self) -> int:
        return self.rank.number

    @property
    def world(self) -> int:
        return self.rank.world

    @property
    def first(self) -> bool:
        """Whether this process writes, speaks and scores."""
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
        found: list[Any] = [None] * self.world
        self._guarded(lambda: dist.all_gather_object(found, list(rows)))
        return [row for part in found for row in part]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes; the others wait for it."""
        if self.world == 1:
            return make()
        found: list[Any] = [make() if self.first else None]
        self._guarded(lambda: dist.broadcast_object_list(found))
        return found[0]

    def close(self) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()
            if dist.is_initialized():
                dist.destroy_process_group()
            self._accelerator = None

    def _guarded(self, call: Callable[[], T]) -> T:
        """A peer that died shows as a broken connection: its own reason stands above in the job's output."""
        try:
            return call()
        except (RuntimeError, ValueError) as error:  # gloo, NCCL and the rendezvous raise these
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OtherProcessLost(
                f"process {self.number} of {self.world} lost another one of this job ({first}); the reason is what that one said last. "
                "The same command goes on from the last checkpoint"
            ) from None


def _announce(rank: Rank) -> None:
    """What torch wants to know of the job, from what `srun` says; `torchrun` has said it already."""
    set_default = os.environ.setdefault
    set_default("RANK", str(rank.number))
    set_default("WORLD_SIZE", str(rank.world))
    set_default("LOCAL_RANK", str(rank.local))
    set_default("LOCAL_WORLD_SIZE", str(rank.neighbours))
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        try:
            said = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30
            ).stdout.split()
        except (OSError, subprocess.TimeoutExpired):
            said = []
        os.environ["MASTER_ADDR"] = said[0] if said else "127.0.0.1"
    set_default("MASTER_PORT", str(20_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20_000))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: by default every large tensor is a fresh mapping, and touching its pages for the first time is a
    tenth of a step on a CPU (docs/negative_results.md, 15). Does nothing where there is no glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back before the end
    except (OSError, AttributeError):
        pass


def best_precision(wanted: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, float32 elsewhere."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def tokens_that_fit(layers: int, width: int, vocab: int, memory_gb: float | None, device: torch.device) -> int:
    """Positions of a language model whose forward states fit into `memory_gb`; None: 1 GB, or a third of a GPU's memory.

    From sizes that never change between two starts of a run, so that a resumed one cuts its chunks alike.
    """
    if memory_gb is None:
        memory_gb = torch.cuda.get_device_properties(device).total_memory / 3e9 if device.type == "cuda" else 1.0
    return max(1, int(memory_gb * 1e9 / (layers * width * _BYTES_A_UNIT + 3 * 4 * vocab)))


def auto_workers(device: torch.device, rows: int, ranks_here: int = 1) -> int:
    """How many worker processes pay: none for a handful of rows; beside a GPU every core.

    Where the CPU encodes, a worker takes its time from the encoder, whose threads wait for each other: on 2 cores decoding between the
    batches took 61 ms an image with ViT-B/32, one worker 67 ms, two 74 ms (benchmarks/preprocess.py). With many cores some are to spare.
    """
    if rows < FEW:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= max(1, ranks_here)
    return min(16, max(1, cores)) if device.type == "cuda" else cores // 4
