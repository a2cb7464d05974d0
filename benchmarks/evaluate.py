"""Scoring end to end: ours beside pycocoevalcap's own `COCOEvalCap` without SPICE, the same captions, in one run.

Usage: python benchmarks/evaluate.py --references CAPTIONS.json[.gz] [--images 5000] [--rounds 3] [--methods 1]

CAPTIONS.json has COCO's caption format. Each image is scored against its first five captions; its caption is the first
one of another image, so that the texts are real. `--methods 3` scores three sets of captions for the same images: ours
together, theirs one after the other. Each round is a process of its own for both: imports, Java, everything.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def read(path: Path, images: int) -> dict[int, list[str]]:
    """The first `images` images with at least five captions, and those five."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    references: dict[int, list[str]] = {}
    for row in json.loads(raw)["annotations"]:
        references.setdefault(row["image_id"], []).append(row["caption"])
    return dict([(i, texts[:5]) for i, texts in references.items() if len(texts) >= 5][:images])


def others(references: dict[int, list[str]], seed: int) -> dict[int, str]:
    """A caption for each image: the first one of another image."""
    ids = list(references)
    shuffled = random.Random(seed).sample(ids, len(ids))
    return {i: references[j][0] for i, j in zip(ids, shuffled, strict=True)}


def ours(references: dict[int, list[str]], methods: int) -> list[dict[str, float]]:
    from cgtgan.evaluation.metrics import score_many

    scored = score_many({str(n): others(references, n) for n in range(methods)}, references)
    assert not any(scores.failed for scores in scored.values()), scored
    return [scores.corpus for scores in scored.values()]


def theirs(references: dict[int, list[str]], methods: int) -> list[dict[str, float]]:
    import pycocoevalcap.eval
    from pycocotools.coco import COCO

    evaluation: Any = pycocoevalcap.eval

    class Spice:
        """It would download 384 MB before it scores anything."""

        def compute_score(self, gts: dict[int, Any], _res: object) -> tuple[float, list[float]]:
            return 0.0, [0.0] * len(gts)

        def method(self) -> str:
            return "SPICE"

    evaluation.Spice = Spice
    rows = [(i, text) for i, texts in references.items() for text in texts]
    coco: Any = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in references],
        "annotations": [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate(rows)],
        "info": {},
    }
    coco.createIndex()
    scores = []
    for n in range(methods):
        results = coco.loadRes([{"image_id": i, "caption": text} for i, text in others(references, n).items()])
        run = evaluation.COCOEvalCap(coco, results)
        run.evaluate()
        names = {"Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}
        scores.append({names.get(key, key): float(value) for key, value in run.eval.items() if key != "SPICE"})
    return scores


def cpu_seconds() -> float:
    """Of the child processes that have ended, with their own children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", type=int, default=1)
    parser.add_argument("--one", choices=("ours", "theirs"), help=argparse.SUPPRESS)  # score here
    args = parser.parse_args()
    if args.one:
        score = {"ours": ours, "theirs": theirs}[args.one]
        print("\n" + json.dumps(score(read(args.references, args.images), args.methods)))
        return
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    cpu: dict[str, list[float]] = {"ours": [], "theirs": []}  # depends less on what else the machine does
    scores: dict[str, Any] = {}
    for _ in range(args.rounds):
        for kind, taken in seconds.items():
            started, cpu_before = time.perf_counter(), cpu_seconds()
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", kind], capture_output=True, text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            )  # fmt: skip
            taken.append(time.perf_counter() - started)
            cpu[kind].append(cpu_seconds() - cpu_before)
            if done.returncode:
                sys.exit(done.stderr)
            scores[kind] = json.loads(done.stdout.splitlines()[-1])
    apart = max(abs(a[k] - b[k]) for a, b in zip(scores["ours"], scores["theirs"], strict=True) for k in b)
    table = Table(
        title=f"{args.images} images x 5 references, {args.methods} captions per image, {os.cpu_count()} cores"
    )
    for column in ("", "seconds (median)", "range", "times as fast", "CPU seconds (median)"):
        table.add_column(column, justify="right")
    base = statistics.median(seconds["theirs"])
    for kind, taken in seconds.items():
        middle = statistics.median(taken)
        spread, used = f"{min(taken):.1f}-{max(taken):.1f}", statistics.median(cpu[kind])
        table.add_row(kind, f"{middle:.1f}", spread, f"{base / middle:.2f}", f"{used:.1f}")
    Console(width=100).print(table)
    print(f"largest difference of a corpus score: {apart:.1e}")


if __name__ == "__main__":
    main()
