"""Where jobs run: SLURM, or processes of this machine. Both submit through submitit."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import submitit

from cgtgan.errors import ConfigError, UserError

STOP_S = 30.0  # after Ctrl-C: time for jobs of this machine to write their checkpoints


@dataclass(frozen=True)
class JobState:
    """`alive`: the job waits or runs. `text`: its state in the queue, or how it ended, COMPLETED if well."""

    alive: bool
    text: str


def open_queue(cluster: str, fields: Mapping[str, Any]) -> SlurmQueue | LocalQueue:
    """`cluster`: slurm or local; `fields`: those of hydra.launcher. Raises `ConfigError` for a field out of range."""
    _check(fields)
    root = Path(__file__).resolve().parents[2]
    if (root / "run.py").is_file():  # a checkout, which need not be installed: jobs must find the package
        paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return SlurmQueue(fields) if cluster == "slurm" else LocalQueue(fields)


_MINIMA = {
    **dict.fromkeys(("nodes", "tasks_per_node", "array_parallelism", "timeout_min", "cpus_per_task"), 1),
    **dict.fromkeys(("gpus_per_node", "signal_delay_s", "max_num_timeout"), 0),
}


def _check(fields: Mapping[str, Any]) -> None:
    for name, minimum in _MINIMA.items():
        if (value := fields.get(name)) is not None and value < minimum:
            raise ConfigError(f"hydra.launcher.{name}={value} is not accepted: it must be {minimum} or more")
    if (memory := fields.get("mem_gb")) is not None and memory <= 0:
        raise ConfigError(f"hydra.launcher.mem_gb={memory} is not accepted: it must be above 0")
    delay, limit = fields["signal_delay_s"], fields["timeout_min"]
    if delay >= 60 * limit:
        raise ConfigError(
            f"hydra.launcher.signal_delay_s={delay} and timeout_min={limit} contradict each other: a job would be told "
            "to stop before it has begun; keep the delay 30 s below the limit"
        )


def job_states(cluster: str, job_ids: Iterable[str]) -> dict[str, JobState]:
    """The state of the jobs that the queue knows. Raises `UserError` where SLURM does not answer."""
    if cluster == "local":
        ended = JobState(False, "ended without a result: killed, or out of time")
        return {job_id: JobState(True, "RUNNING") if _is_process(job_id) else ended for job_id in job_ids}
    states = _slurm_states() if shutil.which("squeue") else {}
    return {job_id: states[job_id] for job_id in job_ids if job_id in states}


# ---------------------------------------------------------------------------------------------------------------- SLURM

_IN_WORDS = {
    "CANCELLED": "cancelled",
    "OUT_OF_MEMORY": "out of memory: raise hydra.launcher.mem_gb",
    "TIMEOUT": "out of time, and it could not be queued again in time: raise hydra.launcher.signal_delay_s",
}
_ENDED = {"COMPLETED", "FAILED", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", *_IN_WORDS}
# Fields that submitit knows for every cluster, and those that are not for sbatch as they are. The others are SLURM's.
_GENERAL = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout")
_NOT_SBATCH = ("name", "submitit_folder", "max_num_timeout", "additional_parameters")


class SlurmQueue:
    cluster = "slurm"

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = fields
        if shutil.which("srun") is None or shutil.which("sbatch") is None:
            raise ConfigError(
                "hydra/launcher=slurm finds no `srun`: start it where SLURM's commands are, or use "
                "hydra/launcher=submitit_local"
            )

    def room(self, _running: int) -> None:
        """No limit here: the job array has one (`array_parallelism`)."""

    def submit(self, jobs: Sequence[Callable[[], Any]], name: str) -> list[submitit.Job[Any]]:
        """One job array; a single job is none. Raises `ConfigError` with sbatch's reason where it refuses."""
        parameters = {
            key if key in _GENERAL else f"slurm_{key}": value
            for key, value in self.fields.items()
            if value is not None and key not in _NOT_SBATCH
        }
        # Queued again whatever the cluster's default is; a process that dies ends the others of its job.
        parameters["slurm_additional_parameters"] = {"requeue": True, **(self.fields["additional_parameters"] or {})}
        parameters["slurm_srun_args"] = ["--kill-on-bad-exit=1"]
        folder, restarts = self.fields["submitit_folder"], self.fields["max_num_timeout"]
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=restarts)
        executor.update_parameters(name=name, **parameters)
        try:
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what it also raises
                return [executor.submit(job) for job in jobs]
        except (RuntimeError, subprocess.CalledProcessError) as error:
            reason = _last_error(str(error))
            raise ConfigError(f"SLURM takes no job with these fields of hydra.launcher: {reason}") from None

    def cancel_command(self, job_ids: Sequence[str]) -> str:
        return "scancel " + " ".join(dict.fromkeys(job_id.split("_")[0] for job_id in job_ids))


