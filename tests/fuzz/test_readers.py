"""Damaged and hostile files for every reader of users' files: each gives a sentence or an answer of the right shape.

Whole files are damaged at random, from a seed, so a case is the same again. CGTGAN_FUZZ_SECONDS (40) are shared by the
readers, CGTGAN_FUZZ_SEED (0) chooses the cases. Every case stays under 5 s of CPU time and 1 GB.
"""

from __future__ import annotations

import collections
import copy
import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cgtgan.captioning.web import Refused, read_picture
from cgtgan.config import DatasetConfig, GeneratorConfig
from cgtgan.data.corpora import RULES, clean_corpus, has_entities, read_raw
from cgtgan.data.datasets import load_pairs, load_split
from cgtgan.data.image_files import DAMAGED_IMAGE
from cgtgan.data.loading import decoded, load_pixels
from cgtgan.data.named_pictures import find_images
from cgtgan.data.released import read_model, read_released
from cgtgan.errors import UserError
from cgtgan.evaluation.coco_files import load_named_references, load_results, under_reference_ids
from cgtgan.models.clip_inputs import ClipPixels
from cgtgan.models.generator_bundle import make_generator, make_tokenizer
from cgtgan.models.released_generator import load_released_generator
from cgtgan.reporting.pictures import embed

SECONDS = float(os.environ.get("CGTGAN_FUZZ_SECONDS", "40"))
SEED = int(os.environ.get("CGTGAN_FUZZ_SEED", "0"))
CPU_SECONDS, MEMORY = 5, 1 << 30

# ------------------------------------------------------------------------------------------------------- whole files

CAPTIONS = [{"image_id": i, "caption": f"A dog runs over the grass number {i} &amp; sits ."} for i in (1, "02", 3)]
IMAGES = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
KARPATHY = {
    "images": [
        {"filename": f"{i}.jpg", "cocoid": i, "split": split, "sentences": [{"raw": f"a dog {i}"}, {"raw": "a cat"}]}
        for i, split in ((1, "train"), (2, "test"), (3, "restval"))
    ]
}
JSONS = [
    json.dumps(content).encode()
    for content in (CAPTIONS, {"images": IMAGES, "annotations": CAPTIONS}, KARPATHY, [CAPTIONS[0]])
]
TABLES = [
    b'image_id,caption\n1,A dog runs .\n02,"A cat, asleep"\n3,A bird\n',
    b"image_name| comment_number| comment\n1.jpg| 0| A dog .\n2.jpg| 0| A cat .\n",
    b"".join(json.dumps(row).encode() + b"\n" for row in CAPTIONS),
    json.dumps({str(row["image_id"]): row["caption"] for row in CAPTIONS}).encode(),
    json.dumps({f"{i}.jpg": ["a dog", "a cat"] for i in (1, 2, 3)}).encode(),
]
NAMES = b"1.jpg\n2.jpg\nsub/3.jpg\n"
TEXTS = [
    *TABLES[:3],
    "\n".join(row["caption"] for row in CAPTIONS).encode(),
    b'image,caption\n1.jpg,A dog runs .\n2.jpg,"A cat, asleep"\n',
    "Größe und Maß\r\n\u200e猫が座る。\n\ufeffA dog\u00a0runs\u2028fast\n".encode(),
    b"a man rides a wave on top of a surfboard\thttp://a.org/1.jpg\ndogs play in the snow near two trees\thttp://b/2\n",
    NAMES,
]
# What has broken readers before.
PIECES = [
    *(
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"9" * 5000,
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"true",
        b'""',
        b"\\ud800",
        b"\x00",
    ),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"PK\x03\x04", b"version https://git-lfs", b"<!doctype", b"\x80\x04"),
    *(
        b"\xff\xff\xff\x7f",
        b"\xff" * 8,
        b"\x00" * 64,
        b"a" * 100_000,
        b"&amp;" * 99,
        b"\t",
        b"\r",
        b"../",
        b"\\",
        b'"id":',
    ),
    *(b'"image_id": {}', b'"caption": 7', b"r\xff\xff\xff\x1f", b"\x8e" + b"\xff" * 8, b"R", b"b", b"\x85" * 999, b"."),
]


