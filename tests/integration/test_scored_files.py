"""stage=evaluate captions=[A.json,B.json]: several files are scored, and compared by the paired bootstrap."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cgtgan.checks import validate
from cgtgan.config import ClipBackboneConfig, Config
from cgtgan.errors import InputError, MissingFileError
from cgtgan.evaluation.bootstrap import SystemScores, paired_bootstrap
from cgtgan.stages import evaluate, report

ROOT = Path(__file__).parents[2]
WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "dog",
    "cat",
    "bus",
    "man",
    "on",
    "under",
    "near",
    "the",
    "old",
    "small",
    "table",
    "chair",
    "runs",
    "sits",
]
METRICS = ["rouge_l", "cider"]
IDS = range(1, 41)


def sentences(seed: int) -> dict[int, str]:
    draw = random.Random(seed)
    return {i: " ".join(draw.choices(WORDS, k=8)) for i in IDS}


def write(path: Path, captions: dict[int, str]) -> Path:
    path.write_text(json.dumps([{"image_id": i, "caption": text} for i, text in captions.items()]))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Good captions (half of the words of a reference), bad ones (other words), and the references."""
    references = sentences(0)
    good = {i: " ".join(text.split()[:5]) for i, text in references.items()}
    write(tmp_path / "good.json", good)
    write(tmp_path / "bad.json", sentences(1))
    rows = [{"image_id": i, "caption": text} for i, text in references.items()]
    (tmp_path / "references.txt").write_text(json.dumps({"annotations": rows}))
    return tmp_path


def settings(home: Path, captions: Any, **fields: Any) -> Config:
    cfg = Config(stage="evaluate", captions=captions, artifacts_dir=str(home / "made"), **fields)
    cfg.generator.tokenizer = cfg.discriminator.tokenizer = "corpus"
    cfg.evaluate.metrics, cfg.evaluate.references = METRICS, str(home / "references.txt")
    cfg.report.resamples = 300
    validate(cfg)
    return cfg


