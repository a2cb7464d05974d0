"""aggregate: image and sentence embeddings -> one aggregated text embedding per image."""

from __future__ import annotations

from cgtgan.assets.aggregated import aggregated_at_temperatures
from cgtgan.assets.workspace import Workspace
from cgtgan.config import SPLITS, Config


def run(cfg: Config) -> None:
    aggregate(Workspace(cfg))


def aggregate(ws: Workspace) -> None:
    for name in SPLITS:
        aggregated_at_temperatures(ws, name)
