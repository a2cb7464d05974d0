"""Sweeps as jobs of a real SLURM: submitted, followed, stopped and queued again, cancelled and killed."""

from __future__ import annotations

import math
import os
import re
import signal
import statistics
import subprocess
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from slurm_jobs import Sweep, job, job_ids, rows, scores, text_of, until, weights

if os.environ.get("CGTGAN_SLURM") != "1":
    pytest.skip("left out: the tests against a real SLURM (make test-slurm)", allow_module_level=True)


def steps(count: int) -> tuple[str, ...]:
    return (
        f"train.steps={count}",
        f"train.validate_every={count}",
        "train.checkpoint_every=100000",
        "train.checkpoint_minutes=null",
    )


def test_a_sweep_is_submitted_once_and_only_what_is_missing_again(sweep: Sweep) -> None:
    line = ("seed=0,1", "aggregation_t.t=80,120", "wandb=offline")
    code, printed = sweep(*line)
    assert code == 0, printed
    runs = sorted((sweep.root / "runs/demo_tiny").glob("*/seed=*"))
    assert [f"{run.parent.name.split('_')[1]} {run.name}" for run in runs] == [
        "t120 seed=0",
        "t120 seed=1",
        "t80 seed=0",
        "t80 seed=1",
    ]
    ids = job_ids(printed)
    assert ids == [f"{ids[0].split('_')[0]}_{i}" for i in range(4)]
    for run in runs:
        assert scores(run)["CIDEr"] >= 0
        made, stored = job(run), (run / "wandb_id.txt").read_text().strip()
        assert (made["state"], made["cluster"], made["starts"]) == ("done", "slurm", 1)
        assert made["job_id"] in ids
        assert f"run folder: {run}\n" in Path(made["log"]).read_text()
        assert made["wandb"]["id"] == stored
        assert list(run.glob(f"wandb/offline-run-*-{stored}"))
        for place in (run, made["log"], made["wandb"]["sync"]):
            assert f"  {place}\n" in printed
    assert text_of("sacct", "-X", "-n", "-P", "-o", "JobName", "-j", ids[0]).split() == ["demo_tiny"]
    assert [line.split("  ")[2] for line in printed.splitlines() if line.endswith(" of 4]")] == ["done"] * 4

    before = text_of("sacct", "-X", "-n", "-P", "-o", "JobID")
    code, printed = sweep(*line)
    assert code == 0
    assert printed.count("done already: ") == 4
    assert printed.endswith("nothing to submit: all 4 are done\n")
    assert text_of("sacct", "-X", "-n", "-P", "-o", "JobID") == before

    # what is no longer whole, and what is to be otherwise, is submitted again
    (runs[0] / "evaluation/test/cgtgan/scores.json").unlink()
    code, printed = sweep(*line, "decode.batch_size=128", "aggregation_t.t=80", "seed=0")
    assert code == 0, printed
    assert len(job_ids(printed)) == 1
    code, printed = sweep(*line)
    assert code == 0
    assert printed.count("done already: ") == 2
    assert len(job_ids(printed)) == 2
    assert scores(runs[0])["CIDEr"] >= 0


def test_processes_of_a_job_train_one_run(sweep: Sweep) -> None:
    """On one node and on two: the single run's scores, and its weights but for the order of sums."""
    kinds = {"one": (1, 1), "two": (1, 2), "nodes": (2, 1)}
    started = {
        name: sweep.start(
            f"name={name}", *steps(12), f"hydra.launcher.nodes={nodes}", f"hydra.launcher.tasks_per_node={tasks}"
        )
        for name, (nodes, tasks) in kinds.items()
    }
    for process in started.values():
        code, printed = sweep.wait(process)
        assert code == 0, printed
    single = weights(sweep.run("one"))
    for name in ("two", "nodes"):
        made = job(sweep.run(name))
        logs = [Path(made["log"].replace("_0_log", f"_{rank}_log")).read_text() for rank in (0, 1)]
        assert "global_rank=0(2)" in logs[0]
        assert f"node={'1(2)' if name == 'nodes' else '0(1)'}, global_rank=1(2)" in logs[1]
        assert scores(sweep.run(name)) == scores(sweep.run("one"))
        for key, value in weights(sweep.run(name)).items():
            torch.testing.assert_close(value, single[key], rtol=0, atol=1e-5)


