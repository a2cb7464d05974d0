"""Sentences without images: raw text of the known corpora, and its cleaning.

The rules are those of the published program (Yu et al., ACM MM 2023), per corpus; `released=True` is that program to
the letter. The default differs where the letter harms training:
- HTML entities become the characters that CLIP makes of them (`R&amp;B` -> `R&B`), so that GPT-2 reads what CLIP does.
- White space and control characters are made single blanks then, so a sentence is one line; zero-width characters and
  marks of writing direction go, but for the two joiners that some scripts need.
- After the rule's one dropped character, full stops and blanks at the end go too: `Ellipsis...` becomes `Ellipsis.`.
  The generator stops at GPT-2's token `.`, not at ` .`, `..` or `...`. Other marks stay: `Wow!!` becomes `Wow!.`.
- Text without a letter or a digit is dropped (`.`, `?!`): it would teach the empty caption.
- The first character gets its title case (`ß` -> `Ss`, theirs `SS`).
- gcc draws from one generator for the corpus; theirs is reseeded per caption and loses every caption of 16-19 words.
Lone surrogates, which JSON can bring in and no file can hold, become `?` in both.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from cgtgan.config import CorpusConfig, DatasetConfig
from cgtgan.data.annotations import captions_in_file
from cgtgan.data.caption_tables import read_captions
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.sentence_files import read_sentences
from cgtgan.data.tables import UNEVEN
from cgtgan.data.user_files import DAMAGED_FILE, broken_file, missing_file, open_bytes, text_lines
from cgtgan.errors import InputError
from cgtgan.runtime.sources import GCC, PAGES

RULES = ("coco", "flickr30k", "gcc", "shutterstock", "none")
PUNCTUATION = frozenset(string.punctuation) | {"''", "``", "-LRB-", "-RRB-", "-LCB-", "-RCB-", "--", "..."}

# Why a caption was dropped; the keys of `CleanedCorpus.counts` beside read, kept and bad_bytes.
EMPTY, WRONG_TYPE, NO_WORDS, NO_TAB = "empty", "wrong_type", "no_words", "no_tab"
TOO_SHORT, TOO_LONG, SAMPLED_OUT = "too_short", "too_long", "sampled_out"

Cleaned: TypeAlias = tuple[str, str | None]  # text without its final '.' and None, or '' and why it is dropped

CORPUS_FROM = {  # where to get it
    "gcc": f"{GCC.address} (or ai.google.com/research/ConceptualCaptions/download, Train_GCC-training.tsv)",
    "shutterstock": f"{PAGES['shutterstock']} (sentences.pkl)",
    **{name: kind.annotations_from for name, kind in KINDS.items()},
}
_ENTITY = re.compile(r"&#?\w{1,31};")
_ENTITY_BYTES = re.compile(rb"&#?\w{1,31};")
_PART_ENDS = re.compile(" [:;.-] ")
_JOINERS = "\u200c\u200d"
_USUAL_PLACES = {
    "demo": ("corpus/corpus.txt",),
    "demo_external": ("corpus/external.txt",),
    "gcc": ("Train_GCC-training.tsv", "corpus/Train_GCC-training.tsv"),
    "shutterstock": ("sentences.pkl", "corpus/sentences.pkl"),
}


@dataclass(frozen=True)
class CleanedCorpus:
    """`sentences` end in '.'. `counts`: read = kept + every reason to drop; `bad_bytes` were replaced and kept."""

    sentences: Sequence[str]
    counts: dict[str, int]

    def summary(self) -> str:
        """One sentence for the log: how many were read and kept, and why the others went."""
        counts = self.counts
        dropped = [why for why in counts if why not in ("read", "kept", "bad_bytes")]
        reasons = ", ".join(f"{counts[why]:,} {why.replace('_', ' ')}" for why in dropped) or "none"
        bad = f"; {counts['bad_bytes']:,} lines had bytes that are not UTF-8" if counts.get("bad_bytes") else ""
        return f"kept {counts['kept']:,} of {counts['read']:,} captions (dropped: {reasons}){bad}"


# ----------------------------------------------------------------------------------------------------- cleaning


def clean_captions(rule: str, captions: Iterable[Any], *, released: bool = False, seed: int = 0) -> list[str]:
    """Clean sentences in the order of `captions`, before any shuffle.

    rule: coco, flickr30k, gcc, shutterstock (token lists `['<S>', ..., '</S>']`; a string is split at white space) or
    none (only made one line, with one final '.' in the place of final '.', '!' and '?').
    released: the published program to the letter; what crashed it is dropped. seed: of numpy's generator, theirs is 0.
    Raises `InputError` for an unknown rule; never for a caption.
    """
    return list(clean_corpus(rule, captions, released=released, seed=seed).sentences)


def clean_corpus(rule: str, captions: Iterable[Any], *, released: bool = False, seed: int = 0) -> CleanedCorpus:
    """As `clean_captions`, with the counts kept and dropped by reason. Time and memory are linear in the corpus."""
    if rule not in RULES:
        raise InputError(f"corpus.rule={rule} is not accepted: it must be one of {', '.join(RULES)}")
    clean = _cleaner(rule, released, seed)
    sentences: list[str] = []
    dropped: Counter[str] = Counter()
    read = 0
    for raw in captions:
        read += 1
        if rule == "shutterstock" and isinstance(raw, str):
            raw = raw.split()
        is_text = _is_token_list(raw) if rule == "shutterstock" else isinstance(raw, str)
        text, reason = clean(raw) if is_text else ("", WRONG_TYPE)
        if reason is None and (rule == "none" or not released):
            text, reason = normalise_ending(text, capital=rule != "none")
        elif reason is None:
            text = (text[:1].upper() + text[1:]).encode("utf-8", "replace").decode("utf-8")
        if reason is None:
            sentences.append(text + ".")
        else:
            dropped[reason] += 1
    return CleanedCorpus(sentences, {"read": read, "kept": len(sentences), **dict(sorted(dropped.items()))})


def embedded_text(sentence: str) -> str:
    """What CLIP is given: the sentence without its final '.' (one character; CLIP cuts at 77 tokens itself)."""
    return sentence.removesuffix(".")


def shuffle_sentences(sentences: Sequence[str], seed: int = 1024) -> list[str]:
    """A new list in the published order: `np.random.seed(seed); np.random.shuffle(sentences)`."""
    return [sentences[int(i)] for i in np.random.RandomState(seed).permutation(len(sentences))]


def _cleaner(rule: str, released: bool, seed: int) -> Callable[[Any], Cleaned]:
    """The rule as one function: raw caption -> (text without its final '.', None) or ('', why it is dropped)."""
    generator = np.random.RandomState(seed)
    if rule == "gcc":
        if not released:
            return lambda raw: _gcc(_one_line(raw), generator.rand)
        first = generator.rand()  # theirs reseeds before every draw, so it always sees this one
        return lambda raw: _gcc(raw, lambda: first)
    if rule == "shutterstock":
        return lambda raw: _shutterstock(raw if released else _one_line(" ".join(raw)).split(), generator.rand)
    if rule == "none":
        return lambda raw: (_one_line(raw).rstrip(" .!?" + _JOINERS), None) if raw.strip() else ("", EMPTY)
    return lambda raw: _captions(raw if released else _one_line(raw))


def _is_token_list(raw: Any) -> bool:
    return isinstance(raw, (list, tuple)) and all(isinstance(token, str) for token in raw)


def _one_line(text: str) -> str:
    """Without HTML entities; single blanks for white space and control characters; nothing invisible; '?' for lone
    surrogates.
    """
    if "&" in text:  # twice, as CLIP's tokenizer does: some pages escape what is escaped
        for _ in range(2):
            text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if not text.isprintable():
        text = "".join(map(_visible, text))
    return " ".join(text.split())


def _visible(character: str) -> str:
    if character in _JOINERS:
        return character
    return {"Cc": " ", "Cf": "", "Cs": "?"}.get(unicodedata.category(character), character)


def normalise_ending(text: str, *, capital: bool) -> Cleaned:
    """The ends of a cleaned text, as the module's docstring says; doing it again changes nothing."""
    text = text.rstrip(" ." + _JOINERS)
    if not any(map(str.isalnum, text)):
        return "", NO_WORDS
    return (text[:1].title() + text[1:] if capital else text), None


