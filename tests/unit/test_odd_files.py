"""Odd files of users: what CLIP is given of them is right, or a sentence says what is wrong."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image, UnidentifiedImageError

from cgtgan.cli import corrected
from cgtgan.config import DatasetConfig
from cgtgan.data.corpora import clean_captions, has_entities, read_raw
from cgtgan.data.datasets import load_split
from cgtgan.data.image_files import open_image
from cgtgan.data.loading import decoded, load_pixels
from cgtgan.data.user_files import read_user_json
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.clip_inputs import ClipPixels, OpenAITokens
from cgtgan.models.tokenizers import train_tokenizer, without_endless_words
from cgtgan.reporting.pictures import embed

GREY = np.kron(np.random.default_rng(0).integers(0, 200, (6, 6)), np.ones((60, 60), int)).astype(np.uint8)


def pixels(path: Path) -> np.ndarray:
    """(3, 224, 224), as CLIP is given them."""
    return load_pixels(path, ClipPixels(224)).numpy().astype(float)


def shown(path: Path) -> np.ndarray:
    """(3, 224, 224) of the picture that a page embeds."""
    address, _ = embed(path, side=360)
    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return ClipPixels(224)(picture).numpy().astype(float)


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sixteen.png", GREY.astype(np.uint16) * 257),
        ("sixteen.tif", GREY.astype(np.uint16) * 257),
        ("sixteen_in_32.tif", GREY.astype(np.int32) * 257),
        ("eight_in_32.tif", GREY.astype(np.int32)),
        ("unsigned_32.tif", GREY.astype(np.uint32) * 0x01010101),
        ("signed_32.tif", GREY.astype(np.int32) * (0x01010101 // 2)),
        ("float_1.tif", GREY.astype(np.float32) / 255),
        ("float_255.tif", GREY.astype(np.float32)),
    ],
)
def test_pictures_of_many_bits_are_their_8_bit_original(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(GREY).save(tmp_path / "original.png")
    _save(values, tmp_path / name)
    original = pixels(tmp_path / "original.png")
    assert np.abs(pixels(tmp_path / name) - original).mean() < 1
    assert np.abs(shown(tmp_path / name) - original).mean() < 2  # the page's JPEG


def _save(values: np.ndarray, path: Path) -> None:
    if values.dtype == np.uint32:  # Pillow writes signed 32 bits alone: the same bytes under another tag 339
        file = io.BytesIO()
        Image.fromarray(values.view(np.int32)).save(file, "TIFF")
        signed, unsigned = (b"\x53\x01\x03\x00\x01\x00\x00\x00" + kind for kind in (b"\x02", b"\x01"))
        assert file.getvalue().count(signed) == 1
        path.write_bytes(file.getvalue().replace(signed, unsigned))
    else:
        Image.fromarray(values).save(path)


def test_floats_without_a_known_range_keep_their_order(tmp_path: Path) -> None:
    field = np.linspace(-3, 5, 64 * 64, dtype=np.float32).reshape(64, 64)
    field[0, 0], field[0, 1], field[0, 2] = np.nan, np.inf, -np.inf
    Image.fromarray(field).save(tmp_path / "field.tif")
    grey = np.asarray(open_image(tmp_path / "field.tif"))
    assert grey.dtype == np.uint8
    assert (grey[0, 0], grey[0, 1], grey[0, 2]) == (0, 255, 0)
    assert (np.diff(grey.ravel()[3:].astype(int)) >= 0).all()
    assert grey[1].max() < 10
    assert grey[-1].max() == 255


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_black_ink_on_a_transparent_ground_is_laid_on_white(tmp_path: Path, kind: str) -> None:
    ink = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (100, 100, 200, 200))
    if kind == "P":
        ink = ink.quantize(8)
    elif kind == "LA":
        ink = ink.convert("LA")
    ink.save(tmp_path / "ink.png")
    expected = Image.new("L", (300, 300), 255)
    expected.paste(0, (100, 100, 200, 200))
    expected.save(tmp_path / "expected.png")
    for read in (pixels, shown):
        assert np.abs(read(tmp_path / "ink.png") - pixels(tmp_path / "expected.png")).mean() < 2


def test_an_opaque_picture_keeps_every_bit(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    plain = Image.fromarray(colours)
    opaque = plain.convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    read = open_image(tmp_path / "opaque.png")
    assert read.mode == "RGBA"
    assert np.array_equal(np.asarray(read), np.asarray(opaque))


def test_a_narrow_picture_is_listed_as_unreadable(tmp_path: Path) -> None:
    Image.new("RGB", (1, 600_000), "red").save(tmp_path / "strip.png")
    Image.new("RGB", (10, 500), "red").save(tmp_path / "tall.png")
    paths = [tmp_path / "tall.png", tmp_path / "strip.png"]
    (batch,) = decoded(paths, ClipPixels(224), [[0, 1]], workers=0)
    assert batch.rows == [0]
    assert batch.unreadable[0].row == 1
    assert "strip.png cannot be read: it is 1 x 600,000 pixels" in batch.unreadable[0].why


def test_a_damaged_avif_is_listed_as_unreadable(tmp_path: Path) -> None:
    Image.fromarray(GREY).convert("RGB").save(tmp_path / "good.avif")
    whole = (tmp_path / "good.avif").read_bytes()
    for n, cut in enumerate((len(whole) // 2, len(whole) - 40, 200)):
        (tmp_path / f"{n}.avif").write_bytes(whole[:cut])
    middle = len(whole) * 2 // 3
    (tmp_path / "3.avif").write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    paths = [tmp_path / "good.avif", *(tmp_path / f"{n}.avif" for n in range(4))]
    (batch,) = decoded(paths, ClipPixels(224), [list(range(5))], workers=0)
    assert 0 in batch.rows
    assert {1, 3} <= {row for row, _ in batch.unreadable}


def test_no_picture_starts_another_program(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")  # Pillow has Ghostscript read it
    for read in (open_image, embed):
        with pytest.raises((InputError, UnidentifiedImageError), match="cannot identify image file"):
            read((tmp_path / "a.eps").rename(tmp_path / f"{read.__name__}.jpg"))
        (tmp_path / f"{read.__name__}.jpg").rename(tmp_path / "a.eps")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><title>Sign in", "web page"),
        (b"", "it is empty"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.png cannot be read.*{reason}"):
        open_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a folder or a device"):
        open_image(tmp_path)
    with pytest.raises(MissingFileError, match=r"b\.png does not exist"):
        open_image(tmp_path / "b.png")


# --------------------------------------------------------------------------------------------------- tables as text


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("image,caption\n100_a.jpg,A dog runs .\n", "'image', 'caption'"),
        (",image,caption\n0,100_a.jpg,A dog runs .\n", "'', 'image', 'caption'"),
        ('\ufeff"image_id";"caption"\n"1";"A dog runs ."\n', "'image_id', 'caption'"),
        (
            "image_name| comment_number| comment\n100.jpg| 0| A dog runs .\n",
            "'image_name', 'comment_number', 'comment'",
        ),
        ("100.jpg#0\tA dog runs .\n100.jpg#1\tTwo cats sit .\n", "'100.jpg#0', 'A dog runs .'"),
        ("100.jpg A dog runs .\n101.jpg Two cats sit .\n", "'100.jpg A dog runs .'"),
        ("1,A dog runs .\n2,Two cats, and a wall .\n", "'1', 'A dog runs .'"),
        ("A dog runs .\thttp://a/1.jpg\nTwo cats .\thttp://a/2.jpg\n", "'A dog runs .', 'http://a/1.jpg'"),
        ("caption\nA dog runs .\nTwo cats sit .\n", "'caption'"),
    ],
)
def test_a_table_is_not_taken_as_sentences(tmp_path: Path, content: str, columns: str) -> None:
    path = tmp_path / "corpus"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        list(read_raw("text_file", path))
    assert f"{path} (corpus.path) is a table with the columns {columns}, not one sentence per line" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "A dog, a cat and a bird.\nTwo men, one hat.\n",
        "12 dogs run.\n3 cats, asleep.\n",
        "A man in a t-shirt | a woman in a dress\nTwo dogs run.\n",
        "Image of a dog.\nText on a sign.\n",
        "5, 4, 3, 2, 1: the clock.\nA dog runs.\n",
        "A screen shows photo.jpg in a folder.\nA dog runs.\n",
        "[Verse] a man sings.\n",
        '"A dog," he said.\n"A cat," she said.\n',
        "One line alone.\n",
    ],
)
def test_sentences_with_commas_and_numbers_stay_sentences(tmp_path: Path, content: str) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(content)
    assert list(read_raw("text_file", path)) == content.splitlines()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("image_name| comment_number| comment\n1.jpg| 0| A dog .\n", "is a table with the columns 'image_name'"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2, "caption": "b"}\n', "is JSON Lines"),
        ("A dog runs.\nTwo cats sit.\n", "is no JSON: it begins with 'A dog runs"),
        ('[{"image_id": 1, "capt', "is not whole JSON .line 1, column 18.*cut off"),
        ('[{"image_id": ' + "9" * 5000 + ', "caption": "a"}]', "number of thousands of digits"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-lfs pointer"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_is_named_by_its_kind(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"captions\.json \(dataset\.references\) .*{reason}"):
        read_user_json(path, "dataset.references")


# ------------------------------------------------------------------------------------------------------------ sentences


def test_html_entities_are_the_characters_that_clip_reads() -> None:
    too_large = "&#" + "9" * 5000 + ";a"
    raw = ["R&amp;B singer", "salt &amp;amp; pepper", "it&#39;s&nbsp;a dog", "AT&T store", "a &lt; b", too_large]
    expected = ["R&B singer.", "Salt & pepper.", "It's a dog.", "AT&T store.", "A < b.", too_large + "."]
    assert clean_captions("coco", raw) == expected
    assert clean_captions("none", ["R&amp;B singer"]) == ["R&B singer."]
    assert clean_captions("coco", ["R&amp;B singer"], released=True) == ["R&amp;B singer."]


def test_files_with_html_entities_are_known(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    for content, expected in (
        (b"AT&T; a & b;\n", True),
        (b"a & b;\nAT&T\n", False),
        (b"x" * 1_048_574 + b"&amp;", True),
    ):
        for stored in (content, gzip.compress(content)):
            path.write_bytes(stored)
            assert has_entities(path) is expected


def test_one_endless_word_does_not_hang_the_tokenizers() -> None:
    rng = np.random.default_rng(0)
    word = "".join(rng.choice(list("abcdefgh"), 900_000))
    sentences = ["A dog runs over the grass.", f"{word} {'a' * 900_000} {'1' * 900_000} {'-' * 900_000}."]
    tokenizer = train_tokenizer(sentences, 1000, ["<|endoftext|>"])
    assert tokenizer.decode(tokenizer.encode([sentences[0], word])) == [sentences[0], word]
    rows = OpenAITokens()(sentences)
    assert [len(row) for row in rows] == [9, 77]


def test_words_of_a_usual_length_are_all_learnt() -> None:
    sentences = ["A dog runs.", "https://example.org/" + "a-1/" * 400, "x" * 1000, "a_b " * 300]
    assert [without_endless_words(sentence) for sentence in sentences] == sentences
    assert without_endless_words("x" * 1001 + "!") == "x" * 1000 + "!"


# ---------------------------------------------------------------------------------------------------- names and ids


def folder_references(root: Path, names: list[str], content: Any) -> dict[str, list[str] | None]:
    """File name -> the captions that its picture gets in a folder of pictures."""
    (root / "images").mkdir()
    for name in names:
        Image.new("RGB", (9, 9)).save(root / "images" / name)
    (root / "refs.json").write_text(json.dumps(content))
    config = DatasetConfig(kind="folder", references="refs.json", val_fraction=0.0, test_fraction=1.0)
    split = load_split(config, "test", root)
    return {image.path.name: split.references.get(image.image_id) for image in split.images}


def captions(*ids: int | str) -> list[dict[str, Any]]:
    return [{"image_id": i, "caption": f"of {i}"} for i in ids]


@pytest.mark.parametrize(
    "name",
    [
        "e3b0c44298fc1",
        "9f86d081884c7d3",
        "abc12",
        "3f2c1d9e-8a7b-4c3d-9e1f-000000000012",
        "000000000000000000012",
        "day12of13",
    ],
)
def test_the_number_that_ends_a_hash_is_no_image_id(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="its ids, or file_name, must name these pictures"):
        folder_references(tmp_path, [f"{name}.png"], captions(*range(14)))


@pytest.mark.parametrize("name", ["12", "012", "IMG_12", "COCO_val2014_000000000012", "img12", "photo 12", "a-12"])
def test_the_number_that_ends_a_name_is_an_image_id(tmp_path: Path, name: str) -> None:
    assert folder_references(tmp_path, [f"{name}.png"], captions(*range(14))) == {f"{name}.png": ["of 12"]}


def test_leading_zeros_tell_two_pictures_apart(tmp_path: Path) -> None:
    given = folder_references(tmp_path, ["007.png", "7.png"], captions("007", "7"))
    assert given == {"007.png": ["of 007"], "7.png": ["of 7"]}


def test_leading_zeros_tell_two_pictures_apart_by_file_name(tmp_path: Path) -> None:
    images = [{"id": "007", "file_name": "a.png"}, {"id": "7", "file_name": "b.png"}]
    given = folder_references(tmp_path, ["a.png", "b.png"], {"images": images, "annotations": captions("007", "7")})
    assert given == {"a.png": ["of 007"], "b.png": ["of 7"]}


def test_leading_zeros_tell_two_pictures_of_a_karpathy_file_apart(tmp_path: Path) -> None:
    names = ("007.jpg", "7.jpg")
    images = [{"filename": n, "split": "test", "sentences": [{"raw": f"of {n}"}]} for n in names]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    (tmp_path / "flickr30k_images").mkdir()
    for name in names:
        Image.new("RGB", (9, 9)).save(tmp_path / "flickr30k_images" / name)
    config = DatasetConfig(kind="flickr30k", karpathy="dataset_flickr30k.json")
    split = load_split(config, "test", tmp_path)
    assert {i.path.name: split.references[i.image_id] for i in split.images} == {n: [f"of {n}"] for n in names}
    (tmp_path / "flickr30k_images/7.jpg").unlink()
    with pytest.raises(MissingFileError, match=r"1 of 2 test images are not in .*, first 7:"):
        load_split(config, "test", tmp_path)


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("on_disk", "listed"),
    [(f"{NFD}.png", f"{NFC}.png"), (f"{NFC}.png", f"{NFD}.png"), ("a b.png", "pics\\a b.png"), ("A.PNG", "a.png")],
)
def test_names_of_a_mac_and_of_windows_find_their_pictures(tmp_path: Path, on_disk: str, listed: str) -> None:
    content = {"images": [{"id": 1, "file_name": listed}], "annotations": captions(1)}
    assert folder_references(tmp_path, [on_disk], content) == {on_disk: ["of 1"]}


def test_lists_and_karpathy_files_of_a_mac_and_of_windows(tmp_path: Path) -> None:
    images = [{"filename": f"images\\{NFC}.jpg", "split": "test", "sentences": [{"raw": "a dog"}]}]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    for folder in ("flickr30k_images", "pics/sub"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / folder / f"{NFD}.jpg")
    split = load_split(DatasetConfig(kind="flickr30k", karpathy="dataset_flickr30k.json"), "test", tmp_path)
    assert [(i.path.name, split.references[i.image_id]) for i in split.images] == [(f"{NFD}.jpg", ["a dog"])]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/my_test.txt").write_text(f"sub\\{NFC}.jpg\r\n")
    split = load_split(DatasetConfig(kind="folder", images="pics", karpathy="lists"), "test", tmp_path)
    assert [i.path.name for i in split.images] == [f"{NFD}.jpg"]


@pytest.mark.parametrize(
    ("image_id", "reason"),
    [("a\ud800b", "characters that no file name has"), (10**30, "no number of 64 bits"), (True, "integer or a name")],
)
def test_impossible_image_ids_are_refused(tmp_path: Path, image_id: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        folder_references(tmp_path, ["1.png"], [{"image_id": image_id, "caption": "a"}])


# -------------------------------------------------------------------------------------------- paths on the command line


@pytest.mark.parametrize(
    "field",
    [
        *("images", "corpus.path", "corpus.column", "dataset.root", "dataset.images", "dataset.caption_column"),
        *("checkpoint", "runs_dir", "output", "captions", "evaluate.references"),
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        *(
            "photos",
            "../a/b.jpg",
            "a:b",
            "données/grüße",
            "日本/写真",
            "😀",
            f"{NFD}.jpg",
            "runs/seed=0",
            "a b",
            "a[1] (2)",
        ),
        *(
            "2014",
            "007",
            "1e3",
            ".5",
            "nan",
            "true",
            "~/x",
            "C:\\x\\y",
            "ends\\",
            "it's",
            "a\\'b",
            "#a",
            "a,b",
            "{a}",
            "-",
        ),
    ],
)
def test_any_path_reaches_its_setting(field: str, path: str) -> None:
    (word,) = corrected([f"{field}={path}"])
    assert OverridesParser.create().parse_override(word).value() == path
