"""pipeline: every stage in order; what is already made is not made again."""

from __future__ import annotations

import time
from collections.abc import Callable

from cgtgan.assets.generators import initial_generator
from cgtgan.assets.images import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.stages.aggregate import aggregate
from cgtgan.stages.preprocess import preprocess
from cgtgan.stages.report import report
from cgtgan.stages.train import train
from cgtgan.training.checkpoints import best_validation
from cgtgan.training.scored_run import score_run

SHARED: dict[str, Callable[[Workspace], object]] = {
    "preprocess": preprocess,
    "aggregate": aggregate,
}  # by all processes of a job
OWN: dict[str, Callable[[Workspace], object]] = {
    "initialize": lambda ws: initial_generator(ws, ws.devices),
    "train": train,
    "evaluate": score_run,
    "report": report,
}


def run(cfg: Config) -> float | None:
    """Returns what `train.run` does."""
    ws = Workspace(cfg)
    ws.tracker.say(f"run folder: {ws.run}")
    started = time.perf_counter()
    for name, stage in SHARED.items():
        _timed(ws, name, stage)
    with ws.hold_run():
        for name, stage in OWN.items():
            if name == "evaluate" and ws.rank.number:  # scores and pages are the first process's
                break
            if name == "evaluate" and not dataset_split(ws, ws.cfg.evaluate.split).references:
                ws.tracker.say(
                    f"the {ws.cfg.evaluate.split} images have no references, so there is nothing to score; "
                    f"caption pictures with stage=caption checkpoint={ws.run} images=FOLDER"
                )
                break
            _timed(ws, name, stage)
    ws.tracker.say(f"pipeline: {time.perf_counter() - started:.1f} s")
    return best_validation(ws)


def _timed(ws: Workspace, name: str, stage: Callable[[Workspace], object]) -> None:
    ws.tracker.console.rule(name, align="left")
    started = time.perf_counter()
    stage(ws)
    ws.tracker.say(f"{name}: {time.perf_counter() - started:.1f} s")
