"""From an empty disk to a score with one command: what is missing is fetched, from a server on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.file_server import FileServer, publish_coco
from tests.program import run_program

ROOT = Path(__file__).parents[2]
SMALL = ("tokenizer=corpus", "layers=1", "width=32", "heads=2")


def test_one_command_fetches_coco_trains_and_scores(tmp_path: Path) -> None:
    server = FileServer()
    publish_coco(server, *["train"] * 10, *["restval"] * 6, *["val"] * 3, *["test"] * 5)
    settings = ["dataset=coco", "corpus=coco", f"mirror={server.url}", "download=true", "clip_backbone=random"]
    settings += ["generator.language_model=scratch", "discriminator.encoder=scratch", "threads=1", "name=coco"]
    settings += [f"{part}.{setting}" for part in ("generator", "discriminator") for setting in SMALL]
    settings += ["initialize.steps=2", "train.steps=2", "train.batch_size=4", "wandb=disabled"]
    command = [sys.executable, str(ROOT / "run.py"), *settings, "evaluate.metrics=[cider]"]
    for stage in ("pipeline", "check"):
        done = run_program([*command, f"stage={stage}"], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("fetching" in done.stdout) == (stage == "pipeline")
    server.close()
    assert [path.rpartition("/")[2] for path, _ in server.requests] == [
        *("caption_datasets.zip", "train2014.zip", "val2014.zip")
    ]
    (scores,) = tmp_path.glob("runs/coco/*/seed=0/evaluation/test/cgtgan/scores.json")
    assert "CIDEr" in json.loads(scores.read_text())["scores"]
    captions = json.loads(scores.with_name("captions.json").read_text())
    assert [row["image_id"] for row in captions] == [20, 21, 22, 23, 24]
