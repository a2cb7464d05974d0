"""The options beyond the paper, against values computed by hand: gap closures, terms, normalised advantages, losses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cgtgan.assets.gap import load_gap, save_gap
from cgtgan.config import RewardTermConfig, RewardWeightsConfig
from cgtgan.errors import InputError
from cgtgan.method.aggregation import aggregate_text_embeddings
from cgtgan.method.consensus import SentenceTable
from cgtgan.method.gap import Gap, closed_gap
from cgtgan.method.reinforce import normalised
from cgtgan.method.reward_terms import TERMS, RewardInputs
from cgtgan.models.discriminator import naturalness_rewards, pairwise_loss
from cgtgan.training.rewards import weighted_terms

IMAGES = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
SENTENCES = torch.tensor([[1.0, 0.0], [5.0, 12.0], [0.0, 3.0]])


def test_mean_and_mean_std_of_two_images_and_three_sentences() -> None:
    picture = torch.tensor([[1.0, 1.0]])
    mean = closed_gap("mean", IMAGES, SENTENCES)  # means (1.5, 3) and (2, 5)
    torch.testing.assert_close(mean.images(picture.half()), torch.tensor([[1.5, 3.0]]))
    both = closed_gap("mean_std", IMAGES, SENTENCES)  # deviations (1.5, 1) and (sqrt(14/3), sqrt(26))
    wanted = torch.tensor([[2 - 0.5 * math.sqrt(14 / 3) / 1.5, 5 - 2 * math.sqrt(26)]])
    torch.testing.assert_close(both.images(picture), wanted)
    moved = both.images(IMAGES)
    torch.testing.assert_close(moved.mean(0), SENTENCES.mean(0))
    torch.testing.assert_close(moved.std(0, correction=0), SENTENCES.std(0, correction=0))
    for gap in (mean, both):
        assert not gap.changes_texts
        assert torch.equal(gap.texts(SENTENCES), SENTENCES)


def test_a_number_that_is_the_same_in_every_image_is_moved_and_not_scaled() -> None:
    images = torch.tensor([[1.0, 4.0], [1.0, 2.0]])
    found = closed_gap("mean_std", images, SENTENCES).images(torch.tensor([[1.5, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([[2.5, 5.0]]))


def test_c3_centres_both_kinds_after_they_are_normalised() -> None:
    gap = closed_gap("c3", IMAGES, SENTENCES)
    torch.testing.assert_close(gap.images(torch.tensor([[30.0, 40.0]])), torch.tensor([[0.3, -0.1]]))
    centre = torch.tensor([1 + 5 / 13, 12 / 13 + 1]) / 3
    torch.testing.assert_close(gap.texts(torch.tensor([[0.0, 7.0]])), torch.tensor([[0.0, 1.0]]) - centre)
    assert gap.changes_texts


def test_projection_reads_the_corpus_as_the_image_sees_it() -> None:
    gap = closed_gap("projection", IMAGES, SENTENCES, 10.0)
    wanted = aggregate_text_embeddings(IMAGES, SENTENCES, 10.0)
    torch.testing.assert_close(gap.images(IMAGES), wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="projection"):
        closed_gap("projection", IMAGES, SENTENCES)


@pytest.mark.parametrize("kind", ["none", "mean", "mean_std", "c3", "projection", "agreement"])
def test_a_closure_is_kept_beside_the_weights(tmp_path: Path, kind: str) -> None:
    table = SentenceTable.of(["A dog runs.", "A dog sits.", "Two cats."], np.array([[0, 1], [2, 1]]))
    gap = closed_gap(kind, IMAGES, SENTENCES, 20.0, table)
    save_gap(tmp_path, gap)
    assert (tmp_path / "gap.safetensors").exists() == (kind != "none")
    again = load_gap(tmp_path)
    assert (again.kind, again.unit, again.t) == (gap.kind, gap.unit, gap.t)
    assert torch.equal(again.images(IMAGES), gap.images(IMAGES))
    assert torch.equal(again.texts(SENTENCES), gap.texts(SENTENCES))


def test_a_damaged_closure_is_named(tmp_path: Path) -> None:
    save_gap(tmp_path, closed_gap("mean", IMAGES, SENTENCES))
    path = tmp_path / "gap.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"gap\.safetensors is not whole"):
        load_gap(tmp_path)


def inputs(**likelihoods: Tensor) -> RewardInputs:
    text = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    image = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    pool = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, 0.8]])
    return RewardInputs(["a", "b"], text, image, image, 10.0, pool, **likelihoods)


def test_pmi_is_clips_own_posterior() -> None:
    first = 1 - math.log((math.exp(10) + math.exp(0) + math.exp(6)) / 3) / 10
    second = 0.8 - math.log((math.exp(0) + math.exp(-10) + math.exp(8)) / 3) / 10
    assert TERMS["pmi"](inputs()).tolist() == pytest.approx([first, second], rel=1e-5)
    alike = RewardInputs(["a"], torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2), 10.0, torch.ones(4, 2))
    assert TERMS["pmi"](alike).tolist() == pytest.approx([0.0], abs=1e-6)  # fits every image alike: earns nothing


def test_likelihood_terms_have_scale_1_and_are_left_out_where_nobody_drew() -> None:
    drawn = inputs(
        log_prior=torch.tensor([-4.0, -9.0]), log_policy=torch.tensor([-2.0, -1.0]), tokens=torch.tensor([2.0, 3.0])
    )
    terms = {name: RewardTermConfig(0.0) for name in ("cos", "l1")}
    terms |= {"prior": RewardTermConfig(0.1), "fluency": RewardTermConfig(2.0), "entropy": RewardTermConfig(0.5)}
    found = weighted_terms(RewardWeightsConfig(terms=dict(terms)), {}, drawn)
    assert found["prior"].tolist() == [-4.0, -9.0]
    assert found["fluency"].tolist() == [-2.0, -3.0]
    assert found["entropy"].tolist() == [2.0, 1.0]
    assert found["semantic"].tolist() == pytest.approx([-0.4 - 4 + 1, -0.9 - 6 + 0.5])
    assert weighted_terms(RewardWeightsConfig(terms=dict(terms)), {}, inputs()).keys() == {
        "cos", "l1", "clip", "semantic",
    }  # fmt: skip


def test_normalised_advantages_have_no_unit() -> None:
    advantages = torch.tensor([[1.0, 3.0], [-2.0, 2.0]])
    group = normalised(advantages, "group")
    assert group.tolist() == [pytest.approx([1.0, 3.0], rel=1e-5), pytest.approx([-1.0, 1.0], rel=1e-5)]
    deviation = math.sqrt((1 + 9 + 4 + 4) / 4 - 1)
    batch = normalised(advantages, "batch")
    torch.testing.assert_close(batch, advantages / deviation)
    moments = (torch.tensor(0.0), torch.tensor(16.0))  # of a whole step
    torch.testing.assert_close(normalised(advantages, "batch", moments), advantages / 4)
    for norm in ("group", "batch"):
        torch.testing.assert_close(normalised(100 * advantages, norm), normalised(advantages, norm))
        assert normalised(torch.zeros(2, 2), norm).tolist() == [[0, 0], [0, 0]]
    assert normalised(advantages, "none") is advantages


def test_pairwise_loss() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.5])
    by_hand = -(math.log(1 / (1 + math.exp(-1))) + math.log(1 / (1 + math.exp(0.5)))) / 2
    assert pairwise_loss(real, fake).item() == pytest.approx(by_hand, rel=1e-6)


def test_what_the_generator_is_paid_for_a_logit() -> None:
    logits = torch.tensor([2.0, -1.0, 0.0, 0.0, 1.0, 0.0])  # two images with two samples; then a greedy caption each
    assert naturalness_rewards(logits, "logit", 2) is logits
    assert naturalness_rewards(logits, "probability", 2).tolist() == pytest.approx(
        [1 / (1 + math.exp(-v)) for v in logits.tolist()]
    )
    assert naturalness_rewards(logits, "binary", 2).tolist() == [1, 0, 0, 0, 1, 0]
    # image 1: 2, -1 and greedy 1; image 2: three alike
    assert naturalness_rewards(logits, "rank", 2).tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5]


def test_an_open_gap_changes_nothing() -> None:
    assert torch.equal(Gap().images(IMAGES.half()), IMAGES)
    assert not Gap().changes_texts
