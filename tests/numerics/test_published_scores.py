"""COCO's published sample results score what COCO's own program prints, and our PTB run equals pycocoevalcap's."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cgtgan.evaluation import java as jvm
from cgtgan.evaluation.coco_files import load_references, load_results
from cgtgan.evaluation.metrics import Scores, score_captions
from cgtgan.evaluation.tokenizer import approximate_tokenize

PUBLISHED = {"BLEU-1": 0.5794, "BLEU-2": 0.4044, "BLEU-3": 0.2785, "BLEU-4": 0.1908}
PUBLISHED |= {"METEOR": 0.1953, "ROUGE-L": 0.3963, "CIDEr": 0.5998}
KEYS = {
    "BLEU-1": "B1",
    "BLEU-2": "B2",
    "BLEU-3": "B3",
    "BLEU-4": "B4",
    "METEOR": "METEOR",
    "ROUGE-L": "ROUGE_L",
    "CIDEr": "CIDEr",
}


@pytest.fixture(scope="module")
def scores(shared: Path) -> Scores:
    coco = shared / "data" / "coco"
    captions = load_results(coco / "captions_val2014_fakecap_results.json")
    return score_captions(captions, load_references(coco / "captions_val2014_fakecap1000.json.gz"))


@pytest.fixture(scope="module")
def real_captions(shared: Path) -> list[str]:
    with gzip.open(shared / "data" / "coco" / "captions_val2014_notest.json.gz") as file:
        return [row["caption"] for row in json.load(file)["annotations"][::350]][:500]


def test_published_sample_scores(scores: Scores, shared: Path) -> None:
    assert scores.failed == {}
    assert scores.corpus == pytest.approx(PUBLISHED, abs=1e-4)
    expected = json.loads((shared / "data" / "coco" / "fakecap_expected_scores.json").read_text())["scores"]
    assert {KEYS[name]: value for name, value in scores.corpus.items()} == pytest.approx(expected, abs=1e-6)


def test_per_image_means_are_the_corpus_scores_where_the_metric_is_a_mean(scores: Scores) -> None:
    assert len(scores.per_image) == 1000
    for name in ("CIDEr", "ROUGE-L"):
        assert np.mean([row[name] for row in scores.per_image.values()]) == pytest.approx(
            scores.corpus[name], abs=1e-12
        )


def test_tokens_are_those_of_pycocoevalcap(
    real_captions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycocoevalcap.tokenizer import ptbtokenizer

    # The class writes beside its own file: let it believe that it lives in a copy of its folder.
    shutil.copytree(jvm.package_folder("tokenizer"), tmp_path / "tokenizer")
    monkeypatch.setattr(ptbtokenizer, "__file__", str(tmp_path / "tokenizer" / "ptbtokenizer.py"))
    java = jvm.find_java()
    assert java is not None
    odd = [
        '"Don\'t," she said: a U.S. (red) dog -- 1 1/2 ft; colour!',
        "",
        "...",
        "a | b ||| c",
        "café \N{GRINNING FACE} naïve",
    ]
    captions = real_captions + odd + real_captions[:1]
    theirs = ptbtokenizer.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(captions)})
    ours = jvm.ptb_tokenize(java, captions, timeout_s=60)
    assert ours == [theirs[i][0] for i in range(len(captions))]


def test_the_approximation_is_close_to_ptb(real_captions: list[str]) -> None:
    java = jvm.find_java()
    assert java is not None
    exact = jvm.ptb_tokenize(java, real_captions, timeout_s=60)
    same = np.mean([approximate_tokenize(text) == line for text, line in zip(real_captions, exact, strict=True)])
    assert same >= 0.99
