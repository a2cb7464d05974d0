"""Everything that a GPU is to show, in one command; writes one JSON and one Markdown table.

Usage: python benchmarks/gpu.py [--device cuda] [--small] [--output gpu] [--minutes 8] [--only encoding ...]

Writes OUTPUT.json after each row, and OUTPUT.md. All weights and embeddings are random. `--small` runs the same code
in a tiny size: `--device cpu --small` is a test. No row is begun after `--minutes`; what is left out is listed. Parts:
  decoding     captions/s of greedy decoding, beams of 3 and a training step's samples with each `decode.cache`, against
               transformers' `generate`, and how long the first call takes, which compiles
  step         the GAN step at 64 x 5 and 128 x 5, ours in float32 and bf16, at 64 x 5 with each `decode.cache`, against
               the published step, transcribed: seconds, shares, peak memory, how often the host waits for the device,
               hours of 44,300 steps
  aggregation  COCO's 566,747 and 3 M sentences: TFLOP/s in float32 and TF32 against a large matrix product, errors
               against float64, and the seconds of all of COCO's 113,287 training images
  encoding     images/s and captions/s of preprocess, ViT-L/14, in float16 and bfloat16, against the encoder alone
  together     two processes with the bf16 step on one card, against one
The last lines name the fastest `decode.cache` of each kind of work.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

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
from cgtgan.method.batches import sampling_seeds
from cgtgan.models.clip_inputs import by_length
from cgtgan.models.fixed_cache import COMPILED, GROWING, STATIC
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.mapper import MLPMapper
from cgtgan.runtime.devices import Devices
from cgtgan.runtime.versions import __version__

COCO_IMAGES, PAPER_STEPS = 113_287, 44_300  # 50 epochs of 128 images are 44,300 steps
CACHES = (GROWING, STATIC, COMPILED)
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


def _case(kind: str, images: int, device: torch.device, small: bool, cache: str = CACHES[0]) -> Case:
    sizes, tokens = (SMALL, LENGTH) if small else (PAPER, 11)
    return Case(kind, images, 2 if small else 5, tokens, str(device), sizes, cache=cache)


def step(device: torch.device, small: bool) -> Iterator[Row]:
    for images in (2,) if small else (64, 128):
        base = 0.0
        kinds = [("published", CACHES[0]), ("ours float32", CACHES[0]), ("ours bf16", CACHES[0])]
        others = [("ours bf16", cache) for cache in CACHES[1:]] if images < 128 else []
        for kind, cache in [*(kinds[::2] if small else kinds), *others]:
            case = _case(kind, images, device, small, cache)
            how = {"images": images, "samples": case.samples, "step": kind, "cache": cache}
            try:  # a process of its own measures the memory; a tiny step starts none, to be a test
                result = measure(case, 1) if small else result_of(measure_alone(case, 5))
            except (Exception, SystemExit) as error:
                if cache != COMPILED:
                    raise
                yield how | failed(error)
                continue
            base = base or result["seconds"]
            hours = result["seconds"] * PAPER_STEPS / 3600
            yield how | result | {"speed": base / result["seconds"], "hours": hours}


def together(device: torch.device, small: bool) -> Iterator[Row]:
    case, steps = _case("ours bf16", 2 if small else 64, device, small), 1 if small else 5
    for count in (1,) if small else (1, 2):
        results = [result_of(process) for process in [measure_alone(case, steps) for _ in range(count)]]
        slowest = max(result["seconds"] for result in results)
        yield {"processes": count, "seconds_per_step": slowest, "images_per_second": count * case.images / slowest}


# ------------------------------------------------------------------------------------------------------------- decoding


def decoding(device: torch.device, small: bool) -> Iterator[Row]:
    sizes, batch, step_images, samples = (SMALL, 3, 2, 2) if small else (PAPER, 256, 64, 5)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=sizes.layers, n_embd=sizes.width, n_head=sizes.heads)
    model = CaptionGenerator(GPT2LMHeadModel(config), MLPMapper(sizes.width, sizes.width, 10), max_length=LENGTH)
    model.to(device).eval()
    x = torch.randn(batch, sizes.width, device=device)
    seeds = sampling_seeds(0, 1, range(step_images), samples)
    works: dict[str, Callable[[CaptionGenerator], Tensor]] = {
        "greedy": lambda own: own.greedy(x, log_probs=False).drawn,
        "beams of 3": lambda own: own.beam(x, 3).drawn,
        "samples of a step": lambda own: torch.cat(
            [part.drawn.flatten(0, -2) for part in own.sample_and_greedy(x[:step_images], seeds, log_probs=False)]
        ),
    }
    # bf16 is what a GPU decodes in; with random weights it rounds tokens into others, so float32 compares captions
    for precision in ("float32",) if small else ("bf16", "float32"):
        caches = CACHES if small or precision == "bf16" else CACHES[:2]  # each compilation takes a while
        for what, work in works.items():
            ways: dict[str, Callable[[CaptionGenerator], Tensor]] = dict.fromkeys(caches, work)
            if what in ("greedy", "beams of 3"):
                ways["generate"] = partial(generated, x=x, beams=1 if what == "greedy" else 3)
            for row in decoded(model, ways, Devices(device, precision), 1 if small else 3):
                yield {"what": what, "precision": precision} | row


@torch.no_grad()
def generated(model: CaptionGenerator, x: Tensor, beams: int) -> Tensor:
    """Captions by transformers' `generate`."""
    prefix, language_model = model.prefix(x), cast(Any, model.gpt)
    mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=x.device)
    ids = {"eos_token_id": model.stop_token_id, "pad_token_id": model.end_token_id}
    how = {"do_sample": False, "max_new_tokens": LENGTH, "num_beams": beams, "early_stopping": False}
    drawn = language_model.generate(inputs_embeds=prefix, attention_mask=mask, **how, **ids)
    return torch.nn.functional.pad(drawn, (0, LENGTH - drawn.shape[1]), value=model.end_token_id)


