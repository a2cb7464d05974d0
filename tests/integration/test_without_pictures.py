"""Embeddings that were made before stand for pictures that are not on this machine; no others are taken for them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cgtgan.assets.embedded import image_producer, report_of
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.scores import image_names_of
from cgtgan.assets.splits import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, DatasetConfig
from cgtgan.data.annotated_images import AbsentImages
from cgtgan.errors import InputError
from cgtgan.runtime.artifacts import read_json, save_embeddings, write_json
from cgtgan.stages import evaluate
from tests.file_server import jpeg, karpathy
from tests.program import run_program

ROOT = Path(__file__).parents[2]
SPLITS = ("train",) * 6 + ("restval", "val", "val", "test", "test", "test")
SMALL = ("tokenizer=corpus", "layers=1", "width=32", "heads=2")
TINY = (
    *("dataset=coco", "corpus=coco", "name=tiny", "threads=1", "wandb=disabled", "clip_backbone.kind=random"),
    *("generator.language_model=scratch", "discriminator.encoder=scratch"),
    *(f"{part}.{setting}" for part in ("generator", "discriminator") for setting in SMALL),
    *("initialize.steps=2", "train.steps=2", "train.batch_size=3", "train.checkpoint_every=1", "report.gallery=2"),
    *("evaluate.metrics=[cider,clipscore]", "evaluate.baselines=[supervised]", "evaluate.supervised.steps=2"),
)


def run(home: Path, *words: str, code: int = 0) -> str:
    done = run_program([sys.executable, str(ROOT / "run.py"), *TINY, *words], cwd=home, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def results(home: Path) -> dict[str, Any]:
    """Scores, with what they were made from, and captions of both methods."""
    (folder,) = home.glob("runs/tiny/*/seed=0/evaluation/test")
    return {str(file.relative_to(folder)): json.loads(file.read_text()) for file in folder.rglob("*.json")}


def test_a_pipeline_without_its_pictures_has_the_same_scores(tmp_path: Path) -> None:
    coco = tmp_path / "data" / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "annotations" / "dataset_coco.json").write_bytes(karpathy(*SPLITS))
    for n, split in enumerate(SPLITS, 1):
        folder = "train2014" if split == "train" else "val2014"
        (coco / folder).mkdir(exist_ok=True)
        (coco / folder / f"COCO_{folder}_{n:012d}.jpg").write_bytes(jpeg(n))
    run(tmp_path)
    before = results(tmp_path)
    assert len(before["cgtgan/captions.json"]) == 3

    for folder in (coco / "train2014", coco / "val2014", tmp_path / "runs"):
        shutil.rmtree(folder)
    for folder in (tmp_path / "artifacts").iterdir():
        if folder.name != "image_embeddings":
            shutil.rmtree(folder)
    assert "check: everything that the run reads is here" in run(tmp_path, "stage=check")
    output = run(tmp_path)
    assert output.count("not all pictures are on this machine; their stored embeddings are used") == 3
    assert results(tmp_path) == before
    (page,) = tmp_path.glob("runs/tiny/*/seed=0/report.html")
    assert "No pictures are shown: only their embeddings are here." in page.read_text()
    assert "was not found" not in page.read_text()

    refused = run(tmp_path, "stage=check", "dataset.max_images=1", code=1)
    assert "1 of 1 train images are not in data/coco/train2014" in refused
    assert "has none that were made with these settings from exactly the listed images" in refused


# ------------------------------------------------------------------------------------------------- which ones are taken


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    """Flickr30k with three test images, none of them on disk."""
    rows = [
        {"filename": f"{n}.jpg", "imgid": n, "split": "test", "sentences": [{"raw": f"Number {n}."}]} for n in (1, 2, 3)
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "flickr30k"}))
    cfg = Config(artifacts_dir=str(tmp_path / "artifacts"), device="cpu")
    cfg.dataset = DatasetConfig(name="flickr30k", kind="flickr30k", root=str(tmp_path))
    return Workspace(cfg)


def store(ws: Workspace, ids: list[int], files: str = "a", **more: Any) -> Path:
    """Embeddings of these images, made by the settings of `ws` from files with some names."""
    producer = image_producer(ws, "test") | {"images": files} | more
    path = ws.store.path("image_embeddings", producer, ".safetensors")
    save_embeddings(path, torch.ones(len(ids), 4), ids, kind="image_embeddings", producer=producer)
    return path


def test_embeddings_of_exactly_the_listed_images_are_taken(ws: Workspace) -> None:
    path = store(ws, [1, 2, 3])
    split = dataset_split(ws, "test")
    assert [image.image_id for image in split.images] == [1, 2, 3]
    assert split.references == {n: [f"Number {n}."] for n in (1, 2, 3)}
    assert split.embeddings == path
    assert list(image_embeddings(ws, "test").ids) == [1, 2, 3]


def of_nocaps(ws: Workspace) -> None:
    """In the place of Flickr30k: two test images of NoCaps, which names their files."""
    rows = [{"image_id": n, "id": n, "caption": f"Number {n}."} for n in (0, 1)]
    images = [{"id": n, "file_name": f"00a{n}f.jpg", "domain": "in-domain"} for n in (0, 1)]
    write_json(Path(ws.cfg.dataset.root, "nocaps_val_4500_captions.json"), {"images": images, "annotations": rows})
    ws.cfg.dataset = DatasetConfig(name="nocaps", kind="nocaps", root=ws.cfg.dataset.root)


def test_so_are_those_of_nocaps_whose_pictures_go_by_other_names(ws: Workspace) -> None:
    of_nocaps(ws)
    path = store(ws, [0, 1])
    assert dataset_split(ws, "test").embeddings == path
    assert list(image_embeddings(ws, "test").ids) == [0, 1]


@pytest.mark.parametrize("key", [str, "{}.jpg".format], ids=["ids", "files"])
@pytest.mark.parametrize("bad_images", [0, 2, 3])
def test_captions_made_elsewhere_need_no_picture(ws: Workspace, key: Callable[[int], str], bad_images: int) -> None:
    ws.cfg.dataset.max_bad_images = bad_images
    file = Path(ws.cfg.dataset.root, "captions.json")
    write_json(file, [{"image_id": key(n), "caption": f"Number {n}."} for n in (1, 2, 3)])
    ws.cfg.stage, ws.cfg.captions, ws.cfg.evaluate.metrics = "evaluate", str(file), ["rouge_l"]
    evaluate.run(ws.cfg)
    folder = file.with_name("captions_scores")
    assert read_json(folder / "scores.json")["scores"] == {"ROUGE-L": 1}
    assert len(read_json(folder / "per_image.json", list)) == 3


def test_nor_do_those_of_nocaps_under_file_names(ws: Workspace) -> None:
    of_nocaps(ws)
    ws.cfg.captions = "captions.json"
    assert image_names_of(ws) == {n: str(Path(ws.cfg.dataset.root, "images", f"00a{n}f.jpg")) for n in (0, 1)}


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 3, 4], [1, 2, 4]])
def test_those_of_other_images_are_not(ws: Workspace, ids: list[int]) -> None:
    store(ws, ids)
    with pytest.raises(AbsentImages, match=r"3 of 3 test images are not in .* has none that were made with these"):
        dataset_split(ws, "test")


def test_those_of_another_clip_split_or_kind_or_under_a_false_name_are_not(ws: Workspace) -> None:
    path = store(ws, [1, 2, 3])
    for changed in (
        replace(ws.cfg, clip_backbone=replace(ws.cfg.clip_backbone, kind="openai", model="RN50")),
        replace(ws.cfg, dataset=replace(ws.cfg.dataset, jpeg_draft=True)),
    ):
        with pytest.raises(AbsentImages, match="has none"):
            dataset_split(Workspace(changed), "test")
    path.rename(path.with_name("image_embeddings-0123456789ab.safetensors"))
    with pytest.raises(AbsentImages, match="3 of 3 test images are not in"):
        dataset_split(ws, "test")


def test_of_several_none_is_guessed(ws: Workspace) -> None:
    store(ws, [1, 2, 3])
    store(ws, [1, 2, 3], files="b")
    with pytest.raises(AbsentImages, match=r"of their embeddings .* has several"):
        dataset_split(ws, "test")


def test_pictures_that_could_not_be_read_count_and_a_repair_is_taken(ws: Workspace) -> None:
    first = store(ws, [1, 3])
    write_json(report_of(first), [{"image_id": 2, "why": "2.jpg is damaged", "state": [1, 1]}])
    split = dataset_split(ws, "test")
    assert ([image.image_id for image in split.images], split.embeddings) == ([1, 2, 3], first)
    with pytest.raises(InputError, match=re.escape("1 of 3 test images cannot be read")):
        image_embeddings(ws, "test")
    ws.cfg.dataset.max_bad_images = 1
    assert list(image_embeddings(ws, "test").ids) == [1, 3]
    second = store(ws, [1, 2, 3], repaired=[[2, 9]])
    assert dataset_split(Workspace(ws.cfg), "test").embeddings == second
