"""A metric against people: rank correlation of its scores with human ratings of single captions.

The protocol of Flickr8k-Expert (Hodosh et al., 2013) as metrics are compared on it (Anderson et al., 2016, "SPICE";
Hessel et al., 2021, "CLIPScore", table 1): each caption's score stands against each of its ratings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cgtgan.config import DEFAULT_METRICS
from cgtgan.data.user_files import quoted, read_user_json
from cgtgan.errors import InputError
from cgtgan.evaluation.metrics import ExtraMetric, score_many

METHOD = "judged"  # what `ExtraMetric` functions are given as the method's name


@dataclass(frozen=True)
class Judgements:
    """Judged captions: image, caption and ratings of each pair, and the references of each image."""

    images: list[str]
    captions: list[str]
    ratings: list[list[float]]
    references: dict[str, list[str]]

    def of_images(self, images: Collection[str]) -> Judgements:
        """The pairs whose image is among `images`."""
        rows = [n for n, image in enumerate(self.images) if image in images]
        columns = ([column[n] for n in rows] for column in (self.images, self.captions, self.ratings))
        return replace(self, **dict(zip(("images", "captions", "ratings"), columns, strict=True)))

    def inputs(self) -> tuple[dict[Any, str], dict[Any, list[str]]]:
        """Captions and references by the number of the pair: an image occurs in several pairs."""
        return dict(enumerate(self.captions)), {n: self.references[image] for n, image in enumerate(self.images)}


def read_judgements(path: Path) -> Judgements:
    """{"references": {image: [sentence]}, "rows": [{"image", "caption", "ratings"}]}, plain or gzip.

    Raises `MissingFileError`, and `InputError` for another shape, a row without references, or no row.
    """
    content = read_user_json(path, "--judgements")
    references, rows = ((content.get(key) if isinstance(content, dict) else None) for key in ("references", "rows"))
    if not isinstance(references, dict) or not isinstance(rows, list) or not rows:
        wanted = '{"references": {image: [sentence]}, "rows": [{"image", "caption", "ratings"}]}'
        raise InputError(f"{path} (--judgements) holds no judgements: give {wanted}")
    for n, row in enumerate(rows):
        if not _is_row(row) or not _are_sentences(references.get(row["image"])):
            wanted = "an image with a list of references, a caption and a list of numbers, its ratings"
            raise InputError(f"{path} (--judgements): rows[{n}] is {quoted(row)}: a row needs {wanted}")
    images, captions, ratings = ([row[key] for row in rows] for key in ("image", "caption", "ratings"))
    return Judgements(images, captions, ratings, references)


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("image"), str)
        and isinstance(row.get("caption"), str)
        and isinstance(row.get("ratings"), list)
        and bool(row["ratings"])
        and all(type(rating) in (int, float) for rating in row["ratings"])
    )


def _are_sentences(references: Any) -> bool:
    return (
        isinstance(references, list)
        and all(isinstance(text, str) for text in references)
        and any(text.strip() for text in references)
    )


def tau_c(scores: Sequence[float], ratings: Sequence[Sequence[float]]) -> float:
    """Kendall's tau-c (Stuart's) of N scores with all their ratings: a score occurs once per rating of its caption.

    -1 to 1; NaN where all scores, or all ratings, are the same.
    """
    from scipy.stats import kendalltau  # takes half a second to import

    flat = [(score, rating) for score, of_one in zip(scores, ratings, strict=True) for rating in of_one]
    result: Any = kendalltau(*zip(*flat, strict=True), variant="c")
    return float(result.statistic)


def correlations(
    judgements: Judgements,
    metrics: Sequence[str] = DEFAULT_METRICS,
    extra_metrics: Mapping[str, ExtraMetric] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Score -> its tau-c, and score -> why it was not computed, of metrics as `score_many` takes them.

    Ids are the numbers of the pairs, counted from 0. Raises `InputError` as `score_many` does.
    """
    captions, references = judgements.inputs()
    scores = score_many({METHOD: captions}, references, metrics, extra_metrics=extra_metrics)[METHOD]
    columns = list(next(iter(scores.per_image.values())))
    taus = {name: tau_c([scores.per_image[n][name] for n in captions], judgements.ratings) for name in columns}
    return taus, scores.failed
