"""NoCaps: pictures go by file_name, there is no training split, and every domain is scored alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cgtgan.config import Config, DatasetConfig
from cgtgan.data.datasets import load_split
from cgtgan.errors import MissingFileError
from cgtgan.evaluation.metrics import score_captions
from cgtgan.reporting.tables import MethodRow, domain_rows, score_tables
from cgtgan.stages import evaluate

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
