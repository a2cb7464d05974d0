"""Cleaning against the released program's outputs (golden/cleaning.json) and on real captions, counts pinned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cgtgan.config import CorpusConfig
from cgtgan.data import corpora
from cgtgan.data.corpora import clean_captions, clean_corpus, embedded_text, load_corpus, read_raw, shuffle_sentences

NAMES = {"coco": "coco", "flickr30k": "f30k", "gcc": "gcc", "shutterstock": "ss"}
SHUFFLED = ("coco", "flickr30k", "gcc")


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    found = json.loads((shared / "golden/cleaning.json").read_text(encoding="utf-8"))
    return {rule: found[name] for rule, name in NAMES.items()}


def check(rule: str, raw: Any, expected: dict[str, Any]) -> None:
    cleaned = clean_corpus(rule, [raw], released=True)
    if expected["result"] == "kept":
        assert cleaned.sentences == [expected["sentence"]], raw
        assert embedded_text(cleaned.sentences[0]) == expected["embedded"]
    else:
        assert cleaned.sentences == [], raw
        assert cleaned.counts["read"] == 1
        assert sum(cleaned.counts.values()) == 2  # read, and one reason
        assert expected["result"] == "dropped" or cleaned.counts[corpora.EMPTY] == 1  # 'error': theirs crashed


@pytest.mark.parametrize("rule", SHUFFLED)
def test_each_caption_as_released(golden: dict[str, Any], rule: str) -> None:
    assert len(golden[rule]["per_caption"]) > 20
    for case in golden[rule]["per_caption"]:
        check(rule, case["raw"], case)


def test_each_shutterstock_caption_at_three_draws(golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for place, value in enumerate(golden["shutterstock"]["rands"]):
        monkeypatch.setattr(
            corpora.np.random, "RandomState", lambda seed, value=value: type("R", (), {"rand": lambda self: value})()
        )
        for case in golden["shutterstock"]["per_caption"]:
            check("shutterstock", case["raw"], case["by_rand"][place])


@pytest.mark.parametrize("rule", NAMES)
def test_batch_as_released(golden: dict[str, Any], rule: str) -> None:
    batch = golden[rule]["batch"]
    ours = clean_captions(rule, batch["raw"], released=True)
    ours = shuffle_sentences(ours) if rule in SHUFFLED else ours
    assert ours == batch["sentences"]
    again = shuffle_sentences(ours)  # the order in which the released program stores embeddings
    assert again == [entry["caption"] for entry in batch["captions"]]
    assert [embedded_text(sentence) for sentence in again] == batch["embedded_in_order"]


def test_the_shuffle_is_numpys_legacy_list_shuffle() -> None:
    listed = [str(i) for i in range(1000)]
    shuffled = listed.copy()
    np.random.RandomState(1024).shuffle(shuffled)
    assert shuffle_sentences(listed) == shuffled


def check_sound(sentences: list[str]) -> None:
    for sentence in sentences:
        assert sentence.endswith(".")
        assert not sentence.endswith(("..", " ."))
        assert sentence == " ".join(sentence.split())


def test_real_coco_captions(shared: Path) -> None:
    path = shared / "data/coco/captions_val2014_notest.json.gz"
    raw = list(read_raw("coco", path))
    assert len(raw) == 176_744
    sound, released = clean_corpus("coco", raw), clean_corpus("coco", raw, released=True)
    assert sound.counts == {"read": 176_744, "kept": 176_744}
    assert released.counts == {"read": 176_744, "kept": 176_744}
    check_sound(sound.sentences)
    assert clean_captions("coco", sound.sentences) == sound.sentences
    # 25,154 have outer blanks, 1,786 inner runs of blanks, 229 a blank before the mark, 195 end in dots
    assert sum(a != b for a, b in zip(sound.sentences, released.sentences, strict=True)) == 27_364
    loaded = load_corpus(CorpusConfig(kind="coco", rule="coco", max_sentences=50), path)
    assert loaded.sentences == shuffle_sentences(sound.sentences)[:50]


def test_real_gcc_captions(shared: Path) -> None:
    path = shared / "data/gcc/gcc_val.tsv"
    raw = list(read_raw("gcc", path))
    sound, released = clean_corpus("gcc", raw), clean_corpus("gcc", raw, released=True)
    assert sound.counts == {"read": 12_000, "kept": 7_929, "sampled_out": 609, "too_long": 537, "too_short": 2_925}
    assert released.counts == {"read": 12_000, "kept": 7_654, "sampled_out": 884, "too_long": 537, "too_short": 2_925}
    check_sound(sound.sentences)
    loaded = load_corpus(CorpusConfig(kind="gcc", rule="gcc"), path)
    assert loaded.sentences == shuffle_sentences(sound.sentences)
    assert loaded.summary() == "kept 7,929 of 12,000 captions (dropped: 609 sampled out, 537 too long, 2,925 too short)"


def test_real_flickr30k_lines(shared: Path) -> None:
    raw = [line for n in range(1, 6) for line in read_raw("text_file", shared / f"data/flickr30k/val.{n}.en.gz")]
    sound, released = clean_corpus("flickr30k", raw), clean_corpus("flickr30k", raw, released=True)
    assert sound.counts == released.counts == {"read": 5_055, "kept": 5_055}
    check_sound(sound.sentences)