def _captions(raw: str) -> Cleaned:
    """coco and flickr30k: less a last character in P."""
    if not raw:
        return "", EMPTY
    return (raw[:-1] if raw[-1] in PUNCTUATION else raw), None


def _without_outer_marks(tokens: list[str]) -> list[str] | None:
    """Less a first and a last token in P; None where the published program crashes: no token left to look at."""
    if tokens and tokens[0] in PUNCTUATION:
        tokens = tokens[1:]
    if not tokens:
        return None
    return tokens[:-1] if tokens[-1] in PUNCTUATION else tokens


def _gcc(raw: str, draw: Callable[[], float]) -> Cleaned:
    """Cut at the first token '.', then by length."""
    tokens = _without_outer_marks(raw.split())
    if tokens is None:
        return "", EMPTY
    tokens = tokens[: tokens.index(".")] if "." in tokens else tokens
    n = len(tokens)
    if n <= 6 or n >= 20:
        return "", TOO_SHORT if n <= 6 else TOO_LONG
    if n > 15 and draw() >= 0.3:
        return "", SAMPLED_OUT
    return " ".join(tokens), None


def _shutterstock(raw: list[str] | tuple[str, ...], draw: Callable[[], float]) -> Cleaned:
    """The first part alone, by length. Every part that is long enough takes one draw, used or not."""
    tokens = _without_outer_marks([token for token in raw if token not in ("<S>", "</S>")])
    if tokens is None:
        return "", EMPTY
    text = _PART_ENDS.split(" ".join(tokens), maxsplit=1)[0]
    words = text.split()
    n = len(words)
    if n <= 6 or sum(word not in PUNCTUATION for word in words) <= 5:
        return "", TOO_SHORT
    drawn = draw()
    if n > 15 and drawn >= (0.3 if n < 20 else 0.1):
        return "", SAMPLED_OUT
    return text, None


