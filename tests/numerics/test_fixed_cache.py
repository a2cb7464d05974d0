"""Keys and values in buffers of fixed size, as they are and as one traced graph, against the cache that grows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from cgtgan.errors import InputError
from cgtgan.models.fixed_cache import FixedCache, check_fits
from cgtgan.models.generator import CaptionGenerator, Captions
from cgtgan.models.prompted import Prompted, Read
from tests.numerics.test_generator import DIM, FAMILIES, STOP, check_same, inputs, make, some_seeds, up_to_stop

ROWS, SAMPLES, LONG = 6, 3, 20


@pytest.fixture(autouse=True)
def no_old_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


def model_of(family: str = "gpt2") -> CaptionGenerator:
    """Some captions stop at once, some never."""
    model = make(0, family)
    head = model.gpt.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight[STOP] *= 2
    return model


def everything(model: CaptionGenerator, x: Read) -> list[Captions]:
    seeds = some_seeds(len(x), SAMPLES)
    warm = model.sample(x, SAMPLES, seeds=seeds, temperature=0.7, max_length=LONG)
    return [*model.sample_and_greedy(x, seeds), warm, model.greedy(x), model.beam(x, 3), model.beam(x, 1)]


def check_all_same(found: list[Captions], expected: list[Captions]) -> None:
    for a, b in zip(found, expected, strict=True):
        check_same(a, b)


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_static_is_growing(family: str, prompt: int) -> None:
    """Mistral's window of 6 positions is narrower than prompt, prefix and caption."""
    model = model_of(family)
    words = torch.randint(14, 60, (ROWS, prompt), generator=torch.Generator().manual_seed(1))
    x = Prompted(inputs(ROWS), words) if prompt else inputs(ROWS)
    expected = everything(model, x)
    lengths = up_to_stop(expected[2].drawn).sum(-1)
    assert len(lengths.unique()) > 4
    model.decode_cache = "static"
    check_all_same(everything(model, x), expected)
    assert len(model.greedy(x[:0]).drawn) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_compiled_is_growing_in_one_graph_that_serves_fewer_rows_and_other_weights(family: str) -> None:
    """`fullgraph` has raised where the step breaks into several graphs; the stance raises where it is traced again."""
    model, x = model_of(family), inputs(ROWS)
    expected = everything(model, x)
    model.decode_cache = "compiled"
    seeds = some_seeds(ROWS, SAMPLES)
    check_same(model.sample(x, SAMPLES, seeds=seeds, temperature=0.7, max_length=LONG), expected[2])
    with torch.compiler.set_stance("fail_on_recompile"):
        check_all_same([model.greedy(x), model.beam(x, 3)], [expected[3], expected[4]])
        check_same(model.greedy(x[2:3]), Captions(*(c[2:3] for c in expected[3])))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)
        changed = model.greedy(x)
    model.decode_cache = "growing"
    check_same(changed, model.greedy(x))
    assert not torch.equal(changed.log_probs, expected[3].log_probs)


def test_more_rows_and_another_precision_take_new_buffers() -> None:
    model, x = model_of(), inputs(ROWS)
    expected, fewer = model.greedy(x), model.greedy(x[:2])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.greedy(x[:2])
    model.decode_cache = "compiled"
    check_same(model.greedy(x[:2]), fewer)
    first = model._compiled
    check_same(model.greedy(x), expected)
    second = model._compiled
    assert second is not first
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.greedy(x[:2]).log_probs, rounded.log_probs, rtol=0.02, atol=0.02)
    assert model._compiled is not second
    check_same(model.greedy(x), expected)


def test_a_copy_starts_without_buffers() -> None:
    model, x = model_of(), inputs(ROWS)
    model.decode_cache = "compiled"
    expected = model.greedy(x)
    other = copy.deepcopy(model)
    assert isinstance(model._compiled, FixedCache)
    assert other._compiled is None
    check_same(other.greedy(x), expected)


def test_a_gradient_through_the_drawing_pass_takes_the_growing_cache() -> None:
    model, x = model_of(), inputs(ROWS)

    def gradient() -> Tensor:
        model.zero_grad()
        model.sample_with_graph(x, some_seeds(ROWS, SAMPLES)).log_probs.sum().backward()
        found = model.clip_project.get_parameter("model.0.weight").grad
        assert found is not None
        return found

    expected = gradient().clone()
    model.decode_cache = "static"
    assert torch.equal(gradient(), expected)
    assert float(expected.abs().max()) > 0


def test_what_does_not_fit_is_one_sentence() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 20}
    with pytest.raises(InputError, match=r"decode.cache=static does not fit .* a MambaForCausalLM, .*=growing$"):
        check_fits(MambaForCausalLM(MambaConfig(**sizes)), "static")
    model = model_of("opt")
    model.decode_cache = "compiled"
    with pytest.raises(InputError, match=r"cannot compile .* OPTForCausalLM .*set decode.cache=static or growing"):
        model.greedy(torch.zeros(2, DIM))
