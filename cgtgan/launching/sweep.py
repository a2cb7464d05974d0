"""The launching command: compose and check every point, submit what is missing, wait, and say how each job ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from cgtgan import cli
from cgtgan.config import Config
from cgtgan.errors import Stopped, UserError
from cgtgan.launching import job_file
from cgtgan.launching.queues import Queue, open_queue
from cgtgan.launching.worker import Job, task_settings
from cgtgan.run_identity import run_folder, variant_name

_LAST_WORD = 20.0  # seconds after a job has ended well in which its job.json may still come over a network file system
_SILENCE = (
    120.0  # seconds after which a job that the queue no longer has, and of whose end nothing is known, is given up
)


@dataclass
class Point:
    """A point of the sweep: its settings, where it runs, and how far it is. `reason` is None while it has not failed."""

    label: str
    composed: DictConfig
    cfg: Config
    folder: Path
    settings: str
    job_id: str = ""
    log: str = ""
    starts: int = 0
    missing_since: float | None = None
    reason: str | None = None
    code: int = 0
    result: float | None = None


def launch(
    cluster: str,
    settings: Mapping[str, Any],
    compose: Callable[[list[str]], DictConfig],
    function: Callable[[DictConfig], Any],
    sweep: str | None,
    overrides: Sequence[Sequence[str]],
) -> list[JobReturn]:
    """Run every point as a job of `cluster` (slurm | local) and wait for all; failures go to `cli.failures`.

    settings: the fields of hydra.launcher; compose: a point's overrides -> all its settings; sweep: the chosen file of conf/sweep.
    Raises `ConfigError` before anything is submitted where a point is not accepted, `Stopped` at Ctrl-C.
    """
    queue = open_queue(cluster, settings)
    points = _checked(compose, overrides)
    waiting, running = _plan(queue, settings, points)
    name = settings["name"] or _name(points, sweep)
    try:
        _work(queue, name, function, waiting, running, len(points))
    except KeyboardInterrupt:
        raise Stopped(_farewell(queue, running), 130) from None
    failed = [point for point in points if point.reason is not None]
    for point in failed:
        said = f"{point.label}: {point.reason}  (log: {point.log})"
        if cli.failures is None:
            raise UserError(said)
        cli.failures.append((said, point.code or 1))
    return [_returned(point) for point in points]


# ------------------------------------------------------------------------------------------------------------------- before


def _checked(compose: Callable[[list[str]], DictConfig], overrides: Sequence[Sequence[str]]) -> list[Point]:
    points: list[Point] = []
    common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
    for words in overrides:
        label = " ".join(word for word in words if word not in common) if len(overrides) > 1 else "the run"
        try:
            composed = compose(list(words))
            cfg = OmegaConf.to_object(task_settings(composed))
            assert isinstance(cfg, Config)
            cli.check(cfg)
        except Exception as error:
            sentence = str(error) if isinstance(error, UserError) else cli.config_sentence(error, list(words))
            if sentence is None:
                raise
            raise cli.ConfigError(
                f"{label}: {sentence}; nothing is submitted" if len(overrides) > 1 else sentence
            ) from None
        points.append(Point(label, composed, cfg, run_folder(cfg).absolute(), job_file.settings_fingerprint(cfg)))
    seen: dict[Path, Point] = {}
    for point in points:
        if other := seen.get(point.folder):
            raise cli.ConfigError(
                f"{other.label} and {point.label} have the same run folder, {point.folder}: give each one of its own with variant=NAME "
                "or name=NAME, or leave one out; nothing is submitted"
            )
        seen[point.folder] = point
    return points


def _plan(queue: Queue, settings: Mapping[str, Any], points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """(points to submit, points whose job waits or runs already); what is done is neither."""
    records = {id(point): job_file.read(point.folder) for point in points}
    at_work: dict[str, str] = {}
    for cluster in {
        str(record["cluster"]) for record in records.values() if record.get("cluster") and record.get("job_id")
    }:
        there = (
            queue
            if cluster == queue.cluster
            else open_queue(cluster, {"array_parallelism": 1, "gpus_per_node": 0, **settings})
        )
        at_work |= there.alive([record["job_id"] for record in records.values() if record.get("cluster") == cluster])
    waiting, running, done = [], [], 0
    for point in points:
        record = records[id(point)]
        state = at_work.get(record.get("job_id", ""))
        if state and record.get("state") != "done":  # what is done stays in the queue for some seconds
            if record.get("settings") != point.settings or record.get("cluster") != queue.cluster:
                raise cli.ConfigError(
                    f"{point.label}: job {record['job_id']} ({state}) works in {point.folder} with other settings: cancel it, or give this "
                    "one a folder of its own with variant=NAME; nothing is submitted"
                )
            point.job_id, point.log, point.starts = record["job_id"], record.get("log", ""), record.get("starts", 0)
            running.append(point)
            _say(f"{point.job_id}  {point.label}  {state} since an earlier command; it is waited for")
        elif job_file.is_done(point.folder, point.cfg, record):
            point.result, point.job_id = record.get("result"), record.get("job_id", "")
            done += 1
            _say(f"done already: {point.label}  {point.folder}")
        else:
            waiting.append(point)
    if not waiting and not running:
        _say(f"nothing to submit: all {done} are done" if done > 1 else "nothing to submit: it is done")
    return waiting, running


def _name(points: Sequence[Point], sweep: str | None) -> str:
    """As `squeue` shows it: the sweep's file, or the experiment, with its variant where all points share one."""
    if sweep:
        return sweep
    experiments = dict.fromkeys(point.cfg.name for point in points)
    variants = dict.fromkeys(variant_name(point.cfg) for point in points)
    return "/".join(["+".join(experiments), *(variants if len(variants) == 1 else [])])


