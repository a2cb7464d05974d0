"""The pipeline on photographs, small: 50 training pictures, 20 steps, every row (docs/photographs.md)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.program import run_program

ROOT = Path(__file__).resolve().parents[2]
PICTURES = {"train": 50, "val": 10, "test": 10}
SMALL = (
    "initialize.steps=20", "initialize.batch_size=8", "initialize.checkpoint_every=20", "train.steps=20",
    "train.batch_size=4", "train.num_samples=2", "train.validate_every=10", "generator.layers=1",
    "discriminator.layers=1", "evaluate.supervised.steps=20", "evaluate.supervised.validate_every=10",
    "evaluate.metrics=[bleu,cider]", "threads=1", "wandb=disabled",
)  # fmt: skip


@pytest.fixture(scope="module")
def photographs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `experiment=flickr8k` reads it, with the first pictures of each list and 400 sentences."""
    folder, whole = tmp_path_factory.mktemp("photographs"), shared / "data" / "flickr8k"
    for name in ("images", "references.json", "photo_clip.py", "photo_clip.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(whole / name)
    (folder / "lists").mkdir()
    for split, count in PICTURES.items():
        lines = (whole / "lists" / f"flickr8k_{split}.txt").read_text().splitlines(keepends=True)
        (folder / "lists" / f"flickr8k_{split}.txt").write_text("".join(lines[:count]))
    sentences = (whole / "corpus.txt").read_text().splitlines(keepends=True)
    (folder / "corpus.txt").write_text("".join(sentences[:400]))
    return folder


POSTERIOR = (  # as docs/photographs.md has it
    "reward_weights=posterior", "reward_weights.terms.entropy=0.05", "gap=mean", "train.use_discriminator=false",
    "train.baseline=leave_one_out", "train.advantage_norm=batch", "train.loss_norm=constant", "train.ema=0.95",
)  # fmt: skip


def rows(
    photographs: Path, home: Path, experiment: str, *settings: str, variant: str = "usual"
) -> dict[str, dict[str, float]]:
    """Runs the pipeline; the scores of each row."""
    program = [sys.executable, str(ROOT / "run.py"), f"experiment={experiment}", f"dataset.root={photographs}"]
    done = run_program([*program, f"variant={variant}", *SMALL, *settings], cwd=home, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = home / "runs" / experiment / variant / "seed=0"
    assert (folder / "report.html").is_file()
    files = (folder / "evaluation" / "test").glob("*/scores.json")
    return {file.parent.name: json.loads(file.read_text())["scores"] for file in files}


def test_every_row_of_both_ways_on_fifty_photographs(photographs: Path, tmp_path: Path) -> None:
    ours = rows(photographs, tmp_path, "flickr8k")
    assert set(ours) == {"cgtgan", "consensus", "supervised"}
    published = rows(photographs, tmp_path, "flickr8k_published")
    assert set(published) == {"cgtgan", "init", "mean_shift", "projection", "nearest"}
    for variant, settings in {"clip_cos": ["reward_weights=clip_cos"], "posterior": [*POSTERIOR]}.items():
        alone = ("evaluate.baselines=[]", *settings)
        others = rows(photographs, tmp_path, "flickr8k_published", *alone, variant=variant)
        assert set(others) == {"cgtgan"}
        published[variant] = others["cgtgan"]
    sentences = {**{f"ours {k}": v for k, v in ours.items()}, **published}
    assert sentences["ours consensus"]["CIDEr"] > 0.05 < sentences["nearest"]["CIDEr"]  # whole sentences of people
    assert all(0 <= scores[name] <= 10 for scores in sentences.values() for name in ("BLEU-4", "CIDEr"))
