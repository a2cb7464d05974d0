"""The launching command: compose and check every point, submit what is missing, wait, and report how each job ended."""

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
from cgtgan.errors import ConfigError, Stopped, UserError
from cgtgan.launching import job_file
from cgtgan.launching.queues import JobState, LocalQueue, SlurmQueue, job_states, open_queue
from cgtgan.launching.worker import Job, task_settings
from cgtgan.run_identity import run_folder, variant_name
from cgtgan.setting_errors import config_sentence

RESULT_GRACE_S = 20.0  # after a job ended well: its job.json may still be on the way over a network file system
LOST_JOB_S = 120.0  # after the queue no longer knows a job: it is given up


@dataclass
class Point:
    """A point of the sweep: its settings, its run folder, and how far its job is. `reason`: why it failed."""

    label: str
    composed: DictConfig
    cfg: Config
    folder: Path
    job_id: str = ""
    log: str = ""
    starts: int = 0
    missing_since: float | None = None
    reason: str | None = None
    code: int = 0
    result: float | None = None


def launch(
    cluster: str,
    fields: Mapping[str, Any],
    compose: Callable[[list[str]], DictConfig],
    function: Callable[[DictConfig], Any],
    sweep: str | None,
    overrides: Sequence[Sequence[str]],
    make_ready: Callable[[Config], None],
) -> list[JobReturn]:
    """Run every point as a job of `cluster` (slurm | local) and wait for all; failures go to `cli.failures`.

    fields: those of hydra.launcher; compose: a point's overrides -> all its settings; sweep: the file of sweeps/.
    make_ready: raises a `UserError` where what a run reads is missing. Before anything is submitted it is raised, and
    `ConfigError` where a point is not accepted. Raises `Stopped` at Ctrl-C.
    """
    queue = open_queue(cluster, fields)
    points = _checked(compose, overrides)
    waiting, running = _plan(cluster, points)
    for point in waiting:
        make_ready(point.cfg)
    try:
        _work(queue, fields["name"] or _job_name(points, sweep), function, waiting, running)
    except KeyboardInterrupt:
        raise Stopped(interrupt_message(queue, running), 130) from None
    for point in points:
        if point.reason is not None:
            message = f"{point.label}: {point.reason}  (log: {point.log})"
            if cli.failures is None:
                raise UserError(message)
            cli.failures.append((message, point.code or 1))
    return [_job_return(point) for point in points]


# --------------------------------------------------------------------------------------------------------------- before


def _checked(compose: Callable[[list[str]], DictConfig], overrides: Sequence[Sequence[str]]) -> list[Point]:
    several = len(overrides) > 1
    common = set.intersection(*map(set, overrides)) if several else set()
    points: dict[Path, Point] = {}
    for words in overrides:
        label = " ".join(word for word in words if word not in common) if several else "the run"
        try:
            composed = compose(list(words))
            cfg = OmegaConf.to_object(task_settings(composed))
            assert isinstance(cfg, Config)
            cli.check(cfg)
        except Exception as error:  # Hydra, OmegaConf or our checks: the settings are wrong, or it is a bug
            sentence = str(error) if isinstance(error, UserError) else config_sentence(error, list(words))
            if sentence is None:
                raise
            raise ConfigError(f"{label}: {sentence}; nothing is submitted" if several else sentence) from None
        folder = run_folder(cfg).absolute()
        if folder in points:
            raise ConfigError(
                f"{points[folder].label} and {label} have the same run folder, {folder}: give each one of its own with "
                "variant=NAME or name=NAME, or leave one out; nothing is submitted"
            )
        points[folder] = Point(label, composed, cfg, folder)
    return list(points.values())


