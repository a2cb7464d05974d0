"""Noise on embeddings in the initialisation: raw, and as CapDec adds it."""

from __future__ import annotations

import pytest
import torch

from cgtgan.config import Config, InitializeConfig
from cgtgan.method.gap import noised
from cgtgan.run_identity import run_folder
from cgtgan.runtime.producers import settings_of

EMBEDDINGS = 10 * torch.randn(500, 64, generator=torch.Generator().manual_seed(0))


def test_raw_noise_is_added_to_the_vectors_as_they_are() -> None:
    drawn = torch.randn(EMBEDDINGS.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(noised(EMBEDDINGS, 0.5, "raw", 7), EMBEDDINGS + 0.5 * drawn)
    assert noised(EMBEDDINGS, 0.0, "raw", 7) is EMBEDDINGS


def test_unit_noise_is_that_of_capdec() -> None:
    """noise_injection of CapDec's program: normalise, add sqrt(variance) * N, normalise."""
    drawn = torch.randn(EMBEDDINGS.shape, generator=torch.Generator().manual_seed(7))
    by_hand = EMBEDDINGS / EMBEDDINGS.norm(dim=-1, keepdim=True) + 0.016**0.5 * drawn
    by_hand = by_hand / by_hand.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(noised(EMBEDDINGS, 0.016**0.5, "unit", 7), by_hand)
    # 64 numbers with a variance of 0.016 make a vector as long as the embedding itself
    cosine = torch.nn.functional.cosine_similarity(by_hand, EMBEDDINGS).mean().item()
    assert cosine == pytest.approx(0.70, abs=0.02)


def test_unit_noise_does_not_depend_on_the_length_of_the_vectors_and_raw_noise_does() -> None:
    torch.testing.assert_close(noised(EMBEDDINGS, 0.1, "unit", 7), noised(3 * EMBEDDINGS, 0.1, "unit", 7))
    lengths = noised(EMBEDDINGS, 0.0, "unit", 7).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(500))


def test_the_default_changes_no_name_and_no_fingerprint() -> None:
    plain, unit = Config(), Config()
    unit.initialize.noise = "unit"
    assert "noise" not in settings_of(InitializeConfig())
    assert settings_of(unit.initialize)["noise"] == "unit"
    assert run_folder(unit) != run_folder(plain)
    for cfg in (plain, unit):
        cfg.initialize.noise_std, cfg.train.kl_weight = 0.126, 0.1
    assert run_folder(plain).parent.name.endswith("_k5_noise0.126_kl0.1")
    assert run_folder(unit).parent.name.endswith("_k5_noise0.126_unit_kl0.1")
    plain.train.kl = "k2"
    assert run_folder(plain).parent.name.endswith("_k5_noise0.126_kl0.1_k2")
