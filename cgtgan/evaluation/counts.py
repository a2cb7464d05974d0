"""Corpus BLEU and METEOR from sums of the images' counts: what it takes to score a resampled test set again.

Of neither is the score of a test set the mean of its images' scores. Arrays are (..., K) float64, of sums over images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cgtgan.config import METRICS

Score = Callable[[np.ndarray], np.ndarray]  # (..., K) sums of counts -> (...) scores
# -l en, -t rank (Denkowski and Lavie 2014, table 1): exact, stem, synonym, paraphrase
_ALPHA, _BETA, _GAMMA, _DELTA, _WEIGHTS = 0.85, 0.2, 0.6, 0.75, np.array([1.0, 0.6, 0.8, 0.6])
_ORDERS = 4


def bleu_counts(length: int, references: Sequence[int], correct: Sequence[int], guess: Sequence[int]) -> list[int]:
    """The counts of one image: its length in tokens, that of the closest reference (the shorter of two), its n-grams
    that a reference has, and all of its n-grams, n = 1 to 4.
    """
    closest = min((abs(reference - length), reference) for reference in references)[1]
    return [length, closest, *correct, *guess]


def bleu(sums: np.ndarray) -> np.ndarray:
    """(..., 10) sums of `bleu_counts` -> (..., 4) BLEU-1 to BLEU-4, as BleuScorer.compute_score of pycocoevalcap."""
    tiny, small = 1e-15, 1e-9
    lengths, references = sums[..., 0], sums[..., 1]
    correct, guess = sums[..., 2 : 2 + _ORDERS], sums[..., 2 + _ORDERS :]
    precisions = np.cumprod((correct + tiny) / (guess + small), axis=-1)
    ratio = (lengths + tiny) / (references + small)
    brevity = np.exp(1 - 1 / np.minimum(ratio, 1))
    return precisions ** (1 / np.arange(1, _ORDERS + 1)) * brevity[..., None]


def meteor_counts(statistics: str) -> list[int]:
    """The counts of one image, of the line with which METEOR 1.5 answers SCORE (MeteorStats.toString).

    They are the lengths of caption and reference, their function words, for each of four matchers the matched content
    words of both and function words of both, chunks, and the matched words of both. As in MeteorStats.addStats, the
    chunk of a caption that matches its reference as a whole is not counted. Raises ValueError for another line.
    """
    counts = [int(float(number)) for number in statistics.split()]
    if len(counts) != 23:
        raise ValueError(f"{len(counts)} statistics from METEOR, not 23: {statistics[:100]}")
    matched = [sum(counts[4 + side : 20 : 2]) for side in (0, 1)]  # of caption and reference
    if matched == counts[:2] and counts[20] == 1:
        counts[20] = 0
    return counts


def meteor(sums: np.ndarray) -> np.ndarray:
    """(..., 23) sums of `meteor_counts` -> (...) METEOR, as MeteorScorer.computeMetrics."""
    # (..., 4 matchers, 4): content words in caption and reference, function words in caption and reference
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    share = np.array([_DELTA, 1 - _DELTA])
    matched = np.stack([matches[..., [side, 2 + side]] @ share @ _WEIGHTS for side in (0, 1)])
    function = np.stack([sums[..., 2], sums[..., 3]])
    length = _DELTA * (np.stack([sums[..., 0], sums[..., 1]]) - function) + (1 - _DELTA) * function
    with np.errstate(divide="ignore", invalid="ignore"):  # without a match the score is 0
        precision, recall = matched / length
        mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        chunks, words = sums[..., 20], (sums[..., 21] + sums[..., 22]) / 2
        score = mean * (1 - _GAMMA * (chunks / words) ** _BETA)
    return np.where(np.isfinite(score), np.maximum(score, 0), 0)


def _of_order(n: int) -> Score:
    """BLEU-(n + 1), 0 where no n-gram of one length matches: pycocoevalcap gives 1e-6 or so, which means nothing."""
    return lambda sums: np.where((sums[..., 2 : 3 + n] > 0).all(-1), bleu(sums)[..., n], 0.0)


# score -> the metric whose counts it is made of, and how
SUMMED: dict[str, tuple[str, Score]] = {name: ("bleu", _of_order(n)) for n, name in enumerate(METRICS["bleu"])}
SUMMED |= dict.fromkeys(METRICS["meteor"], ("meteor", meteor))
