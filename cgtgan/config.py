"""Every setting, typed, and a run's identity. Imports no torch: a wrong setting is answered before torch is loaded.

YAML is composed by Hydra against these dataclasses, turned into one `Config` object in `run.py`, and checked by `checks.validate`.
Below the stages nobody sees the whole `Config`; a part takes its own small dataclass or plain arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

STAGES = ("preprocess", "aggregate", "initialize", "train", "evaluate", "caption", "report", "serve", "pipeline")
SPLITS = ("train", "val", "test")
DATASET_KINDS = ("demo", "coco", "flickr30k", "folder", "custom")  # their records: data/dataset_kinds.py
METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice", "clipscore", "diversity")
RELEASED_SLIPS = ("text_order", "accumulation", "l1_target")
BASELINE_ROWS = ("init", "mean_shift", "projection", "nearest", "supervised", "human")


@dataclass
class DemoWorldConfig:
    """The drawn world: counts of images and sentences, `corpus_sentences` for each of the two corpora; all derived from `seed`."""

    seed: int = 0
    train_images: int = 3000
    val_images: int = 100
    test_images: int = 300
    references: int = 5
    corpus_sentences: int = 8000
    image_size: int = 48


@dataclass
class DatasetConfig:
    """Images, annotations and splits. Relative paths lie under `root`; `null` means the usual place of that `kind`."""

    name: str = "demo"
    kind: str = "demo"  # one of DATASET_KINDS
    reader: str = ""  # custom: own code that lists the images (data/custom_reader.py)
    root: str = "data"
    images: str | None = None
    train_annotations: str | None = None
    val_annotations: str | None = None
    test_annotations: str | None = None
    karpathy: str | None = None  # Karpathy's dataset_*.json, or a folder with the split lists *_{train,val,test}.txt
    references: str | None = None  # folder: one COCO-format caption file for all images
    val_fraction: float = 0.1  # folder: share of the images, by id, when no list is given
    test_fraction: float = 0.1
    max_images: int | None = None  # of every split, the first by id
    max_bad_images: int = 0
    jpeg_draft: bool = False  # decode JPEGs at half, a quarter or an eighth of their size where CLIP's is still half of that: not exact
    released: Any = (
        None  # the authors' embedding pickles in the place of images: a file, a list of files, or a folder with them
    )
    world: DemoWorldConfig = field(default_factory=DemoWorldConfig)


@dataclass
class CorpusConfig:
    """Raw text and how it is cleaned (METHOD: Cleaning)."""

    name: str = "demo"
    kind: str = "demo"  # demo | demo_external | coco | flickr30k | gcc | shutterstock | text_file
    path: str | None = None
    rule: str = "none"  # coco | flickr30k | gcc | shutterstock | none
    released: bool = False  # the published program's cleaning to the letter, slips included
    max_sentences: int | None = None
    shuffle_seed: int = 1024


@dataclass
class DemoClipConfig:
    """The demo's own two-tower CLIP and its contrastive training; `logit_scale` is fixed (a learned one leaves no modality gap)."""

    dim: int = 96
    width: int = 32
    text_layers: int = 2
    pairs: int = 16000
    batch_size: int = 128
    steps: int = 900
    lr: float = 2e-3
    logit_scale: float = 100.0
    seed: int = 0


@dataclass
class ClipBackboneConfig:
    """Which CLIP. `kind: random` builds OpenAI's architecture small with random weights (for trying real data without weights)."""

    name: str = "demo"
    kind: str = "demo"  # openai | huggingface | open_clip | random | demo | custom
    model: str = ""  # openai: ViT-L/14, ViT-B/32, RN50x4 or a .pt file; huggingface / open_clip: a hub name or folder
    pretrained: str = ""  # open_clip: the weights' tag
    cache: str = "~/.cache/clip"
    tokenizer: str | None = None  # openai / random: another BPE file than the one in the package
    dtype: str = "float32"
    image_batch_size: int = 64
    text_batch_size: int = 256
    image_shard: int = (
        256  # images, sentences that are written at once: what a kill costs, and what processes share the work by
    )
    text_shard: int = 4096
    demo: DemoClipConfig = field(default_factory=DemoClipConfig)


@dataclass
class AggregationConfig:
    """`t` is the temperature of the attention over the corpus (METHOD: Aggregation); stage=aggregate also takes a list of them."""

    t: Any = 100.0
    top_k: int | None = None  # only the k nearest sentences count; null: all, which is the paper's
    chunk_mb: int = 256

    @property
    def temperatures(self) -> list[float]:
        """`t` as a list."""
        return [float(t) for t in (self.t if isinstance(self.t, list) else [self.t])]


