"""METEOR's paraphrase table cut to the words at hand: the same scores, and METEOR is ready in half a second, not five.

METEOR reads 5.3 million pairs of phrases for every start, though a pair can only match where one phrase stands in a caption and the
other in a reference. Its authors' own program `FilterParaphrase` cuts the table to a test set, but reads it whole for that. Here the
table is put once a machine into a form that is searched in half a second (133 MB under ~/.cache/cgtgan); nothing else of METEOR is
touched. Without that file, or where it cannot be written, METEOR reads its own table.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cgtgan.runtime.artifacts import atomic_path

_BLOCK = 1 << 24
_RUN = re.compile("[a-z0-9]+")
_DOTTED = re.compile(r"[a-z0-9]+(?:\.+[a-z0-9]+)*")
_LONGEST = 40  # letters of a word of the table: longer joins need not be tried
_SLOTS = 1 << 24  # of a table of hashes
_MARKER = "DOTMULTI"  # METEOR's own mark for dots, which it takes out of a text again
_DOTS = re.compile(r"(?:[a-z0-9]+\.+){12}")  # so many parts that joining them in every way would take long


def cache_folder(table: Path) -> Path:
    """Where the searchable form of `table` lies; the name carries the table's checksum and length, as gzip keeps them at its end."""
    with table.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        mark = file.read(8).hex()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return home / "cgtgan" / f"meteor-paraphrases-{mark}-v2"


@dataclass(frozen=True)
class Runs:
    """The runs of a-z and 0-9 that METEOR's normalisation can make out of some texts, and which can follow on which; rather too many."""

    single: set[str]
    pairs: set[tuple[str, str]]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Runs:
        """METEOR lower-cases and puts blanks between characters; the one thing it takes out are the dots of abbreviations (u.s. -> us),
        so runs that dots part are joined in every way."""
        single: set[str] = set()
        pairs: set[tuple[str, str]] = set()
        for text in texts:
            before: Sequence[str] = ()
            for dotted in _DOTTED.findall(text.lower()):
                here = (dotted,)
                if "." in dotted:
                    here = _joins(dotted.split("."))
                    pairs.update((a, b) for a in here for b in here)
                single.update(here)
                pairs.update((a, b) for a in before for b in here)
                before = here
        return cls(single, pairs)


def _joins(parts: Sequence[str]) -> tuple[str, ...]:
    parts = [part for part in parts if part]
    found = []
    for start in range(len(parts)):
        joined = ""
        for part in parts[start:]:
            joined += part
            found.append(joined)
            if len(joined) > _LONGEST:
                break
    return tuple(found)


