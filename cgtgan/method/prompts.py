"""Words that the generator reads before the prefix: nouns of near sentences, or those sentences themselves.

The tagger is a frequency list of the corpus, no model: a noun is a word that stands where a noun phrase ends.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.method.aggregation import nearest_texts

CANDIDATES = 8  # a corpus repeats sentences: this many times more are looked at, and each text counts once
_BEFORE = (
    "a an the this that these those his her its their some several many another "
    "two three four five six seven eight nine ten"
)
_BEHIND = (
    "in on at of with by from to into onto over under above below near behind beside between through across along "
    "around down up off out inside outside against toward towards while as for during after before is are was were has "
    "have who that which where there"
)
DETERMINERS = frozenset(_BEFORE.split())  # and numbers
# Words behind which no noun phrase goes on. `and` is none of them: in "a black and white dog", black is no noun.
ENDS = frozenset(_BEHIND.split())
AT_LEAST = 3  # occurrences that make a rule of what might be a slip
MODIFIER_ENDS = 0.1  # of a modifier's occurrences behind a determiner, fewer than this end the noun phrase
NOUN_ENDS = 0.2  # of a noun's occurrences, this many or more do


def _words(sentence: str) -> list[str]:
    """Lower-case words and marks, with a mark at the end."""
    return [*re.findall(r"[^\W\d_]+|[.,;:!?]", sentence.lower()), "."]


def _ends(word: str) -> bool:
    return word in ENDS or not word.isalpha()


def entity_vocabulary(sentences: Iterable[str]) -> frozenset[str]:
    """The words of a corpus that are nouns, lower-case: no stop word, 3 times or more the last word of a noun phrase,
    and that in 20% or more of their occurrences.

    A noun phrase ends where a word stands behind a determiner, a number or a modifier, and before a preposition, an
    auxiliary or a mark. A modifier stands behind a determiner 3 times or more, and less than 10% of them are such an
    end: `red` in "a red dog runs". So `runs`, which stands behind `dog`, is no noun.
    """
    counted = Counter(triple for s in sentences for triple in _triples(_words(s)))
    behind, last = Counter[str](), Counter[str]()
    for (before, word, after), count in counted.items():
        if before in DETERMINERS and word not in DETERMINERS and not _ends(word):
            behind[word] += count
            last[word] += count * _ends(after)
    modifiers = {w for w, n in behind.items() if n >= AT_LEAST and last[w] < MODIFIER_ENDS * n}
    seen, nouns = Counter[str](), Counter[str]()
    for (before, word, after), count in counted.items():
        seen[word] += count
        if (before in DETERMINERS or before in modifiers) and _ends(after):
            nouns[word] += count
    chosen = (w for w, n in nouns.items() if n >= AT_LEAST and n >= NOUN_ENDS * seen[w])
    return frozenset(w for w in chosen if not _ends(w) and w not in DETERMINERS)


def _triples(words: Sequence[str]) -> Iterable[tuple[str, str, str]]:
    """Every word but the mark at the end, between its neighbours; before the first one stands a mark."""
    return zip([".", *words], words, words[1:], strict=False)


def entities_in(sentence: str, vocabulary: Container[str]) -> list[str]:
    """The words of the sentence that are in the vocabulary, each once, in their order."""
    return [word for word in dict.fromkeys(_words(sentence)) if word in vocabulary]


def frequent_entities(sentences: Iterable[str], vocabulary: Container[str], at_least: int, at_most: int) -> list[str]:
    """Up to `at_most` entities that `at_least` of the sentences have: the most frequent first, then the nearest."""
    counts = Counter(word for sentence in sentences for word in entities_in(sentence, vocabulary))
    return [word for word, count in counts.most_common() if count >= at_least][:at_most]


def kept_entities(entities: Sequence[str], drop: float, seed: int) -> list[str]:
    """The entities without those that are dropped, each with probability `drop`, by draws from `seed` (ViECap)."""
    rng = random.Random(seed)
    return [entity for entity in entities if rng.random() >= drop]


def entity_prompt(entities: Sequence[str]) -> str:
    """`There are dog, ball in the image.`; `something` stands for none (ViECap, arXiv 2307.16525)."""
    return f"There are {', '.join(entities) or 'something'} in the image."


def retrieval_prompt(sentences: Sequence[str]) -> str:
    """`Similar images show A dog runs. A dog jumps.` (SmallCap, arXiv 2209.15323)"""
    return " ".join(["Similar images show", *sentences])


def retrieval_queries(embeddings: Tensor, std: float, seeds: Sequence[int]) -> Tensor:
    """Sentence embeddings (N, D) as queries that are as far from the corpus as an image is (IFCap, arXiv 2409.18046).

    Unit vectors with Gaussian noise of deviation `std` in every number, each row's from its own seed: (N, D) float32.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    noise = [torch.randn(unit.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return unit + std * torch.stack(noise).to(unit.device)


def nearest_sentences(
    queries: Tensor,
    vectors: Tensor,
    sentences: Sequence[str],
    k: int,
    left_out: Sequence[str] | None = None,
    device: torch.device | None = None,
) -> list[list[str]]:
    """Per row of `queries` (N, D), the k different sentences with the highest cosine, the nearest first.

    vectors (M, D): of the sentences. left_out: a text per row that does not count, the row's own sentence. Fewer than k
    where the corpus repeats its sentences more than 8 times. A row has the same sentences in any batch: of 8 times as
    many candidates, found in float32, the cosines are compared in float64.
    """
    rows = nearest_texts(queries, vectors, CANDIDATES * (k + 1), device=device).cpu()
    near = F.normalize(vectors[rows.flatten()].cpu().double(), dim=-1).view(*rows.shape, -1)
    cosines = (near * F.normalize(queries.cpu().double(), dim=-1)[:, None]).sum(-1)
    order = torch.sort(cosines, dim=1, descending=True, stable=True).indices
    chosen: list[list[str]] = []
    for i, places in enumerate(rows.gather(1, order).tolist()):
        different = dict.fromkeys(sentences[int(place)] for place in places)
        if left_out is not None:
            different.pop(left_out[i], None)
        chosen.append(list(different)[:k])
    return chosen
