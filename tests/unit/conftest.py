"""Fixtures for tests of settings: composed by Hydra, typed and checked as in `run.py`, or `run.py` itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from cgtgan import cli
from cgtgan.config import STAGES, Config

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


@pytest.fixture
def composed() -> Iterator[Callable[..., Any]]:
    """Overrides -> the composed DictConfig."""
    ConfigStore.instance().store(name="cgtgan_schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides, **kwargs: compose("config", overrides=list(overrides), **kwargs)


@pytest.fixture
def typed(composed) -> Callable[..., Config]:
    """Overrides -> the typed config, checked as run.py does it."""

    def make(*overrides: str) -> Config:
        cfg: Any = OmegaConf.to_object(composed(*overrides))
        cli.check(cfg)
        return cfg

    return make


@pytest.fixture
def run_py(monkeypatch, tmp_path) -> Callable[..., int]:
    """`python run.py ARGUMENTS` in this process; `stage` takes the place of every stage's `run`."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run", module)
    for name in (
        "OMP_WAIT_POLICY",
        "TOKENIZERS_PARALLELISM",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_ETAG_TIMEOUT",
        "HYDRA_FULL_ERROR",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str, stage: Callable[[Config], object] | None = None) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        if stage is not None:
            for name in STAGES:
                monkeypatch.setitem(sys.modules, f"cgtgan.stages.{name}", SimpleNamespace(run=stage))
        GlobalHydra.instance().clear()
        try:
            return module.main()
        finally:
            cli.failures = None

    return start
