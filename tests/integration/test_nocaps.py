"""NoCaps: pictures go by file_name, there is no training split, and every domain is scored alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cgtgan.config import ClipBackboneConfig, Config, DatasetConfig, DecodeConfig, as_dict
from cgtgan.data.datasets import load_split
from cgtgan.errors import MissingFileError
from cgtgan.evaluation.metrics import score_captions
from cgtgan.reporting.tables import MethodRow, domain_rows, score_tables
from cgtgan.runtime.artifacts import write_json
from cgtgan.stages import evaluate
from tests.tiny_gan import tiny_parts

DOMAINS = ("in-domain", "near-domain", "out-domain")
NOUNS = ("dog", "cat", "horse", "bird", "lion", "zebra", "wolf", "goat", "snail")
REFERENCES = {i: [f"a {noun} on a field", f"one {noun} stands here"] for i, noun in enumerate(NOUNS)}
# right for the images 0-2, near for 3-5, wrong for 6-8
CAPTIONS = {
    i: f"a {noun} on a field" if i < 3 else f"a {noun} in a box" if i < 6 else "two men" for i, noun in enumerate(NOUNS)
}
METRICS = ["bleu", "rouge_l", "cider"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images whose ids say nothing of their files' names, which are hexadecimal, digits alone among them."""
    root = tmp_path_factory.mktemp("nocaps")
    (root / "images").mkdir()
    images = [
        {"id": i, "file_name": f"{i + 1:016d}.jpg" if i % 2 else f"00a{i}f.jpg", "domain": DOMAINS[i // 3]}
        for i in REFERENCES
    ]
    for image in images:
        Image.new("RGB", (20 + image["id"], 20)).save(root / "images" / image["file_name"])
    rows = [{"image_id": i, "id": i, "caption": text} for i, texts in REFERENCES.items() for text in texts]
    (root / "nocaps_val_4500_captions.json").write_text(json.dumps({"images": images, "annotations": rows}))
    (root / "captions.json").write_text(json.dumps([{"image_id": i, "caption": text} for i, text in CAPTIONS.items()]))
    return root


def test_pictures_go_by_their_names_and_there_is_no_training_split(root: Path) -> None:
    for name in ("val", "test"):
        split = load_split(DatasetConfig(kind="nocaps"), name, root)
        assert split.references == REFERENCES
        assert {image.image_id: Image.open(image.path).size[0] - 20 for image in split.images} == {
            i: i for i in range(9)
        }
    with pytest.raises(MissingFileError, match="nocaps has no train split: train with another data set"):
        load_split(DatasetConfig(kind="nocaps"), "train", root)


@pytest.mark.parametrize("by_file", [False, True])
def test_every_domain_is_scored_alone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by_file: bool
) -> None:
    cfg = Config(stage="evaluate", captions=str(root / "captions.json"), output=str(tmp_path / "scores"))
    cfg.dataset = DatasetConfig(name="nocaps", kind="nocaps", root="/nowhere" if by_file else str(root))
    cfg.evaluate.metrics, cfg.wandb.mode = METRICS[:2], "disabled"
    cfg.evaluate.references = str(root / "nocaps_val_4500_captions.json") if by_file else None
    evaluate.run(cfg)
    cfg.evaluate.metrics = METRICS  # a metric is added to each domain, too
    evaluate.run(cfg)
    (place,) = tmp_path.rglob("scores.json")
    domains = json.loads(place.read_text())["domains"]
    for n, domain in enumerate(DOMAINS):
        ids = range(3 * n, 3 * n + 3)
        alone = score_captions({i: CAPTIONS[i] for i in ids}, {i: REFERENCES[i] for i in ids}, tuple(METRICS))
        assert domains[domain] == {"images": 3, "scores": pytest.approx(alone.corpus)}
    assert domains["in-domain"]["scores"]["BLEU-1"] == pytest.approx(1.0)
    assert domains["out-domain"]["scores"]["BLEU-1"] < 1e-6
    printed = capsys.readouterr().out
    assert printed.count("captions.json, near-domain") == 2


def test_rows_of_domains_are_apart(root: Path) -> None:
    record = {"domains": {"in-domain": {"images": 3, "scores": {"CIDEr": 2.0}}}}
    whole = MethodRow("CgT-GAN", scores={"CIDEr": [1.0]})
    (table,) = score_tables([whole, *domain_rows("CgT-GAN", record)])
    assert [(heading, [row.name for row, _ in rows]) for heading, rows in table.parts] == [
        ("", ["CgT-GAN"]), ("By domain of the pictures, each scored alone", ["CgT-GAN, in-domain"]),
    ]  # fmt: skip
    assert domain_rows("CgT-GAN", {"scores": {}}) == []


ENCODER = """
import torch

class Means:
    @classmethod
    def load(cls):
        return cls()

    def encode_images(self, pictures):
        return torch.stack([torch.linspace(1, 2, 8) * picture.size[0] for picture in pictures])

    def encode_texts(self, texts):
        return torch.stack([torch.linspace(2, 1, 8) * len(text) for text in texts])
"""


def test_a_checkpoint_is_scored_with_a_row_per_domain(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """A generator that nobody trained, with a small encoder of its own."""
    (tmp_path / "encoder.py").write_text(ENCODER)
    folder = tmp_path / "trained" / "checkpoints" / "step_000001"
    tiny_parts()[1].bundle.save(folder)
    clip = ClipBackboneConfig(name="custom", kind="custom", model=f"{tmp_path}/encoder.py:Means")
    write_json(folder / "checkpoint.json", {"clip_backbone": as_dict(clip), "decode": as_dict(DecodeConfig())})
    cfg = Config(stage="evaluate", checkpoint=str(folder), clip_backbone=clip, runs_dir=str(tmp_path / "runs"))
    cfg.artifacts_dir, cfg.wandb.mode, cfg.device = str(tmp_path / "artifacts"), "disabled", "cpu"
    cfg.dataset = DatasetConfig(name="nocaps", kind="nocaps", root=str(root))
    cfg.evaluate.metrics, cfg.evaluate.baselines = ["rouge_l"], []
    evaluate.run(cfg)
    (place,) = tmp_path.glob("runs/**/cgtgan/scores.json")
    captions = {row["image_id"]: row["caption"] for row in json.loads((place.parent / "captions.json").read_text())}
    domains = json.loads(place.read_text())["domains"]
    for n, domain in enumerate(DOMAINS):
        ids = range(3 * n, 3 * n + 3)
        alone = score_captions({i: captions[i] for i in ids}, {i: REFERENCES[i] for i in ids}, ("rouge_l",))
        assert domains[domain]["scores"] == pytest.approx(alone.corpus)
    printed = capsys.readouterr().out
    assert all(f"CgT-GAN, {domain}" in printed for domain in DOMAINS)


def test_files_side_by_side_have_rows_of_domains(root: Path, tmp_path: Path) -> None:
    worse = [{"image_id": i, "caption": "two men"} for i in CAPTIONS]
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    files = [str(root / "captions.json"), str(tmp_path / "worse.json")]
    cfg = Config(stage="evaluate", captions=files, output=str(tmp_path / "scores"))
    cfg.dataset = DatasetConfig(name="nocaps", kind="nocaps", root=str(root))
    cfg.evaluate.metrics, cfg.wandb.mode = ["rouge_l"], "disabled"
    evaluate.run(cfg)
    page = (tmp_path / "scores" / "report.html").read_text()
    table = (tmp_path / "scores" / "comparison.md").read_text()
    for domain in DOMAINS:
        for name in ("captions", "worse"):
            assert f"{name}, {domain}" in table
            assert f"{name}, {domain}" in page
