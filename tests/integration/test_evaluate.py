"""stage=evaluate: CLIPScore and diversity of a run, and captions made elsewhere, scored without a run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image

from cgtgan.assets.backbone import load_demo_clip
from cgtgan.checks import validate
from cgtgan.config import Config, DatasetConfig, EvaluateConfig
from cgtgan.errors import InputError, UserError
from cgtgan.evaluation.diversity import self_cider, words
from cgtgan.evaluation.metrics import score_captions
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.run_identity import scientific_settings
from cgtgan.runtime.artifacts import load_embeddings
from cgtgan.stages import evaluate
from tests.program import run_program

ROOT = Path(__file__).parents[2]
TINY = (
    "experiment=demo_tiny",
    "threads=1",
    "wandb=disabled",
    "clip_backbone.demo.steps=60",
    "initialize.steps=60",
    "train.steps=2",
)
METRICS = "evaluate.metrics=[rouge_l,cider,clipscore,diversity]"


def run(home: Path, *overrides: str, code: int = 0) -> str:
    command = [sys.executable, str(ROOT / "run.py"), *TINY, *overrides]
    done = run_program(command, cwd=home, timeout=300, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    run(home, METRICS, "evaluate.self_cider_samples=3", "evaluate.baselines=[nearest]")
    return home


def scored(home: Path, method: str) -> tuple[dict[str, Any], dict[int, dict[str, float]], dict[int, str]]:
    """scores.json, and by image per_image.json and captions.json"""
    (folder,) = home.glob(f"runs/demo_tiny/*/seed=0/evaluation/test/{method}")
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("scores", "per_image", "captions")}
    return (
        read["scores"],
        {row["image_id"]: row for row in read["per_image"]},
        {row["image_id"]: row["caption"] for row in read["captions"]},
    )


def references_of(home: Path) -> dict[int, list[str]]:
    (path,) = home.glob("artifacts/demo_world/world-*/annotations/test_caption_coco_format.json")
    found: dict[int, list[str]] = {}
    for row in json.loads(path.read_text())["annotations"]:
        found.setdefault(row["image_id"], []).append(row["caption"])
    return found


def test_clip_scores_are_those_of_the_runs_own_backbone(home: Path) -> None:
    scores, per_image, captions = scored(home, "cgtgan")
    assert scores["failed"] == {}
    (clip,) = (p for p in home.glob("artifacts/clip/clip-*") if p.is_dir())
    backbone = DemoBackbone(load_demo_clip(clip), torch.device("cpu"))
    embeddings = [
        load_embeddings(path, kind="image_embeddings") for path in home.glob("artifacts/image_embeddings/*.safetensors")
    ]
    (images,) = [e for e in embeddings if list(e.ids) == list(captions)]
    references = references_of(home)
    for vector, image_id in zip(images.vectors.float(), images.ids, strict=True):
        image, caption, *others = torch.nn.functional.normalize(
            torch.stack(
                [
                    vector,
                    *backbone.encode_texts(
                        [f"A photo depicts {t}" for t in [captions[image_id], *references[image_id]]]
                    ),
                ]
            ),
            dim=1,
        )
        clip_score = 2.5 * max(float(image @ caption), 0)
        nearest = max(max(float(caption @ other) for other in others), 0)
        assert per_image[image_id]["CLIPScore"] == pytest.approx(clip_score, abs=1e-5)
        assert per_image[image_id]["RefCLIPScore"] == pytest.approx(
            2 * clip_score * nearest / (clip_score + nearest), abs=1e-5
        )
    for name in ("CLIPScore", "RefCLIPScore"):
        assert scores["scores"][name] == pytest.approx(sum(row[name] for row in per_image.values()) / 12, abs=1e-9)
        assert scores["scores"][name] > 0


def test_diversity_of_the_captions_and_of_the_samples(home: Path) -> None:
    scores, per_image, captions = scored(home, "cgtgan")
    assert scores["scores"]["Vocabulary"] == len({w for text in captions.values() for w in words(text)})
    assert scores["scores"]["Length"] == pytest.approx(sum(len(words(text)) for text in captions.values()) / 12)
    (folder,) = home.glob("runs/demo_tiny/*/seed=0/evaluation/test/cgtgan")
    samples = {row["image_id"]: row["captions"] for row in json.loads((folder / "samples.json").read_text())}
    assert list(samples) == list(captions)
    assert all(len(drawn) == 3 for drawn in samples.values())
    assert len({tuple(drawn) for drawn in samples.values()}) > 6
    references = references_of(home)
    expected = self_cider(list(samples.values()), [references[i] for i in samples])
    assert [row["Self-CIDEr"] for row in per_image.values()] == pytest.approx(expected)
    nearest, per_image, _ = scored(home, "nearest")
    assert nearest["scores"]["Novel"] == 0  # sentences of the corpus
    assert "Self-CIDEr" not in nearest["scores"]  # it draws no samples
    assert {row["Novel"] for row in per_image.values()} == {0}


def test_scored_once_and_again_when_what_is_asked_changes(home: Path) -> None:
    def made() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in home.glob("runs/demo_tiny/*/seed=0/evaluation/test/*/*.json")}

    same = ("stage=evaluate", METRICS, "evaluate.baselines=[nearest]")
    before = made()
    printed = run(home, *same, "evaluate.self_cider_samples=3")
    assert made() == before
    for name in ("CLIPScore", "RefCLIPScore", "Distinct-2", "Self-CIDEr", "Nearest sentence"):
        assert name in printed


def test_captions_made_elsewhere_score_as_the_run_does_and_need_no_run(home: Path, tmp_path: Path) -> None:
    scores, per_image, captions = scored(home, "cgtgan")
    file = tmp_path / "their captions=1.json"
    file.write_text(json.dumps([{"image_id": i, "caption": text} for i, text in reversed(captions.items())]))
    printed = run(tmp_path, "stage=evaluate", METRICS, f"captions={file}", f"artifacts_dir={home / 'artifacts'}")
    folder = tmp_path / "their captions=1_scores"
    found = json.loads((folder / "scores.json").read_text())
    drawn = {"Self-CIDEr"}
    assert found["scores"] == pytest.approx({k: v for k, v in scores["scores"].items() if k not in drawn}, abs=1e-6)
    assert found["decoding"] == "captions of their captions=1.json"
    for row in json.loads((folder / "per_image.json").read_text()):
        expected = per_image[row["image_id"]]
        assert row == pytest.approx({k: v for k, v in expected.items() if k not in drawn}, abs=1e-6)
    assert {p.name for p in tmp_path.iterdir()} == {file.name, folder.name}  # no run folder
    assert str(folder) in "".join(printed.split("\n"))


def test_an_own_metric_is_scored_again_when_its_file_changes(home: Path, tmp_path: Path, one_thread: None) -> None:
    shutil.copytree(home / "runs", tmp_path / "runs")
    code = tmp_path / "mine.py"
    overrides = [*TINY, "stage=evaluate", f"evaluate.metrics=[rouge_l,{code}:length]"]
    overrides += [f"artifacts_dir={home / 'artifacts'}", f"runs_dir={tmp_path / 'runs'}"]
    file = next(tmp_path.glob("runs/demo_tiny/*/seed=0/evaluation/test/cgtgan/scores.json"))

    def score(factor: int) -> dict[str, Any]:
        lengths = f"{{i: {factor} * len(text) for i, text in captions.items()}}"
        code.write_text(f"def length(captions, references):\n    return {lengths}\n")
        evaluate.run(composed(overrides))
        return json.loads(file.read_text())

    once = score(1)
    mean = sum(map(len, scored(tmp_path, "cgtgan")[2].values())) / 12
    before = scored(home, "cgtgan")[0]
    assert once["scores"] == before["scores"] | {"length": pytest.approx(mean)}  # added to those of the run
    assert once["made_from"]["metrics"] == ["rouge_l", "cider", "clipscore", "diversity", "length"]
    written = file.stat().st_mtime_ns
    score(1)
    assert file.stat().st_mtime_ns == written
    twice = score(2)
    assert twice["scores"]["length"] == pytest.approx(2 * mean)
    assert twice["made_from"]["own_metrics"].keys() == {"length"}
    assert "own_metrics" not in scored(home, "cgtgan")[0]["made_from"]


def composed(overrides: list[str]) -> Config:
    ConfigStore.instance().store(name="cgtgan_schema", node=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = OmegaConf.to_object(compose("config", overrides))
    assert isinstance(cfg, Config)
    return cfg


def test_an_image_without_an_embedding_costs_clip_score_alone(home: Path, tmp_path: Path, one_thread: None) -> None:
    _, per_image, captions = scored(home, "cgtgan")
    references = references_of(home) | {999_999: ["a red circle"]}
    rows = [{"image_id": i, "caption": text} for i, texts in references.items() for text in texts]
    (tmp_path / "references.json").write_text(json.dumps({"annotations": rows}))
    (tmp_path / "theirs.json").write_text(
        json.dumps([{"image_id": i, "caption": captions.get(i, "a circle")} for i in references])
    )
    overrides = [*TINY, "stage=evaluate", "evaluate.metrics=[clipscore,rouge_l]", f"artifacts_dir={home / 'artifacts'}"]
    overrides += [f"captions={tmp_path / 'theirs.json'}", f"evaluate.references={tmp_path / 'references.json'}"]
    evaluate.run(composed(overrides))
    found = json.loads((tmp_path / "theirs_scores" / "scores.json").read_text())
    assert found["failed"] == {
        "clipscore": "CLIPScore was not computed: 1 image (999999) has no embedding in the test split"
    }
    assert set(found["scores"]) == {"ROUGE-L"}
    assert found["images"] == len(per_image) + 1


def test_the_projection_has_a_temperature_of_its_own(home: Path, tmp_path: Path) -> None:
    same = ("stage=evaluate", METRICS, "evaluate.self_cider_samples=3", "evaluate.baselines=[nearest,projection]")
    before = {p: p.stat().st_mtime_ns for p in home.glob("runs/demo_tiny/*/seed=0/evaluation/test/[cn]*/scores.json")}
    run(home, *same, "evaluate.projection_t=3")
    flat = scored(home, "projection")[2]
    run(home, *same)
    assert scored(home, "projection@t=3-*")[2] == flat  # beside the usual one
    usual = scored(home, "projection")[2]
    assert len(before) == 2
    assert {p: p.stat().st_mtime_ns for p in before} == before  # the others depend on no temperature here
    headers = [load_embeddings(path).header for path in home.glob("artifacts/aggregated_embeddings/*.safetensors")]
    assert sorted(header.producer["t"] for header in headers if header.rows == 12) == [3, 150]
    # so near to the mean of the corpus, most images read the same embedding
    assert len(set(flat.values())) < len(set(usual.values()))


def test_an_image_of_the_split_without_references_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path, results(i1="a man", i2="two dogs", i3="a bus", i4="nobody knows", i5="a cat"), ("rouge_l",))
    for i in REFERENCES:
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
    cfg.evaluate.references = None
    cfg.dataset = DatasetConfig(
        kind="folder", root=str(tmp_path), references="references.json", val_fraction=0, test_fraction=1
    )
    evaluate.run(cfg)
    found = json.loads((tmp_path / "theirs_scores" / "scores.json").read_text())
    assert (found["images"], found["excluded"]) == (4, [4])
    assert "1 image (4) has no reference: left out of the scores" in " ".join(capsys.readouterr().out.split())


def test_an_image_of_the_split_that_lacks_a_caption_is_an_error(home: Path, tmp_path: Path, one_thread: None) -> None:
    _, _, captions = scored(home, "cgtgan")
    (tmp_path / "part.json").write_text(
        json.dumps([{"image_id": i, "caption": text} for i, text in list(captions.items())[1:]])
    )
    overrides = [*TINY, "stage=evaluate", f"captions={tmp_path / 'part.json'}", f"artifacts_dir={home / 'artifacts'}"]
    with pytest.raises(InputError, match=r"1 image \(\d+\) has references but no caption"):
        evaluate.run(composed(overrides))


# ----------------------------------------------------------- captions made elsewhere, with references alone


REFERENCES = {
    1: ["a man rides a horse", "a rider"],
    2: ["two dogs play"] * 7,
    3: ["a red bus", "a bus"],
    4: [],
    5: ["a cat sits"],
}


def config(folder: Path, captions: object, metrics: tuple[str, ...] = ("rouge_l", "cider"), **fields: Any) -> Config:
    """Settings that score `captions` against REFERENCES, both as files; every other path leads to nothing."""
    file, references = folder / "theirs.json", folder / "references.json"
    file.write_text(captions if isinstance(captions, str) else json.dumps(captions))
    rows = [{"image_id": i, "caption": text} for i, texts in REFERENCES.items() for text in texts]
    references.write_text(json.dumps({"images": [{"id": i} for i in REFERENCES], "annotations": rows}))
    cfg = Config(
        stage="evaluate",
        captions=str(file),
        artifacts_dir=str(folder / "made"),
        runs_dir=str(folder / "runs"),
        **fields,
    )
    cfg.evaluate = EvaluateConfig(metrics=list(metrics), references=str(references))
    cfg.dataset = replace(cfg.dataset, kind="coco", root=str(folder / "nothing"))
    cfg.corpus = replace(cfg.corpus, kind="coco")
    cfg.clip_backbone = replace(cfg.clip_backbone, kind="openai", model="ViT-B/32", cache=str(folder / "nothing"))
    cfg.generator, cfg.discriminator = (
        replace(cfg.generator, tokenizer="corpus"),
        replace(cfg.discriminator, tokenizer="corpus"),
    )
    validate(cfg)
    return cfg


def results(**captions: str) -> list[dict[str, object]]:
    return [{"image_id": int(i[1:]), "caption": text} for i, text in captions.items()]


def test_an_own_metric_scores_captions_made_elsewhere(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "def words(captions, references):\n    return 9, {i: len(t.split()) for i, t in captions.items()}\n"
    )
    evaluate.run(config(tmp_path, results(i1="a man", i3="a red bus"), ("rouge_l", f"{code}:words")))
    found = json.loads((tmp_path / "theirs_scores" / "scores.json").read_text())
    rows = json.loads((tmp_path / "theirs_scores" / "per_image.json").read_text())
    assert found["scores"]["words"] == 9
    assert {row["image_id"]: row["words"] for row in rows} == {1: 2.0, 3: 3.0}
    assert found["made_from"]["own_metrics"].keys() == {"words"}


def test_references_alone_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(i3="a red bus", i1="a man ||| on a horse", i2="", i4="nobody wrote a reference of this")
    evaluate.run(config(tmp_path, captions))
    found = json.loads((tmp_path / "theirs_scores" / "scores.json").read_text())
    expected = score_captions(
        {1: "a man ||| on a horse", 2: "", 3: "a red bus"}, {i: REFERENCES[i] for i in (1, 2, 3)}, ("rouge_l", "cider")
    )
    assert found["scores"] == expected.corpus
    assert found["excluded"] == [4]
    assert found["images"] == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert f"1 image (5) has no caption in {tmp_path / 'theirs.json'}: left out" in printed
    assert "1 image (4) has no reference: left out of the scores" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"theirs.json", "references.json", "theirs_scores"}
    assert {p.suffix for p in (tmp_path / "theirs_scores").iterdir()} == {".json", ".lock"}


def test_output_moves_the_scores_and_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "place"
    (place / ".scoreskilled").mkdir(parents=True)
    evaluate.run(config(tmp_path, results(i1="a man"), ("rouge_l",), output=str(place)))
    assert {p.name for p in place.iterdir()} == {
        "captions.json",
        "per_image.json",
        "scores.json",
        ".captions.json.lock",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"theirs.json", "references.json", "deep"}


def test_without_the_corpus_the_other_values_come_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(config(tmp_path, results(i1="a man", i3="a bus"), ("diversity",)))
    found = json.loads((tmp_path / "theirs_scores" / "scores.json").read_text())
    assert found["scores"] == {"Distinct-1": 0.75, "Distinct-2": 1, "Vocabulary": 3, "Length": 2}
    assert found["failed"]["Novel"].startswith("the share of novel captions needs the corpus: ")
    assert "the share of novel captions needs the corpus" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (results(i1="a man", i77="a cat"), r"1 image \(77\) has a caption but no entry among the references"),
        (results(i1="a man") + results(i1="a dog"), r"theirs\.json: 1 image \(1\) has more than one caption"),
        ([], "the file is an empty list"),
        (results(i4="a man"), "no image is left to score"),
        ("{", "is not whole JSON"),
    ],
)
def test_what_is_wrong_with_a_results_file_is_one_sentence(tmp_path: Path, captions: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        evaluate.run(config(tmp_path, captions))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "theirs_scores" / "scores.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"evaluate": EvaluateConfig(self_cider_samples=1, metrics=["diversity"])},
            "self_cider_samples=1 is not accepted: it must be 0",
        ),
        ({"evaluate": EvaluateConfig(self_cider_samples=5)}, "add diversity to the metrics"),
        ({"evaluate": EvaluateConfig(metrics=[])}, r"evaluate\.metrics=\[\] is not accepted"),
        ({"evaluate": EvaluateConfig(references="r.json")}, r"evaluate\.references=r\.json needs captions=FILE"),
        ({"captions": "a.json", "stage": "pipeline"}, r"captions=a\.json and stage=pipeline contradict"),
        ({"captions": "a.json", "checkpoint": "best"}, r"captions=a\.json and checkpoint=best contradict"),
        (
            {"captions": "a.json", "evaluate": EvaluateConfig(self_cider_samples=5, metrics=["diversity"])},
            r"captions=a\.json and evaluate\.self_cider_samples=5 contradict",
        ),
    ],
)
def test_settings_that_contradict(change: dict[str, Any], message: str) -> None:
    plain = Config(stage="evaluate")
    plain.dataset = replace(plain.dataset, kind="demo")
    plain.generator = replace(plain.generator, tokenizer="corpus")
    plain.discriminator = replace(plain.discriminator, tokenizer="corpus")
    validate(plain)
    with pytest.raises(UserError, match=message):
        validate(replace(plain, **change))
    assert scientific_settings(replace(plain, **change)) == scientific_settings(plain)