@dataclass
class RewardTermConfig:
    """One reward term: it adds weight * scale * value to the semantic reward."""

    weight: float = 1.0
    scale: float | None = None  # null: the logit scale for a built-in term, 1 for own code
    function: str | None = None  # own code, path.py:name or package.module:name; null: the built-in term of this name


@dataclass
class RewardWeightsConfig:
    """R = (1-clip)(cos_w*cos + (1-cos_w)*l1) + clip*clip; total = w*R + (1-w)*naturalness, w ramped to `max_weight`."""

    name: str = "clip_agg"
    cos_weight: float = 0.5
    clip_weight: float = 0.0
    # further terms; cos, l1 or clip here get another weight. Each is a RewardTermConfig, or just its weight. (Hydra cannot
    # add a key to a dictionary of dataclasses, hence the loose type.)
    terms: dict[str, Any] = field(default_factory=dict)
    max_weight: float = 0.5
    delay_steps: int = 150
    ramp_steps: int = 2350

    def __post_init__(self) -> None:
        for name, term in self.terms.items():
            if isinstance(term, int | float):
                self.terms[name] = RewardTermConfig(weight=term)
            elif isinstance(term, dict) and term.keys() <= {f.name for f in fields(RewardTermConfig)}:
                self.terms[name] = RewardTermConfig(**term)  # anything else is refused by `checks.validate`


@dataclass
class GeneratorConfig:
    """Language model, mapper and prefix. `language_model: scratch` builds a GPT-2 of the sizes below with random weights."""

    name: str = "gpt2"
    language_model: str = "gpt2"
    tokenizer: str = (
        "pretrained"  # pretrained | corpus (byte-level BPE trained on it) | a folder with vocab.json, merges.txt
    )
    vocab_size: int = 1000
    layers: int = 12
    width: int = 768
    heads: int = 12
    mapper: str = "mlp"  # mlp | transformer
    prefix_length: int = 10
    clip_length: int = 10
    mapper_layers: int = 8
    mapper_heads: int = 8
    max_length: int = 20
    normalize_prefix: bool = False


@dataclass
class DiscriminatorConfig:
    """Encoder with a pooled output and the MLP head of half its width. `encoder: scratch` as for the generator."""

    name: str = "roberta_base"
    encoder: str = "roberta-base"
    tokenizer: str = "pretrained"
    vocab_size: int = 1000
    layers: int = 12
    width: int = 768
    heads: int = 12


