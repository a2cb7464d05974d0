"""A user's own reward terms: `reward_weights.terms` with a function of `path.py:name` or `package.module:name`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cgtgan.config import RewardWeightsConfig, custom_name, is_custom
from cgtgan.errors import InputError
from cgtgan.method.reward_terms import RewardInputs, RewardTerm
from cgtgan.runtime.custom import call_custom, custom_file, custom_fingerprint, load_custom


@dataclass(frozen=True)
class OwnTerm:
    """A user's reward term: `function` as `spec` names it, for the setting `field`."""

    field: str
    spec: str
    function: RewardTerm
    file: Path

    def __call__(self, inputs: RewardInputs) -> Tensor:
        """(R,) float32. Raises `InputError`, with file and line, where the function fails or returns something else."""
        values = call_custom(self.function, self.spec, self.field, inputs)
        rows, wanted = len(inputs.texts), f"it must return a float tensor ({len(inputs.texts)},)"
        code = getattr(inspect.unwrap(self.function), "__code__", None)  # an object that can be called has none
        place = f"{self.field}={self.spec} ({self.file}{f', line {code.co_firstlineno}' if code else ''})"
        if not isinstance(values, Tensor):
            raise InputError(f"{place} returned a {type(values).__name__}: {wanted}")
        if values.shape != (rows,) or not values.is_floating_point():
            raise InputError(f"{place} returned {values.dtype} of shape {tuple(values.shape)}: {wanted}")
        bad = (~torch.isfinite(values)).nonzero().flatten()
        if len(bad):
            row = int(bad[0])
            raise InputError(
                f"{place} returned {float(values[row])} for the caption {inputs.texts[row]!r}: it must be finite"
            )
        return values.to(inputs.text.device, torch.float32)


def _specs(weights: RewardWeightsConfig) -> dict[str, str]:
    """Name of each term of the user's own -> its `path.py:name`."""
    terms = {custom_name(key): term.function or key for key, term in weights.terms.items()}
    return {name: spec for name, spec in terms.items() if is_custom(spec)}


def load_own_terms(weights: RewardWeightsConfig) -> dict[str, RewardTerm]:
    """Name -> function of each term of the user's own. Raises as `load_custom` does."""
    return {name: _own_term(_field(name), spec) for name, spec in _specs(weights).items()}


def own_term_fingerprints(weights: RewardWeightsConfig) -> dict[str, str]:
    """What a run records of the user's own terms: each file's content. Empty without own terms."""
    return {f"reward term {name}": custom_fingerprint(spec, _field(name)) for name, spec in _specs(weights).items()}


def _field(name: str) -> str:
    return f"reward_weights.terms.{name}.function"


def _own_term(field: str, spec: str) -> OwnTerm:
    return OwnTerm(field, spec, load_custom(spec, field), custom_file(spec, field))