def lines(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(row, metric) -> line of comparison.csv"""
    with (folder / "comparison.csv").open(encoding="utf-8", newline="") as file:
        return {(line["row"], line["metric"]): line for line in csv.DictReader(file)}


def ciders(folder: Path) -> np.ndarray:
    rows = json.loads((folder / "per_image.json").read_text())
    return np.asarray([[row["CIDEr"] for row in sorted(rows, key=lambda row: str(row["image_id"]))]])


def test_two_files_stand_side_by_side_with_the_paired_bootstrap(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.run(settings(home, [str(home / "bad.json"), str(home / "good.json")]))
    printed = " ".join(capsys.readouterr().out.split())
    bad, good = (ciders(home / f"{name}_scores") for name in ("bad", "good"))
    systems = [SystemScores(good, (0,)), SystemScores(bad, (0,))]
    (expected,) = paired_bootstrap(systems, [(0, 1)], resamples=300, seed=0)
    line = lines(home / "comparison")["good", "CIDEr"]
    assert (line["baseline"], line["method"], line["seeds"]) == ("bad", "captions", "")
    assert float(line["mean"]) == pytest.approx(good.mean())
    for name, value in {
        "diff": expected.value,
        "ci_low": expected.images.low,
        "ci_high": expected.images.high,
        "p": expected.images.p,
    }.items():
        assert float(line[name]) == pytest.approx(value, abs=1e-9)
    assert f"Highest CIDEr of 2 files: good, {100 * good.mean():.1f}; " in printed
    assert "above bad (95% interval over test images: +" in printed
    page = (home / "comparison/report.html").read_text()
    assert "Captions made elsewhere, side by side" in page
    assert sum(text in page for text in sentences(1).values()) == 12  # a gallery of what they wrote
    assert "eeds" not in page.partition("<main>")[2]  # nothing was trained here


def test_a_pattern_a_wrong_file_and_what_is_kept(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "broken.json").write_text('{"a": 1}')
    write(home / "foreign.json", {977: "a cat"})
    with pytest.raises(InputError, match=r"2 of 4 files were not scored: .*broken\.json, .*foreign\.json; the scores"):
        evaluate.run(settings(home, str(home / "*.json")))
    printed = " ".join(capsys.readouterr().out.split())
    assert "broken.json: the file is a JSON dict, not a list" in printed
    assert f"{home}/foreign.json: 1 image (977) has a caption but no entry among the references" in printed
    assert {row for row, _ in lines(home / "comparison")} == {"good", "bad"}
    with pytest.raises(MissingFileError, match=r"captions=.*none\*\.json: no file matches"):
        evaluate.run(settings(home, str(home / "none*.json")))


def test_other_images_have_a_table_of_their_own_and_output_holds_all(home: Path) -> None:
    (home / "part").mkdir()
    write(home / "part/bad.json", {i: text for i, text in sentences(1).items() if i < 9})
    files = [str(home / name) for name in ("good.json", "bad.json", "part/bad.json")]
    evaluate.run(settings(home, files, output=str(home / "out")))
    folders = {path.name for path in (home / "out").iterdir() if path.is_dir()}
    assert folders == {"good_scores", f"{home.name}_bad_scores", "part_bad_scores"}
    table = lines(home / "out")
    (part,) = [
        line for (row, metric), line in table.items() if line["test_set"].endswith("8 images") and metric == "CIDEr"
    ]
    assert part["baseline"] == ""
    assert not list(home.glob("*_scores"))


def test_score_folders_are_compared_by_report(home: Path) -> None:
    for name in ("good", "bad"):
        evaluate.run(settings(home, str(home / f"{name}.json")))
    assert not (home / "comparison").exists()  # of one file there is nothing to compare
    cfg = Config(stage="report", runs=[str(home / "good_scores"), str(home / "bad_scores")], output=str(home / "table"))
    cfg.report.resamples = 300
    report.run(cfg)
    assert lines(home / "table")["bad", "CIDEr"]["baseline"] == "good"
    assert float(lines(home / "table")["bad", "CIDEr"]["diff"]) == pytest.approx(
        (ciders(home / "bad_scores") - ciders(home / "good_scores")).mean()
    )


def test_the_command_scores_files_without_torch(home: Path) -> None:
    words = ["stage=evaluate", "captions=[good.json, bad.json]", "evaluate.references=references.txt"]
    words += ["evaluate.metrics=[bleu,rouge_l,cider]", "report.resamples=100"]
    code = (
        "import sys\nfrom cgtgan.__main__ import main\n"
        f"sys.argv = ['run.py', *{words!r}]\ncode = main()\n"
        "print('imported:', [name for name in ('torch', 'transformers') if name in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "imported: [] 0", done.stdout + done.stderr
    assert "report: " in done.stdout
    table = lines(home / "comparison")
    of_bleu = table["bad", "BLEU-1"]  # from counts.json
    assert float(of_bleu["diff"]) == pytest.approx(float(of_bleu["mean"]) - float(table["good", "BLEU-1"]["mean"]))
    assert float(of_bleu["ci_high"]) < 0


COLOURS = """
import numpy as np
import torch

class Colours:
    \"\"\"A picture is its mean colour, a text the colours that it names, and a little grey.\"\"\"
    logit_scale = 100.0

    @classmethod
    def load(cls):
        return cls()

    def encode_images(self, images):
        return torch.tensor(np.array([np.asarray(i.convert("RGB"), dtype="float32").mean((0, 1)) for i in images]))

    def encode_texts(self, texts):
        return torch.tensor([[0.1 + text.count(word) for word in ("red", "green", "blue")] for text in texts])
"""


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Three pictures of one colour each, two right captions and a wrong one."""
    (tmp_path / "colours.py").write_text(COLOURS)
    (tmp_path / "pictures").mkdir()
    for name, colour in {"000000000007.png": (255, 0, 0), "8.jpg": (0, 255, 0), "sky.png": (0, 0, 255)}.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / "pictures" / name)
    rows = [{"image_id": i, "caption": text} for i, text in {7: "red", 8: "a green one", "sky": "red"}.items()]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    return tmp_path


