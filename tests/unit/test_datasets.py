"""Datasets: small genuine layouts of each kind, and the odd ones people have."""

import errno
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cgtgan.config import DatasetConfig, DemoWorldConfig
from cgtgan.data.annotated_images import training_caption_files, training_captions
from cgtgan.data.datasets import ImageRecord, load_pairs, load_split
from cgtgan.data.demo_world import write_demo_world
from cgtgan.data.image_files import open_image
from cgtgan.errors import InputError, MissingFileError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco_name(year: str, n: int) -> str:
    return f"COCO_{year}_{n:012d}.jpg"


def coco_format(captions: dict[Any, list[str]], **names: str) -> dict[str, Any]:
    return {
        "images": [{"id": i, **({"file_name": names[str(i)]} if str(i) in names else {})} for i in captions],
        "annotations": [{"id": 0, "image_id": i, "caption": c} for i, cs in captions.items() for c in cs],
    }


COCO = DatasetConfig(name="coco", kind="coco")
IN_TRAIN, RESTVAL, VAL, TEST = (9, 3), (5,), (42, 7), (8,)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """The authors' annotations; training ids are strings, one training image lies in val2014."""
    touch(*(tmp_path / "train2014" / coco_name("train2014", n) for n in IN_TRAIN))
    touch(*(tmp_path / "val2014" / coco_name("val2014", n) for n in (*RESTVAL, *VAL, *TEST)))
    pairs = [{"image_id": str(n), "caption": f"c{n}{k}"} for n in (*IN_TRAIN, *RESTVAL) for k in "ab"]
    dump(tmp_path / "annotations/train_caption.json", pairs)
    dump(tmp_path / "annotations/val_caption_coco_format.json", coco_format({n: [f"v{n}", "x"] for n in VAL}))
    dump(tmp_path / "annotations/test_caption_coco_format.json", coco_format({n: ["only one"] for n in TEST}))
    return tmp_path


def check_coco(config: DatasetConfig, root: Path) -> None:
    train, val, test = (load_split(config, name, root) for name in ("train", "val", "test"))
    assert train.images == [
        ImageRecord(3, root / "train2014" / coco_name("train2014", 3)),
        ImageRecord(5, root / "val2014" / coco_name("val2014", 5)),
        ImageRecord(9, root / "train2014" / coco_name("train2014", 9)),
    ]
    assert train.references == {}
    assert [r.image_id for r in val.images] == [7, 42]
    assert val.references == {7: ["v7", "x"], 42: ["v42", "x"]}
    assert list(val.references) == [7, 42]
    assert test.references == {8: ["only one"]}
    assert load_pairs(config, root) == {n: [f"c{n}a", f"c{n}b"] for n in (3, 5, 9)}
    assert sorted(training_captions(config, root)) == sorted(f"c{n}{k}" for n in (3, 5, 9) for k in "ab")
    assert all(path.is_file() for path in training_caption_files(config, root))


def test_coco_of_the_authors(coco: Path) -> None:
    check_coco(COCO, coco)
    place = coco / "annotations/train_caption.json"
    pairs = json.loads(place.read_text())
    dump(place, [pair | {"image_id": int(pair["image_id"])} for pair in pairs])
    dump(coco / "annotations/val_caption_coco_format.json", coco_format({str(n): [f"v{n}", "x"] for n in VAL}))
    check_coco(COCO, coco)
    place.rename(coco / "mine.json")
    check_coco(DatasetConfig(kind="coco", train_annotations="mine.json"), coco)


def test_a_corpus_keeps_the_order_of_its_file_and_what_is_no_caption(coco: Path) -> None:
    """The published shuffle starts from the file's order. The cleaning counts wrong captions; references refuse."""
    rows = [(9, "c"), (3, None), (5, "a"), (9, "b"), (3, 7)]
    dump(coco / "annotations/train_caption.json", [{"image_id": i, "caption": c} for i, c in rows])
    assert training_captions(COCO, coco) == ["c", None, "a", "b", 7]


