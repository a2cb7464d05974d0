"""What an artifact says it was made from: settings, so that a younger one changes no older name, and formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

# Version 0.1 wrote all of these into its artifacts, whatever their values.
_SETTINGS_OF_0_1 = {
    "DemoWorldConfig": "seed train_images val_images test_images references corpus_sentences image_size",
    "CorpusConfig": "name kind path rule released max_sentences shuffle_seed",
    "DemoClipConfig": "dim width text_layers pairs batch_size steps lr logit_scale seed",
    "ClipBackboneConfig": (
        "name kind model pretrained cache tokenizer dtype image_batch_size text_batch_size image_shard text_shard demo"
    ),
    "GeneratorConfig": (
        "name language_model tokenizer vocab_size layers width heads mapper prefix_length clip_length mapper_layers "
        "mapper_heads max_length normalize_prefix"
    ),
    "InitializeConfig": "steps epochs batch_size noise_std checkpoint_every optimizer",
    "OptimizerConfig": "lr warmup_steps final_lr_ratio weight_decay eps grad_clip released_adamw released_decay",
}
_MISSING = object()


def settings_of(part: Any, default: Any = _MISSING) -> dict[str, Any]:
    """`as_dict` of a config dataclass, without what 0.1 did not know and what has its default.

    A new setting's default must do what older versions did: then their artifacts keep their names. default: what the
    younger settings are compared with; left out: a new `part`.
    """
    default = type(part)() if default is _MISSING else default
    old = _SETTINGS_OF_0_1.get(type(part).__name__, "").split()
    settings: dict[str, Any] = {}
    for field in fields(part):
        value, usual = getattr(part, field.name), getattr(default, field.name)
        if field.name in old or value != usual:
            settings[field.name] = settings_of(value, usual) if is_dataclass(value) else value
    return settings


def with_format(producer: Mapping[str, Any], number: int) -> dict[str, Any]:
    """`producer`, and the format number of the code that makes the artifact from it. 1 is what 0.1 wrote: not named.

    Raise the number where the same settings and inputs make something else from now on: it is then made anew.
    """
    return dict(producer) if number == 1 else {**producer, "format": number}
