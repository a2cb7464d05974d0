"""GAN training as a job on the tiny demo world: stopped by signals and time, damaged on disk, on two processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.killed_update import killed_in_step
from tests.program import Program, run_program

ROOT = Path(__file__).parents[2]
STEPS = 20
CLOCK = ("time/", "memory/", "train/seconds", "train/images_per_second")


def command(home: Path, *overrides: str, processes: int = 1) -> list[str]:
    start = [sys.executable] if processes == 1 else [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *("--log-dir", str(home / "torchrun")),  # by default a folder in /tmp, which it leaves there
    ]  # fmt: skip
    settings = (
        "experiment=demo_tiny",
        "stage=train",
        "threads=1",
        "wandb=disabled",
        f"train.steps={STEPS}",
        "train.validate_every=5",
    )
    return [
        *start,
        str(ROOT / "run.py"),
        *settings,
        f"artifacts_dir={home / 'artifacts'}",
        f"runs_dir={home / 'runs'}",
        *overrides,
    ]


def run(home: Path, *overrides: str, code: int = 0, processes: int = 1) -> str:
    if processes == 1:
        done = run_program(command(home, *overrides), cwd=home)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr
    with socket_port() as port:
        places = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        places["MASTER_PORT"] = str(port)
    each = [os.environ | places | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
    jobs = [Program(command(home, *overrides), cwd=home, env=environment) for environment in each]
    output = "".join(job.communicate()[0] for job in jobs)
    assert {job.returncode for job in jobs} == {code}, output
    return output


def run_folder(home: Path) -> Path:
    (folder,) = (home / "runs" / "demo_tiny").glob("*/seed=0")
    return folder


def metrics(home: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_folder(home) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def results(home: Path) -> dict[str, Any]:
    """Everything that must not depend on how the job went: weights, optimisers, metrics, validation captions."""
    folder = run_folder(home)
    found: dict[str, Any] = {"metrics": metrics(home)}
    for link in ("last", "best"):
        checkpoint = folder / "checkpoints" / link
        found[link] = (checkpoint.readlink().name, (checkpoint / "generator.safetensors").read_bytes())
        found[f"{link} state"] = {
            k: v.tolist() for k, v in load_file(checkpoint / "training.safetensors").items() if "rng" not in k
        }
    for captions in sorted((folder / "validation").glob("*.json")):
        found[captions.name] = captions.read_text()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home where training ran undisturbed."""
    home = tmp_path_factory.mktemp("whole")
    run(home)
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    """A new home with the artifacts of the other, but no run."""
    shutil.copytree(whole / "artifacts", tmp_path / "artifacts")
    return tmp_path


def started(home: Path, *overrides: str, rows: int, processes: int = 1) -> subprocess.Popen[str] | Program:
    """A job that has logged some rows and is still at work."""
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    words = command(home, *overrides, processes=processes)
    job = Program(words, cwd=home) if processes == 1 else subprocess.Popen(words, cwd=home, **pipes)
    deadline = time.monotonic() + 200
    while not any(len(f.read_text().splitlines()) >= rows for f in home.glob("runs/demo_tiny/*/seed=0/metrics.jsonl")):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return job


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(
    whole: Path, home: Path, which: signal.Signals
) -> None:
    job = started(home, "train.checkpoint_every=1000", rows=4)
    job.send_signal(which)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 128 + which, output
    assert f"received {which.name}: stopped after step" in output
    assert "Traceback" not in output
    (state,) = run_folder(home).glob("checkpoints/step_*")
    assert 4 <= int(state.name[5:]) < STEPS
    assert f"going on after step {int(state.name[5:])}" in run(home, "train.checkpoint_every=1000")
    assert results(home) == results(whole)


def test_a_time_limit_stops_again_and_again_and_ends_in_the_same_place(whole: Path, home: Path) -> None:
    for step in (1, 2, 3):
        done = run_program(command(home, "train.max_minutes=1e-6"), cwd=home)
        assert done.returncode == 75, done.stderr
        assert f"the time limit is reached: stopped after step {step} of {STEPS}" in done.stderr
    run(home)
    assert results(home) == results(whole)
    rows = [json.loads(line) for line in (run_folder(home) / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["train/seconds_total"] for row in rows if "train/seconds_total" in row]
    assert len(seconds) == STEPS  # once per step, validated or not
    assert all(earlier < later for earlier, later in pairwise(seconds))  # each process adds to those before it


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole: Path, home: Path) -> None:
    for file in ("generator.safetensors", "training.safetensors"):
        shutil.rmtree(home / "runs", ignore_errors=True)
        shutil.copytree(whole / "runs", home / "runs", symlinks=True)
        last = run_folder(home) / "checkpoints" / "step_000020" / file
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
        output = run(home)
        assert f"{file} is not as it was written" in output
        assert "going on after step 18" in output
        assert results(home) == results(whole)
        assert (run_folder(home) / "checkpoints" / "damaged_step_000020").is_dir()
    for checkpoint in run_folder(home).glob("checkpoints/step_*"):
        (checkpoint / "training.safetensors").write_bytes(b"")
    output = run(home, code=1)
    assert "has no whole checkpoint any more: remove it" in output
    assert "Traceback" not in output


