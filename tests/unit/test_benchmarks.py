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
    found = run("gpu.py", tmp_path, "--device", "cpu", "--small")
    parts, caches = found["parts"], ["growing", "static", "compiled"]
    assert list(parts) == ["decoding", "step", "aggregation", "encoding", "together"]
    ways = [("greedy", way) for way in (*caches, "generate")] + [("beams of 3", way) for way in (*caches, "generate")]
    ways += [("samples of a step", way) for way in caches]
    assert [(row["what"], row["cache"]) for row in parts["decoding"]] == ways
    assert all(row["same_captions"] == 1 for row in parts["decoding"])
    assert [row["step"] for row in parts["step"]] == ["published", *["ours bf16"] * 3]
    assert [row["cache"] for row in parts["step"]] == ["growing", *caches]
    assert parts["step"][0]["speed"] == 1
    assert all(row["tokens"] > 15 for row in parts["step"][1:])
    assert sum(parts["step"][1]["parts"].values()) == pytest.approx(1)
    assert all(row["error"] < 1e-5 for row in parts["aggregation"] if row["products"] == "float32")
    assert [row["what"] for row in parts["encoding"]] == ["images", "captions"]
    assert parts["together"][0]["images_per_second"] > 0
    assert [line.partition(":")[0] for line in found["fastest"]] == [
        *("greedy, float32", "beams of 3, float32", "samples of a step, float32", "step of 2 x 2, bf16")
    ]
    assert found["left_out"] == []
    assert "| captions | float32 |" in (tmp_path / "out.md").read_text()


def test_gpu_figures_end_in_time_and_name_what_is_left_out(tmp_path: Path) -> None:
    some = ("--only", "step", "decoding")
    found = run("gpu.py", tmp_path, "--device", "cpu", "--small", "--minutes", "0", *some)
    assert found["parts"] == {"step": [], "decoding": []}
    assert (tmp_path / "out.md").read_text().endswith("left out, beyond the time: step, decoding\n")


def test_growth_in_tiny_sizes(tmp_path: Path) -> None:
    found = run("scaling.py", tmp_path, "--images", "8", "32", "--sentences", "200", "800")
    assert list(found["rows"]) == ["preprocess", "aggregate", "initialize", "train", "evaluate", "report"]
    assert [row["size"] for row in found["rows"]["train"]] == [8, 32]
    sizes = [row["disk_mb"] for row in found["rows"]["aggregate"]]
    assert sizes[1] / sizes[0] == pytest.approx(4, rel=0.05)
    assert found["exponents"]["aggregate"]["disk_mb"] == pytest.approx(1, abs=0.05)
    assert all(row["seconds"] > 0 for rows in found["rows"].values() for row in rows)
    assert "| train | 32 images |" in (tmp_path / "out.md").read_text()
