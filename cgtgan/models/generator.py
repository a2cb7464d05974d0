"""The caption generator: a language model behind the prefix of a CLIP embedding, and how captions are drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from cgtgan.models.fixed_cache import COMPILED, GROWING, FixedCache, check_fits
from cgtgan.models.prefix_model import PrefixLanguageModel
from cgtgan.models.prompted import Read
from cgtgan.models.sampling import Clocks, DeviceClocks, race
from cgtgan.runtime.devices import on_device

_ASKED_EVERY = 8  # tokens; with a fixed cache a wait costs about as much as these few that are decoded for nothing
_FEW = 8  # rows whose matrix products take as long as those of two: the weights come from memory once for all of them

# (R, V) logits and the numbers of the captions that the R rows belong to -> the next tokens (R,)
ChooseTokens = Callable[[Tensor, list[int]], Tensor]


class Captions(NamedTuple):
    """Decoded captions; leading shape S is (B,) or (B, K).

    token_ids S+(L,) int64: what is printed. A sentence still open at the last position gets the stop token there; after
    the stop token stands the end-of-text id. drawn S+(L,) int64: the same before that replacement, for `log_probs`.
    log_probs S float32: mean log-prob of the drawn tokens up to and including the stop token.
    """

    token_ids: Tensor
    drawn: Tensor
    log_probs: Tensor


class CaptionGenerator(PrefixLanguageModel):
    """Draws captions: greedily, as samples, by beam search.

    decode_cache: `growing`, or `static` or `compiled` for a `FixedCache`, the setting decode.cache.
    """

    decode_cache: str = GROWING
    _compiled: FixedCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without buffers and graphs."""
        return self.__dict__ | {"_compiled": None}

    @torch.no_grad()
    def greedy(self, prefix_embedding: Read, max_length: int | None = None, *, log_probs: bool = True) -> Captions:
        """(B, D) -> captions with leading shape (B,); `log_probs=False` leaves these 0, for speed"""
        temperature = 1.0 if log_probs else None
        decoded = self._decode(prefix_embedding, 1, lambda logits, _: logits.argmax(-1), max_length, temperature)
        return Captions(*(x[:, 0] for x in decoded))

    @torch.no_grad()
    def sample(
        self,
        prefix_embedding: Read,
        num_samples: int,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        max_length: int | None = None,
    ) -> Captions:
        """Draw K captions per image from the model's own distribution: no top-k, no top-p. Leading shape (B, K).

        seeds: B lists of K numbers >= 0, made from `generator` when not given. A seed draws the same caption in any
        batch. Raises `ValueError` for seeds of another shape.
        """
        batch = len(prefix_embedding)
        if seeds is None:
            device = generator.device if generator is not None else None
            seeds = torch.randint(2**62, (batch, num_samples), generator=generator, device=device).tolist()
        elif len(seeds) != batch or any(len(row) != num_samples for row in seeds):
            raise ValueError(f"seeds must be {batch} lists, one per image, of {num_samples} numbers, one per sample")
        choose = _sampler(seeds, prefix_embedding.device, temperature)
        return self._decode(prefix_embedding, num_samples, choose, max_length, temperature)

    def sample_with_graph(
        self, prefix_embedding: Read, seeds: Sequence[Sequence[int]], max_length: int | None = None
    ) -> Captions:
        """`sample` whose log-probs carry the gradient of the very pass that drew, with a copy of the prefix per sample.

        With dropout on, each sample has its own masks, and the log-probs are those of the network that drew it (METHOD,
        slip 8). Always with the growing cache: the gradient needs the states of every token as they were.
        """
        batch, samples = len(seeds), len(seeds[0])
        copies = prefix_embedding.repeat_interleave(samples, dim=0)
        drawn = self._decode(copies, 1, _sampler(seeds, copies.device), max_length, 1.0)
        return Captions(*(x.view(batch, samples, *x.shape[2:]) for x in drawn))

    @torch.no_grad()
    def sample_and_greedy(
        self, prefix_embedding: Read, seeds: Sequence[Sequence[int]], *, log_probs: bool = True
    ) -> tuple[Captions, Captions]:
        """Samples (B, K) and the greedy captions (B,) in one decode that shares the prefix and the cache."""
        samples = len(seeds[0])
        draw = _sampler(seeds, prefix_embedding.device)

        def choose(logits: Tensor, rows: list[int]) -> Tensor:
            places = [place for place, row in enumerate(rows) if row % (samples + 1) < samples]
            sampled = on_device(torch.tensor(places, dtype=torch.long), logits.device)
            tokens = logits.argmax(-1)
            # the number of a sample leaves out the greedy captions before it
            tokens[sampled] = draw(logits[sampled], [rows[place] - rows[place] // (samples + 1) for place in places])
            return tokens

        both = self._decode(prefix_embedding, samples + 1, choose, None, 1.0 if log_probs else None)
        return Captions(*(x[:, :samples] for x in both)), Captions(*(x[:, samples] for x in both))

    def _decode(
        self,
        prefix_embedding: Read,
        copies: int,
        choose: ChooseTokens,
        max_length: int | None,
        temperature: float | None,
    ) -> Captions:
        """The cached loop: the prefix is read once per image, its cache repeated; finished rows leave the batch.

        `temperature` is that of the log-probs; None leaves them 0. The host waits for the device once per token, to
        learn which rows have ended. With a `FixedCache` no row leaves, and it waits every `_ASKED_EVERY` tokens.
        """
        length = max_length or self.max_length
        batch, device = len(prefix_embedding), prefix_embedding.device
        drawn = torch.full((batch * copies, length), self.end_token_id, dtype=torch.long, device=device)
        summed = torch.zeros(batch * copies, device=device)
        if batch == 0:
            return Captions(*(x.view(0, copies, *x.shape[1:]) for x in (drawn, drawn, summed)))
        logits, cache = self._start(prefix_embedding, copies, length)
        captions = list(range(batch * copies))  # which caption each row of the cache belongs to
        rows = torch.arange(batch * copies, device=device)  # the same on the device
        open_rows = torch.ones(batch * copies, dtype=torch.bool, device=device)
        for position in range(length):
            tokens = choose(logits, captions)
            live = open_rows[rows]
            drawn[:, position].index_copy_(0, rows, torch.where(live, tokens, self.end_token_id))
            if temperature is not None:
                warm = logits if temperature == 1 else logits / temperature
                log_probs = warm.gather(1, tokens[:, None])[:, 0] - torch.logsumexp(warm, dim=-1)
                summed = summed.index_add(0, rows, torch.where(live, log_probs, 0.0))
            open_rows[rows] &= tokens != self.stop_token_id
            if position == length - 1:
                break
            if isinstance(cache, FixedCache):
                if _asked_at(position) and not bool(open_rows.any()):
                    break
                logits = cache.next_logits(tokens)
                continue
            going_on = [row for row, is_open in enumerate(open_rows[rows].tolist()) if is_open]
            if not going_on:
                break
            # with fewer rows to drop, copying the cache costs more than it saves
            if len(going_on) < 0.8 * len(captions) and (len(captions) > _FEW or len(going_on) == 1):
                kept = on_device(torch.tensor(going_on), device)
                cache.batch_select_indices(kept)
                captions, rows, tokens = [captions[row] for row in going_on], rows[kept], tokens[kept]
            logits = self._next_logits(tokens, cache)
        token_ids = drawn.clone()
        token_ids[:, -1].masked_fill_(open_rows, self.stop_token_id)
        means = summed / self.up_to_stop(drawn).sum(-1)
        return Captions(*(x.view(batch, copies, *x.shape[1:]) for x in (token_ids, drawn, means)))

    @torch.no_grad()
    def beam(
        self, prefix_embedding: Read, beam_size: int, *, length_penalty: float = 1.0, max_length: int | None = None
    ) -> Captions:
        """Beam search; leading shape (B,). A finished caption of n tokens is ranked by summed log-prob /
        n**length_penalty.
        """
        length, batch = max_length or self.max_length, len(prefix_embedding)
        vocab = int(self.gpt.config.vocab_size)
        device, beams = prefix_embedding.device, min(beam_size, vocab - 1)
        logits, cache = self._start(prefix_embedding, beams, length)
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
            # Log-probs only fall: an image is settled when its best open caption, at its present length, ranks below
            # its worst finished one.
            unsettled &= (scores[:, :1] / (position + 1) ** length_penalty) > finished_scores[:, -1:]
            if (_asked_at(position) or not isinstance(cache, FixedCache)) and not bool(unsettled.any()):
                break
            rows = (torch.arange(batch, device=device)[:, None] * beams + parent.gather(1, kept)).flatten()
            cache.batch_select_indices(rows)
            logits = self._next_logits(running[..., position].flatten(), cache)
        drawn = finished[:, 0]
        mask = self.up_to_stop(drawn)
        token_ids = drawn.clone()
        token_ids[:, -1].masked_fill_(mask.all(-1), self.stop_token_id)
        lengths = mask.sum(-1)
        return Captions(token_ids, drawn, finished_scores[:, 0] * lengths.float() ** (length_penalty - 1))

    def _start(self, prefix_embedding: Read, copies: int, length: int) -> tuple[Tensor, Any]:
        """Logits (B*copies, V) of the first token, and the cache of the prefix, which is read once per image."""
        fixed = self.decode_cache != GROWING and not torch.is_grad_enabled()
        # a fixed cache takes the states of the whole prefix, whatever window the config would cut it to
        cache: Any = DynamicCache() if fixed else DynamicCache(config=self.gpt.config)
        prefix = self.prefix(prefix_embedding)
        if fixed:
            check_fits(self.gpt, self.decode_cache)
        out = self.gpt(inputs_embeds=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1].float().repeat_interleave(copies, dim=0)
        if fixed:
            return logits, self._fixed(cache, copies, prefix.shape[1] + length - 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        return logits, cache

    def _fixed(self, read: Any, copies: int, positions: int) -> FixedCache:
        """The states `read`, in new buffers or, where the step is compiled, in those of an earlier call with room."""
        states, is_compiled = read.layers[0].keys, self.decode_cache == COMPILED
        rows = len(states) * copies
        cache = self._compiled if is_compiled else None
        if cache is None or not cache.fits(rows, positions, states):
            self._compiled = None  # first let go of the smaller buffers
            cache = FixedCache(self.gpt, rows, positions, compiled=is_compiled)
            self._compiled = cache if is_compiled else None
        cache.begin(read, copies)
        return cache

    def _next_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """(R,) tokens, which `cache` takes in -> (R, V) float32"""
        if isinstance(cache, FixedCache):
            return cache.next_logits(tokens)
        return self.gpt(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1].float()


def _asked_at(position: int) -> bool:
    """Whether the device is asked behind this position if all captions have ended."""
    return (position + 1) % _ASKED_EVERY == 0


def _sampler(seeds: Sequence[Sequence[int]], device: torch.device, temperature: float = 1.0) -> ChooseTokens:
    """Draws the next tokens at `temperature`; each caption draws from its own seed."""
    each = [seed for row in seeds for seed in row]
    clocks = Clocks(each) if device.type == "cpu" else DeviceClocks(each, device)
    return lambda logits, rows: race(logits, clocks.next(rows, logits.shape[-1]), temperature)
