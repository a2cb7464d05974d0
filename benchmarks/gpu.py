"""Everything that a GPU is to show, in one command; writes one JSON and one Markdown table.

Usage: python benchmarks/gpu.py [--device cuda] [--small] [--output gpu] [--only encoding aggregation ...]

Writes OUTPUT.json after each part, and OUTPUT.md. All weights and embeddings are random. `--small` runs the same code
in a tiny size: `--device cpu --small` is a test. Parts:
  encoding     images/s and captions/s of preprocess, ViT-L/14, in float16 and bfloat16, against the encoder alone
  aggregation  COCO's 566,747 and 3 M sentences: TFLOP/s in float32 and TF32 against a large matrix product, errors
               against float64, and the seconds of all of COCO's 113,287 training images
  step         the GAN step at 64 x 5 and 128 x 5, ours in float32 and bf16 against the published step, transcribed:
               seconds, shares, peak memory, how often the host waits for the device, hours of 44,300 steps
  together     two processes with the bf16 step on one card, against one
  decoding     greedy captions and beams of 3 per second against transformers' `generate`
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from aggregate import cone, exact
from gan_step import LENGTH, PAPER, SMALL, Case
from preprocess import settings, write_captions, write_images, write_weights
from torch import Tensor
from train_step import measure, measure_alone, result_of
from transformers import GPT2Config, GPT2LMHeadModel

from cgtgan.assets.backbone import open_backbone
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.images import dataset_split, image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.data.corpora import embedded_text
from cgtgan.data.image_files import open_image
from cgtgan.method.aggregation import aggregate_text_embeddings
from cgtgan.models.clip_inputs import by_length
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.mapper import MLPMapper
from cgtgan.runtime.versions import __version__

COCO_IMAGES, PAPER_STEPS = 113_287, 44_300  # 50 epochs of 128 images are 44,300 steps
Row = dict[str, Any]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """The shortest of some rounds, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def machine(device: torch.device) -> Row:
    """Card, driver and versions."""
    about: Row = {"torch": torch.__version__, "transformers": transformers.__version__, "cgtgan": __version__}
    if device.type != "cuda":
        return about | {"card": "none: CPU", "threads": torch.get_num_threads()}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    name = torch.cuda.get_device_name(device)
    return about | {"card": name, "memory_gb": memory, "driver": driver, "cuda": torch.version.cuda}


# ------------------------------------------------------------------------------------------------------------- encoding


def encoding(device: torch.device, small: bool) -> Iterator[Row]:
    model, images, captions = ("tiny", 24, 40) if small else ("ViT-L/14", 4096, 40_000)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_images(home / "drawn", 8 if small else 128, None)
        write_images(home / "photos", images, str(home / "drawn"))
        write_captions(home / "captions.txt", captions)
        if not small:
            write_weights(model, home / "clip.pt")
        for dtype in ("float32",) if small else ("float16", "bfloat16"):
            cfg = settings(home, model, str(device))
            cfg.clip_backbone.dtype = dtype
            cfg.clip_backbone.kind = "random" if small else "openai"
            yield from _encoded(Workspace(cfg), dtype)


def _encoded(ws: Workspace, dtype: str) -> Iterator[Row]:
    backbone, size = open_backbone(ws), ws.cfg.clip_backbone.image_batch_size
    paths, sentences = [image.path for image in dataset_split(ws, "train").images], corpus_sentences(ws)[0]
    batch = torch.stack([backbone.pixels(open_image(path)) for path in paths[:size]])
    rows = backbone.tokens([embedded_text(sentence) for sentence in sentences])
    batches = [[rows[same[0]] for same in places] for places in by_length(rows, ws.cfg.clip_backbone.text_batch_size)]
    count = 1 if len(paths) < 256 else 8

    def all_images() -> None:
        for _ in range(count):
            backbone.encode_images(batch)

    alone = count * len(batch) / seconds(all_images, ws.device)
    yield _against("images", dtype, len(paths), lambda: image_embeddings(ws, "train"), alone, ws.device)
    alone = len(rows) / seconds(lambda: [backbone.encode_tokens(ids) for ids in batches], ws.device, 1)
    yield _against("captions", dtype, len(rows), lambda: sentence_embeddings(ws), alone, ws.device)


def _against(what: str, dtype: str, rows: int, stage: Callable[[], object], alone: float, device: torch.device) -> Row:
    started = time.perf_counter()
    stage()
    wait(device)
    rate = rows / (time.perf_counter() - started)
    return {"what": what, "dtype": dtype, "per_second": rate, "encoder_alone": alone, "share_of_encoder": rate / alone}


# ---------------------------------------------------------------------------------------------------------- aggregation


