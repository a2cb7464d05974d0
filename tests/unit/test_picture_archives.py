"""Pictures in lists, tar files, Parquet tables and Hugging Face data sets on disk; what is left out is counted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cgtgan.config import DatasetConfig
from cgtgan.data.datasets import Split, load_split
from cgtgan.data.image_files import open_image
from cgtgan.data.loading import decoded
from cgtgan.data.picture_archives import picture_state
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.clip_inputs import ClipPixels
from cgtgan.reporting.pictures import embed

SIDES = (11, 12, 13, 14)  # of the pictures: a picture is recognised by its size


def png(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (side, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def shards(root: Path) -> None:
    for n, sides in enumerate((SIDES[:2], SIDES[2:])):
        samples = {f"{side:09d}.{end}": content for side in sides for end, content in sample(side).items()}
        tar(root / f"shards/{n:05d}.tar", samples)


def sample(side: int) -> dict[str, bytes]:
    return {"png": png(side), "txt": f"a dog of {side}\nthe dog\n".encode(), "json": b"{}", "seg.png": png(9)}


def whole(root: Path, **settings: Any) -> Split:
    return load_split(DatasetConfig(kind="folder", val_fraction=0.0, test_fraction=1.0, **settings), "test", root)


def sides(split: Split) -> dict[Any, int]:
    """id -> the size of its picture, as it is read."""
    return {image.image_id: open_image(image.path).size[0] for image in split.images}


@pytest.mark.parametrize("images", ["shards/{00000..00001}.tar", "shards/*.tar"])
def test_webdataset_shards(tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    shards(tmp_path)
    split = whole(tmp_path, images=images)
    assert sides(split) == {f"{side:09d}": side for side in SIDES}
    assert split.references == {}
    assert f"{tmp_path}/{images}: left out: further pictures of a sample (4)" in caplog.messages
    paths = [image.path for image in split.images]
    (batch,) = decoded(paths, ClipPixels(32), [[3, 0]], workers=2)  # other processes
    assert batch.unreadable == []
    assert batch.pixels is not None
    assert [int(picture[0, 0, 0]) for picture in batch.pixels] == [14, 11]
    assert embed(paths[0])[0].startswith("data:image/png;base64,")
    assert [picture_state(path)[0] for path in paths] == [len(png(side)) for side in SIDES]  # type: ignore[index]


def test_captions_of_shards_where_they_are_asked_for(tmp_path: Path) -> None:
    shards(tmp_path)
    split = whole(tmp_path, images="shards/*.tar", caption_column="txt")
    assert split.references["000000012"] == ["a dog of 12", "the dog"]
    with pytest.raises(InputError, match=r"dataset\.caption_column=cap has no caption of any picture"):
        whole(tmp_path, images="shards/*.tar", caption_column="cap")
    (tmp_path / "refs.json").write_text(json.dumps({"13": ["of a file"]}))
    assert whole(tmp_path, images="shards/*.tar", references="refs.json").references == {13: ["of a file"]}


def test_pictures_of_one_name_in_two_shards_and_names_that_lead_out(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"./x/1.png": png(11), "2.png": png(12), "../3.png": png(13), "/4.png": png(13)})
    tar(tmp_path / "b.tar", {"2.png": png(14)})
    assert sides(whole(tmp_path, images="*.tar")) == {"x/1": 11, "a.tar/2.png": 12, "b.tar/2.png": 14}


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    shards(tmp_path)
    with pytest.raises(MissingFileError, match=r"00002\.tar does not exist"):
        whole(tmp_path, images="shards/{00000..00002}.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "shards/00000.tar").read_bytes()[:700])
    with pytest.raises(InputError, match=r"cut\.tar \(dataset\.images\) cannot be read as a tar file .*cut off"):
        whole(tmp_path, images="cut.tar")
    path = tmp_path / "shards/00000.tar/000000099.png"
    with pytest.raises(MissingFileError, match=r"000000099\.png does not exist"):
        open_image(path)
    assert picture_state(path) is None


def table(with_names: bool) -> Any:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow (extra tables) is not installed")
    cells = [{"bytes": png(side), "path": f"{side}.png" if with_names else None} for side in SIDES]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    columns = {"image": arrow.array(cells, kind), "caption": [[f"a dog of {side}", "a"] for side in SIDES]}
    return arrow.table(columns | ({} if with_names else {"img_id": [str(side + 100) for side in SIDES]}))


@pytest.mark.parametrize("with_names", [True, False])
@pytest.mark.parametrize("images", ["data/*.parquet", "saved"])
def test_tables_with_pictures(tmp_path: Path, images: str, with_names: bool) -> None:
    content = table(with_names)
    for folder in ("data", "saved"):
        (tmp_path / folder).mkdir()
    pytest.importorskip("pyarrow.parquet").write_table(content, tmp_path / "data/train-0.parquet", row_group_size=3)
    ipc = pytest.importorskip("pyarrow.ipc")
    with ipc.new_stream(tmp_path / "saved/data-00000-of-00001.arrow", content.schema) as stream:
        stream.write_table(content, max_chunksize=3)
    (tmp_path / "saved/state.json").write_text("{}")
    split = whole(tmp_path, images=images, caption_column="caption")
    ids = [str(side if with_names else side + 100) for side in SIDES]
    assert sides(split) == dict(zip(ids, SIDES, strict=True))
    assert split.references[ids[1]] == ["a dog of 12", "a"]
    (batch,) = decoded([image.path for image in split.images], ClipPixels(32), [[3, 0]], workers=2)
    assert batch.pixels is not None
    assert [int(picture[0, 0, 0]) for picture in batch.pixels] == [14, 11]
    assert whole(tmp_path, images=images).references == {}
    with pytest.raises(
        InputError, match=r"the columns 'image', 'caption'.*: dataset\.caption_column=text is none of them"
    ):
        whole(tmp_path, images=images, caption_column="text")


def test_what_hugging_face_datasets_saves(tmp_path: Path) -> None:
    """Four pictures in two files, written by `save_to_disk` of datasets 5.2.0."""
    pytest.importorskip("pyarrow", reason="pyarrow (extra tables) is not installed")
    with tarfile.open(Path(__file__).parents[1] / "golden/hugging_face_dataset.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    split = whole(tmp_path, images="saved", caption_column="caption")
    assert sides(split) == {str(side): side for side in SIDES}
    assert split.references == {str(side): [f"a dog of {side}", "a"] for side in SIDES}


def test_the_column_of_pictures_is_named_where_there_are_several(tmp_path: Path) -> None:
    content = table(True)
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(content.append_column("mask", content["image"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"the columns with pictures 'image', 'mask', of .* set dataset\.image_column"):
        whole(tmp_path, images="a.parquet")
    assert sides(whole(tmp_path, images="a.parquet", image_column="mask")) == {str(side): side for side in SIDES}
    parquet.write_table(content.select(["caption"]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="has no column with pictures, of 'caption'"):
        whole(tmp_path, images="b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"c\.parquet cannot be read to its end"):
        whole(tmp_path, images="c.parquet")


def test_a_data_set_of_several_splits_names_them(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "saved" / split).mkdir(parents=True)
        (tmp_path / "saved" / split / "state.json").write_text("{}")
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="a data set with the splits test, train: name one"):
        whole(tmp_path, images="saved")


def test_a_list_of_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere"
    for folder in (tmp_path / "lists/a", elsewhere):
        folder.mkdir(parents=True)
    (tmp_path / "lists/a/1.png").write_bytes(png(11))
    (elsewhere / "2.png").write_bytes(png(12))
    (tmp_path / "lists/mine.txt").write_text(f"a/1.png\n{elsewhere}/2.png\na/1.png\ngone.png\n")
    with pytest.raises(
        MissingFileError, match=r"1 of 3 images listed in .*mine\.txt .* do not exist, first .*gone\.png"
    ):
        whole(tmp_path, images="lists/mine.txt")
    split = whole(tmp_path, images="lists/mine.txt", max_bad_images=1)
    assert sides(split) == {"a/1": 11, str(elsewhere / "2"): 12}
    assert any(message.endswith("left out: listed images that do not exist (1)") for message in caplog.messages)


def test_what_is_left_out_of_a_folder_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1.png", "b.HEIC", "c.avif", "._1.png", ".thumbs/1.png", "__MACOSX/1.png", "notes.txt", "d/raw.cr2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(11))
    for _ in range(2):
        assert sides(whole(tmp_path)) == {"1": 11}
    counts = ".avif files (1), .cr2 files (1), .heic files (1), hidden folders (2), hidden pictures (1)"
    assert caplog.messages == [f"{tmp_path}: left out: {counts}"]