KILLED = """
import os, shutil, signal, sys
from pathlib import Path

moment, step = sys.argv[1], f"step_{int(sys.argv[2]):06d}"
del sys.argv[1:3]
replace, remove = Path.replace, shutil.rmtree
newest = []

def replace_or_die(path, target):
    name = Path(target).name
    if name == step and moment == "before the rename":
        os.kill(os.getpid(), signal.SIGKILL)
    if newest == [step] and moment == f"before the link {name}":
        os.kill(os.getpid(), signal.SIGKILL)
    done = replace(path, target)
    if name.startswith("step_"):
        newest[:] = [name]
    if name == step and moment == "after the rename":
        os.kill(os.getpid(), signal.SIGKILL)
    return done

def remove_or_die(path, *rest, **settings):
    if newest == [step] and moment == "before old ones go" and Path(path).name.startswith("step_"):
        os.kill(os.getpid(), signal.SIGKILL)
    return remove(path, *rest, **settings)

Path.replace, shutil.rmtree = replace_or_die, remove_or_die
from cgtgan.__main__ import main

sys.exit(main())
"""


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("before the rename", 10),
        ("after the rename", 2),  # there is no link yet
        ("after the rename", STEPS),  # training is done, and the links point to an earlier step
        ("before the link best", 5),
        ("before the link last", 12),
        ("before old ones go", STEPS),
    ],
)
def test_killed_at_any_moment_of_a_checkpoint_the_same_command_ends_as_if_undisturbed(
    whole: Path, home: Path, moment: str, step: int
) -> None:
    started = command(home)
    killed = [sys.executable, "-c", KILLED, moment, str(step), *started[2:]]
    done = run_program(killed, cwd=home)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run(home)
    assert results(home) == results(whole)
    kept = [sorted(p.name for p in run_folder(h).glob("checkpoints/*")) for h in (home, whole)]
    assert kept[0] == kept[1]


LAST_STEP = """
import os, signal, sys
from cgtgan.stages import train

step, number = train.gan_step, int(sys.argv.pop(1))

def signalled(cfg, parts, at, *rest, **settings):
    if at == cfg.train.steps:
        os.kill(os.getpid(), number)
    return step(cfg, parts, at, *rest, **settings)

train.gan_step = signalled
from cgtgan.__main__ import main

sys.exit(main())
"""


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_step_is_the_exit_code_and_the_state_is_whole(
    whole: Path, home: Path, which: signal.Signals
) -> None:
    stopped = [sys.executable, "-c", LAST_STEP, str(int(which)), *command(home)[2:]]
    done = run_program(stopped, cwd=home)
    assert done.returncode == 128 + which, done.stdout + done.stderr
    assert f"received {which.name}: stopped after the last step, {STEPS}, in" in done.stderr
    assert results(home) == results(whole)
    assert "train: done already" in run(home)


FULL = """
import resource, sys
from cgtgan.stages import train

step = train.gan_step

def on_a_full_disk(cfg, parts, at, *rest, **settings):
    if at == 7:  # no file may be larger than this: the weights of a checkpoint are
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    return step(cfg, parts, at, *rest, **settings)

train.gan_step = on_a_full_disk
from cgtgan.__main__ import main

sys.exit(main())
"""


def test_a_full_disk_under_the_checkpoints_is_one_sentence_and_the_retry_ends_the_same(whole: Path, home: Path) -> None:
    full = [sys.executable, "-c", FULL, *command(home)[2:]]
    done = run_program(full, cwd=home)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert re.search(r"^error: .*/checkpoints/step_0000\d\d: File too large: fix that place", sentence), sentence
    assert "going on after step" in run(home)
    assert results(home) == results(whole)


