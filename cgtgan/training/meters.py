"""Means over everything a step adds up, and where its time goes."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cgtgan.runtime.devices import Devices, on_device


class Means:
    """Means over everything that was added, over all micro-batches and processes; on the device until `over` is called.

    detailed: the step is logged, so that what only a logged row needs is computed too.
    """

    def __init__(self, *, detailed: bool = True) -> None:
        self.detailed = detailed
        self.sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        total, count = self.sums.get(name, (torch.zeros((), device=values.device), 0))
        self.sums[name] = (total + values.detach().float().sum(), count + values.numel())

    def add_rewards(self, rewards: Mapping[str, Tensor], advantages: Mapping[str, Tensor]) -> None:
        """Every reward (B*K + B,), samples then greedy captions, and its advantage (B, K), by name."""
        for name, reward in rewards.items():
            advantage = advantages[name]
            self.add(f"reward/{name}", reward[: advantage.numel()])
            self.add(f"reward/{name}_greedy", reward[advantage.numel() :])
            self.add(f"advantage/{name}", advantage)
            self.add(f"advantage/{name}_abs", advantage.abs())

    def over(self, devices: Devices, norms: Mapping[str, Tensor]) -> dict[str, float]:
        """Every mean, and the gradient norms, equal in every process. Waits for the device."""
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name][0] for name in names])
        counts = on_device(torch.tensor([self.sums[name][1] for name in names], dtype=torch.float32), sums.device)
        means = torch.stack([sums, counts]) if devices.world == 1 else devices.sum(torch.stack([sums, counts]))
        values = torch.cat([means[0] / means[1], *(norm[None] for norm in norms.values())]).tolist()
        return dict(zip([*names, *(f"train/{name[0]}_grad_norm" for name in norms)], values, strict=True))


class Clock:
    """Where the time of a step goes. On a GPU by events of its own queue, read when the row is logged."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.device = device
        self.marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        """What happened since the last mark was `name`."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def metrics(self, images: int) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        spent: dict[str, float] = {}
        for (_, before), (name, after) in pairwise(self.marks):
            seconds = before.elapsed_time(after) / 1000 if self.cuda else after - before
            spent[name] = spent.get(name, 0.0) + seconds
        total = sum(spent.values())
        if self.cuda:
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {"train/seconds": total, "train/images_per_second": images / total, "memory/peak_gb": peak / 1e9}
        return metrics | {f"time/{name.replace(' ', '_')}": seconds / total for name, seconds in spent.items()}
