"""Attention over the corpus: against the golden numbers, against float64, at its edges, and in constant memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cgtgan.errors import InputError
from cgtgan.method.aggregation import (
    aggregate_at_temperatures,
    aggregate_nearest,
    aggregate_part,
    aggregate_text_embeddings,
    nearest_texts,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def golden(shared: Path) -> Any:
    return np.load(shared / "golden/aggregation.npz")


def exact(images: Tensor, texts: Tensor, t: float) -> Tensor:
    """The formula, word for word, in float64."""

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-300)

    return torch.softmax(t * unit(images.double()) @ unit(texts.double()).T, dim=1) @ texts.double()


def relative_error(found: Tensor, expected: Any) -> float:
    expected = torch.as_tensor(expected)
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("t", [50, 100, 175])
@pytest.mark.parametrize(("dtype", "answer"), [("f16", "exact_f64_t"), ("f32", "exact_f32in_f64_t")])
@pytest.mark.parametrize("chunk_bytes", [16 * 768 * 100, 256 * 2**20])
def test_golden(golden: Any, dtype: str, answer: str, t: int, chunk_bytes: int) -> None:
    found = aggregate_text_embeddings(
        torch.tensor(golden[f"img_{dtype}"]), torch.tensor(golden[f"cap_{dtype}"]), t, chunk_bytes=chunk_bytes
    )
    assert found.dtype == torch.float32
    assert relative_error(found, golden[f"{answer}{t}"]) <= 3e-8 * t


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    texts=st.integers(1, 300),
    dim=st.integers(1, 24),
    t=st.one_of(st.sampled_from([0.0, 1.0, 100.0, 709.0, 10000.0]), st.floats(0, 10000)),
    chunk_bytes=st.sampled_from([1, 5000, 40000, 256 * 2**20]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_equals_a_float64_softmax(
    rows: int, texts: int, dim: int, t: float, chunk_bytes: int, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, dim, generator=random).to(dtype)
    text = (3 * torch.randn(texts, dim, generator=random)).to(dtype)
    found = aggregate_text_embeddings(image, text, t, chunk_bytes=chunk_bytes)
    assert found.shape == (rows, dim)
    assert found.dtype == torch.float32
    # a cosine in float32 is good to about 1e-7, and t times that is the relative error of a weight
    bound = (1e-6 + 3e-7 * t) * float(text.double().abs().max())
    assert float((found.double() - exact(image.float(), text.float(), t)).abs().max()) <= bound


@pytest.mark.parametrize("t", [0.0, 3.0, 150.0, 10000.0])
def test_tiles_change_nothing(t: float) -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(9, 32), torch.randn(1000, 32)
    whole = aggregate_text_embeddings(images, texts, t)
    for chunk_bytes in (1, 16 * 32 * 70, 16 * 32 * 333, 16 * 32 * 999):
        torch.testing.assert_close(
            aggregate_text_embeddings(images, texts, t, chunk_bytes=chunk_bytes), whole, rtol=0, atol=2e-6 + 2e-7 * t
        )


def test_zero_temperature_is_the_mean() -> None:
    torch.manual_seed(1)
    texts = torch.randn(400, 8) + 2
    found = aggregate_text_embeddings(torch.randn(3, 8), texts, 0, chunk_bytes=1)
    torch.testing.assert_close(found, texts.mean(dim=0).expand(3, 8), rtol=1e-6, atol=1e-6)


def test_large_temperature_is_the_nearest() -> None:
    torch.manual_seed(2)
    texts = 5 * torch.linalg.qr(torch.randn(16, 16))[0]
    nearest = torch.tensor([3, 0, 15, 7])
    images = texts[nearest] + 0.1 * torch.randn(4, 16)
    torch.testing.assert_close(aggregate_text_embeddings(images, texts, 10000), texts[nearest], rtol=0, atol=1e-5)


def test_values_are_not_normalised() -> None:
    """Two sentences of one direction and different lengths weigh the same, and their lengths stay."""
    found = aggregate_text_embeddings(torch.tensor([[0.5, 0.0]]), torch.tensor([[2.0, 0.0], [6.0, 0.0]]), 100)
    torch.testing.assert_close(found, torch.tensor([[4.0, 0.0]]))


def test_duplicates_weigh_twice() -> None:
    a, b = [1.0, 0.0], [0.6, 0.8]
    found = aggregate_text_embeddings(torch.tensor([[1.0, 0.0]]), torch.tensor([a, b, a, a]), 2.0)
    w = 3 * np.exp(2.0) / (3 * np.exp(2.0) + np.exp(1.2))
    torch.testing.assert_close(found, torch.tensor([[w + (1 - w) * 0.6, (1 - w) * 0.8]], dtype=torch.float32))


def test_zero_vectors_have_cosine_zero() -> None:
    texts = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    found = aggregate_text_embeddings(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), texts, 1.0)
    torch.testing.assert_close(found[0], texts.mean(dim=0))
    weights = torch.softmax(torch.tensor([0.0, 1.0, 0.0]), dim=0)
    torch.testing.assert_close(found[1], weights @ texts)


def test_no_images_give_no_rows() -> None:
    assert aggregate_text_embeddings(torch.empty(0, 4), torch.ones(3, 4), 100).shape == (0, 4)


@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["image", "text"])
def test_a_row_that_is_not_finite_is_named(which: str, bad: float, chunk_bytes: int) -> None:
    embeddings = {"image": torch.ones(90, 4), "text": torch.ones(200, 4)}
    embeddings[which][77, 2] = bad
    with pytest.raises(InputError, match=rf"{which} embedding 77 .*not finite"):
        aggregate_text_embeddings(embeddings["image"], embeddings["text"], 100, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize(
    ("images", "texts", "t", "sentence"),
    [
        ((2, 4), (3, 5), 100, r"\(2, 4\) and \(3, 5\)"),
        ((4,), (3, 4), 100, r"\(4,\) and \(3, 4\)"),
        ((2, 4), (3, 4, 1), 100, r"do not fit"),
        ((2, 4), (0, 4), 100, "corpus has no embeddings"),
        ((2, 4), (3, 4), -1, "t=-1.0 is not accepted"),
        ((2, 4), (3, 4), float("nan"), "t=nan is not accepted"),
        ((2, 4), (3, 4), float("inf"), "t=inf is not accepted"),
    ],
)
def test_wrong_input_is_refused(images: tuple[int, ...], texts: tuple[int, ...], t: float, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        aggregate_text_embeddings(torch.ones(images), torch.ones(texts), t)


def test_no_gradient_and_inputs_untouched() -> None:
    images, texts = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    before = texts.clone()
    assert not aggregate_text_embeddings(images, texts, 100).requires_grad
    assert torch.equal(texts, before)


# ------------------------------------------------------------------------------------- parts, temperatures, the nearest


@pytest.mark.parametrize("shape", ["spread", "cone", "near"])
def test_the_error_stays_below_what_was_promised(shape: str) -> None:
    """Relative to float64, at most 3e-8 x max(t, 100), also where one or two sentences decide."""
    for seed in range(6):
        random = torch.Generator().manual_seed(seed)
        for dim in (16, 64, 512):
            texts = torch.randn(700, dim, generator=random)
            images = torch.randn(24, dim, generator=random)
            if shape == "cone":
                axis = torch.randn(dim, generator=random)
                texts, images = axis + 0.5 * texts, axis + 0.5 * images
            elif shape == "near":
                images = texts[:24] + 0.7 * images
            for t in (0, 50, 100, 175, 1000, 10000):
                found = aggregate_text_embeddings(images, texts, t)
                assert relative_error(found, exact(images, texts, t)) <= 3e-8 * max(t, 100), (seed, dim, t)


def test_parts_of_the_corpus_merge_to_the_whole() -> None:
    torch.manual_seed(3)
    images, texts = torch.randn(20, 48), torch.randn(900, 48) + 1
    temperatures = [0.0, 30.0, 100.0, 10000.0]
    parts = [aggregate_part(images, texts[a:b], temperatures, first_text=a) for a, b in ((0, 1), (1, 300), (300, 900))]
    a, b, c = parts
    whole = torch.stack([exact(images, texts, t) for t in temperatures])
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        for found, expected, t in zip(merged.result(), whole, temperatures, strict=True):
            assert relative_error(found, expected) <= 3e-8 * max(t, 100)
    # merging itself loses nothing: any order, the same numbers
    left, right = a.merge(b).merge(c), c.merge(b).merge(a)
    assert torch.equal(left.highest, right.highest)
    torch.testing.assert_close(left.weighted / left.total, right.weighted / right.total, rtol=1e-13, atol=1e-13)


def test_several_temperatures_are_the_single_ones() -> None:
    torch.manual_seed(4)
    images, texts = torch.randn(9, 32), torch.randn(5000, 32)
    temperatures = [100.0, 0.0, 175.0, 100.0, 3.0]
    found = aggregate_at_temperatures(images, texts, temperatures, chunk_bytes=2**20)
    assert found.shape == (5, 9, 32)
    for one, t in zip(found, temperatures, strict=True):
        assert relative_error(one, exact(images, texts, t)) <= 3e-8 * max(t, 100)


@pytest.mark.parametrize("chunk_bytes", [1, 2**18, 2**28])
@pytest.mark.parametrize("k", [1, 5, 64, 3000, 10_000])
def test_the_nearest_sentences_alone(k: int, chunk_bytes: int) -> None:
    torch.manual_seed(5)
    images, texts = torch.randn(7, 24), torch.randn(3000, 24) + 0.5
    unit = torch.nn.functional.normalize
    cosines = unit(images.double()) @ unit(texts.double()).T
    top = cosines.topk(min(k, 3000), dim=1)
    temperatures = [0.0, 20.0, 300.0]
    found, dropped = aggregate_nearest(images, texts, temperatures, k, chunk_bytes=chunk_bytes)
    for i, t in enumerate(temperatures):
        expected = torch.einsum("nk,nkd->nd", torch.softmax(t * top.values, dim=1), texts.double()[top.indices])
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-6, atol=1e-6)
        missing = 1 - torch.softmax(t * cosines, dim=1).gather(1, top.indices).sum(dim=1)
        torch.testing.assert_close(dropped[i].double(), missing, rtol=0, atol=1e-4)
    assert torch.equal(nearest_texts(images, texts, k, chunk_bytes=chunk_bytes)[:, :5], top.indices[:, :5])


def test_sizes_far_from_one_change_no_cosine() -> None:
    """Squares of such numbers overflow or vanish in float32."""
    torch.manual_seed(6)
    images, texts = torch.randn(5, 16), torch.randn(200, 16)
    usual = aggregate_text_embeddings(images, texts, 50.0)
    for scale in (1e-25, 1e25):
        torch.testing.assert_close(aggregate_text_embeddings(images * scale, texts, 50.0), usual, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            aggregate_text_embeddings(images, texts * scale, 50.0) / scale, usual, rtol=1e-5, atol=1e-5
        )


PEAK = """
import resource, sys
import torch
from safetensors import safe_open
from cgtgan.method.aggregation import aggregate_text_embeddings
images = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
for path in (sys.argv[1], sys.argv[1], sys.argv[2]):
    with safe_open(path, framework="pt") as f:
        found = aggregate_text_embeddings(images, f.get_tensor("embeddings"), 100, chunk_bytes=2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Ten times the corpus: peak memory may grow by the pages of the mapped file, not by a float32 copy (46 MiB)."""
    from safetensors.torch import save_file

    small, large = 20_000, 200_000
    for rows in (small, large):
        vectors = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).half()
        save_file({"embeddings": vectors}, tmp_path / f"{rows}.safetensors")
    paths = [str(tmp_path / f"{rows}.safetensors") for rows in (small, large)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *paths], env=environment, capture_output=True, text=True, check=True
    )
    _, before, after = (int(line) * 1024 for line in done.stdout.split())
    mapped = (large - small) * 64 * 2
    assert after - before <= mapped + 8 * 2**20
