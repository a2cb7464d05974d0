"""A group option that is named on the command line is what the run has, whatever the experiment: its values stand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from cgtgan.config import Config

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
GROUPS = sorted(
    path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("experiment", "ablation", "hydra")
)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from leaves(child, f"{path}.{name}" if path else name)
    else:
        yield path, value


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_options_values_stand_in_every_experiment(experiment: str) -> None:
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="cgtgan_schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for options in zip_longest(*(sorted((CONF / group).glob("*.yaml")) for group in GROUPS)):
            chosen = {file.parent.name: file for file in options if file is not None}  # one option per group at a time
            words = [f"{group}={file.stem}" for group, file in chosen.items()]
            cfg = compose("config", [f"experiment={experiment}", *words])
            for group, file in chosen.items():
                composed = dict(leaves(OmegaConf.to_container(cfg[group], resolve=False)))
                option = dict(leaves(OmegaConf.to_container(OmegaConf.load(file), resolve=False)))
                lost = {name: composed[name] for name, value in option.items() if composed[name] != value}
                assert not lost, f"experiment={experiment} {group}={file.stem}: {lost}"
