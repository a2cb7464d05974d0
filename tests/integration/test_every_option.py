"""A run with every option beyond the paper: killed and typed again it ends bit for bit the same; two processes do what
one does.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.test_training import metrics, results, run, run_folder, started

EVERYTHING = (
    *("gap=mean_std", "prompt=entity", "initialize.pairs=pseudo", "initialize.label_smoothing=0.1"),
    *(f"+reward_weights.terms.{term}" for term in ("pmi=1", "prior=0.1", "entropy=0.05", "fluency=0.1")),
    *("train.advantage_norm=batch", "train.loss_norm=tokens", "train.baseline=leave_one_out", "train.ema=0.9"),
    *("train.kl_weight=0.05", "train.kl=k1_reward", "discriminator.loss=pairwise", "discriminator.reward=rank"),
    *("train.steps=8", "train.validate_every=4"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home where such a run was not disturbed."""
    home = tmp_path_factory.mktemp("whole")
    run(home, *EVERYTHING)
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    """A new home with the artifacts of the other, but no run."""
    shutil.copytree(whole / "artifacts", tmp_path / "artifacts")
    return tmp_path


def test_the_options_are_on(whole: Path) -> None:
    row = [row for row in metrics(whole) if "reward/pmi" in row][-1]
    for key in ("reward/pmi", "reward/prior", "reward/entropy", "reward/fluency", "train/ema_distance", "train/kl"):
        assert row[key] != 0, key
    checkpoint = run_folder(whole) / "checkpoints" / "last"
    assert (checkpoint / "gap.safetensors").is_file()
    average, weights = load_file(checkpoint / "generator.safetensors"), load_file(checkpoint / "training.safetensors")
    assert any(not average[key].equal(weights.get(f"module/generator/{key}", average[key])) for key in average)


def test_killed_and_typed_again_it_ends_bit_for_bit_the_same(whole: Path, home: Path) -> None:
    job = started(home, *EVERYTHING, rows=5)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert "going on after step" in run(home, *EVERYTHING)
    assert results(home) == results(whole)


def test_two_processes_learn_what_one_learns(whole: Path, home: Path) -> None:
    run(home, *EVERYTHING, processes=2)
    for two, one in zip(metrics(home), metrics(whole), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    places = [run_folder(place) / "checkpoints" / "last" / "generator.safetensors" for place in (home, whole)]
    both, alone = map(load_file, places)
    assert max(float((both[key] - alone[key]).abs().max()) for key in alone) < 1e-4
    for captions in sorted((run_folder(whole) / "validation").glob("*.json")):
        assert (run_folder(home) / "validation" / captions.name).read_text() == captions.read_text()
