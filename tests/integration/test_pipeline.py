"""The whole way, from pixels to a scored page, on a world of a few dozen images: whole, twice, killed, changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image

from cgtgan import Captioner
from cgtgan.assets.plan import made_already
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.data.corpora import embedded_text
from cgtgan.stages.pipeline import STAGES
from tests.program import Program, run_program

ROOT = Path(__file__).parents[2]


# what experiment=demo has and demo_tiny, which is as version 0.1 was, has not
AS_THE_DEMO = (
    *("clip_backbone.demo.towers=sharp", "clip_backbone.demo.group=8", "clip_backbone.demo.precision=bf16"),
    *("initialize.precision=bf16", "initialize.dropout=true", "train.precision=bf16"),
)


def command(home: Path, *overrides: str) -> list[str]:
    given = [f"artifacts_dir={home / 'artifacts'}", f"runs_dir={home / 'runs'}", *AS_THE_DEMO, *overrides]
    return [sys.executable, str(ROOT / "run.py"), "experiment=demo_tiny", "threads=1", *given]


def run(home: Path, *overrides: str, code: int = 0) -> str:
    done = run_program(command(home, *overrides), cwd=home, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_folder(home: Path) -> Path:
    (folder,) = (home / "runs" / "demo_tiny").glob("*/seed=0")
    return folder


def results(home: Path) -> dict[str, object]:
    """Everything a reader would cite: captions, scores, scores per image, training metrics without times."""
    folder = run_folder(home)
    found: dict[str, object] = {
        str(p.relative_to(folder)): json.loads(p.read_text()) for p in sorted((folder / "evaluation").rglob("*.json"))
    }
    for row in (rows := [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]):
        for key in [k for k in row if k.startswith(("time/", "memory/", "train/seconds", "train/images_per_second"))]:
            row.pop(key)
    return found | {"metrics": rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home where the tiny pipeline ran undisturbed."""
    home = tmp_path_factory.mktemp("whole")
    (home / "log.txt").write_text(run(home))
    return home


def test_the_pipeline_makes_scores_captions_and_a_page(whole: Path) -> None:
    folder = run_folder(whole)
    methods = {"init", "mean_shift", "projection", "nearest", "supervised", "human", "cgtgan"}
    assert {p.name for p in (folder / "evaluation" / "test").iterdir()} == methods
    for method in methods:
        scores = json.loads((folder / "evaluation/test" / method / "scores.json").read_text())
        assert scores["failed"] == {}
        assert set(scores["scores"]) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
        per_image = json.loads((folder / "evaluation/test" / method / "per_image.json").read_text())
        assert sum(row["CIDEr"] for row in per_image) / len(per_image) == pytest.approx(
            scores["scores"]["CIDEr"], abs=1e-9
        )
        captions = json.loads((folder / "evaluation/test" / method / "captions.json").read_text())
        assert len(captions) == 12
        assert all(isinstance(c["image_id"], int) and isinstance(c["caption"], str) for c in captions)
    page = (folder / "report.html").read_text()
    assert "CgT-GAN (CLIP-agg)" in page
    assert "data:image/png;base64" in page
    log = (whole / "log.txt").read_text()
    assert "test references stand in the corpus word for word" in log
    assert "CgT-GAN (CLIP-agg)" in log
    assert "plan: 1 preprocess, 2 aggregate, 3 initialize, 4 train, 5 evaluate, 6 report\n" in log
    started = [log.index(f"\n{n}/6 {stage} ─") for n, stage in enumerate(STAGES, 1)]
    assert started == sorted(started)
    assert f"look at it: {(folder / 'report.html').as_uri()}\n" in log
    assert f"stage=caption checkpoint={folder} images=FOLDER\n" in log


def test_the_pipeline_twice_does_the_work_once(whole: Path) -> None:
    def made() -> dict[str, int]:
        kept = [*(whole / "artifacts").rglob("*"), *run_folder(whole).rglob("*")]
        return {
            str(p): p.stat().st_mtime_ns
            for p in kept
            if p.is_file() and p.suffix != ".lock" and not p.name.startswith("report.")
        }

    before = made()
    log = run(whole)
    assert "done already" in log
    assert made() == before
    made_before = "1 preprocess (made), 2 aggregate (made), 3 initialize (made), 4 train (made)"
    assert f"plan: {made_before}, 5 evaluate (7 of 7 scored), 6 report\n" in log


