"""Every stage on real photographs and captions with the real tokenizer files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

from tests.program import run_program

ROOT = Path(__file__).parents[2]


def prepared(shared: Path, root: Path) -> Path:
    """A copy of the sample whose photographs are also grey-scale, CMYK and turned by their EXIF entry."""
    coco = root / "data" / "coco"
    shutil.copytree(shared / "data" / "tokenizers", root / "data" / "tokenizers")
    (coco / "images").mkdir(parents=True)
    for name in ("captions_coco_mini_train2017.json", "captions_val2014_notest.json.gz"):
        shutil.copy(shared / "data" / "coco" / name, coco / name)
    for n, path in enumerate(sorted((shared / "data" / "coco" / "images").glob("*.jpg"))):
        with Image.open(path) as image:
            target = coco / "images" / path.name
            if n % 4 == 0:
                image.convert("L").save(target)
            elif n % 4 == 1:
                image.convert("CMYK").save(target)
            elif n % 4 == 2:
                exif = image.getexif()
                exif[0x0112] = 6
                image.save(target, exif=exif)
            else:
                shutil.copy(path, target)
    return coco


def test_every_stage_on_real_photographs(shared: Path, tmp_path: Path) -> None:
    coco = prepared(shared, tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    run = [sys.executable, str(ROOT / "run.py"), "experiment=coco_sample", f"dataset.root={coco}", "threads=1"]
    done = run_program(run, cwd=home, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (folder,) = home.glob("runs/coco_sample/*/seed=0")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "meaningless" in page
    scores = json.loads((folder / "evaluation/test/cgtgan/scores.json").read_text())
    assert set(scores["scores"]) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    captions = json.loads((folder / "evaluation/test/cgtgan/captions.json").read_text())
    assert len(captions) == scores["images"] >= 3
    # the tokenizer is GPT-2's own: '.' is 13 and a text survives the round trip
    tokenizer = json.loads((folder / "checkpoints/last/tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["model"]["vocab"]["."] == 13
    assert tokenizer["model"]["vocab"]["<|endoftext|>"] == 50256


def test_a_missing_file_is_said_with_its_mend(tmp_path: Path) -> None:
    for experiment in ("coco_coco", "flickr30k_flickr30k", "coco_gcc", "coco_shutterstock"):
        done = run_program(
            [sys.executable, str(ROOT / "run.py"), f"experiment={experiment}"], cwd=tmp_path, timeout=120
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        first, *lines = done.stderr.splitlines()
        missing = [line for line in lines if line.startswith("  ")]
        assert first == f"error: {len(missing)} inputs are missing:"
        assert sum("dataset." in line or "corpus." in line for line in missing) >= 2, missing
        assert sum("generator." in line or "discriminator." in line for line in missing) == 2, missing
