"""dataset=custom: a function of the user's own lists the images, for every stage of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from tests.program import run_program

ROOT = Path(__file__).parents[2]
READER = """
import json

def read(root, split):
    '''Every caption of a picture is in one JSON-lines file.'''
    with open(root / "all.jsonl") as file:
        for row in map(json.loads, file):
            if row["part"] == split:
                yield row["name"], f"pictures/{row['name']}.png", row["texts"]
"""
SETTINGS = [
    *("dataset=custom", "dataset.root=data", "dataset.reader=my_data.py:read"),
    *("corpus=text_file", "corpus.path=text.txt", "clip_backbone=vit_b32", "clip_backbone.kind=random"),
    *("generator.language_model=scratch", "discriminator.encoder=scratch"),
    *(f"{part}.{size}" for part in ("generator", "discriminator") for size in ("layers=1", "width=32", "heads=2")),
    *("generator.tokenizer=corpus", "discriminator.tokenizer=corpus", "initialize.steps=2", "train.steps=2"),
    *("train.batch_size=4", "evaluate.baselines=[supervised]", "evaluate.metrics=[bleu]"),
    *("wandb=disabled", "name=mine", "variant=v", "threads=1"),
]


def run(home: Path, *overrides: str, code: int = 0) -> str:
    command = [sys.executable, str(ROOT / "run.py"), *SETTINGS, *overrides]
    done = run_program(command, cwd=home, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def write_data(home: Path) -> None:
    (home / "data/pictures").mkdir(parents=True)
    rows = []
    for n in range(18):
        colour = "red" if n % 2 else "blue"
        picture = Image.new("RGB", (40 + n, 50), (250 if n % 2 else 0, 5 * n, 0 if n % 2 else 250))
        picture.save(home / f"data/pictures/no {n}.png")
        part = "train" if n < 10 else "val" if n < 14 else "test"
        rows.append({"name": f"no {n}", "part": part, "texts": [f"a {colour} wall", f"{colour} paint everywhere"]})
    (home / "data/all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "my_data.py").write_text(READER)
    texts = (f"a {c} wall near a {t}\n" for c in ("red", "blue") for t in ("tree", "car", "dog", "lamp"))
    (home / "text.txt").write_text("".join(texts))


def test_every_stage_takes_its_images_from_the_reader(tmp_path: Path) -> None:
    write_data(tmp_path)
    run(tmp_path)  # the pipeline
    folder = tmp_path / "runs/mine/v/seed=0"
    for method in ("cgtgan", "supervised"):
        captions = json.loads((folder / f"evaluation/test/{method}/captions.json").read_text())
        assert [row["image_id"] for row in captions] == [f"no {n}" for n in range(14, 18)]
        assert (folder / f"evaluation/test/{method}/scores.json").is_file()
    run(tmp_path, "stage=caption", f"checkpoint={folder}", "images=data/pictures", "output=out")
    assert len(json.loads((tmp_path / "out/captions.json").read_text())) == 18

    (tmp_path / "elsewhere").mkdir()  # a place is no part of a run, its content is
    (tmp_path / "my_data.py").rename(tmp_path / "elsewhere/my_data.py")
    assert "done already" in run(tmp_path, "stage=train", "dataset.reader=elsewhere/my_data.py:read")
    (tmp_path / "my_data.py").write_text(READER + "\n# changed\n")
    message = run(tmp_path, "stage=train", code=1)
    assert "holds a run with other inputs" in message
    assert "images was" in message
