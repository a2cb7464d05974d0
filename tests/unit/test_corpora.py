"""Corpora: no input crashes the cleaning, a clean sentence is one line with one full stop, a damaged file is named."""

import errno
import gzip
import json
import pickle
import unicodedata
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgtgan.config import CorpusConfig, DatasetConfig
from cgtgan.data.corpora import (
    PUNCTUATION,
    RULES,
    clean_captions,
    clean_corpus,
    corpus_path,
    embedded_text,
    is_beside_its_images,
    load_corpus,
    read_raw,
)
from cgtgan.data.plain_pickle import load_plain_pickle
from cgtgan.errors import InputError, MissingFileError

INVISIBLE = (
    "\n",
    "\r",
    "\t",
    "\x00",
    "\x1b",
    "\x1c",
    "\x85",
    "\u2028",
    "\ud800",
    "\u200b",
    "\u200d",
    "\u202e",
    "\ufeff",
    "\xa0",
)
WORDS = st.sampled_from(
    [
        *'abcé.,!?"ß#-',
        "dog",
        "…",
        "...",
        "--",
        "``",
        "-LRB-",
        ". .",
        " ",
        "ǆ",
        "ﬁ",
        "\u0301",
        "<S>",
        "</S>",
        " : ",
        *INVISIBLE,
    ]
)
TEXTS = st.text() | st.lists(WORDS, max_size=30).map("".join) | st.lists(WORDS, max_size=30).map(" ".join)
TOKENS = st.lists(TEXTS | WORDS, max_size=25)
ODD = (
    st.none()
    | st.integers()
    | st.binary()
    | st.floats()
    | st.lists(TEXTS | st.none() | st.binary(), max_size=9)
    | TOKENS
    | TEXTS
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ODD, max_size=6), st.sampled_from(RULES), st.booleans())
def test_nothing_crashes_and_counts_add_up(captions: list[Any], rule: str, released: bool) -> None:
    corpus = clean_corpus(rule, captions, released=released)
    counts = dict(corpus.counts)
    assert counts.pop("read") == len(captions)
    assert counts["kept"] == len(corpus.sentences)
    assert sum(counts.values()) == len(captions)
    for sentence in corpus.sentences:
        assert sentence.endswith(".")
        assert sentence.encode("utf-8").decode("utf-8") == sentence
        if rule == "none" or not released:
            check_sound(rule, sentence)


def check_sound(rule: str, sentence: str) -> None:
    assert not sentence.endswith(("..", " ."))
    assert any(map(str.isalnum, sentence))
    assert len(sentence.splitlines()) == 1
    assert sentence == " ".join(sentence.split())
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs") or c in "\u200c\u200d" for c in sentence)
    words = sentence.split()
    plain = [word for word in words if word not in PUNCTUATION]
    # each time, gcc and shutterstock drop a mark at the start and check the length again, with a draw above 15 words
    if rule in ("coco", "flickr30k", "none") or (len(plain) > 6 and len(words) <= 15 and words[0] in plain):
        assert clean_captions(rule, [sentence]) == [sentence]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["dog", "a", "b.", "É", "'s", ",", "--", "...", "..", ":", "ßx", "\u200b", "\x07"]),
        min_size=6,
        max_size=22,
    )
)
def test_long_captions_are_sound_too(tokens: list[str]) -> None:
    for rule, raw in (("gcc", " ".join(tokens)), ("shutterstock", tokens)):
        for sentence in clean_captions(rule, [raw]):
            check_sound(rule, sentence)


@pytest.mark.parametrize(
    ("raw", "coco", "none"),
    [
        ("a cat sits", "A cat sits.", "a cat sits."),
        ("Two dogs run . ", "Two dogs run.", "Two dogs run."),
        ("a dog\nand\ta  cat!", "A dog and a cat.", "a dog and a cat."),
        ("Ellipsis...", "Ellipsis.", "Ellipsis."),
        ("Wow!!", "Wow!.", "Wow."),
        ('ends with quote"', "Ends with quote.", 'ends with quote".'),
        ("a", "A.", "a."),
        ("ßtrasse view.", "Sstrasse view.", "ßtrasse view."),
        ("broken \ud800 pair", "Broken ? pair.", "broken ? pair."),
        ("The U.S.", "The U.S.", "The U.S."),
        ("a dog\u2028runs\x85far\x00off.", "A dog runs far off.", "a dog runs far off."),
        ("\ufeff\u202ea dog\u200b.\u200b", "A dog.", "a dog."),
        ("می\u200cروم", "می\u200cروم.", "می\u200cروم."),
    ],
)
def test_sound_rules(raw: str, coco: str, none: str) -> None:
    assert clean_captions("coco", [raw]) == clean_captions("flickr30k", [raw]) == [coco]
    assert clean_captions("none", [raw]) == [none]
    assert embedded_text(coco) == coco[:-1]


