"""Captions -> tokens as pycocoevalcap splits them: PTB's, or a close guess on machines without Java."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from cgtgan.evaluation import java as jvm
from cgtgan.evaluation.java import JavaSettings


def tokenize(
    program: str | None, captions: list[str], references: list[list[str]], java: JavaSettings
) -> tuple[list[str], list[list[str]], str | None]:
    """Tokenised captions and references, and why the Java tokeniser was not used (None where it was)."""
    flat = [text for texts in references for text in texts]
    limit = 60 + 0.01 * (len(flat) + len(captions)) if java.ptb_timeout_s is None else java.ptb_timeout_s
    problem = None
    try:
        if program is None:
            raise jvm.JavaError(jvm.NO_JAVA)
        # two runs, as pycocoevalcap: the tokeniser looks ahead over line ends, so joined texts could change a token
        with ThreadPoolExecutor(1) as pool:
            of_references = pool.submit(_references, program, tuple(flat), limit, java.scratch)
            hypotheses = jvm.ptb_tokenize(program, captions, timeout_s=limit, scratch=java.scratch)
            flat = of_references.result()
    except (jvm.JavaError, OSError) as error:
        problem = (
            f"{error}; PTB tokenisation was approximated in Python, so the other scores may differ slightly from COCO's"
        )
        hypotheses = [approximate_tokenize(text) for text in captions]
        flat = [approximate_tokenize(text) for text in flat]
    rows = iter(flat)
    return hypotheses, [[next(rows) for _ in texts] for texts in references], problem


@lru_cache(maxsize=2)
def _references(program: str, texts: tuple[str, ...], timeout_s: float, scratch: Path | None) -> list[str]:
    """Kept, since a training validates the same images again and again, and starting Java is most of it."""
    return jvm.ptb_tokenize(program, texts, timeout_s=timeout_s, scratch=scratch)


# In order: U.S., titles, the verb before n't, clitics, words with inner -, / and ', any other character.
_PTB_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|st|jr|vs|etc)\."
    r"|\w+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|\w+(?:[-&/.]\w+|[:,](?=\d)\w+|'(?!(?:s|re|ve|ll|d|m)\b)\w+)*|[^\s\w]"
)
# kept, as PTB's lower case has them
_BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"), strict=True))
_DROPPED = frozenset("'`\".?!,:;-")


def approximate_tokenize(caption: str) -> str:
    """A regular expression's guess at PTB tokens: lower case, clitics split off, punctuation removed, joined by spaces.

    Only for machines without Java. It gave the PTB line for 99.9% of 20,000 COCO captions; it knows neither PTB's
    British to American spelling nor most abbreviations.
    """
    text = jvm.clean_line(caption).lower().replace("’", "'")
    text = re.sub(r"\bcannot\b", "can not", text)
    tokens = (match.group() for match in _PTB_TOKEN.finditer(text))
    return " ".join(_BRACKETS.get(token, token) for token in tokens if token not in _DROPPED)
