"""Sentences in tables: CSV, JSON Lines, JSON lists and Parquet, plain and compressed, whole and broken."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cgtgan.config import CorpusConfig
from cgtgan.data.corpora import has_entities, load_corpus, read_raw
from cgtgan.errors import InputError

ROOT = Path(__file__).parents[2]
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def sentences(path: Path, content: str | bytes, column: str | None = None) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_raw("text_file", path, Counter(), column))


def parquet(columns: dict[str, list[Any]]) -> bytes:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow (extra tables) is not installed")
    stream = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        (
            "a.csv",
            'image,caption\n1.jpg,A dog .\n2.jpg,"A ""cat"", asleep"\n',
            "caption",
            ["A dog .", 'A "cat", asleep'],
        ),
        ("a", '"id";"text"\n1;"two\nlines"\n', "text", ["two\nlines"]),
        ("a.tsv", 'a "b\thttp://x\nc\thttp://y\n', "1", ['a "b', "c"]),
        ("tokens", "1.jpg#0\tA dog .\n1.jpg#1\tTwo cats .\n", "2", ["A dog .", "Two cats ."]),
        ("results.csv", "image_name| comment_number| comment\n1.jpg| 0| A dog .\n", "comment", ["A dog ."]),
        ("one.csv", "caption\nA dog .\n\nA cat\n", "caption", ["A dog .", "A cat"]),
        (
            "a.jsonl",
            '{"id": 1, "c": "a dog"}\n\n{"id": 2, "c": ["x", "y"]}\n{"id": 3}\n',
            "c",
            ["a dog", "x", "y", None],
        ),
        ("no_ending", '{"c": "a dog"}\n{"c": "a cat"}\n', "c", ["a dog", "a cat"]),
        ("a.jsonl", '"a dog"\n"a cat"\n', None, ["a dog", "a cat"]),
        ("a.json", '["a dog", "a cat", 3]', None, ["a dog", "a cat", 3]),
        ("a.json", '[{"c": "a dog"}, {"c": "a cat"}, 7]', "c", ["a dog", "a cat", None]),
        ("a.txt", "A dog, a cat.\nTwo men.\n", None, ["A dog, a cat.", "Two men."]),
    ],
)
@pytest.mark.parametrize("packing", ["", *COMPRESSED])
def test_sentences_of_every_layout(
    tmp_path: Path, name: str, content: str, column: str | None, expected: list[Any], packing: str
) -> None:
    stored = COMPRESSED[packing](content.encode()) if packing else content
    assert sentences(tmp_path / f"{name}{packing}", stored, column) == expected


def test_zstandard(tmp_path: Path) -> None:
    zstd = pytest.importorskip("backports.zstd", reason="backports.zstd (extra tables) is not installed")
    stored = zstd.compress(b"caption\na dog &amp; a cat\n")
    assert sentences(tmp_path / "a.csv.zst", stored, "caption") == ["a dog & a cat".replace("&", "&amp;")]
    assert has_entities(tmp_path / "a.csv.zst")
    with pytest.raises(InputError, match=r"a\.csv\.zst cannot be read to its end.*damaged or cut off"):
        sentences(tmp_path / "a.csv.zst", stored[:-5], "caption")


def test_parquet(tmp_path: Path) -> None:
    stored = parquet({"image_id": [1, 2, 3], "caption": ["a dog", None, "a cat"], "all": [["x", "y"], [], ["z"]]})
    path = tmp_path / "corpus"  # recognised by its content
    assert sentences(path, stored, "caption") == ["a dog", None, "a cat"]
    assert sentences(path, stored, "all") == ["x", "y", "z"]
    with pytest.raises(InputError, match=r"is a Parquet table with the columns 'image_id', 'caption', 'all', not one"):
        sentences(path, stored)
    with pytest.raises(InputError, match=r"corpus cannot be read to its end.*damaged or cut off"):
        sentences(path, stored[:-9], "caption")
    assert not has_entities(path)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        (
            "a.csv",
            "image,caption\n1.jpg,A dog .\n",
            None,
            "is a table with the columns 'image', 'caption', not one sent",
        ),
        (
            "a.csv",
            "one\ntwo words\n",
            None,
            "is a table with the columns 'one', not one sentence per line: set corpus.col",
        ),
        (
            "a.csv",
            "image,caption\n1.jpg,A dog .\n",
            "Caption",
            "'image', 'caption': corpus.column=Caption is none of them",
        ),
        ("tokens", "1.jpg#0\tA dog .\n", "3", "with the columns '1', '2': corpus.column=3 is none of them"),
        ("a.jsonl", '{"id": 1, "c": "x"}\n', None, "is a JSON Lines file with the columns 'id', 'c', not one sentence"),
        ("a.json", '[{"image_id": 1, "caption": "x"}]', None, "is a JSON list with the columns 'image_id', 'caption'"),
        (
            "a.json",
            '{"images": [], "annotations": []}',
            "c",
            "is JSON, not a list or one sentence per line: use corpus=coco",
        ),
        ("a.csv", 'a,c\n1,"x\n2,y\n', "c", "is no whole CSV table, line 3: unexpected end of data; quotes"),
        ("a.jsonl", '{"c": "x"}\n{"c": "y\n', "c", r"line 2 is no JSON: '\{\"c\": \"y'"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str, column: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sentences(tmp_path / name, content, column)


def test_many_columns_are_cut(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"columns 'c0', .*'c29' and 970 more, not one sentence per line"):
        sentences(tmp_path / "a.csv", ",".join(f"c{n}" for n in range(1000)) + "\n")


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path) -> None:
    """In a process where neither library can be imported."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd and so on")
    code = (
        "import sys\nsys.modules |= dict.fromkeys(('pyarrow', 'backports.zstd', 'compression.zstd'))\n"
        "from pathlib import Path\nfrom cgtgan.data.corpora import read_raw\n"
        "for name in sys.argv[1:]:\n    try: list(read_raw('text_file', Path(name)))\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    names = [str(tmp_path / name) for name in ("a.parquet", "a.txt.zst")]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        f"InputError {names[0]} (corpus.path) is a Parquet table, which needs the extra `tables`: pip install "
        "'cgtgan[tables]'",
        f"InputError {names[1]} (corpus.path) is compressed with Zstandard: pip install 'cgtgan[tables]', which reads "
        "it, or unpack it",
    ], done.stderr


def test_rows_of_another_length_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"  # Flickr30k's own has one such row
    path.write_text("image_name| comment_number| comment\n1.jpg| 0| A dog .\n2.jpg| 4   A cat .\n")
    corpus = load_corpus(CorpusConfig(kind="text_file", rule="coco", column="comment"), path)
    assert corpus.sentences == ["A dog."]
    assert corpus.counts == {"read": 2, "kept": 1, "uneven_row": 1}
    assert corpus.summary() == "kept 1 of 2 captions (dropped: 1 uneven row)"


def test_a_json_list_in_one_long_line(tmp_path: Path) -> None:
    captions = [f"{n} dogs run" for n in range(80_000)]
    content = json.dumps(captions)
    assert len(content) > 1_000_000
    assert sentences(tmp_path / "a.json", content) == captions
