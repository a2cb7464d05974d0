"""preprocess and aggregate: several processes, kills, little memory, bad pictures: the same files, byte for byte."""

import gzip
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cgtgan.assets.encoding import Encoder
from cgtgan.errors import UserError
from cgtgan.runtime.artifacts import load_embeddings
from tests.program import Program

ROOT = Path(__file__).resolve().parents[2]
IMAGES, SENTENCES = 60, 150
SETTINGS = [
    *(
        "dataset=folder",
        "dataset.root=photos",
        "corpus=text_file",
        "corpus.path=corpus.txt.gz",
        "clip_backbone=vit_b32",
    ),
    *(
        "clip_backbone.kind=random",
        "clip_backbone.image_batch_size=4",
        "clip_backbone.image_shard=8",
        "clip_backbone.text_shard=16",
    ),
    *("wandb=disabled", "threads=1"),
]


def start(home: Path, *overrides: str, rank: tuple[int, int] | None = None) -> Program:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if rank:
        environment |= {"RANK": str(rank[0]), "WORLD_SIZE": str(rank[1]), "LOCAL_RANK": str(rank[0])}
    command = [sys.executable, str(ROOT / "run.py"), *SETTINGS, *overrides]
    return Program(command, cwd=home, env=environment)


def run(home: Path, *overrides: str, fails: bool = False) -> str:
    process = start(home, *overrides)
    output, _ = process.communicate(timeout=300)
    assert (process.returncode != 0) == fails, output[-3000:]
    assert "Traceback" not in output
    return output


