"""How varied captions are: distinct-n, vocabulary, length and novelty over a corpus of captions, and self-CIDEr over an
image's samples.

Everything here counts `words`, a rule of its own that needs no Java and reads captions, references and corpus alike.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cgtgan.errors import InputError

Words = Sequence[str]
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SIGMA = 6.0  # of CIDEr-D's penalty on a difference in length, in words


def words(caption: str) -> list[str]:
    """Lower-case runs of letters, digits and inner apostrophes; all else separates ("A man's T-shirt." has 4)."""
    return _WORD.findall(caption.lower())


def distinct(captions: Iterable[Words], n: int) -> float:
    """Distinct n-grams by all n-grams, over all captions together (Li et al., 2016); it falls with their number. 0
    where there is none.
    """
    grams = Counter(gram for caption in captions for gram in _ngrams(caption, n))
    return len(grams) / grams.total() if grams else 0.0


def known_sentences(captions: Iterable[str], corpus: Iterable[str]) -> set[tuple[str, ...]]:
    """The captions, as words, that the corpus has word for word.

    One pass over the corpus; memory for the captions alone.
    """
    wanted = {tuple(words(caption)) for caption in captions}
    return {sentence for sentence in (tuple(words(text)) for text in corpus) if sentence in wanted}


def diversity(
    captions: Sequence[str], known: set[tuple[str, ...]] | None = None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Diversity of one caption an image: corpus values, and N values an image of those that are means over the images.

    Distinct-1, Distinct-2: as `distinct`. Vocabulary: different words. Length: mean number of words. Novel: share of
    the captions that are not in `known` (`known_sentences`; None: left out). Shares are fractions. Raises InputError
    without a caption.
    """
    if not captions:
        raise InputError("diversity was asked of no caption: give one an image")
    split = [words(caption) for caption in captions]
    each = {"Length": [float(len(caption)) for caption in split]}
    if known is not None:
        each["Novel"] = [float(tuple(caption) not in known) for caption in split]
    whole = {"Distinct-1": distinct(split, 1), "Distinct-2": distinct(split, 2)}
    whole["Vocabulary"] = float(len({word for caption in split for word in caption}))
    return whole | {name: math.fsum(values) / len(values) for name, values in each.items()}, each


# ----------------------------------------------------------------------------------------------------------- self-CIDEr


def self_cider(samples: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[float]:
    """Self-CIDEr of each image's m samples (Wang and Chan, 2019, "Describing like Humans"): 0 all the same, 1 nothing
    in common.

    K[i, j] is the CIDEr-D of sample i against sample j (`cider_kernel`), s its singular values, and the diversity
    -log_m(sqrt(s_1) / sum_i sqrt(s_i)), as their program computes it; an image whose samples share no n-gram of any
    weight, not even with themselves (all empty), has 0. Their n-gram weights are COCO train's; here they are those of
    `references`.

    Args: N lists of m >= 2 captions; the N images' references. Returns: N numbers. Raises InputError for fewer than two
    images (no n-gram would have a weight) or samples.
    """
    counts = {len(captions) for captions in samples}
    if len(references) < 2 or len(counts) != 1 or min(counts) < 2:
        raise InputError("self-CIDEr needs two images or more, with the same number of samples each, two or more")
    frequency = document_frequency(references)
    kernels = np.stack([cider_kernel([words(c) for c in captions], frequency, len(references)) for captions in samples])
    roots = np.sqrt(np.linalg.svd(kernels, compute_uv=False))
    total = roots.sum(1)
    share = np.divide(roots[:, 0], total, out=np.ones_like(total), where=total > 0)
    return [float(value) for value in np.abs(np.log(share)) / math.log(counts.pop())]


def document_frequency(references: Sequence[Sequence[str]]) -> Counter[Words]:
    """n-gram, n = 1 to 4 -> number of images that have it in a reference."""
    found: Counter[Words] = Counter()
    for texts in references:
        found.update({gram for text in texts for n in range(1, 5) for gram in _ngrams(words(text), n)})
    return found


def cider_kernel(captions: Sequence[Words], frequency: Mapping[Words, int], images: int) -> np.ndarray:
    """(m, m) float64, symmetric: a tenth of pycocoevalcap's CIDEr (that is CIDEr-D) of each caption against each later
    one and itself.

    The mean over n = 1..4 of the cosine of tf-idf weighted n-gram counts, the earlier caption's clipped at the later's,
    times a Gaussian of the difference in length. An n-gram that no reference has weighs log(images).
    """
    vectors = []
    for caption in captions:
        tf = [Counter(_ngrams(caption, n)) for n in range(1, 5)]
        vectors.append(
            [{g: c * math.log(images / max(1, frequency.get(g, 0))) for g, c in counts.items()} for counts in tf]
        )
    norms = [[math.sqrt(math.fsum(w * w for w in vector.values())) for vector in four] for four in vectors]
    kernel = np.zeros((len(captions), len(captions)))
    for i, hypothesis in enumerate(vectors):
        for j in range(i, len(captions)):
            cosines = 0.0
            for n, (ours, theirs) in enumerate(zip(hypothesis, vectors[j], strict=True)):
                if norm := norms[i][n] * norms[j][n]:
                    cosines += sum(min(w, theirs[g]) * theirs[g] for g, w in ours.items() if g in theirs) / norm
            # pycocoevalcap counts length in pairs of words: the same difference, except for captions without a word
            gap = max(len(captions[i]) - 1, 0) - max(len(captions[j]) - 1, 0)
            kernel[i, j] = kernel[j, i] = cosines / 4 * math.exp(-(gap**2) / (2 * _SIGMA**2))
    return kernel


def _ngrams(caption: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(caption[i : i + n]) for i in range(len(caption) - n + 1)]
