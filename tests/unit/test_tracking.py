"""metrics.jsonl, its truncation on resume, and what W&B really writes."""

import contextlib
import importlib.util
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from rich.console import Console

from cgtgan.config import WandbConfig
from cgtgan.errors import InputError, Stopped
from cgtgan.runtime import wandb_run
from cgtgan.runtime.tracking import Tracker, read_metrics
from cgtgan.runtime.wandb_run import stored_wandb_id
from tests.wandb_server import Server, files, written

ROOT = Path(__file__).resolve().parents[2]


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
    printed = io.StringIO()
    return Tracker(Console(file=printed, width=500)), printed


def start(
    folder: Path, mode: str = "disabled", step: int = 0, wandb_id: str | None = None, **settings: Any
) -> tuple[Tracker, io.StringIO]:
    made, printed = tracker()
    made.start_run(
        folder, WandbConfig(mode=mode, **settings), config={"seed": 0}, job_type="train", step=step, wandb_id=wandb_id
    )
    return made, printed


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
    assert [(row["step"], row["a"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


@pytest.mark.parametrize(
    "line", ["[1]", '{"a": 1', '{"a": 1}', "7", '{"step": 2, "a": ' + "1" * 5000 + "}", "[" * 99_999]
)
def test_a_line_that_is_no_row_is_one_sentence_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "a": 1.0}}\n{line}\n{{"step": 3, "a": 1.0}}\n')
    with pytest.raises(InputError, match=rf"^{path}, line 2 .*: delete this line$"):
        read_metrics(path)


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
    made, printed = start(tmp_path / "run")
    made.log(1, {"a": 1.0})
    made.summarize({"best": 2.0})
    made.finish()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert made.wandb_id is None
    assert printed.getvalue() == ""


def wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_offline_wandb_holds_the_same_rows(tmp_path: Path, alone: None) -> None:
    run = tmp_path / "runs" / "demo" / "base" / "seed=0"
    made, printed = start(run, "offline", group="g", tags=["t"])
    made.log(1, {"train/loss": 0.5, "reward/cos": 1.0})
    made.log(5, {"train/loss": 0.25})
    made.log(5, {"eval/CIDEr": 0.75, "eval/epoch": 0.5})
    made.summarize({"eval/best_CIDEr": 0.75})
    made.finish()
    assert printed.getvalue() == ""
    [file] = files(run)
    found = written(file)
    assert [(row["_step"], row["train/step"], row["train/loss"]) for row in found.rows] == [(1, 1, 0.5), (5, 5, 0.25)]
    assert (found.rows[1]["eval/CIDEr"], found.rows[1]["eval/epoch"]) == (0.75, 0.5)
    assert found.summary["eval/best_CIDEr"] == 0.75
    assert (found.run.display_name, found.run.run_group, found.run.job_type) == ("demo/base/seed=0", "g", "train")
    assert list(found.run.tags) == ["t"]
    assert found.config["seed"] == 0
    assert found.exit_code == 0
    steps = dict.fromkeys(("train/*", "reward/*", "advantage/*", "caption/*", "time/*", "memory/*"), "train/step")
    assert {name: axis for name, axis in found.axes.items() if axis} == steps | {"eval/*": "eval/epoch"}
    assert {name for name, axis in found.axes.items() if not axis} == {"train/step", "eval/epoch"}
    assert made.wandb_id == found.run.run_id == stored_wandb_id(run) == (run / "wandb_id.txt").read_text().strip()


def test_the_projects_own_reader_finds_the_same(tmp_path: Path, shared: Path, alone: None) -> None:
    made, _ = start(tmp_path / "run", "offline")
    for step in range(1, 400):  # more than a block of 32 KiB
        made.log(step, {f"train/loss_{i}": step + 0.123456789 for i in range(10)})
    made.finish()
    [file] = files(tmp_path / "run")
    assert file.stat().st_size > 2 * 32768
    spec = importlib.util.spec_from_file_location("read_wandb_offline", shared / "tools/read_wandb_offline.py")
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    history, _ = reader.read(str(file))
    ours = written(file)
    assert [row["_step"] for row in history] == [row["_step"] for row in ours.rows] == list(range(1, 400))


def test_online_without_a_key_goes_offline_with_a_sentence_and_resumes_under_one_id(
    tmp_path: Path, alone: None
) -> None:
    made, printed = start(tmp_path / "run", "online")
    made.log(1, {"a": 1.0})
    made.finish()
    [sentence] = printed.getvalue().splitlines()
    assert "no API key is found" in sentence
    assert f"`wandb sync --include-online {tmp_path / 'run' / 'wandb'}`" in sentence
    again, printed = start(tmp_path / "run", "offline", step=1)
    again.log(2, {"a": 2.0})
    again.finish(RuntimeError("a bug"))
    assert printed.getvalue() == ""
    first, second = map(written, files(tmp_path / "run"))
    assert first.run.run_id == second.run.run_id == again.wandb_id == made.wandb_id
    assert [[row["_step"] for row in found.rows] for found in (first, second)] == [[1], [2]]
    assert (first.exit_code, second.exit_code) == (0, 1)


def test_a_job_that_was_stopped_and_goes_on_is_preempted_not_crashed(tmp_path: Path, alone: None) -> None:
    made, _ = start(tmp_path, "offline")
    made.log(1, {"a": 1.0})
    made.finish(Stopped("the time limit is reached", 75))
    [file] = files(tmp_path)
    found = written(file)
    assert found.preempting
    assert found.exit_code == 75


KILLED = """
import os, signal, sys, time
from pathlib import Path
import psutil
from cgtgan.config import WandbConfig
from cgtgan.runtime.tracking import Tracker

tracker = Tracker()
tracker.start_run(Path(sys.argv[1]), WandbConfig(mode="offline"), config={}, job_type="train")
for step in range(1, 6):
    tracker.log(step, {"a": float(step)})
while not list(Path(sys.argv[1]).glob("wandb/*/*.wandb")):
    time.sleep(0.01)
for process in [*psutil.Process().children(), psutil.Process()]:
    process.kill()
"""


def test_what_a_kill_took_from_wandb_is_logged_again(tmp_path: Path, alone: None) -> None:
    """W&B's process has some 15 s in memory only; killed at once, it leaves a file without a record."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    [first] = files(tmp_path)
    assert written(first).rows == []
    again, _ = start(tmp_path, "offline", step=4)  # the checkpoint
    again.log(5, {"a": 5.0})
    again.log(6, {"a": 6.0})
    again.finish()
    [second] = files(tmp_path)  # `wandb sync` would stop at the empty one
    assert [(row["_step"], row["a"]) for row in written(second).rows] == [(n, n) for n in range(1, 7)]
    assert written(second).run.run_id == stored_wandb_id(tmp_path)


def test_rows_after_the_last_one_that_is_surely_in_wandbs_file_are_logged_again(tmp_path: Path, alone: None) -> None:
    made, _ = start(tmp_path, "offline")
    for step in range(1, 6):
        made.log(step, {"a": float(step)})
    made.finish()
    logged = tmp_path / "wandb" / "logged.json"
    assert json.loads(logged.read_text()) == {"id": made.wandb_id, "step": 5}
    logged.write_text(json.dumps({"id": made.wandb_id, "step": 3}))  # as a kill leaves it
    again, _ = start(tmp_path, "offline", step=4)
    again.log(5, {"a": 5.0})
    again.finish()
    _, second = files(tmp_path)
    assert [(row["_step"], row["a"]) for row in written(second).rows] == [(4, 4), (5, 5)]


def test_a_row_counts_as_written_once_wandbs_file_changed_half_a_minute_later(tmp_path: Path, alone: None) -> None:
    made, _ = start(tmp_path, "offline")
    made.log(1, {"a": 1.0})
    made.log(2, {"a": 2.0})
    wait_for(lambda: bool(files(tmp_path)))
    logged = tmp_path / "wandb" / "logged.json"
    assert not logged.exists()
    later = time.time() + wandb_run.FLUSH_SECONDS + 10
    os.utime(files(tmp_path)[0], (later, later))
    made.log(3, {"a": 3.0})
    # W&B's process gets row 3 when the next one begins
    wait_for(lambda: logged.exists() and json.loads(logged.read_text())["step"] == 2)
    made.finish()
    assert json.loads(logged.read_text())["step"] == 3


BROKEN = """
import sys
from pathlib import Path
from cgtgan.config import WandbConfig
from cgtgan.runtime.tracking import Tracker

if sys.argv[1] == "missing":
    sys.modules["wandb"] = None  # what Python itself puts there for a module that must not be imported
tracker = Tracker()
tracker.start_run(Path("run"), WandbConfig(mode="offline"), config={}, job_type="train")
tracker.log(1, {"a": 1.0})
tracker.finish()
"""


@pytest.mark.parametrize(
    ("package", "sentence"),
    [
        ("missing", "W&B is not installed (pip install wandb, or set wandb=disabled); metrics.jsonl has everything"),
        ("import no_such_part", "W&B did not start (No module named 'no_such_part'); the run goes on"),
        ("import wandb.sdk", "W&B did not start (No module named 'wandb.sdk'"),
        ("raise RuntimeError('protobuf is too old')", "W&B did not start (protobuf is too old); the run goes on"),
    ],
)
def test_only_a_missing_wandb_is_called_not_installed(tmp_path: Path, package: str, sentence: str) -> None:
    if package != "missing":
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "__init__.py").write_text(package)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", BROKEN, package]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert " ".join(done.stdout.split()).startswith(sentence)
    assert read_metrics(tmp_path / "run/metrics.jsonl") == [{"step": 1, "a": 1.0}]


def test_the_agent_of_a_wandb_sweep_names_the_run(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = stored_wandb_id(tmp_path)
    assert stored_wandb_id(tmp_path, "other") == stored
    monkeypatch.setenv("WANDB_RUN_ID", "agent123")
    assert stored_wandb_id(tmp_path) == stored  # a person's own variable is not an agent's
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    made, _ = tracker()
    config = {"seed": 0, "reward_weights": {"name": "clip_agg", "cos_weight": 0.5}}
    made.start_run(tmp_path, WandbConfig(), config=config, job_type="train")
    made.finish()
    [file] = files(tmp_path)
    found = written(file)
    assert (found.run.run_id, found.run.sweep_id) == ("agent123", "sweep123")
    assert stored_wandb_id(tmp_path) == "agent123"
    assert (
        found.config["reward_weights.cos_weight"] == 0.5
    )  # the agent's own `reward_weights` would hide a part of that name


def test_rows_and_tables_are_taken_while_wandb_is_stuck(tmp_path: Path, alone: None) -> None:
    pictures = [tmp_path / f"{n}.jpeg" for n in range(32)]
    for n, picture in enumerate(pictures):
        Image.effect_noise((200, 150), 60 + n).save(picture)
    made, _ = start(tmp_path / "run", "offline", finish_seconds=60.0)
    assert made.wandb is not None
    wait_for(lambda: made.wandb is not None and made.wandb.opened)
    [service] = wandb_processes()
    service.suspend()
    try:
        for step in range(1, 51):
            made.log(step, {f"train/{i}": 1.0 for i in range(40)})
            if step % 10 == 0:
                cells = [[p, f"a caption {p.stem}"] for p in pictures]
                made.wandb.table(step, "eval/captions", ["picture", "caption"], cells)
        assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 50
    finally:
        service.resume()
    made.finish()
    [file] = files(tmp_path / "run")
    rows = written(file).rows
    assert [row["_step"] for row in rows] == list(range(1, 51))
    assert [row["_step"] for row in rows if "eval/captions" in row] == [10, 20, 30, 40, 50]
    assert {row["eval/captions"]["nrows"] for row in rows if "eval/captions" in row} == {32}
    assert not (tmp_path / "home" / ".local").exists()  # nothing of the run lies in the home folder


# ------------------------------------------------------------------------------ a server that is away, hangs or refuses


@pytest.fixture
def server(alone: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield made
    made.close()


def test_online_and_what_the_server_has_is_the_run(tmp_path: Path, server: Server) -> None:
    made, printed = start(tmp_path, "online", group="g")
    made.log(1, {"train/loss": 0.5})
    made.log(2, {"train/loss": 0.4})
    made.summarize({"eval/best_CIDEr": 0.75})
    made.finish()
    assert printed.getvalue() == ""
    run = server.runs[str(made.wandb_id)]
    assert [(row["_step"], row["train/step"], row["train/loss"]) for row in run.history] == [(1, 1, 0.5), (2, 2, 0.4)]
    assert run.summary["eval/best_CIDEr"] == 0.75
    assert run.variables[0]["groupName"] == "g"
    # a kill after the checkpoint at 3, whose row W&B has not got; then rows of which it has the first
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "train/loss": 0.3}\n')
    again, printed = start(tmp_path, "online", step=3)
    again.log(4, {"train/loss": 0.2})
    again.finish()
    assert [(row["_step"], row["train/loss"]) for row in run.history] == [(1, 0.5), (2, 0.4), (3, 0.3), (4, 0.2)]
    assert run.summary["eval/best_CIDEr"] == 0.75
    assert list(server.runs) == [made.wandb_id]


@pytest.mark.parametrize(
    ("mode", "only", "words", "seconds"),
    [
        ("closed", "", "cannot be reached", 3),
        ("hang", "", "does not answer", 7),
        ("500", "", "answers with 500", 3),
        ("403", "", "did not take the run", 4),  # a wrong key, a full quota
    ],
)
def test_no_server_is_one_sentence_and_a_run_on_disk(
    tmp_path: Path, server: Server, mode: str, only: str, words: str, seconds: float, capfd: pytest.CaptureFixture[str]
) -> None:
    server.mode, server.only = mode, only
    if mode == "closed":
        server.close()
    begun = time.monotonic()
    made, printed = start(tmp_path, "online")
    for step in range(1, 4):
        made.log(step, {"train/loss": 0.5})
    called = time.monotonic() - begun
    made.finish()
    assert called < 0.2
    assert time.monotonic() - begun < seconds + 3  # W&B's own start takes 2 s of them, more on a busy machine
    [sentence] = printed.getvalue().splitlines()
    assert words in sentence
    assert f"`wandb sync --include-online {tmp_path / 'wandb'}` sends it later" in sentence
    [file] = files(tmp_path)
    assert file.parent.name.startswith("offline-run-")
    assert [row["_step"] for row in written(file).rows] == [1, 2, 3]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("mode", "only"), [("hang", ""), ("500", ""), ("403", "file_stream")])
def test_a_server_that_goes_away_takes_nothing_from_the_run_and_gets_it_later(
    tmp_path: Path, server: Server, mode: str, only: str, capfd: pytest.CaptureFixture[str]
) -> None:
    made, printed = start(tmp_path, "online", finish_seconds=2.0)
    made.log(1, {"train/loss": 0.5})
    wait_for(lambda: bool(server.runs))
    server.mode, server.only = mode, only
    for step in range(2, 6):
        made.log(step, {"train/loss": 0.5})
    begun = time.monotonic()
    made.finish()
    assert time.monotonic() - begun < 6
    [sentence] = printed.getvalue().splitlines()
    assert "W&B did not take all of this run" in sentence
    assert "`wandb sync --include-online" in sentence
    [file] = files(tmp_path)
    assert [row["_step"] for row in written(file).rows] == [1, 2, 3, 4, 5]
    assert capfd.readouterr() == ("", "")
    server.mode = "ok"
    sync(tmp_path)
    assert {row["_step"] for row in server.runs[str(made.wandb_id)].history} == {1, 2, 3, 4, 5}
    assert list(server.runs) == [made.wandb_id]


def sync(run: Path) -> None:
    wandb = [sys.executable, "-m", "wandb", "sync", "--include-online", str(run / "wandb")]
    done = subprocess.run(wandb, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def test_wandb_sync_makes_one_run_of_all_starts(tmp_path: Path, server: Server) -> None:
    for first in (1, 4, 7):
        made, _ = start(tmp_path, "offline", step=first - 1)
        for step in range(first, first + 3):
            made.log(step, {"train/loss": float(step)})
        made.summarize({f"eval/from_{first}": first})
        made.finish()
        time.sleep(1)  # W&B names its folders by the second
    sync(tmp_path)
    assert list(server.runs) == [made.wandb_id]
    run = server.runs[str(made.wandb_id)]
    assert [(row["_step"], row["train/loss"]) for row in run.history] == [(n, n) for n in range(1, 10)]
    assert [run.summary[f"eval/from_{first}"] for first in (1, 4, 7)] == [1, 4, 7]


def test_a_process_of_wandb_that_is_stuck_is_ended(
    tmp_path: Path, alone: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "GRACE_SECONDS", 1.0)
    made, printed = start(tmp_path, "offline", finish_seconds=0.1)
    made.log(1, {"a": 1.0})
    wait_for(lambda: made.wandb is not None and made.wandb.opened)
    [service] = wandb_processes()
    service.suspend()
    made.finish()
    assert printed.getvalue().startswith("W&B's process does not end and was killed")
    assert len(printed.getvalue().splitlines()) == 1
    assert not service.is_running()
    assert not (tmp_path / "wandb/logged.json").exists()  # so that the next start logs the row again
    monkeypatch.undo()
    again, printed = start(tmp_path / "next", "offline")  # the next run of a multirun
    again.log(1, {"a": 1.0})
    again.finish()
    assert printed.getvalue() == ""
    assert len(written(files(tmp_path / "next")[0]).rows) == 1
    assert capfd.readouterr() == ("", "")


def wandb_processes() -> list[psutil.Process]:
    """W&B's processes that belong to this one."""
    return [process for process in psutil.Process().children() if process.name().startswith("wandb-core")]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_nobody_is_asked_for_a_key_at_a_terminal(tmp_path: Path, alone: None, mode: str) -> None:
    code = (
        "from pathlib import Path\nfrom cgtgan.config import WandbConfig\nfrom cgtgan.runtime.tracking import Tracker\n"
        f"t = Tracker()\nt.start_run(Path('run'), WandbConfig(mode='{mode}'), config={{}}, job_type='train')\n"
        "t.log(1, {'a': 1.0})\nt.finish()"
    )
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SILENT"} | {"PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while piece := os.read(ours, 4096):
            printed += piece
            assert b"choice" not in printed, printed
    assert job.wait(timeout=60) == 0
    os.close(ours)
    lines = printed.decode().split()
    assert lines == [] if mode == "offline" else "key" in lines
    assert len(written(files(tmp_path / "run")[0]).rows) == 1


def test_progress_without_a_terminal_is_a_line_a_quarter() -> None:
    made, printed = tracker()
    with made.progress("training", 8) as bar:
        for i in range(8):
            bar.advance(note=f"loss {i}")
    assert printed.getvalue().splitlines() == [f"training {n}/8 loss {n - 1}" for n in (2, 4, 6, 8)]


def test_progress_goes_on_where_it_was() -> None:
    made, printed = tracker()
    with made.progress("training", 8, 4) as bar:
        for _ in range(4):
            bar.advance()
    assert printed.getvalue().splitlines() == ["training 6/8", "training 8/8"]


def test_what_is_said_is_no_markup() -> None:
    made, printed = tracker()
    made.say("images=[a.jpg] [bold]")
    assert printed.getvalue() == "images=[a.jpg] [bold]\n"
