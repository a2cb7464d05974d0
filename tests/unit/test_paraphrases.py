"""METEOR's table cut to the words at hand: the same scores as with the whole table, whatever the captions."""

import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgtgan.evaluation import java as jvm
from cgtgan.evaluation import paraphrases as p

# What METEOR's normalisation splits, joins, replaces and lower-cases.
BITS = """a big large dog man's couple two of people sofa couch is are riding in front u.s. us U.S mr. dr. e.g. p.m. 's n't don't it's
3.5 1,000 a.b.c x-ray t-shirt '90s o'clock ... .. -- – — ' ` ‘ ’ “ &quot; &amp; é café É İ K ﬁ 日本 😀 ½ -lrb- # % / \\ $1 _ ~ .5 5. inc.
no. 1"""


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choice(BITS.split()) + draw.choice(["", " ", " ", " ", "."]) for _ in range(draw.randint(1, 9)))
        for _ in range(count)
    ]


def meteor(captions: list[str], references: list[list[str]]) -> tuple[float, list[float]]:
    java = jvm.find_java()
    assert java is not None
    with jvm.MeteorRun(java, len(captions)) as run:
        run.score([(captions, references)], timeout_s=120)
        return run.result()[0]


@pytest.fixture(scope="module")
def table() -> Path:
    """METEOR's own, with its searchable form made."""
    path = jvm.package_folder("meteor") / "data" / "paraphrase-en.gz"
    if making := p.start_preparing(path):
        making.wait()
    return path


def test_scores_are_those_of_the_whole_table(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [text.lower() for text in sentences(1, 600)]
    references = [[text.lower() for text in sentences(100 + i, 3)] for i in range(600)]
    cut = meteor(captions, references)
    monkeypatch.setattr(jvm, "cut_table", lambda *_: None)
    monkeypatch.setattr(jvm, "start_preparing", lambda *_: None)
    assert cut == meteor(captions, references)
    # ... and without any paraphrase they are others: the pairs count here
    monkeypatch.setattr(jvm, "cut_table", lambda *_: gzip.compress(b""))
    assert cut != meteor(captions, references)


TABLE = [
    ("a big dog", "a large dog"),
    ("large", "big"),
    ("us", "america"),
    ("big dog", "u.s. army"),
    ("'s", ", ,"),
    ("café", "coffee bar"),
    ("the cat", "a cat"),
]


def table_of(pairs: list[tuple[str, str]]) -> p.ParaphraseTable:
    return p.ParaphraseTable.of([([a.encode() for a, _ in pairs], [b.encode() for _, b in pairs])])


def cut(captions: list[str], references: list[str]) -> list[tuple[str, str]]:
    lines = table_of(TABLE).cut(captions, references).decode().splitlines()
    assert lines[::3] == ["1"] * (len(lines) // 3)
    return list(zip(lines[1::3], lines[2::3], strict=True))


@pytest.mark.parametrize(
    ("captions", "references", "kept"),
    [
        (["it is a big dog"], ["it is a large dog"], TABLE[:2]),
        (["it is a large dog"], ["it is a big dog"], TABLE[:2]),  # whichever way round
        (["a big and large dog"], [""], []),  # both in the caption: no match
        (["big a dog"], ["a large dog"], TABLE[1:2]),  # words there, but not one after the other
        (["the u.s. team"], ["in america"], TABLE[2:3]),  # METEOR makes `us` of it
        (["the u.s. army"], ["big dog"], TABLE[3:4]),
        (["a man's , , hat"], ["'s , ,"], TABLE[4:5]),
        (["a café"], ["a coffee bar"], TABLE[5:6]),
        (["A CAT"], ["The Cat"], TABLE[6:]),
    ],
)
def test_pairs_that_can_match_stay_in_order(
    captions: list[str], references: list[str], kept: list[tuple[str, str]]
) -> None:
    found = cut(captions, references)
    assert found == [pair for pair in TABLE if pair in found]
    assert [pair for pair in found if pair != TABLE[4]] == [
        pair for pair in kept if pair != TABLE[4]
    ]  # one without letters may stay
    assert set(kept) <= set(found)


WORDS = st.lists(st.sampled_from(["a", "big", "dog", "cat", "u.s.", ",", "'s"]), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), max_size=12), st.lists(WORDS, max_size=3), st.lists(WORDS, max_size=3))
def test_nothing_that_stands_in_the_texts_is_left_out(
    pairs: list[tuple[str, str]], captions: list[str], references: list[str]
) -> None:
    lines = table_of(pairs).cut(captions, references).decode().splitlines()

    def within(phrase: str, texts: list[str]) -> bool:
        return any(f" {phrase} " in f" {text} " for text in texts)

    found = list(zip(lines[1::3], lines[2::3], strict=True))
    for a, b in pairs:
        if (within(a, captions) and within(b, references)) or (within(b, captions) and within(a, references)):
            assert (a, b) in found


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of one's own, and a home for its searchable form."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "table.gz"
    path.write_bytes(gzip.compress("".join(f"0.1\n{a}\n{b}\n" for a, b in TABLE).encode()))
    return path


def lines_of_cut(table: Path, captions: list[str], references: list[str]) -> list[str] | None:
    found = p.cut_table(table, captions, references)
    return None if found is None else gzip.decompress(found).decode().splitlines()


def test_the_searchable_form_is_made_once_and_found_again(small: Path) -> None:
    assert lines_of_cut(small, ["big"], ["large"]) is None
    making = p.start_preparing(small)
    assert making is not None
    assert making.wait() == 0
    assert p.start_preparing(small) is None
    assert lines_of_cut(small, ["big"], ["large"]) == ["1", "large", "big"]
    assert [f.name for f in p.cache_folder(small).parent.iterdir() if not f.name.startswith(".")] == [
        p.cache_folder(small).name
    ]


@pytest.mark.parametrize("blocks", [7, 50, 1 << 20])
def test_blocks_of_a_table_are_cut_anywhere(small: Path, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "_BLOCK", blocks)
    found = [(a.decode(), b.decode()) for first, second in p._blocks(small) for a, b in zip(first, second, strict=True)]
    assert found == TABLE


@pytest.mark.parametrize("damage", [b"", b"PK", None])
@pytest.mark.parametrize("name", ["runs", "text", "words"])
def test_a_damaged_form_is_removed_and_made_again(small: Path, damage: bytes | None, name: str) -> None:
    p.start_preparing(small).wait()  # type: ignore[union-attr]
    folder = p.cache_folder(small)
    file = folder / f"{name}.npy"
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    assert lines_of_cut(small, ["big"], ["large"]) is None
    assert not folder.exists()
    assert p.start_preparing(small).wait() == 0  # type: ignore[union-attr]
    assert lines_of_cut(small, ["big"], ["large"]) is not None


def test_texts_that_would_take_long_get_the_whole_table(small: Path) -> None:
    p.start_preparing(small).wait()  # type: ignore[union-attr]
    assert lines_of_cut(small, ["a.b." * 2000], ["large"]) is None
    assert lines_of_cut(small, ["xDOTMULTI."], ["large"]) is None


def test_where_nothing_can_be_written_the_whole_table_is_read(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert p.start_preparing(small) is None
    assert lines_of_cut(small, ["big"], ["large"]) is None
