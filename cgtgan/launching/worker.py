"""Inside a job: one process of it, as submitit starts it. Ranks, signals, and how it ends.

A training that is asked to stop writes its checkpoint and raises `Stopped`; a time limit or a pre-emption then puts the job into the queue
again, where it goes on in the same run folder. Elsewhere the signal ends the process at once: whatever was made is kept.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from omegaconf import DictConfig, open_dict, read_write

from cgtgan import cli
from cgtgan.errors import OtherProcessLost, Stopped, UserError
from cgtgan.launching import job_file

_LAST_WORDS = 5.0  # seconds that a process which only lost another one leaves it to say why


def task_settings(composed: DictConfig) -> DictConfig:
    """Without Hydra's own part, as a task function expects them."""
    settings = copy.deepcopy(composed)
    with read_write(settings), open_dict(settings):
        settings.pop("hydra", None)
    return settings


@dataclass
class Job:
    """What is pickled for submitit: the task function, a point's settings with Hydra's own, and its run folder (absolute)."""

    function: Callable[[DictConfig], Any]
    composed: DictConfig
    folder: Path

    def checkpoint(self) -> Any:
        """What is queued again after a time-out or a pre-emption: the same; its state lies in the run folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> None:
        import submitit
        from hydra.core.hydra_config import HydraConfig

        here = submitit.JobEnvironment()
        if here.num_tasks > 1:
            # of the GPUs `Workspace.device` takes this rank's own, whether the scheduler shows it one or all
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        ending = _Ending(here, self.folder)
        if here.global_rank == 0:
            starts = job_file.read(self.folder).get("starts", 0) + 1
            job_file.update(self.folder, state="running", job_id=here.job_id, starts=starts, started=job_file.now())
        HydraConfig.instance().set_config(self.composed)
        try:
            result = self.function(task_settings(self.composed))
        except Stopped as stopped:
            if stopped.code - 128 in (ending.usual, signal.SIGTERM):
                ending.leave(stopped.code - 128)
            ending.fail(stopped)
        except Exception as error:
            ending.fail(error)
        if here.global_rank == 0:
            made = job_file.made(self.folder)
            value = result if isinstance(result, (int, float)) else None
            job_file.update(
                self.folder, state="done", reason=None, code=0, result=value, made=made, ended=job_file.now()
            )


class _Ending:
    """How this process ends when it is told to, or fails. Takes the signals over from submitit, whose own handler queues a job again."""

    def __init__(self, here: Any, folder: Path):
        self.here, self.folder, self.process = here, folder, os.getpid()
        self.usual = int(here._usr_sig())  # SIGUSR2: the time is nearly up, or another job takes the place
        self.queue_again = signal.getsignal(self.usual)
        self.leaving = False
        for number in (self.usual, signal.SIGTERM):
            signal.signal(number, self._told)

    def _told(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked child: it has no say in the job
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not self.leaving:
            self.leave(number)

    def leave(self, number: int) -> NoReturn:
        """End this process so that the job goes on later, unless it was cancelled. The first process speaks for all."""
        self.leaving = True
        if self.here.global_rank:
            raise SystemExit(0)  # any other code could end the first process before it has spoken
        why = "queue" if number == self.usual else self._why_terminated()
        if why == "queue":
            try:
                job_file.update(self.folder, state="queued again")
                assert callable(self.queue_again)
                self.queue_again(self.usual, None)  # asks SLURM, and exits
            except Exception as error:  # too many time-outs, or SLURM does not take it
                self.fail(UserError(f"stopped, and not queued again: {error}"))
        if why == "requeued":
            job_file.update(self.folder, state="queued again")
        elif why == "cancelled":
            job_file.update(self.folder, state="cancelled", ended=job_file.now())
        else:
            job_file.update_failed(self.folder, f"ended by {signal.Signals(number).name}", 128 + number, follows=True)
        raise SystemExit(128 + number)

    def _why_terminated(self) -> str:
        """SIGTERM comes to a job that is cancelled, that SLURM queues again by itself, that is given its grace before it must make way
        (it then queues itself again, or SLURM takes its end for the job's), or out of its time; and from whoever else."""
        if self.here.cluster != "slurm":
            return "cancelled"
        try:
            command = ["scontrol", "--oneliner", "show", "job", self.here.raw_job_id]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        fields = dict(re.findall(r"(\w+)=(\S+)", shown))
        state = fields.get("JobState", "")
        if state == "CANCELLED":
            return "cancelled"
        if state == "TIMEOUT":
            return "queue"
        if state == "RUNNING":
            # of the same form, so that the later is the greater; of an earlier start it does not count
            preempted = fields.get("PreemptTime", "None")
            return (
                "queue"
                if preempted not in ("None", "Unknown") and preempted >= fields.get("StartTime", "")
                else "unknown"
            )
        return "requeued" if state else "unknown"

    def fail(self, error: Exception) -> NoReturn:
        """Say why, on stderr and in job.json, and end with the exit code."""
        self.leaving = True
        code = cli.report_failure(error, ["a job"])
        lost = isinstance(error, OtherProcessLost)
        job_file.update_failed(self.folder, cli.in_a_sentence(error), code, follows=lost)
        if lost:
            time.sleep(_LAST_WORDS)
        raise SystemExit(code)
