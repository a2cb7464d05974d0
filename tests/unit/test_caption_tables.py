"""Captions and references in every layout: COCO, Karpathy, `{id: caption}`, `{id: [captions]}`, tables with columns."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cgtgan.config import DatasetConfig
from cgtgan.data.corpora import read_raw
from cgtgan.data.datasets import load_split
from cgtgan.errors import InputError
from cgtgan.evaluation.coco_files import load_named_references, load_results, under_reference_ids

REFERENCES = {42: ["a dog", "the dog"], 73: ["two cats"]}
ROWS = [(i, text) for i, texts in REFERENCES.items() for text in texts]
CSV = "image_id,split,caption\n" + "".join(f'{i},test,"{text}"\n' for i, text in ROWS)
LINES = "".join(json.dumps({"image_id": i, "caption": text}) + "\n" for i, text in ROWS)
LAYOUTS = {
    "coco.json": json.dumps({"annotations": [{"image_id": i, "caption": text} for i, text in ROWS]}),
    "list.json": json.dumps([{"image_id": str(i), "caption": text} for i, text in ROWS]),
    "by_id.json": json.dumps(REFERENCES),
    "padded.json": json.dumps({f"{i:012d}": texts for i, texts in REFERENCES.items()}),
    "names.json": json.dumps({f"{i}.jpg": texts for i, texts in REFERENCES.items()}),
    "a.csv": CSV,
    "a.tsv": CSV.replace(",", "\t").replace("caption", "Comment").replace("image_id", "image"),
    "no_ending": "image_name| comment_number| comment\n" + "".join(f"{i}.jpg| 0| {text}\n" for i, text in ROWS),
    "a.jsonl": LINES,
    "lists.jsonl": "".join(json.dumps({"id": i, "captions": texts}) + "\n" for i, texts in REFERENCES.items()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_references_of_every_layout(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LAYOUTS[name])
    assert load_named_references(tmp_path / name)[0] == REFERENCES
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(LAYOUTS[name].encode()))
    assert load_named_references(tmp_path / f"{name}.gz")[0] == REFERENCES
    assert sorted(read_raw("coco", tmp_path / name)) == ["a dog", "the dog", "two cats"]


def test_references_in_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow (extra tables) is not installed")
    stream = io.BytesIO()
    table = arrow.table({"id": [1, 2, 3], "image_id": [i for i, _ in ROWS], "caption": [text for _, text in ROWS]})
    pytest.importorskip("pyarrow.parquet").write_table(table, stream)
    (tmp_path / "a.parquet").write_bytes(stream.getvalue())
    assert load_named_references(tmp_path / "a.parquet")[0] == REFERENCES


@pytest.mark.parametrize(
    ("name", "content", "matched"),
    [
        ("by_id.json", '{"42": "a dog", "73": ["two cats"]}', "2 of 2 image ids .* such as '42' for 42"),
        ("coco.json", json.dumps({"annotations": [{"image_id": 42, "caption": "a dog"}]}), None),
        ("a.csv", "file_name,caption\nphotos/0073.JPG,two cats\n", "1 of 1 image ids .* such as 'photos/0073' for 73"),
        ("a.jsonl", '{"image_id": 42, "caption": "a"}\n{"image_id": "73", "caption": "b"}\n', "1 of 2 .* '73' for 73"),
    ],
)
def test_results_of_every_layout(
    tmp_path: Path, name: str, content: str, matched: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    path.write_text(content)
    captions = load_results(path)
    assert len(captions) == len(under_reference_ids(captions, REFERENCES, {}, path).keys() & REFERENCES)
    assert len(caplog.messages) == (matched is not None)
    assert matched is None or re.search(matched, caplog.messages[0])


def test_an_image_without_a_caption_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"1": ["a dog"], "2": []}')
    assert load_named_references(tmp_path / "a.json")[0] == {1: ["a dog"], 2: []}
    (tmp_path / "a.json").write_text('{"1": ["a dog", "a cat"], "2": "b"}')
    with pytest.raises(InputError, match=r"1 image \('1'\) has more than one caption"):
        load_results(tmp_path / "a.json")


def test_names_that_differ_in_the_ending_alone_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a.jpg": "a dog", "a.png": "a cat", "b.jpg": "a bird"}')
    assert load_results(tmp_path / "a.json") == {"a.jpg": "a dog", "a.png": "a cat", "b": "a bird"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,score\n1.jpg,7\n", "is a table with the columns 'image', 'score': one of image_id, .* are needed"),
        ("1.jpg#0\tA dog .\n1.jpg#1\tA cat .\n", "is a table with the columns '1.jpg#0', 'A dog .': one of"),
        (
            '{"image_id": 1, "words": "x"}\n{"image_id": 2, "words": "x"}\n',
            "JSON Lines file with the columns 'image_id', 'w",
        ),
        ('{"captions": ["a dog"]}', "a list of image_id/caption, a COCO or a Karpathy file is accepted"),
        (
            '{"image_id": 1, "caption": "a"}\n{"image_id": null, "caption": "b"}\n',
            r"annotations\[1\]: the image id None must be",
        ),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2}\n', "a caption of image 2 is None, it must be a string"),
        ("A dog runs.\nTwo cats sit.\n", "is no JSON: it begins with 'A dog runs"),
    ],
)
def test_what_is_no_caption_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "captions").write_text(content)
    with pytest.raises(InputError, match=message):
        load_named_references(tmp_path / "captions")


def test_a_table_has_the_captions_of_a_folder_and_of_listed_images(tmp_path: Path) -> None:
    table = "image_name| comment_number| comment\n" + "".join(f"{i}.jpg| 0| {text}\n" for i, text in ROWS)
    for place, content in (
        ("results.csv", table),
        ("lists/x_train.txt", "9.jpg"),
        ("lists/x_test.txt", "42.jpg\n73.jpg\n"),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(content)
    (tmp_path / "flickr30k_images").mkdir()
    for i in REFERENCES:
        Image.new("RGB", (9, 9)).save(tmp_path / f"flickr30k_images/{i}.jpg")
    listed: dict[str, Any] = {"karpathy": "lists", "test_annotations": "results.csv"}
    assert load_split(DatasetConfig(kind="flickr30k", **listed), "test", tmp_path).references == REFERENCES
    folder: dict[str, Any] = {"images": "flickr30k_images", "val_fraction": 0.0, "test_fraction": 1.0}
    config = DatasetConfig(kind="folder", references="results.csv", **folder)
    assert load_split(config, "test", tmp_path).references == REFERENCES
