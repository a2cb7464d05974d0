"""Consensus with the nearest sentences, against pycocoevalcap's CIDEr-D with one reference per image."""

from __future__ import annotations

import pytest
import torch
from pycocoevalcap.cider.cider import Cider

from cgtgan.config import RewardTermConfig, RewardWeightsConfig
from cgtgan.method.consensus import Consensus, words_of
from cgtgan.method.reward_terms import RewardInputs
from cgtgan.training.rewards import weighted_terms

SENTENCES = [
    "A dog runs over the snow.", "Two dogs run through snow with a stick.", "A man rides a red bike.",
    "The man's bike is red!", "A dog.", "A child in a red shirt jumps into a pool.",
]  # fmt: skip
CAPTIONS = ["A dog runs through the snow.", "A man rides a bike, a red bike.", "Nothing alike here.", "A dog.", "."]


def cider_of_each(caption: str) -> torch.Tensor:
    """(M,) CIDEr-D of the caption with each sentence alone, the sentences being all documents, 1 for 100 points."""
    references = {i: [" ".join(words_of(s))] for i, s in enumerate(SENTENCES)}
    each = Cider().compute_score(references, {i: [" ".join(words_of(caption))] for i in references})[1]
    return torch.tensor(each, dtype=torch.float32)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_one_sentence_gives_cider_d_and_more_give_its_mean(caption: str) -> None:
    consensus, each = Consensus(SENTENCES), cider_of_each(caption)
    alone = consensus.scores([caption] * 6, torch.arange(6)[:, None])
    torch.testing.assert_close(alone, each, rtol=1e-5, atol=1e-6)
    pair = consensus.scores([caption, caption], torch.tensor([[0, 1], [4, 2]]))
    torch.testing.assert_close(pair, torch.stack([each[:2].mean(), each[[4, 2]].mean()]), rtol=1e-5, atol=1e-6)


def test_the_sentence_itself_earns_the_most() -> None:
    scores = Consensus(SENTENCES).scores([*SENTENCES], torch.tensor([[2]] * 6))
    assert scores.argmax() == 2
    assert scores[2] == pytest.approx(10.0, rel=1e-5)  # every n-gram of each length is shared
    assert scores[1] == pytest.approx(0.0, abs=0.2)


def test_as_a_term_it_counts_in_the_units_of_the_logit_scale_and_only_for_drawn_captions() -> None:
    ones = torch.ones(2, 3)
    weights = RewardWeightsConfig(terms={"cos": 0.0, "l1": 0.0, "consensus": RewardTermConfig(0.5)})
    drawn = RewardInputs(["a", "b"], ones, ones, ones, 100.0, consensus=torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(weighted_terms(weights, {}, drawn)["semantic"], torch.tensor([10.0, 0.0]))
    assert "consensus" not in weighted_terms(weights, {}, RewardInputs(["a", "b"], ones, ones, ones))
