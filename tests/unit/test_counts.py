"""Corpus BLEU and METEOR from summed counts: by hand, against the scorers, and in the paired bootstrap."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from cgtgan.evaluation.bootstrap import SummedScores, SystemScores, paired_bootstrap
from cgtgan.evaluation.counts import SUMMED, bleu, bleu_counts, meteor, meteor_counts
from cgtgan.evaluation.metrics import score_captions

# "a man" against "a man rides" and "a man rides a horse": 2 of 2 words, 1 of 1 pairs; 3 is closer to 2 than 5
FIRST = [2, 3, 2, 1, 0, 0, 2, 1, 0, 0]
# "the the cat" against "the cat": "the" counts once, so 2 of 3 words; "the cat" is 1 of 2 pairs; 0 of 1 triples
SECOND = [3, 2, 2, 1, 0, 0, 3, 2, 1, 0]
# METEOR's own line for "a man rides the horses" against "a man rides a horse": 3 words match in one chunk, "a" is a
# function word; both have 5 words, 2 of them function words
STATISTICS = "5.0 5.0 2.0 2.0 2.0 2.0 1.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 3.0 3.0"
WORDS = ["a", "man", "rides", "the", "horse", "horses", "riding", "big", "large", "dog", "runs", "on"]


def test_the_counts_of_bleu_are_those_counted_by_hand() -> None:
    assert bleu_counts(2, [5, 3], [2, 1, 0, 0], [2, 1, 0, 0]) == FIRST
    assert bleu_counts(4, [5, 3], [0] * 4, [4, 3, 2, 1])[1] == 3  # as near as 5, and shorter
    captions = {1: "a man", 2: "the the cat"}
    scores = score_captions(captions, {1: ["a man rides", "a man rides a horse"], 2: ["the cat"]}, ("bleu",))
    assert {i: row["bleu"] for i, row in scores.counts.items()} == {1: FIRST, 2: SECOND}


def test_bleu_of_sums_by_hand() -> None:
    both, twice_first = np.add(FIRST, SECOND), np.multiply(FIRST, 2)
    # 4 of 5 words, 2 of 3 pairs, as long as the references together: no brevity penalty
    assert bleu(both.astype(float))[:2] == pytest.approx([0.8, math.sqrt(0.8 * 2 / 3)], abs=1e-8)
    assert SUMMED["BLEU-3"][1](both.astype(float)) == 0 < bleu(both.astype(float))[2] < 1e-4  # no triple matches
    # a draw of the first image twice: all words and pairs match, 4 words against 6
    assert bleu(twice_first.astype(float))[:2] == pytest.approx([math.exp(1 - 6 / 4)] * 2, abs=1e-8)


def test_meteor_by_hand() -> None:
    counts = np.asarray(meteor_counts(STATISTICS), dtype=float)
    mean = (0.75 * 2 + 0.25 * 1) / (0.75 * 3 + 0.25 * 2)  # precision and recall are equal, and so is their mean
    assert meteor(counts) == pytest.approx(mean * (1 - 0.6 * (1 / 3) ** 0.2))
    # another image of a single word that does not match: precision 1.75 / 3.5, recall 1.75 / 4.25
    other = np.zeros(23)
    other[:2] = 1, 2
    precision, recall = 1.75 / (2.75 + 0.75), 1.75 / (2.75 + 1.5)
    both = 1 / (0.15 / precision + 0.85 / recall) * (1 - 0.6 * (1 / 3) ** 0.2)
    assert meteor(counts + other) == pytest.approx(both)
    assert meteor(other) == 0
    whole = "2.0 2.0 1.0 1.0 1.0 1.0 1.0 1.0" + " 0.0" * 12 + " 1.0 2.0 2.0"
    assert meteor_counts(whole)[20] == 0  # one chunk that is the whole caption: no penalty
    assert meteor(np.asarray(meteor_counts(whole), dtype=float)) == pytest.approx(1)
    with pytest.raises(ValueError, match="2 statistics from METEOR, not 23"):
        meteor_counts("1.0 2.0")


def test_any_draw_has_the_bleu_of_its_images() -> None:
    draw = random.Random(0)
    captions = {i: " ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for i in range(30)}
    references = {i: [" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(2)] for i in captions}
    every = score_captions(captions, references, ("bleu",))
    picked = [draw.choice(range(30)) for _ in range(30)]
    drawn = score_captions(
        {n: captions[i] for n, i in enumerate(picked)}, {n: references[i] for n, i in enumerate(picked)}, ("bleu",)
    )
    for name, value in drawn.corpus.items():
        family, score = SUMMED[name]
        sums = np.sum([every.counts[i][family] for i in picked], axis=0, dtype=float)
        assert score(sums) == pytest.approx(value, abs=1e-5), name


def test_the_bootstrap_scores_each_resampled_set_anew() -> None:
    rng = np.random.default_rng(2)
    matched = rng.integers(0, 5, (2, 3, 40, 1))  # systems, seeds, images
    counts = np.concatenate([np.full_like(matched, 5), np.full_like(matched, 6), matched], axis=3).astype(float)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return sums[..., 2] / sums[..., 0] * np.exp(1 - sums[..., 1] / sums[..., 0])

    a, b = (SummedScores(each, ratio, (0, 1, 2)) for each in counts)
    means = [SystemScores(rng.normal(0, 1, (3, 40)), (0, 1, 2)) for _ in range(2)]
    result, of_means = paired_bootstrap([a, b, *means], [(0, 1), (2, 3)], resamples=200, seed=5)
    expected = []
    for picked in np.random.default_rng(5).integers(0, 40, (200, 40)):
        expected.append(
            np.mean([ratio(s[picked].sum(0)) for s in counts[0]])
            - np.mean([ratio(s[picked].sum(0)) for s in counts[1]])
        )
    assert (result.images.low, result.images.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))
    assert result.value == pytest.approx(a.values.mean() - b.values.mean())
    assert result.seeds is not None
    assert (of_means,) == tuple(paired_bootstrap(means, [(0, 1)], resamples=200, seed=5))  # as without the others
    assert paired_bootstrap([a, a], [(0, 1)], resamples=200, seed=5)[0].images.high == 0
