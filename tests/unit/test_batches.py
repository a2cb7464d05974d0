"""Which rows a step sees and which numbers it draws: functions of (seed, step, row)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgtgan.method.batches import EpochOrder, sampling_seeds, stable_seed

ROOT = Path(__file__).resolve().parents[2]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 50), batch=st.integers(1, 120), steps=st.integers(1, 12), seed=st.integers(0, 9))
def test_each_row_once_an_epoch(size: int, batch: int, steps: int, seed: int) -> None:
    order = EpochOrder(size, seed, "images")
    seen = np.concatenate([order.batch(step, batch) for step in range(1, steps + 1)])
    assert len(seen) == batch * steps
    whole = len(seen) // size
    for epoch in range(whole):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert len(set(seen[whole * size :])) == len(seen) - whole * size


def test_a_batch_is_a_function_of_its_step() -> None:
    order, backwards = EpochOrder(17, 0, "images"), EpochOrder(17, 0, "images")
    forth = {step: order.batch(step, 5).tolist() for step in range(1, 21)}
    back = {step: backwards.batch(step, 5).tolist() for step in range(20, 0, -1)}
    assert forth == back
    assert order.batch(7, 5).tolist() == EpochOrder(17, 0, "images").batch(7, 5).tolist() == order.rows(30, 5).tolist()


def test_epochs_seeds_and_names_differ() -> None:
    order = EpochOrder(60, 0, "images")
    epochs = [order.rows(60 * e, 60).tolist() for e in range(4)]
    others = [EpochOrder(60, 1, "images").rows(0, 60).tolist(), EpochOrder(60, 0, "real").rows(0, 60).tolist()]
    assert len({tuple(o) for o in epochs + others}) == 6
    assert list(range(60)) not in epochs


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        EpochOrder(0, 1)


def test_seeds_hang_on_the_image_not_on_its_batch() -> None:
    whole = sampling_seeds(3, 7, [11, "b", 13, 14], 5)
    part = sampling_seeds(3, 7, [14, 11], 5)
    assert [len(row) for row in whole] == [5, 5, 5, 5]
    assert part == [whole[3], whole[0]]
    assert sampling_seeds(3, 7, [11], 2)[0] == whole[0][:2]


def test_seeds_differ_by_seed_step_image_and_sample() -> None:
    found = [
        sampling_seeds(seed, step, [image], 2)[0]
        for seed in (0, 1, 12)
        for step in (1, 2, 23, 3)
        for image in (1, 2, "b")
    ]
    assert len({seed for row in found for seed in row}) == 2 * len(found)  # and no two keys run together
    assert all(0 <= seed < 2**63 for row in found for seed in row)


def test_the_same_in_another_process() -> None:
    code = (
        "from cgtgan.method.batches import *; print(stable_seed(1, 'a', 2)); "
        "print(EpochOrder(9, 0, 'x').rows(0, 9).tolist()); "
        "print(sampling_seeds(0, 1, ['i'], 3))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [stable_seed(1, "a", 2), EpochOrder(9, 0, "x").rows(0, 9).tolist(), sampling_seeds(0, 1, ["i"], 3)]
    assert done.stdout.splitlines() == [str(value) for value in here]
    assert 0 <= stable_seed(1, "a", 2) < 2**63
