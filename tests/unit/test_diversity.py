"""Diversity of captions by hand, and self-CIDEr's kernel against pycocoevalcap's CIDEr."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cgtgan.errors import InputError
from cgtgan.evaluation.diversity import (
    cider_kernel,
    distinct,
    diversity,
    document_frequency,
    known_sentences,
    self_cider,
    words,
)

CAPTIONS = ["A dog runs.", "a dog sits", "a dog sits"]


def test_words() -> None:
    assert words("A man's T-shirt, on\tthe  beach!") == ["a", "man's", "t", "shirt", "on", "the", "beach"]
    assert words(" ... ") == words("") == []
    assert words("café ’tis don’t 2 ||| \N{HORSE}") == ["café", "tis", "don’t", "2"]


def test_counts_by_hand() -> None:
    known = known_sentences(CAPTIONS, ["A dog sits!", "a dog", "dog runs a"])
    assert known == {("a", "dog", "sits")}
    whole, each = diversity(CAPTIONS, known)
    assert whole == pytest.approx(
        {
            "Distinct-1": 4 / 9,
            "Distinct-2": 3 / 6,
            "Vocabulary": 4,
            "Length": 3,
            "Novel": 1 / 3,
        }  # a dog runs sits; a-dog dog-runs dog-sits
    )
    assert each == {"Length": [3, 3, 3], "Novel": [1, 0, 0]}
    whole, each = diversity(["a b c d", ""])
    assert whole == {"Distinct-1": 1, "Distinct-2": 1, "Vocabulary": 4, "Length": 2}
    assert each == {"Length": [4, 0]}
    assert distinct([["one"]], 2) == 0
    with pytest.raises(InputError, match="no caption"):
        diversity([])


def test_kernel_by_hand() -> None:
    frequency = document_frequency([["x y", "x z"], ["v"], ["u"]])
    assert frequency == {("x",): 1, ("y",): 1, ("z",): 1, ("x", "y"): 1, ("x", "z"): 1, ("v",): 1, ("u",): 1}
    # one of two words in common (cosine 1/2), of their one pair none, and no longer n-gram
    assert cider_kernel([["x", "y"], ["x", "z"]], frequency, 3) == pytest.approx(
        np.array([[1 / 2, 1 / 8], [1 / 8, 1 / 2]])
    )
    # counts 2 and 1: clipped at the later caption's 1 * 1 / (2 * 1), and a pair more
    long_first = cider_kernel([["x", "x"], ["x"]], frequency, 3)
    assert long_first[0, 1] == long_first[1, 0] == pytest.approx(1 / 2 / 4 * math.exp(-1 / 72))
    assert cider_kernel([["x"], ["x", "x"]], frequency, 3)[0, 1] == pytest.approx(1 / 4 * math.exp(-1 / 72))
    # an n-gram of every image weighs nothing
    assert not cider_kernel([["x"], ["x"]], document_frequency([["x"], ["x"]]), 2).any()


def test_kernel_is_pycocoevalcaps_cider() -> None:
    from pycocoevalcap.cider.cider import Cider

    references = [
        "a man rides a brown horse on the beach",
        "two dogs play in the deep snow",
        "a man and two dogs on a beach",
        "a bus",
    ]
    captions = ["a man rides a horse", "two dogs dogs play", "a man and a dog on the beach with a man", "", "red"]
    frequency = document_frequency([[text] for text in references])
    for hypothesis in captions:
        _, theirs = Cider().compute_score(
            {i: [text] for i, text in enumerate(references)}, {i: [hypothesis] for i in range(4)}
        )
        ours = [cider_kernel([words(hypothesis), words(text)], frequency, 4)[0, 1] for text in references]
        assert 10 * np.array(ours) == pytest.approx(theirs, abs=1e-12)


def test_self_cider_by_hand() -> None:
    references = [["x y", "x z"], ["v"], ["u"], ["w"]]
    samples = [
        ["x", "v"],  # nothing in common
        ["x y", "x y"],
        ["x y", "x z"],  # singular values 5/8 and 3/8
        ["", ""],
    ]
    root = math.sqrt(5 / 8) / (math.sqrt(5 / 8) + math.sqrt(3 / 8))
    assert root == pytest.approx(0.563508, abs=1e-6)
    assert self_cider(samples, references) == pytest.approx([1, 0, 0.827492, 0], abs=1e-6)
    assert self_cider([["x", "v", "u"], ["x", "x", "v"]], references)[0] == pytest.approx(1)
    # two of three the same: singular values 2/4 and 1/4
    assert self_cider([["x", "x", "v"]], references)[0] == pytest.approx(
        -math.log(1 / (1 + math.sqrt(0.5))) / math.log(3)
    )


@pytest.mark.parametrize(
    ("samples", "references"), [([["a"]], 2), ([["a", "b"], ["a", "b", "c"]], 2), ([["a", "b"]], 1)]
)
def test_too_few_samples_or_images(samples: list[list[str]], references: int) -> None:
    with pytest.raises(InputError, match="two images or more"):
        self_cider(samples, [["a"]] * references)