def with_pictures(home: Path, captions: Any, *metrics: str, references: str | None = None) -> Config:
    cfg = Config(stage="evaluate", captions=captions, images=str(home / "pictures"), artifacts_dir=str(home / "made"))
    cfg.generator.tokenizer = cfg.discriminator.tokenizer = "corpus"
    cfg.clip_backbone = ClipBackboneConfig(name="custom", kind="custom", model=f"{home / 'colours.py'}:Colours")
    cfg.evaluate.metrics, cfg.evaluate.references = list(metrics), references
    validate(cfg)
    return cfg


def cosine(a: list[float], b: list[float]) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def test_clip_score_needs_pictures_alone(coloured: Path) -> None:
    evaluate.run(with_pictures(coloured, str(coloured / "captions.json"), "clipscore"))
    record = json.loads((coloured / "captions_scores/scores.json").read_text())
    each = {row["image_id"]: row for row in json.loads((coloured / "captions_scores/per_image.json").read_text())}
    right, wrong = 2.5 * cosine([1, 0, 0], [1.1, 0.1, 0.1]), 2.5 * cosine([0, 0, 1], [1.1, 0.1, 0.1])
    assert {i: row["CLIPScore"] for i, row in each.items()} == pytest.approx(
        {7: right, 8: right, "sky": wrong}, abs=2e-3
    )
    assert record["scores"] == {"CLIPScore": pytest.approx((2 * right + wrong) / 3, abs=2e-3)}
    assert record["against"] == f"pictures of {coloured / 'pictures'}"


def test_clip_score_with_pictures_and_references(coloured: Path) -> None:
    rows = [{"image_id": i, "caption": text} for i, text in {"7": "red", "8": "blue", "sky": "a blue sky"}.items()]
    (coloured / "references.json").write_text(json.dumps({"annotations": rows}))
    given = with_pictures(
        coloured, str(coloured / "captions.json"), "rouge_l", "clipscore", references=str(coloured / "references.json")
    )
    evaluate.run(given)
    record = json.loads((coloured / "captions_scores/scores.json").read_text())
    assert record["scores"].keys() == {"ROUGE-L", "CLIPScore", "RefCLIPScore"}
    each = {str(row["image_id"]): row for row in json.loads((coloured / "captions_scores/per_image.json").read_text())}
    right = 2.5 * cosine([1, 0, 0], [1.1, 0.1, 0.1])
    assert each["7"]["RefCLIPScore"] == pytest.approx(2 * right / (right + 1), abs=2e-3)  # the reference is the caption
    assert each["8"]["RefCLIPScore"] < each["7"]["RefCLIPScore"]


def test_pictures_that_are_missing_and_metrics_that_need_references(coloured: Path) -> None:
    write(coloured / "other.json", {7: "red", 99: "red"})
    both = [str(coloured / "captions.json"), str(coloured / "other.json")]
    with pytest.raises(InputError, match=r"1 of 2 files were not scored: .*other\.json"):
        evaluate.run(with_pictures(coloured, both, "clipscore"))
    with pytest.raises(InputError, match=r"other\.json: 1 image \(99\) has no picture in images="):
        evaluate.run(with_pictures(coloured, both[1], "clipscore"))
    with pytest.raises(InputError, match=r"evaluate\.metrics=\[bleu\] needs references: add evaluate\.references=FILE"):
        with_pictures(coloured, both, "bleu")
    settings_of_demo = Config(stage="evaluate", captions=both[0], images=str(coloured / "pictures"))
    settings_of_demo.evaluate.metrics = ["clipscore"]
    settings_of_demo.generator.tokenizer = settings_of_demo.discriminator.tokenizer = "corpus"
    with pytest.raises(InputError, match="the demo's backbone knows the demo's drawn pictures alone"):
        validate(settings_of_demo)
