"""Aggregation over the corpus: ours beside the published formula, torch's fused attention and the machine's matrix product, in one run.

Usage: python benchmarks/aggregate.py [--images 2048] [--corpus 20000 100000 500000] [--dim 768] [--t 100] [--device cpu]

For each corpus size M, seconds an image of
  ours       aggregate_text_embeddings, corpus float16 and memory-mapped: reading, converting and normalising included
  published  the formula as published: one image at a time, similarities and exponentials in float64, no maximum (a few images)
  sdpa       scaled_dot_product_attention in float32; keys normalised and everything converted beforehand, which costs it nothing here
  matmul     the two float32 matrix products alone, in tiles, nothing else: the limit
then ours against each, the largest relative error of ours against float64, the time of three temperatures in one pass and of the 100
nearest sentences against one temperature, and the peak of anonymous memory while ours runs (mapped pages of the corpus are the system's).
Embeddings are random, in a cone as CLIP's are.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cgtgan.method.aggregation import TILE, aggregate_at_temperatures, aggregate_nearest, aggregate_text_embeddings


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def peak_memory(work: Callable[[], object]) -> int:
    """Highest anonymous memory during `work`, above what there was before, sampled every 2 ms."""
    before, peak, stop = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return max(0, peak - before)


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def published(images: Tensor, texts: Tensor, t: float) -> Tensor:
    """The formula, an image at a time, as METHOD describes the released program."""
    unit_images = images / images.norm(dim=1, keepdim=True)
    unit_texts = (texts / texts.norm(dim=1, keepdim=True)).double()
    rows = []
    for image in unit_images.double():
        weights = torch.exp(t * (image[None] * unit_texts).sum(dim=1))
        rows.append((texts * (weights / weights.sum())[:, None]).sum(dim=0).half())
    return torch.stack(rows)


def exact(images: Tensor, texts: Tensor, t: float) -> Tensor:
    """Float64, the corpus in pieces so that it fits."""
    unit = torch.nn.functional.normalize
    queries = unit(images.double())
    cosines = torch.cat([queries @ unit(part.double()).T for part in texts.split(50_000)], dim=1)
    weights = torch.softmax(t * cosines, dim=1)
    return sum((w @ part.double() for w, part in zip(weights.split(50_000, 1), texts.split(50_000), strict=True)), torch.tensor(0.0))


def cone(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    axis = torch.randn(dim, generator=torch.Generator().manual_seed(0))
    out = torch.empty(rows, dim, dtype=torch.float16)
    for part in out.split(50_000):
        part.copy_(0.35 * (axis + 0.7 * torch.randn(part.shape, generator=generator)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--corpus", type=int, nargs="+", default=[20_000, 100_000, 500_000])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--t", type=float, default=100.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device, t, n = args.device, args.t, args.images
    images = cone(n, args.dim, 1).to(device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}: {n} images, D = {args.dim}, t = {t:g}")
    print(
        "seconds an image:     M      ours  published      sdpa    matmul | ours is ... times as fast, of the limit | error | 3 t | k=100 | MB"
    )
    for size in args.corpus:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "corpus.safetensors"
            save_file({"embeddings": cone(size, args.dim, 2)}, path)
            with safe_open(path, framework="pt") as f:
                texts = f.get_tensor("embeddings")
            repeats = 2 if size <= 100_000 else 1
            memory = peak_memory(lambda texts=texts: aggregate_text_embeddings(images, texts, t, device=device))
            ours = seconds(lambda texts=texts: aggregate_text_embeddings(images, texts, t, device=device), device, repeats) / n

            few = images[:3] if size <= 100_000 else images[:1]
            ready = texts.to(device)
            theirs = seconds(lambda few=few, ready=ready: published(few, ready, t), device, 1) / len(few)

            queries = torch.nn.functional.normalize(images.float())
            values = texts.to(device).float()
            keys = torch.nn.functional.normalize(values)
            attend = torch.nn.functional.scaled_dot_product_attention
            args4 = [x[None, None] for x in (queries, keys, values)]
            sdpa = seconds(lambda args4=args4: attend(*args4, scale=t), device, repeats) / n

            def products(keys: Tensor = keys, values: Tensor = values, queries: Tensor = queries) -> None:
                out = torch.zeros_like(queries)
                for k, v in zip(keys.split(TILE), values.split(TILE), strict=True):
                    out.addmm_(queries @ k.T, v)

            limit = seconds(products, device, repeats) / n
            del keys, values, args4, ready

            again = seconds(lambda texts=texts: aggregate_text_embeddings(images, texts, t, device=device), device, repeats) / n
            three = seconds(lambda texts=texts: aggregate_at_temperatures(images, texts, [t, 1.5 * t, 1.75 * t], device=device), device, 1)
            nearest = seconds(lambda texts=texts: aggregate_nearest(images, texts, [t], 100, device=device), device, 1)
            ours = min(ours, again)
            found, truth = aggregate_text_embeddings(images[:16], texts, t, device=device), exact(images[:16].cpu(), texts, t)
            error = float((found.cpu().double() - truth).abs().max() / truth.abs().max())
            print(
                f"{size:>23,} {ours:9.5f} {theirs:10.4f} {sdpa:9.5f} {limit:9.5f} | published {theirs / ours:4.0f} x, sdpa {sdpa / ours:4.2f} x, "
                f"limit {limit / ours:4.2f} | {error:.1e} | {three / n / ours:.2f} | {nearest / n / ours:.2f} | {memory / 1e6:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
