"""Reward terms as a mapping: weights, scales, own code. Values computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cgtgan.checks import built_in_terms, validate
from cgtgan.config import Config, RewardTermConfig, RewardWeightsConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.method.reward_terms import TERMS, RewardInputs
from cgtgan.method.rewards import semantic_reward
from cgtgan.run_identity import scientific_settings, variant_name
from cgtgan.training.own_terms import load_own_terms, own_term_fingerprints
from cgtgan.training.rewards import weighted_terms
from cgtgan.training.wandb_tables import Examples, reward_columns
from tests.tiny_gan import one_step, step_inputs, tiny_parts

TEXTS = ["A dog.", "A dog runs fast."]
# cosines with the caption (1, 0): 0.6 and 0; mean absolute differences: 0.6 and 1
INPUTS = RewardInputs(
    TEXTS,
    text=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
    aggregated=torch.tensor([[0.6, 0.8], [0.0, 1.0]]),
    image=torch.tensor([[3.0, 4.0], [-2.0, 0.0]]),
)
CODE = """
import torch

def brevity(inputs):
    return -torch.tensor([float(len(text.split())) for text in inputs.texts])

def wrong_shape(inputs):
    return torch.zeros(len(inputs.texts) + 1)

def whole_numbers(inputs):
    return torch.zeros(len(inputs.texts), dtype=torch.long)

def a_list(inputs):
    return [0.0 for _ in inputs.texts]

def not_finite(inputs):
    return torch.tensor([0.0, float("nan")])

def fails(inputs):
    return inputs.no_such_field
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "rewards.py"
    file.write_text(CODE)
    return file


def reward(weights: RewardWeightsConfig, scale: float = 10.0) -> dict[str, Tensor]:
    return weighted_terms(weights, load_own_terms(weights), replace(INPUTS, logit_scale=scale))


def test_the_built_in_terms() -> None:
    assert TERMS["cos"](INPUTS).tolist() == pytest.approx([0.6, 0.0])
    assert TERMS["l1"](INPUTS).tolist() == pytest.approx([0.4, 0.0])
    assert TERMS["clip"](INPUTS).tolist() == pytest.approx([0.6, -1.0])


def test_without_terms_it_is_the_papers_reward_to_the_last_bit() -> None:
    noise = torch.Generator().manual_seed(0)
    text, aggregated, image = torch.randn(3, 50, 16, generator=noise)
    inputs = RewardInputs(["A dog."] * 50, text, aggregated, image)
    ours = weighted_terms(RewardWeightsConfig(cos_weight=0.3, clip_weight=0.2), {}, inputs)
    paper = semantic_reward(text, aggregated, image, cos_weight=0.3, clip_weight=0.2)
    assert torch.equal(ours["semantic"], paper.total)
    assert all(torch.equal(ours[name], getattr(paper, name)) for name in ("cos", "l1", "clip"))


def test_a_term_gets_its_own_weight_and_scale() -> None:
    terms = {"clip": RewardTermConfig(weight=2.0, scale=5.0), "l1": RewardTermConfig(weight=0.0)}
    found = reward(RewardWeightsConfig(cos_weight=0.5, clip_weight=0.0, terms=terms))
    assert found["clip"].tolist() == pytest.approx([3.0, -5.0])  # 5 * cosine
    assert found["l1"].tolist() == pytest.approx([4.0, 0.0])  # 10 * (1 - difference): raw, whatever its weight
    assert found["semantic"].tolist() == pytest.approx([0.5 * 6 + 0 + 2 * 3.0, 0 + 0 - 2 * 5.0])


def test_a_users_own_term_is_added(code: Path) -> None:
    terms = {"brevity": RewardTermConfig(weight=0.5, scale=3.0, function=f"{code}:brevity")}
    found = reward(RewardWeightsConfig(clip_weight=1.0, terms=terms))
    assert found["brevity"].tolist() == [-6.0, -12.0]
    assert found["semantic"].tolist() == pytest.approx([6 - 3.0, -10 - 6.0])


def test_the_key_itself_may_name_the_code(code: Path) -> None:
    weights = RewardWeightsConfig(clip_weight=1.0, terms={f"{code}:brevity": RewardTermConfig(weight=0.5)})
    assert reward(weights)["brevity"].tolist() == [-2.0, -4.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_shape", "shape (3,): it must return a float tensor (2,)"),
        ("whole_numbers", "torch.int64 of shape (2,)"),
        ("a_list", "returned a list"),
        ("not_finite", "nan for the caption 'A dog runs fast.'"),
        ("fails", f"line {CODE.splitlines().index('    return inputs.no_such_field') + 1}: AttributeError"),
    ],
)
def test_what_is_no_reward_is_refused(code: Path, name: str, words: str) -> None:
    terms = {"mine": RewardTermConfig(function=f"{code}:{name}")}
    with pytest.raises(InputError) as error:
        reward(RewardWeightsConfig(terms=terms))
    line = next(number for number, text in enumerate(CODE.splitlines(), start=1) if f"def {name}(" in text)
    place = f"reward_weights.terms.mine.function={code}:{name} "
    assert place + ("failed" if name == "fails" else f"({code}, line {line}) returned") in str(error.value)
    assert words in str(error.value)


