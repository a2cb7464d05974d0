"""One's own pictures: `Captioner` in Python and stage=caption, on a tiny generator that nobody trained."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from cgtgan import Captioner
from cgtgan.assets.backbone import save_demo_clip
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import ScoredCaption
from cgtgan.cli import corrected
from cgtgan.config import CaptionConfig, ClipBackboneConfig, Config, DatasetConfig, DecodeConfig, as_dict
from cgtgan.data.named_pictures import find_images
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.runtime.artifacts import write_json
from cgtgan.stages.caption import caption
from tests.program import run_program
from tests.tiny_gan import tiny_parts

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose best checkpoint, a link, decodes by samples: so a caption depends on the draws."""
    run = tmp_path_factory.mktemp("run")
    made = tiny_parts()[1]
    folder = run / "checkpoints" / "step_000001"
    made.bundle.save(folder)
    save_demo_clip(folder / "clip", made.backbone.model)
    decode = as_dict(DecodeConfig(name="sample", cache="compiled"))
    write_json(folder / "checkpoint.json", {"clip_backbone": as_dict(ClipBackboneConfig()), "decode": decode})
    (run / "checkpoints" / "best").symlink_to(folder.name)
    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures of noise in every format that Pillow here writes, in nested folders, a broken one, no pictures."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep" / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    endings = [
        ".jpg",
        ".png",
        ".webp",
        ".gif",
        ".tiff",
        ".JPEG",
        ".bmp",
        ".tif",
        *([".avif"] if features.check("avif") else [".png"]),
    ]
    for i, ending in enumerate([*endings, ".jpg", ".png", ".jpg"]):
        place = (folder, folder / "deep", folder / "deep" / "deeper")[i % 3]
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(place / f"{i:02d} é{ending}")
    (folder / "deep" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.jpg").write_text("no picture either")
    return folder


def pictures(photos: Path) -> list[Path]:
    return sorted(p for p in photos.rglob("*é*"))


def captioned(
    checkpoint: Path, photos: Any, output: Path, num: int | None = None, form: str = "json", **settings: Any
) -> list[dict[str, Any]]:
    cfg = Config(
        stage="caption", checkpoint=str(checkpoint), images=photos, output=str(output), device="cpu", **settings
    )
    cfg.caption = CaptionConfig(num, form)
    caption(Workspace(cfg))
    return json.loads((output / "captions.json").read_text()) if form == "json" else []


def command(checkpoint: Path, images: str, output: Path, *more: str) -> list[str]:
    words = ["stage=caption", f"checkpoint={checkpoint}", f"images={images}", f"output={output}", "threads=1", *more]
    return [sys.executable, str(ROOT / "run.py"), *corrected(words)]


# --------------------------------------------------------------------------------------------------------------- Python


def test_a_caption_is_the_pictures_own(checkpoint: Path, photos: Path) -> None:
    """Paths, strings and pictures in memory, in any order and batch, alone or not."""
    captioner = Captioner.load(checkpoint, device="cpu")
    assert captioner.decode == DecodeConfig(name="sample")  # the cache is that of the machine that wrote it
    paths = pictures(photos)
    captions = captioner.caption(paths)
    assert len(set(captions)) > 6
    assert captioner.caption([str(p) for p in reversed(paths)]) == captions[::-1]
    opened = [Image.open(p) for p in paths]
    assert captioner.caption(opened[0]) == captions[:1]
    for size in (1, 5):
        captioner.batch_size = size
        assert captioner.caption(iter(opened)) == captions
    captioner.seed = 1
    assert captioner.caption(paths) != captions
    how = "one sample at temperature 1, seed 1"
    assert repr(captioner) == f"<Captioner: generator gpt2, CLIP of 8 dimensions, cpu; {how}>"
    assert captioner.caption([]) == []


def test_embeddings_are_clips_own(checkpoint: Path, photos: Path) -> None:
    captioner = Captioner.load(checkpoint, device="cpu")
    captioner.batch_size = 5
    paths = pictures(photos)
    found = captioner.embed(paths)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, captioner.backbone.encode_images([Image.open(p) for p in paths]), rtol=1e-4, atol=1e-5
    )
    assert captioner.embed([]).shape == (0, 8)