def slurm_command(*command: str) -> str:
    """What a command of SLURM prints. Raises `UserError` where it fails or does not answer within a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} does not answer: {error}") from None
    if done.returncode:
        raise UserError(f"{command[0]} fails: {_last_error(done.stderr)}")
    return done.stdout


def _last_error(text: str) -> str:
    """The last line of a command's errors, without the command's name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    errors = [line for line in lines if "error:" in line] or lines
    return re.sub(r"^\w+: (fatal|error): ", "", errors[-1])


def _slurm_states() -> dict[str, JobState]:
    """The user's jobs. SLURM keeps an ended job for some minutes (MinJobAge), with or without accounting."""
    columns = "--Format=JobArrayID:40,State:30,exit_code:20"
    text = slurm_command("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", columns)
    states = {}
    for job_id, state, status in (line.split() for line in text.splitlines() if len(line.split()) == 3):
        words = _exit_in_words(int(status)) if state == "FAILED" else _IN_WORDS.get(state, state)
        states[job_id] = JobState(state not in _ENDED, words)
    return states


def _exit_in_words(status: int) -> str:
    """`status` as `wait` gives it; srun turns a signal into the exit code 128 + signal."""
    code, number = status >> 8, status & 127
    number = number or code - 128
    if number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGTERM):
        hint = ": out of memory? hydra.launcher.mem_gb" if number == signal.SIGKILL else ""
        return f"killed by {signal.Signals(number).name}{hint}"
    return f"failed with exit code {code}"


# --------------------------------------------------------------------------------------------------------- this machine


class LocalQueue:
    """Processes of this machine, `array_parallelism` at once, each with `gpus_per_node` GPUs of its own."""

    cluster = "local"

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = fields
        self.at_once, self.gpus = fields["array_parallelism"], fields["gpus_per_node"] or 0
        visible, needed = os.environ.get("CUDA_VISIBLE_DEVICES", ""), self.at_once * self.gpus
        numbered = re.fullmatch(r"\d+(,\d+)*", visible)
        self.visible_gpus = [int(number) for number in visible.split(",")] if numbered else list(range(needed))
        if needed > len(self.visible_gpus):
            raise ConfigError(
                f"hydra.launcher.array_parallelism={self.at_once} jobs of gpus_per_node={self.gpus} want more "
                f"than CUDA_VISIBLE_DEVICES={visible}"
            )
        self.jobs: dict[int, submitit.Job[Any]] = {}  # the latest of each of the `array_parallelism` slots

    def _free_slots(self) -> list[int]:
        return [slot for slot in range(self.at_once) if slot not in self.jobs or self.jobs[slot].done()]

    def room(self, running: int) -> int:
        """How many jobs may start now. `running`: jobs that are waited for, those of an earlier command too."""
        return max(0, min(len(self._free_slots()), self.at_once - running))

    def submit(self, jobs: Sequence[Callable[[], Any]], name: str) -> list[submitit.Job[Any]]:
        """At most `room` jobs."""
        fields, started = self.fields, []
        names = ("timeout_min", "tasks_per_node", "signal_delay_s")
        parameters = {name: fields[name] for name in names} | {"gpus_per_node": self.gpus, "stderr_to_stdout": True}
        for slot, job in zip(self._free_slots(), jobs, strict=False):
            executor = submitit.LocalExecutor(fields["submitit_folder"], max_num_timeout=fields["max_num_timeout"])
            gpus = self.visible_gpus[slot * self.gpus : (slot + 1) * self.gpus]
            executor.update_parameters(visible_gpus=gpus, **parameters)
            # Ctrl-C is for the launching command, which then ends the jobs with `stop`.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                self.jobs[slot] = executor.submit(job)
            finally:
                signal.signal(signal.SIGINT, before)
            started.append(self.jobs[slot])
        return started

    def stop(self) -> None:
        """End the jobs as `kill` does, and wait for the checkpoints of those that train."""
        processes = [psutil.Process(int(job.job_id)) for job in self.jobs.values() if not job.done()]
        for process in processes:
            process.terminate()
        psutil.wait_procs(processes, timeout=STOP_S)

    def cancel_command(self, job_ids: Sequence[str]) -> str:
        return "kill " + " ".join(job_ids)


def _is_process(job_id: str) -> bool:
    """Whether the process of a job still runs here; its number may be another process's by now."""
    try:
        return any("submitit" in word for word in psutil.Process(int(job_id)).cmdline())
    except (psutil.Error, ValueError):
        return False
