"""A causal language model behind a prefix made of a CLIP embedding: log-probs of given captions, and their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from cgtgan.models.chunks import chunks_by_length
from cgtgan.models.mapper import MLPMapper, TransformerMapper
from cgtgan.models.prompted import Prompted, Read, embedding_of
from cgtgan.runtime.devices import on_device


class PrefixLanguageModel(nn.Module):
    """`gpt` reads the prefix that `clip_project` makes of a CLIP embedding, then tokens.

    Attribute names are those of the released checkpoints.
    """

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

    def prefix(self, prefix_embedding: Read) -> Tensor:
        """(B, D) of any float dtype -> (B, P, E) in the model's own; behind a prompt's T tokens (B, T + P, E)"""
        x = embedding_of(prefix_embedding).to(next(self.clip_project.parameters()).dtype)
        prefix = self.clip_project(F.normalize(x, dim=-1) if self.normalize_prefix else x)
        if not isinstance(prefix_embedding, Prompted):
            return prefix
        return torch.cat([self.gpt.get_input_embeddings()(prefix_embedding.prompt), prefix], dim=1)

    def _prefix_width(self, prefix_embedding: Read) -> int:
        """How many positions stand before a caption."""
        prompt = prefix_embedding.prompt.shape[1] if isinstance(prefix_embedding, Prompted) else 0
        return self.clip_project.prefix_length + prompt

    def up_to_stop(self, token_ids: Tensor) -> Tensor:
        """(..., L) ids -> the mask (..., L) that is true up to and including the first stop token"""
        stopped = token_ids == self.stop_token_id
        return stopped.cumsum(-1) - stopped.long() == 0

    def token_logits(self, prefix: Tensor, token_ids: Tensor) -> Tensor:
        """(R, P, E), (R, L) -> (R, L, V): logits of each token given the prefix and the tokens before it"""
        return self._logits(prefix, self.gpt.get_input_embeddings()(token_ids))

    def reconstruction_loss(
        self,
        prefix_embedding: Read,
        token_ids: Tensor,
        mask: Tensor,
        weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of (B, L) tokens, averaged over those where `mask` (B, L) is true (METHOD: Initialisation).

        weights (B,): what each text's tokens are multiplied by; None: 1.
        """
        logits = self.token_logits(self.prefix(prefix_embedding), token_ids).float()
        if weights is None:
            return F.cross_entropy(logits[mask], token_ids[mask], label_smoothing=label_smoothing)
        losses = F.cross_entropy(logits[mask], token_ids[mask], reduction="none", label_smoothing=label_smoothing)
        return (losses * weights[:, None].expand(mask.shape)[mask]).mean()

    def log_probs(self, prefix_embedding: Read, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        """(B, D), (B, K, L) -> (B, K) float32: mean log-prob of the tokens up to and including the stop token.

        Give the tokens *drawn* (`Captions.drawn`): a forced stop keeps the drawn token's log-prob (METHOD, slip 6).
        """
        log_probs, mask = self.token_log_probs(prefix_embedding, token_ids, temperature=temperature)
        return log_probs.sum(-1) / mask.sum(-1)

    def token_log_probs(
        self, prefix_embedding: Read, token_ids: Tensor, *, temperature: float = 1.0, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, D), (B, K, L) -> log-probs (B, K, L) float32, 0 outside the mask; mask (B, K, L), see `up_to_stop`.

        The prefix is read once per image, and the pass is as long as the longest caption. lengths (B, K), on the host:
        how many tokens the mask covers; None: the device is asked.
        """
        mask = self.up_to_stop(token_ids)
        image = torch.arange(len(token_ids), device=token_ids.device).repeat_interleave(token_ids.shape[1])
        ids, lengths = token_ids.flatten(0, 1), (mask.sum(-1).cpu() if lengths is None else lengths).flatten()
        words = self.gpt.get_input_embeddings()(ids)
        if self.shares_prefix:
            prefix_states = self._read_prefix(prefix_embedding)
            log_probs = self._after_prefix(prefix_states, image, words, ids, lengths, temperature)
        else:
            log_probs = self._with_prefix(prefix_embedding, image, words, ids, lengths, temperature)
        return log_probs.view(mask.shape), mask

    def accumulate_gradient(
        self,
        prefix_embedding: Read,
        token_ids: Tensor,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        max_tokens: int,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Add the gradient of a loss that is a sum over captions, in chunks of at most `max_tokens` positions.

        prefix_embedding (B, D), token_ids (R, L) with R = B*K, image by image.
        `loss(token_log_probs (n, L), mask (n, L), rows (n,))` is the chunk's share, a scalar; rows are its places among
        the R captions. A chunk holds captions of like length, at least one. Where `shares_prefix`, the prefix is read
        once per image, and its backward pass comes last. lengths (R,), on the host: as for `token_log_probs`. Returns
        the token log-probs (R, L), without a graph.
        """
        mask = self.up_to_stop(token_ids)
        images, captions = len(prefix_embedding), len(token_ids)
        image = torch.arange(images, device=mask.device).repeat_interleave(captions // images)
        out = torch.zeros(token_ids.shape, device=mask.device)
        shared = self.shares_prefix and not self.gradient_checkpointing
        # Read once for all chunks: the gradient of a vocabulary's table is as large as the table.
        read = [self.gpt.get_input_embeddings()(token_ids), *(self._read_prefix(prefix_embedding) if shared else [])]
        leaves = [x.detach().requires_grad_() for x in read]
        if lengths is None:
            lengths = mask.sum(-1).cpu()
        widths = lengths + (0 if shared else self._prefix_width(prefix_embedding))
        with self._checkpointed_layers():
            for places in chunks_by_length(widths, max_tokens):
                rows = on_device(places, mask.device)
                chunk = image[rows], leaves[0][rows], token_ids[rows], lengths[places]
                if shared:
                    log_probs = self._after_prefix(leaves[1:], *chunk)
                else:
                    log_probs = self._with_prefix(prefix_embedding, *chunk)
                loss(log_probs, mask[rows], rows).backward()
                out[rows] = log_probs.detach()
        used = [(x, leaf.grad) for x, leaf in zip(read, leaves, strict=True) if leaf.grad is not None]
        if used:
            torch.autograd.backward([x for x, _ in used], [gradient for _, gradient in used])
        return out

    def enable_gradient_checkpointing(self) -> None:
        """Trade a second forward pass of each layer for the memory of its states (large language models)."""
        self.gpt.activation_checkpointing_enable({"use_reentrant": False})
        self.gradient_checkpointing = True

    @property
    def shares_prefix(self) -> bool:
        """Whether the language model can go on from the cached keys and values of a prefix, and its logits are its head
        applied to its last states. Tried once on a caption of three tokens: no model's config says it.
        """
        if self._shares_prefix is None:
            training = {module: module.training for module in self.modules()}
            self.eval()
            try:
                self._shares_prefix = self._both_passes_agree()
            except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
                self._shares_prefix = False  # a model with another kind of cache: captions read copies of the prefix
            for module, mode in training.items():
                module.training = mode
        return self._shares_prefix

    @torch.no_grad()
    def _both_passes_agree(self) -> bool:
        weight = next(self.clip_project.parameters())
        device = weight.device
        with torch.autocast(device.type, enabled=False):
            embedding = torch.linspace(-1, 1, self.clip_project.clip_dim, device=device, dtype=weight.dtype)[None]
            ids = torch.tensor([[1, 2, 3]], device=device)
            image = torch.zeros(1, dtype=torch.long, device=device)
            caption = image, self.gpt.get_input_embeddings()(ids), ids, torch.tensor([3])
            shared = self._after_prefix(self._read_prefix(embedding), *caption)
            difference = shared - self._with_prefix(embedding, *caption)
        return bool(difference.abs().max() < 1e-3)

    @contextmanager
    def _checkpointed_layers(self) -> Iterator[None]:
        """transformers' layers drop their states only while `training` is set. It is set on the layers alone, not on
        the modules inside them, so that no dropout comes with it.
        """
        layers = [m for m in self.gpt.modules() if isinstance(m, GradientCheckpointingLayer)]
        layers = layers if self.gradient_checkpointing else []
        training = [layer.training for layer in layers]
        try:
            for layer in layers:
                layer.training = True
            yield
        finally:
            for layer, mode in zip(layers, training, strict=True):
                layer.training = mode

    def _read_prefix(self, prefix_embedding: Read) -> list[Tensor]:
        """The language model's keys and values (B, H, P, E/H) of each layer in turn, then its last state (B, 1, E)."""
        cache: Any = DynamicCache(config=self.gpt.config)
        body: Any = self.gpt.base_model
        prefix = self.prefix(prefix_embedding)
        states = body(inputs_embeds=prefix, past_key_values=cache, use_cache=True).last_hidden_state
        return [x for layer in cache.layers for x in (layer.keys, layer.values)] + [states[:, -1:]]

    def _after_prefix(
        self,
        read: Sequence[Tensor],
        image: Tensor,
        words: Tensor,
        token_ids: Tensor,
        lengths: Tensor,
        temperature: float = 1,
    ) -> Tensor:
        """Log-probs (R, L) of tokens (R, L), embedded as words (R, L, E), behind the prefix of `image` (R,).

        lengths (R,), on the host: logits are only made of the first tokens of each row, as many; the others' are 0.
        """
        *cached, last = read
        longest = int(lengths.max())
        # not `[image]`: on several threads its gradient is summed in an order that changes from run to run
        states = last.index_select(0, image)
        if longest > 1:
            cache = DynamicCache(config=self.gpt.config)
            for layer, (keys, values) in enumerate(zip(cached[::2], cached[1::2], strict=True)):
                cache.update(keys.index_select(0, image), values.index_select(0, image), layer)
            body: Any = self.gpt.base_model
            after = body(inputs_embeds=words[:, : longest - 1], past_key_values=cache, use_cache=True).last_hidden_state
            states = torch.cat([states, after], dim=1)
        head: Any = self.gpt.get_output_embeddings()
        inside = _inside(lengths, states.device)
        return _scattered(head(states.flatten(0, 1).index_select(0, inside)), token_ids, inside, longest, temperature)

    def _with_prefix(
        self, embedding: Read, image: Tensor, words: Tensor, token_ids: Tensor, lengths: Tensor, temperature: float = 1
    ) -> Tensor:
        """The same by one pass over prefix and tokens, for any language model that takes `inputs_embeds`."""
        longest = int(lengths.max())
        images, place = image.unique(return_inverse=True)
        logits = self._logits(self.prefix(embedding[images]).index_select(0, place), words[:, :longest])
        inside = _inside(lengths, logits.device)
        return _scattered(logits.flatten(0, 1).index_select(0, inside), token_ids, inside, longest, temperature)

    def _logits(self, prefix: Tensor, words: Tensor) -> Tensor:
        length = words.shape[1]
        read = torch.cat([prefix, words[:, :-1]], dim=1)
        return self.gpt(inputs_embeds=read, use_cache=False, logits_to_keep=length).logits[:, -length:]


def _inside(lengths: Tensor, device: torch.device) -> Tensor:
    """Of rows as wide as the longest, the places (T,) in all of them one after the other that `lengths` (R,) covers.

    Made on the host: the number of true places of a mask is what a device would have to be asked for.
    """
    covered = torch.arange(int(lengths.max())) < lengths[:, None]
    return on_device(covered.flatten().nonzero()[:, 0], device)


def _scattered(logits: Tensor, token_ids: Tensor, inside: Tensor, longest: int, temperature: float) -> Tensor:
    """Logits (T, V) at places `inside` of rows of `longest` -> log-probs (R, L) float32 of the tokens there, else 0"""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    ids = token_ids[:, :longest].flatten()
    flat = -F.cross_entropy(logits, ids[inside], reduction="none")
    log_probs = torch.zeros(ids.shape, device=flat.device).index_copy(0, inside, flat)
    return F.pad(log_probs.view(-1, longest), (0, token_ids.shape[1] - longest))


def _fuse_activations(language_model: nn.Module) -> None:
    """GPT-2's GELU is eight passes over a wide tensor, all kept for the gradient; torch's is one, equal to rounding."""
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