@dataclass
class DecodeConfig:
    """How captions are drawn for evaluation and captioning (training always samples at temperature 1)."""

    name: str = "greedy"  # greedy | beam | sample | best_of_n
    beam_size: int = 3
    length_penalty: float = 1.0
    temperature: float = 1.0
    best_of: int = 8  # best_of_n: drawn beside the greedy caption; the one that CLIP finds nearest to the image is kept
    batch_size: int = 256
    precision: str = "auto"  # float32 | bf16 (autocast) | auto: bf16 on a GPU that has it


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up, then constant, or linear to `final_lr_ratio` at the last step."""

    lr: float = 1e-5
    warmup_steps: int = 0
    final_lr_ratio: float = 1.0
    weight_decay: float = 0.05
    eps: float = 1e-8
    grad_clip: float = 1.0
    released_adamw: bool = False  # the old transformers' AdamW (METHOD, slip 12)
    released_decay: bool = False  # decay GPT-2's and the mapper's norms too (METHOD, slip 12)


@dataclass
class InitializeConfig:
    """Caption reconstructed from its own CLIP text embedding (METHOD: Initialisation)."""

    steps: int | None = None  # null: `epochs` over the sentences
    epochs: int = 1
    batch_size: int = 16
    noise_std: float = 0.0
    checkpoint_every: int = 500
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-5, warmup_steps=5000, eps=1e-6, grad_clip=0.0)
    )


@dataclass
class TrainConfig:
    """GAN training (METHOD: one step)."""

    steps: int | None = None  # null: `epochs` over the images
    epochs: int = 50
    batch_size: int = 128
    num_samples: int = 5
    baseline: str = "greedy"  # greedy | leave_one_out
    use_discriminator: bool = True
    use_initialization: bool = True
    init_from: str | None = (
        None  # a checkpoint of ours, the authors' model.pt or a hub name to start from, in the place of `initialize`
    )
    reward_scale: float | None = None  # null: the backbone's own exp(logit_scale)
    kl_weight: float = 0.0  # a leash to the initial generator
    dropout: bool = False  # samples are drawn, and the discriminator learns, with dropout on, as in the released program (METHOD, slip 8)
    released: list[str] = field(default_factory=list)  # text_order, accumulation, l1_target (METHOD, slips 4, 11, 13)
    accumulation: int = 1  # parts that the images of a step come in, one after the other: less memory, the same step
    precision: str = "auto"  # float32 | bf16 (autocast) | auto: bf16 on a GPU that has it
    memory_gb: float | None = None  # for the states of a backward pass; null: 1 GB, or a third of a GPU
    gradient_checkpointing: bool = False  # language models too large for their states
    watch_kl: bool = True  # log the distance to the initial generator, which stays in memory for it
    stop_on_collapse: bool = False
    validate_every: int | None = None  # null: once an epoch
    checkpoint_every: int = 200
    checkpoint_minutes: float | None = 10.0
    max_minutes: float | None = None  # stop, with a checkpoint, after so long; the same command goes on
    log_every: int = 10
    generator_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup_steps=150))
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class EvaluateConfig:
    """Which checkpoint of the run is scored, on which split, beside which baselines."""

    which: str = "best"  # best | last
    split: str = "test"
    metrics: list[str] = field(default_factory=lambda: ["bleu", "meteor", "rouge_l", "cider"])
    self_cider_samples: int = 0  # diversity: so many captions an image are drawn for self-CIDEr; 0: none
    references: str | None = None  # with captions=FILE: a file in COCO's format in the place of the split's references
    baselines: list[str] = field(default_factory=list)
    projection_t: float | None = None  # DeCap's temperature of the projection; null: aggregation_t.t


@dataclass
class CaptionConfig:
    """What stage=caption writes of one's own pictures."""

    num: int | None = None  # so many captions a picture, ranked by CLIP, with scores; null: one, as `decode` draws it
    format: str = "json"  # json | csv


@dataclass
class ReportConfig:
    """`warning` is shown as a banner on the page. `runs` is another name of the setting `runs`."""

    runs: list[str] = field(default_factory=list)
    output: str | None = None  # the page's file
    gallery: int = 12
    warning: str | None = None
    baseline: str | None = (
        None  # several runs: what they are tested against; an experiment, a variant, or a method such as init
    )
    resamples: int = 10_000  # several runs: test sets that the bootstrap draws