def test_a_run_that_was_out_of_time_or_pre_empted_ends_as_if_it_had_not_been(sweep: Sweep) -> None:
    code, printed = sweep("name=speed", *steps(10), "train.log_every=1", "stage=train")
    assert code == 0, printed
    second = statistics.median(row["train/seconds"] for row in rows(sweep.run("speed")) if "train/seconds" in row)
    # longer than the 15 to 45 s after its start at which a job of a minute is told; three of them share two cores
    training = (
        *steps(math.ceil(40 / second)),
        "wandb=offline",
        "train.generator_optimizer.lr=1e-6",
        "train.log_every=1",
    )
    node = [f"hydra.launcher.nodelist=127.0.0.{number}" for number in (1, 2)]
    undisturbed = sweep.start("name=undisturbed", *training, node[0])
    timed_out = sweep.start(
        "name=timed_out", *training, node[0], "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=15"
    )
    pre_empted = sweep.start("name=pre_empted", *training, node[1], "hydra.launcher.partition=low")

    def folder(name: str) -> list[Path]:
        return list((sweep.root / "runs" / name).glob("*/seed=0"))

    until(lambda: folder("pre_empted") and len(rows(folder("pre_empted")[0])) > 3, "the first steps of training")
    ids = {name: (sweep.run(name) / "wandb_id.txt").read_text() for name in ("timed_out", "pre_empted")}
    other = (
        "--partition=main",
        "--nodelist=127.0.0.2",
        "--exclusive",
        f"--output={sweep.root}/other.txt",
        "--wrap=sleep 2",
    )
    subprocess.run(["sbatch", *other], check=True, capture_output=True)

    until(lambda: job(sweep.run("timed_out"))["starts"] == 2, "a second start")
    subprocess.run(["scontrol", "update", f"JobId={job(sweep.run('timed_out'))['job_id']}", "TimeLimit=60"], check=True)

    for process in (undisturbed, timed_out, pre_empted):
        code, printed = sweep.wait(process)
        assert code == 0, printed
        assert printed.count(" done  [1 of 1]") == 1
        assert ("goes on after a stop, start 2" in printed) == (process is not undisturbed)
    expected = weights(sweep.run("undisturbed"))
    for name, word in (("timed_out", "timed-out"), ("pre_empted", "preempted")):
        run = sweep.run(name)
        made = job(run)
        assert made["starts"] == 2
        assert f"this job is {word}" in Path(made["log"]).read_text()
        assert re.search(r"train: going on after step \d+ of", Path(made["log"]).read_text())
        states = ("sacct", "-X", "-D", "-n", "-P", "-o", "State", "-j", made["job_id"])
        until(lambda states=states: "RUNNING" not in text_of(*states), "the accounts")
        assert text_of(*states).split() == ["REQUEUED", "COMPLETED"]
        assert scores(run) == scores(sweep.run("undisturbed"))
        for key, value in weights(run).items():
            assert torch.equal(value, expected[key]), key
        assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(sweep.run("undisturbed"))]
        assert (run / "wandb_id.txt").read_text() == ids[name]
        assert {place.name.split("-")[-1] for place in run.glob("wandb/offline-run-*")} == {ids[name].strip()}