def test_coco_by_karpathys_file(coco: Path) -> None:
    images = []
    for split, ids, texts in (
        ("train", IN_TRAIN, "c{0}a c{0}b"),
        ("restval", RESTVAL, "c{0}a c{0}b"),
        ("val", VAL, "v{0} x"),
        ("test", TEST, "only_one"),
    ):
        for n in ids:
            year = "train2014" if split == "train" else "val2014"
            sentences = [{"raw": t.replace("_", " ")} for t in texts.format(n).split()]
            images.append(
                {"filepath": year, "filename": coco_name(year, n), "cocoid": n, "split": split, "sentences": sentences}
            )
    shutil.rmtree(coco / "annotations")
    dump(coco / "dataset_coco.json", {"images": images, "dataset": "coco"})
    check_coco(COCO, coco)
    check_coco(DatasetConfig(kind="coco", karpathy="dataset_coco.json"), coco)


def test_coco_by_split_lists_and_the_original_captions(coco: Path) -> None:
    shutil.rmtree(coco / "annotations")
    for name, lines in (
        ("train", [coco_name("train2014", n) for n in IN_TRAIN] + [coco_name("val2014", n) for n in RESTVAL]),
        ("val", [coco_name("val2014", n) for n in VAL]),
        ("test", [coco_name("val2014", n) for n in TEST]),
    ):
        (coco / "lists").mkdir(exist_ok=True)
        (coco / f"lists/coco_{name}.txt").write_text("\r\n".join(lines) + "\n")
    config = DatasetConfig(kind="coco", karpathy="lists")
    assert len(load_split(config, "train", coco).images) == 3  # no caption file is opened: there is none
    dump(coco / "annotations/captions_train2014.json", coco_format({n: [f"c{n}a", f"c{n}b"] for n in IN_TRAIN}))
    val2014 = {5: ["c5a", "c5b"], 8: ["only one"], **{n: [f"v{n}", "x"] for n in VAL}}
    dump(coco / "annotations/captions_val2014.json", coco_format(val2014))
    check_coco(config, coco)


