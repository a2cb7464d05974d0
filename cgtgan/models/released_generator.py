"""The authors' `model.pt` as our generator: every size comes from the weights."""

from __future__ import annotations

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
        width, places = words.shape[1], len(positions)
        config = replace(config, width=width, **_layers_and_mapper(state, width))
        clip_dim = _clip_dim(state)
        if min(config.prefix_length, config.clip_length) < 1:
            raise InputError(f"its prefix does not hold {width} numbers")
    except KeyError as error:
        raise InputError(
            f"{name} is no generator of the authors': {error} is missing; its keys are gpt.* and clip_project.*"
        ) from None
    except (IndexError, TypeError, ZeroDivisionError) as error:  # such as a bias without a dimension
        raise InputError(f"{name} is no generator of the authors': a weight has another shape ({error})") from None
    except InputError as error:
        raise InputError(f"{name} is no generator of the authors': {error}") from None
    heads = _heads(config, width)
    config = replace(config, heads=heads)
    tokenizer = make_tokenizer(config, [])
    if len(tokenizer) > len(words):
        raise InputError(
            f"{name} has {len(words)} words and generator.tokenizer has {len(tokenizer)}: they do not belong together"
        )
    if config.prefix_length + config.max_length > places:
        raise InputError(
            f"{name} has {places} positions: generator.max_length={config.max_length} after "
            f"{config.prefix_length} of the prefix does not fit"
        )
    end = tokenizer.id_of(END_OF_TEXT)
    sizes: dict[str, Any] = {"n_layer": config.layers, "n_embd": width, "n_head": heads, "n_positions": places}
    described = GPT2Config(vocab_size=len(words), bos_token_id=end, eos_token_id=end, **sizes)
    try:
        with torch.device("meta"):  # the shapes alone: a model larger than its file is never built
            shapes = assemble(GPT2LMHeadModel(described), config, tokenizer, clip_dim).state_dict()
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{name} does not fit generator.heads={heads}, mapper_heads={config.mapper_heads}: {error}"
        ) from None
    _check_shapes(state, shapes, name)
    model = assemble(GPT2LMHeadModel(described), config, tokenizer, clip_dim)
    model.load_state_dict(dict(state), strict=False)
    if "gpt.lm_head.weight" in state and not torch.equal(state["gpt.lm_head.weight"], words):
        raise InputError(f"{name}: gpt.lm_head.weight differs from the word embedding; in a GPT-2 they are one")
    return GeneratorBundle(model.float(), tokenizer, config, clip_dim)


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


def _check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    # the output layer is the word embedding, stored a second time or not at all
    lacks = [key for key in expected if key not in state and key != "gpt.lm_head.weight"]
    wrong = [f"lacks {', '.join(lacks[:3])}"] if lacks else []
    others = [key for key in state if key not in expected]
    wrong += [f"also has {', '.join(others[:3])}"] if others else []
    if wrong:
        raise InputError(f"{name} is no generator of the authors': it {' and '.join(wrong)}")
    for key, weight in state.items():
        if weight.shape != expected[key].shape or not weight.is_floating_point():
            is_, wanted = f"{tuple(weight.shape)} {weight.dtype}", tuple(expected[key].shape)
            raise InputError(f"{name} is no generator of the authors': {key} is {is_}, numbers {wanted} are expected")


def _count(state: Mapping[str, Tensor], where: str) -> int:
    """Layers: how many different numbers follow `where` in the keys; they must count from 0."""
    numbers = {key.removeprefix(where).partition(".")[0] for key in state if key.startswith(where)}
    layers = len(numbers)
    if not layers or numbers != {str(i) for i in range(layers)}:
        raise InputError(f"its layers {where} do not count from 0")
    return layers


def _layers_and_mapper(state: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """Settings from the names and shapes of the weights."""
    layers = _count(state, "gpt.transformer.h.")
    if "clip_project.model.0.weight" in state:
        return {"layers": layers, "mapper": "mlp", "prefix_length": len(state["clip_project.model.2.bias"]) // width}
    return {
        "layers": layers,
        "mapper": "transformer",
        "prefix_length": len(state["clip_project.prefix_const"]),
        "clip_length": len(state["clip_project.linear.bias"]) // width,
        "mapper_layers": _count(state, "clip_project.transformer.layers."),
    }
