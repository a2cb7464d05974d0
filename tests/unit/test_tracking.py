"""metrics.jsonl, its truncation on resume, and what W&B really writes."""

import importlib.util
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cgtgan.config import WandbConfig
from cgtgan.tracking import Tracker, read_metrics


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B account, no terminal: as on a fresh machine."""
    for name in [n for n in os.environ if n.startswith("WANDB")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def tracker() -> tuple[Tracker, io.StringIO]:
    said = io.StringIO()
    return Tracker(Console(file=said, width=500)), said


def start(folder: Path, mode: str = "disabled", step: int = 0, wandb_id: str | None = None, **settings: Any) -> tuple[Tracker, io.StringIO]:
    made, said = tracker()
    made.start_run(folder, WandbConfig(mode=mode, **settings), config={"seed": 0}, job_type="train", step=step, wandb_id=wandb_id)
    return made, said


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    made, _ = start(tmp_path / "run")
    made.log(1, {"train/loss": 0.5, "reward/cos": -2.0})
    assert read_metrics(tmp_path / "run/metrics.jsonl") == [{"step": 1, "train/loss": 0.5, "reward/cos": -2.0}]
    made.log(10, {"eval/CIDEr": 0.9})
    made.finish()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 10]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    made, _ = start(tmp_path)
    made.log(1, {"a": value, "b": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"step": 1, "a": None, "b": 1.0}


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    made, _ = start(tmp_path)
    for step in range(1, 6):
        made.log(step, {"a": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "a": 6')  # killed while it wrote
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    again, _ = start(tmp_path, step=3)
    again.log(4, {"a": 40.0})
    assert [(row["step"], row["a"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_half_written_line_is_gone_after_a_resume_at_its_step(tmp_path: Path) -> None:
    made, _ = start(tmp_path)
    made.log(1, {"a": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "a"')
    again, _ = start(tmp_path, step=2)
    again.log(3, {"a": 3.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 3]


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    made, _ = start(tmp_path)
    made.log(1, {"a": 1.0})
    start(tmp_path, step=0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_disabled_writes_nothing_but_the_metrics(tmp_path: Path, alone: None) -> None:
    made, said = start(tmp_path / "run")
    made.log(1, {"a": 1.0})
    made.summarize({"best": 2.0})
    made.finish()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert made.wandb_id is None
    assert said.getvalue() == ""


def offline(shared: Path, run: Path, rows: int) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """History and summary of every offline W&B run in the folder, in order of its start, once `rows` rows are there: W&B's own
    process writes them, and offline `finish` does not wait for it."""
    spec = importlib.util.spec_from_file_location("read_wandb_offline", shared / "tools/read_wandb_offline.py")
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    deadline = time.monotonic() + 60
    while True:
        files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime_ns)
        found = [reader.read(str(path)) for path in files]
        if sum(len(history) for history, _ in found) >= rows and all(summary for _, summary in found):
            return found
        assert time.monotonic() < deadline, f"W&B wrote {found}"
        time.sleep(0.1)


def test_offline_wandb_holds_the_same_rows(tmp_path: Path, shared: Path, alone: None) -> None:
    run = tmp_path / "runs" / "demo" / "base" / "seed=0"
    made, said = start(run, "offline", group="g", tags=["t"])
    made.log(1, {"train/loss": 0.5})
    made.log(5, {"train/loss": 0.25, "eval/CIDEr": 0.75})
    made.summarize({"eval/best_CIDEr": 0.75})
    made.finish()
    assert said.getvalue() == ""
    [(history, summary)] = offline(shared, run, 2)
    assert [(row["_step"], row["train/loss"]) for row in history] == [(1, 0.5), (5, 0.25)]
    assert history[1]["eval/CIDEr"] == 0.75
    assert summary["eval/best_CIDEr"] == 0.75
    assert made.wandb_id == (run / "wandb_id.txt").read_text().strip()


def test_online_without_a_key_goes_offline_with_a_sentence_and_resumes_under_one_id(tmp_path: Path, shared: Path, alone: None) -> None:
    made, said = start(tmp_path / "run", "online")
    made.log(1, {"a": 1.0})
    made.finish()
    assert "no API key is found" in said.getvalue()
    assert "wandb sync" in said.getvalue()
    again, _ = start(tmp_path / "run", "offline", step=1)
    again.log(2, {"a": 2.0})
    again.finish(failed=True)
    assert again.wandb_id == made.wandb_id
    runs = offline(shared, tmp_path / "run", 2)
    assert sorted(row["_step"] for history, _ in runs for row in history) == [1, 2]


def test_progress_without_a_terminal_is_a_line_a_quarter() -> None:
    made, said = tracker()
    with made.progress("training", 8) as bar:
        for i in range(8):
            bar.advance(note=f"loss {i}")
    assert said.getvalue().splitlines() == [f"training {n}/8 loss {n - 1}" for n in (2, 4, 6, 8)]


def test_progress_goes_on_where_it_was() -> None:
    made, said = tracker()
    with made.progress("training", 8, 4) as bar:
        for _ in range(4):
            bar.advance()
    assert said.getvalue().splitlines() == ["training 6/8", "training 8/8"]


def test_what_is_said_is_no_markup() -> None:
    made, said = tracker()
    made.say("images=[a.jpg] [bold]")
    assert said.getvalue() == "images=[a.jpg] [bold]\n"
