"""Which run a config stands for: the settings that change its numbers, its variant, its folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cgtgan.config import Config, custom_name, leaves

# What may change between two starts of one run without changing its numbers.
_NOT_SCIENTIFIC = (
    *("stage", "device", "threads", "workers", "runs_dir", "artifacts_dir"),
    *("checkpoint", "captions", "images", "output", "runs", "download", "mirror"),
    *("report", "serve", "wandb", "evaluate", "decode", "typed_decode", "caption", "several"),
)
_NOT_SCIENTIFIC_FIELDS = (
    "variant",
    "initialize.checkpoint_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.max_minutes",
    "train.log_every",
    "train.accumulation",
    "train.precision",  # the precision that results is compared (training/inputs.py)
    "train.memory_gb",
    "train.gradient_checkpointing",
    "train.watch_kl",
    "train.stop_on_collapse",
    "aggregation_t.chunk_mb",
    "clip_backbone.cache",
    "clip_backbone.image_batch_size",
    "clip_backbone.text_batch_size",
    "clip_backbone.image_shard",
    "clip_backbone.text_shard",
    "dataset.max_bad_images",
    # places: what lies there is compared by content (training/inputs.py)
    "dataset.root",
    "dataset.reader",
    "dataset.released",
    "corpus.path",
    "train.init_from",
)


def scientific_settings(cfg: Config) -> dict[str, Any]:
    """Field path -> value of every setting that changes a trained generator; two runs are one run if these agree."""
    values = {path: value for path, value, _ in leaves(cfg)}
    terms = values.pop("reward_weights.terms")
    for key, term in terms.items():  # where the code lies is a place: its content is compared (training/own_terms.py)
        path = f"reward_weights.terms.{custom_name(key)}"
        values |= {f"{path}.{name}": value for name, value, _ in leaves(term)}
        values[f"{path}.function"] = custom_name(term.function or key)
    return {
        path: value
        for path, value in values.items()
        if path.split(".")[0] not in _NOT_SCIENTIFIC and path not in _NOT_SCIENTIFIC_FIELDS
    }


# (cos_weight, clip_weight, max_weight) of conf/reward_weights/<name>.yaml. Other numbers are part of the folder's name.
REWARD_PRESETS = {
    "clip_agg": (0.5, 0.0, 0.5),
    "clip_cos": (0.5, 1.0, 0.5),
    "consensus": (0.5, 0.0, 1.0),
    "mixed": (0.5, 0.5, 0.5),
    "naturalness_only": (0.5, 0.0, 0.0),
    "posterior": (0.5, 0.0, 1.0),
    "posterior_entropy": (0.5, 0.0, 1.0),
    "posterior_natural": (0.5, 0.0, 0.8),
    "semantics_only": (0.5, 0.0, 1.0),
}


def _number(value: float) -> str:
    """As short as possible without becoming another number: two settings never share a run folder."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def variant_name(cfg: Config) -> str:
    """Name of the run's folder below its experiment: the settings that people sweep, the same single or swept."""
    if cfg.variant is not None:
        return cfg.variant
    r, t = cfg.reward_weights, cfg.train
    parts = list(dict.fromkeys((cfg.corpus.name, cfg.clip_backbone.name)))
    a = cfg.aggregation_t
    parts += ["t" + "-".join(map(_number, a.temperatures)), *([f"top{a.top_k}"] if a.top_k else []), r.name]
    weights = (r.cos_weight, r.clip_weight, r.max_weight)
    if weights != REWARD_PRESETS.get(r.name):
        parts.append("cos{}-clip{}-max{}".format(*map(_number, weights)))
    for key, term in r.terms.items():
        scale = "" if term.scale is None else f"x{_number(term.scale)}"
        parts.append(f"{custom_name(key)}{_number(term.weight)}{scale}")
    parts.append(f"k{t.num_samples}")
    parts += [] if t.use_initialization else ["noinit"]
    parts += [] if t.use_discriminator else ["nodisc"]
    parts += [] if cfg.generator.mapper == "mlp" else [cfg.generator.mapper]
    noise = [f"noise{_number(cfg.initialize.noise_std)}"] if cfg.initialize.noise_std else []
    parts += noise if cfg.initialize.noise == "raw" else [*noise, cfg.initialize.noise]
    parts += [f"kl{_number(t.kl_weight)}", *([] if t.kl == "k3" else [t.kl])] if t.kl_weight else []
    parts += [] if t.baseline == "greedy" else [t.baseline]
    parts += [] if cfg.gap.kind == "none" else [f"gap-{cfg.gap.kind}{_number(cfg.gap.t) if cfg.gap.t else ''}"]
    parts += [] if cfg.prompt.kind == "none" else [f"prompt-{cfg.prompt.kind}{cfg.prompt.nearest}"]
    parts += [] if t.advantage_norm == "none" else [f"adv-{t.advantage_norm}"]
    parts += [] if t.loss_norm == "caption" else [f"loss-{t.loss_norm}"]
    parts += [] if t.ema is None else [f"ema{_number(t.ema)}"]
    d = cfg.discriminator
    parts += [] if d.loss == "bce" else [d.loss]
    parts += [] if d.reward == "logit" else [f"paid-{d.reward}"]
    parts += [f"smooth{_number(d.label_smoothing)}"] if d.label_smoothing else []
    parts += [] if cfg.initialize.pairs == "text" else [f"{cfg.initialize.pairs}-pairs"]
    return "_".join(p.replace("/", "-") for p in parts)


def run_folder(cfg: Config) -> Path:
    """runs/<experiment>/<variant>/seed=<n>"""
    return Path(cfg.runs_dir) / cfg.name / variant_name(cfg) / f"seed={cfg.seed}"
