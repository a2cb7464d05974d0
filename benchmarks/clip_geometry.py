"""The geometry of a released CLIP: what gap closures and aggregation do to real pairs of image and sentence embeddings.

Usage: python benchmarks/clip_geometry.py IMAGES.pkl CAPTIONS.pkl

The files have the authors' layouts; row i of CAPTIONS is a sentence of image i of IMAGES. Prints, as Markdown,
  closures      gap, mean cosine of an image and its sentence, and retrieval, as the generator would read the vectors
  temperatures  aggregated embeddings at each t, the image's sentence in the corpus and left out of it
  best t        of the mean cosine of aggregated embedding and image's sentence, for corpora of several sizes
"sentences that count": exp(entropy of an image's weights), the median of the images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from cgtgan.data.released import ReleasedCorpus, ReleasedImages, read_released
from cgtgan.errors import InputError, UserError
from cgtgan.method.aggregation import aggregate_at_temperatures
from cgtgan.method.gap import closed_gap

TEMPERATURES = (25.0, 50.0, 100.0, 150.0, 175.0, 200.0, 300.0, 400.0)
SCANNED = tuple(float(t) for t in range(5, 405, 5))
SHIFTS = ("mean", "mean_std", "c3")  # values of `gap` beside none and projection
PROJECTED = (100.0, 175.0)  # the paper's temperatures


def gap(images: Tensor, texts: Tensor) -> float:
    """Distance of the mean unit vectors (Liang et al., 2022)."""
    return float((normalize(images, dim=1).mean(0) - normalize(texts, dim=1).mean(0)).norm())


def recalls(queries: Tensor, targets: Tensor) -> list[float]:
    """Per cent of the N queries whose own row is among the 1, 5 and 10 rows of `targets` with the highest cosine."""
    cosines = normalize(queries, dim=1) @ normalize(targets, dim=1).T
    rank = (cosines > cosines.diagonal()[:, None]).sum(dim=1)
    return [100 * float((rank < k).float().mean()) for k in (1, 5, 10)]


def closed(kind: str, images: Tensor, texts: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Images and sentences as the generator reads them under `gap=kind`, with the statistics of the rows `of`."""
    closure = closed_gap(kind, images[of], texts[of])
    return closure.images(images), closure.texts(texts)


def halves_closed(kind: str, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """`closed`, each half of the rows with the statistics of the other half."""
    rows = torch.arange(len(images))
    with_odd, with_even = (closed(kind, images, texts, rows[first::2]) for first in (1, 0))
    odd = (rows % 2 == 1)[:, None]
    closed_images, closed_texts = (torch.where(odd, *pair) for pair in zip(with_even, with_odd, strict=True))
    return closed_images, closed_texts


def left_out(images: Tensor, texts: Tensor, temperatures: tuple[float, ...], corpus: list[int]) -> Tensor:
    """(T, N, D): each image aggregated over the rows `corpus` of the sentences without its own."""
    rows = [
        aggregate_at_temperatures(images[i : i + 1], texts[[j for j in corpus if j != i]], temperatures)
        for i in range(len(images))
    ]
    return torch.cat(rows, dim=1)


def closure_row(name: str, images: Tensor, texts: Tensor, retrieval: bool = True) -> str:
    cosines = normalize(images, dim=1) @ normalize(texts, dim=1).T
    own = float(cosines.diagonal().mean())
    others = float(cosines[~torch.eye(len(images), dtype=torch.bool)].mean())
    both = [recalls(images, texts), recalls(texts, images)] if retrieval else []
    columns = [" / ".join(f"{recall:.1f}" for recall in one) for one in both] or ["-", "-"]
    return f"| {name} | {gap(images, texts):.3f} | {own:.3f} | {others:.3f} | {columns[0]} | {columns[1]} |"


def print_closures(images: Tensor, texts: Tensor) -> None:
    everything = torch.arange(len(images))
    rows = [closure_row(kind, *closed(kind, images, texts, everything)) for kind in ("none", *SHIFTS)]
    rows += [closure_row(f"{kind}, statistics of other rows", *halves_closed(kind, images, texts)) for kind in SHIFTS]
    inside = aggregate_at_temperatures(images, texts, PROJECTED)
    outside = left_out(images, texts, PROJECTED, everything.tolist())
    for t, own_in, own_out in zip(PROJECTED, inside, outside, strict=True):
        rows.append(closure_row(f"projection, t = {t:g}", own_in, texts))
        # retrieval would say little: every sentence but the right one is in the corpus
        rows.append(closure_row(f"projection, t = {t:g}, own sentence left out", own_out, texts, retrieval=False))
    print("| closure | gap | cosine, own sentence | cosine, others | image to text R@1 / 5 / 10 | text to image |")
    print("|---|---|---|---|---|---|", *rows, sep="\n", end="\n\n")


def print_temperatures(images: Tensor, texts: Tensor) -> None:
    cosines = normalize(images, dim=1) @ normalize(texts, dim=1).T
    inside = aggregate_at_temperatures(images, texts, TEMPERATURES)
    outside = left_out(images, texts, TEMPERATURES, list(range(len(images))))
    print("| t | sentences that count | cos(a, image) | cos(a, own sentence) | the same, left out | gap to sentences |")
    print("|---|---|---|---|---|---|")
    for n, t in enumerate(TEMPERATURES):
        count = float(torch.distributions.Categorical(logits=t * cosines).entropy().exp().median())
        compared = ((inside[n], images), (inside[n], texts), (outside[n], texts))
        values = " | ".join(f"{float(cosine_similarity(*pair).mean()):.3f}" for pair in compared)
        print(f"| {t:g} | {count:.1f} | {values} | {gap(inside[n], texts):.3f} |")


def print_best(images: Tensor, texts: Tensor) -> None:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = (len(texts) // 4, len(texts) // 2, len(texts))
    aggregated = {f"{size}, own left out": left_out(images, texts, SCANNED, order[:size]) for size in sizes}
    aggregated[f"{len(texts)}, own included"] = aggregate_at_temperatures(images, texts, SCANNED)
    print("\n| sentences in the corpus | best t | cos(a, own sentence) there | at t = 100 | at t = 175 |")
    print("|---|---|---|---|---|")
    for name, vectors in aggregated.items():
        means = cosine_similarity(vectors, texts[None], dim=2).mean(dim=1).tolist()
        at = dict(zip(SCANNED, means, strict=True))
        best = max(at, key=at.__getitem__)
        print(f"| {name} | {best:g} | {at[best]:.3f} | {at[100.0]:.3f} | {at[175.0]:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("captions", type=Path)
    args = parser.parse_args()
    images, captions = read_released(args.images, "IMAGES"), read_released(args.captions, "CAPTIONS")
    if not isinstance(images, ReleasedImages) or not isinstance(captions, ReleasedCorpus):
        raise InputError(f"{args.images} and {args.captions} are not images with references and a corpus of sentences")
    if images.vectors.shape != captions.vectors.shape:
        shapes = f"{tuple(images.vectors.shape)} and {tuple(captions.vectors.shape)}"
        raise InputError(f"{args.images} and {args.captions} hold {shapes}: give one sentence per image, in its row")
    vectors, texts = images.vectors.float(), captions.vectors.float()
    print_closures(vectors, texts)
    print_temperatures(vectors, texts)
    print_best(vectors, texts)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
