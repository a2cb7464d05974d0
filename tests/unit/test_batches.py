"""Which rows a step sees and which numbers it draws: functions of (seed, step, row)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgtgan.method.batches import EpochOrder, sampling_uniforms, stable_seed

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


def test_uniforms_hang_on_the_image_not_on_its_batch() -> None:
    whole = sampling_uniforms(3, 7, [11, "b", 13, 14], 5, 20)
    part = sampling_uniforms(3, 7, [14, 11], 5, 20)
    assert whole.shape == (4, 5, 20)
    assert torch.equal(part[0], whole[3])
    assert torch.equal(part[1], whole[0])


def test_uniforms_differ_by_seed_step_image_and_sample() -> None:
    base = sampling_uniforms(0, 1, [1], 2, 8)[0]
    others = [sampling_uniforms(1, 1, [1], 2, 8)[0], sampling_uniforms(0, 2, [1], 2, 8)[0], sampling_uniforms(0, 1, [2], 2, 8)[0]]
    assert all(not torch.equal(base, o) for o in others)
    assert not torch.equal(base[0], base[1])
    assert not torch.equal(sampling_uniforms(1, 23, [4], 1, 8), sampling_uniforms(12, 3, [4], 1, 8))  # no two keys run together


def test_uniforms_are_uniform_and_below_1() -> None:
    drawn = sampling_uniforms(0, 1, range(200), 5, 20)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    counts = torch.histc(drawn, 20, 0, 1)
    expected = drawn.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 19 + 5 * (2 * 19) ** 0.5


def test_uniforms_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sampling_uniforms(0, 1, [1, 2], 3, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_in_another_process() -> None:
    code = (
        "from cgtgan.method.batches import *; print(stable_seed(1, 'a', 2)); print(EpochOrder(9, 0, 'x').rows(0, 9).tolist()); "
        "print(sampling_uniforms(0, 1, ['i'], 1, 3).tolist())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [stable_seed(1, "a", 2), EpochOrder(9, 0, "x").rows(0, 9).tolist(), sampling_uniforms(0, 1, ["i"], 1, 3).tolist()]
    assert done.stdout.splitlines() == [str(value) for value in here]
    assert 0 <= stable_seed(1, "a", 2) < 2**63