def test_reasons_are_counted() -> None:
    counts = clean_corpus("coco", ["a dog", "", "  ", ".", "?!", None, 7, ["a", "dog"]]).counts
    assert counts == {"read": 8, "kept": 1, "empty": 2, "no_words": 2, "wrong_type": 3}
    counts = clean_corpus("shutterstock", [[b"a"] * 9, [None] * 9, {"a": 1}, (("a",),), ["w"] * 9]).counts
    assert counts == {"read": 5, "kept": 1, "wrong_type": 4}
    long, middle = " ".join(["w"] * 20), " ".join(["w"] * 17)
    assert clean_corpus("gcc", ["w w", long, ".", *[middle] * 50]).counts["too_long"] == 1
    assert clean_corpus("shutterstock", [["<S>", "</S>"], "<S> a b </S>", 3]).counts == {
        "read": 3, "kept": 0, "empty": 1, "too_short": 1, "wrong_type": 1,
    }  # fmt: skip


def test_gcc_keeps_a_third_of_long_captions_and_the_released_rule_none() -> None:
    long = [" ".join(["w"] * 17)] * 2000
    assert 500 < len(clean_captions("gcc", long)) < 700
    assert clean_captions("gcc", long) == clean_captions("gcc", long, seed=0)
    assert clean_captions("gcc", long, released=True) == []


def test_unknown_rule() -> None:
    with pytest.raises(InputError, match=r"corpus\.rule=cococo.*one of coco"):
        clean_captions("cococo", [])


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone dog\r\n\nbad \xff byte\nlast")
    notes: Counter[str] = Counter()
    assert list(read_raw("text_file", path, notes)) == ["one dog", "", "bad \ufffd byte", "last"]
    assert notes == {"bad_bytes": 1}
    zipped = tmp_path / "a.txt.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    assert list(read_raw("text_file", zipped)) == list(read_raw("text_file", path))
    corpus = load_corpus(CorpusConfig(kind="text_file", rule="coco", max_sentences=2), path)
    assert len(corpus.sentences) == 2
    assert corpus.counts == {"read": 4, "kept": 3, "empty": 1, "bad_bytes": 1}
    assert corpus.summary() == "kept 3 of 4 captions (dropped: 1 empty); 1 lines had bytes that are not UTF-8"


def test_line_ends_are_those_of_any_system(tmp_path: Path) -> None:
    """A caption goes from one to the next; what Python's splitlines takes for one more is a blank in it."""
    path = tmp_path / "a.txt"
    path.write_bytes("a dog\ra cat\r\na\u2028man\x85in\x0cred\n\rend".encode())
    assert list(read_raw("text_file", path)) == ["a dog", "a cat", "a\u2028man\x85in\x0cred", "", "end"]
    assert load_corpus(CorpusConfig(kind="text_file", rule="none", max_sentences=9), path).counts == {
        "read": 5,
        "kept": 4,
        "empty": 1,
    }


def test_caption_files_of_three_layouts(tmp_path: Path) -> None:
    paper = [{"image_id": "1", "caption": "a"}, {"image_id": "2", "caption": None}]
    karpathy = {
        "images": [
            {"split": split, "filename": f"{n}.jpg", "cocoid": n, "sentences": [{"raw": f"{split} {n}"}]}
            for n, split in enumerate(("train", "val", "restval", "test"))
        ]
    }
    for content, expected in (
        (paper, ["a", None]),
        ({"annotations": paper}, ["a", None]),
        (karpathy, ["train 0", "restval 2"]),
    ):
        path = tmp_path / "captions.json"
        path.write_text(json.dumps(content))
        assert list(read_raw("coco", path)) == expected


def test_gcc_file(tmp_path: Path) -> None:
    path = tmp_path / "gcc.tsv"
    path.write_text("a man on a very long white horse\thttp://x\nno tab here\nshort\thttp://y\n")
    corpus = load_corpus(CorpusConfig(kind="gcc", rule="gcc"), path)
    assert corpus.sentences == ["A man on a very long white horse."]
    assert corpus.counts == {"read": 3, "kept": 1, "too_short": 1, "no_tab": 1}
    path.write_text(
        "caption\turl\na man on\ta very long white horse\thttp://x\n\thttp://y\none two\thttps://z\tlabel\t/m/1\n"
    )
    assert list(read_raw("gcc", path)) == ["caption", "a man on\ta very long white horse", "", "one two"]
    for header in ("", "url\tcaption\n"):
        path.write_text(header + "http://x\ta man\n")
        with pytest.raises(InputError, match="address first"):
            list(read_raw("gcc", path))
    path.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="no row caption<TAB>url in 2 lines"):
        list(read_raw("gcc", path))


