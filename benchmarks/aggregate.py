"""Aggregation over the corpus: ours, the published formula, torch's fused attention, the bare products, in one run.

Usage: python benchmarks/aggregate.py [--images 2048] [--corpus 20000 100000 500000] [--dim 768] [--t 100]
                                      [--device cpu]

For each corpus size M, seconds per image of
  ours       aggregate_text_embeddings, corpus float16 and memory-mapped: reading, converting, normalising included
  published  the published formula: one image at a time, float64, no running maximum (a few images)
  sdpa       scaled_dot_product_attention in float32; converting and normalising the corpus for it is timed separately
  matmul     the two float32 matrix products alone, in tiles: the limit
Then the ratios of ours to each, the largest relative error of ours against float64, the time of three temperatures in
one pass and of the 100 nearest sentences, both against one temperature, and the peak of anonymous memory of ours
(mapped pages of the corpus belong to the system). Embeddings are random, in a cone as CLIP's are.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them

import argparse
import multiprocessing
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


def peak_memory(work: Callable[[], object], every: float = 0.002) -> int:
    """Highest anonymous memory during `work`, above what there was before, sampled every so many seconds."""
    before, peak, stop = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(every):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return max(0, peak - before)


def seconds(work: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def published(images: Tensor, texts: Tensor, t: float) -> Tensor:
    """The formula, one image at a time, as METHOD describes the released program."""
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
    return sum(
        (w @ part.double() for w, part in zip(weights.split(50_000, 1), texts.split(50_000), strict=True)),
        torch.tensor(0.0, device=images.device),
    )


def cone(rows: int, dim: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    axis = torch.randn(dim, generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.empty(rows, dim, dtype=torch.float16, device=device)
    for part in out.split(50_000):
        part.copy_(0.35 * (axis + 0.7 * torch.randn(part.shape, generator=generator, device=device)))
    return out


def memory_of(path: str, images: int, dim: int, t: float) -> int:
    """Peak of anonymous memory of one aggregation on the CPU; called in a process of its own."""
    with safe_open(path, framework="pt") as f:
        texts = f.get_tensor("embeddings")
    queries = cone(images, dim, 1)
    aggregate_text_embeddings(queries[:8], texts[:5000], t)  # what torch itself needs once
    return peak_memory(lambda: aggregate_text_embeddings(queries, texts, t))


def measure(images: Tensor, path: str, t: float, device: str, repeats: int) -> str:
    n = len(images)
    with safe_open(path, framework="pt") as f:
        texts = f.get_tensor("embeddings")
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        memory = fresh.apply(memory_of, (path, n, texts.shape[1], t))

    def ours() -> Tensor:
        return aggregate_text_embeddings(images, texts, t, device=device)

    ready = texts.to(device)
    few = images[:3] if len(texts) <= 100_000 else images[:1]
    theirs = seconds(lambda: published(few, ready, t), device) / len(few)

    queries = torch.nn.functional.normalize(images.float())
    started = time.perf_counter()
    keys, values = torch.nn.functional.normalize(texts.to(device).float()), texts.to(device).float()
    preparation = (time.perf_counter() - started) / n

    def sdpa() -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(queries[None, None], keys[None, None], values[None, None], scale=t)[0, 0]

    def products() -> None:
        out = torch.zeros_like(queries)
        for k, v in zip(keys.split(TILE), values.split(TILE), strict=True):
            out.addmm_(queries @ k.T, v)

    works = (ours, sdpa, products)  # in turn, so that a noisy moment hits all alike
    own, fused, limit = (
        min(times) / n for times in zip(*[[seconds(w, device) for w in works] for _ in range(repeats)], strict=True)
    )
    truth = exact(images[:16].cpu(), texts, t)
    error, fused_error = (
        float((x[:16].cpu().double() - truth).abs().max() / truth.abs().max()) for x in (ours(), sdpa())
    )
    three = seconds(lambda: aggregate_at_temperatures(images, texts, [t, 1.5 * t, 1.75 * t], device=device), device) / n
    nearest = seconds(lambda: aggregate_nearest(images, texts, [t], 100, device=device), device) / n
    return (
        f"M = {len(texts):7,}   ours {own:.5f}   published {theirs:.4f}   sdpa {fused:.5f}   matmul {limit:.5f}\n"
        f"    ours is {theirs / own:.0f} times as fast as published, {fused / own:.2f} times as sdpa "
        f"({(fused + preparation) / own:.2f} with its preparation), {limit / own:.2f} of the matmul rate\n"
        f"    error {error:.1e} (sdpa {fused_error:.1e}); 3 temperatures take {three / own:.2f} times one, "
        f"the 100 nearest {nearest / own:.2f} times all; peak memory {memory / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--corpus", type=int, nargs="+", default=[20_000, 100_000, 500_000])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--t", type=float, default=100.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    images = cone(args.images, args.dim, 1).to(args.device)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}"
    print(f"{machine}: {args.images} images, D = {args.dim}, t = {args.t:g}")
    print("seconds per image:")
    for size in args.corpus:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/corpus.safetensors"
            save_file({"embeddings": cone(size, args.dim, 2)}, path)
            print(measure(images, path, args.t, args.device, args.repeats), flush=True)


if __name__ == "__main__":
    main()
