"""What the tests against SLURM start, and how they look at it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Sweep:
    """`python run.py -m hydra/launcher=slurm ...` of demo_tiny on one thread, in a folder of its own."""

    root: Path
    artifacts: Path
    started: dict[subprocess.Popen[str], Path] = field(default_factory=dict)

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        common = (
            *("experiment=demo_tiny", "threads=1", "device=cpu", "evaluate.baselines=[]", "wandb=disabled"),
            *(f"runs_dir={self.root / 'runs'}", f"artifacts_dir={self.artifacts}", "hydra/launcher=slurm"),
            *(f"hydra.launcher.{f}" for f in ("gpus_per_node=null", "mem_gb=null", "cpus_per_task=1")),
        )
        given = {override.split("=")[0] for override in overrides}
        command = [
            sys.executable,
            str(ROOT / "run.py"),
            "-m",
            *(c for c in common if c.split("=")[0] not in given),
            *overrides,
        ]
        out = self.root / f"command_{len(self.started)}.txt"
        process = subprocess.Popen(command, stdout=out.open("w"), stderr=subprocess.STDOUT, text=True, cwd=self.root)
        self.started[process] = out
        return process

    def wait(self, process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
        """(exit code, all that was printed)"""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"still waiting after {seconds} s:\n{self.printed(process)}\n{text_of('squeue')}")
        return code, self.printed(process)

    def printed(self, process: subprocess.Popen[str]) -> str:
        return self.started[process].read_text(encoding="utf-8")

    def __call__(self, *overrides: str) -> tuple[int, str]:
        return self.wait(self.start(*overrides))

    def run(self, name: str = "demo_tiny", seed: int = 0) -> Path:
        """The run folder of an experiment's only variant."""
        (folder,) = (self.root / "runs" / name).glob(f"*/seed={seed}")
        return folder


def text_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def job_ids(printed: str) -> list[str]:
    """Those that the command says it has submitted."""
    return re.findall(r"^(\d+(?:_\d+)?)  .*\n    run folder", printed, re.MULTILINE)


def until(true: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := true():
            return result
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {seconds} s\n{text_of('squeue')}")


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []


def job(run: Path) -> dict[str, Any]:
    return json.loads((run / "job.json").read_text(encoding="utf-8"))


def scores(run: Path) -> dict[str, float]:
    return json.loads((run / "evaluation/test/cgtgan/scores.json").read_text(encoding="utf-8"))["scores"]


def weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(str(run / "checkpoints/last/generator.safetensors"))