def test_the_real_split_lists_and_captions(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    source = shared / "data/coco"
    names = (source / "karpathy/coco_val.txt").read_text().split()
    touch(*(tmp_path / "val2014" / name for name in names))
    config = DatasetConfig(
        kind="coco", karpathy=str(source / "karpathy"), val_annotations=str(source / "captions_val2014_notest.json.gz")
    )
    split = load_split(config, "val", tmp_path)
    assert len(split.images) == 4_975  # the shared file leaves out the captions of 25
    assert sum(map(len, split.references.values())) == 24_885  # 25,010 in the whole split, less 25 x 5
    with pytest.raises(MissingFileError, match=r"113287 of 113287 train images.*no such folder: .*train2014"):
        load_split(config, "train", tmp_path)


def test_the_real_split_lists_leave_no_validation_caption_in_the_corpus(shared: Path, tmp_path: Path) -> None:
    source = shared / "data/coco"
    dump(tmp_path / "annotations/captions_train2014.json", coco_format({57870: ["a train caption"]}))
    (tmp_path / "annotations/captions_val2014.json").symlink_to(source / "captions_val2014_notest.json.gz")
    config = DatasetConfig(kind="coco", karpathy=str(source / "karpathy"))
    captions = training_captions(config, tmp_path)
    assert captions[0] == "a train caption"
    assert len(captions) == 1 + 176_744 - 24_885  # less those of the validation images, see above
    files = [path.name for path in training_caption_files(config, tmp_path)]
    assert files == ["coco_train.txt", "captions_train2014.json", "captions_val2014.json"]


def test_absent_images(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    (coco / "val2014" / coco_name("val2014", 42)).unlink()
    with pytest.raises(
        MissingFileError, match=r"1 of 2 val images.*first 42.*cocodataset.*dataset\.images.*dataset\.max_bad_images"
    ):
        load_split(COCO, "val", coco)
    with caplog.at_level(logging.WARNING):
        split = load_split(DatasetConfig(kind="coco", max_bad_images=1), "val", coco)
    assert split.references == {7: ["v7", "x"]}
    assert "1 of 2 images are not on disk" in caplog.text
    assert [r.image_id for r in load_split(DatasetConfig(kind="coco", max_images=1), "val", coco).images] == [7]
    # A training id may lie in either folder, a validation id in val2014 alone.
    touch(coco / "train2014" / coco_name("train2014", 42))
    with pytest.raises(MissingFileError, match="first 42"):
        load_split(COCO, "val", coco)


def test_images_without_captions_and_captions_without_images(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = coco_format({42: ["a"], 7: []})
    content["annotations"].append({"image_id": 99, "caption": "stray"})
    dump(coco / "annotations/val_caption_coco_format.json", content)
    with caplog.at_level(logging.WARNING):
        split = load_split(COCO, "val", coco)
    assert split.references == {42: ["a"]}
    assert "captions of 1 ids belong to no listed image, 99 first" in caplog.text
    assert "1 of 2 images have no caption and are left out, 7 first" in caplog.text


def test_lists_and_captions_that_do_not_belong_together(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(coco / "annotations")
    dump(coco / "lists/train.txt", 0).write_text("".join(coco_name("train2014", n) + "\n" for n in IN_TRAIN))
    dump(coco / "annotations/captions_val2014.json", coco_format({42: ["v"]}))
    dump(coco / "annotations/captions_train2014.json", coco_format({9: ["c"]}))
    config = DatasetConfig(kind="coco", karpathy="lists")
    with caplog.at_level(logging.WARNING):
        assert training_captions(config, coco) == ["c"]
    assert "1 of 2 listed train images have no caption, 3 first" in caplog.text
    dump(coco / "annotations/captions_train2014.json", coco_format({77: ["c"]}))
    with pytest.raises(
        InputError,
        match=r"lists \(dataset\.karpathy\) lists train images such as 3 and .* none of them, but such as 77",
    ):
        training_captions(config, coco)


def test_captions_of_other_images_are_refused(coco: Path) -> None:
    dump(
        coco / "annotations/val_caption_coco_format.json",
        {**coco_format({42: [], 7: []}), **{"annotations": [{"image_id": 99, "caption": "x"}]}},
    )
    with pytest.raises(
        InputError,
        match=r"val_caption_coco_format\.json \(dataset\.val_annotations\): no caption.*ids as 99, its images as 42",
    ):
        load_split(COCO, "val", coco)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<!doctype html><p>gone", "web page"),
        ('{"images": [{"id": 1}', "not whole JSON"),
        ('{"images": [{"id": 1}]}', "keys.*images"),
        ('{"images": [{"name": 1}], "annotations": []}', r"images\[0\].*'id'"),
        ('{"images": [{"id": 7}], "annotations": [{"image_id": 7}]}', r"annotations\[0\].*'caption'"),
        ('{"images": [{"id": 7}], "annotations": [{"image_id": 7, "caption": null}]}', "image 7 is None"),
        ('{"images": [{"id": 7}], "annotations": []}', "no caption"),
        ('{"images": [{"split": "val", "sentences": []}]}', r"images\[0\].*'filename'"),
        ('{"images": [{"split": ["val"], "filename": "a.jpg", "sentences": []}]}', r"images\[0\].*'split'"),
        (
            '{"images": [{"split": "val", "filename": "7.jpg", "cocoid": 7.0, "sentences": []}]}',
            r"images\[0\].*image id 7\.0",
        ),
        ('{"images": [{"split": "val", "filename": "7.jpg", "cocoid": 7, "sentences": ["a"]}]}', r"images\[0\].*'raw'"),
        (
            '{"images": [{"split": "restval", "filename": "7.jpg", "sentences": 0}, '
            '{"split": "val", "filename": "7.jpg"}]}',
            r"images\[1\]: 7\.jpg is in val and in train",
        ),
    ],
)
def test_wrong_annotations(coco: Path, content: str, says: str) -> None:
    (coco / "annotations/val_caption_coco_format.json").write_text(content)
    with pytest.raises(InputError, match=says):
        load_split(COCO, "val", coco)


def test_missing_annotations_and_splits(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"val_caption_coco_format\.json.*cocodataset.*dataset\.val_annotations"):
        load_split(COCO, "val", tmp_path)
    with pytest.raises(MissingFileError, match=r"nowhere.*dataset\.karpathy"):
        load_split(DatasetConfig(kind="coco", karpathy="nowhere"), "train", tmp_path)
    with pytest.raises(InputError, match="split 'dev'"):
        load_split(COCO, "dev", tmp_path)


def test_flickr30k_by_karpathys_file_and_of_the_authors(tmp_path: Path) -> None:
    config = DatasetConfig(name="flickr30k", kind="flickr30k")
    touch(
        *(tmp_path / "flickr30k_images" / f"{n}.jpg" for n in (1000092795, 36979)),
        tmp_path / "flickr30k_images/readme.txt",
    )
    images = [
        {"filename": "1000092795.jpg", "imgid": 0, "split": "train", "sentences": [{"raw": "Two men ."}]},
        {"filename": "36979.jpg", "imgid": 1, "split": "test", "sentences": [{"raw": "A dog ."}]},
    ]
    karpathy = dump(tmp_path / "dataset_flickr30k.json", {"images": images})
    for _ in range(2):
        train, test = load_split(config, "train", tmp_path), load_split(config, "test", tmp_path)
        assert train.images == [ImageRecord(1000092795, tmp_path / "flickr30k_images/1000092795.jpg")]
        assert test.references == {36979: ["A dog ."]}
        assert load_pairs(config, tmp_path) == {1000092795: ["Two men ."]}
        assert training_captions(config, tmp_path) == ["Two men ."]
        karpathy.unlink(missing_ok=True)
        dump(tmp_path / "annotations/train_caption.json", [{"image_id": "1000092795", "caption": "Two men ."}])
        dump(tmp_path / "annotations/test_caption_coco_format.json", coco_format({"36979": ["A dog ."]}))


def test_flickr30k_by_lists_and_a_karpathy_file_of_ones_own_name(tmp_path: Path) -> None:
    touch(*(tmp_path / "flickr30k_images" / f"{n}.jpg" for n in (1, 2, 3)))
    images = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": split}]}
        for n, split in enumerate(("train", "val", "test"), start=1)
    ]
    dump(tmp_path / "mine.json", {"images": images})
    for n, split in enumerate(("train", "val", "test"), start=1):
        dump(tmp_path / f"lists/flickr_{split}.txt", 0).write_text(f"{n}.jpg\n")
    mine = DatasetConfig(kind="flickr30k", karpathy="mine.json")
    lists = replace(
        mine, karpathy="lists", train_annotations="mine.json", val_annotations="mine.json", test_annotations="mine.json"
    )
    for config in (mine, lists):
        assert training_captions(config, tmp_path) == ["train"]
        assert load_split(config, "val", tmp_path).references == {2: ["val"]}
        assert load_split(config, "test", tmp_path).references == {3: ["test"]}


def test_ids_stay_names_where_one_is_no_number(tmp_path: Path) -> None:
    hashed = "123456789012345678901234567890"  # more digits than a number has
    touch(*(tmp_path / "flickr30k_images" / f"{name}.jpg" for name in ("12", "a_b", hashed)))
    dump(tmp_path / "test_caption_coco_format.json", coco_format({"12": ["x"], "a_b": ["y"]}))
    config = DatasetConfig(kind="flickr30k")
    assert load_split(config, "test", tmp_path).references == {"12": ["x"], "a_b": ["y"]}
    content = {"images": [{"id": "12"}, {"id": "a_b"}], "annotations": [{"image_id": 12, "caption": "x"}]}
    dump(tmp_path / "test_caption_coco_format.json", content)
    assert load_split(config, "test", tmp_path).references == {"12": ["x"]}
    dump(tmp_path / "test_caption_coco_format.json", coco_format({hashed: ["x"]}))
    assert load_split(config, "test", tmp_path).references == {hashed: ["x"]}


def test_demo_world(tmp_path: Path) -> None:
    world = DemoWorldConfig(train_images=6, val_images=3, test_images=4, corpus_sentences=30, image_size=16)
    root, config = write_demo_world(world, tmp_path / "world"), DatasetConfig(world=world)
    train, val, test = (load_split(config, name, root) for name in ("train", "val", "test"))
    assert [len(s.images) for s in (train, val, test)] == [6, 3, 4]
    assert train.references == {}
    assert all(len(c) == world.references for c in (val.references | test.references).values())
    assert all(r.path.is_file() for s in (train, val, test) for r in s.images)
    assert set(load_pairs(config, root)) == {r.image_id for r in train.images}
    (root / "annotations/train_caption.json").unlink()
    assert load_split(config, "train", root) == train  # the captions of the upper bound are not read


FOLDER = DatasetConfig(kind="folder", val_fraction=0.2, test_fraction=0.2)


def test_folder_splits_are_stable(tmp_path: Path) -> None:
    touch(
        *(
            tmp_path / "images" / f"{n % 3}" / f"photo {n}.{e}"
            for n, e in enumerate(["jpg", "PNG", "webp", "tiff"] * 25)
        )
    )
    touch(tmp_path / "images/notes.txt", tmp_path / "images/.hidden.jpg", tmp_path / "images/__MACOSX/x.jpg")

    def splits() -> dict[str, list[Any]]:
        return {
            name: [r.image_id for r in load_split(FOLDER, name, tmp_path).images] for name in ("train", "val", "test")
        }

    before = splits()
    assert sorted(i for ids in before.values() for i in ids) == sorted(f"{n % 3}/photo {n}" for n in range(100))
    assert 10 <= len(before["val"]) <= 30
    touch(*(tmp_path / "images" / f"new{n}.jpg" for n in range(50)))
    after = splits()
    assert all(set(before[name]) <= set(after[name]) for name in before)
    assert load_split(FOLDER, "val", tmp_path).references == {}
    touch(tmp_path / "images/0/photo 0.png")
    assert {"0/photo 0.jpg", "0/photo 0.png"} <= {i for ids in splits().values() for i in ids}


def test_folder_with_references(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = shared / "data/coco"
    config = DatasetConfig(
        kind="folder", references="captions_coco_mini_train2017.json", val_fraction=0.3, test_fraction=0.3
    )
    with caplog.at_level(logging.WARNING):
        splits = [load_split(config, name, root) for name in ("train", "val", "test")]
    records = [r for split in splits for r in split.images]
    assert len(records) == 26
    assert all(r.image_id == int(r.path.stem) for r in records)
    assert set(splits[1].references) == {r.image_id for r in splits[1].images}
    assert all(len(c) >= 5 for split in splits[1:] for c in split.references.values())
    assert set(load_pairs(config, root)) == {r.image_id for r in splits[0].images}
    assert open_image(records[0].path).mode in ("RGB", "L")


def test_folder_with_lists_and_named_references(tmp_path: Path) -> None:
    touch(tmp_path / "pics/a/one.jpg", tmp_path / "pics/two.png", tmp_path / "pics/three.gif")
    dump(tmp_path / "refs.json", coco_format({100: ["r"], 200: ["s"]}, **{"100": "one.jpg", "200": "two.png"}))
    for name, lines in (("train", "three"), ("val", "a/one.jpg"), ("test", "two.png\n\n")):
        touch(tmp_path / f"lists/my_{name}.txt")
        (tmp_path / f"lists/my_{name}.txt").write_text(lines)
    config = DatasetConfig(kind="folder", images="pics", references="refs.json", karpathy="lists")
    assert [r.image_id for r in load_split(config, "train", tmp_path).images] == ["three"]
    assert load_split(config, "val", tmp_path).references == {100: ["r"]}
    assert load_split(config, "test", tmp_path).images == [ImageRecord(200, tmp_path / "pics/two.png")]
    (tmp_path / "lists/my_val.txt").write_text("gone.jpg\n")
    with pytest.raises(MissingFileError, match=r"1 of 1 images listed.*gone\.jpg"):
        load_split(config, "val", tmp_path)
    (tmp_path / "lists/my_val.txt").unlink()
    with pytest.raises(InputError, match=r"0 files \*_val\.txt"):
        load_split(config, "val", tmp_path)
    touch(tmp_path / "pics/b/one.jpg")
    with pytest.raises(InputError, match="image 100 fits both"):
        load_split(config, "train", tmp_path)


def test_lists_that_share_a_picture_are_refused(tmp_path: Path) -> None:
    touch(*(tmp_path / f"images/{n}.jpg" for n in "abc"))
    for name, lines in (("train", "a.jpg\nb.jpg"), ("val", "b.jpg"), ("test", "c.jpg")):
        touch(tmp_path / f"lists/{name}.txt")
        (tmp_path / f"lists/{name}.txt").write_text(lines)
    for name in ("train", "val"):
        with pytest.raises(InputError, match=r"lists b\.jpg \(and 0 more\) in"):
            load_split(DatasetConfig(kind="folder", karpathy="lists"), name, tmp_path)
    load_split(DatasetConfig(kind="folder", karpathy="lists"), "test", tmp_path)


def test_a_list_must_say_which_of_two_pictures(tmp_path: Path) -> None:
    touch(tmp_path / "images/a/one.jpg", tmp_path / "images/b/one.jpg", tmp_path / "images/b/two.JPG")
    for name, line in (("train", "one.jpg"), ("val", "b/one.jpg"), ("test", "two.JPG\ntwo.JPG")):
        dump(tmp_path / f"lists/{name}.txt", 0).write_text(line)
    config = DatasetConfig(kind="folder", karpathy="lists")
    with pytest.raises(
        InputError,
        match=r"one\.jpg, listed by dataset\.karpathy=lists, may be .*a/one\.jpg or .*b/one\.jpg: list its path",
    ):
        load_split(config, "train", tmp_path)
    assert [r.image_id for r in load_split(config, "val", tmp_path).images] == ["b/one"]
    assert [r.image_id for r in load_split(config, "test", tmp_path).images] == ["b/two"]
    (tmp_path / "lists/val.txt").write_text("<html>no such page")
    with pytest.raises(InputError, match=r"val\.txt \(dataset\.karpathy\) holds a web page"):
        load_split(config, "val", tmp_path)


WHOLE = DatasetConfig(kind="folder", references="refs.json", val_fraction=0.0, test_fraction=1.0)


@pytest.mark.parametrize(
    ("references", "found"),
    [
        (coco_format({1: ["r"], 2: ["s"]}, **{"1": "a/one.jpg", "2": "b/one.jpg"}), {1: "a/one.jpg", 2: "b/one.jpg"}),
        (coco_format({1: ["r"]}, **{"1": "a/one.jpg"}), {1: "a/one.jpg"}),  # the nearer way wins over the mere name
        (coco_format({1: ["r"]}, **{"1": "elsewhere/two.png"}), {1: "two.png"}),
        (coco_format({7: ["r"], 2: ["s"]}, **{"2": "two.png"}), {7: "img_007.jpg", 2: "two.png"}),
        (
            coco_format({7: ["r"], 2: ["s"]}, **{"7": "other.jpg", "2": "two.png"}),
            {2: "two.png"},
        ),  # named otherwise: no number then
        (coco_format({5: ["r"]}, **{"5": "COCO_train2014_000000000007.jpg"}), {5: "img_007.jpg"}),
        (
            [{"image_id": "b/one", "caption": "r"}, {"image_id": "two", "caption": "s"}],
            {"b/one": "b/one.jpg", "two": "two.png"},
        ),
        (
            {"images": [{"filename": "two.png", "cocoid": 3, "split": "val", "sentences": [{"raw": "r"}]}]},
            {3: "two.png"},
        ),
    ],
)
def test_references_find_their_pictures(tmp_path: Path, references: Any, found: dict[Any, str]) -> None:
    touch(*(tmp_path / "images" / name for name in ("a/one.jpg", "b/one.jpg", "two.png", "img_007.jpg")))
    dump(tmp_path / "refs.json", references)
    split = load_split(WHOLE, "test", tmp_path)
    assert {r.image_id: r.path.relative_to(tmp_path / "images").as_posix() for r in split.images} == found


def test_references_without_a_picture_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / "images/1.jpg")
    dump(tmp_path / "refs.json", coco_format({1: ["r"], 2: ["s"], 3: ["t"]}))
    with caplog.at_level(logging.WARNING):
        assert load_split(WHOLE, "test", tmp_path).references == {1: ["r"]}
    assert "2 of 3 images with captions are not in" in caplog.text
    assert ", 2 first" in caplog.text


def test_odd_things_in_a_folder(tmp_path: Path) -> None:
    inside = tmp_path / "images"
    touch(inside / "UPPER.JPEG", inside / "folder.jpg/in.png", tmp_path / "elsewhere/far.gif", inside / "note.jpg.txt")
    (inside / "linked").symlink_to(tmp_path / "elsewhere")
    (inside / "loop").symlink_to(inside)
    (inside / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    Path(os.fsdecode(os.fsencode(inside) + b"/caf\xe9.jpg")).touch()
    split = load_split(DatasetConfig(kind="folder", val_fraction=0.0, test_fraction=0.0), "train", tmp_path)
    assert [r.image_id for r in split.images] == ["UPPER", "broken", "caf\\xe9", "folder.jpg/in", "linked/far"]
    for record in split.images:
        with pytest.raises((InputError, MissingFileError)) as caught:  # an empty file, a broken link
            open_image(record.path)
        str(caught.value).encode("utf-8")


def test_a_folder_that_cannot_be_read_is_counted_and_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path / "images/a.jpg", tmp_path / "images/locked/b.jpg")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    locked = "locked"
    monkeypatch.setattr(os, "scandir", refuse)
    everything = DatasetConfig(kind="folder", val_fraction=0.0, test_fraction=0.0)
    assert [image.image_id for image in load_split(everything, "train", tmp_path).images] == ["a"]
    assert caplog.messages == [f"{tmp_path / 'images'}: left out: folders that cannot be read (1)"]
    locked = "images"
    with pytest.raises(InputError, match=r"images cannot be read \(Permission denied\)"):
        load_split(FOLDER, "train", tmp_path)


def test_references_that_fit_no_picture_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "images/one.jpg", tmp_path / "images/two.jpg")
    dump(tmp_path / "refs.json", coco_format({100: ["r"], 200: ["s"]}))
    with pytest.raises(
        InputError,
        match=r"refs\.json \(dataset\.references\) has captions for 2 images, such as 100, and none of the 2",
    ):
        load_split(DatasetConfig(kind="folder", references="refs.json"), "train", tmp_path)


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"dataset\.images"):
        load_split(DatasetConfig(kind="folder", images="nope"), "train", tmp_path)
    with pytest.raises(InputError, match="holds no picture"):
        load_split(FOLDER, "train", tmp_path)
    touch(tmp_path / "pictures.zip")
    for config in (FOLDER, COCO):
        with pytest.raises(
            MissingFileError,
            match=r"pictures\.zip is a file and a folder is needed; unpack it, or set dataset\..*dataset\.root",
        ):
            load_split(config, "train", tmp_path / "pictures.zip")
    (tmp_path / "refs.json").symlink_to(tmp_path / "gone.json")
    touch(tmp_path / "x.jpg")
    with pytest.raises(InputError, match=r"none of the 1 pictures.*raise its dataset\.\*_fraction"):
        [load_split(FOLDER, name, tmp_path) for name in ("train", "val", "test")]
    with pytest.raises(
        MissingFileError, match=r"refs\.json is a link to .*gone\.json, which does not exist.*dataset\.references"
    ):
        load_split(WHOLE, "train", tmp_path)


def test_open_image(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 2)
    picture.convert("P").save(tmp_path / "p.png")
    assert open_image(tmp_path / "p.png").mode == "P"  # becomes RGB after the resize, as in clip's pipeline
    assert open_image(tmp_path / "p.png").convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-200])
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    for name in ("cut.jpg", "page.jpg", "bad.png"):
        with pytest.raises(InputError, match=name):
            open_image(tmp_path / name)
    with pytest.raises(MissingFileError, match=r"gone\.jpg"):
        open_image(tmp_path / "gone.jpg")
