"""How well a caption agrees with the corpus sentences nearest to an image: CIDEr without a human reference.

CIDEr-D (Vedantam et al., arXiv 1411.5726) as a reward (Rennie et al., arXiv 1612.00563), with retrieved sentences in
the place of an image's own captions, as a caption is chosen among retrieved ones by Devlin et al. (arXiv 1505.04467).
Documents are sets of sentences: the few nearest to each training image, in the place of an image's captions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cgtgan.method.aggregation import nearest_texts

LONGEST, SIGMA = 4, 6.0  # words of an n-gram; deviation of CIDEr-D's length penalty, in words
AGREEING, AGREEMENT_T, AGREED = 200, 50.0, 5  # sentences that are compared, their temperature; sentences kept per image
SENTENCES_PER_DOCUMENT, DOCUMENTS = 5, 10_000  # nearest sentences of an image; images that are counted at most

NGram = tuple[str, ...]
Weights = tuple[list[dict[NGram, float]], list[float], int]  # see `Consensus.weights`


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def ngrams(words: Sequence[str]) -> list[Counter[NGram]]:
    """Per length 1 to 4, how often each n-gram occurs."""
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, LONGEST + 1)]


class Consensus:
    """Scores captions against corpus sentences.

    sentences: M. documents: rows of the sentences that each of them holds, by which the document frequency is counted.
    """

    def __init__(self, sentences: Sequence[str], documents: Sequence[Sequence[int]]):
        self.sentences = sentences
        held = Counter[NGram]()
        for rows in documents:
            held.update({g for row in rows for each in ngrams(words_of(sentences[row])) for g in each})
        self.log_documents = math.log(max(len(documents), 2))
        self.log_frequency = {ngram: math.log(number) for ngram, number in held.items()}

    def weights(self, text: str) -> Weights:
        """tf-idf of a text's n-grams, for each length of n-gram; the norm of each; the number of words."""
        words, frequency, most = words_of(text), self.log_frequency, self.log_documents
        each = [{g: tf * (most - frequency.get(g, 0.0)) for g, tf in counts.items()} for counts in ngrams(words)]
        return each, [math.sqrt(sum(w * w for w in of.values())) for of in each], len(words)

    def scores(self, captions: Sequence[str], nearest: Tensor) -> Tensor:
        """R captions and rows (R, k) int64 of sentences -> (R,) float32: mean CIDEr-D over the k sentences, 1 for 100
        points.
        """
        references = {row: self.weights(self.sentences[row]) for row in map(int, nearest.unique())}
        known: dict[tuple[str, tuple[int, ...]], float] = {}  # equal captions of an image are scored once
        for caption, rows in zip(captions, map(tuple, nearest.tolist()), strict=True):
            if (caption, rows) not in known:
                mine = self.weights(caption)
                known[caption, rows] = sum(_cider_d(mine, references[row]) for row in rows) / max(1, len(rows))
        values = [known[pair] for pair in zip(captions, map(tuple, nearest.tolist()), strict=True)]
        return torch.tensor(values, dtype=torch.float32)


def _cider_d(caption: Weights, reference: Weights) -> float:
    """CIDEr-D of a caption and one reference, 10 for equal texts."""
    total = 0.0
    for mine, theirs, norm, their_norm in zip(caption[0], reference[0], caption[1], reference[1], strict=True):
        if norm and their_norm:
            clipped = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)
            total += clipped / (norm * their_norm)
    return 10 * total / LONGEST * math.exp(-((caption[2] - reference[2]) ** 2) / (2 * SIGMA**2))


