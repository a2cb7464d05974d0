"""Greedy captions per second: ours and transformers' `generate`, same model, same tokens, in one run.

Usage: python benchmarks/decode.py [--batches 1 8 64 256] [--tokens 11] [--rounds 3] [--device cpu]

GPT-2 small with random weights and ten prefix tokens, at most 20 tokens. Random weights never stop. So both decoders
take the stop token wherever the last state lies far enough along one direction, which changes with the position:
captions end in different places, after --tokens tokens on average.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as run.py sets them

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.mapper import MLPMapper

LENGTH, DIM = 20, 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--tokens", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = (
        CaptionGenerator(GPT2LMHeadModel(GPT2Config()), MLPMapper(DIM, 768, 10), max_length=LENGTH)
        .to(args.device)
        .eval()
    )
    head: Any = model.gpt.get_output_embeddings()
    direction = F.normalize(torch.randn(768), dim=0).to(args.device)
    with (
        torch.no_grad()
    ):  # as in a trained model, the stop grows likelier with the position, and differs from caption to caption
        places: Any = model.gpt.get_parameter("transformer.wpe.weight")
        places += torch.arange(1024, device=args.device)[:, None] * 0.02 * direction
    limit = math.inf

    def stops(_module: object, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        """The stop wins where the state lies further along one direction of its space than `limit`."""
        logits[..., 13] = torch.where(inputs[0].float() @ direction > limit, logits.amax(-1) + 1, logits[..., 13])
        return logits

    head.register_forward_hook(stops)

    some, low, high = torch.randn(48, DIM, device=args.device), 0.0, 30.0
    for _ in range(9):  # the limit that gives captions of --tokens tokens
        limit = (low + high) / 2
        short = float(model.up_to_stop(model.greedy(some, log_probs=False).drawn).sum(-1).float().mean()) < args.tokens
        low, high = (limit, high) if short else (low, limit)

    def ours(x: Tensor) -> Tensor:
        return model.greedy(x, log_probs=False).drawn

    @torch.no_grad()
    def theirs(x: Tensor) -> Tensor:
        language_model: Any = model.gpt
        prefix = model.prefix(x)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=x.device)
        ids = {"eos_token_id": 13, "pad_token_id": 50256}
        return language_model.generate(
            inputs_embeds=prefix, attention_mask=mask, do_sample=False, max_new_tokens=LENGTH, **ids
        )

    def seconds(work: Callable[[Tensor], Tensor], x: Tensor) -> float:
        if args.device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work(x)
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    table = Table(title=f"greedy captions a second, {args.device}, {torch.get_num_threads()} threads")
    for column in ("batch", "ours", "generate", "ratio", "tokens a caption", "same captions"):
        table.add_column(column, justify="right")
    for size in args.batches:
        x = torch.randn(size, DIM, device=args.device)
        mine, other = ours(x), theirs(x)
        same = bool(torch.equal(mine[:, : other.shape[1]], other))
        lengths = model.up_to_stop(mine).sum(-1).float().mean()
        repeats = max(1, 16 // size)
        pairs = [[seconds(work, x) for work in (ours, theirs)] for _ in range(args.rounds * repeats)]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        table.add_row(
            str(size), f"{size / a:.1f}", f"{size / b:.1f}", f"{b / a:.2f}", f"{lengths:.1f}", "yes" if same else "NO"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
