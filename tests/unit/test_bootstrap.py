"""The paired bootstrap: against plain loops, on data with a known answer, and how often its intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cgtgan.errors import InputError
from cgtgan.evaluation.bootstrap import CELLS, Difference, Interval, SystemScores, paired_bootstrap


def one(
    a: np.ndarray, b: np.ndarray, resamples: int = 2000, seed: int = 0, seeds: tuple[int, ...] | None = None
) -> Difference:
    systems = [SystemScores(x, seeds or tuple(range(len(x)))) for x in (np.atleast_2d(a), np.atleast_2d(b))]
    (found,) = paired_bootstrap(systems, [(0, 1)], resamples=resamples, seed=seed)
    return found


def test_it_is_what_a_loop_over_resampled_test_sets_says() -> None:
    rng = np.random.default_rng(3)
    a, b, images, resamples = rng.normal(1.0, 1, (3, 50)), rng.normal(0.9, 1, (2, 50)), 50, 400
    found = one(a, b, resamples, seed=11)
    draw, differences = np.random.default_rng(11), []
    for picked in draw.integers(0, images, (resamples, images)):  # both systems, all seeds: the same images
        of_a = [sum(scores[i] for i in picked) / images for scores in a]
        of_b = [sum(scores[i] for i in picked) / images for scores in b]
        differences.append(sum(of_a) / len(of_a) - sum(of_b) / len(of_b))
    low, high = np.quantile(differences, [0.025, 0.975])
    p = 2 * (min(sum(d <= 0 for d in differences), sum(d >= 0 for d in differences)) + 1) / (resamples + 1)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (found.images.low, found.images.high) == (pytest.approx(low), pytest.approx(high))
    assert found.images.p == pytest.approx(min(1, p))


def test_the_interval_over_seeds_is_student_s_with_both_variances() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(1.0, 1, (3, 200)) + np.array([[0.3], [0.0], [-0.2]]), rng.normal(0.5, 1, (4, 200))
    found = one(a, b)
    over_images = np.var(_draws(a.mean(0) - b.mean(0), 2000, 0))
    parts = [(over_images, 199), (a.mean(1).var(ddof=1) / 3, 2), (b.mean(1).var(ddof=1) / 4, 3)]
    total = sum(v for v, _ in parts)
    freedom = total**2 / sum(v * v / n for v, n in parts)
    assert found.seeds is not None
    assert found.seeds.high - found.value == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(total))
    assert found.value - found.seeds.low == pytest.approx(found.seeds.high - found.value)


def _draws(each: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    return np.asarray(
        [each[picked].mean() for picked in np.random.default_rng(seed).integers(0, len(each), (resamples, len(each)))]
    )


def test_the_same_seeds_are_paired() -> None:
    rng = np.random.default_rng(5)
    shift = np.array([[2.0], [0.0], [-2.0]])  # a lucky and an unlucky seed, for both
    a, b = rng.normal(0.5, 0.1, (3, 100)) + shift, rng.normal(0, 0.1, (3, 100)) + shift
    paired = one(a, b)
    systems = [SystemScores(a, (0, 1, 2)), SystemScores(b, (3, 4, 5))]
    (apart,) = paired_bootstrap(systems, [(0, 1)], resamples=500, seed=0)
    assert paired.firm
    assert apart.seeds is not None
    assert (apart.sign, apart.firm) == (1, False)
    assert one(a[:1], b[:1]).seeds is None  # one run says nothing about another


@pytest.mark.parametrize("seeds", [1, 3])
def test_identical_systems_do_not_differ(seeds: int) -> None:
    scores = np.random.default_rng(6).normal(0, 1, (seeds, 300)) / 3
    found = one(scores, scores.copy())
    assert (found.value, found.images) == (0.0, Interval(0.0, 0.0, 1.0))
    assert found.seeds == (Interval(0.0, 0.0, 1.0) if seeds > 1 else None)
    assert (found.sign, found.firm) == (0, False)


def test_a_shift_is_found_and_turns_with_the_pair() -> None:
    rng = np.random.default_rng(7)
    b = rng.normal(1, 1, (3, 400))
    a = b + rng.normal(0.2, 0.5, (3, 400))
    up, down = one(a, b), one(b, a)
    assert up.sign == 1
    assert up.firm
    assert up.images.p < 0.01
    assert down.value == pytest.approx(-up.value)
    assert down.sign == -1
    assert 0 < up.images.low < 0.2 < up.images.high < 0.4


def test_a_pair_does_not_hang_on_the_others_nor_on_the_chunks() -> None:
    rng = np.random.default_rng(8)
    systems = [SystemScores(rng.normal(0, 1, (2, 4000)), (0, 1)) for _ in range(4)]
    assert CELLS // 4000 < 1500  # more than one chunk
    alone = paired_bootstrap(systems, [(1, 0)], resamples=1500, seed=2)[0]
    among = paired_bootstrap(systems, [(3, 2), (1, 0), (2, 0)], resamples=1500, seed=2)[1]
    assert among.value == pytest.approx(alone.value, abs=1e-12)
    assert among.images.low == pytest.approx(alone.images.low, abs=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 worlds with a true difference of 0.1: images alone with one run each, images and seeds with three."""
    rng, held, held_seeds = np.random.default_rng(9), 0, 0
    for _ in range(300):
        image = rng.normal(0, 1, 200)  # how hard an image is, for both
        a, b = (image + level + rng.normal(0, 0.15, (3, 1)) + rng.normal(0, 0.7, (3, 200)) for level in (0.1, 0.0))
        found = one(a, b, 300)
        fixed = one(image + 0.1 + rng.normal(0, 0.7, 200), image + rng.normal(0, 0.7, 200), 300)
        assert found.seeds is not None
        held += fixed.images.low <= 0.1 <= fixed.images.high
        held_seeds += found.seeds.low <= 0.1 <= found.seeds.high
    assert 0.91 <= held / 300 <= 0.98
    assert 0.92 <= held_seeds / 300 <= 0.995


def test_systems_of_other_images_are_refused() -> None:
    with pytest.raises(InputError, match="2 and 3 images"):
        paired_bootstrap([SystemScores(np.zeros((1, n)), (0,)) for n in (2, 3)], [(0, 1)], resamples=100, seed=0)
