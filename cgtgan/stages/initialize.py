"""initialize: sentences and their embeddings -> a generator that rebuilds a sentence from its CLIP text embedding."""

from __future__ import annotations

from cgtgan.assets.generators import initial_generator
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    try:
        initial_generator(ws, ws.devices)
    finally:
        ws.close()