def test_the_settings_know_the_built_in_terms() -> None:
    assert built_in_terms() == list(TERMS)


def test_a_new_built_in_term_is_computed_where_the_settings_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "half", lambda inputs: inputs.text[:, 0] / 2)
    assert "half" not in reward(RewardWeightsConfig())
    found = reward(RewardWeightsConfig(clip_weight=1.0, terms={"half": RewardTermConfig(weight=3.0)}))
    assert found["half"].tolist() == [5.0, 5.0]  # a built-in term is in units of the logit scale, here 10
    assert found["semantic"].tolist() == pytest.approx([6 + 15.0, -10 + 15.0])


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"cosine": 1.0}, "needs reward_weights.terms.cosine.function=path.py:name"),
        ({"cos": {"function": "rewards.py:f"}}, "cos is a built-in term, give yours another name"),
        ({"semantic": {"function": "rewards.py:f"}}, "terms.semantic is not accepted: the name of a term is one word"),
        ({"f": {"function": "a.py:f"}, "b.py:f": 1.0}, "given once"),
        ({"cos": {"wieght": 1.0}}, "a term is a weight, or has weight, scale and function"),
        ({"cos": {"weight": float("inf")}}, "terms.cos.weight=inf is not accepted: it must be a finite number"),
        ({"cos": {"scale": 0.0}}, "terms.cos.scale=0.0 is not accepted: it must be a number above 0, or null"),
    ],
)
def test_settings_that_are_no_terms_are_refused(terms: dict[str, Any], words: str) -> None:
    cfg = Config(reward_weights=RewardWeightsConfig(terms=terms))
    with pytest.raises(InputError) as error:
        validate(cfg)
    assert words in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(MissingFileError, match=r"reward_weights\.terms\.mine\.function=none\.py:f"):
        reward(RewardWeightsConfig(terms={"mine": RewardTermConfig(function="none.py:f")}))


def test_a_run_knows_its_terms(code: Path) -> None:
    plain, cfg = Config(), Config()
    cfg.reward_weights.terms = {"brevity": RewardTermConfig(weight=0.5, function=f"{code}:brevity")}
    known = scientific_settings(plain)
    assert {name: value for name, value in scientific_settings(cfg).items() if name not in known} == {
        "reward_weights.terms.brevity.weight": 0.5,
        "reward_weights.terms.brevity.scale": None,
        "reward_weights.terms.brevity.function": "brevity",  # not the folder, which may move
    }
    assert "_brevity0.5_" in variant_name(cfg)
    before = own_term_fingerprints(cfg.reward_weights)
    code.write_text(CODE.replace("-torch", "+torch"))
    assert own_term_fingerprints(cfg.reward_weights) != before
    assert own_term_fingerprints(plain.reward_weights) == {}


def test_a_step_logs_the_term_and_learns_from_it(code: Path) -> None:
    cfg, parts = tiny_parts()
    cfg.reward_weights.max_weight, cfg.reward_weights.clip_weight = 1.0, 1.0
    without = one_step(cfg, parts, 1)
    cfg, parts = tiny_parts()
    cfg.reward_weights.max_weight, cfg.reward_weights.clip_weight = 1.0, 1.0
    cfg.reward_weights.terms = {"brevity": RewardTermConfig(weight=3.0, function=f"{code}:brevity")}
    parts.own_terms = load_own_terms(cfg.reward_weights)
    row = one_step(cfg, parts, 1)
    new = {"reward/brevity", "reward/brevity_greedy", "advantage/brevity", "advantage/brevity_abs"}
    assert row.keys() - without.keys() == new
    assert row["reward/brevity"] < -1  # minus the mean number of words
    for kind in ("reward", "advantage"):
        sum_of_terms = row[f"{kind}/clip"] + 3 * row[f"{kind}/brevity"]
        assert row[f"{kind}/semantic"] == pytest.approx(sum_of_terms, abs=1e-4)
    assert row["train/semantic_loss"] != without["train/semantic_loss"]


def test_a_term_is_a_column_of_the_caption_tables(code: Path) -> None:
    cfg, parts = tiny_parts()
    cfg.reward_weights.clip_weight = 1.0
    cfg.reward_weights.terms = {"brevity": RewardTermConfig(weight=3.0, function=f"{code}:brevity")}
    parts.own_terms = load_own_terms(cfg.reward_weights)
    image, target = step_inputs(parts, 1)
    examples = Examples([7, 8], image[:2], target[:2], [])
    columns = reward_columns(cfg, parts, examples, TEXTS)
    assert list(columns) == ["cos", "l1", "clip", "brevity", "semantic", "naturalness"]
    assert columns["brevity"] == [-2.0, -4.0]
    clip, semantic = (np.array(columns[name]) for name in ("clip", "semantic"))
    assert semantic == pytest.approx(clip - [6, 12], rel=1e-5)
    columns = reward_columns(cfg, parts, replace(examples, target=None), TEXTS)
    assert [name for name, values in columns.items() if None not in values] == ["clip", "naturalness"]