def test_one_flipped_bit_is_noticed_by_every_stage_that_reads_it(whole: Path, home: Path) -> None:
    shutil.copytree(whole / "runs", home / "runs", symlinks=True)
    picture = next((home / "artifacts").glob("demo_world/*/images/test/*.png"))
    best = run_folder(home) / "checkpoints" / "best" / "generator.safetensors"
    (initial,) = (home / "artifacts").glob("generator_initial/*/generator.safetensors")
    (images,) = (f for f in (home / "artifacts" / "image_embeddings").glob("*.safetensors") if "val" in header(f))
    for file, settings in (
        (best, ("stage=evaluate", "evaluate.which=best", "evaluate.metrics=[cider]")),
        (best, ("stage=caption", "evaluate.which=best", f"images={picture}")),
        (initial, ("variant=new",)),
        (images, ("variant=new",)),
    ):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[-100] ^= 4
        file.write_bytes(flipped)
        message = run(home, *settings, code=1)
        assert f"{file.resolve()} is not as it was written" in message, settings
        assert "Traceback" not in message
        file.write_bytes(content)


def header(file: Path) -> str:
    with safe_open(file, framework="pt") as f:
        return json.loads(f.metadata()["header"])["producer"]["split"]


def test_what_others_share_has_the_rights_of_the_umask(whole: Path) -> None:
    """safetensors gives the owner alone rights: a colleague could not read a shared `artifacts_dir`."""
    before = os.umask(0)
    os.umask(before)
    for file in (f for f in whole.rglob("*") if f.is_file() and not f.is_symlink()):
        assert file.stat().st_mode & 0o777 == 0o666 & ~before, file


def test_time_between_checkpoints_may_be_given_in_minutes(whole: Path, home: Path) -> None:
    job = started(home, "train.checkpoint_every=1000", "train.checkpoint_minutes=0.00001", rows=6)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert "going on after step" in run(home)
    assert results(home) == results(whole)


@pytest.mark.parametrize("overrides", [(), ("train.accumulation=2",)])
def test_two_processes_learn_what_one_learns(whole: Path, home: Path, overrides: tuple[str, ...]) -> None:
    run(home, *overrides, processes=2)
    mine, theirs = metrics(home), metrics(whole)
    assert len(mine) == len(theirs) == STEPS + 5
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    for module in ("generator", "training"):
        a, b = (load_file(run_folder(h) / "checkpoints" / "last" / f"{module}.safetensors") for h in (home, whole))
        weights = [k for k in b if module == "generator" or k.startswith("module/")]
        assert weights
        assert max(float((a[k] - b[k]).abs().max()) for k in weights) < 1e-5
    for captions in sorted((run_folder(whole) / "validation").glob("*.json")):
        assert (run_folder(home) / "validation" / captions.name).read_text() == captions.read_text()


def initial(home: Path) -> dict[str, torch.Tensor]:
    (folder,) = (p for p in (home / "artifacts" / "generator_initial").iterdir() if not p.name.startswith("."))
    return load_file(folder / "generator.safetensors")


