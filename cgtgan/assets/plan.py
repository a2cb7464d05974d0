"""What of a pipeline is made already, looked up by the very functions that make it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from cgtgan.assets.aggregated import aggregated_at_temperatures
from cgtgan.assets.checkpoints import step_folders
from cgtgan.assets.corpus import sentence_embeddings
from cgtgan.assets.generators import initial_generator, total_steps
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.config import SPLITS
from cgtgan.errors import UserError
from cgtgan.runtime.store import ReadOnlyStore

_ARTIFACTS: dict[str, Callable[[Workspace], object]] = {
    "preprocess": lambda ws: ([image_embeddings(ws, name) for name in SPLITS], sentence_embeddings(ws)),
    "aggregate": lambda ws: [aggregated_at_temperatures(ws, name) for name in SPLITS],
    "initialize": initial_generator,
}


def made_already(ws: Workspace) -> dict[str, str]:
    """Stage -> what of it is there, in words: 'made', 'step 120 of 400', '3 of 7 scored'; no entry where nothing is.

    Makes nothing. Loads the listings and embeddings that the stages then use.
    """
    states: dict[str, str] = {}
    looking = replace(ws)  # with the listings that it keeps
    looking.store = ReadOnlyStore(ws.store.root)
    for stage, look in _ARTIFACTS.items():
        with suppress(UserError):  # what is missing or damaged is made by its stage, or named there
            look(looking)
            states[stage] = "made"
    if folders := step_folders(ws.run / "checkpoints"):
        states["train"] = _trained(ws, int(folders[0].name[5:]), all_images="preprocess" in states)
    methods = ["cgtgan", *ws.cfg.evaluate.baselines]
    places = [ws.run / "evaluation" / ws.cfg.evaluate.split / method / "scores.json" for method in methods]
    if scored := sum(place.is_file() for place in places):
        states["evaluate"] = f"{scored} of {len(places)} scored"
    return states


def _trained(ws: Workspace, step: int, *, all_images: bool) -> str:
    t = ws.cfg.train
    steps = total_steps(t, len(image_embeddings(ws, "train").ids) if all_images else 0)
    return "made" if steps and step >= steps else f"step {step} of {steps}" if steps else f"step {step}"
