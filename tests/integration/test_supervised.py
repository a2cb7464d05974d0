"""The supervised row with steps of its own, validated: the best step is kept, also after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cgtgan.assets.training_state import read_meta
from tests.killed_update import killed_in_step
from tests.program import run_program

ROOT = Path(__file__).parents[2]
# a rate at which a later step is not always the better one
CHOSEN = ("evaluate.supervised.steps=60", "evaluate.supervised.validate_every=20", "evaluate.supervised.lr=3e-3")


def command(*overrides: str) -> list[str]:
    tiny = ("experiment=demo_tiny", "threads=1", "wandb=disabled", "train.steps=2", "evaluate.metrics=[cider]")
    return [sys.executable, str(ROOT / "run.py"), *tiny, "evaluate.baselines=[supervised]", *overrides]


def run(home: Path, *overrides: str) -> str:
    done = run_program(command(*overrides), cwd=home, timeout=300, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the bound as it is by default, and then with steps of its own."""
    home = tmp_path_factory.mktemp("home")
    run(home)
    (home / "log.txt").write_text(run(home, "stage=evaluate", *CHOSEN))
    return home


def bounds(home: Path) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """training.json and the weights, by the number of updates"""
    folders = [path.parent for path in home.glob("artifacts/generator_supervised/*/training.json")]
    made = [(json.loads((f / "training.json").read_text()), load_file(f / "generator.safetensors")) for f in folders]
    return sorted(made, key=lambda pair: pair[0]["updates"])


def rows(page: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in page.with_name("metrics.jsonl").read_text().splitlines()]


def record(home: Path, name: str) -> dict[str, Any]:
    (file,) = home.glob(f"runs/demo_tiny/*/seed=0/evaluation/test/{name}/scores.json")
    return json.loads(file.read_text())


def test_by_default_it_has_the_updates_of_the_run_and_keeps_the_last(home: Path) -> None:
    (training, _), _ = bounds(home)
    seconds = training.pop("seconds")
    assert 0 < seconds < 300
    assert training == {"updates": 22, "kept_step": 22, "validation": []}  # 20 of the initialisation and 2
    noted = record(home, "supervised@*")["training"]
    (file,) = home.glob("runs/demo_tiny/*/seed=0/seconds.json")
    assert json.loads(file.read_text())[noted.pop("generator")] == seconds
    assert noted == {"updates": 22, "kept_step": 22}  # equal in equal runs


def test_the_step_with_the_best_validation_is_kept(home: Path) -> None:
    _, (training, _) = bounds(home)
    assert [step for step, _ in training["validation"]] == [20, 40, 60]
    ciders = dict(training["validation"])
    assert training["kept_step"] == max(ciders, key=lambda step: ciders[step])
    noted = {key: record(home, "supervised")["training"][key] for key in ("updates", "kept_step")}
    assert noted == {"updates": 60, "kept_step": training["kept_step"]}
    kept = "" if training["kept_step"] == 60 else f", step {training['kept_step']} kept"
    assert re.search(rf"60 updates in [\d.]+ s{kept}", " ".join((home / "log.txt").read_text().split()))


def test_after_a_kill_it_keeps_the_same_weights(home: Path, tmp_path: Path) -> None:
    _, (training, weights) = bounds(home)
    again = tmp_path / "home"
    shutil.copytree(home, again, symlinks=True, ignore=shutil.ignore_patterns("generator_supervised", "evaluation"))
    script = tmp_path / "killed.py"
    script.write_text(killed_in_step(35))  # the last state is that of step 30
    state = ("stage=evaluate", "initialize.checkpoint_every=10", *CHOSEN)
    words = [str(script) if part.endswith("run.py") else part for part in command(*state)]
    assert run_program(words, cwd=again, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode != 0
    (left,) = again.glob("artifacts/generator_supervised/*.training")
    before = read_meta(left)["seconds"]
    run(again, *state)
    ((same, after),) = bounds(again)
    assert same.pop("seconds") > before > 0  # what the killed process spent counts
    assert same == {key: value for key, value in training.items() if key != "seconds"}
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert not list(again.glob("artifacts/generator_supervised/*.training"))


def test_the_page_says_how_long_it_was_trained(home: Path) -> None:
    run(home, "stage=report", *CHOSEN)
    (page,) = home.glob("runs/demo_tiny/*/seed=0/report.md")
    text = page.read_text()
    assert "the same generator trained on pairs, 22 updates in " in text
    assert "the same generator trained on pairs, 60 updates in " in text
    spent = rows(page)[-1]["train/seconds_total"]  # the last validation is in it
    assert f"2 updates in {spent:{'.1f' if spent < 10 else '.0f'}} s after initialisation" in text