# ----------------------------------------------------------------------------------------------------------------- at work


def _work(
    queue: Queue,
    name: str,
    function: Callable[[DictConfig], Any],
    waiting: list[Point],
    running: list[Point],
    total: int,
) -> None:
    """Submit `waiting`, as many at once as the queue takes, and wait until nothing of it and of `running` is left."""
    ended, started = total - len(waiting) - len(running), time.monotonic()
    silent = False
    while waiting or running:
        room = len(waiting) if queue.at_once is None else max(0, queue.at_once - len(running))
        if batch := waiting[:room]:
            _submit(queue, name, function, batch)
            running += batch
            del waiting[:room]
        try:
            alive = queue.alive([point.job_id for point in running])
            silent = False
        except UserError as error:  # a controller that is restarted: the jobs do not mind
            if not silent:
                _say(f"{error}; still waiting")
            silent = True
            alive = {point.job_id: "unknown" for point in running}
        for point in [p for p in running if _has_ended(queue, p, alive)]:
            running.remove(point)
            ended += 1
            how = "done" if point.reason is None else point.reason
            where = f"  (log: {point.log})" if point.reason is not None else ""
            _say(f"{point.job_id}  {point.label}  {how}{where}  [{ended} of {total}]")
        if running:  # often at first, then every half minute: sixty jobs of a day are no load on the controller
            time.sleep(min(30.0, 1.0 + (time.monotonic() - started) / 60))


def _submit(queue: Queue, name: str, function: Callable[[DictConfig], Any], points: Sequence[Point]) -> None:
    places = []
    for point in points:
        point.folder.mkdir(parents=True, exist_ok=True)
        places.append(job_file.wandb_place(point.cfg, point.folder))
        record = {
            "cluster": queue.cluster,
            "job_id": "",
            "name": name,
            "overrides": point.label,
            "state": "submitted",
            "starts": 0,
        }
        known = {"settings": point.settings, "inputs": job_file.inputs_fingerprint(point.cfg), "wandb": places[-1]}
        job_file.write(point.folder, record | known | {"submitted": job_file.now()})
    jobs = [Job(function, point.composed, point.folder) for point in points]
    for point, place, job in zip(points, places, queue.submit(jobs, name), strict=True):
        point.job_id, point.log, point.starts, point.missing_since = job.job_id, str(job.log), 0, None
        job_file.update(point.folder, job_id=point.job_id, log=point.log)
        _say(f"{point.job_id}  {name}  {point.label}")
        _say(f"    run folder  {point.folder}")
        _say(f"    log         {point.log}")
        if place:
            _say(f"    W&B         {place.get('url') or place.get('sync') or 'run ' + place['id']}")
    _say(f"{len(points)} submitted; to cancel: {queue.cancel_hint([point.job_id for point in points])}")


def _has_ended(queue: Queue, point: Point, alive: Mapping[str, str]) -> bool:
    """Whether the job is over; sets what came of it. A job that is queued again is in the queue all the while."""
    record = job_file.read(point.folder)
    own = record if record.get("job_id") == point.job_id else {}
    if own.get("state") == "done":
        point.result = own.get("result")
        return True
    if own.get("starts", 0) > max(1, point.starts):
        _say(f"{point.job_id}  {point.label}  goes on after a stop, start {own['starts']}")
    point.starts = max(point.starts, own.get("starts", 0))
    if point.job_id in alive:
        point.missing_since = None
        return False
    point.missing_since = point.missing_since or time.monotonic()
    missing = time.monotonic() - point.missing_since
    how = queue.ended(point.job_id)
    if how is None and missing < _SILENCE:
        return False
    if how == "COMPLETED" and missing < _LAST_WORD:
        return False
    how = {"COMPLETED": "ended without a result", None: "left the queue, and how it ended is not known"}.get(how, how)
    own = job_file.read(point.folder)
    if own.get("job_id") == point.job_id and own.get("state") == "done":  # written between the two looks
        point.result = own.get("result")
        return True
    said = own.get("reason") if own.get("state") == "failed" else None
    point.code = own.get("code", 1) if said else 1
    if said and not own.get("follows"):
        point.reason = f"failed: {said}"
    else:  # a process that was killed says nothing, and what the others say of it is less than what SLURM knows
        point.reason = f"{how}; {said}" if said and str(how).startswith("failed") else f"{how}"
    if own.get("state") == "cancelled" and not said:
        point.reason = "cancelled"
    job_file.update(point.folder, state="failed" if point.reason != "cancelled" else "cancelled", reason=point.reason)
    return True


def _farewell(queue: Queue, running: Sequence[Point]) -> str:
    stop = getattr(queue, "stop", None)
    if stop is not None:  # processes of this terminal
        stop()
        return "\nstopped, the jobs too; the same command goes on where they stopped"
    if not running:
        return "\nstopped; the same command goes on"
    hint = queue.cancel_hint([point.job_id for point in running])
    return f"\nno longer waiting; {len(running)} jobs go on. To cancel them: {hint}. The same command finds them again"


def _returned(point: Point) -> JobReturn:
    """What a sweeper wants to know; a failed job is None to it, as with Hydra's own launcher under `run.py`."""
    returned = JobReturn(cfg=point.composed, status=JobStatus.COMPLETED)
    returned.return_value = point.result
    return returned


def _say(text: str) -> None:
    print(text, flush=True)