def test_captions_come_ranked_with_scores(checkpoint: Path, photos: Path) -> None:
    best = Captioner.load(checkpoint, device="cpu", decode=DecodeConfig(name="best_of_n", best_of=6))
    found = best.captions(pictures(photos), 3)
    for ranked in found:
        assert len(ranked) == 3
        assert all(isinstance(one, ScoredCaption) and one.log_prob < 0 for one in ranked)
        assert [one.clip_similarity for one in ranked] == sorted((one.clip_similarity for one in ranked), reverse=True)
        assert len({one.caption for one in ranked}) == 3
    assert best.caption(pictures(photos)) == [ranked[0].caption for ranked in found]
    # another decoding draws n, and the greedy caption
    few = replace(best, decode=DecodeConfig()).captions(pictures(photos), 2)
    assert all(len(ranked) == 2 for ranked in few)
    with pytest.raises(InputError, match="n=0 is not accepted: it must be 1 or more"):
        best.captions(pictures(photos), 0)


def test_a_run_a_checkpoint_and_a_link_are_one(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    captions = Captioner.load(checkpoint, device="cpu").caption(pictures(photos))
    for place in ("checkpoints", "checkpoints/best", "checkpoints/step_000001"):
        assert Captioner.load(str(checkpoint / place), device="cpu").caption(pictures(photos)) == captions
    # moved to where nothing of the run is
    shutil.copytree(checkpoint / "checkpoints" / "best", tmp_path / "elsewhere")
    assert Captioner.load(tmp_path / "elsewhere", device="cpu").caption(pictures(photos)) == captions


def test_what_cannot_be_loaded_is_said_in_a_sentence(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match="nowhere: no checkpoint is found there; name a run folder or a checkpoint"
    ):
        Captioner.load("nowhere")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.pt is a file and a checkpoint is a folder"):
        Captioner.load(tmp_path / "model.pt")
    with pytest.raises(InputError, match="device=gpu is not accepted: it must be auto, cpu, cuda or cuda:N"):
        Captioner.load(checkpoint, device="gpu")
    with pytest.raises(InputError, match=r"device=mps is refused: .*; set device=cpu"):
        Captioner.load(checkpoint, device="mps")
    with pytest.raises(
        InputError, match=r"decode\.name=best is not accepted: it must be one of greedy, beam, sample, best_of_n"
    ):
        Captioner.load(checkpoint, decode=DecodeConfig(name="best"))
    other = tmp_path / "other"
    shutil.copytree(checkpoint / "checkpoints" / "best", other)
    write_json(
        other / "checkpoint.json",
        {"clip_backbone": as_dict(ClipBackboneConfig()), "decode": {"name": "dream", "depth": 3}},
    )
    with pytest.raises(InputError, match=r"does not say its CLIP and decoding .*depth.*: another version wrote it"):
        Captioner.load(other)
    write_json(
        other / "checkpoint.json",
        {"clip_backbone": as_dict(ClipBackboneConfig(name="rn", kind="random")), "decode": {}},
    )
    shutil.rmtree(other / "clip")
    with pytest.raises(InputError, match="reads embeddings of 8 numbers and its CLIP, rn, gives"):
        Captioner.load(other, device="cpu")
    captioner = Captioner.load(checkpoint, device="cpu")
    with pytest.raises(InputError, match=r"broken\.jpg cannot be read"):
        captioner.caption([*pictures(photos), photos / "deep" / "broken.jpg"])
    with pytest.raises(MissingFileError, match=r"the image gone\.jpg does not exist"):
        captioner.caption(["gone.jpg"])


# -------------------------------------------------------------------------------------------------------- stage=caption


def test_a_nested_folder_in_every_format(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = captioned(checkpoint, str(photos), tmp_path / "out")
    by_path = dict(
        zip(map(str, pictures(photos)), Captioner.load(checkpoint, device="cpu").caption(pictures(photos)), strict=True)
    )
    assert {row["image_id"]: row["caption"] for row in found} == by_path
    assert all(row.keys() == {"image_id", "caption"} for row in found)
    (broken,) = json.loads((tmp_path / "out" / "unreadable.json").read_text())
    assert broken["image_id"] == str(photos / "deep" / "broken.jpg")
    printed = capsys.readouterr().out
    assert sum("broken.jpg cannot be read" in line for line in printed.splitlines()) == 1
    assert "1 of 13 pictures cannot be read and are left out" in printed
    # batches and workers change nothing; what is mended is no longer listed
    mended = shutil.copytree(photos, tmp_path / "mended")
    Image.new("RGB", (9, 9)).save(mended / "deep" / "broken.jpg")
    clip = ClipBackboneConfig(image_batch_size=3)
    again = captioned(checkpoint, str(mended), tmp_path / "out", clip_backbone=clip, workers=2)
    assert len(again) == 13
    assert {
        row["image_id"].replace(str(mended), str(photos)): row["caption"] for row in again
    }.items() > by_path.items()
    assert not (tmp_path / "out" / "unreadable.json").exists()
    assert not (tmp_path / "out" / "captions.partial.jsonl").exists()


def test_several_captions_as_json_and_csv(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    paths = [str(p) for p in pictures(photos)[:3]]
    expected = Captioner.load(checkpoint, device="cpu").captions(paths, 4)
    found = captioned(checkpoint, paths, tmp_path / "out", num=4)
    for row, path, ranked in zip(found, paths, expected, strict=True):
        assert row["image_id"] == path
        assert [one["caption"] for one in row["captions"]] == [one.caption for one in ranked]
        assert row["caption"] == ranked[0].caption
        assert row["clip_similarity"] == pytest.approx(ranked[0].clip_similarity, abs=1e-5)
    captioned(checkpoint, paths, tmp_path / "out", num=4, form="csv")
    lines = list(csv.DictReader((tmp_path / "out" / "captions.csv").open(newline="", encoding="utf-8")))
    assert list(lines[0]) == ["image_id", "caption", "clip_similarity", "log_prob"]
    assert [(line["image_id"], line["caption"]) for line in lines] == [
        (path, one.caption) for path, ranked in zip(paths, expected, strict=True) for one in ranked
    ]
    assert [float(line["log_prob"]) for line in lines] == pytest.approx(
        [one.log_prob for ranked in expected for one in ranked], abs=1e-4
    )
    captioned(checkpoint, paths, tmp_path / "out", form="csv")
    assert (tmp_path / "out" / "captions.csv").read_text().startswith("image_id,caption\n")


def test_the_decoding_of_the_command_line_wins(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    decode = DecodeConfig(name="best_of_n", best_of=3)
    found = captioned(checkpoint, str(photos), tmp_path / "out", decode=decode)
    by_path = {row["image_id"]: row["caption"] for row in found}
    paths = list(by_path)
    assert Captioner.load(checkpoint, device="cpu", decode=decode).caption(paths) == list(by_path.values())


def test_a_backbone_trained_by_a_sigmoid_also_gives_probabilities(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DemoBackbone, "logit_bias", -2.0)
    (row,) = captioned(checkpoint, str(pictures(photos)[0]), tmp_path / "out", num=2)
    for one in row["captions"]:
        logit = 100.0 * one["clip_similarity"] - 2.0
        assert one["probability"] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6)


def test_greedy_that_a_person_types_wins_over_the_checkpoints_decoding(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    """`decode=greedy` is also the default: only the command line tells that somebody wants it."""
    path = str(pictures(photos)[0])
    greedy = Captioner.load(checkpoint, device="cpu", decode=DecodeConfig()).caption(path)
    sampled = Captioner.load(checkpoint, device="cpu").caption(path)
    assert greedy != sampled
    for words, expected in (((), sampled), (("decode.batch_size=1",), sampled), (("decode=greedy",), greedy)):
        done = run_program(command(checkpoint, path, tmp_path / "out", *words))
        assert done.returncode == 0, done.stderr
        assert [row["caption"] for row in json.loads((tmp_path / "out/captions.json").read_text())] == expected


def test_pictures_in_archives(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    """Shards, a table and a folder, with the same pictures and captions."""
    table = pytest.importorskip("pyarrow", reason="pyarrow (extra tables) is not installed").table
    named = pictures(photos)[:4]
    for number, pair in enumerate((named[:2], named[2:])):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for path in pair:
                tar.add(path, f"{path.stem}.png")
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in named]
    pytest.importorskip("pyarrow.parquet").write_table(table({"image": rows, "thumb": rows}), tmp_path / "a.parquet")
    alone = captioned(checkpoint, [*map(str, named)], tmp_path / "alone")
    shards = captioned(checkpoint, str(tmp_path / "{00000..00001}.tar"), tmp_path / "shards")
    assert [row["caption"] for row in shards] == [row["caption"] for row in alone]
    assert shards[0]["image_id"] == str(tmp_path / "00000.tar" / f"{named[0].stem}.png")
    with pytest.raises(InputError, match=r"a\.parquet .*'image', 'thumb'.*set dataset.image_column"):
        captioned(checkpoint, str(tmp_path / "a.parquet"), tmp_path / "table")
    chosen = {"dataset": DatasetConfig(image_column="image")}
    rows = captioned(checkpoint, str(tmp_path / "a.parquet"), tmp_path / "table", **chosen)
    assert [row["caption"] for row in rows] == [row["caption"] for row in alone]
    assert (tmp_path / "table" / "gallery.html").read_text().count("data:image/") == 4
    with pytest.raises(MissingFileError, match=r"00002\.tar"):
        captioned(checkpoint, str(tmp_path / "{00000..00002}.tar"), tmp_path / "shards")


def test_a_list_from_standard_input(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file that has gone and a folder among them: one line in the report, and what is below it."""
    listed = [str(pictures(photos)[0]), str(tmp_path / "gone.png"), str(photos / "deep" / "deeper"), ""]
    out = tmp_path / "out"
    done = run_program(command(checkpoint, "-", out), input="\n".join(listed), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [row["image_id"] for row in json.loads((out / "captions.json").read_text())]
    assert found == [listed[0], *map(str, sorted((photos / "deep" / "deeper").iterdir()))]
    assert "left out: the image " + listed[1] + " does not exist" in done.stdout
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(InputError, match="images=-: standard input lists no picture; give a path per line"):
        find_images(["-"])


def test_a_name_that_is_no_utf8(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Image.new("RGB", (9, 9)).save(tmp_path / "plain.png")
    shutil.move(tmp_path / "plain.png", os.fsdecode(name))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(name + b"\r\n")))
    assert find_images(["-"]) == [Path(os.fsdecode(name))]
    for form in ("json", "csv"):
        captioned(checkpoint, str(tmp_path), tmp_path / "out", form=form)
        assert "caf\\" in (tmp_path / "out" / f"captions.{form}").read_text(encoding="utf-8")


def test_a_heic_is_read_or_what_it_needs_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    there = importlib.util.find_spec("pillow_heif") is not None
    if there:
        Image.new("RGB", (64, 64), "red").save(tmp_path / "b.heic")
    else:
        (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    found = captioned(checkpoint, str(tmp_path), tmp_path / "out")
    assert len(found) == 1 + there
    assert ("b.heic cannot be read" in (printed := capsys.readouterr().out)) != there
    assert ("HEIC needs: pip install pillow-heif" in printed) != there


def test_a_killed_job_keeps_what_it_had(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 at a picture that takes seconds: the next job continues there, and ends as an undisturbed one."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    expected = [row["caption"] for row in captioned(checkpoint, str(folder), tmp_path / "whole")]
    slow = find_images([str(folder)])[9]
    slow.rename(tmp_path / "aside")
    Image.new("RGB", (9000, 9000)).save(slow, "PNG", compress_level=1)
    out = tmp_path / "out"
    partial = out / "captions.partial.jsonl"
    one_by_one = command(checkpoint, str(folder), out, "clip_backbone.image_batch_size=1")
    job = subprocess.Popen(one_by_one, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while (
        job.poll() is None
        and time.monotonic() < end
        and not (partial.is_file() and partial.read_bytes().count(b"\n") == 10)
    ):
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, job.communicate()[0]
    made_from, *kept = [json.loads(line) for line in partial.read_text().splitlines()]
    assert len(kept) == 9
    assert not (out / "captions.json").exists()
    slow.unlink()
    (tmp_path / "aside").rename(slow)
    # a caption that is kept is not made again, and a kill cuts lines
    good = [row for row in kept if "captions" in row]
    good[0]["captions"] = [{"caption": "kept"}]
    partial.write_text("\n".join(map(json.dumps, [made_from, *kept])) + '\n{"key": "')
    capsys.readouterr()
    found = captioned(checkpoint, str(folder), out)
    assert f"going on after {len(good)} of 13 pictures" in capsys.readouterr().out
    assert [row["caption"] for row in found] == ["kept", *expected[1:]]
    assert expected[0] != "kept"


def test_captions_of_another_decoding_are_not_kept(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = captioned(checkpoint, str(photos), out)
    for made_from in ("another", None):
        rows = [{"made_from": made_from}, {"key": "a", "captions": [{"caption": "old"}]}]
        (out / "captions.partial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert captioned(checkpoint, str(photos), out) == expected
