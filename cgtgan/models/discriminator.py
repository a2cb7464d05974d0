"""The discriminator: an encoder with a pooled output and an MLP head that judges whether a sentence sounds human."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, BertModel, PreTrainedModel, RobertaConfig, RobertaModel
from transformers.masking_utils import create_bidirectional_mask

from cgtgan.config import DiscriminatorConfig
from cgtgan.errors import InputError
from cgtgan.models.chunks import chunks_by_length, pad_rows
from cgtgan.models.tokenizers import ROBERTA_SPECIALS, TextTokenizer, load_tokenizer, train_tokenizer
from cgtgan.models.weights import load_pretrained, model_identities
from cgtgan.runtime.devices import on_device

_PLAIN_ATTENTION = (BertModel, RobertaModel)


class _Head(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Discriminator(nn.Module):
    """Encoder, pooler, then E -> E/2 -> 1 with tanh between (attribute names are those of the released program)."""

    def __init__(self, encoder: PreTrainedModel, tokenizer: TextTokenizer, max_tokens: int):
        super().__init__()
        self.text_encoder = encoder
        self.mlp = _Head(int(encoder.config.hidden_size))
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.begin = tokenizer.id_of("<s>", "[CLS]")
        self.pad = tokenizer.id_of("<pad>", "[PAD]")
        self.end = tokenizer.id_of("</s>", "[SEP]")
        self.stop = tokenizer.id_of(".")

    def forward(
        self, tokens: Tensor, mask: Tensor, words: Tensor | None = None, *, padded: bool | None = None
    ) -> Tensor:
        """(N, L) ids and their mask -> (N,) raw logits, float32, above 0 for human. words (N, L, E): embedded ids.

        padded: whether the mask is false anywhere; None: not known, and the device may be asked.
        """
        read: dict[str, Tensor] = {"input_ids": tokens} if words is None else {"inputs_embeds": words}
        pooled = self.text_encoder(**read, attention_mask=self._attention_mask(mask, padded)).pooler_output
        assert pooled is not None, "make_discriminator takes only encoders with a pooler"
        return self.mlp(pooled)[:, 0].float()

    def _attention_mask(self, mask: Tensor, padded: bool | None) -> Tensor | None:
        """What transformers makes of `mask`, for which it asks the device whether anything is padded."""
        if padded is None or not isinstance(self.text_encoder, _PLAIN_ATTENTION):
            return mask
        if not padded:
            return None
        like = next(self.mlp.parameters()).new_empty(1).expand(*mask.shape, 1)  # its shape, dtype and device are read
        return create_bidirectional_mask(self.text_encoder.config, like, mask, allow_is_bidirectional_skip=False)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N, L) int64 ids and mask, padded to the longest text.

        A text over `max_tokens` tokens is cut and still ends in a full stop: D must not know cut sentences by their
        end (METHOD, slip 5).
        """
        device = next(self.mlp.parameters()).device
        tokens, mask = self._tokenized(texts)
        return on_device(tokens, device), on_device(mask, device)

    def _tokenized(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`tokenize` on the host."""
        rows = []
        for ids in self.tokenizer.encode(texts):
            row = [self.begin, *ids, self.end]
            rows.append(row if len(row) <= self.max_tokens else [*row[: self.max_tokens - 2], self.stop, self.end])
        tokens, mask = pad_rows(rows, self.pad)
        return tokens, mask.long()

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> Tensor:
        """Raw logits (N,) of texts; identical texts are judged once."""
        unique = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(unique)}
        device = next(self.mlp.parameters()).device
        tokens, mask = self._tokenized(unique)
        logits = self(on_device(tokens, device), on_device(mask, device), padded=not bool(mask.all()))
        return logits[on_device(torch.tensor([place[t] for t in texts], dtype=torch.long), logits.device)]

    def accumulate_gradient(
        self, texts: Sequence[str], loss: Callable[[Tensor, Tensor], Tensor], max_tokens: int
    ) -> Tensor:
        """Add the gradient of a loss that is a sum over texts, in chunks of at most `max_tokens` positions.

        `loss(logits (n,), rows (n,))` is the chunk's share, a scalar; rows are places among the texts. Returns the
        logits (N,), without a graph.
        """
        device = next(self.mlp.parameters()).device
        host_tokens, host_mask = self._tokenized(texts)
        lengths, tokens, mask = host_mask.sum(-1), on_device(host_tokens, device), on_device(host_mask, device)
        out = torch.empty(len(texts), device=device)
        # made once: the gradient of the vocabulary's table is as large as the table
        words = self.text_encoder.get_input_embeddings()(tokens)
        leaf = words.detach().requires_grad_()
        for places in chunks_by_length(lengths, max_tokens):
            rows, longest = on_device(places, device), int(lengths[places[-1]])
            padded = int(lengths[places].min()) < longest
            logits = self(tokens[rows, :longest], mask[rows, :longest], leaf[rows, :longest], padded=padded)
            loss(logits, rows).backward()
            out[rows] = logits.detach()
        words.backward(leaf.grad)
        return out


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy with logits over corpus sentences (1) and samples (0), averaged over both. A scalar."""
    logits = torch.cat([real_logits, fake_logits])
    labels = torch.cat([torch.ones_like(real_logits), torch.zeros_like(fake_logits)])
    return F.binary_cross_entropy_with_logits(logits, labels)


def pairwise_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log sigmoid(D(real) - D(fake)) of R pairs (R,), averaged (GAD, arXiv 2511.10643). A scalar."""
    return F.softplus(fake_logits - real_logits).mean()


def naturalness_rewards(logits: Tensor, kind: str, samples: int) -> Tensor:
    """What the generator is paid for logits (B*K + B,), K = `samples` per image, then one greedy caption each.

    `logit`: the logit itself. `probability`: its sigmoid. `binary`: 1 where it is above 0, else 0 (RIL, arXiv
    2510.19307). `rank`: the share of the same image's other captions with a lower logit, ties as halves.
    """
    if kind == "logit":
        return logits
    if kind == "probability":
        return logits.sigmoid()
    if kind == "binary":
        return (logits > 0).float()
    images = len(logits) // (samples + 1)
    each = torch.cat([logits[: images * samples].view(images, samples), logits[images * samples :, None]], dim=1)
    below = (each[:, :, None] > each[:, None, :]).float() + 0.5 * (each[:, :, None] == each[:, None, :]).float()
    ranks = (below.sum(-1) - 0.5) / samples  # without the caption's tie with itself
    return torch.cat([ranks[:, :samples].flatten(), ranks[:, samples]])


def discriminator_identity(config: DiscriminatorConfig, records: Path | None = None) -> dict[str, Any]:
    """`model_identities` of what a discriminator's settings only name."""
    return model_identities({"encoder": config.encoder, "tokenizer": config.tokenizer}, records)


def make_discriminator(
    config: DiscriminatorConfig, sentences: Sequence[str], max_length: int, seed: int
) -> Discriminator:
    """The pretrained encoder with a fresh head, or a RoBERTa of the config's sizes; fresh weights come from `seed`.

    `max_length` is the generator's; D reads max_length + 2 tokens (METHOD: GAN training, step 2).
    """
    if config.tokenizer == "corpus":
        tokenizer = train_tokenizer(sentences, config.vocab_size, ROBERTA_SPECIALS)
    else:
        field = "encoder" if config.tokenizer == "pretrained" else "tokenizer"
        tokenizer = load_tokenizer(getattr(config, field), f"discriminator.{field}", ROBERTA_SPECIALS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator(_encoder(config, tokenizer, max_length + 2), tokenizer, max_length + 2)
    for name, p in discriminator.named_parameters():
        # The softmax over keys cancels a bias on all of them: its gradient is rounding error that Adam would scale up.
        if isinstance(discriminator.text_encoder, _PLAIN_ATTENTION) and name.endswith("attention.self.key.bias"):
            p.requires_grad = False
    if config.loss == "pairwise":  # it reads differences of logits alone: likewise for the bias on all of them
        *_, last_bias = discriminator.mlp.parameters()
        last_bias.requires_grad = False
    return discriminator


def _encoder(config: DiscriminatorConfig, tokenizer: TextTokenizer, max_tokens: int) -> PreTrainedModel:
    if config.encoder == "scratch":
        pad = tokenizer.id_of("<pad>")
        sizes: dict[str, Any] = {
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": 4 * config.width,
            "max_position_embeddings": max_tokens + pad + 1,  # RoBERTa counts positions from pad + 1
        }
        vocab = {"vocab_size": len(tokenizer), "pad_token_id": pad, "type_vocab_size": 1}
        return RobertaModel(RobertaConfig(**vocab, **sizes))
    load, name = AutoModel.from_pretrained, config.encoder
    encoder = load_pretrained(load, name, "discriminator.encoder", "encoder", dtype=torch.float32)
    if getattr(encoder, "pooler", None) is None:
        raise InputError(
            f"discriminator.encoder={config.encoder} is a {type(encoder).__name__} without a pooled output: choose an "
            "encoder that has one, such as BERT or RoBERTa"
        )
    return encoder
