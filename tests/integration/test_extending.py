"""Every example of docs/extending.md, as it stands there, on the small demo."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.program import run_program

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+\.\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def commands(section: str) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def run(section: str, folder: Path, package: Path = ROOT) -> str:
    """Run the section's commands in `folder`; returns what they print."""
    printed = ""
    for program, *words in commands(section):
        assert program == "cgtgan"
        started = ["-m", "cgtgan"] if package != ROOT else [str(ROOT / "run.py")]  # they are the same program
        # Java's METEOR and the rows of others are no part of an example that does not name them
        short = [] if any("evaluate." in word for word in words) else ["evaluate.metrics=[cider]"]
        command = [sys.executable, *started, *words, *short, "threads=1", "wandb=disabled"]
        environment = os.environ | ({"PYTHONPATH": str(package)} if package != ROOT else {})
        done = run_program(command, cwd=folder, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    return printed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files; the world and what is made of it are shared by the examples."""
    folder = tmp_path_factory.mktemp("extending")
    for name, content in FILES.items():
        if not name.startswith("cgtgan/"):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_section_has_an_example() -> None:
    parts = ["A reward term", "A backbone", "A data set", "A metric", "A sweep", "An experiment", "A stage"]
    assert list(SECTIONS) == parts
    assert all(commands(part) for part in parts)
    assert len(FILES) == 7


def test_a_reward_term(home: Path) -> None:
    run("A reward term", home)
    (folder,) = home.glob("runs/demo_tiny/*brevity0.2*/seed=0")
    logged = {"reward/brevity", "reward/brevity_greedy", "advantage/brevity", "advantage/brevity_abs"}
    assert all(logged <= row.keys() for row in metrics(folder) if "reward/cos" in row)
    assert "brevity" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_backbone(home: Path, tmp_path: Path) -> None:
    run("A backbone", home)
    (folder,) = home.glob("runs/demo_tiny/demo_custom_*/seed=0")
    picture = tmp_path / "a.png"
    Image.new("RGB", (30, 20), "red").save(picture)
    # from another folder: the checkpoint knows where the encoder lies
    words = ("-m", "cgtgan", "stage=caption", f"checkpoint={folder}", f"images={picture}", "output=out")
    done = run_program([sys.executable, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
    (caption,) = json.loads((tmp_path / "out/captions.json").read_text())
    assert caption["caption"].endswith(".")


def test_a_data_set(home: Path) -> None:
    rows = []
    for number in range(14):
        split = "train" if number < 8 else "val" if number < 11 else "test"
        colour = ("red", "blue", "green")[number % 3]
        (home / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(home / f"photos/{number}.png")
        rows.append({"file": f"{number}.png", "split": split, "captions": [f"A {colour} wall."]})
    (home / "photos/photos.json").write_text(json.dumps(rows))
    colours, things = ("red", "blue", "green"), ("wall", "car", "door", "lamp")
    (home / "sentences.txt").write_text("".join(f"A {c} {t}.\n" for c in colours for t in things))
    run("A data set", home)
    (scores,) = home.glob("runs/photos/*/seed=0/evaluation/test/cgtgan/scores.json")
    assert json.loads(scores.read_text())["images"] == 3


def test_a_metric(home: Path) -> None:
    printed = run("A metric", home)
    (scores,) = home.glob("runs/demo_tiny/demo_t150_clip_agg_k5_noise0.5/seed=0/evaluation/test/cgtgan/scores.json")
    assert 0 < json.loads(scores.read_text())["scores"]["overlap"] <= 1
    assert "overlap" in printed
    assert "overlap" in (scores.parents[3] / "report.html").read_text(encoding="utf-8")


def test_a_sweep(home: Path) -> None:
    run("A sweep", home)
    weights = [
        f.parent.name.partition("brevity")[2].partition("_")[0] for f in home.glob("runs/demo_tiny/*brevity*/seed=0")
    ]
    assert sorted(weights) == ["0", "0.2"]
    (table,) = home.glob("compared/*.csv")
    with table.open(encoding="utf-8") as file:
        assert any("brevity" in str(row) for row in csv.DictReader(file))


def test_an_experiment(home: Path) -> None:
    run("An experiment", home)
    assert list(home.glob("runs/short_captions/*brevity0.2*/seed=0/report.html"))


def test_a_stage(home: Path, tmp_path: Path) -> None:
    """In a copy of the package, changed as the page says."""
    for name in ("cgtgan", "conf", "sweeps", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "cgtgan/stages/longest.py").write_text(FILES["cgtgan/stages/longest.py"], encoding="utf-8")
    for name, old, new in (
        ("config.py", "STAGES = (", 'STAGES = ("longest", '),
        ("cli.py", "STAGE_HELP = {", 'STAGE_HELP = {"longest": "the longest sentence of the corpus",'),
    ):
        file = tmp_path / "cgtgan" / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")
    sentence = run("A stage", home, tmp_path).strip().splitlines()[-1]
    corpus = next(home.glob("artifacts/demo_world/*/corpus.txt"), None)
    assert corpus is None or len(sentence) > 20
