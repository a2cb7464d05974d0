"""The caption generator: a causal language model that reads a CLIP embedding as a prefix of vectors, then its own tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from cgtgan.config import GeneratorConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.mapper import MLPMapper, TransformerMapper
from cgtgan.models.tokenizers import END_OF_TEXT, TextTokenizer, load_tokenizer, train_tokenizer

SCRATCH_POSITIONS = 64  # tokens of text that a language model made from scratch can read


class Captions(NamedTuple):
    """Decoded captions; leading shape S is (B,) or (B, K).

    token_ids S+(L,) int64: what is printed: a sentence still open at the last position ends in the stop token there, and after the
    stop token stands the end-of-text id. drawn S+(L,) int64: the same before that replacement, for `log_probs`.
    log_probs S float32: mean log-prob of the drawn tokens up to and including the stop token.
    """

    token_ids: Tensor
    drawn: Tensor
    log_probs: Tensor


class CaptionGenerator(nn.Module):
    """`gpt` reads the prefix that `clip_project` makes of a CLIP embedding (attribute names are those of the released checkpoints)."""

    def __init__(
        self,
        language_model: PreTrainedModel,
        mapper: nn.Module,
        *,
        stop_token_id: int = 13,
        end_token_id: int = 50256,
        max_length: int = 20,
        normalize_prefix: bool = False,
    ):
        super().__init__()
        self.gpt = language_model
        self.clip_project = mapper
        self.stop_token_id, self.end_token_id = stop_token_id, end_token_id
        self.max_length = max_length
        self.normalize_prefix = normalize_prefix

    def prefix(self, prefix_embedding: Tensor) -> Tensor:
        """(B, D) of any float dtype -> (B, P, E) in the model's own"""
        x = prefix_embedding.to(next(self.clip_project.parameters()).dtype)
        return self.clip_project(F.normalize(x, dim=-1) if self.normalize_prefix else x)

    # ---------------------------------------------------------------------------------------------- teacher-forced passes

    def token_logits(self, prefix: Tensor, token_ids: Tensor) -> Tensor:
        """(R, P, E), (R, L) -> (R, L, V): logits of each token given the prefix and the tokens before it"""
        words = self.gpt.get_input_embeddings()(token_ids[:, :-1])
        states = self.gpt(inputs_embeds=torch.cat([prefix, words], dim=1), use_cache=False, logits_to_keep=token_ids.shape[1]).logits
        return states[:, -token_ids.shape[1] :]

    def token_log_probs(self, prefix_embedding: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(B, D), (B, K, L) -> log-probs (B, K, L) float32 and their mask (B, K, L): true up to and including the stop token.

        Outside the mask the log-probs are 0. The pass is as long as the longest caption, not as L.
        """
        batch, samples, _ = token_ids.shape
        mask = self._up_to_stop(token_ids)
        longest = int(mask.any(dim=(0, 1)).sum())
        rows = token_ids[..., :longest].flatten(0, 1)
        prefix = self.prefix(prefix_embedding).repeat_interleave(samples, dim=0)
        logits = self.token_logits(prefix, rows).float() / temperature
        flat = -F.cross_entropy(logits.flatten(0, 1), rows.flatten(), reduction="none")
        log_probs = F.pad(flat.view(batch, samples, longest), (0, token_ids.shape[2] - longest))
        return log_probs * mask, mask

    def log_probs(self, prefix_embedding: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        """(B, D), (B, K, L) -> (B, K) float32: mean log-prob of the tokens up to and including the stop token (METHOD: Generator).

        Give the tokens *drawn* (`Captions.drawn`): a forced stop keeps the drawn token's log-prob (METHOD, slip 6).
        """
        log_probs, mask = self.token_log_probs(prefix_embedding, token_ids, temperature=temperature)
        return log_probs.sum(-1) / mask.sum(-1)

    def reconstruction_loss(self, prefix_embedding: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of (B, L) tokens, averaged over those where `mask` (B, L) is true (METHOD: Initialisation). A scalar."""
        logits = self.token_logits(self.prefix(prefix_embedding), token_ids).float()
        return F.cross_entropy(logits[mask], token_ids[mask])

    def _up_to_stop(self, token_ids: Tensor) -> Tensor:
        stopped = token_ids == self.stop_token_id
        return stopped.cumsum(-1) - stopped.long() == 0

    # ------------------------------------------------------------------------------------------------------------ decoding

    @torch.no_grad()
    def greedy(self, prefix_embedding: Tensor, max_length: int | None = None) -> Captions:
        """(B, D) -> captions with leading shape (B,)"""
        return self._flat(self._decode(prefix_embedding, 1, lambda _position, logits, _rows: logits.argmax(-1), max_length, 1.0))

    @torch.no_grad()
    def sample(
        self,
        prefix_embedding: Tensor,
        num_samples: int,
        *,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        max_length: int | None = None,
    ) -> Captions:
        """Draw K captions an image from the model's own distribution: no top-k, no top-p. Leading shape (B, K).

        Drawn by inverse CDF from `uniforms` (B, K, L) in [0, 1), made from `generator` when not given: the same numbers draw the same
        captions, whatever the batch.
        """
        uniforms = self._uniforms(prefix_embedding, num_samples, uniforms, generator, max_length)
        return self._decode(prefix_embedding, num_samples, _inverse_cdf(uniforms, temperature), max_length, temperature)

    @torch.no_grad()
    def sample_and_greedy(self, prefix_embedding: Tensor, uniforms: Tensor) -> tuple[Captions, Captions]:
        """Samples (B, K) and the greedy captions (B,) in one decode that shares the prefix and the cache."""
        batch, samples, length = uniforms.shape
        draw = _inverse_cdf(torch.cat([uniforms, uniforms.new_zeros(batch, 1, length)], dim=1), 1.0)

        def choose(position: int, logits: Tensor, rows: Tensor) -> Tensor:
            return torch.where(rows % (samples + 1) == samples, logits.argmax(-1), draw(position, logits, rows))

        both = self._decode(prefix_embedding, samples + 1, choose, length, 1.0)
        return Captions(*(x[:, :samples] for x in both)), Captions(*(x[:, samples] for x in both))

    def _uniforms(
        self, embedding: Tensor, samples: int, given: Tensor | None, generator: torch.Generator | None, length: int | None
    ) -> Tensor:
        shape = (len(embedding), samples, length or self.max_length)
        if given is None:
            where = generator.device if generator is not None else embedding.device
            return torch.rand(shape, generator=generator, device=where).to(embedding.device)
        if given.shape != shape:
            raise ValueError(f"uniforms {tuple(given.shape)} must be {shape}")
        return given.to(embedding.device)

    def _decode(
        self,
        prefix_embedding: Tensor,
        copies: int,
        choose: Callable[[int, Tensor, Tensor], Tensor],
        max_length: int | None,
        temperature: float,
    ) -> Captions:
        """The cached loop: the prefix is read once an image, its cache copied `copies` times; finished rows leave the batch."""
        length = max_length or self.max_length
        batch, device = len(prefix_embedding), prefix_embedding.device
        drawn = torch.full((batch * copies, length), self.end_token_id, dtype=torch.long, device=device)
        summed = torch.zeros(batch * copies, device=device)
        if batch == 0:
            return Captions(*(x.view(0, copies, *x.shape[1:]) for x in (drawn, drawn, summed)))
        cache = DynamicCache(config=self.gpt.config)
        out = self.gpt(inputs_embeds=self.prefix(prefix_embedding), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1].float().repeat_interleave(copies, dim=0)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        rows = torch.arange(batch * copies, device=device)  # which caption each row of the cache belongs to
        open_rows = torch.ones(batch * copies, dtype=torch.bool, device=device)
        for position in range(length):
            tokens = choose(position, logits, rows)
            live = open_rows[rows]
            drawn[rows[live], position] = tokens[live]
            log_probs = torch.log_softmax(logits / temperature, dim=-1).gather(1, tokens[:, None])[:, 0]
            summed[rows[live]] += log_probs[live]
            open_rows[rows] &= tokens != self.stop_token_id
            live = open_rows[rows]
            remaining = int(live.sum())
            if remaining == 0 or position == length - 1:
                break
            if remaining < 0.8 * len(rows):  # copying the cache pays only when enough rows have finished
                kept = live.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, tokens = rows[kept], tokens[kept]
            logits = self.gpt(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1].float()
        token_ids = drawn.clone()
        token_ids[open_rows, -1] = self.stop_token_id
        means = summed / self._up_to_stop(drawn).sum(-1)
        return Captions(*(x.view(batch, copies, *x.shape[1:]) for x in (token_ids, drawn, means)))

    @staticmethod
    def _flat(captions: Captions) -> Captions:
        return Captions(*(x[:, 0] for x in captions))

    @torch.no_grad()
    def beam(self, prefix_embedding: Tensor, beam_size: int, *, length_penalty: float = 1.0, max_length: int | None = None) -> Captions:
        """Beam search; a finished caption of n tokens is ranked by its summed log-prob / n**length_penalty. Leading shape (B,)."""
        length, batch, beams = max_length or self.max_length, len(prefix_embedding), beam_size
        device, vocab = prefix_embedding.device, int(self.gpt.config.vocab_size)
        beams = min(beams, vocab - 1)
        cache = DynamicCache(config=self.gpt.config)
        out = self.gpt(inputs_embeds=self.prefix(prefix_embedding), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1].float().repeat_interleave(beams, dim=0)
        cache.batch_repeat_interleave(beams)
        running = torch.full((batch, beams, length), self.end_token_id, dtype=torch.long, device=device)
        scores = torch.full((batch, beams), -torch.inf, device=device)
        scores[:, 0] = 0  # all beams are the same before the first token
        finished = running.clone()
        finished_scores = torch.full((batch, beams), -torch.inf, device=device)
        unsettled = torch.ones(batch, 1, dtype=torch.bool, device=device)
        for position in range(length):
            totals = (scores[..., None] + torch.log_softmax(logits, dim=-1).view(batch, beams, vocab)).flatten(1)
            top, index = totals.topk(2 * beams, dim=1)  # at most `beams` of them stop, so as many go on
            parent, token = index // vocab, index % vocab
            candidates = running.gather(1, parent[..., None].expand(-1, -1, length))
            candidates[..., position] = token
            stops = (token == self.stop_token_id) | (position == length - 1)
            ranked = top / (position + 1) ** length_penalty
            enters = stops & unsettled & (torch.arange(2 * beams, device=device) < beams)
            pool = torch.cat([finished_scores, ranked.masked_fill(~enters, -torch.inf)], dim=1)
            finished_scores, kept = pool.topk(beams, dim=1)
            finished = torch.cat([finished, candidates], dim=1).gather(1, kept[..., None].expand(-1, -1, length))
            if position == length - 1:
                break
            scores, kept = top.masked_fill(token == self.stop_token_id, -torch.inf).topk(beams, dim=1)
            running = candidates.gather(1, kept[..., None].expand(-1, -1, length))
            # log-probs only fall: an image whose worst finished caption beats its best open one, at its present length, is settled
            unsettled &= (scores[:, :1] / (position + 1) ** length_penalty) > finished_scores[:, -1:]
            if not bool(unsettled.any()):
                break
            rows = (torch.arange(batch, device=device)[:, None] * beams + parent.gather(1, kept)).flatten()
            cache.batch_select_indices(rows)
            logits = self.gpt(input_ids=running[..., position].reshape(-1, 1), past_key_values=cache, use_cache=True).logits[:, -1].float()
        drawn = finished[:, 0]
        mask = self._up_to_stop(drawn)
        token_ids = drawn.clone()
        token_ids[mask.all(-1), -1] = self.stop_token_id
        lengths = mask.sum(-1)
        return Captions(token_ids, drawn, finished_scores[:, 0] * lengths.float() ** (length_penalty - 1))


def _inverse_cdf(uniforms_BKL: Tensor, temperature: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Draw token i where the cumulative probability first exceeds u: one cumsum and one search, several times faster than multinomial."""
    flat = uniforms_BKL.flatten(0, 1)

    def choose(position: int, logits: Tensor, rows: Tensor) -> Tensor:
        cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(-1)
        target = flat[rows, position, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)

    return choose


# ------------------------------------------------------------------------------------------- making, saving, loading


@dataclass
class GeneratorBundle:
    """A generator with what it takes to use it anywhere: its tokenizer, its config and the CLIP dimension it reads."""

    model: CaptionGenerator
    tokenizer: TextTokenizer
    config: GeneratorConfig
    clip_dim: int

    def texts(self, token_ids: Tensor) -> list[str]:
        """(..., L) -> one caption a row, flattened in order"""
        return self.tokenizer.decode(token_ids.reshape(-1, token_ids.shape[-1]).tolist())

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and config into `folder` (not atomic by itself)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "generator.safetensors"))
        (folder / "tokenizer.json").write_text(self.tokenizer.to_json(), encoding="utf-8")
        language_model = self.model.gpt.config.to_dict()
        description = {"config": vars(self.config), "clip_dim": self.clip_dim, "language_model": language_model}
        (folder / "generator.json").write_text(json.dumps(description, indent=1, default=str), encoding="utf-8")


def load_generator(folder: Path) -> GeneratorBundle:
    """Load what `GeneratorBundle.save` wrote. Raises `MissingFileError` or `InputError` naming the file."""
    for name in ("generator.json", "generator.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder / name} is missing: {folder} is no whole checkpoint of a generator")
    try:
        description = json.loads((folder / "generator.json").read_text(encoding="utf-8"))
        config = GeneratorConfig(**description["config"])
        tokenizer = TextTokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        kind = dict(description["language_model"])
        model_config = AutoConfig.for_model(kind.pop("model_type"), **kind)
        model = assemble(AutoModelForCausalLM.from_config(model_config), config, tokenizer, description["clip_dim"])
        load_model(model, str(folder / "generator.safetensors"))
    except Exception as e:  # every way in which foreign bytes can fail to be a checkpoint
        raise InputError(
            f"{folder} cannot be read as a generator's checkpoint ({type(e).__name__}: {e}): remove it and it is made again"
        ) from e
    return GeneratorBundle(model, tokenizer, config, description["clip_dim"])


def make_tokenizer(config: GeneratorConfig, sentences: Sequence[str]) -> TextTokenizer:
    if config.tokenizer == "corpus":
        return train_tokenizer(sentences, config.vocab_size, [END_OF_TEXT])
    name = config.language_model if config.tokenizer == "pretrained" else config.tokenizer
    return load_tokenizer(name, "generator.tokenizer", [END_OF_TEXT])


def make_generator(config: GeneratorConfig, tokenizer: TextTokenizer, clip_dim: int, seed: int) -> GeneratorBundle:
    """A generator to train: the pretrained language model, or a GPT-2 of the config's sizes with weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language_model = _language_model(config, tokenizer)
        model = assemble(language_model, config, tokenizer, clip_dim)
    return GeneratorBundle(model, tokenizer, config, clip_dim)


def _language_model(config: GeneratorConfig, tokenizer: TextTokenizer) -> PreTrainedModel:
    if config.language_model == "scratch":
        end = tokenizer.id_of(END_OF_TEXT)
        sizes: dict[str, Any] = {"n_layer": config.layers, "n_embd": config.width, "n_head": config.heads}
        # corpus sentences may be longer than captions are allowed to be
        positions = config.prefix_length + max(SCRATCH_POSITIONS, config.max_length)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=positions, bos_token_id=end, eos_token_id=end, **sizes))
    try:
        return AutoModelForCausalLM.from_pretrained(config.language_model, dtype=torch.float32)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise MissingFileError(
            f"generator.language_model={config.language_model}: no model is found there ({reason}); give a folder with config.json and "
            "weights downloaded beforehand, a hub name with the network up, or scratch"
        ) from None


def assemble(language_model: PreTrainedModel, config: GeneratorConfig, tokenizer: TextTokenizer, clip_dim: int) -> CaptionGenerator:
    """A fresh mapper as the config says it, before this language model."""
    width = cast(nn.Embedding, language_model.get_input_embeddings()).embedding_dim
    if config.mapper == "transformer":
        mapper = TransformerMapper(clip_dim, width, config.prefix_length, config.clip_length, config.mapper_layers, config.mapper_heads)
    else:
        mapper = MLPMapper(clip_dim, width, config.prefix_length)
    end = language_model.config.eos_token_id
    return CaptionGenerator(
        language_model,
        mapper,
        stop_token_id=tokenizer.id_of("."),
        end_token_id=end if isinstance(end, int) else tokenizer.id_of(END_OF_TEXT),
        max_length=config.max_length,
        normalize_prefix=config.normalize_prefix,
    )