def test_shutterstock_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "s.pkl"
    tokens = ["<S>", "one", "two", "three", "four", "five", "six", "seven", "</S>"]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps([tokens, ("<S>", "x", "</S>"), 5], protocol=protocol))
        assert load_corpus(CorpusConfig(kind="shutterstock", rule="shutterstock"), path).sentences == [
            "One two three four five six seven."
        ]
    path.write_bytes(
        b"(lp0\n(lp1\nS'<S>'\np2\naS'caf\\xc3\\xa9'\naS'b'\naS'c'\naS'd'\naS'e'\naS'f'\naVg\naS'</S>'\naa."
    )  # as Python 2 writes
    assert load_corpus(CorpusConfig(kind="shutterstock", rule="shutterstock"), path).sentences == ["Café b c d e f g."]
    path.write_bytes(gzip.compress(pickle.dumps((tokens, [None] * 9)), mtime=0))
    assert load_corpus(CorpusConfig(kind="shutterstock", rule="shutterstock"), path).counts == {
        "read": 2,
        "kept": 1,
        "wrong_type": 1,
    }
    path.write_bytes(pickle.dumps([OrderedDict(a=1)]))
    with pytest.raises(InputError, match=r"s\.pkl.*collections\.OrderedDict"):
        load_plain_pickle(path, "corpus.path")
    evidence = tmp_path / "ran"
    path.write_bytes(f"cos\nsystem\n(S'touch {evidence}'\ntR.".encode())
    with pytest.raises(InputError, match=r"os\.system"):
        load_plain_pickle(path, "corpus.path")
    assert not evidence.exists()
    path.write_bytes(pickle.dumps([tokens])[:-5])
    with pytest.raises(InputError, match="no whole pickle"):
        load_plain_pickle(path, "corpus.path")
    path.write_bytes(pickle.dumps({"a": tokens}))
    with pytest.raises(InputError, match="list of token lists"):
        read_raw("shutterstock", path)


@settings(max_examples=100, deadline=None)
# Without the two opcodes that address the memo by 32 bits: those may ask for much memory.
@given(st.binary(max_size=40).filter(lambda b: b"r" not in b and b"j" not in b))
def test_random_bytes_are_no_pickle_but_no_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pkl"
    path.write_bytes(content)
    try:
        load_plain_pickle(path, "corpus.path")
    except InputError as error:
        assert "random.pkl" in str(error)  # noqa: PT017 (a few random bytes are a pickle)


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        ("a.json", b'[{"image_id": 1, "capt', "coco", r"not whole JSON \(line 1, column 18"),
        ("a.json", b"\n<!DOCTYPE html><html>", "coco", "web page"),
        ("a.txt", b"<html>404</html>", "text_file", "web page"),
        ("a.tsv.gz", b"caption\turl", "gcc", r"ends in \.gz but is not a gzip file"),
        ("a.json", b"PK\x03\x04....", "flickr30k", "is an archive"),
        ("a.txt", "a dog".encode("utf-16"), "text_file", "UTF-16"),
        ("a.txt.gz", gzip.compress(bytes(range(1, 256)) * 99, mtime=0)[:-20], "text_file", "damaged or cut off"),
        ("a.json.gz", gzip.compress(b"[]", mtime=0)[:-4], "coco", "damaged or cut off"),
        ("a.json", b'{"captions": []}', "coco", "keys.*captions"),
        ("a.json", b'[{"image_id": 1, "text": "a"}]', "coco", r"entry \[0\].*'image_id' and 'caption'.*text"),
        ("a.json", b'[{"image_id": [1], "caption": "a"}]', "coco", r"image id \[1\]"),
        ("a.json", b"\xff\x00", "coco", "not UTF-8"),
        *(
            ("a.json", b'[{"image_id": %s, "caption": "a"}]' % i, "coco", "image id .* must be an integer or a name")
            for i in (b"NaN", b"true", b"12.0", b"null", b'""')
        ),
        ("a.json", b'[{"image_id": ' + b"9" * 5000 + b', "caption": "a"}]', "coco", "number of thousands of digits"),
        ("a.json", b"[1, 2]", "coco", r"entry \[0\].*found int"),
        ("a.json", b"3", "coco", "holds a int"),
        ("a.json", b"", "coco", "is empty"),
        ("a.txt", b"", "text_file", "is empty"),
        ("a.zip", b"\n <head><title>Sign in", "text_file", "web page"),
        ("a.pkl", b"<!-- --><html>", "shutterstock", "web page"),
        ("a.pkl", b"", "shutterstock", "is empty"),
        ("a.tsv", b"BZh91AY&SY\x00", "gcc", "damaged or cut off"),
        ("a.txt", b"\xfd7zXZ\x00", "text_file", "damaged or cut off"),
        ("a.txt.gz", gzip.compress(b"PK\x03\x04...", mtime=0), "text_file", "is an archive"),
        ("a.txt", "a dog".encode("utf-16-le"), "text_file", "is no text: line 1 has zero bytes"),
        ("a.txt", b"a dog\n" + b"dog " * 300_000, "text_file", "line 2 has 1,000,000 characters or more"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: bytes, kind: str, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        list(read_raw(kind, path))
    assert name in str(caught.value)


def test_missing_files_and_usual_places(tmp_path: Path) -> None:
    for kind, source in (("gcc", "ConceptualCaptions"), ("shutterstock", "sentence"), ("demo", "preprocess")):
        path = corpus_path(CorpusConfig(kind=kind), tmp_path)
        with pytest.raises(MissingFileError, match=rf"{source}.*corpus\.path") as caught:
            load_corpus(CorpusConfig(kind=kind, rule="coco"), path)
        assert str(path) in str(caught.value)
    assert corpus_path(CorpusConfig(kind="demo_external"), tmp_path) == tmp_path / "corpus/external.txt"
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/sentences.pkl").touch()
    assert corpus_path(CorpusConfig(kind="shutterstock"), tmp_path) == tmp_path / "corpus/sentences.pkl"
    with pytest.raises(
        MissingFileError, match=r"my\.json does not exist: get it from https.*, or set corpus\.path to where it is"
    ):
        load_corpus(CorpusConfig(kind="coco", rule="coco"), tmp_path / "my.json")
    assert corpus_path(CorpusConfig(kind="gcc", path="other.tsv"), tmp_path) == Path("other.tsv")
    with pytest.raises(InputError, match=r"corpus\.path is null"):
        corpus_path(CorpusConfig(kind="text_file"), tmp_path)


def test_what_the_system_refuses_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a dog\n")

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"a\.txt cannot be read \(Permission denied\): fix its permissions"):
        list(read_raw("text_file", path))


