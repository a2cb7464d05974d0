"""The authors' `model.pt` as our generator: every size comes from the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from cgtgan.config import GeneratorConfig
from cgtgan.errors import InputError
from cgtgan.models.generator_bundle import GeneratorBundle, assemble, make_tokenizer
from cgtgan.models.tokenizers import END_OF_TEXT

HEAD_WIDTH = 64  # of every GPT-2


def load_released_generator(state: Mapping[str, Tensor], config: GeneratorConfig, name: str) -> GeneratorBundle:
    """`state`: `gpt.*` and `clip_project.*` of `data.released.read_model`; `config`: what the weights do not tell.

    That is the tokenizer, the caption length, the mapper's heads and, for `language_model: scratch`, the heads (else 64
    numbers per head, as in every GPT-2). Raises `InputError`, starting with `name`, for other keys or sizes.
    """
    try:
        words, positions = state["gpt.transformer.wte.weight"], state["gpt.transformer.wpe.weight"]
        width = words.shape[1]
        mapper = _mapper(state, width)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise InputError(
            f"{name} is no generator of the authors': {error} is missing; its keys are gpt.* and clip_project.*"
        ) from None
    layers = _count(state, r"gpt\.transformer\.h\.(\d+)\.")
    config = replace(config, layers=layers, width=width, **mapper)
    heads = _heads(config, width)
    config = replace(config, heads=heads)
    tokenizer = make_tokenizer(config, [])
    if len(tokenizer) > len(words):
        raise InputError(
            f"{name} has {len(words)} words and generator.tokenizer has {len(tokenizer)}: they do not belong together"
        )
    if config.prefix_length + config.max_length > len(positions):
        raise InputError(
            f"{name} has {len(positions)} positions: generator.max_length={config.max_length} after "
            f"{config.prefix_length} of the prefix does not fit"
        )
    end = tokenizer.id_of(END_OF_TEXT)
    sizes: dict[str, Any] = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": len(positions)}
    try:
        language_model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), bos_token_id=end, eos_token_id=end, **sizes))
        model = assemble(language_model, config, tokenizer, _clip_dim(state))
        keys = model.load_state_dict(dict(state), strict=False)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{name} does not fit generator.heads={heads}, mapper_heads={config.mapper_heads}: {error}"
        ) from None
    # the output layer is the word embedding, stored a second time or not at all
    missing = [key for key in keys.missing_keys if key != "gpt.lm_head.weight"]
    wrong = [f"lacks {', '.join(missing[:3])}"] if missing else []
    wrong += [f"also has {', '.join(keys.unexpected_keys[:3])}"] if keys.unexpected_keys else []
    if wrong:
        raise InputError(f"{name} is no generator of the authors': it {' and '.join(wrong)}")
    if "gpt.lm_head.weight" in state and not torch.equal(state["gpt.lm_head.weight"], words):
        raise InputError(f"{name}: gpt.lm_head.weight differs from the word embedding; in a GPT-2 they are one")
    return GeneratorBundle(model.float(), tokenizer, config, _clip_dim(state))


def _heads(config: GeneratorConfig, width: int) -> int:
    """From the config where it describes this model (`scratch`, or a folder with a config.json of that width)."""
    folder = Path(config.language_model).expanduser()
    if (folder / "config.json").is_file():
        described = AutoConfig.from_pretrained(folder)
        if described.hidden_size == width:
            return described.num_attention_heads
    return config.heads if config.language_model == "scratch" or width % HEAD_WIDTH else width // HEAD_WIDTH


def _clip_dim(state: Mapping[str, Tensor]) -> int:
    mlp = "clip_project.model.0.weight"
    return state[mlp if mlp in state else "clip_project.linear.weight"].shape[1]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Layers: 1 + the highest number in the keys that match `pattern`."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def _mapper(state: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """The mapper's settings, from the shapes of its weights."""
    if "clip_project.model.0.weight" in state:
        return {"mapper": "mlp", "prefix_length": len(state["clip_project.model.2.bias"]) // width}
    return {
        "mapper": "transformer",
        "prefix_length": len(state["clip_project.prefix_const"]),
        "clip_length": len(state["clip_project.linear.bias"]) // width,
        "mapper_layers": _count(state, r"clip_project\.transformer\.layers\.(\d+)\."),
    }
