"""Whether the settings are accepted: each field by itself (`config.py` has its check), then fields together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cgtgan.accepted_values import Check
from cgtgan.config import (
    BASELINE_ROWS,
    COCO_METRICS,
    METRICS,
    RELEASED_SLIPS,
    Config,
    RewardTermConfig,
    custom_name,
    is_custom,
    leaves,
)
from cgtgan.errors import InputError


@cache
def _checks() -> dict[str, Check]:
    return {path: check for path, _, check in leaves(Config()) if check}


def accepted_values(path: str) -> str | None:
    """What the setting at this path accepts, in words; None: anything of its type."""
    return _checks()[path][0] if path in _checks() else None


def validate(cfg: Config) -> None:
    """Raise `InputError` for the first field out of range or the first fields that contradict each other."""
    for path, value, check in leaves(cfg):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}={value} is not a finite number")
        if check and value is not None and not check[1](value):
            raise InputError(f"{path}={value} is not accepted: it must be {check[0]}")
    for sentence in (*_wrong_lists(cfg), *_wrong_terms(cfg), *_broken_rules(cfg)):
        raise InputError(sentence)


# ------------------------------------------------------------------------------------------------------ lists and names


def _is_text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) and v for v in value))


def _wrong_lists(cfg: Config) -> Iterator[str]:
    """Settings that are one text or a list, lists of known names, and names of folders."""
    places = "a file or folder, or a list of them"
    for path, value, accepted in (
        ("images", cfg.images, places),
        ("captions", cfg.captions, "a file or a pattern such as results/*.json, or a list of them"),
        ("dataset.released", cfg.dataset.released, places),
        ("runs", cfg.runs, "a folder or a pattern such as runs/demo/*/seed=*, or a list of them"),
    ):
        if value is not None and not _is_text_or_texts(value):
            yield f"{path}={value!r} is not accepted: it must be {accepted}"
    code = "or your own path.py:name or package.module:name"
    for path, names, known in (
        ("train.released", cfg.train.released, RELEASED_SLIPS),
        ("evaluate.baselines", cfg.evaluate.baselines, BASELINE_ROWS),
        ("evaluate.metrics", [m for m in cfg.evaluate.metrics if not is_custom(m)], (*METRICS, code)),
    ):
        for name in names:
            if name not in known:
                yield f"{path} has '{name}', which is not accepted: one of {', '.join(known)}"
    for path, folder in (("name", cfg.name), ("variant", cfg.variant)):
        if folder is not None and (not folder.strip(". ") or "/" in folder):
            yield f"{path}={folder!r} is not accepted: it must be the name of one folder"


# --------------------------------------------------------------------------------------------------------- reward terms

_RESERVED_TERMS = ("semantic", "naturalness", "real_logit")  # other rewards are logged by these names


def built_in_terms() -> list[str]:
    """Names of the reward terms in method/reward_terms.py. Read as text: importing the file would load torch."""
    source = Path(__file__).with_name("method") / "reward_terms.py"
    return re.findall(r"^def (\w+)\(inputs: RewardInputs\)", source.read_text(encoding="utf-8"), re.MULTILINE)


def _wrong_terms(cfg: Config) -> Iterator[str]:
    terms = cfg.reward_weights.terms
    names = [custom_name(key) for key in terms]
    for key, term in terms.items():
        field, name = f"reward_weights.terms.{key}", custom_name(key)
        reserved = name in _RESERVED_TERMS or name.endswith(("_greedy", "_abs"))
        if not isinstance(term, RewardTermConfig):
            yield f"{field}={term} is not accepted: a term is a weight, or has weight, scale and function"
        elif not name.isidentifier() or reserved or names.count(name) > 1:
            yield (
                f"{field} is not accepted: the name of a term is one word of letters, digits and _, given once; "
                f"it is not {', '.join(_RESERVED_TERMS)} and does not end in _greedy or _abs"
            )
        else:
            yield from _wrong_term(field, name, term, is_custom(str(term.function or key)))


def _wrong_term(field: str, name: str, term: RewardTermConfig, own_code: bool) -> Iterator[str]:
    built_in = built_in_terms()
    if name in built_in and own_code:
        yield f"{field}.function={term.function} is not accepted: {name} is a built-in term, give yours another name"
    elif name not in built_in and not own_code:
        yield (
            f"{field} is not accepted: the built-in terms are {', '.join(built_in)}; "
            f"a term of your own needs {field}.function=path.py:name or package.module:name"
        )
    elif not isinstance(term.weight, int | float) or not math.isfinite(term.weight):
        yield f"{field}.weight={term.weight} is not accepted: it must be a finite number"
    elif not (term.scale is None or (isinstance(term.scale, int | float) and 0 < term.scale < math.inf)):
        yield f"{field}.scale={term.scale} is not accepted: it must be a number above 0, or null"


# -------------------------------------------------------------------------------------------- settings that need others


def _reads_data(cfg: Config) -> bool:
    return cfg.stage != "caption"  # its pictures are in `images`


def _is_demo_mixed_with(other: Callable[[Config], str]) -> Callable[[Config], bool]:
    return lambda c: other(c).startswith("demo") and c.dataset.kind != "demo" and _reads_data(c)


# (condition, sentence): the sentence is the error where the condition holds; {path} stands for path=value.
_RULES: tuple[tuple[Callable[[Config], Any], str], ...] = (
    # which runs are compared
    (
        lambda c: c.runs and c.report.runs,
        "{runs} and {report.runs} contradict each other: they are one setting, leave one of them out",
    ),
    (
        lambda c: c.run_patterns and c.stage != "report",
        "{runs} and {stage} contradict each other: runs are compared with stage=report",
    ),
    (
        lambda c: c.report.baseline is not None and not c.run_patterns,
        "{report.baseline} needs runs=PATTERN: which runs to compare with it",
    ),
    (
        lambda c: c.run_patterns and c.output is not None and c.report.output is not None,
        "{output} and {report.output} contradict each other: output is the folder of all files, report.output the file "
        "of the page, next to which the other files lie",
    ),
    # data, corpus and backbone
    (
        lambda c: c.stage == "caption" and not c.image_paths,
        "stage=caption needs images=FOLDER (or images=[a.jpg,b.png]): which pictures to caption",
    ),
    (
        lambda c: c.dataset.kind == "folder" and not c.dataset.root and _reads_data(c),
        "dataset.root is empty: dataset.kind=folder needs dataset.root=FOLDER, where the pictures are",
    ),
    (
        lambda c: c.dataset.kind == "folder" and c.dataset.val_fraction + c.dataset.test_fraction >= 1,
        "{dataset.val_fraction} and {dataset.test_fraction} contradict each other: they leave no training image, "
        "their sum must be below 1",
    ),
    (
        lambda c: c.dataset.kind == "custom" and not is_custom(c.dataset.reader) and _reads_data(c),
        "{dataset.reader!r} is not accepted: dataset.kind=custom needs path.py:name or package.module:name of the "
        "function that lists the images",
    ),
    (
        lambda c: c.dataset.kind != "custom" and c.dataset.reader,
        "{dataset.reader} and {dataset.kind} contradict each other: a reader needs dataset=custom",
    ),
    (
        lambda c: c.dataset.kind == "nocaps" and c.stage in ("preprocess", "aggregate", "train", "pipeline"),
        "{dataset.kind} and {stage} contradict each other: NoCaps has nothing to train on; score a trained run with "
        "stage=evaluate checkpoint=RUN dataset=nocaps",
    ),
    (
        lambda c: c.dataset.kind != "folder" and (c.dataset.caption_column or c.dataset.image_column),
        "{dataset.caption_column}, {dataset.image_column} and {dataset.kind} contradict each other: a column is read "
        "with dataset=folder",
    ),
    (
        lambda c: c.dataset.caption_column and c.dataset.references,
        "{dataset.caption_column} and {dataset.references} contradict each other: give one place of the captions",
    ),
    (
        lambda c: c.clip_backbone.kind == "custom" and not is_custom(c.clip_backbone.model) and _reads_data(c),
        "{clip_backbone.model!r} is not accepted: clip_backbone=custom needs path.py:Name or package.module:Name of a "
        "dual encoder",
    ),
    (
        lambda c: c.corpus.kind == "text_file" and not c.corpus.path and _reads_data(c),
        "corpus.path is null: corpus.kind=text_file needs corpus.path=FILE, one sentence per line",
    ),
    (
        lambda c: c.corpus.column is not None and c.corpus.kind != "text_file",
        "{corpus.column} and {corpus.kind} contradict each other: a column is read with corpus=text_file",
    ),
    (
        _is_demo_mixed_with(lambda c: c.corpus.kind),
        "{corpus.kind} and {dataset.kind} contradict each other: the demo's corpus only fits dataset=demo",
    ),
    (
        _is_demo_mixed_with(lambda c: c.clip_backbone.kind),
        "{clip_backbone.kind} and {dataset.kind} contradict each other: the demo's backbone only fits dataset=demo",
    ),
    (
        lambda c: isinstance(c.aggregation_t.t, list) and c.stage != "aggregate",
        "{aggregation_t.t} and {stage} contradict each other: only stage=aggregate takes a list; "
        "for one run per value: -m aggregation_t.t=A,B",
    ),
    # models
    (
        lambda c: c.generator.width % c.generator.heads,
        "{generator.width} and {generator.heads} contradict each other: width must be a multiple of heads",
    ),
    (
        lambda c: c.generator.mapper == "transformer" and c.generator.width % c.generator.mapper_heads,
        "{generator.width} and {generator.mapper_heads} contradict each other: width must be a multiple of heads",
    ),
    (
        lambda c: c.generator.language_model == "scratch" and c.generator.tokenizer == "pretrained",
        "{generator.language_model} and {generator.tokenizer} contradict each other: name a folder, or corpus",
    ),
    (
        lambda c: c.discriminator.width % c.discriminator.heads,
        "{discriminator.width} and {discriminator.heads} contradict each other: width must be a multiple of heads",
    ),
    (
        lambda c: c.clip_backbone.demo.batch_size % c.clip_backbone.demo.group,
        "{clip_backbone.demo.batch_size} is no multiple of {clip_backbone.demo.group}: a batch holds whole groups",
    ),
    (
        lambda c: c.clip_backbone.demo.pairs % c.clip_backbone.demo.group,
        "{clip_backbone.demo.pairs} is no multiple of {clip_backbone.demo.group}: only whole groups are drawn",
    ),
    (
        lambda c: c.discriminator.encoder == "scratch" and c.discriminator.tokenizer == "pretrained",
        "{discriminator.encoder} and {discriminator.tokenizer} contradict each other: name a folder, or corpus",
    ),
    (
        lambda c: c.decode.cache == "compiled" and c.stage == "serve",
        "{decode.cache} and {stage} contradict each other: the page captions one picture at a time, in threads that "
        "would each capture graphs of their own; leave decode.cache out",
    ),
    # training
    (
        lambda c: c.train.baseline == "leave_one_out" and c.train.num_samples < 2,
        "{train.baseline} and {train.num_samples} contradict each other: it needs 2 or more",
    ),
    (
        lambda c: c.stage in ("train", "pipeline") and c.train.kl_weight and c.train.dropout,
        "{train.kl_weight} and {train.dropout} contradict each other: there is no KL penalty with dropout",
    ),
    (
        lambda c: c.train.advantage_norm == "group" and c.train.num_samples < 2,
        "{train.advantage_norm} and {train.num_samples} contradict each other: it needs 2 or more",
    ),
    (
        lambda c: c.train.dropout and c.train.loss_norm != "caption",
        "{train.dropout} and {train.loss_norm} contradict each other: with dropout it is caption, as published",
    ),
    (
        lambda c: c.train.dropout and c.discriminator.loss == "pairwise",
        "{train.dropout} and {discriminator.loss} contradict each other: with dropout it is bce, as published",
    ),
    (
        lambda c: (
            "accumulation" in c.train.released and (c.train.advantage_norm == "batch" or c.train.loss_norm == "tokens")
        ),
        "{train.released} with accumulation, {train.advantage_norm} and {train.loss_norm} contradict each other: "
        "these two need the whole step's captions before the first gradient",
    ),
    (
        lambda c: c.train.dropout and "entropy" in c.reward_weights.terms,
        "{train.dropout} and reward_weights.terms.entropy contradict each other: the term needs no dropout",
    ),
    (
        lambda c: c.discriminator.label_smoothing and c.discriminator.loss != "bce",
        "{discriminator.label_smoothing} and {discriminator.loss} contradict each other: pairs have no labels",
    ),
    (
        lambda c: c.gap.kind == "projection" and c.gap.t is None and isinstance(c.aggregation_t.t, list),
        "gap=projection needs one temperature: set gap.t",
    ),
    (
        lambda c: c.train.accumulation > c.train.batch_size,
        "{train.accumulation} and {train.batch_size} contradict each other: every part needs an image",
    ),
    (
        lambda c: "l1_target" in c.train.released and not c.generator.normalize_prefix,
        "{train.released} and {generator.normalize_prefix} contradict each other: l1_target needs normalised prefixes",
    ),
    (
        lambda c: c.train.init_from and not c.train.use_initialization,
        "{train.init_from} and {train.use_initialization} contradict each other: leave one of them out",
    ),
    (
        lambda c: (
            not c.train.use_discriminator
            and (c.reward_weights.max_weight < 1 or c.reward_weights.delay_steps or c.reward_weights.ramp_steps)
        ),
        "{train.use_discriminator} and {reward_weights.max_weight}, {reward_weights.delay_steps}, "
        "{reward_weights.ramp_steps} contradict each other: without a discriminator they must be 1, 0 and 0",
    ),
    # scores
    (lambda c: not c.evaluate.metrics, "{evaluate.metrics} is not accepted: name one or more of " + ", ".join(METRICS)),
    (
        lambda c: c.evaluate.self_cider_samples and "diversity" not in c.evaluate.metrics,
        "{evaluate.self_cider_samples} and {evaluate.metrics} contradict each other: add diversity to the metrics",
    ),
    (
        lambda c: c.captions is not None and c.stage != "evaluate",
        "{captions} and {stage} contradict each other: captions made elsewhere are for stage=evaluate",
    ),
    (
        lambda c: c.captions is not None and c.checkpoint is not None,
        "{captions} and {checkpoint} contradict each other: one of them is scored",
    ),
    (
        lambda c: c.captions is not None and c.evaluate.self_cider_samples,
        "{captions} and {evaluate.self_cider_samples} contradict each other: a results file has one caption per image",
    ),
    (
        lambda c: (
            c.captions is not None
            and c.image_paths
            and c.evaluate.references is None
            and any(metric in COCO_METRICS for metric in c.evaluate.metrics)
        ),
        "{evaluate.metrics} needs references: add evaluate.references=FILE, or with pictures alone "
        "evaluate.metrics=[clipscore]",
    ),
    (
        lambda c: (
            c.captions is not None
            and c.image_paths
            and "clipscore" in c.evaluate.metrics
            and c.clip_backbone.kind == "demo"
        ),
        "{clip_backbone.kind} and {images} contradict each other: the demo's backbone knows the demo's drawn pictures "
        "alone, add clip_backbone=vit_b32 or another one",
    ),
    (
        lambda c: c.captions is None and c.evaluate.references is not None,
        "{evaluate.references} needs captions=FILE: a checkpoint is scored against the references of its data set",
    ),
    (
        lambda c: "human" in c.evaluate.baselines and c.dataset.kind != "demo",
        "evaluate.baselines has 'human' and {dataset.kind}: fresh human sentences exist in the demo only",
    ),
)


def _broken_rules(cfg: Config) -> Iterator[str]:
    for is_broken, sentence in _RULES:
        if is_broken(cfg):
            yield re.sub(r"\{([\w.]+)(!r)?\}", lambda match: _field_with_value(cfg, *match.groups()), sentence)


def _field_with_value(cfg: Config, path: str, quoted: str | None) -> str:
    """`path=value`, as one would write it on the command line, or with quotes."""
    value: Any = cfg
    for name in path.split("."):
        value = getattr(value, name)
    return f"{path}={value!r}" if quoted else f"{path}={_in_words(value)}"


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_in_words, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
