"""Byte-level BPE tokenizers of generator and discriminator: from a hub, GPT-2 files, or trained on the corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe_models
from tokenizers.trainers import BpeTrainer

from cgtgan.errors import InputError
from cgtgan.models.weights import load_pretrained, refuse_pointers

END_OF_TEXT = "<|endoftext|>"
ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# A word as byte-level BPE and CLIP's tokenizer cut a text.
_RUN = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+|\s+")

# The clean-up that old tokenizers did when decoding English; transformers 5 leaves it out (METHOD, slip 9).
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class TextTokenizer:
    """Text <-> ids without special tokens; `decode` removes spaces before punctuation."""

    def __init__(self, backend: Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        texts = self.backend.decode_batch([list(i) for i in ids], skip_special_tokens=True)
        return [clean_up(t) for t in texts]

    def id_of(self, *names: str) -> int:
        """The id of the first of `names` that the vocabulary has. Raises `InputError` if it has none."""
        for name in names:
            token_id = self.backend.token_to_id(name)
            if token_id is not None:
                return token_id
        raise InputError(f"the tokenizer has no token {' or '.join(map(repr, names))}: choose a tokenizer that has it")

    def to_json(self) -> str:
        return self.backend.to_str()

    @classmethod
    def from_json(cls, text: str) -> TextTokenizer:
        return cls(Tokenizer.from_str(text))


def clean_up(text: str) -> str:
    """`a dog , running .` -> `a dog, running.`"""
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text


def without_endless_words(text: str, longest: int = 1000) -> str:
    """Runs of letters, of digits or of marks cut to `longest`: merging pairs takes the square of a word's length."""
    if len(text) <= longest:
        return text
    return _RUN.sub(lambda run: run[0][:longest], text)


def _byte_level(model: bpe_models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(sentences: Iterable[str], vocab_size: int, specials: Sequence[str]) -> TextTokenizer:
    """Byte-level BPE with all 256 bytes, so that any text can be encoded; `specials` get the first ids."""
    tokenizer = _byte_level(bpe_models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"special_tokens": list(specials), "initial_alphabet": alphabet, "show_progress": False}
    trainer = BpeTrainer(vocab_size=vocab_size, **settings)
    tokenizer.train_from_iterator((without_endless_words(sentence) for sentence in sentences), trainer)
    return TextTokenizer(tokenizer)


def load_tokenizer(name: str, field: str, specials: Sequence[str]) -> TextTokenizer:
    """From a folder with vocab.json and merges.txt (GPT-2's or RoBERTa's files), or what transformers loads by name.

    `field` is the config field that the error names.
    """
    folder = Path(name).expanduser()
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        refuse_pointers(folder, f"{field}={name}")
        try:
            tokenizer = _byte_level(bpe_models.BPE.from_file(str(vocab), str(merges)))
        except Exception as e:  # tokenizers raises bare Exceptions for files it cannot read
            raise InputError(f"{field}={name}: vocab.json and merges.txt there are no BPE tokenizer's ({e})") from None
        tokenizer.add_special_tokens([s for s in specials if tokenizer.token_to_id(s) is not None])
        return TextTokenizer(tokenizer)
    from transformers import AutoTokenizer

    loaded = load_pretrained(AutoTokenizer.from_pretrained, name, field, "tokenizer", use_fast=True)
    if not hasattr(loaded, "backend_tokenizer"):
        raise InputError(f"{field}={name} has a {type(loaded).__name__}: a fast tokenizer (tokenizer.json) is needed")
    return TextTokenizer(loaded.backend_tokenizer)
