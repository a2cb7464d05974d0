"""A SLURM of our own for these tests. `make test-slurm` runs them; without it they are left out, in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import Sweep

HERE = Path(__file__).resolve().parent
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "sacct")


def missing() -> str | None:
    """Why no SLURM can be started here."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurmctld slurmd munge slurm-client slurmdbd mariadb-server-core)"
    return None if os.geteuid() == 0 else "only root can start one"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the running cluster of two nodes, with $SLURM_CONF set. Impossible: skip, or fail where CI=true."""
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"no SLURM: {reason}")
        pytest.skip(f"left out: no SLURM: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        up = subprocess.run([HERE / "cluster_up.sh", folder, "2"], stdout=subprocess.PIPE, text=True, timeout=180)
        assert up.returncode == 0
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield folder
    finally:
        subprocess.run([HERE / "cluster_down.sh", folder], timeout=180)
        os.environ.pop("SLURM_CONF", None)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first sweep's jobs, then shared."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def sweep(slurm: Path, tmp_path: Path, artifacts: Path) -> Iterator[Sweep]:
    made = Sweep(tmp_path, artifacts)
    yield made
    left = [process for process in made.started if process.poll() is None]  # of a test that failed half way
    for process in left:
        process.kill()
    if left:
        subprocess.run(["scancel", "--user=root"])