# ------------------------------------------------------------------------------------------------------ reading


def is_beside_its_images(config: CorpusConfig, dataset: DatasetConfig) -> bool:
    """Whether the corpus is the data set's own training captions: coco and flickr30k without `path`.

    Raises `InputError` where the data set is another one.
    """
    if config.path is not None or config.kind not in ("coco", "flickr30k"):
        return False
    if config.kind != dataset.kind:
        raise InputError(
            f"corpus.path is null and corpus.kind={config.kind} does not come with dataset.kind={dataset.kind}: set "
            f"corpus.path=FILE, its train_caption.json or Karpathy's dataset_{config.kind}.json; get it from "
            f"{CORPUS_FROM[config.kind]}"
        )
    return True


def corpus_path(config: CorpusConfig, dataset_root: Path) -> Path:
    """`corpus.path`, or the usual place of its kind under `dataset_root`; not for what `is_beside_its_images`."""
    if config.path is not None:
        return Path(config.path).expanduser()
    if config.kind not in _USUAL_PLACES:
        problem = f"corpus.path is null and corpus.kind={config.kind}"
        raise InputError(f"{problem}: set corpus.path=FILE, with one sentence per line")
    places = [dataset_root / place for place in _USUAL_PLACES[config.kind]]
    return next((place for place in places if place.is_file()), places[0])