@dataclass(frozen=True)
class SentenceTable:
    """The corpus sentences as rows of tf-idf, to compare hundreds of them for every image: CIDEr (not CIDEr-D).

    Each row joins the vectors of the four lengths of n-gram, each of length 1/2, so that a dot product of two rows is
    the mean of their four cosines. start (M + 1,) int64: where each row starts in ngram and value (n,), int32 and
    float32.
    """

    start: Tensor
    ngram: Tensor
    value: Tensor

    @classmethod
    def of(cls, sentences: Sequence[str], documents: NDArray[np.int64]) -> SentenceTable:
        """M sentences; documents (N, k): rows of the sentences that each document holds."""
        row, ngram, length, times = _ngram_table(sentences)
        start = np.searchsorted(row, np.arange(len(sentences) + 1))
        held = _document_frequency(start, ngram, documents)
        value = times * (math.log(max(len(documents), 2)) - np.log(np.maximum(held[ngram], 1)))
        norm = np.sqrt(np.bincount(row * LONGEST + length, value**2, LONGEST * len(sentences)))
        value /= np.maximum(norm[row * LONGEST + length], 1e-12) * 2
        return cls(torch.from_numpy(start), torch.from_numpy(ngram).int(), torch.from_numpy(value).float())

    def agreement(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows (k,) int64 of sentences and their weights (k,) -> (k,) float32: each one's weighted mean CIDEr with all
        k of them, 1 for equal texts.
        """
        counts = self.start[rows + 1] - self.start[rows]
        sentence = torch.arange(len(rows)).repeat_interleave(counts)
        place = torch.arange(len(sentence)) - (counts.cumsum(0) - counts)[sentence] + self.start[rows][sentence]
        value = self.value[place]
        distinct, of = self.ngram[place].unique(return_inverse=True)
        mean = torch.zeros(len(distinct)).index_add(0, of, value * weights.float()[sentence])
        return torch.zeros(len(rows)).index_add(0, sentence, value * mean[of])


def _ngram_table(sentences: Sequence[str]) -> tuple[NDArray[np.int64], ...]:
    """Every n-gram of every sentence, in the order of the sentences: the sentence's row, the n-gram's number, its
    length less 1, and how often the sentence has it.
    """
    number: dict[str, int] = {}
    rows = [[number.setdefault(word, len(number)) for word in words_of(sentence)] for sentence in sentences]
    lengths = np.array([len(words) for words in rows])
    words = np.array([word for of in rows for word in of], dtype=np.int64)
    row = np.repeat(np.arange(len(rows)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))  # words up to the end of the sentence
    ngram, found, last = words, [], len(number)
    for n in range(LONGEST):
        whole = left > n
        if n:  # an n-gram is the number of its first n - 1 words, and its last word
            pair = np.where(whole, ngram * len(number) + np.roll(words, -n), -1)
            ngram = np.unique(pair, return_inverse=True)[1]
        key, times = np.unique(row[whole] * (len(words) + 1) + ngram[whole], return_counts=True)
        found.append((key // (len(words) + 1), key % (len(words) + 1) + last * (n > 0), np.full(len(key), n), times))
        last += len(words) + 1
    of_row, numbers, length, times = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(of_row, kind="stable")
    return of_row[order], np.unique(numbers, return_inverse=True)[1][order], length[order], times[order]


def _document_frequency(
    start: NDArray[np.int64], ngram: NDArray[np.int64], documents: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(number of n-grams,): in how many of the documents (N, k) each occurs."""
    held = np.zeros(int(ngram.max(initial=-1)) + 1, dtype=np.int64)
    for rows in documents:
        held[np.unique(np.concatenate([ngram[start[row] : start[row + 1]] for row in rows]))] += 1
    return held


def consensus_sentences(
    images: Tensor, sentences: Tensor, table: SentenceTable, kept: int, device: torch.device | None = None
) -> Tensor:
    """Images (N, D), M sentences (M, D) and their table -> (N, kept) int64 on the CPU: the sentences that agree most.

    Each of the image's 200 nearest sentences is scored by its mean CIDEr with all of them, which weigh as in the
    aggregation at t = 50: softmax(50 cos). After Devlin et al., arXiv 1505.04467, who weigh them alike.
    """
    near = nearest_texts(images, sentences, min(AGREEING, len(sentences)), device=device).cpu()
    chosen = []
    for image, rows in zip(F.normalize(images.float(), dim=-1).cpu(), near, strict=True):
        cosine = F.normalize(sentences[rows].float().cpu(), dim=-1) @ image
        agreement = table.agreement(rows, torch.softmax(AGREEMENT_T * cosine, dim=0))
        chosen.append(rows[agreement.topk(min(kept, len(rows))).indices])
    return torch.stack(chosen)
