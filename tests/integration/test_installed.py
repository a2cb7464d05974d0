"""The installed package: a wheel, built and installed into an environment of its own, away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "cgtgan",
    "conf",
    "sweeps",
    "hydra_plugins",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
)

CAPTION = """
import json, sys, cgtgan
captioner = cgtgan.Captioner.load(sys.argv[1])
print(json.dumps([cgtgan.__file__, captioner.caption(sys.argv[2])]))
"""


def _pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; what the wheel depends on is this environment's."""
    home = tmp_path_factory.mktemp("installed")
    source = home / "source"  # setuptools writes into the folder that it builds
    source.mkdir()
    for name in SOURCES:
        place = ROOT / name
        copy = shutil.copytree if place.is_dir() else shutil.copy
        copy(place, source / name)
    _pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", home / "dist", source)
    shutil.rmtree(source)
    environment = home / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin/python"
    (wheel,) = (home / "dist").glob("cgtgan-*.whl")
    _pip("--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (packages,) = environment.glob("lib/python*/site-packages")
    # a path in a .pth file is put on sys.path, but the .pth files behind it (the checkout's own) are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def _run(environment: Path, folder: Path, *words: str, program: str = "cgtgan", **variables: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    command = [str(environment / "bin" / program), *words]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_help_works_in_an_empty_folder_and_leaves_it_empty(environment: Path, tmp_path: Path) -> None:
    page = _run(environment, tmp_path, "--help")
    assert "\ncgtgan [experiment=NAME]" in page
    assert "demo_tiny" in page  # an option of conf/
    assert "temperature" in page  # an option of sweeps/
    assert not list(tmp_path.iterdir())


def test_the_version_is_ours(environment: Path, tmp_path: Path) -> None:
    version = _run(environment, tmp_path, "-c", "import cgtgan; print(cgtgan.__version__)", program="python").strip()
    assert _run(environment, tmp_path, "--version").strip() == f"cgtgan {version}"


def test_the_small_demo_runs_from_the_wheel_in_another_folder(environment: Path, tmp_path: Path) -> None:
    _run(environment, tmp_path, "experiment=demo_tiny", "threads=1", "evaluate.baselines=[init]")
    (run,) = tmp_path.glob("runs/demo_tiny/*/seed=0")
    assert "METEOR" in json.loads((run / "evaluation/test/cgtgan/scores.json").read_text())["scores"]
    assert (run / "report.html").is_file()
    picture = next(tmp_path.glob("artifacts/**/*.png"))
    words = ("-c", CAPTION, str(run), str(picture))
    file, captions = json.loads(_run(environment, tmp_path, *words, program="python"))
    assert Path(file).is_relative_to(environment)
    assert len(captions) == 1
    assert captions[0].endswith(".")


def test_a_folder_of_ones_own_experiments(environment: Path, tmp_path: Path) -> None:
    experiments = tmp_path / "mine/experiment"
    experiments.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - demo_tiny\n  - _self_\nname: mine\nseed: 7\n"
    (experiments / "mine.yaml").write_text(text)
    settings = _run(environment, tmp_path, "--config-dir", "mine", "experiment=mine", "--cfg", "job").splitlines()
    assert {"name: mine", "seed: 7"} <= set(settings)


def test_a_sweep_is_found_from_another_folder(environment: Path, tmp_path: Path) -> None:
    described = _run(environment, tmp_path, "sweep=temperature", "--cfg", "hydra", "--package", "hydra.sweeper")
    assert "aggregation_t.t" in described


def test_the_shell_completes_groups_and_options(environment: Path, tmp_path: Path) -> None:
    def completed(line: str) -> list[str]:
        return _run(environment, tmp_path, "-sc", "query=bash", COMP_LINE=line).split()

    assert "experiment=demo_tiny" in completed("cgtgan experiment=demo")
    assert completed("cgtgan sweep=t") == ["sweep=temperature"]
    assert "complete" in _run(environment, tmp_path, "-sc", "install=bash")


def test_the_jobs_of_a_sweep_import_the_wheel(environment: Path, tmp_path: Path) -> None:
    """The checkout is not on the path of this environment: a job finds the package that started it, or fails."""
    image = {"id": 1, "image_id": 1, "caption": "a red circle on a table"}
    (tmp_path / "references.json").write_text(json.dumps({"images": [{"id": 1}], "annotations": [image]}))
    (tmp_path / "captions.json").write_text(json.dumps([{"image_id": 1, "caption": "a red circle"}]))
    settings = ("captions=captions.json", "evaluate.references=references.json", "evaluate.metrics=[bleu]")
    words = ("-m", "hydra/launcher=submitit_local", "experiment=demo_tiny", "stage=evaluate", "wandb=disabled")
    printed = _run(environment, tmp_path, *words, *settings)
    assert "  the run  done  [1 of 1]" in printed
    (record,) = tmp_path.glob("runs/demo_tiny/*/seed=0/job.json")
    assert json.loads(record.read_text())["state"] == "done"