def test_the_plan_names_what_is_left(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, home := tmp_path / "home", symlinks=True)
    shutil.rmtree(home / "artifacts" / "aggregated_embeddings")
    shutil.rmtree(run_folder(home) / "evaluation" / "test" / "human")
    ConfigStore.instance().store(name="cgtgan_schema", node=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = OmegaConf.to_object(compose("config", [*command(home)[2:], "train.steps=9"]))
    assert isinstance(cfg, Config)
    assert made_already(Workspace(cfg)) == {
        "preprocess": "made", "initialize": "made", "train": "step 6 of 9", "evaluate": "6 of 7 scored",
    }  # fmt: skip
    assert not (home / "artifacts" / "aggregated_embeddings").exists()


def test_no_pickle_is_written(whole: Path) -> None:
    for path in [*(whole / "artifacts").rglob("*"), *run_folder(whole).rglob("*")]:
        if path.is_file() and "wandb" not in path.parts:
            ours = {".safetensors", ".json", ".jsonl", ".png", ".txt", ".html", ".md", ".lock", ".sha256"}
            assert path.suffix in ours, path


def test_a_changed_setting_never_continues_a_run(whole: Path) -> None:
    before = results(whole)
    output = run(whole, "train.generator_optimizer.lr=3e-4", "stage=train", code=1)
    assert "train.generator_optimizer.lr was 0.0001, is 0.0003" in output
    assert "variant=" in output
    assert "Traceback" not in output
    assert results(whole) == before


KILL_WHEN: dict[str, Callable[[Path], bool]] = {
    "drawing the world": lambda home: any(home.glob("artifacts/demo_world/.*.partial/images/train/*.png")),
    "training the demo's CLIP": lambda home: any(home.glob("artifacts/clip/*.training")),
    "encoding": lambda home: any(home.glob("artifacts/image_embeddings/*.safetensors")),
    "initialising": lambda home: any(home.glob("artifacts/generator_initial/*.training")),
    "before the first checkpoint of the GAN": lambda home: any(home.glob("runs/*/*/*/metrics.jsonl")),
    "GAN training": lambda home: any(home.glob("runs/*/*/*/checkpoints/step_000002")),
    "the supervised bound": lambda home: any(home.glob("artifacts/generator_supervised/*.training")),
    "scoring": lambda home: any(home.glob("runs/*/*/*/.scores*")),
}


def test_killed_anywhere_and_typed_again_it_ends_with_the_same_scores(whole: Path, tmp_path: Path) -> None:
    killed = []
    for point, reached in KILL_WHEN.items():
        process = Program(command(tmp_path), cwd=tmp_path)
        deadline = time.monotonic() + 200
        while process.poll() is None and not reached(tmp_path):
            assert time.monotonic() < deadline, f"{point} is never reached"
            time.sleep(0.003)
        if process.poll() is None:
            killed.append(point)
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    assert len(killed) >= len(KILL_WHEN) - 1, f"only killed while {killed}"
    run(tmp_path)
    assert results(tmp_path) == results(whole)
    assert not list((tmp_path / "artifacts").rglob("*.tmp"))


def test_two_at_once_share_the_work(whole: Path, tmp_path: Path) -> None:
    """As when `make` alone is killed and typed again: its child is still at work in the run folder."""
    both = [Program(command(tmp_path), cwd=tmp_path) for _ in range(2)]
    output = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert sum("waiting for another process that works in" in text for text in output) == 1
    assert results(tmp_path) == results(whole)


def test_captions_of_ones_own_pictures(whole: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures" / "below"
    pictures.mkdir(parents=True)
    image = Image.new("RGB", (90, 60), "red")
    image.save(pictures / "plain.jpg")
    image.convert("L").save(pictures / "grey.png")
    image.convert("CMYK").save(pictures / "cmyk.jpg")
    image.convert("P").save(pictures / "palette.gif")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(pictures / "rotated.jpg", exif=exif)
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    out = tmp_path / "out"
    args = ["stage=caption", f"checkpoint={run_folder(whole)}", f"images={tmp_path / 'pictures'}", f"output={out}"]
    log = run(whole, *args)
    captions = json.loads((out / "captions.json").read_text())
    assert [Path(c["image_id"]).name for c in captions] == [
        "cmyk.jpg",
        "grey.png",
        "palette.gif",
        "plain.jpg",
        "rotated.jpg",
    ]
    assert all(c["caption"].strip() for c in captions)
    (broken,) = json.loads((out / "unreadable.json").read_text())
    assert broken["image_id"].endswith("broken.jpg")
    assert "1 of 6 pictures cannot be read" in log
    assert "rotated.jpg" in (out / "gallery.html").read_text()
    # single files, and a checkpoint that names all it needs: no experiment, no dataset
    single = [
        sys.executable,
        str(ROOT / "run.py"),
        "stage=caption",
        f"checkpoint={run_folder(whole) / 'checkpoints' / 'last'}",
    ]
    done = run_program([*single, f"images=[{pictures / 'plain.jpg'}]", f"output={out}"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (one,) = json.loads((out / "captions.json").read_text())
    assert one["caption"] == next(c["caption"] for c in captions if c["image_id"].endswith("plain.jpg"))


def test_best_of_n_says_what_clip_finds_nearer(whole: Path, tmp_path: Path) -> None:
    """Than the greedy caption, for the picture's own embedding, also where the generator reads another (projection)."""
    home = tmp_path / "home"
    shutil.copytree(whole, home, symlinks=True)
    methods = ("cgtgan", "projection")
    before = {m: captions_of(home, m) for m in methods}
    scored = ("decode.temperature=1", "evaluate.metrics=[cider]", "evaluate.baselines=[projection]")
    run(home, "stage=evaluate", "decode=best_of_n", "decode.best_of=4", *scored)
    captioner = Captioner.load(run_folder(home), device="cpu")
    (folder,) = (home / "artifacts" / "demo_world").glob("*/images/test")
    paths = {int(path.stem): path for path in folder.glob("*.png")}
    for method in methods:
        (record,) = (run_folder(home) / "evaluation/test").glob(f"{method}@best*")  # beside the greedy one
        after = captions_of(home, record.name)
        images = captioner.embed(paths[i] for i in after)
        cosines = [
            torch.cosine_similarity(images, captioner.backbone.encode_texts([embedded_text(found[i]) for i in after]))
            for found in (before[method], after)
        ]
        assert bool((cosines[1] >= cosines[0] - 1e-3).all())
        assert float((cosines[1] - cosines[0]).mean()) > 1e-3
        scores = json.loads((record / "scores.json").read_text())
        assert scores["decoding"] == "greedy and 4 samples at temperature 1, the nearest by CLIP"


def captions_of(home: Path, method: str) -> dict[int, str]:
    rows = json.loads((run_folder(home) / "evaluation/test" / method / "captions.json").read_text())
    return {row["image_id"]: row["caption"] for row in rows}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stage=caption", "images=nowhere.jpg"], "nowhere.jpg does not exist"),
        (["stage=caption", "images=.", "checkpoint=nothing"], "checkpoint=nothing: no checkpoint is found there"),
        (["stage=evaluate", "variant=other"], "run stage=train first"),
        (["stage=report", "variant=other"], "run stage=evaluate there first"),
        (["stage=evaluate", "decode=beam", "evaluate.metrics=[spice]", "evaluate.baselines=[]"], ""),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(
    whole: Path, overrides: list[str], sentence: str, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(whole / "a.png")
    output = run(whole, *overrides, code=1 if sentence else 0)
    assert "Traceback" not in output
    assert sentence in output


def test_a_place_that_cannot_be_written_is_said_in_a_sentence(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    own = [
        "stage=caption",
        f"checkpoint={run_folder(whole)}",
        f"images={tmp_path / 'a.png'}",
        f"output={tmp_path / 'file' / 'out'}",
    ]
    for overrides in (own, ["stage=train", f"runs_dir={tmp_path / 'file'}"]):
        output = run(whole, *overrides, code=1)
        assert "Traceback" not in output
        assert "Not a directory: fix that place" in output
