"""CLIPScore and RefCLIPScore of hand-made embeddings: numbers from the paper's two formulas, done by hand."""

from __future__ import annotations

import pytest
import torch

from cgtgan.evaluation.clip_score import clip_scores, prompt, ref_clip_scores

IMAGES = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [5.0, 0.0]])
CAPTIONS = torch.tensor(
    [[3.0, 4.0], [0.0, 7.0], [-1.0, 0.0], [0.0, 0.0]]
)  # cosines 0.6, 1, -1, and no direction at all


def test_clip_scores_are_two_and_a_half_times_the_cosine_from_zero_on() -> None:
    assert clip_scores(IMAGES, CAPTIONS).tolist() == pytest.approx([1.5, 2.5, 0.0, 0.0])
    assert clip_scores(IMAGES.half(), 100 * CAPTIONS.half()).tolist() == pytest.approx([1.5, 2.5, 0.0, 0.0], abs=1e-3)


def test_ref_clip_scores_are_the_harmonic_mean_with_the_nearest_reference() -> None:
    scores = clip_scores(IMAGES, CAPTIONS)
    references = [
        torch.tensor([[-3.0, -4.0], [4.0, 3.0], [0.0, 1.0]]),  # cosines -1, 0.96, 0.8: 2 * 1.5 * 0.96 / 2.46
        torch.tensor([[1.0, 0.0]]),  # 0: nothing in common with any reference
        torch.tensor([[-2.0, 0.0]]),  # CLIP-S is 0
        torch.tensor([[1.0, 1.0]]),
    ]
    found = ref_clip_scores(scores, CAPTIONS, references).tolist()
    assert found == pytest.approx([1.1707317, 0.0, 0.0, 0.0], abs=1e-6)
    against = ref_clip_scores(torch.tensor([2.0]), torch.tensor([[1.0, 0.0]]), [torch.tensor([[-1.0, 0.0]])])
    assert against.tolist() == [0.0]  # a negative cosine counts as 0


def test_the_prompt_is_the_authors_prefix_and_the_text_on_one_line() -> None:
    assert prompt("A man's dog, outside.") == "A photo depicts A man's dog, outside."
    assert prompt("a\nman \ud83d runs") == "A photo depicts a man   runs"
    assert prompt("") == "A photo depicts "
