"""One GAN step at the paper's sizes: ours and a transcription of the published step, each in its own process.

Usage: python benchmarks/train_step.py --tokenizers FOLDER [--images 16] [--samples 5] [--tokens 20]
                                       [--precision float32 bf16] [--device cpu] [--steps 3]

FOLDER has gpt2/ and roberta/, each with vocab.json and merges.txt. GPT-2 small, RoBERTa-base and the text tower of CLIP
ViT-L/14 have random weights; corpus sentences have 8 to 15 words. `--tokens 20`: no caption ends before its last
position, as with random weights. With another number the stop token is made so likely that captions have about that
many tokens on average (a trained generator's have near 11).

For each: seconds per step (median of --steps after one that is not counted), the share of each part, and the peak of
resident memory (GPU memory on a GPU) of the whole process with its models, gradients and optimiser states. Then ours
against the floor: the matrix products of our step, counted by torch, at the rate that this machine reaches in a large
matrix product of the same kind.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from cgtgan.assets.optimizer import Optimizer
from cgtgan.config import ClipBackboneConfig, Config, GeneratorConfig, OptimizerConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.method.batches import sampling_seeds
from cgtgan.method.reinforce import semantic_weight
from cgtgan.models.attention import use_float32_attention
from cgtgan.models.clip_inputs import clip_module
from cgtgan.models.discriminator import Discriminator
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.models.mapper import MLPMapper
from cgtgan.models.openai_clip import OpenAIBackbone
from cgtgan.models.tokenizers import END_OF_TEXT, ROBERTA_SPECIALS, load_tokenizer
from cgtgan.runtime.devices import Devices, keep_freed_memory, tokens_that_fit
from cgtgan.stages.train import gan_step
from cgtgan.training.batches import Batch
from cgtgan.training.parts import TrainingParts

LENGTH, DIM = 20, 768


class TextTower(OpenAIBackbone):
    """The text tower of CLIP ViT-L/14; of the other tower, which a step does not use, only a crumb."""

    @staticmethod
    def _random(build: Any) -> Any:
        return build.CLIP(
            embed_dim=DIM, image_resolution=28, vision_layers=1, vision_width=64, vision_patch_size=14,
            context_length=77, vocab_size=49408, transformer_width=768, transformer_heads=12, transformer_layers=12,
        )  # fmt: skip


def sentences(count: int) -> list[str]:
    """Captions as corpora have them, by a handful of words."""
    rng = random.Random(0)
    who, does = (
        ["A man", "Two women", "A small dog", "A group of people"],
        ["riding", "looking at", "standing next to", "holding"],
    )
    what, where = (
        ["a brown horse", "a red bus", "some fruit", "a surfboard"],
        ["in the street", "on the beach near a pier", "at night", ""],
    )
    made = [[rng.choice(part) for part in (who, ["in a park", "in white"], does, what, where)] for _ in range(count)]
    return [" ".join(" ".join(parts).split()) + "." for parts in made]


def make(args: argparse.Namespace) -> tuple[Config, TrainingParts, Callable[[int], Batch]]:
    torch.manual_seed(0)
    if args.one != "published" and args.device == "cpu":
        keep_freed_memory()  # as stage=train does
    device = torch.device(args.device)
    words = load_tokenizer(str(Path(args.tokenizers) / "gpt2"), "--tokenizers", [END_OF_TEXT])
    pieces = load_tokenizer(str(Path(args.tokenizers) / "roberta"), "--tokenizers", ROBERTA_SPECIALS)
    generator = CaptionGenerator(GPT2LMHeadModel(GPT2Config()), MLPMapper(DIM, 768, 10), max_length=LENGTH)
    encoder = RobertaModel(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1)
    )
    discriminator = Discriminator(encoder, pieces, LENGTH + 2)
    backbone = TextTower(ClipBackboneConfig(kind="random"), device)
    if args.tokens < LENGTH:
        ending = (
            1 / args.tokens
        )  # chance that a token is the stop, given those before: their mean number is then a little below `tokens`
        head: Any = generator.gpt.get_output_embeddings()
        raise_by = torch.zeros(50257, device=device)
        raise_by[13] = math.log(ending / (1 - ending) * 50257)
        head.register_forward_hook(lambda _module, _inputs, logits: logits + raise_by)
    cfg = Config()
    cfg.train.num_samples, cfg.train.batch_size = args.samples, args.images
    cfg.reward_weights.delay_steps = 0
    if args.one == "ours bf16" and args.device == "cpu":
        use_float32_attention(generator.gpt, encoder)  # as stage=train does
    bundle = GeneratorBundle(generator.to(device), words, GeneratorConfig(), DIM)
    recipe = OptimizerConfig(lr=1e-6)  # the work is the same, and the captions stay what they are
    devices = Devices(device, "bf16" if args.one.endswith("bf16") else "float32")
    parts = TrainingParts(
        *(bundle, None, discriminator.to(device), backbone),
        *(Optimizer(generator, recipe, 100), Optimizer(discriminator, recipe, 100), devices),
    )
    parts.g_chunk = tokens_that_fit(12, 768, 50257, args.memory_gb, device)
    parts.d_chunk = tokens_that_fit(12, 768, 0, args.memory_gb, device)
    corpus = sentences(4096)

    def batch(step: int) -> Batch:
        noise = torch.Generator().manual_seed(step)
        image, target = torch.randn(2, args.images, DIM, generator=noise).to(device)
        ids = list(range(args.images))
        seeds = sampling_seeds(0, step, ids, args.samples)
        real = corpus[step * args.images * args.samples :][: args.images * args.samples]
        return Batch(ids, image, target, seeds, real, args.images)

    return cfg, parts, batch


# ------------------------------------------------------------------------------------------------- the published step


class Published:
    """The step as METHOD describes the released program, with dropout off as in ours.

    A cached loop that keeps its graph, a second loop for the greedy captions, one tokeniser call per caption, texts of
    77 tokens for CLIP, D over samples once to learn and once to score.
    """

    def __init__(self, cfg: Config, parts: TrainingParts):
        self.cfg, self.p = cfg, parts
        self.weights = cfg.reward_weights

    def draw(self, image: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
        """Ids (R, 20) and mean log-probs (R,) of R images. The batch keeps all rows until all captions have ended."""
        g = self.p.bundle.model
        read, cache = g.prefix(image), DynamicCache(config=g.gpt.config)
        ids, log_probs, alive = [], [], torch.ones(len(image), device=image.device)
        count = torch.zeros(len(image), device=image.device)
        for _ in range(LENGTH):
            out = g.gpt(inputs_embeds=read, past_key_values=cache, use_cache=True)
            scores = torch.log_softmax(out.logits[:, -1].float(), dim=-1)
            token = scores.argmax(-1) if greedy else torch.multinomial(scores.detach().exp(), 1)[:, 0]
            log_probs.append(scores.gather(1, token[:, None])[:, 0] * alive)
            ids.append(torch.where(alive.bool(), token, g.end_token_id))
            count = count + alive
            alive = alive * (token != g.stop_token_id)
            if not bool(alive.any()):
                break
            read = g.gpt.get_input_embeddings()(token[:, None])
        return torch.stack(ids, dim=1), torch.stack(log_probs, dim=1).sum(1) / count

    def texts(self, ids: Tensor) -> list[str]:
        return [self.p.bundle.tokenizer.decode([row])[0] for row in ids.tolist()]

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        d = self.p.discriminator
        assert d is not None
        rows = [d.tokenize([text])[0][0] for text in texts]
        out = torch.full((len(rows), LENGTH + 2), d.pad, dtype=torch.long, device=self.p.devices.device)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out, (out != d.pad).long()

    def embed(self, texts: list[str]) -> Tensor:
        rows = [self.p.backbone.tokens([embedded_text(text)])[0] for text in texts]
        padded = torch.zeros(len(rows), 77, dtype=torch.long, device=self.p.devices.device)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row)
        with torch.no_grad():
            tower: Any = self.p.backbone
            return tower.model.encode_text(padded)

    def step(self, number: int, batch: Batch) -> dict[str, float]:
        p, k = self.p, self.cfg.train.num_samples
        d = p.discriminator
        assert d is not None
        assert p.d_optimizer is not None
        with torch.no_grad():
            greedy, _ = self.draw(batch.image, greedy=True)
        sampled, log_probs = self.draw(batch.image.repeat_interleave(k, dim=0), greedy=False)
        samples, greedies = self.texts(sampled), self.texts(greedy)
        with torch.no_grad():
            natural = torch.cat([d(*self.tokens(samples)), d(*self.tokens(greedies))])
        labels = torch.cat([torch.ones(len(batch.real)), torch.zeros(len(samples))]).to(natural.device)
        logits = torch.cat([d(*self.tokens(batch.real)), d(*self.tokens(samples))])
        d_loss = F.binary_cross_entropy_with_logits(logits, labels)
        owner = torch.cat([torch.arange(len(batch.ids)).repeat_interleave(k), torch.arange(len(batch.ids))]).to(
            natural.device
        )
        text = torch.cat([self.embed(samples), self.embed(greedies)])
        agg, scale = batch.target[owner], 100.0
        cos = (F.normalize(agg, dim=-1) @ F.normalize(text, dim=-1).T).diag() * scale
        reward = 0.5 * cos + 0.5 * scale * (1 - (agg - text).abs().mean(-1))
        w = semantic_weight(number, max_weight=0.5, delay_steps=0, ramp_steps=self.weights.ramp_steps)
        losses = []
        for r in (reward, natural):
            advantage = r[: len(samples)].view(-1, k) - r[len(samples) :, None]
            losses.append(-(advantage.flatten() * log_probs).mean())
        p.d_optimizer.step(d_loss, number)
        p.g_optimizer.step(w * losses[0] + (1 - w) * losses[1], number)
        return {}


# ------------------------------------------------------------------------------------------------------------ measuring


def peak_gb(device: str) -> float:
    return (
        torch.cuda.max_memory_allocated() / 1e9
        if device != "cpu"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    )


def rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a large matrix product of a step's own shape."""
    a, b = torch.randn(1760, 768, device=device, dtype=dtype), torch.randn(768, 3072, device=device, dtype=dtype)
    best = math.inf
    for _ in range(30):
        started = time.perf_counter()
        _ = a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * 1760 * 768 * 3072 / best


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs in a process of its own: one kind of step."""
    cfg, parts, batch = make(args)
    published = Published(cfg, parts)
    seconds, rows = [], []
    for number in range(1, args.steps + 2):
        part = batch(number)
        started = time.perf_counter()
        row = published.step(number, part) if args.one == "published" else gan_step(cfg, parts, number, part)
        if args.device != "cpu":
            torch.cuda.synchronize()
        if number > 1:
            seconds.append(time.perf_counter() - started)
            rows.append(row)
    found: dict[str, Any] = {"seconds": statistics.median(seconds), "peak_gb": peak_gb(args.device)}
    if args.one != "published":
        found["parts"] = {key: statistics.mean(r[key] for r in rows) for key in rows[0] if key.startswith("time/")}
        found["tokens"] = statistics.mean(r["train/caption_tokens"] for r in rows)
        counter = FlopCounterMode(display=False)
        with counter:
            gan_step(cfg, parts, args.steps + 2, batch(args.steps + 2))
        dtype = torch.bfloat16 if args.one.endswith("bf16") else torch.float32
        found["floor"] = counter.get_total_flops() / rate(dtype, args.device)
        found["tflop"] = counter.get_total_flops() / 1e12
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", required=True)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=LENGTH)
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--memory-gb", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # measure this kind here
    args = parser.parse_args()
    clip_module("model")
    if args.one:
        print(json.dumps(measure(args)))
        return
    kinds = ["published", *(f"ours {p}" for p in args.precision)]
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        command = [sys.executable, *sys.argv, "--one", kind]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        )
        if done.returncode:
            sys.exit(done.stderr)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
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
