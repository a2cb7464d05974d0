"""What W&B holds of real runs of the tiny demo world: a multirun, a killed run, a run of a W&B sweep."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from cgtgan.runtime.artifacts import read_json
from tests.program import run_program
from tests.wandb_server import Server, Written, files, written

ROOT = Path(__file__).parents[2]
STEPS = 12
OVERRIDES = (
    *("experiment=demo_tiny", "threads=1", f"train.steps={STEPS}", "train.validate_every=4", "train.log_every=4"),
    *("evaluate.metrics=[cider]", "evaluate.baselines=[]", "report.gallery=1"),
)


def environment(home: Path, **more: str) -> dict[str, str]:
    """As on a machine where nobody has heard of W&B."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "XDG"))} | {"HOME": str(home), **more}


def command(home: Path, *overrides: str) -> list[str]:
    places = (
        f"artifacts_dir={home / 'artifacts'}",
        f"runs_dir={home / 'runs'}",
        f"hydra.sweep.dir={home / 'multirun'}",
    )
    flags = [word for word in overrides if word.startswith("-")]
    return [
        sys.executable,
        str(ROOT / "run.py"),
        *flags,
        *OVERRIDES,
        *places,
        *(word for word in overrides if word not in flags),
    ]


def run(home: Path, *overrides: str) -> str:
    done = run_program(command(home, *overrides), cwd=home, env=environment(home), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_folder(home: Path) -> Path:
    (folder,) = (home / "runs" / "demo_tiny").glob("*/seed=0")
    return folder


def metrics(home: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_folder(home) / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "memory/", "train/seconds", "train/images_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def tables(found: Written) -> list[list[dict[str, Any]]]:
    """Rows of every table that a file logged, in order; each must be there, and its pictures."""
    made = []
    for artifact in found.artifacts:
        lying = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        if artifact.type != "run_table":
            continue
        content = read_json(lying["eval/captions.table.json"])
        rows = [dict(zip(content["columns"], cells, strict=True)) for cells in content["data"]]
        for cells in rows:
            with Image.open(lying[cells["picture"]["path"]]) as picture:
                assert 16 < max(picture.size) <= 200
        made.append(rows)
    assert [len(rows) for rows in made] == [
        row["eval/captions"]["nrows"] for row in found.rows if "eval/captions" in row
    ]
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one run of a multirun, from the pictures to the scores."""
    home = tmp_path_factory.mktemp("whole")
    output = run(home, "-m", "seed=0", "wandb.artifacts=true", "wandb.tags=[mine]")
    assert [
        line
        for line in output.splitlines()
        if "wandb" in line.replace(str(home), "") and "[HYDRA]" not in line and not line.startswith("run 1/1, ")
    ] == []
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    """A new home with the artifacts of the other, but no run."""
    shutil.copytree(whole / "artifacts", tmp_path / "artifacts")
    return tmp_path


def test_a_run_in_wandb(whole: Path) -> None:
    folder = run_folder(whole)
    trained, scored = map(written, files(folder))
    assert trained.run.run_id == scored.run.run_id == (folder / "wandb_id.txt").read_text().strip()
    assert trained.run.run_group == scored.run.run_group == "demo_tiny"
    assert (trained.run.job_type, scored.run.job_type) == ("pipeline", "")  # the second adds to the first
    assert trained.run.display_name == "/".join(folder.parts[-3:])
    assert list(trained.run.tags) == ["mine", "demo_tiny", "demo", "clip_agg"]
    assert (trained.exit_code, scored.exit_code) == (0, 0)
    config, inputs = trained.config, read_json(folder / "inputs.json")
    assert config["train"]["steps"] == config["total_steps"] == STEPS
    assert config["code"].startswith("cgtgan ")
    assert {k: v for k, v in config["inputs"].items() if k != "sentences"} == inputs
    assert {"images", "aggregated", "precision"} <= inputs.keys()
    assert len(config["inputs"]["sentences"]) == 12


def test_its_curves_are_metrics_jsonl(whole: Path) -> None:
    trained, scored = map(written, files(run_folder(whole)))
    rows = metrics(whole)
    assert [row["_step"] for row in trained.rows] == [0, 1, 4, 8, 12]
    assert scored.rows == []
    for row in rows:
        sent = next(r for r in trained.rows if r["_step"] == row["step"])
        assert sent["train/step"] == row["step"]
        assert {name: sent[name] for name in row if name != "step"} == pytest.approx(
            {k: v for k, v in row.items() if k != "step"}
        )
    validations = {row["step"]: row for row in rows if "eval/CIDEr" in row}
    assert list(validations) == [0, 4, 8, 12]
    settings = read_json(run_folder(whole) / "settings.json")
    an_epoch = settings["dataset.world.train_images"] / settings["train.batch_size"]
    assert [row["eval/epoch"] for row in validations.values()] == pytest.approx(
        [step / an_epoch for step in validations]
    )
    best = max((row for step, row in validations.items() if step), key=lambda row: row["eval/CIDEr"])
    for summary in (trained.summary, scored.summary):  # `wandb sync` takes the last one
        assert summary["eval/best_CIDEr"] == pytest.approx(best["eval/CIDEr"])
        assert summary["eval/best_step"] == best["step"]
        assert summary["eval/last_CIDEr"] == pytest.approx(validations[12]["eval/CIDEr"])
    scores = read_json(run_folder(whole) / "evaluation" / "test" / "cgtgan" / "scores.json")["scores"]
    assert {k.removeprefix("test/"): v for k, v in scored.summary.items() if k.startswith("test/")} == scores


def test_every_validation_is_a_table_of_the_same_images(whole: Path) -> None:
    made = tables(written(files(run_folder(whole))[0]))
    references = {str(k): v for k, v in val_references(whole).items()}
    for rows, step in zip(made, (4, 8, 12), strict=True):
        captions = {
            str(r["image_id"]): r["caption"]
            for r in read_json(run_folder(whole) / "validation" / f"step_{step:06d}.json", list)
        }
        assert len(rows) == min(32, len(captions))
        assert [row["image"] for row in rows] == [row["image"] for row in made[0]]
        for row in rows:
            assert row["caption"] == captions[row["image"]]
            assert row["references"].split("\n") == references[row["image"]]
            assert row["semantic"] == pytest.approx(0.5 * row["cos"] + 0.5 * row["l1"], rel=1e-5)
            assert -1.01 < row["clip"] / 100 < 1.01
            assert isinstance(row["naturalness"], float)
        cider = [row["CIDEr"] for row in rows]
        if len(rows) == len(captions):
            logged = next(r for r in metrics(whole) if r["step"] == step and "eval/CIDEr" in r)
            assert sum(cider) / len(cider) == pytest.approx(logged["eval/CIDEr"])


def val_references(home: Path) -> dict[Any, list[str]]:
    (world,) = (home / "artifacts" / "demo_world").glob("world-*/")
    annotations = read_json(next(world.glob("annotations/*val*.json")))["annotations"]
    found: dict[Any, list[str]] = {}
    for one in annotations:
        found.setdefault(one["image_id"], []).append(one["caption"])
    return found


def test_checkpoint_and_captions_are_artifacts_that_say_what_they_were_made_from(whole: Path) -> None:
    folder = run_folder(whole)
    trained, scored = map(written, files(folder))
    (checkpoint,) = [a for a in trained.artifacts if a.type == "checkpoint"]
    best = (folder / "checkpoints" / "best").resolve()
    assert checkpoint.name == f"checkpoint-{trained.run.run_id}"
    assert "best" in checkpoint.aliases
    lying = {entry.path: Path(entry.local_path) for entry in checkpoint.manifest.contents}
    assert lying["generator.safetensors"] == best / "generator.safetensors"
    assert "training.safetensors" not in lying
    assert all(path.is_file() for path in lying.values())
    made_from = json.loads(checkpoint.metadata)
    assert made_from["step"] == int(best.name.removeprefix("step_"))
    assert made_from["images"] == trained.config["inputs"]["images"]
    (captions,) = [a for a in scored.artifacts if a.type == "predictions"]
    assert {entry.path for entry in captions.manifest.contents} == {"captions.json", "per_image.json", "scores.json"}
    used = folder / "checkpoints" / trained.config["evaluate"]["which"]
    assert (
        json.loads(captions.metadata)["checkpoint"]
        == read_json(used / "checkpoint.json")["files"]["generator.safetensors"]
    )


def test_wandb_changes_no_number(whole: Path, home: Path) -> None:
    run(home, "stage=train", "wandb=disabled")
    assert not (run_folder(home) / "wandb").exists()
    assert metrics(home) == metrics(whole)
    for name in ("generator", "training"):
        mine, theirs = (
            load_file(run_folder(h) / "checkpoints" / "last" / f"{name}.safetensors") for h in (home, whole)
        )
        assert mine.keys() == theirs.keys()
        assert all(
            mine[key].equal(theirs[key]) for key in theirs if "rng" not in key
        )  # which depend on what the process did before


def test_a_run_killed_and_started_again_is_one_run_without_a_gap(whole: Path, home: Path) -> None:
    slow = ("stage=train", "train.log_every=1", "train.checkpoint_every=2")
    job = subprocess.Popen(
        command(home, *slow), cwd=home, env=environment(home), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while not any(len(f.read_text().splitlines()) >= 6 for f in home.glob("runs/demo_tiny/*/seed=0/metrics.jsonl")):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(0.5)
    first = (run_folder(home) / "wandb_id.txt").read_text().strip()
    assert "going on after step" in run(home, *slow)
    assert (run_folder(home) / "wandb_id.txt").read_text().strip() == first
    found = [written(file) for file in files(run_folder(home))]
    assert {f.run.run_id for f in found} == {first}
    losses = {row["step"]: row["train/g_loss"] for row in metrics(home) if "train/g_loss" in row}
    assert list(losses) == list(range(1, STEPS + 1))
    rows = [row for f in found for row in f.rows if row["_step"]]  # without step 0, which is validated only
    sent = [(row["_step"], row["train/g_loss"]) for row in rows]  # a row may be there twice
    assert sorted(set(sent)) == [(step, pytest.approx(loss)) for step, loss in losses.items()]
    assert found[-1].exit_code == 0


def test_a_stopped_run_is_preempted(home: Path) -> None:
    done = run_program(
        command(home, "stage=train", "train.max_minutes=0.0001"), cwd=home, env=environment(home), timeout=100
    )
    assert done.returncode == 75, done.stderr
    (file,) = files(run_folder(home))
    assert written(file).preempting
    assert written(file).exit_code == 75


# ----------------------------------------------------------------------------------------------------- W&B's own sweeps


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


SWEEPS = sorted((ROOT / "sweeps" / "wandb").glob("*.yaml"))


def agents_command(sweep: Path, values: dict[str, Any]) -> list[str]:
    """What `wandb agent` would start, made by its own functions."""
    from wandb.sdk.launch.sweeps import utils

    config = utils.load_sweep_config(str(sweep))
    assert config is not None
    words = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    known = {
        **words,
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [str(ROOT / config["program"])],
    }
    parts = utils.create_sweep_command(config["command"])
    return [word for part in parts for word in (known[part[2:-1]] if part.startswith("${") else [part])]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_a_wandb_sweep_asks_for_settings_that_there_are_and_never_looks_at_test_scores(sweep: Path) -> None:
    from wandb.sdk.launch.sweeps import utils

    config = utils.load_sweep_config(str(sweep))
    assert config is not None
    assert config["method"] in ("grid", "bayes")
    assert config["metric"] == {"name": "eval/best_CIDEr", "goal": "maximize"}
    head = sweep.read_text().splitlines()[:3]
    assert [line.split(":")[0] for line in head] == ["# Question", "# Cost", "# Run"]
    first, last = {}, {}
    for name, range_ in config["parameters"].items():
        low, high = (
            (range_["values"][0], range_["values"][-1]) if "values" in range_ else (range_["min"], range_["max"])
        )
        assert ("values" in range_) != (range_.get("distribution") == "q_uniform" and range_["q"] > 0)
        first[name], last[name] = low, high
    for values in (first, last):
        words = agents_command(sweep, values)
        done = run_program([*words, "--cfg", "job"], timeout=60)
        assert done.returncode == 0, done.stderr


def test_what_an_agent_starts_is_a_run_of_its_sweep(home: Path, server: Server) -> None:
    words = agents_command(
        ROOT / "sweeps/wandb/grid.yaml", {"aggregation_t.t": 120, "reward_weights": "clip_cos", "seed": 0}
    )
    words = [word for word in words if word != "experiment=coco_coco"]
    here = environment(
        home,
        WANDB_BASE_URL=server.url,
        WANDB_API_KEY="a" * 40,
        WANDB_SWEEP_ID="sweep123",
        WANDB_RUN_ID="agent123",
        WANDB_PROJECT="cgtgan",
    )
    given = [word for word in command(home)[2:] if not word.startswith("hydra")]
    for _ in range(2):  # the second finds everything done, and an agent's run must have its result all the same
        done = run_program([*words[:3], *given, *words[3:]], cwd=home, env=here, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        (run_,) = (home / "runs" / "demo_tiny").glob("*/seed=0")
        sent = server.runs[here["WANDB_RUN_ID"]]
        assert [row["train/step"] for row in sent.history] == [0, 1, 4, 8, 12]
        assert sent.variables[0]["sweep"] == "sweep123"
        config = json.loads(sent.variables[0]["config"])
        assert (config["reward_weights.clip_weight"]["value"], config["aggregation_t.t"]["value"]) == (1.0, 120)
        cider = [json.loads(line).get("eval/CIDEr", -1) for line in (run_ / "metrics.jsonl").read_text().splitlines()]
        assert sent.summary["eval/best_CIDEr"] == pytest.approx(max(cider))
        assert sent.summary["test/CIDEr"] >= 0
        here["WANDB_RUN_ID"] = "agent456"
    assert list(server.runs) == ["agent123", "agent456"]
