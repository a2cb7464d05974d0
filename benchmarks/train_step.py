"""One GAN step at the paper's sizes: ours and a transcription of the published step, each in its own process.

Usage: python benchmarks/train_step.py [--tokenizers FOLDER] [--images 16] [--samples 5] [--tokens 20]
                                       [--precision float32 bf16] [--device cpu] [--steps 3] [--initialize]

FOLDER has gpt2/ and roberta/, each with vocab.json and merges.txt; without it a vocabulary as large is made. GPT-2
small, RoBERTa-base and the text tower of CLIP ViT-L/14 have random weights; corpus sentences have 8 to 15 words.
`--tokens 20`: no caption ends before its last position, as with random weights. With another number the stop token is
made so likely that captions have about that many tokens on average (a trained generator's have near 11).

For each: seconds per step (median of --steps after one that is not counted), the share of each part, and the peak of
resident memory (GPU memory on a GPU) of the whole process with its models, gradients and optimiser states. Then ours
against the floor: the matrix products of our step, counted by torch, at the rate that this machine reaches in a large
matrix product of the same kind. --initialize measures a step of the initialisation instead (a batch of --images
sentences), against its floor and against the floor of its matrix products and its update together: AdamW reads and
writes every weight, its gradient and its two moments, at the rate that a large copy reaches.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import dataclasses
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from gan_step import LENGTH, PAPER, Case, Published, Sizes, make, sentences
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from cgtgan.models.chunks import pad_rows
from cgtgan.models.clip_inputs import clip_module
from cgtgan.models.fixed_cache import GROWING
from cgtgan.stages.train import gan_step

# ------------------------------------------------------------------------------------------------------------ measuring


def peak_gb(device: str) -> float:
    return (
        torch.cuda.max_memory_allocated() / 1e9
        if device != "cpu"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    )


def rate(dtype: torch.dtype, device: str, rounds: int) -> float:
    """Operations per second of a large matrix product of a step's own shape, in the best of some rounds."""
    a, b = torch.randn(1760, 768, device=device, dtype=dtype), torch.randn(768, 3072, device=device, dtype=dtype)
    best = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        _ = a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * 1760 * 768 * 3072 / best


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Seconds of a step, and more of ours. Memory is that of the process: run it in one of its own."""
    cfg, parts, batch = make(case)
    published = Published(cfg, parts)
    seconds, rows = [], []
    for number in range(1, steps + 2):
        part = batch(number)
        started = time.perf_counter()
        row = published.step(number, part) if case.kind == "published" else gan_step(cfg, parts, number, part)
        if case.device != "cpu":
            torch.cuda.synchronize()
        if number > 1:
            seconds.append(time.perf_counter() - started)
            rows.append(row)
    found: dict[str, Any] = {"seconds": statistics.median(seconds), "peak_gb": peak_gb(case.device)}
    if case.kind != "published":
        found["parts"] = {key: statistics.mean(r[key] for r in rows) for key in rows[0] if key.startswith("time/")}
        found["tokens"] = statistics.mean(r["train/caption_tokens"] for r in rows)
        counter = FlopCounterMode(display=False)
        parts.bundle.model.decode_cache = GROWING  # what is compiled is not seen by the counter
        with counter:
            gan_step(cfg, parts, steps + 2, batch(steps + 2))
        parts.bundle.model.decode_cache = case.cache
        dtype = torch.bfloat16 if case.kind.endswith("bf16") else torch.float32
        found["floor"] = counter.get_total_flops() / rate(dtype, case.device, 30 if case.sizes == PAPER else 1)
        found["tflop"] = counter.get_total_flops() / 1e12
    if case.device != "cpu":
        step = published.step if case.kind == "published" else lambda n, b: gan_step(cfg, parts, n, b, logged=False)
        part = batch(steps + 3)
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step(steps + 3, part)
            torch.cuda.set_sync_debug_mode("default")
        found["host_waits"] = sum("synchroniz" in str(wait.message) for wait in waits)
    return found


def measure_initialization(case: Case, steps: int) -> dict[str, Any]:
    """Seconds of a step of cross-entropy on `case.images` sentences, its floor, and the floor of its update."""
    _, parts, _ = make(case)
    model, devices, texts = parts.bundle.model.eval(), parts.devices, sentences(4096)
    moved = 7 * 4 * sum(p.numel() for p in model.parameters())  # weight, moments: read and written; gradient: read

    def step(number: int) -> None:
        drawn = [texts[(number * case.images + i) % len(texts)] for i in range(case.images)]
        tokens, mask = pad_rows(parts.bundle.tokenizer.encode(drawn))
        vectors = torch.randn(case.images, parts.bundle.clip_dim, device=devices.device)
        with devices.autocast():
            loss = model.reconstruction_loss(vectors, tokens.to(devices.device), mask.to(devices.device))
        parts.g_optimizer.step(loss, number)

    seconds = []
    for number in range(1, steps + 2):
        started = time.perf_counter()
        step(number)
        if case.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    with FlopCounterMode(display=False) as counter:
        step(steps + 2)
    dtype = torch.bfloat16 if case.kind.endswith("bf16") else torch.float32
    floor = counter.get_total_flops() / rate(dtype, case.device, 30 if case.sizes == PAPER else 1)
    return {
        "seconds": statistics.median(seconds[1:]), "tflop": counter.get_total_flops() / 1e12, "floor": floor,
        "update": moved / copy_rate(case.device), "peak_gb": peak_gb(case.device),
    }  # fmt: skip


def copy_rate(device: str) -> float:
    """Bytes per second that a large copy reads and writes, in the best of some rounds."""
    a = torch.zeros(2**26, device=device)
    b, best = torch.ones_like(a), math.inf
    for _ in range(10):
        started = time.perf_counter()
        b.copy_(a)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * a.nbytes / best


def measure_alone(case: Case, steps: int, *words: str) -> subprocess.Popen[str]:
    """`measure` in a process of its own, which prints its result in the last line."""
    command = [sys.executable, __file__, *words, "--one", json.dumps(dataclasses.asdict(case) | {"steps": steps})]
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}
    )


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What `measure_alone` measured; ends this program with its message if it failed."""
    out, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=LENGTH)
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--memory-gb", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--initialize", action="store_true")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # measure this case here
    args = parser.parse_args()
    clip_module("model")
    if args.one:
        case = json.loads(args.one)
        steps, sizes = case.pop("steps"), Sizes(**case.pop("sizes"))
        measured = measure_initialization if args.initialize else measure
        print(json.dumps(measured(Case(**case, sizes=sizes), steps)))
        return
    found: dict[str, dict[str, Any]] = {}
    for kind in [*([] if args.initialize else ["published"]), *(f"ours {p}" for p in args.precision)]:
        case = Case(kind, args.images, args.samples, args.tokens, args.device, PAPER, args.tokenizers, args.memory_gb)
        found[kind] = result_of(measure_alone(case, args.steps, *(["--initialize"] if args.initialize else [])))
    if args.initialize:
        for kind, f in found.items():
            both = f["floor"] + f["update"]
            print(
                f"initialisation, {args.images} sentences, {kind}: {f['seconds']:.3f} s, {f['tflop']:.3f} TFLOP, floor "
                f"of the products {f['floor']:.3f} s ({f['seconds'] / f['floor']:.2f} times), with the update's "
                f"{f['update']:.3f} s {f['seconds'] / both:.2f} times, peak {f['peak_gb']:.2f} GB"
            )
        return
    print_table(args, found)