def tensors(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def pickles() -> list[bytes]:
    """The authors' four layouts, and ShutterStock's tokens, in several protocols."""
    rows = [{"image_id": i, "clip_embedding": i, "caption": ["A.", "B."]} for i in range(3)]
    sentences = [row | {"caption": "A."} for row in rows]
    contents: list[Any] = [
        {"clip_embedding": tensors(), "captions": rows},
        {"clip_embedding": tensors(torch.float32), "captions": sentences},
        [{"image": vector, "caption": vector + 1} for vector in tensors()],
        ["A dog runs.", "A cat sits."],
        [["<S>", "a", "dog", "runs", "over", "the", "green", "grass", ".", "</S>"]] * 2,
    ]
    return [pickle.dumps(content, protocol) for content in contents for protocol in (0, 2, 4)]


def pictures() -> list[bytes]:
    """One of every kind that is read."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    plain, grey = Image.fromarray(colours), colours[:, :, 0]
    alpha = plain.convert("RGBA")
    alpha.putalpha(Image.fromarray(grey))
    exif = Image.Exif()
    exif[0x0112] = 6
    saved: list[bytes] = []

    def save(image: Image.Image, kind: str, **options: Any) -> None:
        file = io.BytesIO()
        image.save(file, kind, **options)
        saved.append(file.getvalue())

    for kind in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF"):
        save(plain, kind)
    save(plain, "JPEG", progressive=True, exif=exif)
    save(plain.convert("CMYK"), "JPEG")
    for kind in ("PNG", "WEBP", "TIFF"):
        save(alpha, kind)
    save(alpha.quantize(9), "PNG")
    save(plain.quantize(9), "GIF", save_all=True, append_images=[Image.new("P", (30, 20))], transparency=0)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        save(plain, "TIFF", compression=compression)
    for values in (grey.astype(np.uint16) * 257, grey.astype(np.int32) * 70_000, grey.astype(np.float32) - 3):
        save(Image.fromarray(values), "TIFF")
    save(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    return saved


SMALL = GeneratorConfig(
    language_model="scratch", tokenizer="corpus", vocab_size=270, layers=1, width=8, heads=2, prefix_length=2,
    clip_length=2, mapper_layers=1, mapper_heads=2, max_length=4,
)  # fmt: skip


def archives() -> list[bytes]:
    """A shard of webdataset's."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for n, picture in enumerate(pictures()[:3]):
            for name, content in ((f"{n}.png", picture), (f"{n}.txt", b"a dog\na cat\n")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return [file.getvalue()]


def models() -> list[bytes]:
    """`model.pt` in torch's two formats, a plain dict and an OrderedDict."""
    state = make_generator(SMALL, make_tokenizer(SMALL, []), 4, seed=0).model.state_dict()
    saved: list[bytes] = []
    for content, zipped in ((state, True), (state, False), (collections.OrderedDict(state), False)):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        saved.append(file.getvalue())
    return saved


# ------------------------------------------------------------------------------------------------------------- damage


VALUES = [
    *(None, True, 0, -1, 1.5, 7, 10**19, 10**30, float("nan"), "", "1", "007", "7", "1.jpg", "sub\\1.jpg", "a" * 3000),
    *("\ud800", "\x00", "e\u0301", [], {}, [[]], {"raw": 1}, [None], "train", "restval", [{"raw": "a"}], "./3.jpg"),
]


def changed(value: Any, case: random.Random) -> Any:
    """JSON with one value replaced, dropped, repeated or put under another key, somewhere below."""
    if not value or not isinstance(value, list | dict) or case.random() < 0.1:
        return copy.deepcopy(case.choice(VALUES))
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    place, way = case.choice(places), case.random()
    if way < 0.65:
        value[place] = changed(value[place], case)
    elif way < 0.75:
        del value[place]
    elif isinstance(value, list):
        value.append(json.loads(json.dumps(value[place])))
    else:
        value[case.choice(("id", "image_id", "caption", "sentences", "cocoid"))] = value.pop(place)
    return value


def damaged(whole: list[bytes], case: random.Random) -> bytes:
    """One of the files after 1 to 4 changes; now and then in gzip. Half of the JSON files stay JSON."""
    content = bytearray(case.choice(whole))
    if content[:1] in (b"[", b"{") and b"}\n{" not in content and case.random() < 0.5:
        value = json.loads(content)
        for _ in range(case.choice((1, 1, 2, 4))):
            value = changed(value, case)
        return json.dumps(value).encode()
    for _ in range(case.choice((1, 1, 2, 4))):
        place, end = sorted(case.randrange(len(content) + 1) for _ in range(2))
        change = case.randrange(9)
        if change == 0:
            del content[place:]
        elif change == 1:
            del content[place : min(end, place + 64)]
        elif change == 2:
            content[place:place] = content[place:end][:4096] * case.choice((1, 2, 50))
        elif change == 3:
            content[place:place] = case.choice(PIECES)
        elif change == 4:
            piece = case.choice(PIECES)[:8]
            content[place : place + len(piece)] = piece
        elif change == 5:
            other = case.choice(whole)
            content[place:end] = other[case.randrange(len(other) + 1) :][:256]
        elif content:
            for _ in range(case.choice((1, 1, 8))):
                content[case.randrange(len(content))] ^= case.choice((1, 1 << case.randrange(8), 255))
    return gzip.compress(bytes(content), mtime=0) if case.random() < 0.05 else bytes(content)


# ------------------------------------------------------------------------------------------------------------ readers
# Each reads one damaged file in a folder and checks the answer; an error other than `UserError` is a fault.


def read_corpus(folder: Path, content: bytes, case: random.Random) -> None:
    kind = case.choice(("coco", "gcc", "text_file", "text_file", "demo", "shutterstock"))
    path = folder / f"corpus{case.choice(('', '', '.csv', '.jsonl'))}"
    column = case.choice((None, "caption", "2")) if kind == "text_file" else None
    path.write_bytes(content)
    has_entities(path)
    for released in (False, True):
        raw = read_raw(kind, path, collections.Counter(), column)
        corpus = clean_corpus(case.choice(RULES), raw, released=released)
        assert all(isinstance(s, str) and s.endswith(".") and "\n" not in s for s in corpus.sentences if not released)
        "".join(corpus.sentences).encode()  # can be written
        assert corpus.counts["read"] >= corpus.counts["kept"] == len(corpus.sentences)


def read_splits(folder: Path, content: bytes, case: random.Random) -> None:
    """A data set with a damaged caption file or a damaged list."""
    kind = case.choice(("coco", "flickr30k", "folder"))
    name = "dataset.json" if case.random() < 0.7 else "lists/x_test.txt"
    files = {
        "dataset.json": case.choice(JSONS),
        "lists/x_test.txt": NAMES,
        "lists/x_train.txt": b"9.jpg",
        name: content,
    }
    for file, stored in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(stored)
    for i in ("1", "002", "3"):
        for place in ("images", "val2014", "train2014"):
            (folder / place).mkdir(exist_ok=True)
            (folder / place / f"{i}.jpg").touch()
    lists = "lists" if name != "dataset.json" else case.choice(("lists", "dataset.json", None))
    config = DatasetConfig(
        kind=kind, images="images" if kind != "coco" else None, max_bad_images=3, karpathy=lists, val_fraction=0,
        test_fraction=1, references="dataset.json" if kind == "folder" else None,
        train_annotations="dataset.json", test_annotations="dataset.json",
    )  # fmt: skip
    split = load_split(config, "test", folder)
    for image in split.images:
        assert type(image.image_id) in (int, str)
        assert image.path.is_file()
    assert set(split.references) <= {image.image_id for image in split.images}
    assert all(isinstance(text, str) for texts in split.references.values() for text in texts)
    load_pairs(config, folder)


def read_results(folder: Path, content: bytes, case: random.Random) -> None:
    (folder / "a.json").write_bytes(content)
    (folder / "b.json").write_bytes(case.choice([*JSONS, *TABLES]))
    first, second = case.sample(("a.json", "b.json"), 2)
    references, names = load_named_references(folder / first)
    captions = under_reference_ids(load_results(folder / second), references, names, folder / second)
    assert all(type(i) in (int, str) and isinstance(text, str) for i, text in captions.items())


def read_archive(folder: Path, content: bytes, _case: random.Random) -> None:
    """A shard of pictures and captions: damage is found when it is listed, or counts as an unreadable picture."""
    (folder / "0.tar").write_bytes(content)
    config = DatasetConfig(kind="folder", images="0.tar", val_fraction=0, test_fraction=1, caption_column="txt")
    split = load_split(config, "test", folder)
    assert all(isinstance(text, str) for texts in split.references.values() for text in texts)
    paths = [image.path for image in split.images]
    (batch,) = decoded(paths, ClipPixels(32), [list(range(len(paths)))], workers=0)
    assert len(batch.rows) + len(batch.unreadable) == len(paths) > 0


def read_embeddings(folder: Path, content: bytes, _case: random.Random) -> None:
    (folder / "x.pkl").write_bytes(content)
    found = read_released(folder / "x.pkl", "dataset.released")
    for value in vars(found).values():
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.float16
            assert value.dim() == 2


def read_generator(folder: Path, content: bytes, _case: random.Random) -> None:
    (folder / "model.pt").write_bytes(content)
    state = read_model(folder / "model.pt", "checkpoint")
    bundle = load_released_generator(state, SMALL, "checkpoint=model.pt")
    assert sum(p.numel() for p in bundle.model.parameters()) < 1_000_000


def read_pixels(folder: Path, content: bytes, case: random.Random) -> None:
    path = folder / f"picture.{case.choice(('jpg', 'png', 'tif', 'avif'))}"
    path.write_bytes(content)
    assert find_images([str(folder)]) == [path]
    with suppress(*DAMAGED_IMAGE):  # a page leaves it out
        embed(path)
    pixels = load_pixels(path, ClipPixels(24, squash=case.random() < 0.2), draft=case.choice((0, 8)))
    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == torch.uint8


def read_upload(_folder: Path, content: bytes, _case: random.Random) -> None:
    try:
        picture = read_picture(content)
    except Refused as refusal:
        raise UserError(str(refusal)) from None
    ClipPixels(24)(picture)


READERS: dict[Callable[[Path, bytes, random.Random], None], Callable[[], list[bytes]]] = {
    read_corpus: lambda: [*JSONS, *TEXTS, *TEXTS, *pickles()[-3:]],
    read_splits: lambda: [*JSONS, *TABLES, NAMES],
    read_results: lambda: [*JSONS, *TABLES],
    read_archive: archives,
    read_embeddings: pickles,
    read_generator: models,
    read_pixels: pictures,
    read_upload: pictures,
}


@contextmanager
def limits() -> Iterator[None]:
    """Raise if the block takes more CPU time or memory than a case may."""

    def too_slow(*_: Any) -> None:
        raise AssertionError(f"over {CPU_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGPROF, too_slow)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert time.process_time() - started < CPU_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_damaged_file_is_a_sentence_or_an_answer(
    reader: Callable[[Path, bytes, random.Random], None], tmp_path: Path
) -> None:
    whole = READERS[reader]()
    end = time.monotonic() + SECONDS / len(READERS)
    number = answers = sentences = 0
    while time.monotonic() < end or number < 20:
        case, folder = random.Random(f"{SEED} {reader.__name__} {number}"), tmp_path / str(number)
        content = case.choice(whole) if number < len(whole) else damaged(whole, case)
        folder.mkdir()
        try:
            with limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader(folder, content, case)
            answers += 1
        except UserError as error:
            sentence = str(error).replace(str(folder), "")
            sentences += 1
            if len(sentence) > 8000:  # five names of 1,024 characters
                pytest.fail(f"a sentence of {len(sentence)} characters, case {number} of seed {SEED}: {sentence[:300]}")
        except BaseException:
            print(f"case {number} of seed {SEED}, {len(content)} bytes: {content[:400]!r}")
            raise
        remove(folder)
        number += 1
    print(f"{reader.__name__}: {number} cases, {answers} answers, {sentences} sentences")
    assert answers > 0
    assert sentences > 0


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
