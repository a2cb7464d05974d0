"""Where jobs run: SLURM, or processes of this machine. Each submits through submitit, says which jobs are alive, and how one ended."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cgtgan.cli import ConfigError
from cgtgan.errors import UserError
from cgtgan.launching.worker import Job


@dataclass(frozen=True)
class Submitted:
    """`log`: what the first process of the job prints."""

    job_id: str
    log: Path


class Queue(Protocol):
    cluster: str

    @property
    def at_once(self) -> int | None:
        """How many jobs may be handed over at a time; None: all, the queue keeps its own limit."""
        ...

    def submit(self, jobs: Sequence[Job], name: str) -> list[Submitted]: ...
    def alive(self, job_ids: Iterable[str]) -> dict[str, str]:
        """Those that wait or run, and in which state."""
        ...

    def ended(self, job_id: str) -> str | None:
        """How a job that is not alive ended, in words; "COMPLETED" if well; None while nothing is known yet."""
        ...

    def cancel_hint(self, job_ids: Sequence[str]) -> str: ...


def open_queue(cluster: str, settings: Mapping[str, Any]) -> Queue:
    """`settings`: the fields of conf/hydra/launcher/<...>.yaml.

    Raises `ConfigError` for a field out of range, and where submitit or SLURM's commands are missing.
    """
    _check(settings)
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ConfigError(
            "hydra/launcher needs the extra `slurm`, which is not installed: pip install -e '.[slurm]'"
        ) from None
    root = str(Path(__file__).resolve().parents[2])  # a job must find this package, wherever it was started
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, known)])
    return Slurm(settings) if cluster == "slurm" else Local(settings)


_LEAST = {
    "nodes": 1,
    "tasks_per_node": 1,
    "array_parallelism": 1,
    "timeout_min": 1,
    "cpus_per_task": 1,
    "mem_gb": 0.001,
}
_LEAST |= {"gpus_per_node": 0, "signal_delay_s": 0, "max_num_timeout": 0}


def _check(settings: Mapping[str, Any]) -> None:
    for name, least in _LEAST.items():
        value = settings.get(name)
        if value is not None and value < least:
            wanted = "above 0" if name == "mem_gb" else f"{least} or more"
            raise ConfigError(f"hydra.launcher.{name}={value} is not accepted: it must be {wanted}")
    delay, limit = settings.get("signal_delay_s", 0), settings.get("timeout_min")
    if limit is not None and delay >= 60 * limit:
        raise ConfigError(
            f"hydra.launcher.signal_delay_s={delay} and timeout_min={limit} contradict each other: a job would be told to stop before it "
            "has begun; keep the delay 30 s below the limit"
        )


def _said(error: Exception) -> str:
    """The last line that a command wrote, without its own name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line] or lines or [type(error).__name__]
    return re.sub(r"^\w+: (fatal|error): ", "", told[-1])


# -------------------------------------------------------------------------------------------------------------------- SLURM

_NOT_THE_END = (
    "PENDING",
    "RUNNING",
    "REQUEUED",
    "COMPLETING",
    "CONFIGURING",
    "RESIZING",
    "SUSPENDED",
    "STOPPED",
    "STAGE_OUT",
    "SIGNALING",
)
_SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout")
_OURS = ("name", "submitit_folder", "max_num_timeout", "additional_parameters", *_SHARED)


class Slurm:
    cluster = "slurm"
    at_once = None

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        if shutil.which("srun") is None or shutil.which("sbatch") is None:
            raise ConfigError(
                "hydra/launcher=slurm finds no `srun`: start it where SLURM's commands are, or use hydra/launcher=submitit_local"
            )

    def submit(self, jobs: Sequence[Job], name: str) -> list[Submitted]:
        """One array; a single job is none. Raises `ConfigError` with what sbatch says where it refuses."""
        import submitit
        from submitit.core.utils import FailedJobError

        s = self.settings
        parameters = {key: s[key] for key in _SHARED} | {
            f"slurm_{key}": value for key, value in s.items() if key not in _OURS
        }
        parameters = {key: value for key, value in parameters.items() if value is not None}
        # queued again whatever the cluster's default is; and a process that dies takes the others of its job along
        parameters["slurm_additional_parameters"] = {"requeue": True, **(s["additional_parameters"] or {})}
        parameters["slurm_srun_args"] = ["--kill-on-bad-exit=1"]
        executor = submitit.AutoExecutor(
            s["submitit_folder"], cluster="slurm", slurm_max_num_timeout=s["max_num_timeout"]
        )
        executor.update_parameters(name=name, **parameters)
        try:
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what it also raises
                submitted = [executor.submit(job) for job in jobs]
        except (FailedJobError, subprocess.CalledProcessError) as error:
            raise ConfigError(f"SLURM takes no job with these fields of hydra.launcher: {_said(error)}") from None
        return [Submitted(job.job_id, job.paths.stdout) for job in submitted]

    def alive(self, job_ids: Iterable[str]) -> dict[str, str]:
        lines = _run("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T").splitlines()
        found = dict(line.split(maxsplit=1) for line in lines if " " in line)
        return {job_id: found[job_id] for job_id in job_ids if job_id in found}

    def ended(self, job_id: str) -> str | None:
        try:
            rows = [
                row.split("|")
                for row in _run("sacct", "-n", "-P", f"--jobs={job_id}", "--format=State,ExitCode").splitlines()
            ]
            state, code = rows[0] if rows else ("", "")
            # of the steps, whether a signal ended a process: the job itself only has srun's exit code
            code = next(
                (
                    step[1]
                    for step in rows
                    if not step[1].endswith(":0") and step[0].startswith(("FAILED", "CANCELLED"))
                ),
                code,
            )
        except UserError:  # no accounting: the controller knows for some minutes
            try:
                shown = dict(re.findall(r"(\w+)=(\S+)", _run("scontrol", "--oneliner", "show", "job", job_id)))
            except UserError:
                return "SLURM does not know it any more"
            state, code = shown.get("JobState", ""), shown.get("ExitCode", "")
        words = state.split()  # "CANCELLED by 1000"
        if not words or words[0] in _NOT_THE_END:
            return None
        return {
            "FAILED": _exit_in_words(code),
            "OUT_OF_MEMORY": "out of memory: raise hydra.launcher.mem_gb",
            "TIMEOUT": "out of time, and it could not be queued again in time: raise hydra.launcher.signal_delay_s",
            "CANCELLED": "cancelled",
        }.get(words[0], words[0])

    def cancel_hint(self, job_ids: Sequence[str]) -> str:
        return "scancel " + " ".join(dict.fromkeys(job_id.split("_")[0] for job_id in job_ids))