@dataclass(frozen=True)
class ParaphraseTable:
    """METEOR's P pairs of phrases, searchable; phrases and words are numbered.

    `text` uint8 holds N phrases, which end at `ends` (N,); `words` are the V different runs of a-z and 0-9 in them, `runs` (R,) those of
    all phrases one after the other; `filled` (N,) bool are the phrases that have any, `starts` where in `runs` each of these begins;
    `first`, `second` (P,) are the phrases of the pairs. Numbers are int32, `runs` uint16 where that is enough.
    """

    text: NDArray[np.uint8]
    ends: NDArray[np.int32]
    words: Sequence[str]
    runs: NDArray[Any]
    filled: NDArray[np.bool_]
    starts: NDArray[np.int32]
    first: NDArray[np.int32]
    second: NDArray[np.int32]

    @classmethod
    def read(cls, folder: Path) -> ParaphraseTable | None:
        """Mapped into memory. None where the folder is not there; one that is not whole is removed."""
        try:
            words = np.load(folder / "words.npy").tobytes().decode("ascii").split("\n")
            return cls(words=words, **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS})
        except (OSError, ValueError, EOFError):
            shutil.rmtree(folder, ignore_errors=True)
            return None

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[bytes], Sequence[bytes]]]) -> ParaphraseTable:
        """From blocks of (first phrases, second phrases)."""
        numbers: dict[bytes, int] = {}
        sides: tuple[list[NDArray[np.int32]], ...] = ([], [])
        for block in pairs:
            for side, phrases in zip(sides, block, strict=True):
                for phrase in dict.fromkeys(phrases):
                    numbers.setdefault(phrase, len(numbers))
                side.append(np.fromiter(map(numbers.__getitem__, phrases), np.int32, len(phrases)))
        words: dict[str, int] = {}
        runs, counts = array("i"), array("i")
        for phrase in numbers:
            found = _RUN.findall(phrase.decode())
            runs.extend(words.setdefault(run, len(words)) for run in found)
            counts.append(len(found))
        first, second = (np.concatenate(side) if side else np.zeros(0, np.int32) for side in sides)
        each = np.array(counts, np.int32)
        return cls(
            text=np.frombuffer(b"".join(numbers), np.uint8),
            ends=np.cumsum(np.fromiter(map(len, numbers), np.int32, len(numbers)), dtype=np.int32),
            words=list(words),
            runs=np.array(runs, np.uint16 if len(words) <= 2**16 else np.int32),
            filled=each > 0,
            starts=(np.cumsum(each, dtype=np.int32) - each)[each > 0],
            first=first,
            second=second,
        )

    def save(self, folder: Path) -> None:
        """Whole or not at all."""
        with atomic_path(folder) as beside:
            beside.mkdir()
            np.save(beside / "words.npy", np.frombuffer("\n".join(self.words).encode("ascii"), np.uint8))
            for name in _COLUMNS:
                np.save(beside / f"{name}.npy", getattr(self, name))

    def cut(self, captions: Iterable[str], references: Iterable[str]) -> bytes:
        """The pairs that can match between a caption and a reference, whichever way round, in METEOR's format and order."""
        in_captions, in_references = self._within(Runs.of(captions)), self._within(Runs.of(references))
        first, second = self.first, self.second
        kept = (in_captions[first] & in_references[second]) | (in_references[first] & in_captions[second])
        text, ends = self.text.data, self.ends
        lines = [b"1\n"] * (3 * int(kept.sum()))  # METEOR does not look at a pair's probability
        for place, side in enumerate((first[kept], second[kept]), start=1):
            begins = np.where(side > 0, ends[side - 1], 0)
            lines[place::3] = [
                bytes(text[a:b]) + b"\n" for a, b in zip(begins.tolist(), ends[side].tolist(), strict=True)
            ]
        return b"".join(lines)

    def _within(self, texts: Runs) -> NDArray[np.bool_]:
        """Of each phrase, whether the texts have all its words and (but for one in some hundred) each two that follow on each other."""
        count = len(self.words)
        known = np.fromiter((word in texts.single for word in self.words), np.bool_, count)
        numbers = {word: number for number, word in enumerate(self.words) if known[number]}
        follow = np.zeros(_SLOTS, np.bool_)
        follow[
            [(numbers[a] * count + numbers[b]) % _SLOTS for a, b in texts.pairs if a in numbers and b in numbers]
        ] = True
        good = known[self.runs]
        later = np.ones(len(self.runs), np.bool_)  # the run before it is of the same phrase
        later[self.starts] = False
        later[1:] &= good[1:] & good[:-1]
        places = later.nonzero()[0]
        hashes = (
            self.runs[places - 1].astype(np.uint32) * np.uint32(count) + self.runs[places]
        )  # what overflows is beyond _SLOTS
        good[places] = follow[hashes % np.uint32(_SLOTS)]
        within = np.ones(len(self.filled), np.bool_)  # nothing is known of phrases without a run: they stay
        if len(self.starts):
            within[self.filled] = np.logical_and.reduceat(good, self.starts)
        return within


_COLUMNS = tuple(f.name for f in fields(ParaphraseTable) if f.name != "words")


def cut_table(table: Path, captions: Sequence[str], references: Sequence[str]) -> bytes | None:
    """`table` cut to the texts, gzipped; None where METEOR has to read all of it.

    Args:
        captions, references: tokenised texts, lower-case.
    """
    if any(_MARKER in text or _DOTS.search(text) for texts in (captions, references) for text in texts):
        return None
    try:
        found = ParaphraseTable.read(cache_folder(table))
    except (OSError, RuntimeError):  # no table, no home
        return None
    return None if found is None else gzip.compress(found.cut(captions, references), compresslevel=1, mtime=0)


def start_preparing(table: Path) -> subprocess.Popen[bytes] | None:
    """A process of low priority that makes the searchable form of `table` (some 10 s), or None where that cannot be or is there already."""
    try:
        target = cache_folder(table)
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a missing table is METEOR's to say; no home, or one that cannot be written to
        return None
    if target.exists() or not os.access(target.parent, os.W_OK):
        return None
    command = [sys.executable, "-m", "cgtgan.evaluation.paraphrases", str(table)]
    places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment, start_new_session=True)


def prepare(table: Path) -> None:
    """Make the searchable form of `table`, unless another process is making it now."""
    target = cache_folder(table)
    try:
        with FileLock(target.with_name(f".{target.name}.lock"), timeout=0):
            if not target.exists():
                ParaphraseTable.of(_blocks(table)).save(target)
    except Timeout:
        pass


def _blocks(table: Path) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Blocks of pairs of a table, three lines a pair: probability, phrase, phrase."""
    with gzip.open(table, "rb") as file:
        left: list[bytes] = []
        rest = b""
        while block := file.read(_BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            lines = left + lines
            whole = len(lines) - len(lines) % 3
            left = lines[whole:]
            yield (
                [line.rstrip(b"\r") for line in islice(lines, 1, whole, 3)],
                [line.rstrip(b"\r") for line in islice(lines, 2, whole, 3)],
            )
        if rest and len(left) == 2:
            yield [left[1]], [rest]


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(19)
    prepare(Path(sys.argv[1]))
