"""How rows are called: what differs between the variants, in few words, or the user's own words (`report.labels`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cgtgan.errors import InputError
from cgtgan.reporting.variants import Variant, as_typed, telling_settings

# setting -> its name in a label; "": the value alone says enough. Other settings have their whole name.
_SHORT = {
    "aggregation_t.t": "t",
    "aggregation_t.top_k": "top k",
    "train.num_samples": "K",
    "reward_weights.max_weight": "w",
    "initialize.noise_std": "noise",
    "train.kl_weight": "KL weight",
    "gap.kind": "gap",
    "prompt.kind": "prompt",
    "reward_weights.name": "",
    "corpus.name": "",
    "clip_backbone.name": "",
    "generator.name": "",
    "discriminator.name": "",
}


def labelled(variants: Sequence[Variant], own: Mapping[str, str]) -> list[Variant]:
    """The variants with the names of their rows: 't = 25' in place of a folder's derived name.

    A name that the user gave (`variant=NAME`, an experiment, a file) stays. own: label, variant, experiment or file ->
    the name that is wanted. Raises InputError for a key that is none of these, or for two rows of one name.
    """
    names = {id(variant): variant.name for variant in variants}
    for experiment in dict.fromkeys(variant.experiment for variant in variants):
        derived = [v for v in variants if v.experiment == experiment and v.name != experiment and _is_derived(v)]
        telling = telling_settings([variant.settings for variant in derived])
        for i, variant in enumerate(derived if telling else ()):
            label = ", ".join(_in_words(field, values[i]) for field, values in telling.items())
            prefix = f"{experiment} / " if variant.name.startswith(f"{experiment} / ") else ""
            names[id(variant)] = prefix + label
    wanted = {_plain(key): name for key, name in own.items()}
    used: set[str] = set()
    made: list[Variant] = []
    for variant in variants:
        keys = [key for key in map(_plain, _keys(variant, names[id(variant)])) if key in wanted]
        used.update(keys)
        made.append(replace(variant, name=wanted[keys[0]] if keys else names[id(variant)]))
    _check(own, used, [names[id(variant)] for variant in variants], [variant.name for variant in made])
    return made


def _keys(variant: Variant, label: str) -> Sequence[str]:
    return label, variant.name, variant.variant, variant.experiment


def _check(own: Mapping[str, str], used: set[str], labels: Sequence[str], names: Sequence[str]) -> None:
    from cgtgan.reporting.methods import METHODS

    if unknown := [key for key in own if _plain(key) not in used and key not in METHODS]:
        choice = ", ".join([*labels, *METHODS][:30])
        raise InputError(f"report.labels has {unknown[0]!r}, which is none of the rows; they are {choice}")
    if twice := [name for name in own.values() if names.count(name) > 1]:
        raise InputError(f"report.labels gives {names.count(twice[0])} rows the name {twice[0]!r}: give each its own")


def _is_derived(variant: Variant) -> bool:
    """Whether the run folder's name is the program's (run_identity.variant_name) and not the user's."""
    given = [variant.settings.get(f"{group}.name") for group in ("corpus", "clip_backbone")]
    return variant.variant.startswith("_".join(map(str, dict.fromkeys(given))).replace("/", "-") + "_t")


def _in_words(field: str, value: Any) -> str:
    name = _SHORT.get(field, field)
    return f"{name} = {as_typed(value)}" if name else as_typed(value)


def _plain(key: str) -> str:
    """Without blanks and '=': on the command line `t25` is easier to type than `t = 25`."""
    return re.sub(r"[\s=]", "", key)