def decoded(
    model: CaptionGenerator, ways: dict[str, Callable[[CaptionGenerator], Tensor]], devices: Devices, rounds: int
) -> Iterator[Row]:
    """Captions per second of each way, and against the first one. first_seconds: of the first call, which compiles."""

    def call(own: CaptionGenerator, work: Callable[[CaptionGenerator], Tensor]) -> Tensor:
        with devices.autocast():
            return work(own)

    base, expected = 0.0, torch.empty(0)
    for way, work in ways.items():
        own = copy.deepcopy(model)  # without the buffers of another size
        own.decode_cache = way if way in CACHES else CACHES[0]
        started = time.perf_counter()
        try:
            drawn = call(own, work)
            wait(devices.device)
            first = time.perf_counter() - started
            rate = len(drawn) / seconds(partial(call, own, work), devices.device, rounds)
        except Exception as error:
            if way != COMPILED:
                raise
            yield {"cache": way} | failed(error)  # a card is lent for minutes: the other rows go on
            continue
        base, expected = (base, expected) if base else (rate, drawn)
        same = float((drawn == expected).all(-1).float().mean())
        yield {
            "cache": way, "captions_per_second": rate, "speed": rate / base, "first_seconds": first,
            "same_captions": same,
        }  # fmt: skip


def failed(error: BaseException) -> Row:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return {"failed": lines[-1][:300].replace("|", "/")}


# ------------------------------------------------------------------------------------------------------------ reporting

PARTS: dict[str, Callable[[torch.device, bool], Iterator[Row]]] = {
    "decoding": decoding, "step": step, "aggregation": aggregation, "encoding": encoding, "together": together,
}  # fmt: skip


def fastest_caches(parts: dict[str, list[Row]]) -> list[str]:
    """One line per kind of work: the fastest `decode.cache`, against the growing one."""
    rates: dict[str, dict[str, float]] = {}
    for row in parts.get("decoding", []):
        if row["cache"] in CACHES and "failed" not in row:
            rates.setdefault(f"{row['what']}, {row['precision']}", {})[row["cache"]] = row["captions_per_second"]
    for row in parts.get("step", []):
        if row["step"] == "ours bf16" and "failed" not in row:
            what = f"step of {row['images']} x {row['samples']}, bf16"
            rates.setdefault(what, {})[row["cache"]] = 1 / row["seconds"]
    lines = []
    for what, of in rates.items():
        best = max(of, key=lambda cache, of=of: of[cache])
        if len(of) > 1:
            lines.append(f"{what}: decode.cache={best}, {of[best] / of[CACHES[0]]:.2f} times {CACHES[0]}")
    return lines


def markdown(found: Row) -> str:
    lines = [", ".join(f"{name} {cell(value)}" for name, value in found["machine"].items()), ""]
    for name, rows in found["parts"].items():
        if not rows:
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"**{name}** ({found['seconds'][name]:.0f} s)", ""]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |" for row in rows]
        lines.append("")
    lines += [*found["fastest"], ""]
    if found["left_out"]:
        lines += [f"left out, beyond the time: {', '.join(found['left_out'])}", ""]
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
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    device, end = torch.device(args.device), time.monotonic() + 60 * args.minutes
    found: Row = {"machine": machine(device), "small": args.small, "parts": {}, "seconds": {}, "left_out": []}
    for name in args.only:
        started, rows = time.perf_counter(), PARTS[name](device, args.small)
        found["parts"][name], row = [], {}
        while time.monotonic() < end and (row := next(rows, None)) is not None:
            found["parts"][name].append(row)
            found["seconds"][name] = time.perf_counter() - started
            write(found, args.output)
        if row is not None:
            found["left_out"].append(f"the rest of {name}" if found["parts"][name] else name)
        del rows  # and what it has on the device
        if device.type == "cuda":
            torch.cuda.empty_cache()
    write(found, args.output)
    print(markdown(found))


def write(found: Row, output: Path) -> None:
    found["fastest"] = fastest_caches(found["parts"])
    output.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    output.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
