"""`clipscore` and `diversity` as further metrics of `score_many`: functions of a method's name and the scored ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cgtgan.errors import InputError
from cgtgan.evaluation.clip_score import clip_scores, prompt, ref_clip_scores
from cgtgan.evaluation.coco_files import id_list
from cgtgan.evaluation.diversity import diversity, known_sentences, self_cider
from cgtgan.evaluation.metrics import ExtraMetric
from cgtgan.evaluation.own_metrics import Columns

Captions = Mapping[str, Mapping[Any, str]]  # method -> image id -> caption
References = Mapping[Any, Sequence[str]]  # image id -> references


def clip_metric(
    captions: Captions,
    references: References,
    images: Mapping[Any, Tensor],
    encode: Callable[[Sequence[str]], Tensor],
    where: str,
) -> ExtraMetric:
    """CLIPScore, and RefCLIPScore where there are references.

    images: id -> embedding (D,). encode: N texts -> (N, D); each text is embedded once, however many methods use it.
    where: for the error about images without an embedding, such as "in the test split".
    """
    prompts = list(
        dict.fromkeys(map(prompt, (*_texts(captions), *(t for texts in references.values() for t in texts))))
    )
    vectors, rows = encode(prompts), {text: row for row, text in enumerate(prompts)}

    def embedded(texts: Sequence[str]) -> Tensor:
        return vectors[[rows[prompt(text)] for text in texts]]

    def score(method: str, ids: list[Any]) -> Columns:
        if missing := [i for i in ids if i not in images]:
            raise InputError(f"CLIPScore was not computed: {id_list(missing)} no embedding {where}")
        texts = embedded([captions[method][i] for i in ids])
        scores = clip_scores(torch.stack([images[i] for i in ids]), texts)
        per_image = {"CLIPScore": scores.tolist()}
        if all(references.get(i) for i in ids):
            with_references = ref_clip_scores(scores, texts, [embedded(references[i]) for i in ids])
            per_image["RefCLIPScore"] = with_references.tolist()
        return {name: sum(column) / len(column) for name, column in per_image.items()}, per_image

    return score


def diversity_metric(
    captions: Captions,
    references: References,
    corpus: Sequence[str] | None,
    samples: Mapping[str, Mapping[Any, Sequence[str]]],
) -> ExtraMetric:
    """Diversity of one caption per image, and self-CIDEr of the methods in `samples` (method -> id -> samples).

    corpus: the sentences that captions are new against; None: the share of novel captions is left out.
    """
    known = None if corpus is None else known_sentences(_texts(captions), corpus)

    def score(method: str, ids: list[Any]) -> Columns:
        whole, per_image = diversity([captions[method][i] for i in ids], known)
        if method in samples:
            column = self_cider([samples[method][i] for i in ids], [references[i] for i in ids])
            whole["Self-CIDEr"], per_image["Self-CIDEr"] = sum(column) / len(ids), column
        return whole, per_image

    return score


def _texts(captions: Captions) -> Iterator[str]:
    return (text for by_id in captions.values() for text in by_id.values())
