"""Run folders and artifacts that version 0.1 wrote (its commit a228a6e): this version goes on with them.

`run_of_0_1.tar.xz` (253 kB) was made by that code with `SETTINGS`: seed=1 whole; seed=0 stopped after step 1 of 6, with
what it logged when 0.1 itself went on, as `expected/metrics.jsonl`.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.program import run_program

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("experiment=demo_tiny", "wandb.mode=disabled", "threads=1", "workers=0"),
    *("dataset.world.image_size=32", "dataset.world.train_images=16", "dataset.world.val_images=4"),
    *("dataset.world.test_images=4", "dataset.world.corpus_sentences=40"),
    *("clip_backbone.demo.dim=8", "clip_backbone.demo.width=8", "clip_backbone.demo.text_layers=1"),
    *("clip_backbone.demo.pairs=16", "clip_backbone.demo.batch_size=8", "clip_backbone.demo.steps=4"),
    *("generator.width=4", "generator.layers=1", "generator.heads=2", "generator.vocab_size=262"),
    *("generator.prefix_length=2", "generator.mapper=mlp", "discriminator.width=4", "discriminator.layers=1"),
    *("discriminator.heads=2", "discriminator.vocab_size=264", "initialize.steps=4", "train.batch_size=4"),
    *("train.num_samples=2", "train.steps=6", "train.validate_every=6", "train.checkpoint_every=6"),
    *("evaluate.metrics=[bleu,cider]", "evaluate.baselines=[init,mean_shift,projection,nearest,human]"),
)
CLOCK = ("time/", "memory/", "train/seconds", "train/images_per_second")


def run(home: Path, *overrides: str, **environment: str) -> str:
    command = [sys.executable, str(ROOT / "run.py"), *SETTINGS, *overrides]
    done = run_program(command, cwd=home, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def artifacts(home: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of the store, hidden ones left out."""
    files = [p for p in (home / "artifacts").rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(home)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run_of_0_1")
    with tarfile.open(Path(__file__).with_name("run_of_0_1.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_training_goes_on_and_nothing_is_made_anew(home: Path) -> None:
    before = artifacts(home)
    said = run(home, "seed=0")
    assert artifacts(home) == before
    assert "initialising" not in said
    assert "encoding" not in said
    assert "drawing" not in said
    (folder,) = (home / "runs/demo_tiny").glob("*/seed=0")
    logged, expected = rows(folder / "metrics.jsonl"), rows(home / "expected/metrics.jsonl")
    steps = [[row for row in both if "train/d_loss" in row] for both in (logged, expected)]
    assert [row["step"] for row in steps[0]] == [1, 2, 3, 4, 5, 6]
    for row, wanted in zip(*steps, strict=True):
        for name, value in wanted.items():
            if not name.startswith(CLOCK):
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (row["step"], name)
    # 0.1 did not count its seconds: a sum without them would be too small
    assert not any("train/seconds_total" in row for row in logged)
    assert "6 updates after initialisation" in (folder / "report.md").read_text()


def test_a_whole_run_is_evaluated_and_reported(home: Path) -> None:
    before = artifacts(home)
    (folder,) = (home / "runs/demo_tiny").glob("*/seed=1")
    weights = (folder / "checkpoints/step_000006/generator.safetensors").stat().st_mtime_ns
    scores = {path: path.read_bytes() for path in folder.glob("evaluation/test/*/*.json")}
    said = run(home, "seed=1")
    assert artifacts(home) == before
    assert {path: path.read_bytes() for path in folder.glob("evaluation/test/*/*.json")} == scores
    assert len(scores) == 18
    cider = json.loads((folder / "validation/baselines.json").read_text())["CIDEr"]
    assert sorted(cider) == ["human", "init", "mean_shift", "nearest", "projection"]
    assert "GAN training 1/6" not in said
    assert (folder / "checkpoints/step_000006/generator.safetensors").stat().st_mtime_ns == weights
    assert (folder / "report.html").is_file()


def test_the_supervised_bound_has_one_name(home: Path) -> None:
    """In every process; that of other pairs is another."""
    stage = ("stage=evaluate", "seed=1", "evaluate.baselines=[supervised]")

    def made() -> set[str]:
        run(home, *stage, PYTHONHASHSEED="random")
        return {p.name for p in (home / "artifacts/generator_supervised").iterdir() if p.name[0] != "."}

    first = made()
    assert len(first) == 1
    (folder,) = (home / "runs/demo_tiny").glob("*/seed=1")
    for scores in folder.rglob("supervised*"):
        scores.rename(scores.with_name(f"old_{scores.name}"))
    before = artifacts(home)
    assert made() == first
    assert artifacts(home) == before
    stage = (*stage, "dataset.max_images=15", "variant=fewer", f"checkpoint={folder}")
    assert len(made()) == 2
