"""A user's own metric: `path.py:name` or `package.module:name` among `evaluate.metrics` (docs/extending.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cgtgan.config import METRICS, custom_name, is_custom
from cgtgan.errors import InputError
from cgtgan.evaluation.coco_files import id_list
from cgtgan.runtime.custom import call_custom, custom_fingerprint, load_custom

FIELD = "evaluate.metrics"
Columns = tuple[dict[str, float], dict[str, list[float]]]  # name -> corpus score, and name -> score of each image


class OwnMetric:
    """`function(captions, references)`: {id: caption}, {id: [reference]} -> {id: score}, or (corpus score, {id:
    score}).

    Raises, when made, as `load_custom` does, and `InputError` for a name that a built-in metric's column has.
    """

    def __init__(self, spec: str):
        self.spec, self.name = spec, custom_name(spec)
        taken = [name for names in METRICS.values() for name in names]
        if self.name in taken:
            raise InputError(
                f"{FIELD} has {spec}, but {self.name} is the name of a built-in score: give it another name"
            )
        self.function = load_custom(spec, FIELD)

    def __call__(self, captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> Columns:
        """Corpus score and score of each image by the metric's name.

        Raises `InputError` for a result of another shape.
        """
        texts = {i: list(references[i]) for i in captions}
        result = call_custom(self.function, self.spec, FIELD, dict(captions), texts)
        whole, each = result if isinstance(result, tuple) and len(result) == 2 else (None, result)
        if not isinstance(each, Mapping):
            raise self._refused(f"a {type(each).__name__}")
        if other := [i for i in (*captions, *each) if i not in each or i not in captions]:
            raise self._refused(f"scores for other ids: {id_list(other)} no score, or no caption")
        for key, value in [*each.items(), *([] if whole is None else [("the corpus", whole)])]:
            if not _is_finite(value):
                raise self._refused(f"{value!r} for {key!r}")
        scores = [float(each[i]) for i in captions]
        corpus = math.fsum(scores) / len(scores) if whole is None else float(whole)
        return {self.name: corpus}, {self.name: scores}

    def _refused(self, what: str) -> InputError:
        wanted = "{id: score} with a finite number for each caption, or (corpus score, {id: score})"
        return InputError(f"{FIELD}: {self.spec} returned {what}; it must return {wanted}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):
        return False


def own_metrics(metrics: Sequence[str]) -> dict[str, OwnMetric]:
    """Spec -> metric of each of the user's own among `metrics`. Raises as `OwnMetric` does, and for equal names."""
    specs = list(dict.fromkeys(filter(is_custom, metrics)))
    for spec in specs:
        if [custom_name(other) for other in specs].count(custom_name(spec)) > 1:
            raise InputError(f"{FIELD} has {spec} and another {custom_name(spec)}: give one of them another name")
    return {spec: OwnMetric(spec) for spec in specs}


def own_metric_fingerprints(metrics: Sequence[str]) -> dict[str, str]:
    """Name -> content of its file, of what scores are made from. Empty without own metrics. Raises as `own_metrics`."""
    return {metric.name: custom_fingerprint(spec, FIELD) for spec, metric in own_metrics(metrics).items()}
