"""An engineer with a folder of images and a text file, and no caption of any image."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from tests.program import run_program

ROOT = Path(__file__).parents[2]
SMALL = ("tokenizer=corpus", "layers=1", "width=32", "heads=2")


def test_pictures_and_a_text_file_are_enough(tmp_path: Path) -> None:
    for n in range(24):
        place = tmp_path / "photos" / ("red" if n % 2 else "blue") / f"picture {n}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + n, 50), (250 if n % 2 else 0, 5 * n, 0 if n % 2 else 250)).save(place)
    (tmp_path / "text.txt").write_text(
        "".join(f"a {c} wall near a {t}\n\n" for c in ("red", "blue") for t in ("tree", "car", "dog", "lamp"))
    )
    base = [sys.executable, str(ROOT / "run.py"), "threads=1", "name=mine"]
    args = [
        "dataset=folder",
        "dataset.root=photos",
        "dataset.val_fraction=0.2",
        "dataset.test_fraction=0.2",
        "corpus=text_file",
        "corpus.path=text.txt",
    ]
    args += ["clip_backbone.kind=random", "generator.language_model=scratch", "discriminator.encoder=scratch"]
    args += [f"{part}.{setting}" for part in ("generator", "discriminator") for setting in SMALL]
    args += ["initialize.steps=3", "train.steps=3", "train.batch_size=4", "train.checkpoint_every=2", "wandb=disabled"]
    done = run_program([*base, *args], cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the test images have no references: clipscore, diversity are computed" in " ".join(done.stdout.split())
    (folder,) = (tmp_path / "runs" / "mine").glob("*/seed=0")
    assert (folder / "checkpoints/best/generator.json").is_file()
    assert (folder / "checkpoints/best").resolve() == (folder / "checkpoints/last").resolve()
    check_the_page(folder)
    done = run_program(
        [*base, "stage=caption", f"checkpoint={folder}", "images=photos", "output=out"], cwd=tmp_path, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((tmp_path / "out/captions.json").read_text())) == 24
    scored = run_program([*base, *args, "stage=evaluate"], cwd=tmp_path, timeout=100)
    assert scored.returncode == 1
    assert "the test split has no references to score bleu, meteor, rouge_l, cider against" in scored.stderr
    assert "Traceback" not in scored.stderr


def check_the_page(folder: Path) -> None:
    """Curves, the discriminator's health and pictures ranked by CLIPScore stand on it; scores against people do not."""
    scores = json.loads((folder / "evaluation/test/cgtgan/scores.json").read_text())
    assert scores["images"] == 8
    assert {"CLIPScore", "Distinct-1", "Length"} <= scores["scores"].keys()
    assert not {"RefCLIPScore", "CIDEr"} & scores["scores"].keys()
    page = (folder / "report.html").read_text()
    for part in ('id="curves"', 'id="discriminator"', 'id="best"', 'id="pictures"', "Right on samples"):
        assert part in page, part
    assert "Test pictures with the highest CLIPScore" in page
    assert "reaches CLIPScore" in page
    assert "The pictures have no references" in page
    assert page.count('<span class="badge">CLIPScore ') == 24  # eight pictures in each of three galleries
