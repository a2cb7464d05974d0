"""pipeline: every stage in order; what is already made is not made again."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable

from cgtgan.assets.generators import initial_generator
from cgtgan.assets.images import dataset_split
from cgtgan.assets.plan import made_already
from cgtgan.assets.workspace import Workspace
from cgtgan.config import COCO_METRICS, Config, custom_name
from cgtgan.errors import program
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
STAGES = [*SHARED, *OWN]


def run(cfg: Config) -> float | None:
    """Returns what `train.run` does."""
    ws = Workspace(cfg)
    ws.tracker.say(f"run folder: {ws.run}")
    if not ws.rank.number:  # the one that prints
        _announce(ws)
    started = time.perf_counter()
    for name, stage in SHARED.items():
        _timed(ws, name, stage)
    with ws.hold_run():
        for name, stage in OWN.items():
            if name == "evaluate" and ws.rank.number:  # scores and pages are the first process's
                break
            if name == "evaluate" and not dataset_split(ws, ws.cfg.evaluate.split).references:
                _score_without_references(ws)
            _timed(ws, name, stage)
    ws.tracker.say(f"pipeline: {time.perf_counter() - started:.1f} s")
    if not cfg.several:
        _say_next(ws)
    return best_validation(ws)


def _score_without_references(ws: Workspace) -> None:
    """Leave the metrics and baselines that need no captions of people; CLIPScore and diversity where none is left."""
    cfg = ws.cfg.evaluate
    cfg.metrics = [metric for metric in cfg.metrics if metric not in COCO_METRICS] or ["clipscore", "diversity"]
    cfg.baselines = [name for name in cfg.baselines if name not in ("supervised", "human")]
    cfg.self_cider_samples = 0
    ws.tracker.say(
        f"the {cfg.split} images have no references: {', '.join(map(custom_name, cfg.metrics))} are computed; "
        f"caption other pictures with stage=caption {shlex.quote(f'checkpoint={ws.run}')} images=FOLDER"
    )


def _announce(ws: Workspace) -> None:
    """'plan: 1 preprocess (made), 2 aggregate (made), 3 initialize, 4 train, 5 evaluate, 6 report'"""
    states = made_already(ws)
    stages = (f"{n} {name}" + (f" ({states[name]})" if name in states else "") for n, name in enumerate(STAGES, 1))
    ws.tracker.say(f"plan: {', '.join(stages)}")


def _say_next(ws: Workspace) -> None:
    given = f"{program()} {{}} {shlex.quote(f'checkpoint={ws.run}')}"
    ws.tracker.say(f"caption your own pictures: {given.format('stage=caption')} images=FOLDER")
    ws.tracker.say(f"or on a page in the browser: {given.format('stage=serve')}")


def _timed(ws: Workspace, name: str, stage: Callable[[Workspace], object]) -> None:
    ws.tracker.console.rule(f"{STAGES.index(name) + 1}/{len(STAGES)} {name}", align="left")
    started = time.perf_counter()
    stage(ws)
    ws.tracker.say(f"{name}: {time.perf_counter() - started:.1f} s")