def test_a_corpus_lies_beside_its_own_images_alone() -> None:
    coco, flickr = DatasetConfig(kind="coco"), DatasetConfig(kind="flickr30k")
    assert is_beside_its_images(CorpusConfig(kind="coco"), coco)
    assert not is_beside_its_images(CorpusConfig(kind="coco", path="c.json"), flickr)
    assert not is_beside_its_images(CorpusConfig(kind="gcc"), coco)
    with pytest.raises(
        InputError,
        match=r"corpus\.path is null and corpus\.kind=coco.*dataset\.kind=flickr30k.*corpus\.path=FILE"
        ".*get it from http",
    ):
        is_beside_its_images(CorpusConfig(kind="coco"), flickr)


def test_released_brings_the_order_of_the_released_embeddings(tmp_path: Path) -> None:
    """Sentences shuffled with seed 1024, then their places once more: row r is the sentence that stands at index[r]."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{n} dogs run\n" for n in range(50)))
    sentences = [f"{n} dogs run." for n in range(50)]
    np.random.seed(1024)
    np.random.shuffle(sentences)
    index = list(range(50))
    np.random.seed(1024)
    np.random.shuffle(index)
    config = CorpusConfig(kind="text_file", rule="coco", released=True, max_sentences=40)
    assert load_corpus(config, path).sentences == [sentences[i] for i in index][:40]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.txt"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    with pytest.raises(InputError, match=r"photo\.txt \(corpus\.path\) is no text: line 3 has zero bytes"):
        load_corpus(CorpusConfig(kind="text_file", rule="coco"), path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '[{"image_id": 1, "caption": "a dog"}]',
            r"is a JSON list with the columns 'image_id', 'caption'.*corpus=coco",
        ),
        ('{"images": []}', r"is JSON, not a list or one sentence per line: use corpus=coco"),
        ('{"images": [', "is not whole JSON"),
        ('\n[{"a"', "is not whole JSON"),
        ("[\n", "is not whole JSON"),
    ],
)
def test_json_is_no_text_file(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"captions\.json \(corpus\.path\) {reason}"):
        list(read_raw("text_file", path))


def test_no_sentence_left_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n...\n")
    with pytest.raises(InputError, match=r"no sentence is left.*2 empty, 1 no words"):
        load_corpus(CorpusConfig(kind="text_file"), path)