def _exit_in_words(code: str) -> str:
    status, _, number = code.partition(":")
    killed = (
        int(number)
        if number.isdigit() and int(number)
        else int(status) - 128
        if status.isdigit() and int(status) > 128
        else 0
    )
    if killed in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGTERM):
        hint = ": for want of memory? hydra.launcher.mem_gb" if killed == signal.SIGKILL else ""
        return f"killed by {signal.Signals(killed).name}{hint}"
    return f"failed with exit code {status}"


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} does not answer: {error}") from None
    if done.returncode:
        raise UserError(f"{command[0]} fails: {_said(Exception(done.stderr))}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------------- this machine


_STOP_SECONDS = 30.0


class Local:
    """Processes of this machine, `array_parallelism` at once, each with GPUs of its own if there are any to give."""

    cluster = "local"

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        self.at_once = max(1, settings["array_parallelism"])
        self.gpus = settings["gpus_per_node"] or 0
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        wanted = self.gpus * self.at_once
        self.cards = [int(c) for c in given.split(",")] if re.fullmatch(r"\d+(,\d+)*", given) else list(range(wanted))
        if wanted > len(self.cards):
            raise ConfigError(
                f"hydra.launcher.array_parallelism={self.at_once} jobs of gpus_per_node={self.gpus} want more "
                f"than CUDA_VISIBLE_DEVICES={given}"
            )
        self._jobs: dict[str, Any] = {}
        self._places: dict[int, str] = {}  # place of `array_parallelism` -> job

    def submit(self, jobs: Sequence[Job], name: str) -> list[Submitted]:
        from submitit.local.local import LocalExecutor

        s, submitted = self.settings, []
        for job in jobs:
            alive = self.alive(self._places.values())
            place = next(i for i in range(self.at_once) if self._places.get(i) not in alive)
            executor = LocalExecutor(s["submitit_folder"], max_num_timeout=s["max_num_timeout"])
            executor.update_parameters(
                timeout_min=s["timeout_min"], tasks_per_node=s["tasks_per_node"], gpus_per_node=self.gpus, stderr_to_stdout=True,
                signal_delay_s=s["signal_delay_s"], visible_gpus=self.cards[place * self.gpus : (place + 1) * self.gpus],
            )  # fmt: skip
            # Ctrl-C is for the launching command, which then ends the jobs in order (`stop`)
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                started: Any = executor.submit(job)
            finally:
                signal.signal(signal.SIGINT, before)
            self._jobs[started.job_id], self._places[place] = started, started.job_id
            submitted.append(Submitted(started.job_id, started.paths.stdout))
        return submitted

    def alive(self, job_ids: Iterable[str]) -> dict[str, str]:
        return {job_id: "RUNNING" for job_id in job_ids if self._is_alive(job_id)}

    def _is_alive(self, job_id: str) -> bool:
        if job_id in self._jobs:
            return not self._jobs[job_id].done()
        try:  # started by an earlier command; its number may be another process's by now
            return b"submitit.local._local" in Path(f"/proc/{job_id}/cmdline").read_bytes()
        except OSError:
            return False

    def ended(self, job_id: str) -> str | None:
        return "ended without a word: killed, or out of time"

    def cancel_hint(self, job_ids: Sequence[str]) -> str:
        return "kill " + " ".join(job_ids)

    def stop(self) -> None:
        """End the jobs as `kill` does, and wait a while for the checkpoint of those that train."""
        left = [job_id for job_id in self._jobs if self._is_alive(job_id)]
        for job_id in left:
            os.kill(int(job_id), signal.SIGTERM)
        end = time.monotonic() + _STOP_SECONDS
        while self.alive(left) and time.monotonic() < end:
            time.sleep(0.2)
