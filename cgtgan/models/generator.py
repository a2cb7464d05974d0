"""The caption generator: a causal language model that reads a CLIP embedding as a prefix of vectors, then its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from cgtgan.models.chunks import chunks_by_length
from cgtgan.models.mapper import MLPMapper, TransformerMapper
from cgtgan.models.sampling import Clocks, race

_FEW = 8  # rows whose matrix products take as long as those of two: the weights come from memory once for all of them


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
        mapper: MLPMapper | TransformerMapper,
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
        self.gradient_checkpointing = False
        self._shares_prefix: bool | None = None
        _fuse_activations(language_model)

    def prefix(self, prefix_embedding: Tensor) -> Tensor:
        """(B, D) of any float dtype -> (B, P, E) in the model's own"""
        x = prefix_embedding.to(next(self.clip_project.parameters()).dtype)
        return self.clip_project(F.normalize(x, dim=-1) if self.normalize_prefix else x)

    # ---------------------------------------------------------------------------------------------- teacher-forced passes

    def token_logits(self, prefix: Tensor, token_ids: Tensor) -> Tensor:
        """(R, P, E), (R, L) -> (R, L, V): logits of each token given the prefix and the tokens before it"""
        return self._logits(prefix, self.gpt.get_input_embeddings()(token_ids))

    def _logits(self, prefix: Tensor, words: Tensor) -> Tensor:
        length = words.shape[1]
        read = torch.cat([prefix, words[:, :-1]], dim=1)
        return self.gpt(inputs_embeds=read, use_cache=False, logits_to_keep=length).logits[:, -length:]

    def token_log_probs(
        self, prefix_embedding: Tensor, token_ids: Tensor, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(B, D), (B, K, L) -> log-probs (B, K, L) float32 and their mask (B, K, L): true up to and including the stop token.

        Outside the mask the log-probs are 0. The prefix is read once an image, and the pass is as long as the longest caption.
        """
        mask = self.up_to_stop(token_ids)
        owner = torch.arange(len(token_ids), device=token_ids.device).repeat_interleave(token_ids.shape[1])
        ids, flat_mask = token_ids.flatten(0, 1), mask.flatten(0, 1)
        words = self.gpt.get_input_embeddings()(ids)
        if self.shares_prefix:
            found = self._after_prefix(self._read_prefix(prefix_embedding), owner, words, ids, flat_mask, temperature)
        else:
            found = self._with_prefix(prefix_embedding, owner, words, ids, flat_mask, temperature)
        return found.view(mask.shape), mask

    def log_probs(self, prefix_embedding: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        """(B, D), (B, K, L) -> (B, K) float32: mean log-prob of the tokens up to and including the stop token (METHOD: Generator).

        Give the tokens *drawn* (`Captions.drawn`): a forced stop keeps the drawn token's log-prob (METHOD, slip 6).
        """
        log_probs, mask = self.token_log_probs(prefix_embedding, token_ids, temperature=temperature)
        return log_probs.sum(-1) / mask.sum(-1)

    def accumulate_gradient(
        self,
        prefix_embedding: Tensor,
        token_ids: Tensor,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        max_tokens: int,
    ) -> Tensor:
        """Add the gradient of a loss that is a sum over captions, a chunk of at most `max_tokens` positions (or one caption) at a time.

        prefix_embedding (B, D), token_ids (R, L) with R = B*K, image by image. `loss(token_log_probs (n, L), mask (n, L), rows (n,))` is
        the chunk's share, a scalar; rows are its places among the R. Captions of like length go together, and the prefix of an image is
        read once: its own backward pass comes last, with what the chunks left. Returns the token log-probs (R, L), without a graph.
        """
        mask = self.up_to_stop(token_ids)
        owner = torch.arange(len(prefix_embedding), device=mask.device).repeat_interleave(
            len(token_ids) // len(prefix_embedding)
        )
        out = torch.zeros(token_ids.shape, device=mask.device)
        shared = self.shares_prefix and not self.gradient_checkpointing
        # what the chunks have in common: the gradient of a vocabulary's table is as large as the table, so it is made once
        read = [self.gpt.get_input_embeddings()(token_ids), *(self._read_prefix(prefix_embedding) if shared else [])]
        leaves = [x.detach().requires_grad_() for x in read]
        with self._checkpointed_layers():
            for rows in chunks_by_length(mask.sum(-1) + (0 if shared else self.clip_project.prefix_length), max_tokens):
                chunk = owner[rows], leaves[0][rows], token_ids[rows], mask[rows]
                log_probs = (
                    self._after_prefix(leaves[1:], *chunk) if shared else self._with_prefix(prefix_embedding, *chunk)
                )
                loss(log_probs, mask[rows], rows).backward()
                out[rows] = log_probs.detach()
        used = [(x, leaf.grad) for x, leaf in zip(read, leaves, strict=True) if leaf.grad is not None]
        if used:
            torch.autograd.backward([x for x, _ in used], [gradient for _, gradient in used])
        return out

    @property
    def shares_prefix(self) -> bool:
        """Whether this language model can go on from the cached keys and values of a prefix, with logits that are its head on its last
        states: tried once on a caption of three tokens, because nothing in a model's config says it."""
        if self._shares_prefix is None:
            training = {module: module.training for module in self.modules()}
            self.eval()
            try:
                some = next(self.clip_project.parameters())
                with torch.no_grad(), torch.autocast(some.device.type, enabled=False):
                    embedding = torch.linspace(-1, 1, self.clip_project.clip_dim, device=some.device, dtype=some.dtype)[
                        None
                    ]
                    ids = torch.tensor([[1, 2, 3]], device=some.device)
                    row = (
                        torch.zeros(1, dtype=torch.long, device=some.device),
                        self.gpt.get_input_embeddings()(ids),
                        ids,
                        ids > 0,
                    )
                    apart = self._after_prefix(self._read_prefix(embedding), *row) - self._with_prefix(embedding, *row)
                self._shares_prefix = bool(apart.abs().max() < 1e-3)
            except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
                self._shares_prefix = (
                    False  # a model with a memory of another kind: each caption reads its own copy of the prefix
                )
            for module, mode in training.items():
                module.training = mode
        return self._shares_prefix

    @contextmanager
    def _checkpointed_layers(self) -> Iterator[None]:
        """transformers' layers forget their states for the backward pass only while `training` is set: set on them alone, not on what is
        inside, so that no dropout comes with it."""
        layers = (
            [m for m in self.gpt.modules() if isinstance(m, GradientCheckpointingLayer)]
            if self.gradient_checkpointing
            else []
        )
        training = [layer.training for layer in layers]
        try:
            for layer in layers:
                layer.training = True
            yield
        finally:
            for layer, mode in zip(layers, training, strict=True):
                layer.training = mode

    def enable_gradient_checkpointing(self) -> None:
        """Trade a second forward pass of each layer for the memory of its states (large language models)."""
        self.gpt.activation_checkpointing_enable({"use_reentrant": False})
        self.gradient_checkpointing = True

    def _read_prefix(self, prefix_embedding: Tensor) -> list[Tensor]:
        """The language model's keys and values (B, H, P, E/H) of each layer in turn, then its last state (B, 1, E)."""
        cache: Any = DynamicCache(config=self.gpt.config)
        body: Any = self.gpt.base_model
        states = body(
            inputs_embeds=self.prefix(prefix_embedding), past_key_values=cache, use_cache=True
        ).last_hidden_state
        return [x for layer in cache.layers for x in (layer.keys, layer.values)] + [states[:, -1:]]

    def _after_prefix(
        self,
        read: Sequence[Tensor],
        owner: Tensor,
        words: Tensor,
        token_ids: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probs (R, L) of tokens (R, L), embedded as words (R, L, E), behind the prefix of image `owner` (R,); 0 outside `mask`.
        Logits are only made inside it."""
        *cached, last = read
        longest = int(mask.sum(-1).max())
        inside = mask[:, :longest]
        # `index_select`, not `[owner]`: on several threads the gradient of the latter is summed in an order that changes from run to run
        states = last.index_select(0, owner)
        if longest > 1:
            cache = DynamicCache(config=self.gpt.config)
            for layer, (keys, values) in enumerate(zip(cached[::2], cached[1::2], strict=True)):
                cache.update(keys.index_select(0, owner), values.index_select(0, owner), layer)
            body: Any = self.gpt.base_model
            after = body(inputs_embeds=words[:, : longest - 1], past_key_values=cache, use_cache=True).last_hidden_state
            states = torch.cat([states, after], dim=1)
        head: Any = self.gpt.get_output_embeddings()
        return _scattered(head(states[inside]), token_ids, mask, temperature)

    def _with_prefix(
        self, embedding: Tensor, owner: Tensor, words: Tensor, token_ids: Tensor, mask: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """The same by one pass over prefix and tokens together, for any language model that takes `inputs_embeds`."""
        longest = int(mask.sum(-1).max())
        images, place = owner.unique(return_inverse=True)
        logits = self._logits(self.prefix(embedding[images]).index_select(0, place), words[:, :longest])
        return _scattered(logits[mask[:, :longest]], token_ids, mask, temperature)

    def reconstruction_loss(self, prefix_embedding: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of (B, L) tokens, averaged over those where `mask` (B, L) is true (METHOD: Initialisation). A scalar."""
        logits = self.token_logits(self.prefix(prefix_embedding), token_ids).float()
        return F.cross_entropy(logits[mask], token_ids[mask])

    def up_to_stop(self, token_ids: Tensor) -> Tensor:
        """(..., L) ids -> the mask (..., L) that is true up to and including the first stop token"""
        stopped = token_ids == self.stop_token_id
        return stopped.cumsum(-1) - stopped.long() == 0

    # ------------------------------------------------------------------------------------------------------------ decoding

    @torch.no_grad()
    def greedy(self, prefix_embedding: Tensor, max_length: int | None = None, *, log_probs: bool = True) -> Captions:
        """(B, D) -> captions with leading shape (B,); `log_probs=False` leaves these 0, for speed"""
        choose, temperature = lambda logits, _rows: logits.argmax(-1), 1.0 if log_probs else None
        return self._flat(self._decode(prefix_embedding, 1, choose, max_length, temperature))

    @torch.no_grad()
    def sample(
        self,
        prefix_embedding: Tensor,
        num_samples: int,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        max_length: int | None = None,
    ) -> Captions:
        """Draw K captions an image from the model's own distribution: no top-k, no top-p. Leading shape (B, K).

        seeds: B lists of K numbers >= 0, made from `generator` when not given: a seed draws the same caption, whatever the batch.
        """
        clocks = Clocks(self._seeds(len(prefix_embedding), num_samples, seeds, generator), prefix_embedding.device)
        return self._decode(prefix_embedding, num_samples, _racing(clocks, temperature), max_length, temperature)

    def sample_with_graph(
        self, prefix_embedding: Tensor, seeds: Sequence[Sequence[int]], max_length: int | None = None
    ) -> Captions:
        """`sample` whose log-probs carry the gradient of the very pass that drew, a copy of the prefix for each sample: with dropout on,
        every sample has masks of its own, and the log-probs are those of the network that drew it (METHOD, slip 8)."""
        batch, samples = len(seeds), len(seeds[0])
        each = prefix_embedding.repeat_interleave(samples, dim=0)
        clocks = Clocks([seed for row in seeds for seed in row], prefix_embedding.device)
        drawn = self._decode(each, 1, _racing(clocks, 1.0), max_length, 1.0)
        return Captions(*(x.view(batch, samples, *x.shape[2:]) for x in drawn))

    @torch.no_grad()
    def sample_and_greedy(
        self, prefix_embedding: Tensor, seeds: Sequence[Sequence[int]], *, log_probs: bool = True
    ) -> tuple[Captions, Captions]:
        """Samples (B, K) and the greedy captions (B,) in one decode that shares the prefix and the cache."""
        samples = len(seeds[0])
        draw = _racing(Clocks([seed for row in seeds for seed in row], prefix_embedding.device), 1.0)

        def choose(logits: Tensor, rows: Tensor) -> Tensor:
            image, copy = rows // (samples + 1), rows % (samples + 1)
            tokens, sampled = logits.argmax(-1), copy < samples
            tokens[sampled] = draw(logits[sampled], (image * samples + copy)[sampled])
            return tokens

        both = self._decode(prefix_embedding, samples + 1, choose, None, 1.0 if log_probs else None)
        return Captions(*(x[:, :samples] for x in both)), Captions(*(x[:, samples] for x in both))

    @staticmethod
    def _seeds(
        batch: int, samples: int, given: Sequence[Sequence[int]] | None, generator: torch.Generator | None
    ) -> list[int]:
        if given is None:
            device = generator.device if generator is not None else None
            return torch.randint(2**62, (batch * samples,), generator=generator, device=device).tolist()
        if len(given) != batch or any(len(row) != samples for row in given):
            raise ValueError(f"seeds must be {batch} lists, one an image, of {samples} numbers, one a sample")
        return [seed for row in given for seed in row]

    def _decode(
        self,
        prefix_embedding: Tensor,
        copies: int,
        choose: Callable[[Tensor, Tensor], Tensor],
        max_length: int | None,
        temperature: float | None,
    ) -> Captions:
        """The cached loop: the prefix is read once an image, its cache copied `copies` times; finished rows leave the batch.

        `temperature` is that of the log-probs; None leaves them 0."""
        length = max_length or self.max_length
        batch, device = len(prefix_embedding), prefix_embedding.device
        drawn = torch.full((batch * copies, length), self.end_token_id, dtype=torch.long, device=device)
        summed = torch.zeros(batch * copies, device=device)
        if batch == 0:
            return Captions(*(x.view(0, copies, *x.shape[1:]) for x in (drawn, drawn, summed)))
        cache = DynamicCache(config=self.gpt.config)
        out = self.gpt(
            inputs_embeds=self.prefix(prefix_embedding), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits = out.logits[:, -1].float().repeat_interleave(copies, dim=0)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        rows = torch.arange(batch * copies, device=device)  # which caption each row of the cache belongs to
        open_rows = torch.ones(batch * copies, dtype=torch.bool, device=device)
        for position in range(length):
            tokens = choose(logits, rows)
            live = open_rows[rows]
            drawn[rows[live], position] = tokens[live]
            if temperature is not None:
                warm = logits if temperature == 1 else logits / temperature
                log_probs = warm.gather(1, tokens[:, None])[:, 0] - torch.logsumexp(warm, dim=-1)
                summed = summed.index_add(0, rows[live], log_probs[live])
            open_rows[rows] &= tokens != self.stop_token_id
            live = open_rows[rows]
            remaining = int(live.sum())
            if remaining == 0 or position == length - 1:
                break
            if remaining < 0.8 * len(rows) and (
                len(rows) > _FEW or remaining == 1
            ):  # else copying the cache costs more than it saves
                kept = live.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, tokens = rows[kept], tokens[kept]
            logits = self.gpt(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1].float()
        token_ids = drawn.clone()
        token_ids[open_rows, -1] = self.stop_token_id
        means = summed / self.up_to_stop(drawn).sum(-1)
        return Captions(*(x.view(batch, copies, *x.shape[1:]) for x in (token_ids, drawn, means)))

    @staticmethod
    def _flat(captions: Captions) -> Captions:
        return Captions(*(x[:, 0] for x in captions))

    @torch.no_grad()
    def beam(
        self, prefix_embedding: Tensor, beam_size: int, *, length_penalty: float = 1.0, max_length: int | None = None
    ) -> Captions:
        """Beam search; a finished caption of n tokens is ranked by its summed log-prob / n**length_penalty. Leading shape (B,)."""
        length, batch, beams = max_length or self.max_length, len(prefix_embedding), beam_size
        device, vocab = prefix_embedding.device, int(self.gpt.config.vocab_size)
        beams = min(beams, vocab - 1)
        cache = DynamicCache(config=self.gpt.config)
        out = self.gpt(
            inputs_embeds=self.prefix(prefix_embedding), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
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
            logits = (
                self.gpt(input_ids=running[..., position].reshape(-1, 1), past_key_values=cache, use_cache=True)
                .logits[:, -1]
                .float()
            )
        drawn = finished[:, 0]
        mask = self.up_to_stop(drawn)
        token_ids = drawn.clone()
        token_ids[mask.all(-1), -1] = self.stop_token_id
        lengths = mask.sum(-1)
        return Captions(token_ids, drawn, finished_scores[:, 0] * lengths.float() ** (length_penalty - 1))


def _scattered(logits: Tensor, token_ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Logits (T, V) of the T places where `mask` (R, L) is true -> log-probs (R, L) float32 of the tokens there, 0 elsewhere"""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    flat = -F.cross_entropy(logits, token_ids[mask], reduction="none")
    return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)


def _fuse_activations(language_model: nn.Module) -> None:
    """GPT-2's own GELU is eight passes over a wide tensor, all kept for the backward pass; torch's is one, and the same to rounding."""
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _racing(clocks: Clocks, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, rows: race(logits, clocks.next(rows.tolist(), logits.shape[-1]), temperature)
