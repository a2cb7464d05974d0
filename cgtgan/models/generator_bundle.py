"""A generator with its tokenizer: made from a language model or from scratch, saved and loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from cgtgan.config import GeneratorConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.mapper import MLPMapper, TransformerMapper
from cgtgan.models.prompted import Prompted, filled_prompts
from cgtgan.models.tokenizers import END_OF_TEXT, TextTokenizer, load_tokenizer, train_tokenizer
from cgtgan.models.weights import load_pretrained, model_identities

SCRATCH_POSITIONS = 64  # tokens of text that a language model made from scratch can read


@dataclass
class GeneratorBundle:
    """A generator with what its use takes: its tokenizer, its config and the CLIP dimension it reads."""

    model: CaptionGenerator
    tokenizer: TextTokenizer
    config: GeneratorConfig
    clip_dim: int

    def texts(self, token_ids: Tensor) -> list[str]:
        """(..., L) -> one caption per row, flattened in order"""
        return self.tokenizer.decode(token_ids.reshape(-1, token_ids.shape[-1]).tolist())

    def prompted(self, embeddings: Tensor, prompts: Sequence[str], length: int) -> Prompted:
        """Embeddings (N, D) behind their prompts, each of `length` tokens."""
        token_ids = filled_prompts(self.tokenizer.encode(prompts), length, self.model.end_token_id)
        return Prompted(embeddings, token_ids.to(embeddings.device))

    def copy(self) -> GeneratorBundle:
        """The same with a copy of the weights, in the memory of the host."""
        return replace(self, model=copy.deepcopy(self.model).cpu())

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
            f"{folder} cannot be read as a generator's checkpoint ({type(e).__name__}: {e}): remove it and it is made "
            "again"
        ) from e
    return GeneratorBundle(model, tokenizer, config, description["clip_dim"])


def make_tokenizer(config: GeneratorConfig, sentences: Sequence[str]) -> TextTokenizer:
    if config.tokenizer == "corpus":
        return train_tokenizer(sentences, config.vocab_size, [END_OF_TEXT])
    field = "language_model" if config.tokenizer == "pretrained" else "tokenizer"
    return load_tokenizer(getattr(config, field), f"generator.{field}", [END_OF_TEXT])


def generator_identity(config: GeneratorConfig, records: Path | None = None) -> dict[str, Any]:
    """`model_identities` of what a generator's settings only name."""
    return model_identities({"language_model": config.language_model, "tokenizer": config.tokenizer}, records)


def make_generator(
    config: GeneratorConfig, tokenizer: TextTokenizer, clip_dim: int, seed: int, prompt_tokens: int = 0
) -> GeneratorBundle:
    """A generator to train: the pretrained language model, or a GPT-2 of the config's sizes, weights from `seed`.

    Raises `InputError` where the language model has no room for prompt, prefix and caption.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language_model = _language_model(config, tokenizer, prompt_tokens)
        model = assemble(language_model, config, tokenizer, clip_dim)
    positions = getattr(language_model.config, "max_position_embeddings", None)
    if prompt_tokens and positions and positions < prompt_tokens + config.prefix_length + config.max_length:
        raise InputError(
            f"prompt.tokens={prompt_tokens} is too long: the language model has {positions} positions, of which prefix "
            f"and caption take {config.prefix_length + config.max_length}"
        )
    return GeneratorBundle(model, tokenizer, config, clip_dim)


def _language_model(config: GeneratorConfig, tokenizer: TextTokenizer, prompt_tokens: int) -> PreTrainedModel:
    if config.language_model == "scratch":
        end = tokenizer.id_of(END_OF_TEXT)
        sizes: dict[str, Any] = {"n_layer": config.layers, "n_embd": config.width, "n_head": config.heads}
        # corpus sentences may be longer than captions are allowed to be
        positions = prompt_tokens + config.prefix_length + max(SCRATCH_POSITIONS, config.max_length)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_positions=positions, bos_token_id=end, eos_token_id=end, **sizes)
        )
    load, name = AutoModelForCausalLM.from_pretrained, config.language_model
    return load_pretrained(load, name, "generator.language_model", "language model", dtype=torch.float32)


def assemble(
    language_model: PreTrainedModel, config: GeneratorConfig, tokenizer: TextTokenizer, clip_dim: int
) -> CaptionGenerator:
    """This language model behind a fresh mapper, as the config describes it."""
    width = cast(nn.Embedding, language_model.get_input_embeddings()).embedding_dim
    if config.mapper == "transformer":
        mapper = TransformerMapper(
            clip_dim, width, config.prefix_length, config.clip_length, config.mapper_layers, config.mapper_heads
        )
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