def aggregation(device: torch.device, small: bool) -> Iterator[Row]:
    images, dim = (64, 32) if small else (4096, 768)
    queries = cone(images, dim, 1).to(device)
    for corpus in (1000, 3000) if small else (566_747, 3_000_000):
        texts = cone(corpus, dim, 2, device)
        truth = exact(queries[:16], texts, 100.0)
        for mode in ("highest", "high"):  # float32, TF32
            torch.set_float32_matmul_precision(mode)
            taken = seconds(lambda t=texts: aggregate_text_embeddings(queries, t, 100.0), device, 1)
            found = aggregate_text_embeddings(queries[:16], texts, 100.0)
            error = float((found.double() - truth).abs().max() / truth.abs().max())
            rate = 4e-12 * images * corpus * dim / taken
            limit = matrix_rate(torch.float32, device, 256 if small else 8192)
            yield {
                "corpus": corpus, "products": {"highest": "float32", "high": "TF32"}[mode], "tflop_per_second": rate,
                "matrix_tflop_per_second": limit, "share_of_matrix_rate": rate / limit, "error": error,
                "seconds_of_coco_images": taken * COCO_IMAGES / images,
            }  # fmt: skip
        torch.set_float32_matmul_precision("highest")
        half = matrix_rate(torch.bfloat16, device, 256 if small else 8192)
        products = [queries[:16].to(kind) @ texts[:1000].T.to(kind) for kind in (torch.bfloat16, torch.float64)]
        error = float((products[0].double() - products[1]).abs().max() / products[1].abs().max())
        yield {
            "corpus": corpus,
            "products": "bf16, similarities alone",
            "matrix_tflop_per_second": half,
            "error": error,
        }


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """TFLOP/s of a large square matrix product."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2e-12 * size**3 / seconds(lambda: a @ b, device, 5)


# ------------------------------------------------------------------------------------------------------------- GAN step


def _case(kind: str, images: int, device: torch.device, small: bool) -> Case:
    sizes, tokens = (SMALL, LENGTH) if small else (PAPER, 11)
    return Case(kind, images, 2 if small else 5, tokens, str(device), sizes)


def step(device: torch.device, small: bool) -> Iterator[Row]:
    for images in (2,) if small else (64, 128):
        base = 0.0
        for kind in ("published", "ours bf16") if small else ("published", "ours float32", "ours bf16"):
            case = _case(kind, images, device, small)
            # a process of its own measures the memory; a tiny step starts none, to be a test
            result = measure(case, 1) if small else result_of(measure_alone(case, 5))
            base = base or result["seconds"]
            hours = result["seconds"] * PAPER_STEPS / 3600
            speed = base / result["seconds"]
            yield {"images": images, "samples": case.samples, "step": kind, **result, "speed": speed, "hours": hours}


def together(device: torch.device, small: bool) -> Iterator[Row]:
    case, steps = _case("ours bf16", 2 if small else 64, device, small), 1 if small else 5
    for count in (1,) if small else (1, 2):
        results = [result_of(process) for process in [measure_alone(case, steps) for _ in range(count)]]
        slowest = max(result["seconds"] for result in results)
        yield {"processes": count, "seconds_per_step": slowest, "images_per_second": count * case.images / slowest}


# ------------------------------------------------------------------------------------------------------------- decoding


def decoding(device: torch.device, small: bool) -> Iterator[Row]:
    sizes, batch = (SMALL, 3) if small else (PAPER, 256)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=sizes.layers, n_embd=sizes.width, n_head=sizes.heads)
    model = CaptionGenerator(GPT2LMHeadModel(config), MLPMapper(sizes.width, sizes.width, 10), max_length=LENGTH)
    model.to(device).eval()
    x = torch.randn(batch, sizes.width, device=device)
    language_model: Any = model.gpt

    @torch.no_grad()
    def theirs(beams: int) -> Tensor:
        prefix = model.prefix(x)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=device)
        ids = {"eos_token_id": model.stop_token_id, "pad_token_id": model.end_token_id}
        how = {"do_sample": False, "max_new_tokens": LENGTH, "num_beams": beams, "early_stopping": False}
        return language_model.generate(inputs_embeds=prefix, attention_mask=mask, **how, **ids)

    for beams in (1, 3):
        ours = (lambda: model.greedy(x, log_probs=False)) if beams == 1 else (lambda: model.beam(x, 3))
        drawn, other = ours().drawn, theirs(beams)
        same = float((drawn[:, : other.shape[1]] == other).all(-1).float().mean())
        rounds = 1 if small else 3
        mine, generate = (batch / seconds(work, device, rounds) for work in (ours, lambda b=beams: theirs(b)))
        yield {
            "beams": beams, "batch": batch, "captions_per_second": mine, "generate": generate,
            "speed": mine / generate, "same_captions": same,
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ reporting

PARTS: dict[str, Callable[[torch.device, bool], Iterator[Row]]] = {
    "encoding": encoding, "aggregation": aggregation, "step": step, "together": together, "decoding": decoding,
}  # fmt: skip


def markdown(found: Row) -> str:
    lines = [", ".join(f"{name} {cell(value)}" for name, value in found["machine"].items()), ""]
    for name, rows in found["parts"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"**{name}** ({found['seconds'][name]:.0f} s)", ""]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name.removeprefix('time/')} {share:.0%}" for name, share in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("gpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    device = torch.device(args.device)
    found: Row = {"machine": machine(device), "small": args.small, "parts": {}, "seconds": {}}
    for name in args.only:
        started = time.perf_counter()
        found["parts"][name] = list(PARTS[name](device, args.small))
        found["seconds"][name] = time.perf_counter() - started
        args.output.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        args.output.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(markdown(found))


if __name__ == "__main__":
    main()