@pytest.mark.parametrize(
    "overrides", [(), ("train.dropout=true", "initialize.batch_size=15", "prompt=retrieval", "prompt.tokens=40")]
)
def test_two_processes_initialise_what_one_does_and_go_on_after_a_kill_bit_for_bit(
    whole: Path, home: Path, overrides: tuple[str, ...]
) -> None:
    one = initial(home)
    folder = home / "artifacts" / "generator_initial"
    shutil.rmtree(folder)
    settings = ("stage=initialize", *overrides)
    assert "initialising on text 10/20" in run(home, *settings, processes=2)
    two = initial(home)
    if not overrides:
        assert max(float((two[k] - one[k]).abs().max()) for k in one) < 1e-5
    shutil.rmtree(folder)
    script = home / "killed.py"
    script.write_text(killed_in_step(13))  # the last state is that of step 10
    killed = [str(script) if part.endswith("run.py") else part for part in command(home, *settings, processes=2)]
    done = run_program(killed, cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    (state,) = folder.glob("*.training")
    assert "initialising on text 15/20" in run(home, *settings, processes=2)
    again = initial(home)
    assert all(torch.equal(again[k], two[k]) for k in two)
    assert not state.exists()


def test_one_process_goes_on_where_two_were_stopped(whole: Path, home: Path) -> None:
    job = started(home, rows=4, processes=2)
    children = run_program(["pgrep", "-P", str(job.pid)]).stdout.split()
    os.kill(int(children[-1]), signal.SIGUSR1)  # one of them gets the signal; both stop
    output = job.communicate(timeout=100)[0]
    assert job.returncode != 0
    assert "received SIGUSR1: stopped after step" in output
    assert "going on after step" in run(home)
    for a, b in zip(metrics(home), metrics(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_a_process_that_dies_ends_the_job(home: Path) -> None:
    """Without a launcher that would end the others: they must find out by themselves."""
    with socket_port() as port:
        places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        jobs = [
            subprocess.Popen(
                command(home), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=os.environ | places | {"RANK": str(i), "LOCAL_RANK": str(i)},
            )
            for i in range(2)
        ]  # fmt: skip
    deadline = time.monotonic() + 200
    while not any(f.read_text() for f in home.glob("runs/demo_tiny/*/seed=0/metrics.jsonl")):
        assert all(job.poll() is None for job in jobs), [job.communicate()[0] for job in jobs]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    jobs[1].kill()
    output = jobs[0].communicate(timeout=60)[0]
    assert jobs[0].returncode == 1, output
    assert "process 0 of 2 lost another one of this job" in output
    assert "Traceback" not in output
    jobs[1].wait()
    if jobs[1].stdout:
        jobs[1].stdout.close()


class socket_port:
    """A port that is free now."""

    def __enter__(self) -> int:
        import socket

        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return int(s.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        return


def test_more_processes_than_images_of_a_part_are_refused(home: Path) -> None:
    output = run(home, "train.batch_size=2", "train.accumulation=2", "variant=small", processes=2, code=1)
    assert "train.batch_size=2 in 2 parts is less than one image for each of 2 processes" in output


def test_collapse_is_a_warning_or_an_error(whole: Path, home: Path) -> None:
    """An untrained generator gives nearly all images one caption."""
    settings = [
        "train.use_initialization=false",
        "train.log_every=1",
        "train.steps=24",
        "variant=raw",
        "train.generator_optimizer.lr=1e-9",
    ]
    output = run(home, *settings)
    assert "warning, step 21: most images of a batch get the same caption" in output
    assert "train.kl_weight" in output
    output = run(home, *settings, "variant=raw2", "train.stop_on_collapse=true", code=1)
    assert "train.stop_on_collapse asks" in output
    assert "Traceback" not in output


def test_a_hub_or_a_cache_of_it_gives_the_generator_to_start_from(
    whole: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache in the hub's own layout, as a download leaves it; the network is not asked."""
    snapshot = home / "hub" / "models--us--ours" / "snapshots" / ("0" * 40)
    shutil.copytree(run_folder(whole) / "checkpoints" / "last", snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run(home, "train.init_from=us/ours", "variant=more", "train.steps=1", "train.log_every=1")
    (_, row, *_) = [
        json.loads(line) for line in next(home.glob("runs/*/more/seed=0/metrics.jsonl")).read_text().splitlines()
    ]
    trained = metrics(whole)[-2]
    assert abs(row["reward/cos"] - trained["reward/cos"]) < 3
    output = run(home, "train.init_from=us/nothing", "variant=none", code=1)
    assert "train.init_from=us/nothing" in output
    assert "Traceback" not in output


OWN_TERM = """
import torch

def brevity(inputs):
    return -torch.tensor([float(len(text)) for text in inputs.texts])
"""


def test_a_run_with_a_term_of_the_users_own_goes_on_with_the_same_code_alone(home: Path) -> None:
    (home / "rewards.py").write_text(OWN_TERM)
    settings = (
        "reward_weights.terms.brevity={weight: 0.1, function: 'rewards.py:brevity'}",
        "train.checkpoint_every=1000",
    )
    job = started(home, *settings, rows=4)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert "_brevity0.1_" in run_folder(home).parent.name
    (home / "rewards.py").write_text(OWN_TERM + "# another version\n")
    message = run(home, *settings, code=1)
    assert "holds a run with other inputs (reward term brevity was " in message
    assert "Traceback" not in message
    (home / "rewards.py").write_text(OWN_TERM)
    assert "going on after step" in run(home, *settings)
    row = metrics(home)[1]  # step 1
    assert {"reward/brevity", "reward/brevity_greedy", "advantage/brevity", "advantage/brevity_abs"} <= row.keys()
    (home / "rewards.py").write_text(OWN_TERM.replace("-torch", "torch.nan * torch"))
    message = run(home, *settings, "variant=wrong", code=1)
    assert f"reward_weights.terms.brevity.function=rewards.py:brevity ({home / 'rewards.py'}, line 4)" in message
    assert "Traceback" not in message


def test_precision_is_part_of_a_run(whole: Path, home: Path) -> None:
    shutil.copytree(whole / "runs", home / "runs", symlinks=True)
    output = run(home, "train.precision=bf16", code=1)
    assert "precision was float32, is bf16" in output
    run(home, "train.precision=bf16", "variant=half", "train.steps=2")
    weights = load_file(next(home.glob("runs/*/half/seed=0/checkpoints/last/generator.safetensors")))
    assert {v.dtype for v in weights.values()} == {torch.float32}
