"""A user's own metric: what it gets, what it may return, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgtgan.errors import InputError, MissingFileError
from cgtgan.evaluation.metrics import score_captions
from cgtgan.evaluation.own_metrics import own_metric_fingerprints

CAPTIONS = {1: "A dog.", 2: "Two dogs run.", 3: "No reference."}
REFERENCES = {1: ["A dog barks.", "A brown dog."], 2: ["Two dogs."], 3: []}
CODE = """
def overlap(captions, references):
    assert list(captions) == list(references) == [1, 2]
    assert references[1] == ["A dog barks.", "A brown dog."]
    return {i: float(any(captions[i][:-1] in text for text in references[i])) for i in captions}

def with_total(captions, references):
    return 7, {i: len(text) for i, text in captions.items()}

def other_ids(captions, references):
    return {str(i): 1.0 for i in captions}

def too_few(captions, references):
    return {1: 1.0}

def not_finite(captions, references):
    return {1: 1.0, 2: float("inf")}

def a_number(captions, references):
    return 0.5

def fails(captions, references):
    return {i: 1 / 0 for i in captions}

def CIDEr(captions, references):
    return {i: 1.0 for i in captions}
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    return file


def test_its_scores_stand_beside_the_others(code: Path) -> None:
    scores = score_captions(CAPTIONS, REFERENCES, ("rouge_l", f"{code}:overlap", f"{code}:with_total"))
    assert list(scores.corpus) == ["ROUGE-L", "overlap", "with_total"]
    assert (scores.corpus["overlap"], scores.corpus["with_total"]) == (0.5, 7.0)  # the mean, and what it says itself
    assert [scores.per_image[i]["overlap"] for i in (1, 2)] == [1.0, 0.0]
    assert [scores.per_image[i]["with_total"] for i in (1, 2)] == [6.0, 13.0]
    assert scores.excluded == (3,)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other_ids", "returned scores for other ids: 4 images (1, 2, '1', '2') have no score, or no caption"),
        ("too_few", "returned scores for other ids: 1 image (2) has no score"),
        ("not_finite", "returned inf for 2"),
        ("a_number", "returned a float; it must return {id: score} with a finite number for each caption"),
        ("fails", "line 23: ZeroDivisionError"),
    ],
)
def test_what_is_no_score_is_a_sentence_and_loses_no_other_metric(code: Path, name: str, words: str) -> None:
    scores = score_captions(CAPTIONS, REFERENCES, ("rouge_l", f"{code}:{name}"))
    assert list(scores.corpus) == ["ROUGE-L"]
    assert f"{code}:{name}" in scores.failed[name]
    assert words in scores.failed[name]


def test_a_metric_that_is_not_there_or_has_a_taken_name_is_refused(code: Path) -> None:
    with pytest.raises(InputError, match="has no absent; it defines overlap"):
        score_captions(CAPTIONS, REFERENCES, (f"{code}:absent",))
    with pytest.raises(MissingFileError, match="does not exist"):
        score_captions(CAPTIONS, REFERENCES, ("nowhere.py:f",))
    with pytest.raises(InputError, match="CIDEr is the name of a built-in score"):
        score_captions(CAPTIONS, REFERENCES, (f"{code}:CIDEr",))
    with pytest.raises(InputError, match="another overlap: give one of them another name"):
        score_captions(
            CAPTIONS, REFERENCES, (f"{code}:overlap", f"{code.parent}/../{code.parent.name}/mine.py:overlap")
        )
    with pytest.raises(InputError, match="has no absent"):  # before any caption is made
        own_metric_fingerprints((f"{code}:absent",))


def test_a_score_knows_the_content_of_its_file(code: Path) -> None:
    metrics = ("cider", f"{code}:overlap")
    before = own_metric_fingerprints(metrics)
    code.write_text(CODE + "\n")
    assert list(before) == ["overlap"]
    assert own_metric_fingerprints(metrics) != before
    assert own_metric_fingerprints(("cider",)) == {}
