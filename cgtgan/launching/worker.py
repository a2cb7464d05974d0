"""Inside a job: one process of it, as submitit starts it. Its rank, its signals, and how it ends.

A training that is asked to stop writes its checkpoint and raises `Stopped`. At a time limit or a pre-emption the job is
then queued again and goes on in the same run folder. Other stages end at once: what is made is kept.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import submitit
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from cgtgan import cli
from cgtgan.errors import OtherProcessLost, Stopped, UserError
from cgtgan.launching import job_file
from cgtgan.launching.queues import slurm_command

OTHER_REASON_S = 5.0  # a process that ends because another one is lost waits so long for that one's reason


def task_settings(composed: DictConfig) -> DictConfig:
    """The settings without Hydra's own, as a task function expects them."""
    settings = copy.deepcopy(composed)
    with read_write(settings), open_dict(settings):
        settings.pop("hydra", None)
    return settings


@dataclass
class Job(submitit.helpers.Checkpointable):
    """What submitit pickles: the task function, a point's settings with Hydra's own, and its run folder (absolute).

    Queued again it is the same: its state is in the run folder.
    """

    function: Callable[[DictConfig], Any]
    composed: DictConfig
    folder: Path

    def __call__(self) -> None:
        environment = submitit.JobEnvironment()
        if environment.num_tasks > 1:
            # `Workspace.device` takes this rank's GPU, whether the scheduler shows the process one or all
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        process = _JobProcess(environment, self.folder)
        if environment.global_rank == 0:
            starts = job_file.read(self.folder).get("starts", 0) + 1
            running = {"state": "running", "job_id": environment.job_id, "starts": starts, "started": job_file.now()}
            job_file.update(self.folder, **running)
        HydraConfig.instance().set_config(self.composed)
        try:
            result = self.function(task_settings(self.composed))
        except Stopped as stopped:
            if stopped.code - 128 in (process.requeue_signal, signal.SIGTERM):
                process.leave(stopped.code - 128)
            process.fail(stopped)
        except Exception as error:  # whatever it is, the launching command must learn it
            process.fail(error)
        if environment.global_rank == 0:
            made = job_file.made(self.folder)
            result = result if isinstance(result, int | float) else None
            job_file.update(
                self.folder, state="done", reason=None, code=0, result=result, made=made, ended=job_file.now()
            )


class _JobProcess:
    """How this process ends when a signal asks it to, or when it fails. Takes the signals over from submitit."""

    def __init__(self, environment: submitit.JobEnvironment, folder: Path):
        self.environment, self.folder, self.pid = environment, folder, os.getpid()
        # SIGUSR2 unless configured otherwise: the time is nearly up, or another job takes the place
        self.requeue_signal = signal.Signals[f"SIG{environment.USR_SIG}"]
        self.requeue = signal.getsignal(self.requeue_signal)  # submitit's handler
        self.leaving = False
        for number in (self.requeue_signal, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a forked child does not decide for the job
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not self.leaving:
            self.leave(number)

    def leave(self, number: int) -> NoReturn:
        """End this process so that the job goes on later, unless it was cancelled. The first process acts for all."""
        self.leaving = True
        if self.environment.global_rank:
            raise SystemExit(0)  # any other code could end the first process before it has acted
        cause = "requeue" if number == self.requeue_signal else self._cause_of_sigterm()
        if cause == "requeue":
            try:
                job_file.update(self.folder, state="queued again")
                assert callable(self.requeue)
                self.requeue(self.requeue_signal, None)  # asks SLURM, and exits
            except Exception as error:  # submitit: out of time too often; SLURM: any refusal
                self.fail(UserError(f"stopped, and not queued again: {error}"))
        if cause == "requeued":
            job_file.update(self.folder, state="queued again")
        elif cause == "cancelled":
            job_file.update(self.folder, state="cancelled", ended=job_file.now())
        else:
            job_file.update_failed(self.folder, f"ended by {signal.Signals(number).name}", 128 + number, follows=True)
        raise SystemExit(128 + number)

    def _cause_of_sigterm(self) -> str:
        """cancelled; requeue (out of time, or soon to be pre-empted); requeued (SLURM does it by itself); unknown."""
        if self.environment.cluster != "slurm":
            return "cancelled"
        try:
            text = slurm_command("scontrol", "--oneliner", "show", "job", self.environment.raw_job_id)
        except UserError:
            return "unknown"
        job = dict(re.findall(r"(\w+)=(\S+)", text))
        state, preempted = job.get("JobState", ""), job.get("PreemptTime", "None")
        if state == "RUNNING":
            # times in one format compare as text; a pre-emption of an earlier start does not count
            soon = preempted not in ("None", "Unknown") and preempted >= job.get("StartTime", "")
            return "requeue" if soon else "unknown"
        return {"CANCELLED": "cancelled", "TIMEOUT": "requeue", "": "unknown"}.get(state, "requeued")

    def fail(self, error: Exception) -> NoReturn:
        """Write the reason to stderr and job.json, and end with the exit code."""
        self.leaving = True
        code = cli.report_failure(error, ["a job"])
        lost = isinstance(error, OtherProcessLost)
        job_file.update_failed(self.folder, cli.in_a_sentence(error), code, follows=lost)
        if lost:
            time.sleep(OTHER_REASON_S)
        raise SystemExit(code)