def _active_jobs(cluster: str, records: Mapping[Path, Mapping[str, Any]]) -> dict[Path, JobState]:
    """Run folder -> state of its job that waits or runs. An earlier command may have used the other launcher."""
    active = {}
    for name in ("slurm", "local"):
        job_ids = {
            folder: record["job_id"]
            for folder, record in records.items()  # a done job stays in the queue for some seconds
            if record.get("cluster") == name and record.get("job_id") and record.get("state") != "done"
        }
        try:
            states = job_states(name, job_ids.values()) if job_ids else {}
        except UserError as error:
            if name == cluster:
                raise
            _say(f"{error}; jobs of {name} that earlier commands left here are taken to have ended")
            states = {}
        alive = {job_id: state for job_id, state in states.items() if state.alive}
        active |= {folder: alive[job_id] for folder, job_id in job_ids.items() if job_id in alive}
    return active


def _plan(cluster: str, points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """(points to submit, points whose job of an earlier command waits or runs); what is done is neither."""
    records = {point.folder: job_file.read(point.folder) for point in points}
    active = _active_jobs(cluster, records)
    waiting, running, done = [], [], 0
    for point in points:
        record = records[point.folder]
        if state := active.get(point.folder):
            if record.get("settings") != job_file.settings_fingerprint(point.cfg) or record["cluster"] != cluster:
                raise ConfigError(
                    f"{point.label}: job {record['job_id']} ({state.text}) works in {point.folder} with other settings"
                    f"{'' if record['cluster'] == cluster else ' or another launcher'}: cancel it, or give this one a "
                    "folder of its own with variant=NAME; nothing is submitted"
                )
            point.job_id, point.log, point.starts = record["job_id"], record.get("log", ""), record.get("starts", 0)
            running.append(point)
            _say(f"{point.job_id}  {point.label}  {state.text} since an earlier command; it is waited for")
        elif job_file.is_done(point.folder, point.cfg, record):
            point.result, point.job_id = record.get("result"), record.get("job_id", "")
            done += 1
            _say(f"done already: {point.label}  {point.folder}")
        else:
            waiting.append(point)
    if not waiting and not running:
        _say(f"nothing to submit: all {done} are done" if done > 1 else "nothing to submit: it is done")
    return waiting, running


def _job_name(points: Sequence[Point], sweep: str | None) -> str:
    """As `squeue` shows it: the sweep's file, or the experiment, with its variant where all points share one."""
    if sweep:
        return sweep
    experiments = dict.fromkeys(point.cfg.name for point in points)
    variants = dict.fromkeys(variant_name(point.cfg) for point in points)
    return "/".join(["+".join(experiments), *(variants if len(variants) == 1 else [])])


# -------------------------------------------------------------------------------------------------------------- at work


def _work(
    queue: SlurmQueue | LocalQueue,
    name: str,
    function: Callable[[DictConfig], Any],
    waiting: list[Point],
    running: list[Point],
) -> None:
    """Submit `waiting`, as many at once as the queue takes, and wait until nothing of it and of `running` is left."""
    total, ended, started, silent = len(waiting) + len(running), 0, time.monotonic(), False
    while waiting or running:
        if batch := waiting[: queue.room(len(running))]:
            _submit(queue, name, function, batch)
            running += batch
            del waiting[: len(batch)]
        try:
            states, silent = job_states(queue.cluster, [point.job_id for point in running]), False
        except UserError as error:  # a controller that is restarted: the jobs go on
            if not silent:
                _say(f"{error}; still waiting")
            states, silent = {point.job_id: JobState(True, "unknown") for point in running}, True
        for point in [point for point in running if _has_ended(point, states.get(point.job_id))]:
            running.remove(point)
            ended += 1
            outcome = "done" if point.reason is None else f"{point.reason}  (log: {point.log})"
            _say(f"{point.job_id}  {point.label}  {outcome}  [{ended} of {total}]")
        if waiting or running:  # often at first, then every half minute: a day of jobs is no load on the controller
            time.sleep(min(30.0, 1.0 + (time.monotonic() - started) / 60))


def _submit(
    queue: SlurmQueue | LocalQueue, name: str, function: Callable[[DictConfig], Any], points: Sequence[Point]
) -> None:
    places = []
    for point in points:
        point.folder.mkdir(parents=True, exist_ok=True)
        places.append(job_file.wandb_place(point.cfg, point.folder))
        record = {"cluster": queue.cluster, "job_id": "", "name": name, "overrides": point.label, "wandb": places[-1]}
        record |= {"state": "submitted", "starts": 0, "submitted": job_file.now()}
        record["settings"] = job_file.settings_fingerprint(point.cfg)
        record["inputs"] = job_file.inputs_fingerprint(point.cfg)
        job_file.write(point.folder, record)
    jobs = queue.submit([Job(function, point.composed, point.folder) for point in points], name)
    for point, place, job in zip(points, places, jobs, strict=True):
        point.job_id, point.log = job.job_id, str(job.paths.stdout)
        job_file.update(point.folder, job_id=point.job_id, log=point.log)
        _say(f"{point.job_id}  {name}  {point.label}\n    run folder  {point.folder}\n    log         {point.log}")
        if place:
            _say(f"    W&B         {place.get('url') or place.get('sync') or 'run ' + place['id']}")
    _say(f"{len(points)} submitted; to cancel: {queue.cancel_command([point.job_id for point in points])}")


def _has_ended(point: Point, state: JobState | None) -> bool:
    """Whether the job is over; sets what came of it. `state`: None where the queue does not know the job."""
    record = job_file.read(point.folder)
    record = record if record.get("job_id") == point.job_id else {}
    if record.get("state") == "done":
        point.result = record.get("result")
        return True
    starts = record.get("starts", 0)
    if starts > max(1, point.starts):
        _say(f"{point.job_id}  {point.label}  goes on after a stop, start {starts}")
    point.starts = max(point.starts, starts)
    if state and state.alive:
        point.missing_since = None
        return False
    point.missing_since = point.missing_since or time.monotonic()
    grace = LOST_JOB_S if state is None else RESULT_GRACE_S if state.text == "COMPLETED" else 0.0
    if time.monotonic() - point.missing_since < grace:
        return False
    point.reason, point.code = _failure(record, state)
    job_file.update(point.folder, state="cancelled" if point.reason == "cancelled" else "failed", reason=point.reason)
    return True


def _failure(record: Mapping[str, Any], state: JobState | None) -> tuple[str, int]:
    """(why a job failed, its exit code), by its job.json and by the queue."""
    if record.get("state") == "cancelled":
        return "cancelled", 1
    ending = state.text if state else "left the queue, and how it ended is not known"
    ending = "ended without a result" if ending == "COMPLETED" else ending
    reason = record.get("reason") if record.get("state") == "failed" else None
    if not reason:
        return ending, 1
    code = record.get("code", 1)
    if not record.get("follows"):
        return f"failed: {reason}", code
    # a killed process leaves no reason, and the queue knows more of it than the processes that lost it
    return f"{ending}; {reason}" if ending.startswith("failed") else ending, code


def interrupt_message(queue: SlurmQueue | LocalQueue, running: Sequence[Point]) -> str:
    """What Ctrl-C leaves behind. Jobs of this machine are stopped."""
    if isinstance(queue, LocalQueue):
        queue.stop()
        return "\nstopped, the jobs too; the same command goes on where they stopped"
    if not running:
        return "\nstopped; the same command goes on"
    command = queue.cancel_command([point.job_id for point in running])
    return (
        f"\nno longer waiting; {len(running)} jobs go on. To cancel them: {command}. The same command finds them again"
    )


def _job_return(point: Point) -> JobReturn:
    """For the sweeper; a failed job returned None, as with Hydra's own launcher."""
    returned = JobReturn(cfg=point.composed, status=JobStatus.COMPLETED)
    returned.return_value = point.result
    return returned


def _say(text: str) -> None:
    print(text, flush=True)
