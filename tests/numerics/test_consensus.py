"""Consensus with the nearest sentences, against pycocoevalcap's CIDEr-D with one reference per image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider

from cgtgan.config import RewardTermConfig, RewardWeightsConfig
from cgtgan.method.consensus import Consensus, SentenceTable, consensus_sentences, words_of
from cgtgan.method.gap import closed_gap
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
    consensus, each = Consensus(SENTENCES, [[i] for i in range(6)]), cider_of_each(caption)
    alone = consensus.scores([caption] * 6, torch.arange(6)[:, None])
    torch.testing.assert_close(alone, each, rtol=1e-5, atol=1e-6)
    pair = consensus.scores([caption, caption], torch.tensor([[0, 1], [4, 2]]))
    torch.testing.assert_close(pair, torch.stack([each[:2].mean(), each[[4, 2]].mean()]), rtol=1e-5, atol=1e-6)


def test_the_sentence_itself_earns_the_most() -> None:
    scores = Consensus(SENTENCES, [[i] for i in range(6)]).scores([*SENTENCES], torch.tensor([[2]] * 6))
    assert scores.argmax() == 2
    assert scores[2] == pytest.approx(10.0, rel=1e-5)  # every n-gram of each length is shared
    assert scores[1] == pytest.approx(0.0, abs=0.2)


def test_as_a_term_it_counts_in_the_units_of_the_logit_scale_and_only_for_drawn_captions() -> None:
    ones = torch.ones(2, 3)
    weights = RewardWeightsConfig(terms={"cos": 0.0, "l1": 0.0, "consensus": RewardTermConfig(0.5)})
    drawn = RewardInputs(["a", "b"], ones, ones, ones, 100.0, consensus=torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(weighted_terms(weights, {}, drawn)["semantic"], torch.tensor([10.0, 0.0]))
    assert "consensus" not in weighted_terms(weights, {}, RewardInputs(["a", "b"], ones, ones, ones))


def test_the_table_gives_cider_of_each_pair_as_pycocoevalcap_has_it() -> None:
    documents = np.array([[0, 1], [2, 3], [4, 0], [5, 2]])
    table, consensus = SentenceTable.of(SENTENCES, documents), Consensus(SENTENCES, documents.tolist())
    rows = torch.tensor([0, 3, 1, 2])
    for other in range(4):
        weights = torch.nn.functional.one_hot(torch.tensor(other), 4).float()
        for row, value in zip(rows.tolist(), table.agreement(rows, weights), strict=True):
            mine, theirs = (consensus.weights(SENTENCES[i]) for i in (row, int(rows[other])))
            dots = [sum(a[g] * b.get(g, 0) for g in a) for a, b in zip(mine[0], theirs[0], strict=True)]
            cosines = [d / (m * t) for d, m, t in zip(dots, mine[1], theirs[1], strict=True) if m and t]
            assert value == pytest.approx(sum(cosines) / 4, rel=1e-5, abs=1e-7)
    both = table.agreement(rows, torch.tensor([0.25, 0.0, 0.75, 0.0]))
    one, two = (table.agreement(rows, torch.eye(4)[i]) for i in (0, 2))
    torch.testing.assert_close(both, 0.25 * one + 0.75 * two)


def test_the_sentence_that_agrees_most_is_found_and_an_image_read_as_the_mean_of_them() -> None:
    table = SentenceTable.of(SENTENCES, np.array([[0], [1], [2], [3], [4], [5]]))
    vectors = torch.eye(8)[:6]
    image = vectors[[0, 1, 4]].sum(0) + 0.01 * vectors[5]  # near the three sentences about dogs
    (rows,) = consensus_sentences(image[None], vectors, table, 5)
    weights = torch.softmax(50 * torch.nn.functional.cosine_similarity(image[None], vectors), dim=0)
    agreement = table.agreement(torch.arange(6), weights)
    assert rows.tolist() == agreement.topk(5).indices.tolist()
    assert set(rows[:3].tolist()) == {0, 1, 4}
    read = closed_gap("agreement", image[None], vectors, table=table).images(image[None])
    torch.testing.assert_close(read, vectors[rows].mean(0, keepdim=True))
