"""Sweeps run whole on a world of a few dozen images: a question, a search, a failed point that is mended, a signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.program import run_program

ROOT = Path(__file__).parents[2]
SHORT = ("experiment=demo_tiny", "threads=1", "wandb=disabled", "evaluate.baselines=[]", "evaluate.metrics=[cider]")


def command(home: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), "-m", *SHORT, *overrides]


def run(home: Path, *overrides: str, code: int = 0) -> str:
    done = run_program(command(home, *overrides), cwd=home, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def run_folders(home: Path) -> list[Path]:
    return sorted(path.parent for path in home.glob("runs/demo_tiny/*/*/metrics.jsonl"))


def best_cider(folder: Path) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return max(row["eval/CIDEr"] for row in rows if "eval/CIDEr" in row and row["step"])


def kept(home: Path) -> dict[str, int]:
    """What a run and the store hold, with its time: of the files that a page or a lock is not."""
    files = [*home.glob("artifacts/**/*"), *home.glob("runs/demo_tiny/**/*")]
    return {
        str(p): p.stat().st_mtime_ns
        for p in files
        if p.is_file() and p.suffix != ".lock" and not p.name.startswith("report.")
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home where the sweep `initialization` ran whole."""
    home = tmp_path_factory.mktemp("sweeps")
    (home / "log.txt").write_text(run(home, "sweep=initialization", "seed=0"))
    return home


def test_a_sweep_runs_whole_and_makes_what_is_shared_once(home: Path) -> None:
    folders = run_folders(home)
    assert [folder.parent.name for folder in folders] == [
        "demo_t150_clip_agg_k5_noinit_noise0.5",
        "demo_t150_clip_agg_k5_noise0.5",
    ]
    for folder in folders:
        scores = json.loads((folder / "evaluation/test/cgtgan/scores.json").read_text())
        assert scores["scores"]["CIDEr"] >= 0
        assert (folder / "report.html").is_file()
    assert len(list(home.glob("artifacts/image_embeddings/*.safetensors"))) == 3  # of each split once
    assert len(list(home.glob("artifacts/aggregated_embeddings/*.safetensors"))) == 3
    (record,) = (path for path in home.glob("runs/multirun/*/*/*") if path.is_file())
    assert record.name == "multirun.yaml"
    before = kept(home)
    assert run(home, "sweep=initialization", "seed=0").count("train: done already") == 2
    assert kept(home) == before


def test_a_search_makes_the_validation_score_large_and_goes_on_where_it_was(home: Path) -> None:
    others = run_folders(home)
    search = ("sweep=optuna_reward_weights", "hydra.sweeper.sampler.n_startup_trials=1")
    run(home, *search, "hydra.sweeper.n_trials=2")
    first = [folder for folder in run_folders(home) if folder not in others]
    log = run(home, *search, "hydra.sweeper.n_trials=3")
    trials = [folder for folder in run_folders(home) if folder not in others]
    assert (len(first), len(trials)) == (2, 3)
    assert set(first) < set(trials)
    assert log.count("train: done already") == 2
    found = OmegaConf.load(max(home.glob("runs/multirun/*/*/optimization_results.yaml")))
    assert found.best_value == pytest.approx(max(map(best_cider, trials)))
    assert set(found.best_params) == {f"reward_weights.{name}" for name in ("cos_weight", "clip_weight", "max_weight")}
    values = {name.split(".")[1]: value for name, value in found.best_params.items()}
    (best,) = [
        f for f in trials if "cos{cos_weight:g}-clip{clip_weight:g}-max{max_weight:g}".format(**values) in f.parent.name
    ]
    assert best_cider(best) == pytest.approx(found.best_value)


def test_a_failed_point_takes_no_other_and_once_mended_it_alone_is_run(home: Path, tmp_path: Path) -> None:
    """Two starting points, one of which is not there."""
    starts = tmp_path / "starts"
    trained = run_folders(home)[0] / "checkpoints" / "last"
    shutil.copytree(trained, starts / "good")
    points = ("stage=train", "variant=bad,good", f"train.init_from={starts}/${{variant}}")
    output = run(home, *points, code=1)
    assert f"{starts}/bad" in output
    assert output.rstrip().splitlines()[-2:-1] == ["error: 1 failed:"]
    assert "variant=bad" in output.rstrip().splitlines()[-1]
    assert (home / "runs/demo_tiny/good/seed=0/checkpoints/last").is_dir()
    assert not (home / "runs/demo_tiny/bad/seed=0/checkpoints").exists()
    shutil.copytree(trained, starts / "bad")
    before = kept(home)
    assert run(home, *points).count("train: done already") == 1
    assert (home / "runs/demo_tiny/bad/seed=0/checkpoints/last").is_dir()
    assert {path: kept(home)[path] for path in before if "/good/" in path} == {
        p: t for p, t in before.items() if "/good/" in p
    }


def test_a_signal_ends_the_whole_sweep_with_a_checkpoint(home: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    line = command(home, "seed=5,6", "train.steps=2000", "train.validate_every=2000", "variant=stopped")
    process = subprocess.Popen(line, cwd=home, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(home.glob("runs/demo_tiny/stopped/seed=5/checkpoints/step_*")):
        assert process.poll() is None, "it ended before it trained"
        assert time.monotonic() < deadline, "training is never reached"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert output.startswith("received SIGTERM: stopped after step ")
    assert (home / "runs/demo_tiny/stopped/seed=5/checkpoints/last").is_dir()
    assert not (home / "runs/demo_tiny/stopped/seed=6").exists()
