"""What train_step.py and gpu.py measure: the parts of a GAN step at the paper's sizes, and the published step.

GPT-2 small, RoBERTa-base and the text tower of CLIP ViT-L/14 have random weights; `small` ones are tiny. Without the
tokenizers' files a vocabulary of the same size is made of the words that CLIP's tokenizer knows.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from cgtgan.assets.optimizer import Optimizer
from cgtgan.config import ClipBackboneConfig, Config, GeneratorConfig, OptimizerConfig
from cgtgan.data.corpora import embedded_text
from cgtgan.method.batches import sampling_seeds
from cgtgan.method.reinforce import semantic_weight
from cgtgan.models.attention import use_float32_attention
from cgtgan.models.clip_inputs import clip_module
from cgtgan.models.discriminator import Discriminator
from cgtgan.models.fixed_cache import GROWING
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.models.mapper import MLPMapper
from cgtgan.models.openai_clip import OpenAIBackbone
from cgtgan.models.tokenizers import END_OF_TEXT, ROBERTA_SPECIALS, TextTokenizer, load_tokenizer
from cgtgan.runtime.devices import Devices, keep_freed_memory, on_device, tokens_that_fit
from cgtgan.training.batches import Batch
from cgtgan.training.parts import TrainingParts

LENGTH = 20  # tokens of a caption


@dataclass(frozen=True)
class Sizes:
    """Of the generator, the discriminator and the text tower, which are equal in the paper's CLIP ViT-L/14."""

    layers: int = 12
    width: int = 768
    heads: int = 12


PAPER, SMALL = Sizes(), Sizes(layers=1, width=64, heads=2)


@cache
def made_tokenizer(names: tuple[str, ...], size: int) -> TextTokenizer:
    """Byte-level BPE of `size` tokens: `names`, all bytes in GPT-2's order ("." is token 13 there), and words."""
    lines = clip_module("simple_tokenizer").SimpleTokenizer().encoder
    words = [word.removesuffix("</w>") for word in lines if word.endswith("</w>")]
    alphabet = sorted(ByteLevel.alphabet(), key=lambda letter: (letter > "\u00ff", letter))
    first = [] if END_OF_TEXT in names else list(names)
    tokens, merges = dict.fromkeys([*first, *alphabet]), []
    for word in (w for w in words if w.isascii() and w.isalpha()):
        for end in range(len(word)):
            start, letter = f"\u0120{word[:end]}", word[end]
            if start + letter not in tokens and len(tokens) < size - 1:
                tokens[start + letter] = None
                merges.append(f"{start} {letter}")
    listed = [*tokens, *(name for name in names if name not in first)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(listed)}))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return load_tokenizer(folder, "--tokenizers", names)


def text_tower(sizes: Sizes, device: torch.device) -> OpenAIBackbone:
    """A CLIP whose text tower has these sizes; of the other tower, which a step does not use, only a crumb."""
    model = clip_module("model").CLIP(
        embed_dim=sizes.width, image_resolution=28, vision_layers=1, vision_width=64, vision_patch_size=14,
        context_length=77, vocab_size=49408, transformer_width=sizes.width, transformer_heads=sizes.heads,
        transformer_layers=sizes.layers,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "clip.pt")
        return OpenAIBackbone(ClipBackboneConfig(kind="openai", model=str(Path(folder) / "clip.pt")), device)


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


@dataclass(frozen=True)
class Case:
    """A step to measure. kind: published, ours float32 or ours bf16. tokens: of a caption; see train_step.py."""

    kind: str
    images: int = 16
    samples: int = 5
    tokens: int = LENGTH
    device: str = "cpu"
    sizes: Sizes = PAPER
    tokenizers: str | None = None  # a folder with gpt2/ and roberta/
    memory_gb: float | None = None
    cache: str = GROWING  # as decode.cache


def _tokenizer(case: Case, folder: str, names: tuple[str, ...], size: int) -> TextTokenizer:
    if case.tokenizers is None:
        return made_tokenizer(names, size)
    return load_tokenizer(str(Path(case.tokenizers) / folder), "--tokenizers", names)


def make(case: Case) -> tuple[Config, TrainingParts, Callable[[int], Batch]]:
    """Settings, parts and the batch of each step."""
    torch.manual_seed(0)
    if case.kind != "published" and case.device == "cpu":
        keep_freed_memory()  # as stage=train does
    device, (layers, width, heads) = torch.device(case.device), (case.sizes.layers, case.sizes.width, case.sizes.heads)
    words = _tokenizer(case, "gpt2", (END_OF_TEXT,), 50257)
    pieces = _tokenizer(case, "roberta", ROBERTA_SPECIALS, 50265)
    language_model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))
    generator = CaptionGenerator(language_model, MLPMapper(width, width, 10), max_length=LENGTH)
    generator.decode_cache = case.cache
    shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    vocabulary = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
    encoder = RobertaModel(RobertaConfig(**vocabulary, **shape, intermediate_size=4 * width))
    discriminator = Discriminator(encoder, pieces, LENGTH + 2)
    if case.tokens < LENGTH:
        make_stops_likely(generator, case.tokens, device)
    cfg = Config()
    cfg.train.num_samples, cfg.train.batch_size = case.samples, case.images
    cfg.reward_weights.delay_steps = 0
    if case.kind == "ours bf16" and case.device == "cpu":
        use_float32_attention(language_model, encoder)  # as stage=train does
    bundle = GeneratorBundle(generator.to(device), words, GeneratorConfig(), width)
    recipe = OptimizerConfig(lr=1e-6)  # the work is the same, and the captions stay what they are
    devices = Devices(device, "bf16" if case.kind.endswith("bf16") else "float32")
    parts = TrainingParts(
        *(bundle, None, discriminator.to(device), text_tower(case.sizes, device)),
        *(Optimizer(generator, recipe, 100), Optimizer(discriminator, recipe, 100), devices),
    )
    parts.g_chunk = tokens_that_fit(layers, width, 50257, case.memory_gb, device)
    parts.d_chunk = tokens_that_fit(layers, width, 0, case.memory_gb, device)
    corpus, count = sentences(4096), case.images * case.samples

    def batch(step: int) -> Batch:
        noise = torch.Generator().manual_seed(step)
        image, target = on_device(torch.randn(2, case.images, width, generator=noise), device)
        ids = list(range(case.images))
        seeds = sampling_seeds(0, step, ids, case.samples)
        real = [corpus[(step * count + i) % len(corpus)] for i in range(count)]
        return Batch(ids, image, target, seeds, real, case.images)

    return cfg, parts, batch


def make_stops_likely(generator: CaptionGenerator, tokens: int, device: torch.device) -> None:
    """Raise the stop token's logit: its chance behind any token is 1 / tokens. Captions then have a few less."""
    ending = 1 / tokens
    head: Any = generator.gpt.get_output_embeddings()
    raise_by = torch.zeros(50257, device=device)
    raise_by[13] = math.log(ending / (1 - ending) * 50257)
    head.register_forward_hook(lambda _module, _inputs, logits: logits + raise_by)


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
