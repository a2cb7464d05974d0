"""What every setting may be, and which may not stand together. Apart from `config.py` only to keep both short."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cgtgan.config import (
    BASELINE_ROWS,
    DATASET_KINDS,
    METRICS,
    RELEASED_SLIPS,
    STAGES,
    Config,
    RewardTermConfig,
    custom_name,
    is_custom,
    leaves,
)
from cgtgan.errors import InputError

Check = tuple[str, Callable[[Any], bool]]


def _one_of(*options: str) -> Check:
    return "one of " + ", ".join(options), lambda v: v in options


_POSITIVE: Check = ("a number above 0", lambda v: v > 0)
_NOT_NEGATIVE: Check = ("0 or more", lambda v: v >= 0)
_AT_LEAST_1: Check = ("1 or more", lambda v: v >= 1)
_SHARE: Check = ("between 0 and 1", lambda v: 0 <= v <= 1)
_TOKENIZER: Check = ("pretrained, corpus or a folder", lambda v: bool(v))


def _is_temperature(value: Any) -> bool:
    several = value if isinstance(value, list) and value else [value]
    return all(isinstance(t, int | float) and not isinstance(t, bool) and 0 < t < math.inf for t in several)


# By field path; `*` stands for every optimizer. A field that is null is not checked: null is allowed by its type.
_CHECKS: dict[str, Check] = {
    "stage": _one_of(*STAGES),
    "seed": ("0 to 2**31-1", lambda v: 0 <= v < 2**31),
    "device": (
        "auto, cpu, cuda or cuda:N",
        lambda v: v in ("auto", "cpu", "cuda") or (v.startswith("cuda:") and v[5:].isdigit()),
    ),
    "threads": _AT_LEAST_1,
    "workers": _NOT_NEGATIVE,
    "dataset.kind": _one_of(*DATASET_KINDS),
    "dataset.val_fraction": _SHARE,
    "dataset.test_fraction": _SHARE,
    "dataset.max_images": _AT_LEAST_1,
    "dataset.max_bad_images": _NOT_NEGATIVE,
    "dataset.world.seed": _NOT_NEGATIVE,
    "dataset.world.train_images": _AT_LEAST_1,
    "dataset.world.val_images": _AT_LEAST_1,
    "dataset.world.test_images": _AT_LEAST_1,
    "dataset.world.references": _AT_LEAST_1,
    "dataset.world.corpus_sentences": _AT_LEAST_1,
    "dataset.world.image_size": ("32 to 512", lambda v: 32 <= v <= 512),
    "corpus.kind": _one_of("demo", "demo_external", "coco", "flickr30k", "gcc", "shutterstock", "text_file"),
    "corpus.rule": _one_of("coco", "flickr30k", "gcc", "shutterstock", "none"),
    "corpus.max_sentences": _AT_LEAST_1,
    "corpus.shuffle_seed": ("0 to 2**32-1", lambda v: 0 <= v < 2**32),
    "clip_backbone.kind": _one_of("openai", "huggingface", "open_clip", "random", "demo", "custom"),
    "clip_backbone.dtype": _one_of("float32", "float16", "bfloat16"),
    "clip_backbone.image_batch_size": _AT_LEAST_1,
    "clip_backbone.text_batch_size": _AT_LEAST_1,
    "clip_backbone.image_shard": _AT_LEAST_1,
    "clip_backbone.text_shard": _AT_LEAST_1,
    "clip_backbone.demo.dim": _AT_LEAST_1,
    "clip_backbone.demo.width": _AT_LEAST_1,
    "clip_backbone.demo.text_layers": _AT_LEAST_1,
    "clip_backbone.demo.pairs": _AT_LEAST_1,
    "clip_backbone.demo.batch_size": ("2 or more", lambda v: v >= 2),
    "clip_backbone.demo.steps": _AT_LEAST_1,
    "clip_backbone.demo.lr": _POSITIVE,
    "clip_backbone.demo.logit_scale": _POSITIVE,
    "clip_backbone.demo.seed": _NOT_NEGATIVE,
    "aggregation_t.t": ("a number above 0, or with stage=aggregate a list of them", _is_temperature),
    "aggregation_t.top_k": _AT_LEAST_1,
    "aggregation_t.chunk_mb": _AT_LEAST_1,
    "reward_weights.cos_weight": _SHARE,
    "reward_weights.clip_weight": _SHARE,
    "reward_weights.max_weight": _SHARE,
    "reward_weights.delay_steps": _NOT_NEGATIVE,
    "reward_weights.ramp_steps": _NOT_NEGATIVE,
    "generator.tokenizer": _TOKENIZER,
    "generator.vocab_size": ("260 or more (256 bytes and the special tokens)", lambda v: v >= 260),
    "generator.layers": _AT_LEAST_1,
    "generator.width": ("2 or more", lambda v: v >= 2),
    "generator.heads": _AT_LEAST_1,
    "generator.mapper": _one_of("mlp", "transformer"),
    "generator.prefix_length": _AT_LEAST_1,
    "generator.clip_length": _AT_LEAST_1,
    "generator.mapper_layers": _AT_LEAST_1,
    "generator.mapper_heads": _AT_LEAST_1,
    "generator.max_length": ("2 or more", lambda v: v >= 2),
    "discriminator.tokenizer": _TOKENIZER,
    "discriminator.vocab_size": ("262 or more (256 bytes and the special tokens)", lambda v: v >= 262),
    "discriminator.layers": _AT_LEAST_1,
    "discriminator.width": ("2 or more", lambda v: v >= 2),
    "discriminator.heads": _AT_LEAST_1,
    "decode.name": _one_of("greedy", "beam", "sample", "best_of_n"),
    "decode.beam_size": _AT_LEAST_1,
    "decode.temperature": _POSITIVE,
    "decode.best_of": _AT_LEAST_1,
    "decode.batch_size": _AT_LEAST_1,
    "decode.precision": _one_of("auto", "float32", "bf16"),
    "caption.num": _AT_LEAST_1,
    "caption.format": _one_of("json", "csv"),
    "initialize.steps": _AT_LEAST_1,
    "initialize.epochs": _AT_LEAST_1,
    "initialize.batch_size": _AT_LEAST_1,
    "initialize.noise_std": _NOT_NEGATIVE,
    "initialize.checkpoint_every": _AT_LEAST_1,
    "train.steps": _AT_LEAST_1,
    "train.epochs": _AT_LEAST_1,
    "train.batch_size": _AT_LEAST_1,
    "train.num_samples": _AT_LEAST_1,
    "train.baseline": _one_of("greedy", "leave_one_out"),
    "train.reward_scale": _POSITIVE,
    "train.kl_weight": _NOT_NEGATIVE,
    "train.validate_every": _AT_LEAST_1,
    "train.checkpoint_every": _AT_LEAST_1,
    "train.log_every": _AT_LEAST_1,
    "train.accumulation": _AT_LEAST_1,
    "train.precision": _one_of("auto", "float32", "bf16"),
    "train.memory_gb": _POSITIVE,
    "train.checkpoint_minutes": _POSITIVE,
    "train.max_minutes": _POSITIVE,
    "*.lr": _POSITIVE,
    "*.warmup_steps": _NOT_NEGATIVE,
    "*.final_lr_ratio": _SHARE,
    "*.weight_decay": _NOT_NEGATIVE,
    "*.eps": _POSITIVE,
    "*.grad_clip": ("0 (no clipping) or more", lambda v: v >= 0),
    "evaluate.which": _one_of("best", "last"),
    "evaluate.split": _one_of("val", "test"),
    "evaluate.self_cider_samples": ("0 (none) or 2 or more", lambda v: v == 0 or v >= 2),
    "evaluate.projection_t": _POSITIVE,
    "report.gallery": _NOT_NEGATIVE,
    "report.resamples": ("100 or more", lambda v: v >= 100),
    "serve.host": ("an address or a name of this machine", lambda v: bool(v.strip())),
    "serve.port": ("0 (any free one) to 65535", lambda v: 0 <= v <= 65535),
    "serve.max_megabytes": _POSITIVE,
    "serve.captions": _AT_LEAST_1,
    "serve.nearest": _AT_LEAST_1,
    "wandb.mode": _one_of("offline", "online", "disabled"),
    "wandb.finish_seconds": _POSITIVE,
}


def accepted_values(path: str) -> str | None:
    """What the setting at this path accepts, in words; None: anything of its type."""
    section, _, name = path.rpartition(".")
    check = _CHECKS.get(f"*.{name}" if section.endswith("optimizer") else path)
    return check and check[0]


def validate(cfg: Config) -> None:
    """Raise `InputError` for the first field out of range or the first two fields that contradict each other."""
    for name, key, value in leaves(cfg):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}={value} is not a finite number")
        if key in _CHECKS and value is not None:
            accepted, holds = _CHECKS[key]
            if not holds(value):
                raise InputError(f"{name}={value} is not accepted: it must be {accepted}")
    for contradiction in _contradictions(cfg):
        raise InputError(contradiction)


def _comparison(cfg: Config) -> Iterator[str]:
    runs = cfg.runs
    several = [runs] if isinstance(runs, str) else runs
    if runs is not None and not (
        isinstance(several, list) and several and all(isinstance(r, str) and r for r in several)
    ):
        yield f"runs={runs!r} is not accepted: it must be a folder or a pattern such as runs/demo/*/seed=*, or a list of them"
    elif runs is not None and cfg.report.runs:
        yield f"runs={runs} and report.runs={cfg.report.runs} contradict each other: they are one setting, leave one of them out"
    elif cfg.run_patterns and cfg.stage != "report":
        yield f"runs={','.join(cfg.run_patterns)} and stage={cfg.stage} contradict each other: runs are compared with stage=report"
    elif cfg.report.baseline is not None and not cfg.run_patterns:
        yield f"report.baseline={cfg.report.baseline} needs runs=PATTERN: which runs to compare with it"
    elif cfg.run_patterns and cfg.output is not None and cfg.report.output is not None:
        yield (
            f"output={cfg.output} and report.output={cfg.report.output} contradict each other: output is the folder of all files, "
            "report.output the page's file, beside which the others lie"
        )


_TAKEN = ("semantic", "naturalness", "real_logit")  # other rewards are logged by these names


def built_in_terms() -> list[str]:
    """Names of the reward terms in method/reward_terms.py. Read as text: importing the file would load torch."""
    source = Path(__file__).with_name("method") / "reward_terms.py"
    return re.findall(r"^def (\w+)\(inputs: RewardInputs\)", source.read_text(encoding="utf-8"), re.MULTILINE)


def _reward_terms(cfg: Config) -> Iterator[str]:
    built_in = built_in_terms() if cfg.reward_weights.terms else []
    names = [custom_name(key) for key in cfg.reward_weights.terms]
    for key, term in cfg.reward_weights.terms.items():
        field, name = f"reward_weights.terms.{key}", custom_name(key)
        if not isinstance(term, RewardTermConfig):
            yield f"{field}={term} is not accepted: a term is a weight, or has weight, scale and function"
            continue
        spec = str(term.function or key)
        if not name.isidentifier() or name in _TAKEN or name.endswith(("_greedy", "_abs")) or names.count(name) > 1:
            taken = f"other than {', '.join(_TAKEN)}, without _greedy or _abs at its end"
            yield f"{field} is not accepted: the name of a term is one word of letters, digits and _, {taken}, and given once"
        elif name in built_in and is_custom(spec):
            yield f"{field}.function={spec} is not accepted: {name} is a built-in term, give yours another name"
        elif name not in built_in and not is_custom(spec):
            yield (
                f"{field} is not accepted: the built-in terms are {', '.join(built_in)}; your own needs {field}.function=path.py:name "
                "or package.module:name"
            )
        elif not isinstance(term.weight, int | float) or not math.isfinite(term.weight):
            yield f"{field}.weight={term.weight} is not accepted: it must be a finite number"
        elif not (term.scale is None or (isinstance(term.scale, int | float) and 0 < term.scale < math.inf)):
            yield f"{field}.scale={term.scale} is not accepted: it must be a number above 0, or null"


def _contradictions(cfg: Config) -> Iterator[str]:
    g, d, t, r = cfg.generator, cfg.discriminator, cfg.train, cfg.reward_weights
    if not (
        cfg.images is None
        or isinstance(cfg.images, str)
        or (isinstance(cfg.images, list) and all(isinstance(i, str) for i in cfg.images))
    ):
        yield f"images={cfg.images!r} is not accepted: it must be a file or folder, or a list of them"
    yield from _comparison(cfg)
    yield from _reward_terms(cfg)
    if cfg.stage == "caption" and not cfg.image_paths:
        yield "stage=caption needs images=FOLDER (or images=[a.jpg,b.png]): which pictures to caption"
    if isinstance(cfg.aggregation_t.t, list) and cfg.stage != "aggregate":
        yield (
            f"aggregation_t.t={cfg.aggregation_t.t} and stage={cfg.stage} contradict each other: only stage=aggregate takes several; "
            "a run each: -m aggregation_t.t=" + ",".join(f"{t:g}" for t in cfg.aggregation_t.temperatures)
        )
    files = cfg.dataset.released
    if not (
        files is None
        or isinstance(files, str)
        or (isinstance(files, list) and files and all(isinstance(f, str) for f in files))
    ):
        yield f"dataset.released={files!r} is not accepted: it must be a file or folder, or a list of them"
    if cfg.dataset.kind == "folder" and not cfg.dataset.root and cfg.stage != "caption":
        yield "dataset.root is empty: dataset.kind=folder needs dataset.root=FOLDER, where the pictures are"
    reader = cfg.dataset.reader
    if cfg.dataset.kind == "custom" and not is_custom(reader) and cfg.stage != "caption":
        needed = "path.py:name or package.module:name of the function that lists the images"
        yield f"dataset.reader={reader!r} is not accepted: dataset.kind=custom needs {needed}"
    elif cfg.dataset.kind != "custom" and reader:
        yield f"dataset.reader={reader} and dataset.kind={cfg.dataset.kind} contradict each other: a reader needs dataset=custom"
    encoder = cfg.clip_backbone
    if encoder.kind == "custom" and not is_custom(encoder.model) and cfg.stage != "caption":
        needed = "path.py:Name or package.module:Name of a dual encoder"
        yield f"clip_backbone.model={encoder.model!r} is not accepted: clip_backbone=custom needs {needed}"
    if cfg.corpus.kind == "text_file" and not cfg.corpus.path and cfg.stage != "caption":
        yield "corpus.path is null: corpus.kind=text_file needs corpus.path=FILE, one sentence a line"
    for side, demo in (
        ("corpus", cfg.corpus.kind.startswith("demo")),
        ("clip_backbone", cfg.clip_backbone.kind == "demo"),
    ):
        if demo and cfg.dataset.kind != "demo" and cfg.stage != "caption":
            kind = getattr(cfg, side).kind
            demo_only = f"the demo's {side} only fits dataset=demo"
            yield f"{side}.kind={kind} and dataset.kind={cfg.dataset.kind} contradict each other: {demo_only}"
    for side, width, heads in (("generator", g.width, g.heads), ("discriminator", d.width, d.heads)):
        if width % heads:
            yield f"{side}.width={width} and {side}.heads={heads} contradict each other: the width must be a multiple of the heads"
    if g.mapper == "transformer" and g.width % g.mapper_heads:
        yield f"generator.width={g.width} and generator.mapper_heads={g.mapper_heads} contradict each other: it must be a multiple"
    if t.baseline == "leave_one_out" and t.num_samples < 2:
        yield f"train.baseline=leave_one_out and train.num_samples={t.num_samples} contradict each other: it needs 2 or more"
    if t.accumulation > t.batch_size:
        yield f"train.accumulation={t.accumulation} and train.batch_size={t.batch_size} contradict each other: a part needs an image"
    for slip in t.released:
        if slip not in RELEASED_SLIPS:
            yield f"train.released has '{slip}', which is not accepted: one of {', '.join(RELEASED_SLIPS)}"
    if "l1_target" in t.released and not g.normalize_prefix:
        yield "train.released=[l1_target] and generator.normalize_prefix=false contradict each other: that slip needs normalised prefixes"
    if t.init_from and not t.use_initialization:
        yield f"train.init_from={t.init_from} and train.use_initialization=false contradict each other: leave one of them out"
    if not t.use_discriminator and (r.max_weight < 1 or r.delay_steps or r.ramp_steps):
        yield (
            f"train.use_discriminator=false and reward_weights.max_weight={r.max_weight:g} (delay_steps={r.delay_steps}, "
            f"ramp_steps={r.ramp_steps}) contradict each other: without a discriminator they must be 1, 0 and 0"
        )
    if cfg.dataset.kind == "folder" and cfg.dataset.val_fraction + cfg.dataset.test_fraction >= 1:
        yield (
            f"dataset.val_fraction={cfg.dataset.val_fraction:g} and dataset.test_fraction={cfg.dataset.test_fraction:g} contradict "
            "each other: they leave no training image, their sum must be below 1"
        )
    if g.language_model == "scratch" and g.tokenizer == "pretrained":
        yield "generator.language_model=scratch and generator.tokenizer=pretrained contradict each other: name a folder, or corpus"
    if d.encoder == "scratch" and d.tokenizer == "pretrained":
        yield "discriminator.encoder=scratch and discriminator.tokenizer=pretrained contradict each other: name a folder, or corpus"
    for metric in cfg.evaluate.metrics:
        if metric not in METRICS and not is_custom(metric):
            own = "or your own path.py:name or package.module:name"
            yield f"evaluate.metrics has '{metric}', which is not accepted: one of {', '.join(METRICS)}, {own}"
    e = cfg.evaluate
    if not e.metrics:
        yield f"evaluate.metrics=[] is not accepted: name one or more of {', '.join(METRICS)}"
    if e.self_cider_samples and "diversity" not in e.metrics:
        yield f"evaluate.self_cider_samples={e.self_cider_samples} and evaluate.metrics contradict each other: add diversity to the metrics"
    if cfg.captions is not None:
        if cfg.stage != "evaluate":
            yield f"captions={cfg.captions} and stage={cfg.stage} contradict each other: captions made elsewhere are for stage=evaluate"
        if cfg.checkpoint is not None:
            yield f"captions={cfg.captions} and checkpoint={cfg.checkpoint} contradict each other: one of them is scored"
        if e.self_cider_samples:
            yield (
                f"captions={cfg.captions} and evaluate.self_cider_samples={e.self_cider_samples} contradict each other: a results file "
                "has one caption an image"
            )
    elif e.references is not None:
        yield f"evaluate.references={e.references} needs captions=FILE: a checkpoint is scored against its dataset's references"
    for row in cfg.evaluate.baselines:
        if row not in BASELINE_ROWS:
            yield f"evaluate.baselines has '{row}', which is not accepted: one of {', '.join(BASELINE_ROWS)}"
    if "human" in cfg.evaluate.baselines and cfg.dataset.kind != "demo":
        yield f"evaluate.baselines has 'human' and dataset.kind={cfg.dataset.kind}: fresh human sentences exist in the demo only"
    for part, folder in (("name", cfg.name), ("variant", cfg.variant)):
        if folder is not None and (not folder.strip(". ") or "/" in folder):
            yield f"{part}={folder!r} is not accepted: it must be the name of one folder"
