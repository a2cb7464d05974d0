"""The reference lines of the validation curve: the baselines, scored as the curve is, in run folder and page."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cgtgan.evaluation.coco_files import load_references, load_results
from cgtgan.evaluation.metrics import score_captions
from tests.program import run_program

ROOT = Path(__file__).parents[2]
ALL = ("init", "mean_shift", "nearest", "consensus", "projection", "supervised", "human")
TINY = (
    *("experiment=demo_tiny", "threads=1", "wandb=disabled", "variant=v", "corpus=text_file", "corpus.path=text.txt"),
    *("train.steps=2", "train.validate_every=1", "evaluate.metrics=[cider]", "report.gallery=0"),
)
COLOURS, SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "star", "ring", "cross")


def corpus(home: Path, verb: str) -> None:
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    lines = [f"a {one} {verb} a {other}." for one, other in zip(things, things[7:] + things[:7], strict=True)]
    (home / "text.txt").write_text("\n".join(lines))


def run(home: Path, *overrides: str, baselines: tuple[str, ...] = ALL) -> str:
    words = [*TINY, f"evaluate.baselines=[{','.join(baselines)}]", *overrides]
    done = run_program([sys.executable, str(ROOT / "run.py"), *words], cwd=home, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    corpus(home, "above")
    run(home)
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(whole, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


def folder(home: Path, variant: str = "v") -> Path:
    return home / f"runs/demo_tiny/{variant}/seed=0"


def stored(home: Path) -> dict[str, Any]:
    return json.loads((folder(home) / "validation/baselines.json").read_text())


def test_the_lines_are_the_curve_s_measure(whole: Path) -> None:
    cider = stored(whole)["CIDEr"]
    assert set(cider) == set(ALL)
    rows = [json.loads(line) for line in (folder(whole) / "metrics.jsonl").read_text().splitlines()]
    # the curve begins with the initial generator
    assert cider["init"] == rows[0]["eval/CIDEr"]
    (world,) = whole.glob("artifacts/demo_world/world-*")
    references = load_references(world / "annotations/val_caption_coco_format.json")
    human = score_captions(load_results(world / "human_val.json"), references, ("cider",))
    assert cider["human"] == pytest.approx(human.corpus["CIDEr"])


def test_the_page_draws_them(whole: Path) -> None:
    page = (folder(whole) / "report.html").read_text()
    for method, cider in stored(whole)["CIDEr"].items():
        assert f">{method.replace('_', ' ')} {100 * cider:.3g}</text>" in page, method
    assert "dashed: baselines on the same images" in page


def test_a_second_evaluation_keeps_the_file_and_adds_what_is_new(home: Path) -> None:
    file, before = folder(home) / "validation/baselines.json", stored(home)
    made = file.stat().st_mtime_ns
    assert "baselines on the validation images" not in run(home, "stage=evaluate")
    run(home, "stage=evaluate", baselines=("init",))
    run(home, "stage=evaluate", baselines=())
    assert file.stat().st_mtime_ns == made
    file.write_text("{}")  # nothing known is as good as no file
    run(home, "stage=evaluate", baselines=("human",))
    assert stored(home)["CIDEr"] == {"human": before["CIDEr"]["human"]}
    assert "baselines on the validation images" in run(home, "stage=evaluate")
    assert stored(home) == {"CIDEr": pytest.approx(before["CIDEr"]), "made_from": before["made_from"]}


def test_a_changed_corpus_remakes_what_is_made_of_it(home: Path) -> None:
    before = stored(home)
    corpus(home, "beside")
    run(home, "stage=evaluate")
    after = stored(home)
    same = {method for method in ALL if after["made_from"][method] == before["made_from"][method]}
    assert same == {"human"}
    assert after["CIDEr"]["human"] == before["CIDEr"]["human"]
    assert after["CIDEr"]["nearest"] != before["CIDEr"]["nearest"]


def test_without_a_curve_there_are_no_lines(home: Path) -> None:
    run(home, "stage=evaluate", "variant=transfer", f"checkpoint={folder(home)}", baselines=("init",))
    assert (folder(home, "transfer") / "evaluation/test/init/scores.json").is_file()
    assert not (folder(home, "transfer") / "validation").exists()


def test_where_the_validation_images_are_gone_the_test_images_are_scored_all_the_same(home: Path) -> None:
    (folder(home) / "validation/baselines.json").unlink()
    (world,) = home.glob("artifacts/demo_world/world-*")
    (world / "human_val.json").unlink()
    said = run(home, "stage=evaluate", baselines=("human",))
    assert "the validation curve has no reference lines: " in said
    assert not (folder(home) / "validation/baselines.json").exists()


def test_every_row_says_its_updates_and_seconds(whole: Path) -> None:
    page = (folder(whole) / "report.md").read_text()
    for name, updates in (("Initialisation only", 20), ("Projection", 20), ("CgT-GAN", 2), ("Supervised", 22)):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name}")]
        assert f"{updates} updates in " in row
    (nearest,) = [line for line in page.splitlines() if line.startswith("| Nearest sentence")]
    assert "updates" not in nearest