def print_table(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    table = Table(
        title=f"{args.images} images x {args.samples}, at most {LENGTH} tokens, {args.device}, "
        f"{torch.get_num_threads()} threads"
    )
    columns = (
        "step",
        "seconds",
        "times as fast",
        "peak GB",
        "share of memory",
        "tokens",
        "TFLOP",
        "floor s",
        "times the floor",
        "parts",
    )
    for column in columns:
        table.add_column(column, justify="right")
    base = found["published"]
    for kind, f in found.items():
        ours = kind != "published"
        parts = "  ".join(f"{name.removeprefix('time/')} {share:.0%}" for name, share in f.get("parts", {}).items())
        table.add_row(
            kind, f"{f['seconds']:.2f}", f"{base['seconds'] / f['seconds']:.2f}", f"{f['peak_gb']:.2f}",
            f"{f['peak_gb'] / base['peak_gb']:.2f}", *((f"{f['tokens']:.1f}", f"{f['tflop']:.2f}", f"{f['floor']:.2f}",
            f"{f['seconds'] / f['floor']:.2f}", parts) if ours else ("-",) * 5),
        )  # fmt: skip
    Console(width=200).print(table)
    if args.device != "cpu":
        hours = {kind: f["seconds"] * 44_000 / 3600 for kind, f in found.items()}
        print("44,000 steps of this size, hours:", json.dumps({k: round(v, 2) for k, v in hours.items()}))


if __name__ == "__main__":
    main()