def load_corpus(config: CorpusConfig, path: Path, raw: Iterable[Any] | None = None) -> CleanedCorpus:
    """Read `path` as `config.kind` (or take `raw`), clean, shuffle with `shuffle_seed`, cut to `max_sentences`.

    ShutterStock's is not shuffled. `released` brings the order of the released embeddings: shuffled once more.
    Raises `MissingFileError` or `InputError`, also if no sentence is left.
    """
    notes: Counter[str] = Counter()
    raw = read_raw(config.kind, path, notes, config.column) if raw is None else raw
    corpus = clean_corpus(config.rule, raw, released=config.released)
    counts = {**corpus.counts, **notes}
    counts["read"] += notes[NO_TAB] + notes[UNEVEN]  # rows without a caption never reached the cleaning
    if not corpus.sentences:
        settings = f"corpus.kind={config.kind} and corpus.rule={config.rule}"
        raise InputError(f"{path}: no sentence is left for {settings}: {CleanedCorpus([], counts).summary()}")
    sentences = corpus.sentences
    if config.kind != "shutterstock":
        sentences = shuffle_sentences(sentences, config.shuffle_seed)
    if config.released:
        sentences = shuffle_sentences(sentences, config.shuffle_seed)
    return CleanedCorpus(sentences[: config.max_sentences], counts)


def has_entities(path: Path) -> bool:
    """Whether the file, plain or compressed, has an HTML entity anywhere."""
    rest = b""
    with open_bytes(path, "corpus.path", parquet=True) as stream:
        try:
            while chunk := stream.read(1 << 20):
                if _ENTITY_BYTES.search(rest + chunk):
                    return True
                rest = chunk[-40:]
        except DAMAGED_FILE as error:
            raise broken_file(path, error) from error
    return False


def read_raw(kind: str, path: Path, notes: Counter[str] | None = None, column: str | None = None) -> Iterator[Any]:
    """Raw captions of `path`, plain or compressed, in its order: strings, for shutterstock token lists. Text is
    streamed.

    kind: coco and flickr30k (any layout of `annotations.py`, of Karpathy's the train part), gcc (caption<TAB>url),
    shutterstock (pickle), text_file (`sentence_files.py`, with `column`), the demo kinds (one sentence per line).
    notes: counts `bad_bytes` (lines with bytes that are not UTF-8, replaced) and rows that are left out: `no_tab` (gcc)
    and `uneven_row` (tables).
    Raises `MissingFileError` at once, `InputError` at once or where the reading reaches the damage.
    """
    notes = Counter() if notes is None else notes
    where = CORPUS_FROM.get(kind.removesuffix("_external"))
    if not path.is_file():
        raise missing_file(path, "corpus.path", where)
    if kind in ("coco", "flickr30k"):
        return iter(
            [caption for _, caption in captions_in_file(read_captions(path, "corpus.path", where), path, "train")]
        )
    if kind == "shutterstock":
        from cgtgan.data.plain_pickle import load_plain_pickle  # torch, which no other corpus needs

        content = load_plain_pickle(path, "corpus.path", where)
        if not isinstance(content, (list, tuple)):
            raise InputError(f"{path} (corpus.path) holds a {type(content).__name__}: a list of token lists is needed")
        return iter(content)
    if kind == "gcc":
        return _gcc_captions(path, text_lines(path, "corpus.path", notes), notes)
    if kind == "text_file":
        return read_sentences(path, column, notes)
    return text_lines(path, "corpus.path", notes)  # the demo's


def _gcc_captions(path: Path, lines: Iterator[str], notes: Counter[str]) -> Iterator[str]:
    good = 0
    for line in lines:
        caption, tab, _ = line.partition("\thttp")  # a caption may have a tab, and labels may follow the address
        if not tab:
            caption, tab, _ = line.partition("\t")
        if not tab:
            notes[NO_TAB] += 1
            continue
        if good <= 1 and caption.startswith(("http://", "https://")):  # the first row may be a header
            raise InputError(f"{path} (corpus.path) has the address first: rows must be caption<TAB>url")
        good += 1
        yield caption
    if not good:
        lines_read = f"{notes[NO_TAB]:,} lines"
        raise InputError(f"{path} (corpus.path) has no row caption<TAB>url in {lines_read}: is it a text_file?")
