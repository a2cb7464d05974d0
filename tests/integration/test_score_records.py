"""Scores belong to what was scored: another checkpoint, decoding or metric list never replaces what is there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.evaluation.coco_files import load_references, load_results
from cgtgan.evaluation.java import find_java
from cgtgan.evaluation.metrics import score_captions
from cgtgan.evaluation.records import missing_metrics
from cgtgan.reporting.compared_rows import entries
from cgtgan.reporting.one_run import method_rows
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.variants import find_runs, gather
from cgtgan.stages import evaluate, initialize, report, train

ROOT = Path(__file__).parents[2]
TINY = (
    *("experiment=demo_tiny", "threads=1", "wandb=disabled", "variant=v", "clip_backbone.demo.steps=60"),
    *("initialize.steps=100", "train.steps=4", "train.generator_optimizer.lr=0.003", "report.gallery=0"),
)
FULL = "evaluate.metrics=[bleu,rouge_l,cider]"
NAMES = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
BASELINES = "evaluate.baselines=[init,nearest]"


def settings(home: Path, *overrides: str) -> Config:
    ConfigStore.instance().store(name="cgtgan_schema", node=Config)
    places = [f"artifacts_dir={home / 'artifacts'}", f"runs_dir={home / 'runs'}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = OmegaConf.to_object(compose("config", [*TINY, *places, BASELINES, *overrides]))
    assert isinstance(cfg, Config)
    return cfg


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained run without scores, and `other/seed=1`: a run whose checkpoint is its initialisation."""
    threads = torch.get_num_threads()
    home = tmp_path_factory.mktemp("trained")
    cfg = settings(home)
    initialize.run(cfg)
    train.run(cfg)
    run = home / "runs/demo_tiny/v/seed=0"
    (initial,) = (p for p in home.glob("artifacts/generator_init*/*") if p.is_dir() and p.name[0] != ".")
    other = home / "other/seed=1"
    shutil.copytree(initial, other / "checkpoints/step_000099")
    (other / "settings.json").write_text(json.dumps(json.loads((run / "settings.json").read_text()) | {"seed": 1}))
    yield home
    torch.set_num_threads(threads)


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run; what it was made from is shared."""
    shutil.copytree(trained / "runs", tmp_path / "runs", symlinks=True)
    shutil.copytree(trained / "other", tmp_path / "other")
    (tmp_path / "artifacts").symlink_to(trained / "artifacts")
    return tmp_path


def score(home: Path, *overrides: str) -> None:
    evaluate.run(settings(home, "stage=evaluate", *overrides))


def other(home: Path) -> str:
    return f"checkpoint='{home / 'other/seed=1/checkpoints/step_000099'}'"


def folder(home: Path) -> Path:
    return home / "runs/demo_tiny/v/seed=0/evaluation/test"


def files(home: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder(home))): p.read_bytes() for p in folder(home).rglob("*.json")}


def record(home: Path, pattern: str) -> dict[str, Any]:
    (place,) = folder(home).glob(pattern)
    return json.loads((place / "scores.json").read_text())


def expected(home: Path, pattern: str, metrics: Sequence[str]) -> dict[str, float]:
    """The scores of the captions in a record, computed here."""
    (place,) = folder(home).glob(pattern)
    (file,) = home.glob("artifacts/demo_world/world-*/annotations/test_caption_coco_format.json")
    captions, references = load_results(place / "captions.json"), load_references(file)
    return score_captions(captions, {i: references[i] for i in captions}, metrics).corpus


def names(home: Path) -> list[str]:
    return sorted(p.name for p in folder(home).iterdir())


needs_java = pytest.mark.skipif(find_java() is None, reason="METEOR and PTB tokens need Java")


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert find_java() is None


def test_another_checkpoint_lands_beside(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(home, "evaluate.metrics=[rouge_l,cider]")
    before = files(home)
    capsys.readouterr()
    score(home, "evaluate.metrics=[rouge_l,cider]", other(home))
    assert {name: text for name, text in files(home).items() if name in before} == before
    (place,) = {name.split("/")[0] for name in files(home)} - {name.split("/")[0] for name in before}
    assert place.startswith("cgtgan@checkpoint-other-seed=1-step-99-")
    theirs = record(home, place)
    assert theirs["scores"] == expected(home, place, ["rouge_l", "cider"])
    assert theirs["scores"] != record(home, "cgtgan")["scores"]
    printed = capsys.readouterr().out
    assert "checkpoint other/seed=1, step 99" in " ".join(printed.split())
    assert f"{100 * theirs['scores']['ROUGE-L']:.1f}" in printed
    score(home, "evaluate.metrics=[rouge_l,cider]", other(home))
    assert len(files(home)) == len(before) + 3  # the same content is the same record
    rows = {row.name: row for row in method_rows(Run(folder(home).parents[1], "test"))}
    assert rows["CgT-GAN (CLIP-agg), checkpoint other/seed=1, step 99"].scores["CIDEr"] == [theirs["scores"]["CIDEr"]]
    assert rows["CgT-GAN (CLIP-agg)"].scores["CIDEr"] == [record(home, "cgtgan")["scores"]["CIDEr"]]


def test_the_run_s_own_scores_have_the_plain_name_whichever_came_first(home: Path) -> None:
    metrics = "evaluate.metrics=[rouge_l]"
    score(home, metrics, other(home), "evaluate.baselines=[]")
    assert [name.partition("-")[0] for name in names(home)] == ["cgtgan@checkpoint"]
    score(home, metrics, "decode=beam", "evaluate.baselines=[]")
    beam = files(home)["cgtgan/scores.json"]
    score(home, metrics, "evaluate.baselines=[]")
    assert record(home, "cgtgan")["decoding"] == "greedy"
    assert [text for name, text in files(home).items() if "@beam" in name and "scores" in name] == [beam]
    checkpoint = folder(home).parents[1] / "checkpoints"
    own = {p.resolve().name for p in (checkpoint / "best", checkpoint / "last")}
    assert record(home, "cgtgan")["checkpoint"] in {f"step {int(name[5:])}" for name in own}
    score(home, metrics, f"checkpoint='{folder(home).parents[1]}'", "evaluate.baselines=[]")  # itself, named
    assert len(names(home)) == 3


def test_a_transfer_row_has_the_checkpoint_of_its_own_seed_and_others_beside(home: Path) -> None:
    same = ("variant=transfer", "evaluate.metrics=[rouge_l]", "evaluate.baselines=[]")
    score(home, *same, other(home))  # of seed 1, as docs/reproduction.md names another run
    score(home, *same, f"checkpoint='{folder(home).parents[1]}'")
    place = home / "runs/demo_tiny/transfer/seed=0/evaluation/test"
    beside = "cgtgan@checkpoint-other-seed=1-step-99-"
    assert [p.name[: len(beside)] for p in sorted(place.iterdir())] == ["cgtgan", beside]
    names = [row.name for row in method_rows(Run(place.parents[1], "test"))]
    assert names == ["CgT-GAN (CLIP-agg)", "CgT-GAN (CLIP-agg), checkpoint other/seed=1, step 99"]


def test_another_decoding_is_another_record_and_metrics_are_added(home: Path) -> None:
    score(home, FULL)
    full = files(home)
    assert list(record(home, "cgtgan")["scores"]) == NAMES
    score(home, "decode=beam", "evaluate.metrics=[cider]")
    assert {name: text for name, text in files(home).items() if name in full} == full
    beam = record(home, "cgtgan@beam*")
    assert (beam["decoding"], list(beam["scores"])) == ("beam 3 (length penalty 1)", ["CIDEr"])
    assert beam["scores"] == expected(home, "cgtgan@beam*", ["cider"])
    assert sorted(n.partition("-")[0] for n in names(home)) == ["cgtgan", "cgtgan@beam", "init", "init@beam", "nearest"]
    score(home, "decode=beam", FULL, "decode.batch_size=5")
    assert list(record(home, "cgtgan@beam*")["scores"]) == NAMES
    assert record(home, "cgtgan@beam*")["scores"] == expected(home, "cgtgan@beam*", ["bleu", "rouge_l", "cider"])
    rows = json.loads((next(folder(home).glob("cgtgan@beam*")) / "per_image.json").read_text())
    assert all(set(NAMES) < row.keys() for row in rows)
    run = Run(folder(home).parents[1], "test")
    shown = [(row.name, row.decoding) for row in method_rows(run) if row.ours]
    assert shown == [("CgT-GAN (CLIP-agg)", "greedy"), ("CgT-GAN (CLIP-agg)", "beam 3 (length penalty 1)")]
    (table,) = entries(gather(find_runs([str(run.folder)], "test")), []).values()
    compared = {(e.method, e.decoding): e.row.scores["CIDEr"] for e in table}
    assert compared["cgtgan", "beam 3 (length penalty 1)"] == [record(home, "cgtgan@beam*")["scores"]["CIDEr"]]
    assert compared["cgtgan", "greedy"] == [record(home, "cgtgan")["scores"]["CIDEr"]]
    assert len([key for key in compared if key[0] == "nearest"]) == 1
    report.run(settings(home, "stage=report"))
    assert "beam 3" in (run.folder / "report.html").read_text()


@needs_java
@pytest.mark.usefixtures("small_meteor")
def test_without_java_nothing_is_lost_and_with_it_the_guess_goes(
    home: Path, no_java: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(home, "evaluate.metrics=[rouge_l,meteor]", "evaluate.baselines=[]")
    guess = record(home, "cgtgan")
    assert (guess["tokenizer"], list(guess["scores"]), list(guess["failed"])) == (
        "approximate",
        ["ROUGE-L"],
        ["METEOR"],
    )
    monkeypatch.undo()
    assert find_java()
    score(home, "evaluate.metrics=[meteor]", "evaluate.baselines=[]")
    exact = record(home, "cgtgan")
    assert (exact["tokenizer"], list(exact["scores"]), exact["failed"]) == ("ptb", ["METEOR", "ROUGE-L"], {})
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    before = files(home)
    score(home, "evaluate.metrics=[meteor,rouge_l]", "evaluate.baselines=[]")
    assert files(home) == before
    score(home, FULL, "evaluate.baselines=[]")  # CIDEr and BLEU are added, and marked as guesses
    mixed = record(home, "cgtgan")
    assert {name: mixed["scores"][name] for name in exact["scores"]} == exact["scores"]
    assert (mixed["tokenizer"], mixed["approximate"]) == (
        "approximate",
        ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr"],
    )
    monkeypatch.undo()
    score(home, "evaluate.metrics=[rouge_l]", "evaluate.baselines=[]")
    whole = record(home, "cgtgan")
    assert (whole["tokenizer"], whole.get("approximate")) == ("ptb", None)
    meteor = {"METEOR": exact["scores"]["METEOR"]}
    assert whole["scores"] == expected(home, "cgtgan", ["bleu", "rouge_l", "cider"]) | meteor


def test_a_metric_that_fails_now_keeps_what_it_gave_before(home: Path, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def length(captions, references):\n    return {i: len(t) for i, t in captions.items()}\n")
    own = ("evaluate.metrics=[rouge_l,'" + f"{code}:length" + "']", "evaluate.baselines=[]")
    score(home, *own)
    before = record(home, "cgtgan")
    code.write_text("def length(captions, references):\n    raise ValueError('broken')\n")
    score(home, *own)
    after = record(home, "cgtgan")
    assert after["scores"] == before["scores"]
    assert after["made_from"]["own_metrics"] == before["made_from"]["own_metrics"]  # the file that gave the score
    assert missing_metrics(after, [f"{code}:length"], {"own_metrics": {"length": "new"}}, samples=0) != []


def test_other_references_are_another_record_of_captions_made_elsewhere(home: Path, tmp_path: Path) -> None:
    captions = [{"image_id": 1, "caption": "a man rides"}, {"image_id": 2, "caption": "two dogs"}]
    (tmp_path / "theirs.json").write_text(json.dumps(captions))

    def against(name: str, *texts: str, metrics: str = "[rouge_l]") -> None:
        rows = [{"image_id": i, "caption": text} for i, text in enumerate(texts, 1)]
        (tmp_path / name).write_text(json.dumps({"images": [], "annotations": rows}))
        files = (f"captions={tmp_path / 'theirs.json'}", f"evaluate.references={tmp_path / name}")
        score(home, *files, f"evaluate.metrics={metrics}", "evaluate.baselines=[]")

    def scores(pattern: str) -> dict[str, float]:
        (place,) = tmp_path.glob(pattern)
        return json.loads((place / "scores.json").read_text())["scores"]

    against("a.json", "a man rides", "two dogs")
    assert scores("theirs_scores") == {"ROUGE-L": pytest.approx(1)}
    against("a.json", "a man rides", "two dogs", metrics="[bleu]")
    assert list(scores("theirs_scores")) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    against("b.json", "nothing like it", "at all")
    assert scores("theirs_scores") == {"ROUGE-L": 0}  # the newest has the name that was asked for
    assert scores("theirs_scores@references*")["ROUGE-L"] == pytest.approx(1)
    assert len(scores("theirs_scores@references*")) == 5


def test_folders_of_0_1_are_read_and_added_to(home: Path) -> None:
    """0.1 wrote no `checkpoint` name, the whole decoding, and all of `made_from` for a baseline too."""
    score(home, "evaluate.metrics=[rouge_l]")
    for method in ("cgtgan", "init", "nearest"):
        path = folder(home) / method / "scores.json"
        old = json.loads(path.read_text())
        del old["checkpoint"]
        old["scores"] = {"ROUGE-L": 0.125}  # a value that only this file has
        path.write_text(json.dumps(old))
    score(home, "evaluate.metrics=[rouge_l,cider]")
    for method in ("cgtgan", "init", "nearest"):
        assert record(home, method)["scores"]["ROUGE-L"] == 0.125
        assert record(home, method)["scores"]["CIDEr"] == expected(home, method, ["cider"])["CIDEr"]
    assert names(home) == ["cgtgan", "init", "nearest"]
    rows = method_rows(Run(folder(home).parents[1], "test"))
    assert [row.scores["ROUGE-L"] for row in rows] == [[0.125]] * 3
    assert Workspace(settings(home)).run == folder(home).parents[1]
