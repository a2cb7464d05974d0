"""The benchmarks that run for minutes elsewhere, in a tiny size: every part gives its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, folder: Path, *words: str) -> dict[str, Any]:
    """The JSON file that a benchmark writes."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words, "--output", str(folder / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


def test_gpu_figures_in_a_tiny_size(tmp_path: Path) -> None:
    parts = run("gpu.py", tmp_path, "--device", "cpu", "--small")["parts"]
    assert list(parts) == ["encoding", "aggregation", "step", "together", "decoding"]
    assert [row["what"] for row in parts["encoding"]] == ["images", "captions"]
    assert all(row["error"] < 1e-5 for row in parts["aggregation"] if row["products"] == "float32")
    assert parts["step"][0]["speed"] == 1
    assert parts["step"][1]["tokens"] > 15
    assert sum(parts["step"][1]["parts"].values()) == pytest.approx(1)
    assert parts["together"][0]["images_per_second"] > 0
    assert parts["decoding"][0]["same_captions"] == 1
    assert "| captions | float32 |" in (tmp_path / "out.md").read_text()


def test_growth_in_tiny_sizes(tmp_path: Path) -> None:
    found = run("scaling.py", tmp_path, "--images", "8", "32", "--sentences", "200", "800")
    assert list(found["rows"]) == ["preprocess", "aggregate", "initialize", "train", "evaluate", "report"]
    assert [row["size"] for row in found["rows"]["train"]] == [8, 32]
    sizes = [row["disk_mb"] for row in found["rows"]["aggregate"]]
    assert sizes[1] / sizes[0] == pytest.approx(4, rel=0.05)
    assert found["exponents"]["aggregate"]["disk_mb"] == pytest.approx(1, abs=0.05)
    assert all(row["seconds"] > 0 for rows in found["rows"].values() for row in rows)
    assert "| train | 32 images |" in (tmp_path / "out.md").read_text()
