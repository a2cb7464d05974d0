"""Sweeps as jobs without SLURM: processes of this machine, what is refused, what is done already, and job.json."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cgtgan import cli
from cgtgan.config import Config, RewardTermConfig, WandbConfig
from cgtgan.errors import ConfigError, InputError
from cgtgan.launching import job_file
from cgtgan.launching.queues import open_queue

ROOT = Path(__file__).resolve().parents[2]
LOCAL_SWEEP = ("-m", "hydra/launcher=submitit_local", "experiment=demo_tiny", "threads=1", "wandb=disabled")


def local_sweep(
    cwd: Path, *overrides: str, program: tuple[str, ...] = (str(ROOT / "run.py"),)
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, *LOCAL_SWEEP, *overrides], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("program", [(str(ROOT / "run.py"),), ("-m", "cgtgan")])
def test_jobs_of_this_machine_end_each_for_itself(tmp_path: Path, program: tuple[str, ...]) -> None:
    """One job after the other scores a file of captions, which needs no model: one file is there, one is not."""
    references = {
        "images": [{"id": 1}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a red circle on a table"}],
    }
    (tmp_path / "references.json").write_text(json.dumps(references))
    (tmp_path / "good.json").write_text(json.dumps([{"image_id": 1, "caption": "a red circle"}]))
    points = (
        "captions=good.json,bad.json",
        "variant='${captions}'",
        "evaluate.references=references.json",
        "evaluate.metrics=[bleu]",
    )
    left = tmp_path / "runs/demo_tiny/good.json/seed=0"
    left.mkdir(parents=True)  # by a job of SLURM, of which nothing is known here
    job_file.write(left, {"cluster": "slurm", "job_id": "17", "state": "running", "starts": 1})
    done = local_sweep(tmp_path, "stage=evaluate", "hydra.launcher.array_parallelism=1", *points, program=program)
    assert done.returncode == 1, done.stdout + done.stderr
    good, bad = (next((tmp_path / "runs/demo_tiny").glob(f"{name}.json/seed=0/job.json")) for name in ("good", "bad"))
    made, failed = json.loads(good.read_text()), json.loads(bad.read_text())
    assert (made["state"], failed["state"]) == ("done", "failed")
    assert "captions=good.json  done  [" in done.stdout
    reason = failed["reason"]
    assert reason.startswith("failed: ")
    assert "bad.json" in reason
    assert done.stderr == f"error: 1 failed:\n  captions=bad.json: {reason}  (log: {failed['log']})\n"
    assert reason.removeprefix("failed: ") in Path(failed["log"]).read_text()
    assert (tmp_path / "good_scores").is_dir()


def test_ctrl_c_stops_the_jobs_which_write_their_checkpoints(tmp_path: Path) -> None:
    line = ("stage=train", "variant=x", "train.steps=100000", "train.checkpoint_every=100000")
    run = tmp_path / "runs/demo_tiny/x/seed=0"
    launcher = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *LOCAL_SWEEP, *line], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 180
        rows = run / "metrics.jsonl"
        while launcher.poll() is None and time.monotonic() < end:
            if rows.is_file() and '"step": 1,' in rows.read_text():
                break
            time.sleep(0.2)
        launcher.send_signal(signal.SIGINT)
        printed, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 130, printed
    record = job_file.read(run)
    assert record["state"] == "cancelled"
    assert not psutil.pid_exists(int(record["job_id"]))
    assert (run / "checkpoints/last/generator.safetensors").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("seed=0,1", "train.batch_size=8,-3"), "seed=0 train.batch_size=-3: train.batch_size=-3 is not accepted"),
        (("evaluate.split=val,test",), "evaluate.split=val and evaluate.split=test have the same run folder, "),
    ],
)
def test_a_wrong_sweep_is_refused_whole(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    done = local_sweep(tmp_path, *overrides)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.endswith("; nothing is submitted\n")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/demo_tiny"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks_per_node": 0}, "hydra.launcher.tasks_per_node=0 is not accepted: it must be 1 or more"),
        ({"array_parallelism": 0}, "hydra.launcher.array_parallelism=0 is not accepted: it must be 1 or more"),
        ({"mem_gb": 0.0}, "hydra.launcher.mem_gb=0.0 is not accepted: it must be above 0"),
        ({"signal_delay_s": -5}, "hydra.launcher.signal_delay_s=-5 is not accepted: it must be 0 or more"),
        ({"timeout_min": 2}, "hydra.launcher.signal_delay_s=120 and timeout_min=2 contradict each other: "),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, float], message: str) -> None:
    settings = {
        "array_parallelism": 2,
        "gpus_per_node": 0,
        "timeout_min": 60,
        "signal_delay_s": 120,
        "tasks_per_node": 1,
        "mem_gb": None,
    }
    open_queue("local", settings)
    with pytest.raises(ConfigError) as refused:
        open_queue("local", settings | fields)
    assert str(refused.value).startswith(message)


def test_a_launcher_without_a_sweep_is_not_passed_over_in_silence() -> None:
    assert cli.launcher_of_one(["experiment=demo", "hydra/launcher=slurm"]) == (
        "hydra/launcher=slurm is for several runs, or for one as a job: add -m"
    )
    for argv in (["-m", "hydra/launcher=slurm"], ["sweep=seeds", "hydra/launcher=slurm"], ["hydra/launcher=basic"]):
        assert cli.launcher_of_one(argv) is None
    assert cli.launcher_of_one(["--cfg", "job", "hydra/launcher=slurm"]) is None


# ------------------------------------------------------------------------------------------------------------- job.json


def finished(cfg: Config, folder: Path) -> dict[str, Any]:
    """A run folder with what a training leaves, and its job file."""
    (folder / "checkpoints/last").mkdir(parents=True)
    (folder / "checkpoints/last/generator.safetensors").write_bytes(b"weights")
    fingerprints = {"settings": job_file.settings_fingerprint(cfg), "inputs": job_file.inputs_fingerprint(cfg)}
    record = {"state": "done", "made": job_file.made(folder), **fingerprints}
    job_file.write(folder, record)
    return record


def test_done_is_what_was_made_with_these_settings_and_is_there(tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("a dog\n")
    cfg = Config(stage="train")
    cfg.corpus.path = str(text)
    record = finished(cfg, tmp_path / "run")
    assert job_file.is_done(tmp_path / "run", cfg, record)
    assert not job_file.is_done(tmp_path / "run", replace(cfg, seed=1), record)
    assert not job_file.is_done(tmp_path / "run", replace(cfg, stage="caption"), record)
    assert not job_file.is_done(tmp_path / "run", cfg, record | {"state": "failed"})
    assert not job_file.is_done(tmp_path / "run", cfg, record | {"made": {}})
    text.write_text("a dog\na cat\n")
    assert not job_file.is_done(tmp_path / "run", cfg, record)
    record["inputs"] = job_file.inputs_fingerprint(cfg)
    assert job_file.is_done(tmp_path / "run", cfg, record)
    (tmp_path / "run/checkpoints/last/generator.safetensors").write_bytes(b"half")
    assert not job_file.is_done(tmp_path / "run", cfg, record)


def test_inputs_do_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = job_file.inputs_fingerprint(Config())
    (tmp_path / "notes.txt").write_text("x")
    assert job_file.inputs_fingerprint(Config()) == before


@pytest.mark.parametrize("place", ["reader", "model", "metric", "term", "function"])
def test_own_code_is_an_input(tmp_path: Path, place: str) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def mine(*_):\n    return 0\n")
    spec, cfg = f"{code}:mine", Config()
    if place == "reader":
        cfg.dataset.reader = spec
    elif place == "model":
        cfg.clip_backbone.model = spec
    elif place == "metric":
        cfg.evaluate.metrics = ["bleu", spec]
    elif place == "term":
        cfg.reward_weights.terms = {spec: RewardTermConfig()}
    else:
        cfg.reward_weights.terms = {"mine": RewardTermConfig(function=spec)}
    before = job_file.inputs_fingerprint(cfg)
    assert job_file.inputs_fingerprint(cfg) == before
    code.write_text("def mine(*_):\n    return 1.5\n")
    assert job_file.inputs_fingerprint(cfg) != before


def test_the_first_reason_of_a_job_is_kept_unless_it_only_follows(tmp_path: Path) -> None:
    job_file.write(tmp_path, {"state": "running"})
    job_file.update_failed(tmp_path, "process 0 of 2 lost another one", 1, follows=True)
    job_file.update_failed(tmp_path, "no room on the disk", 2, follows=False)
    job_file.update_failed(tmp_path, "process 3 of 4 lost another one", 1, follows=True)
    job_file.update_failed(tmp_path, "another", 1, follows=False)
    record = job_file.read(tmp_path)
    assert (record["state"], record["reason"], record["code"]) == ("failed", "no room on the disk", 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"state": "done", "made": ["settings.json"]}', "is damaged, made is ['settings.json']"),
        ('{"job_id": 12}', "is damaged, job_id is 12"),
        ('{"starts": null}', "is damaged, starts is None"),
        ('{"state": "runn', "is not whole"),
        ("[1]", "holds no JSON object"),
    ],
)
def test_a_damaged_job_file_is_a_sentence(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "runs/demo_tiny/x/seed=0/job.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        job_file.read(path.parent)
    assert str(refused.value).startswith(f"{path} {problem}")
    assert ": delete it and run " in str(refused.value)


def test_a_damaged_job_file_ends_the_sweep_with_its_sentence(tmp_path: Path) -> None:
    path = tmp_path / "runs/demo_tiny/x/seed=0/job.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"state": "done", "made": ["settings.json"]}')
    done = local_sweep(tmp_path, "stage=train", "variant=x", "seed=0,1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {path} is damaged, made is ['settings.json']: delete it and run the same command again\n"
    )


def test_where_a_run_is_seen_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_ENTITY", "WANDB_BASE_URL", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "wandb_id.txt").write_text("0a1b2c3d\n")
    online = Config(stage="train", wandb=WandbConfig(mode="online", entity="lab", project="captions"))
    assert job_file.wandb_place(online, tmp_path) == {
        "id": "0a1b2c3d",
        "url": "https://wandb.ai/lab/captions/runs/0a1b2c3d",
    }
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.lab.org/")
    assert job_file.wandb_place(online, tmp_path) == {
        "id": "0a1b2c3d",
        "url": "https://wandb.lab.org/lab/captions/runs/0a1b2c3d",
    }
    online.wandb.entity = None
    assert job_file.wandb_place(online, tmp_path) == {"id": "0a1b2c3d"}
    offline = job_file.wandb_place(Config(stage="train"), tmp_path)
    assert offline == {"id": "0a1b2c3d", "sync": f"wandb sync --include-online {tmp_path / 'wandb'}"}
    blank = job_file.wandb_place(Config(stage="train"), tmp_path / "my runs")
    assert blank is not None
    assert shlex.split(blank["sync"])[-1] == str(tmp_path / "my runs/wandb")
    assert job_file.wandb_place(Config(stage="train", wandb=WandbConfig(mode="disabled")), tmp_path) is None
    fresh = job_file.wandb_place(Config(stage="train"), tmp_path / "other")
    assert fresh
    assert (tmp_path / "other/wandb_id.txt").read_text().strip() == fresh["id"]
