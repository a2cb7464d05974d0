"""COCO's two caption formats: results and references, plain and gzip, whole and broken."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cgtgan.errors import InputError, MissingFileError
from cgtgan.evaluation.coco_files import load_references, load_results, save_results, under_reference_ids

REFERENCES = {1: ["a man riding a horse", "the man is on a horse"], 2: ["two dogs"], 3: ["a red bus"]}


def test_results_round_trip(tmp_path: Path) -> None:
    captions = {1: "a man", "x": "café\n\ud83d", 3: ""}
    save_results(tmp_path / "deep" / "captions.json", captions)
    assert load_results(tmp_path / "deep" / "captions.json") == captions
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["captions.json"]
    with pytest.raises(InputError, match="None"):
        save_results(tmp_path / "captions.json", {1: None})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]',
            r"1 image \(1\) has more than one caption",
        ),
        (b'[{"image_id": 1, "caption": "a"}, {"image_id"', "line 1, column 46"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b'{"image_id": 1}', "JSON dict, not a list"),
        (b'[{"image_id": 1, "caption": "a"}, {"image_id": 1.5, "caption": "b"}]', r"\[1\]"),
        (b'[{"image_id": true, "caption": "a"}]', r"\[0\]"),
        (b'[{"image_id": 1, "caption": null}]', r"\[0\]"),
        (b"[7]", r"\[0\]"),
        (b"\xff\xfe", "UTF-16"),
        (gzip.compress(b"[]" * 999, mtime=0)[:20], "damaged or cut off"),
        (b"[" * 200_000, "nested"),
    ],
)
def test_broken_results_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "captions.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_results(tmp_path / "captions.json")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nothing\.json"):
        load_results(tmp_path / "nothing.json")


def test_compressed_file_that_expands_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgtgan.data.user_files.SMALL_JSON", 1000)
    (tmp_path / "captions.json").write_bytes(gzip.compress(b"[" + b" " * 1_000_000 + b"]", mtime=0))
    with pytest.raises(InputError, match=r"captions\.json \(captions\) expands to more than [0-9,]+ bytes"):
        load_results(tmp_path / "captions.json")


def test_references_plain_and_gzip(tmp_path: Path) -> None:
    rows = [{"id": 7, "image_id": i, "caption": text} for i, texts in REFERENCES.items() for text in texts]
    content = json.dumps({"images": [{"id": 8}], "annotations": rows}).encode()
    (tmp_path / "plain.json").write_bytes(content)
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(content, mtime=0))
    expected = {8: [], **REFERENCES}
    assert load_references(tmp_path / "plain.json") == load_references(tmp_path / "packed.json.gz") == expected
    (tmp_path / "annotations_alone.json").write_text(json.dumps({"annotations": rows}))
    assert load_references(tmp_path / "annotations_alone.json") == REFERENCES
    (tmp_path / "wrong.json").write_text('{"annotations": [], "images": {"id": 1}}')
    with pytest.raises(InputError, match="'images' is not a list"):
        load_references(tmp_path / "wrong.json")
    (tmp_path / "wrong.json").write_text("[]")
    with pytest.raises(InputError, match="has no caption"):
        load_references(tmp_path / "wrong.json")
    (tmp_path / "wrong.json").write_text('{"captions": []}')
    with pytest.raises(InputError, match="a COCO or a Karpathy file is accepted"):
        load_references(tmp_path / "wrong.json")


def test_references_in_every_layout_of_a_data_set(tmp_path: Path) -> None:
    rows = [{"image_id": f"{i:012d}", "caption": text} for i, texts in REFERENCES.items() for text in texts]
    images = [
        {"cocoid": i, "filename": f"{i}.jpg", "split": split, "sentences": [{"raw": text} for text in REFERENCES[i]]}
        for i, split in ((1, "test"), (2, "val"), (3, "restval"))
    ]
    for content in (rows, {"annotations": rows}, {"images": images}):
        (tmp_path / "references.json").write_text(json.dumps(content))
        assert load_references(tmp_path / "references.json") == REFERENCES


CAPTIONS = ["a dog", "two cats"]
NAMES = {42: "COCO_val2014_000000000042.jpg", 73: "COCO_val2014_000000000073.jpg"}


@pytest.mark.parametrize("names", [NAMES, {42: "000000000042.jpg", 73: "000000000073.jpg"}, {}])
@pytest.mark.parametrize(
    "keys",
    [
        (42, 73),
        ("42", "73"),
        ("000000000042", "000000000073"),
        ("photos/000000000042.jpg", "photos/000000000073.jpg"),
        ("val2014\\COCO_val2014_000000000042.jpg", "val2014\\COCO_val2014_000000000073.jpg"),
    ],
)
def test_captions_find_their_references(keys: tuple[Any, Any], names: dict[Any, str]) -> None:
    captions = dict(zip(keys, CAPTIONS, strict=True))
    assert under_reference_ids(captions, [42, 73], names, Path("x")) == {42: "a dog", 73: "two cats"}


def test_captions_of_other_images_keep_their_ids() -> None:
    names = {42: "a.jpg", 7: "b42.jpg"}
    for key in ("photos/42.jpg", "c0ffee42.jpg", "b", 8, "b/a.jpg.png"):
        assert under_reference_ids({key: "a dog"}, [42, 7], names, Path("x")) == {key: "a dog"}
    assert under_reference_ids({"42": "a dog", "c/a": "x"}, [42, 7], {}, Path("x")) == {42: "a dog", "c/a": "x"}
    apart = {"007": "a", "7": "b"}
    assert under_reference_ids(apart, ["7", "007"], {}, Path("x")) == apart
    with pytest.raises(InputError, match=r"r\.json: the captions of 42 and 'p/a\.jpg' are of one image, 42: keep one"):
        under_reference_ids({42: "a", "p/a.jpg": "b"}, [42, 7], names, Path("r.json"))
