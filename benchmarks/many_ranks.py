"""Claim: processes that share a folder share preprocess and aggregate, and wait little for each other.

Usage: python benchmarks/many_ranks.py [--ranks 4] [--images 4096] [--captions 16384] [--rows 32768] [--sentences 50000]
                                       [--output many_ranks]

Each part is made by one process and by `--ranks` of them, a thread each: with `srun` where SLURM_CONF names a cluster,
else as plain processes. They start together once all have imported torch. Embeddings must be the same bytes.
  preprocess  image files and captions to their embeddings, with a tiny CLIP, in pieces of 64 and 512
  aggregate   `rows` images over `sentences`, D = 768, drawn at random, in pieces of 4,096 images
  claims      what a piece costs on top: taking its lock, writing it with the lock given back, and one listing of the
              folder of N pieces, beside each of which its lock file stays
Seconds are on the clock, from the common start to the end of the last process; waited: slept because others worked on
all that was left, summed over the processes; start-up: from the launch to the common start.
Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from aggregate import cone
from preprocess import settings, write_captions, write_images

from cgtgan.assets.aggregated import BLOCK, aggregated_embeddings
from cgtgan.assets.backbone import backbone_producer
from cgtgan.assets.corpus import SENTENCE_EMBEDDINGS_FORMAT, corpus_sentences, sentence_embeddings
from cgtgan.assets.embedded import image_producer
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.runtime.artifacts import fingerprint, save_embeddings, write_json
from cgtgan.runtime.producers import with_format
from cgtgan.runtime.shards import Rank, Shards
from cgtgan.runtime.tracking import Tracker

DIM, CLAIMED = 768, 500
Row = dict[str, Any]


class Listener(Tracker):
    """Counts the seconds that the stages say they waited."""

    waited = 0.0

    def say(self, text: str) -> None:
        self.waited += sum(map(float, re.findall(r"waited ([\d.]+) s", text)))


def workspace(home: Path, part: str) -> Workspace:
    cfg = settings(home, "tiny", "cpu")
    cfg.clip_backbone.kind, cfg.clip_backbone.image_shard, cfg.clip_backbone.text_shard = "random", 64, 512
    if part == "aggregate":  # a data set whose ids name its pictures, which need not be there
        cfg.dataset.kind, cfg.dataset.root = "flickr30k", str(home)
    return Workspace(cfg, Listener())


def made(ws: Workspace, part: str) -> None:
    if part == "aggregate":
        aggregated_embeddings(ws, "train", 100.0)
    else:
        image_embeddings(ws, "train")
        sentence_embeddings(ws)


def work(home: Path, part: str) -> None:
    """One process: its share of a part."""
    torch.set_num_threads(1)
    rank, ws = Rank.here(), workspace(home, part)
    (home / f"ready-{rank.number}").touch()
    while len(list(home.glob("ready-*"))) < rank.world:
        time.sleep(0.01)
    started = time.time()
    made(ws, part)
    assert isinstance(ws.tracker, Listener)
    clock = {"started": started, "ended": time.time(), "waited": ws.tracker.waited}
    write_json(home / f"done-{rank.number}.json", clock | {"node": os.environ.get("SLURMD_NODENAME", "")})


def together(home: Path, part: str, ranks: int) -> Row:
    """Clock and waiting of `ranks` processes, and the hash of what they made."""
    for old in (*home.glob("ready-*"), *home.glob("done-*")):
        old.unlink()
    command = [sys.executable, __file__, "--work", part, str(home)]
    launched = time.time()
    if "SLURM_CONF" in os.environ:
        shared = ["srun", f"--ntasks={ranks}", "--cpus-per-task=1", "--overcommit", "--spread-job", "--quiet"]
        started = [subprocess.Popen([*shared, *command])]
    else:
        places = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(ranks)} for i in range(ranks)]
        started = [subprocess.Popen(command, env=os.environ | place) for place in places]
    ended = [process.wait() for process in started]
    if any(ended):
        raise SystemExit(f"a process of {part} failed")
    rows = [json.loads(file.read_text()) for file in home.glob("done-*.json")]
    files = sorted((home / "artifacts").glob("*_embeddings/*.safetensors"))
    return {
        "part": part, "processes": len(rows), "nodes": len({row["node"] for row in rows}),
        "start_up": min(row["started"] for row in rows) - launched, "waited": sum(row["waited"] for row in rows),
        "seconds": max(row["ended"] for row in rows) - min(row["started"] for row in rows),
        "hash": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
    }  # fmt: skip


def write_preprocess(home: Path, args: argparse.Namespace) -> int:
    write_images(home / "drawn", 16, None)
    write_images(home / "photos", args.images, str(home / "drawn"))
    write_captions(home / "captions.txt", args.captions)
    return -(-args.images // 64) - (-args.captions // 512)


def write_aggregate(home: Path, args: argparse.Namespace) -> int:
    rows = [{"filename": f"{i}.jpg", "imgid": i, "split": "train", "sentences": []} for i in range(1, args.rows + 1)]
    (home / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "flickr30k"}))
    write_captions(home / "captions.txt", args.sentences)
    ws = workspace(home, "aggregate")
    images = image_producer(ws, "train") | {"images": "drawn"}
    sentences = {"sentences": fingerprint(corpus_sentences(ws)[2]), "backbone": backbone_producer(ws)}
    for kind, producer, count, ids in (
        ("image_embeddings", images, args.rows, range(1, args.rows + 1)),
        (
            "sentence_embeddings",
            with_format(sentences, SENTENCE_EMBEDDINGS_FORMAT),
            args.sentences,
            range(args.sentences),
        ),
    ):
        path = ws.store.path(kind, producer, ".safetensors")
        save_embeddings(path, cone(count, DIM, len(kind)), ids, kind=kind, producer=producer)
    return -(-args.rows // BLOCK)


def claims(home: Path, pieces: int) -> Row:
    """Milliseconds of a claim, of writing its piece (a few bytes), and of one listing of all pieces and lock files."""
    shards = Shards(home / "made.safetensors", pieces, 1, lambda: False)
    shards.folder.mkdir(parents=True)
    for index in range(CLAIMED, pieces):
        shards.file(index).touch()
        (shards.folder / f".{index:06d}.lock").touch()
    taken, written, before = list[float](), list[float](), time.perf_counter()
    for index in shards.claimed(shards.missing()):
        taken.append(time.perf_counter() - before)
        shards.keep(index, {"vectors": torch.zeros(1)}, {})
        before, last = time.perf_counter(), before + taken[-1]
        written.append(before - last)
    listings = list[float]()
    for _ in range(5):
        before = time.perf_counter()
        shards.missing()
        listings.append(time.perf_counter() - before)
    shutil.rmtree(shards.folder)
    times = {"claim_ms": taken, "writing_ms": written, "listing_ms": listings}
    return {"pieces": pieces} | {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


def markdown(shared: list[Row], listed: list[Row]) -> str:
    lines = [
        "| part | pieces | seconds, 1 process | processes | seconds | times as fast | waited, s | start-up, s |",
        "|" + "---|" * 8,
    ]
    for one, many in zip(shared[::2], shared[1::2], strict=True):
        ratio = one["seconds"] / many["seconds"]
        lines.append(
            f"| {one['part']} | {one['pieces']} | {one['seconds']:.1f} | {many['processes']} | {many['seconds']:.1f} | "
            f"{ratio:.2f} | {many['waited']:.1f} | {one['start_up']:.1f}, {many['start_up']:.1f} |"
        )
    lines += ["", "| pieces | a claim, ms | writing a piece, ms | a listing, ms |", "|" + "---|" * 4]
    lines += [
        f"| {row['pieces']:,} | {row['claim_ms']:.2f} | {row['writing_ms']:.2f} | {row['listing_ms']:.1f} |"
        for row in listed
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--captions", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--sentences", type=int, default=50_000)
    parser.add_argument("--pieces", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--output", type=Path, default=Path("many_ranks"))
    parser.add_argument("--work", nargs=2, metavar=("PART", "HOME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Path(args.work[1]), args.work[0])
        return
    writers: dict[str, Callable[[Path, argparse.Namespace], int]] = {
        "preprocess": write_preprocess, "aggregate": write_aggregate,
    }  # fmt: skip
    shared: list[Row] = []
    for part, write in writers.items():
        with tempfile.TemporaryDirectory() as folder:
            pieces = write(Path(folder), args)
            kept = shutil.copytree(Path(folder, "artifacts"), Path(folder, "given")) if part == "aggregate" else None
            for ranks in (1, args.ranks):
                shared.append({"pieces": pieces} | together(Path(folder), part, ranks))
                shutil.rmtree(Path(folder, "artifacts"))
                if kept is not None:
                    shutil.copytree(kept, Path(folder, "artifacts"))
    assert shared[0]["hash"] == shared[1]["hash"]
    assert shared[2]["hash"] == shared[3]["hash"]
    with tempfile.TemporaryDirectory() as folder:
        listed = [claims(Path(folder), pieces) for pieces in args.pieces]
    args.output.with_suffix(".json").write_text(json.dumps({"shared": shared, "claims": listed}, indent=1))
    args.output.with_suffix(".md").write_text(markdown(shared, listed))
    print(markdown(shared, listed))


if __name__ == "__main__":
    main()