def test_what_fails_or_is_cancelled_takes_nothing_else_along(sweep: Sweep) -> None:
    sweepers = sweep.start("name=four", "seed=0,1,2", *steps(90))
    folder = sweep.root / "runs/four"
    until(lambda: sum(len(rows(run)) > 0 for run in folder.glob("*/seed=*")) == 3, "three jobs that train")
    runs = {seed: sweep.run("four", seed) for seed in (0, 1, 2)}
    subprocess.run(["scancel", job(runs[0])["job_id"]], check=True)
    os.kill(process_of(job(runs[1])["job_id"]), signal.SIGKILL)

    code, printed = sweep.wait(sweepers)
    assert code == 1
    ending = printed[printed.index("error: 2 failed:") :]
    assert f"  seed=0: cancelled  (log: {job(runs[0])['log']})\n" in ending
    assert (
        f"  seed=1: killed by SIGKILL: out of memory? hydra.launcher.mem_gb  (log: {job(runs[1])['log']})\n" in ending
    )
    assert scores(runs[2])["CIDEr"] >= 0
    assert {seed: job(run)["state"] for seed, run in runs.items()} == {0: "cancelled", 1: "failed", 2: "done"}

    # the same line: only those two, and a command that was interrupted finds their jobs again
    again = sweep.start("name=four", "seed=0,1,2", *steps(90))
    ids = until(lambda: job_ids(sweep.printed(again)), "the submission")
    assert len(ids) == 2
    again.send_signal(signal.SIGINT)
    code, printed = sweep.wait(again)
    assert code == 130
    array = ids[0].split("_")[0]
    assert printed.endswith(
        f"no longer waiting; 2 jobs go on. To cancel them: scancel {array}. The same command finds them again\n"
    )
    code, printed = sweep("name=four", "seed=0,1,2", *steps(95))
    assert code == 2
    assert f"job {array}_0 (" in printed
    assert "with other settings: cancel it" in printed
    code, printed = sweep("name=four", "seed=0,1,2", *steps(90))
    assert code == 0, printed
    assert printed.count("since an earlier command; it is waited for") == 2
    assert job_ids(printed) == []
    assert all(job(run)["state"] == "done" for run in runs.values())


def test_the_reason_of_a_stage_is_the_reason_of_the_job(sweep: Sweep) -> None:
    """Two processes cannot share one image: a sentence, and no other; a job beside it finishes."""
    sentence = "train.batch_size=1 in 1 parts is less than one image for each of 2 processes"
    code, printed = sweep(
        "name=reason", "train.batch_size=1,8", "hydra.launcher.tasks_per_node=2", "variant=b${train.batch_size}"
    )
    assert code == 1
    assert printed.count(f"failed: {sentence}") == 2  # as it ends, and in the list
    assert "Traceback" not in printed
    assert "error: 1 failed:" in printed
    for run in (sweep.root / "runs/reason/b1").glob("seed=*"):
        assert job(run)["reason"].startswith(f"failed: {sentence}")
        assert f"error: {sentence}" in Path(job(run)["log"]).read_text()
    assert scores(sweep.root / "runs/reason/b8/seed=0")["CIDEr"] >= 0


def process_of(job_id: str) -> int:
    """The Python process of a job on this machine."""
    array, _, task = job_id.partition("_")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            if b"submitit" in (folder / "cmdline").read_bytes() and b"python" in bytes((folder / "exe").readlink()):
                wanted = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
                if wanted <= set(variables):
                    return int(folder.name)
        except OSError:
            continue
    pytest.fail(f"no process of job {job_id}")


def test_no_more_jobs_run_at_once_than_were_asked_for(sweep: Sweep) -> None:
    code, printed = sweep("name=few", "seed=0,1", "stage=aggregate", "hydra.launcher.array_parallelism=1")
    assert code == 0, printed
    array = job_ids(printed)[0].split("_")[0]
    until(lambda: "Unknown" not in text_of("sacct", "-X", "-n", "-P", "-o", "Start,End", "-j", array), "the accounts")
    lines = text_of("sacct", "-X", "-n", "-P", "-o", "Start,End", "-j", array).split()
    spans = sorted(tuple(map(datetime.fromisoformat, line.split("|"))) for line in lines)
    assert len(spans) == 2
    for (_, end), (start, _) in pairwise(spans):
        assert start >= end, spans


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("seed=0,1", "train.batch_size=8,-3"),
            "error: seed=0 train.batch_size=-3: train.batch_size=-3 is not accepted",
        ),
        (("evaluate.split=val,test",), "have the same run folder, "),
        (("seed=0,1", "hydra.launcher.partition=nowhere"), "takes no job with these fields of hydra.launcher: "),
    ],
)
def test_a_wrong_point_is_refused_before_anything_is_submitted(
    sweep: Sweep, overrides: tuple[str, ...], sentence: str
) -> None:
    before = text_of("sacct", "-X", "-n", "-P", "-o", "JobID")
    code, printed = sweep("name=wrong", *overrides)
    assert code == 2
    assert sentence in printed
    assert len(printed.splitlines()) == 1
    assert text_of("sacct", "-X", "-n", "-P", "-o", "JobID") == before
