"""A data set that a user's own function lists: what it may return, and how each mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgtgan.config import DATASET_KINDS, DatasetConfig
from cgtgan.data.custom_reader import reader_identity
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.datasets import ImageRecord, load_pairs, load_split
from cgtgan.errors import InputError, MissingFileError

READER = """
import csv

def read(root, split):
    with open(root / f"{split}.csv") as file:
        for image_id, path, *captions in csv.reader(file):
            yield image_id, path, captions

def rows(root, split):
    return ROWS

def of_one_argument(root):
    return []

def fails(root, split):
    yield "a", root / "a.jpg", []
    raise KeyError("no such column")
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "reader.py").write_text(READER)
    (tmp_path / "pictures").mkdir()
    for name in "abcd":
        (tmp_path / f"pictures/{name}.jpg").write_bytes(b"a picture")
    (tmp_path / "train.csv").write_text("b,pictures/b.jpg,a bird,one bird\na,pictures/a.jpg\n")
    (tmp_path / "val.csv").write_text("c,pictures/c.jpg,a cat\nd,pictures/d.jpg\n")
    return tmp_path


def config(root: Path, name: str = "read", **settings: int) -> DatasetConfig:
    return DatasetConfig(kind="custom", reader=f"{root}/reader.py:{name}", **settings)


def returns(root: Path, rows: str) -> DatasetConfig:
    (root / "reader.py").write_text(READER + f"\nfrom pathlib import Path\nROWS = {rows}\n")
    return config(root, "rows")


def test_every_kind_has_a_record() -> None:
    assert set(KINDS) == set(DATASET_KINDS)


def test_the_reader_lists_images_and_captions(root: Path) -> None:
    train = load_split(config(root), "train", root)
    assert train.images == [ImageRecord("a", root / "pictures/a.jpg"), ImageRecord("b", root / "pictures/b.jpg")]
    assert train.references == {}  # unpaired training sees no caption of a training image
    assert load_pairs(config(root), root) == {"b": ["a bird", "one bird"]}
    val = load_split(config(root), "val", root)
    assert val.references == {"c": ["a cat"]}
    assert val.bare == ("d",)
    assert [record.image_id for record in load_split(config(root, max_images=1), "train", root).images] == ["a"]


def test_paths_may_be_absolute_and_rows_lists(root: Path) -> None:
    custom = returns(root, f"[['x', Path('{root}/pictures/a.jpg'), ()], [7, 'pictures/b.jpg', ('two', 'three')]]")
    split = load_split(custom, "test", root / "pictures" / "..")
    assert split.references == {7: ["two", "three"]}
    assert split.bare == ("x",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("None", "returned None, which is not iterable"),
        ("'a.jpg'", "returned 'a.jpg', which is not iterable"),
        ("['a']", r"row 0 is 'a'; a row is \(image_id, path, captions\)"),
        ("[('a', 'pictures/a.jpg', []), ('b', 'pictures/b.jpg')]", r"row 1 is \('b', 'pictures/b\.jpg'\)"),
        ("[('a', 'pictures/a.jpg', 'a cat')]", "row 0: the captions 'a cat' must be a list of strings"),
        ("[('a', 'pictures/a.jpg', ['a cat', 3])]", r"row 0: the captions \['a cat', 3\] must be a list"),
        ("[('a', 5, [])]", "row 0: the path 5 must be a Path or a string"),
        ("[(1.5, 'pictures/a.jpg', [])]", r"row 0: the image id 1\.5 must be"),
        ("[('a', 'pictures/a.jpg', []), ('a', 'pictures/b.jpg', [])]", "row 1: image id 'a' is that of row 0 too"),
        ("[]", "train split of dataset.kind=custom .* has no image"),
    ],
)
def test_wrong_rows_are_named(root: Path, rows: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_split(returns(root, rows), "train", root)
    assert "dataset.reader=" in str(error.value) or rows == "[]"


def test_absent_pictures_are_named_unless_some_are_allowed(root: Path) -> None:
    custom = returns(root, "[('a', 'pictures/a.jpg', []), ('gone', 'pictures/gone.jpg', [])]")
    message = r"split train, row 1: .*/pictures/gone\.jpg does not exist \(1 of 2 .*dataset\.max_bad_images"
    with pytest.raises(MissingFileError, match=message):
        load_split(custom, "train", root)
    allowed = load_split(DatasetConfig(kind="custom", reader=custom.reader, max_bad_images=1), "train", root)
    assert [record.image_id for record in allowed.images] == ["a"]


def test_an_error_in_the_reader_names_its_file_and_line(root: Path) -> None:
    line = READER.splitlines().index('    raise KeyError("no such column")') + 1
    with pytest.raises(InputError, match=rf"dataset\.reader=.* failed at .*reader\.py, line {line}: KeyError"):
        load_split(config(root, "fails"), "train", root)
    with pytest.raises(InputError, match=r"of_one_argument failed in .*reader\.py: TypeError: .* takes 1 positional"):
        load_split(config(root, "of_one_argument"), "train", root)
    with pytest.raises(InputError, match=r"dataset\.reader=.*reader\.py has no nothing"):
        load_split(config(root, "nothing"), "train", root)


def test_the_identity_is_the_content_of_the_file_and_the_name(root: Path) -> None:
    before = reader_identity(config(root))
    assert before != reader_identity(config(root, "rows"))
    moved = root / "elsewhere"
    moved.mkdir()
    (moved / "other.py").write_text(READER)
    assert reader_identity(DatasetConfig(reader=f"{moved}/other.py:read")) == before
    (root / "reader.py").write_text(READER + "# another line\n")
    assert reader_identity(config(root)) != before
