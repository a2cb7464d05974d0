"""Is one system better than another? The paired bootstrap over test images, and an interval that holds for other
training seeds too.

Koehn (2004), Statistical significance tests for machine translation evaluation: both systems are scored on the same
resampled test sets. Interval and p-value are percentiles (Efron and Tibshirani 1993, chapters 13 and 15).
docs/metrics.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.special import stdtr, stdtrit  # of Student's t; scipy.stats takes half a second to import

from cgtgan.errors import InputError

LEVEL = 0.95
CELLS = 4_000_000  # of the table of draws that is held at once: 32 MB


@dataclass(frozen=True)
class SystemScores:
    """A system's scores of single images under one metric: `scores` (seeds, images), finite, a row per seed."""

    scores: np.ndarray
    seeds: tuple[int, ...]

    @property
    def images(self) -> int:
        return self.scores.shape[1]

    @property
    def values(self) -> np.ndarray:
        """(seeds,) scores of the test set."""
        return self.scores.mean(1)


@dataclass(frozen=True)
class SummedScores:
    """A system under a metric of summed counts, such as BLEU: `counts` (seeds, images, K), finite.

    score: (..., K) sums over images -> (...) scores of the test set (evaluation/counts.py).
    """

    counts: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    seeds: tuple[int, ...]

    @property
    def images(self) -> int:
        return self.counts.shape[1]

    @property
    def values(self) -> np.ndarray:
        """(seeds,) scores of the test set."""
        return self.score(self.counts.sum(1))

    def resampled_sums(self, weights: np.ndarray) -> np.ndarray:
        """(draws, images), how often each image was drawn -> (draws, seeds, K) sums of the counts."""
        seeds, images, k = self.counts.shape
        return (weights @ self.counts.transpose(1, 0, 2).reshape(images, seeds * k)).reshape(-1, seeds, k)


System: TypeAlias = SystemScores | SummedScores


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    p: float  # two-sided

    @property
    def sign(self) -> int:
        """1 above 0 as a whole, -1 below, 0 where it holds 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Difference:
    """System less baseline.

    `images`: other test images, these training runs. `seeds`: other seeds as well; None with fewer than two.
    """

    value: float
    images: Interval
    seeds: Interval | None = None

    @property
    def sign(self) -> int:
        """That of the interval over images."""
        return self.images.sign

    @property
    def firm(self) -> bool:
        """Whether other seeds would, with the same confidence, show that sign too."""
        return self.seeds is not None and self.seeds.sign == self.sign != 0


def paired_bootstrap(
    systems: Sequence[System], pairs: Sequence[tuple[int, int]], *, resamples: int, seed: int
) -> list[Difference]:
    """The difference systems[a] - systems[b] for each (a, b) of `pairs`, two of one kind, with 95% intervals.

    All systems have the same images, in the same order, and every pair meets the same resampled sets: its result does
    not depend on which other pairs there are. Memory: 32 MB and `resamples` * pairs numbers. Raises InputError for
    systems of different numbers of images.
    """
    sizes = sorted({system.images for system in systems})
    if len(sizes) != 1 or not sizes[0]:
        raise InputError(
            f"the systems have scores of {' and '.join(map(str, sizes)) or 'no'} images: pairs need the same ones"
        )
    if not pairs:
        return []
    images = sizes[0]
    # what is resampled is the difference per image: exactly 0 where two systems agree, however the sums are ordered
    each = {
        i: first.scores.mean(0) - second.scores.mean(0)
        for i, (a, b) in enumerate(pairs)
        if isinstance(first := systems[a], SystemScores) and isinstance(second := systems[b], SystemScores)
    }
    means = np.stack(list(each.values()), axis=1) if each else np.empty((images, 0))  # (images, pairs of this kind)
    summed = [i for i in range(len(pairs)) if i not in each]
    draws, rng = np.empty((resamples, len(pairs))), np.random.default_rng(seed)
    rows = max(1, CELLS // images)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, images, (stop - start, images)) + images * np.arange(stop - start)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=(stop - start) * images).reshape(stop - start, images)
        draws[start:stop, list(each)] = counts @ means / images
        draws[start:stop, summed] = _summed_differences(systems, [pairs[i] for i in summed], counts)
    tail = (1 - LEVEL) / 2
    lows, highs = np.quantile(draws, (tail, 1 - tail), axis=0)
    below, above = (draws <= 0).sum(0), (draws >= 0).sum(0)
    p = np.minimum(1, 2 * (np.minimum(below, above) + 1) / (resamples + 1))  # + 1: the sample itself; no p is 0
    return [
        Difference(
            value := float(each[i].mean() if i in each else systems[a].values.mean() - systems[b].values.mean()),
            Interval(float(lows[i]), float(highs[i]), float(p[i])),
            _over_seeds(systems[a], systems[b], value, float(draws[:, i].var()), images),
        )
        for i, (a, b) in enumerate(pairs)
    ]


def _summed_differences(systems: Sequence[System], pairs: Sequence[tuple[int, int]], drawn: np.ndarray) -> np.ndarray:
    """(draws, pairs): the score of each resampled set anew, from its summed counts; the mean over seeds of each system.

    drawn: (draws, images), how often each image was drawn.
    """
    weights, sums = drawn.astype(np.float64), dict[int, np.ndarray]()
    scores: dict[int, np.ndarray] = {}
    for place in dict.fromkeys(place for pair in pairs for place in pair):
        system = systems[place]
        assert isinstance(system, SummedScores)
        if (key := id(system.counts)) not in sums:  # BLEU-1 to BLEU-4 have the same
            sums[key] = system.resampled_sums(weights)
        scores[place] = system.score(sums[key]).mean(1)
    columns = [scores[a] - scores[b] for a, b in pairs]
    return np.stack(columns, axis=1) if columns else np.empty((len(drawn), 0))


def _over_seeds(a: System, b: System, value: float, image_variance: float, images: int) -> Interval | None:
    """value ± t * sqrt(variance over images + variance over seeds), with Satterthwaite's degrees of freedom for the
    sum.

    Where both have the same seeds, the seeds are paired as well: a seed fixes the initial generator and the order of
    the data.
    """
    means = [system.values for system in (a, b)]
    paired = a.seeds == b.seeds
    terms = [means[0] - means[1]] if paired else means  # independent sources of variance over seeds
    if any(len(term) < 2 for term in terms):
        return None
    parts = [(image_variance, images - 1), *((float(term.var(ddof=1)) / len(term), len(term) - 1) for term in terms)]
    total = sum(variance for variance, _ in parts)
    if not total:
        return Interval(value, value, 1.0 if value == 0 else 0.0)
    freedom = total**2 / sum(variance**2 / max(n, 1) for variance, n in parts)
    spread = math.sqrt(total)
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * spread
    return Interval(value - reach, value + reach, float(2 * stdtr(freedom, -abs(value) / spread)))
