"""How well a caption agrees with the corpus sentences nearest to its image: CIDEr-D without a human reference.

CIDEr-D (Vedantam et al., arXiv 1411.5726) as a reward (Rennie et al., arXiv 1612.00563), with retrieved sentences in
the place of an image's own captions, as a caption is chosen among retrieved ones by Devlin et al. (arXiv 1505.04467).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

LONGEST, SIGMA = 4, 6.0  # words of an n-gram; deviation of the length penalty, in words
COUNTED = 100_000  # sentences whose n-grams are counted

NGram = tuple[str, ...]
Weights = list[dict[NGram, float]]  # per length of n-gram, tf-idf of each n-gram


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def ngrams(words: Sequence[str]) -> list[Counter[NGram]]:
    """Per length 1 to 4, how often each n-gram occurs."""
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, LONGEST + 1)]


class Consensus:
    """Scores captions against corpus sentences. Every sentence is a document of the document frequency."""

    def __init__(self, sentences: Sequence[str]):
        self.sentences = sentences
        counted = [sentences[i] for i in range(min(len(sentences), COUNTED))]
        documents = Counter(chain.from_iterable(set(c) for text in counted for c in ngrams(words_of(text))))
        self.log_documents = math.log(max(len(counted), 2))
        self.log_frequency = {ngram: math.log(count) for ngram, count in documents.items()}

    def weights(self, words: Sequence[str]) -> tuple[Weights, list[float], int]:
        """tf-idf of a text's n-grams, the norm for each length of n-gram, and the number of words."""
        frequency, most = self.log_frequency, self.log_documents
        each = [{g: tf * (most - frequency.get(g, 0.0)) for g, tf in counts.items()} for counts in ngrams(words)]
        return each, [math.sqrt(sum(w * w for w in of.values())) for of in each], len(words)

    def scores(self, captions: Sequence[str], nearest: Tensor) -> Tensor:
        """R captions and rows (R, k) int64 of sentences -> (R,) float32: mean CIDEr-D over the k sentences, 1 for 100
        points.
        """
        references: dict[int, tuple[Weights, list[float], int]] = {}
        for row in nearest.unique().tolist():
            references[row] = self.weights(words_of(self.sentences[int(row)]))
        known: dict[tuple[str, tuple[int, ...]], float] = {}  # equal captions of an image are scored once
        values = []
        for caption, rows in zip(captions, nearest.tolist(), strict=True):
            key = (caption, tuple(rows))
            if key not in known:
                mine = self.weights(words_of(caption))
                known[key] = sum(_cider_d(mine, references[row]) for row in rows) / max(1, len(rows))
            values.append(known[key])
        return torch.tensor(values, dtype=torch.float32)


def _cider_d(caption: tuple[Weights, list[float], int], reference: tuple[Weights, list[float], int]) -> float:
    """CIDEr-D of a caption and one reference, 10 for equal texts."""
    total = 0.0
    for mine, theirs, norm, their_norm in zip(caption[0], reference[0], caption[1], reference[1], strict=True):
        if norm and their_norm:
            clipped = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)
            total += clipped / (norm * their_norm)
    return 10 * total / LONGEST * math.exp(-((caption[2] - reference[2]) ** 2) / (2 * SIGMA**2))