def world(home: Path) -> Path:
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        path = home / "photos" / f"day{i % 3}" / f"{i:03d}.{'png' if i % 7 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (60 + i, 90, 3), dtype=np.uint8)).save(path)
    lines = "".join(f"a picture of {i % 140} {'very ' * (i % 9)}small things\n" for i in range(SENTENCES))
    (home / "corpus.txt.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    return home


def artifacts(home: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (home / "artifacts").rglob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = world(tmp_path_factory.mktemp("one"))
    run(home, "stage=aggregate", "workers=0")
    assert len(artifacts(home)) == 8  # three splits of images and of aggregated embeddings, the sentences and theirs
    assert not list((home / "artifacts").rglob("*shards*"))
    return home


def test_several_ranks_and_workers_make_the_same_files(undisturbed: Path, tmp_path: Path) -> None:
    home = world(tmp_path)
    processes = [start(home, "stage=aggregate", "workers=2", rank=(i, 3)) for i in range(3)]
    output = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], output
    assert output[1] == output[2] == ""  # the first one speaks
    assert artifacts(home) == artifacts(undisturbed)
    assert not list((home / "artifacts").rglob("*shards*"))


@pytest.mark.parametrize("workers", ["workers=0", "workers=1"])
def test_a_killed_job_goes_on_where_it_stopped(undisturbed: Path, tmp_path: Path, workers: str) -> None:
    home = world(tmp_path)
    process = start(home, "stage=aggregate", workers)
    deadline = time.monotonic() + 120
    while not list(home.rglob("image_embeddings*.shards-8/00000[2-4].safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(home.rglob("sentence_embeddings*.safetensors"))
    kept = {p: p.stat().st_mtime_ns for p in home.rglob("*.shards-8/*.safetensors")}
    if kept:  # not killed in the moment in which they are put together
        output = run(home, "stage=aggregate", workers)
        assert "going on after" in output
    else:
        run(home, "stage=aggregate", workers)
    assert artifacts(home) == artifacts(undisturbed)


def test_bad_pictures_are_listed_and_refused_unless_allowed(undisturbed: Path, tmp_path: Path) -> None:
    home = world(tmp_path)
    embeddings = [load_embeddings(p) for p in (undisturbed / "artifacts/image_embeddings").glob("*.safetensors")]
    train = next(e.ids for e in embeddings if e.header.producer["split"] == "train")
    cut, empty, page = [home / f"photos/{i}.jpg" for i in train if (home / f"photos/{i}.jpg").is_file()][2:40:15]
    whole = page.read_bytes()
    cut.write_bytes(cut.read_bytes()[:200])
    empty.write_bytes(b"")
    page.write_text("<html>not found</html>")

    refused = run(home, "stage=preprocess", "workers=1", fails=True)
    assert f"3 of {len(train)} train images cannot be read, the first: the image photos/" in refused
    assert "allow them with dataset.max_bad_images=3 (now 0)" in refused
    (report,) = home.rglob("*.bad.json")
    assert [row["image_id"] for row in json.loads(report.read_text())] == [
        p.relative_to(home / "photos").with_suffix("").as_posix() for p in (cut, empty, page)
    ]
    assert str(report.relative_to(home)) in refused

    page.write_bytes(whole)  # a mended picture is read again
    assert f"2 of {len(train)} train images" in run(home, "stage=preprocess", fails=True)
    allowed = run(home, "stage=preprocess", "dataset.max_bad_images=2")
    assert f"2 of {len(train)} train images cannot be read and are left out" in allowed
    ids = [i for p in (home / "artifacts/image_embeddings").glob("*.safetensors") for i in load_embeddings(p).ids]
    assert len(ids) == IMAGES - 2
    assert "dataset.max_bad_images=2" in run(
        home, "stage=preprocess", fails=True
    )  # what was allowed once is not allowed for good


def test_a_picture_repaired_later_is_read(undisturbed: Path, tmp_path: Path) -> None:
    home = world(tmp_path)
    before = [load_embeddings(p) for p in (undisturbed / "artifacts/image_embeddings").glob("*.safetensors")]
    train = next(e for e in before if e.header.producer["split"] == "train")
    damaged, still = [p for i in train.ids if (p := home / f"photos/{i}.jpg").is_file()][2:40:30]
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes(len(whole)))  # of the same size: the list of pictures stays the same
    still.write_bytes(bytes(still.stat().st_size))
    assert "2 of" in run(home, "stage=preprocess", "dataset.max_bad_images=2")
    damaged.write_bytes(whole)
    again = run(home, "stage=preprocess", "dataset.max_bad_images=1")
    assert "1 train images that could not be read before can be read now" in again
    assert f"1 of {len(train.ids)} train images cannot be read and are left out" in again
    assert "encoding" not in again
    found = [load_embeddings(p) for p in (home / "artifacts/image_embeddings").glob("*.safetensors")]
    (repaired,) = [e for e in found if "repaired" in e.header.producer]
    left_out = still.relative_to(home / "photos").with_suffix("").as_posix()
    assert repaired.ids == [i for i in train.ids if i != left_out]
    kept = [row for row, i in enumerate(train.ids) if i != left_out]
    assert torch.allclose(repaired.vectors.float(), train.vectors[kept].float(), atol=2e-3)
    files = artifacts(home)
    assert "before can be read now" not in run(home, "stage=preprocess", "dataset.max_bad_images=1")
    assert artifacts(home) == files


def test_several_temperatures_in_one_pass_are_those_of_single_ones(undisturbed: Path, tmp_path: Path) -> None:
    home = world(tmp_path)
    output = run(home, "stage=aggregate", "aggregation_t.t=[100,150,175.0]")
    assert "t=100, 150, 175" in output
    found = artifacts(home)
    assert len(found) == 14
    single, places = artifacts(undisturbed), [home / "artifacts/aggregated_embeddings" for home in (undisturbed, home)]
    for name in [name for name in single if name.startswith("aggregated")]:
        single.pop(name)
        alone, beside = (load_embeddings(place / name) for place in places)
        assert alone.ids == beside.ids
        # the sums are of other float32 numbers: near the middle of two of float16, the stored one is the next
        torch.testing.assert_close(beside.vectors, alone.vectors, rtol=2**-10, atol=2**-14)
        assert (beside.vectors != alone.vectors).float().mean() < 0.01
    assert single.items() <= found.items()
    for t in (100, 150, 175):
        assert "aggregated" not in run(home, "stage=aggregate", f"aggregation_t.t={t}")
    assert artifacts(home) == found


def test_the_nearest_sentences_alone(undisturbed: Path, tmp_path: Path) -> None:
    home = world(tmp_path)
    output = run(home, "stage=aggregate", "aggregation_t.top_k=5")
    assert "outside the 5 nearest sentences lies" in output
    assert not artifacts(home).items() <= artifacts(undisturbed).items()
    # all sentences are the nearest: the same numbers up to the rounding to float16
    run(home, "stage=aggregate", "aggregation_t.top_k=100000")
    header = {
        p: load_embeddings(p).header.producer for p in (home / "artifacts/aggregated_embeddings").glob("*.safetensors")
    }
    (all_of_them,) = [
        p for p, producer in header.items() if producer["top_k"] == 100000 and len(load_embeddings(p).ids) > 30
    ]
    images = header[all_of_them]["images"]
    paths = (undisturbed / "artifacts/aggregated_embeddings").glob("*.safetensors")
    (whole,) = [p for p in paths if load_embeddings(p).header.producer["images"] == images]
    torch.testing.assert_close(
        load_embeddings(all_of_them).vectors, load_embeddings(whole).vectors, rtol=2e-3, atol=1e-4
    )


def test_corpus_parts_are_shared_and_merged(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parts of 64 sentences and blocks of 16 images, as a corpus of millions has them: the same up to rounding."""
    from cgtgan.assets import aggregated as aggregate
    from cgtgan.assets.workspace import Workspace
    from cgtgan.config import Config

    monkeypatch.setattr(aggregate, "PART", 64)
    monkeypatch.setattr(aggregate, "BLOCK", 16)
    images, texts = (
        next((undisturbed / f"artifacts/{k}").glob("*.safetensors"))
        for k in ("image_embeddings", "sentence_embeddings")
    )
    monkeypatch.setattr(aggregate, "image_embeddings", lambda *_: load_embeddings(images))
    monkeypatch.setattr(aggregate, "sentence_embeddings", lambda *_: load_embeddings(texts))
    cfg = Config(artifacts_dir=str(tmp_path), device="cpu")
    cfg.aggregation_t.t = [3.0, 100.0]
    found = aggregate.aggregated_at_temperatures(Workspace(cfg), "train")
    for t, embeddings in zip((3.0, 100.0), found, strict=True):
        whole = aggregate.aggregate_at_temperatures(
            load_embeddings(images).vectors, load_embeddings(texts).vectors, [t]
        )[0]
        torch.testing.assert_close(embeddings.vectors, whole.half(), rtol=1e-3, atol=1e-5)
        assert embeddings.ids == load_embeddings(images).ids


# ------------------------------------------------------------------------------------------------------ short of memory


class Small:
    """A tower with room for `room` items."""

    def __init__(self, room: int):
        self.room, self.batches = room, []

    def __call__(self, batch: Any) -> torch.Tensor:
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(batch))
        return torch.tensor([[float(x)] for x in batch])


class Said:
    def __init__(self) -> None:
        self.tracker, self.lines = self, []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_batches_shrink_to_what_memory_holds() -> None:
    ws, tower = Said(), Small(3)
    encoder = Encoder(ws, tower, "clip_backbone.image_batch_size", 16)  # pyright: ignore[reportArgumentType]
    for n in (16, 5, 1):
        assert encoder(torch.arange(n)).flatten().tolist() == list(range(n))
    assert encoder(list(range(7))).flatten().tolist() == list(range(7))
    assert encoder.size == 2
    assert max(tower.batches) == 2
    assert ws.lines[-1] == "memory ran out: going on with clip_backbone.image_batch_size=2"
    with pytest.raises(UserError, match=r"clip_backbone\.image_batch_size: memory does not even hold a batch of one"):
        Encoder(ws, Small(0), "clip_backbone.image_batch_size", 16)(torch.arange(4))  # pyright: ignore[reportArgumentType]
