"""The semantic reward: the released program's numbers, and values computed by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cgtgan.method.reinforce import advantages, policy_gradient_loss
from cgtgan.method.rewards import SemanticReward, semantic_reward

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
IMAGES, SAMPLES = 3, 4
WEIGHTS = [(0.5, 0.0), (0.5, 0.3), (1.0, 0.0), (0.0, 0.0), (0.5, 1.0)]


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(GOLDEN / "scst_reward.npz")


def close(found: Tensor, expected: Any) -> None:
    """To 1e-5 of the largest value: a difference of rewards near 40 keeps the rewards' rounding."""
    found, expected = found.detach().double().flatten(), torch.as_tensor(np.asarray(expected)).double().flatten()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def as_released(golden: Any, name: str, cos_weight: float, clip_weight: float) -> SemanticReward:
    """Rewards of 12 samples and 3 greedy captions. `f16`: only text embeddings are float16, as from CLIP on a GPU."""
    image, aggregated, text = (torch.tensor(golden[key]) for key in ("img", "agg", "text_feats"))
    owner = torch.cat([torch.arange(IMAGES).repeat_interleave(SAMPLES), torch.arange(IMAGES)])
    weights = {"cos_weight": cos_weight, "clip_weight": clip_weight}
    if name == "f32":
        return semantic_reward(text, aggregated[owner], image[owner], **weights)
    text = text.half()
    ours = semantic_reward(text, aggregated[owner], image[owner], **weights)
    # theirs normalises in float16 what ours normalises in float32, and such vectors have a length of 1 +- 5e-4
    unit = text / text.norm(dim=-1, keepdim=True)
    rounded = semantic_reward(unit, aggregated[owner], image[owner], **weights)
    cos, clip = (term * unit.float().norm(dim=-1) for term in (rounded.cos, rounded.clip))
    assert (ours.cos - cos).abs().max() < 0.02
    assert (ours.clip - clip).abs().max() < 0.02
    return SemanticReward(
        (1 - clip_weight) * (cos_weight * cos + (1 - cos_weight) * ours.l1) + clip_weight * clip, cos, ours.l1, clip
    )


@pytest.mark.parametrize(("cos_weight", "clip_weight"), WEIGHTS)
@pytest.mark.parametrize("baseline", ["greedy", "sample"])
@pytest.mark.parametrize("name", ["f32", "f16"])
def test_golden(golden: Any, name: str, baseline: str, cos_weight: float, clip_weight: float) -> None:
    samples = IMAGES * SAMPLES
    reward = as_released(golden, name, cos_weight, clip_weight)
    log_probs = torch.tensor(golden["sample_logprobs"]).requires_grad_()
    advantage = advantages(
        reward.total[:samples].view(IMAGES, SAMPLES), reward.total[samples:] if baseline == "greedy" else None
    )
    loss = policy_gradient_loss(advantage, log_probs.view(IMAGES, SAMPLES))
    loss.backward()

    key = f"{name}_{baseline}_cos{cos_weight}_clip{clip_weight}"
    scores = golden[f"{key}_scores"]
    close(reward.total[: len(scores)], scores)
    close(loss, golden[f"{key}_loss"])
    assert log_probs.grad is not None
    close(log_probs.grad, golden[f"{key}_grad"])
    # without greedy rows the released program takes the last images' samples for them (METHOD, slip 7)
    logged = samples if baseline == "greedy" else samples - IMAGES
    close(
        torch.stack([term[:logged].mean() for term in (reward.l1, reward.cos, reward.clip)]),
        golden[f"{key}_l1_cos_clip"],
    )


def one(text: list[float], aggregated: list[float], image: list[float], **weights: float) -> dict[str, float]:
    rows = [torch.tensor([x]) for x in (text, aggregated, image)]
    reward = semantic_reward(
        *rows, cos_weight=weights["cos"], clip_weight=weights["clip"], logit_scale=weights.get("scale", 100.0)
    )
    return {name: value.item() for name, value in reward._asdict().items()}


def test_by_hand() -> None:
    found = one([3.0, 4.0], [4.0, 3.0], [0.0, -2.0], cos=0.25, clip=0.5)
    assert found == pytest.approx({"cos": 96.0, "l1": 0.0, "clip": -80.0, "total": 0.5 * 0.25 * 96 - 40.0}, abs=1e-4)


def test_l1_is_on_raw_vectors_and_a_mean_over_dimensions() -> None:
    found = one([0.1, 0.2, 0.0, 0.0], [0.2, 0.4, 0.0, 0.4], [1.0, 0.0, 0.0, 0.0], cos=0.0, clip=0.0)
    assert found["l1"] == pytest.approx(100 * (1 - 0.7 / 4), rel=1e-6)
    assert found["total"] == found["l1"]


def test_clip_cos_depends_on_the_image_alone() -> None:
    a, b = (one([1.0, 1.0], aggregated, [1.0, 0.0], cos=0.5, clip=1.0) for aggregated in ([9.0, 1.0], [-1.0, 5.0]))
    assert a["total"] == b["total"] == pytest.approx(100 / math.sqrt(2), rel=1e-6)


def test_scale_multiplies_every_term() -> None:
    small, large = (one([3.0, 1.0], [2.0, 1.0], [1.0, 1.0], cos=0.5, clip=0.3, scale=s) for s in (1.0, 20.0))
    assert large == pytest.approx({name: 20 * value for name, value in small.items()}, rel=1e-5)


def test_float16_is_computed_in_float32() -> None:
    """A sum of 1,000 squares of 10 overflows float16."""
    g = torch.full((1, 1000), 10.0, dtype=torch.float16)
    reward = semantic_reward(g, g, g, cos_weight=1.0, clip_weight=0.0)
    assert reward.total.dtype == torch.float32
    assert reward.cos.item() == pytest.approx(100, rel=1e-6)


@pytest.mark.parametrize(
    "shapes", [((3, 4), (2, 4), (3, 4)), ((3, 4), (3, 4), (3, 5)), ((4,), (4,), (4,)), ((1, 4), (3, 4), (3, 4))]
)
def test_wrong_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"must all be \(R, D\)"):
        semantic_reward(*(torch.ones(s) for s in shapes), cos_weight=0.5, clip_weight=0.0)