@dataclass
class ServeConfig:
    """The local page: where it listens, what it takes, and how many captions and corpus sentences it shows of a picture."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    max_megabytes: float = 20.0  # of an uploaded file
    captions: int = 3
    nearest: int = 5


@dataclass
class WandbConfig:
    """One run in W&B for every run folder (docs/dashboard.md)."""

    mode: str = "offline"  # offline | online | disabled
    project: str = "cgtgan"
    entity: str | None = None
    group: str | None = None  # null: the name of the sweep that started it (run.py)
    tags: list[str] = field(default_factory=list)  # beside experiment, corpus, backbone and reward, which every run has
    artifacts: bool = False  # the best checkpoint, and captions and scores, as artifacts
    finish_seconds: float = (
        10.0  # how long the end of a run waits for W&B to take the rest; with artifacts it may need more
    )


@dataclass
class Config:
    stage: str = "pipeline"
    name: str = "custom"  # the experiment; part of the run folder
    variant: str | None = None  # null: derived from the settings people sweep (see `variant_name`)
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int | None = None  # torch's threads on the CPU; null: torch's own choice
    workers: int | None = (
        None  # processes that decode images and split texts into tokens ahead of the encoder; null: by the cores
    )
    runs_dir: str = "runs"
    artifacts_dir: str = "artifacts"
    checkpoint: str | None = None  # evaluate, caption, serve: a checkpoint or a run folder; null: this run's own
    captions: str | None = (
        None  # evaluate: captions made elsewhere, in COCO's results format, scored in the place of a checkpoint
    )
    images: Any = None  # caption, and the examples of serve: a file or folder, or a list of them; -: standard input, a path a line
    output: str | None = (
        None  # folder of stage=caption (null: captions/ in the run folder), of captions=FILE (null: FILE_scores beside it)
    )
    runs: Any = None  # report: folders or glob patterns of the runs to compare, one or a list; null: this run alone
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    clip_backbone: ClipBackboneConfig = field(default_factory=ClipBackboneConfig)
    aggregation_t: AggregationConfig = field(default_factory=AggregationConfig)
    reward_weights: RewardWeightsConfig = field(default_factory=RewardWeightsConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    initialize: InitializeConfig = field(default_factory=InitializeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def image_paths(self) -> list[str]:
        """`images` as a list."""
        return [self.images] if isinstance(self.images, str) else list(self.images or [])

    @property
    def run_patterns(self) -> list[str]:
        """`runs`, or `report.runs`, as a list."""
        return [self.runs] if isinstance(self.runs, str) else list(self.runs or self.report.runs)


# ----------------------------------------------------------------------------------------------------------- run identity

# What may change between two starts of one run without changing its numbers.
_NOT_SCIENTIFIC = (
    *(
        "stage",
        "device",
        "threads",
        "workers",
        "runs_dir",
        "artifacts_dir",
        "checkpoint",
        "captions",
        "images",
        "output",
        "runs",
    ),
    *("report", "serve", "wandb", "evaluate", "decode", "caption"),
)
_NOT_SCIENTIFIC_FIELDS = (
    "variant",
    "initialize.checkpoint_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.max_minutes",
    "train.log_every",
    "train.accumulation",
    "train.precision",  # what it comes to is compared (stages/train.py)
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
    # places: what lies there is compared by content (stages/train.py)
    "dataset.root",
    "dataset.reader",
    "dataset.released",
    "corpus.path",
    "train.init_from",
)


def custom_parts(spec: str) -> tuple[str, str]:
    """(file or module, name) of own code, `path.py:name` or `package.module:name`; the name is empty where `spec` is not own code.

    A Windows drive (`C:`) is no separator.
    """
    source, _, name = spec.rpartition(":")
    is_code = source and all(part.isidentifier() for part in name.split("."))
    return (source, name) if is_code else (spec, "")


def is_custom(spec: str) -> bool:
    """Whether `spec` names own code, `path.py:name` or `package.module:name`, and not something built in."""
    return bool(custom_parts(spec)[1])


def custom_name(spec: str) -> str:
    """The name behind the colon: what tables and curves show. A built-in's own name as it is."""
    return custom_parts(spec)[1] or spec


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(full path, path with `*` for every optimizer, value) of every leaf field."""
    for f in fields(value):
        child, name = getattr(value, f.name), f"{path}.{f.name}" if path else f.name
        if is_dataclass(child):
            yield from leaves(child, name)
        else:
            yield name, f"*.{f.name}" if isinstance(value, OptimizerConfig) else name, child


def scientific_settings(cfg: Config) -> dict[str, Any]:
    """Field path -> value of every setting that changes a trained generator; two runs are one run if these agree."""
    every = {name: value for name, _, value in leaves(cfg)}
    terms = every.pop("reward_weights.terms")
    for key, term in terms.items():  # where the code lies is a place: its content is compared (training/rewards.py)
        every |= {f"reward_weights.terms.{custom_name(key)}.{name}": value for name, _, value in leaves(term)}
        every[f"reward_weights.terms.{custom_name(key)}.function"] = custom_name(term.function or key)
    return {
        k: v for k, v in every.items() if k.split(".")[0] not in _NOT_SCIENTIFIC and k not in _NOT_SCIENTIFIC_FIELDS
    }


# (cos_weight, clip_weight, max_weight) that conf/reward_weights/<name>.yaml stands for: other numbers show in the folder's name.
REWARD_PRESETS = {
    "clip_agg": (0.5, 0.0, 0.5),
    "clip_cos": (0.5, 1.0, 0.5),
    "mixed": (0.5, 0.5, 0.5),
    "naturalness_only": (0.5, 0.0, 0.0),
}


def _number(value: float) -> str:
    """As short as it can be without becoming another number: two settings never share a run folder."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def variant_name(cfg: Config) -> str:
    """The folder of a run below its experiment: the settings that people sweep, in full, whatever started the run."""
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
    parts += [f"noise{_number(cfg.initialize.noise_std)}"] if cfg.initialize.noise_std else []
    parts += [f"kl{_number(t.kl_weight)}"] if t.kl_weight else []
    parts += [] if t.baseline == "greedy" else [t.baseline]
    return "_".join(p.replace("/", "-") for p in parts)


def run_folder(cfg: Config) -> Path:
    """runs/<experiment>/<variant>/seed=<n>"""
    return Path(cfg.runs_dir) / cfg.name / variant_name(cfg) / f"seed={cfg.seed}"


def as_dict(value: Any) -> dict[str, Any]:
    """A plain dictionary of a config dataclass."""
    return asdict(value)
