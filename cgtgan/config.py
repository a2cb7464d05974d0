"""Every setting: its type, its default and the values it accepts. Imports no torch.

Hydra composes the YAML files against these dataclasses. The result is one `Config`, which `checks.validate` checks.
Below the stages nobody sees the whole `Config`: a part takes its own small dataclass or plain arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from cgtgan.accepted_values import (
    AT_LEAST_1,
    AT_LEAST_2,
    NOT_NEGATIVE,
    POSITIVE,
    PRECISION,
    SHARE,
    TOKENIZER,
    Check,
    is_device,
    is_temperature,
    is_web_address,
    one_of,
    setting,
)

STAGES = (
    *("preprocess", "aggregate", "initialize", "train", "evaluate", "caption", "report", "serve", "pipeline"),
    *("check", "download"),
)
SPLITS = ("train", "val", "test")
DATASET_KINDS = ("demo", "coco", "flickr30k", "nocaps", "folder", "custom")  # their records: data/dataset_kinds.py
DEFAULT_METRICS = ("bleu", "meteor", "rouge_l", "cider")
COCO_METRICS = (*DEFAULT_METRICS, "spice")  # "spice" needs jars that are not part of pycocoevalcap
# a metric that may be asked for -> the scores that it gives
METRICS = {
    "bleu": ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"),
    "meteor": ("METEOR",),
    "rouge_l": ("ROUGE-L",),
    "cider": ("CIDEr",),
    "spice": ("SPICE",),
    "clipscore": ("CLIPScore", "RefCLIPScore"),
    "diversity": ("Distinct-1", "Distinct-2", "Vocabulary", "Length", "Novel", "Self-CIDEr"),
}
RELEASED_SLIPS = ("text_order", "accumulation", "l1_target")
GAPS = ("none", "mean", "mean_std", "c3", "projection", "agreement")
BASELINE_ROWS = ("init", "mean_shift", "projection", "nearest", "consensus", "supervised", "human")
PROMPTS = ("none", "entity", "retrieval")

# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class DemoWorldConfig:
    """The drawn world: numbers of images and sentences (`corpus_sentences` per corpus), all drawn from `seed`."""

    seed: int = setting(0, NOT_NEGATIVE)
    train_images: int = setting(3000, AT_LEAST_1)
    val_images: int = setting(100, AT_LEAST_1)
    test_images: int = setting(300, AT_LEAST_1)
    references: int = setting(5, AT_LEAST_1)  # per image
    corpus_sentences: int = setting(8000, AT_LEAST_1)
    image_size: int = setting(48, ("32 to 512", lambda v: 32 <= v <= 512))  # pixels


@dataclass
class DatasetConfig:
    """Images, annotations and splits. Relative paths lie under `root`; null means the usual place of that `kind`."""

    name: str = "demo"
    kind: str = setting("demo", one_of(*DATASET_KINDS))
    reader: str = ""  # custom: the function that lists the images (data/custom_reader.py)
    root: str = "data"
    # folder: also a list of paths, tar files ({00000..00099}.tar), Parquet tables, a Hugging Face data set on disk
    images: str | None = None
    image_column: str | None = None  # folder: of a table with several columns of pictures
    # folder: of a table, the captions to score against; of tar files, the ending of those members (txt)
    caption_column: str | None = None
    train_annotations: str | None = None
    val_annotations: str | None = None
    test_annotations: str | None = None
    karpathy: str | None = None  # Karpathy's dataset_*.json, or a folder with the split lists *_{train,val,test}.txt
    references: str | None = None  # folder: one COCO-format caption file for all images
    val_fraction: float = setting(0.1, SHARE)  # folder: share of the images, by id, when no list is given
    test_fraction: float = setting(0.1, SHARE)
    max_images: int | None = setting(None, AT_LEAST_1)  # of every split, the first by id
    max_bad_images: int = setting(0, NOT_NEGATIVE)
    # decode JPEGs at 1/2, 1/4 or 1/8 of their size where that is at least twice CLIP's: faster, not exact
    jpeg_draft: bool = False
    released: Any = None  # the authors' embedding pickles instead of images: a file, a list of files, or a folder
    world: DemoWorldConfig = field(default_factory=DemoWorldConfig)


@dataclass
class CorpusConfig:
    """Raw text and how it is cleaned (METHOD: Cleaning)."""

    name: str = "demo"
    kind: str = setting(
        "demo", one_of("demo", "demo_external", "coco", "flickr30k", "gcc", "shutterstock", "text_file")
    )
    path: str | None = None
    column: str | None = None  # text_file: of a table (CSV, JSON Lines, Parquet), the one with the sentences
    rule: str = setting("none", one_of("coco", "flickr30k", "gcc", "shutterstock", "none"))
    released: bool = False  # clean exactly as the published program does, errors included
    max_sentences: int | None = setting(None, AT_LEAST_1)
    shuffle_seed: int = setting(1024, ("0 to 2**32-1", lambda v: 0 <= v < 2**32))


@dataclass
class DemoClipConfig:
    """The demo's two-tower CLIP and its training. `logit_scale` is fixed: a learned one leaves no modality gap.

    The defaults are version 0.1's; experiment=demo has its own. towers: `plain`, or `sharp`, which learn more from
    look-alikes. group: so many pictures of a batch look alike (data/demo_world.py). precision: of the image tower.
    """

    dim: int = setting(96, AT_LEAST_1)
    width: int = setting(32, AT_LEAST_1)
    text_layers: int = setting(2, AT_LEAST_1)
    pairs: int = setting(16000, AT_LEAST_1)
    batch_size: int = setting(128, AT_LEAST_2)
    steps: int = setting(900, AT_LEAST_1)
    lr: float = setting(2e-3, POSITIVE)
    logit_scale: float = setting(100.0, POSITIVE)
    seed: int = setting(0, NOT_NEGATIVE)
    towers: str = setting("plain", one_of("plain", "sharp"))
    group: int = setting(1, AT_LEAST_1)
    precision: str = setting("float32", PRECISION)


@dataclass
class ClipBackboneConfig:
    """Which CLIP. `kind: random` is OpenAI's architecture, small, with random weights: to try real data."""

    name: str = "demo"
    kind: str = setting("demo", one_of("openai", "huggingface", "open_clip", "random", "demo", "custom"))
    # openai: ViT-L/14 and the like or a .pt file; huggingface, open_clip: hub name or folder; custom: path.py:Name
    model: str = ""
    pretrained: str = ""  # open_clip: the weights' tag
    cache: str = "~/.cache/clip"
    tokenizer: str | None = None  # openai, random: another BPE file than the one in the package
    dtype: str = setting("float32", one_of("float32", "float16", "bfloat16"))
    image_batch_size: int = setting(64, AT_LEAST_1)
    text_batch_size: int = setting(256, AT_LEAST_1)
    image_shard: int = setting(256, AT_LEAST_1)  # rows per shard: written at once; processes share the work by shards
    text_shard: int = setting(4096, AT_LEAST_1)
    demo: DemoClipConfig = field(default_factory=DemoClipConfig)


@dataclass
class AggregationConfig:
    """`t`: temperature of the attention over the corpus (METHOD: Aggregation). stage=aggregate also takes a list."""

    t: Any = setting(100.0, ("a number above 0, or with stage=aggregate a list of them", is_temperature))  # noqa: RUF009
    top_k: int | None = setting(None, AT_LEAST_1)  # only the k nearest sentences count; null: all, as in the paper
    chunk_mb: int = setting(256, AT_LEAST_1)

    @property
    def temperatures(self) -> list[float]:
        """`t` as a list."""
        return [float(t) for t in (self.t if isinstance(self.t, list) else [self.t])]


@dataclass
class RewardTermConfig:
    """One reward term: it adds weight * scale * value to the semantic reward."""

    weight: float = 1.0
    scale: float | None = None  # null: the logit scale for a built-in term, 1 for a user's function
    function: str | None = None  # path.py:name or package.module:name; null: the built-in term of this name


@dataclass
class RewardWeightsConfig:
    """R = (1-clip)(cos_w*cos + (1-cos_w)*l1) + clip*clip; total = w*R + (1-w)*naturalness, w ramped to `max_weight`."""

    name: str = "clip_agg"
    cos_weight: float = setting(0.5, SHARE)
    clip_weight: float = setting(0.0, SHARE)
    # Further terms; cos, l1 or clip here get another weight. Each is a RewardTermConfig, or just its weight; 0 is out.
    # The type is loose because Hydra cannot add a key to a dictionary of dataclasses.
    terms: dict[str, Any] = field(default_factory=dict)
    pool: int = setting(1000, AT_LEAST_2)  # training images that the term `pmi` compares a caption with
    neighbours: int = setting(50, AT_LEAST_1)  # sentences nearest to an image that the term `consensus` compares with
    max_weight: float = setting(0.5, SHARE)
    delay_steps: int = setting(150, NOT_NEGATIVE)
    ramp_steps: int = setting(2350, NOT_NEGATIVE)

    def __post_init__(self) -> None:
        for name, term in self.terms.items():
            if isinstance(term, int | float):
                self.terms[name] = RewardTermConfig(weight=term)
            elif isinstance(term, dict) and term.keys() <= {f.name for f in fields(RewardTermConfig)}:
                self.terms[name] = RewardTermConfig(**term)  # anything else is refused by `checks.validate`


@dataclass
class GapConfig:
    """What is done about the gap between image and text embeddings wherever the generator reads one (method/gap.py)."""

    name: str = "none"
    kind: str = setting("none", one_of(*GAPS))
    t: float | None = setting(None, POSITIVE)  # projection: its temperature; null: aggregation_t.t


@dataclass
class PromptConfig:
    """Words that the generator reads before the prefix: nouns of the nearest corpus sentences, or these sentences
    (method/prompts.py).
    """

    name: str = "none"
    kind: str = setting("none", one_of(*PROMPTS))
    nearest: int = setting(4, AT_LEAST_1)  # sentences that are looked at
    at_least: int = setting(3, AT_LEAST_1)  # entity: how many of them must have a noun
    at_most: int = setting(10, AT_LEAST_1)  # entity: nouns in a prompt
    drop: float = setting(0.4, SHARE)  # entity: how often a noun of the text to rebuild is left out in initialisation
    # retrieval: Gaussian noise on the unit vector of the text to rebuild, for which sentences are looked for there
    noise_std: float = setting(0.2, NOT_NEGATIVE)
    tokens: int = setting(64, AT_LEAST_1)  # of every prompt: cut, or filled in front

    @property
    def length(self) -> int:
        """Positions that prompts take."""
        return 0 if self.kind == "none" else self.tokens


@dataclass
class GeneratorConfig:
    """Language model, mapper and prefix. `language_model: scratch` is a GPT-2 of these sizes with random weights."""

    name: str = "gpt2"
    language_model: str = "gpt2"
    tokenizer: str = setting("pretrained", TOKENIZER)
    vocab_size: int = setting(1000, ("260 or more (256 bytes and the special tokens)", lambda v: v >= 260))
    layers: int = setting(12, AT_LEAST_1)
    width: int = setting(768, AT_LEAST_2)
    heads: int = setting(12, AT_LEAST_1)
    mapper: str = setting("mlp", one_of("mlp", "transformer"))
    prefix_length: int = setting(10, AT_LEAST_1)
    clip_length: int = setting(10, AT_LEAST_1)
    mapper_layers: int = setting(8, AT_LEAST_1)
    mapper_heads: int = setting(8, AT_LEAST_1)
    max_length: int = setting(20, AT_LEAST_2)
    normalize_prefix: bool = False


@dataclass
class DiscriminatorConfig:
    """Encoder with a pooled output, and an MLP head of half its width. `encoder: scratch` as for the generator."""

    name: str = "roberta_base"
    encoder: str = "roberta-base"
    tokenizer: str = setting("pretrained", TOKENIZER)
    vocab_size: int = setting(1000, ("262 or more (256 bytes and the special tokens)", lambda v: v >= 262))
    layers: int = setting(12, AT_LEAST_1)
    width: int = setting(768, AT_LEAST_2)
    heads: int = setting(12, AT_LEAST_1)
    loss: str = setting("bce", one_of("bce", "pairwise"))  # pairwise: a sample against a real sentence (GAD)
    label_smoothing: float = setting(0.0, ("0 to 0.5, without it", lambda v: 0 <= v < 0.5))  # bce: of real sentences
    reward: str = setting("logit", one_of("logit", "probability", "binary", "rank"))


@dataclass
class DecodeConfig:
    """How captions are generated for evaluation and captioning. Training always samples at temperature 1."""

    name: str = setting("greedy", one_of("greedy", "beam", "sample", "best_of_n"))
    beam_size: int = setting(3, AT_LEAST_1)
    length_penalty: float = 1.0
    temperature: float = setting(1.0, POSITIVE)
    best_of: int = setting(8, AT_LEAST_1)  # best_of_n: samples added to the greedy caption; CLIP picks the nearest
    batch_size: int = setting(256, AT_LEAST_1)
    precision: str = setting("auto", PRECISION)
    # keys and values while captions are drawn, in training too: they grow with the captions, or lie in buffers of fixed
    # size; compiled: these, and the token step is compiled and captured on a GPU (docs/performance.md)
    cache: str = setting("growing", one_of("growing", "static", "compiled"))


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up, then constant, or linear to `final_lr_ratio` at the last step."""

    lr: float = setting(1e-5, POSITIVE)
    warmup_steps: int = setting(0, NOT_NEGATIVE)
    final_lr_ratio: float = setting(1.0, SHARE)
    weight_decay: float = setting(0.05, NOT_NEGATIVE)
    eps: float = setting(1e-8, POSITIVE)
    grad_clip: float = setting(1.0, ("0 (no clipping) or more", lambda v: v >= 0))
    released_adamw: bool = False  # AdamW of the old transformers library (METHOD, slip 12)
    released_decay: bool = False  # weight decay on the norms of GPT-2 and the mapper too (METHOD, slip 12)


@dataclass
class InitializeConfig:
    """A caption is reconstructed from its own CLIP text embedding (METHOD: Initialisation)."""

    steps: int | None = setting(None, AT_LEAST_1)  # null: `epochs` over the sentences
    epochs: int = setting(1, AT_LEAST_1)
    batch_size: int = setting(16, AT_LEAST_1)
    noise_std: float = setting(0.0, NOT_NEGATIVE)
    # raw: the noise is added to raw vectors; unit: normalise, add, normalise, as CapDec, ViECap and IFCap do
    noise: str = setting("raw", one_of("raw", "unit"))
    # text: a sentence from its own embedding. Or from the embedding of an unlabelled image, pseudo: a sentence that
    # CLIP finds for it, consensus: of the sentences nearest to it, those that agree most with the others
    pairs: str = setting("text", one_of("text", "pseudo", "consensus"))
    label_smoothing: float = setting(0.0, ("0 to 1, without it", lambda v: 0 <= v < 1))
    dropout: bool | None = None  # null: train.dropout
    precision: str = setting("float32", PRECISION)
    checkpoint_every: int = setting(500, AT_LEAST_1)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-5, warmup_steps=5000, eps=1e-6, grad_clip=0.0)
    )


@dataclass
class TrainConfig:
    """GAN training (METHOD: one step)."""

    steps: int | None = setting(None, AT_LEAST_1)  # null: `epochs` over the images
    epochs: int = setting(50, AT_LEAST_1)
    batch_size: int = setting(128, AT_LEAST_1)  # images per step
    num_samples: int = setting(5, AT_LEAST_1)  # sampled captions per image
    baseline: str = setting("greedy", one_of("greedy", "leave_one_out"))
    # each reward's advantages divided by their deviation, over an image's samples or over the step
    advantage_norm: str = setting("none", one_of("none", "group", "batch"))
    # what a caption's summed log-prob is divided by: its length, the step's mean length, or generator.max_length
    loss_norm: str = setting("caption", one_of("caption", "tokens", "constant"))
    ema: float | None = setting(None, ("0 to 1, without 1", lambda v: 0 <= v < 1))  # per step; null: no moving average
    use_discriminator: bool = True
    use_initialization: bool = True
    init_from: str | None = None  # our checkpoint, the authors' model.pt or a hub name, instead of `initialize`
    reward_scale: float | None = setting(None, POSITIVE)  # null: the backbone's own exp(logit_scale)
    kl_weight: float = setting(0.0, NOT_NEGATIVE)  # KL penalty towards the initial generator
    kl: str = setting("k3", one_of("k1_reward", "k2", "k3"))  # which divergence it pulls: METHOD, item 43
    dropout: bool = False  # dropout while sampling and in the discriminator, as in the released code (METHOD, slip 8)
    released: list[str] = field(default_factory=list)  # of RELEASED_SLIPS (METHOD, slips 4, 11, 13)
    accumulation: int = setting(1, AT_LEAST_1)  # parts into which a step's images are split: less memory, the same step
    precision: str = setting("auto", PRECISION)
    memory_gb: float | None = setting(None, POSITIVE)  # for the activations of a step; null: 1, or a third of a GPU
    gradient_checkpointing: bool = False  # for language models whose activations do not fit
    watch_kl: bool = True  # log the KL divergence from the initial generator, which then stays in memory
    stop_on_collapse: bool = False
    validate_every: int | None = setting(None, AT_LEAST_1)  # null: once per epoch
    checkpoint_every: int = setting(200, AT_LEAST_1)
    checkpoint_minutes: float | None = setting(10.0, POSITIVE)
    max_minutes: float | None = setting(None, POSITIVE)  # then a checkpoint and a stop; the same command continues
    log_every: int = setting(10, AT_LEAST_1)
    generator_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup_steps=150))
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class SupervisedConfig:
    """How the row `supervised` is trained: as `initialize` without its noise, but for what is set here."""

    steps: int | None = setting(None, AT_LEAST_1)  # null: as many as initialisation and GAN training have together
    # the step with the highest CIDEr on the validation images is kept; null: nothing is validated, the last is kept
    validate_every: int | None = setting(None, AT_LEAST_1)
    lr: float | None = setting(None, POSITIVE)  # null: initialize.optimizer.lr
    label_smoothing: float | None = setting(None, ("0 to 1, without it", lambda v: 0 <= v < 1))
    dropout: bool | None = None  # null: train.dropout


@dataclass
class EvaluateConfig:
    """Which checkpoint of the run is scored, on which split, next to which baselines."""

    which: str = setting("best", one_of("best", "last"))
    split: str = setting("test", one_of("val", "test"))
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))
    # captions per image for self-CIDEr, a measure of diversity
    self_cider_samples: int = setting(0, ("0 (none) or 2 or more", lambda v: v == 0 or v >= 2))
    references: str | None = None  # with captions=FILE: a file in COCO's format instead of the split's references
    baselines: list[str] = field(default_factory=list)  # of BASELINE_ROWS
    projection_t: float | None = setting(None, POSITIVE)  # temperature of DeCap's projection; null: aggregation_t.t
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)


@dataclass
class CaptionConfig:
    """What stage=caption writes about the user's pictures."""

    num: int | None = setting(
        None, AT_LEAST_1
    )  # captions per picture, ranked by CLIP, with scores; null: one by `decode`
    format: str = setting("json", one_of("json", "csv"))


@dataclass
class ReportConfig:
    """`warning` is a banner on the page. `runs` is another name of the setting `runs`."""

    runs: list[str] = field(default_factory=list)
    output: str | None = None  # the page's file
    gallery: int = setting(12, NOT_NEGATIVE)
    warning: str | None = None
    baseline: str | None = None  # what several runs are compared with: an experiment, a variant or a method
    # of several runs: a row, variant, experiment or method -> the name of its row
    labels: dict[str, str] = field(default_factory=dict)
    resamples: int = setting(10_000, ("100 or more", lambda v: v >= 100))  # bootstrap samples of the test set


@dataclass
class ServeConfig:
    """The local page: its address, its limits, and how many captions and corpus sentences it shows per picture."""

    host: str = setting("127.0.0.1", ("an address or a name of this machine", lambda v: bool(v.strip())))
    port: int = setting(8000, ("0 (any free one) to 65535", lambda v: 0 <= v <= 65535))
    max_megabytes: float = setting(20.0, POSITIVE)  # of an uploaded file
    request_seconds: float = setting(60.0, POSITIVE)  # in which a request must have arrived whole
    captions: int = setting(3, AT_LEAST_1)
    nearest: int = setting(5, AT_LEAST_1)


@dataclass
class WandbConfig:
    """One run in W&B for every run folder (docs/dashboard.md)."""

    mode: str = setting("offline", one_of("offline", "online", "disabled"))
    project: str = "cgtgan"
    entity: str | None = None
    group: str | None = None  # null: the name of the sweep that started it
    tags: list[str] = field(default_factory=list)  # in addition to experiment, corpus, backbone and reward
    artifacts: bool = False  # upload the best checkpoint, captions and scores as artifacts
    finish_seconds: float = setting(10.0, POSITIVE)  # how long the end of a run waits for the upload


@dataclass
class Config:
    stage: str = setting("pipeline", one_of(*STAGES))
    name: str = "custom"  # the experiment; part of the run folder
    variant: str | None = None  # null: derived from the settings that people sweep (run_identity.py)
    seed: int = setting(0, ("0 to 2**31-1", lambda v: 0 <= v < 2**31))
    device: str = setting("auto", ("auto, cpu, cuda or cuda:N", is_device))
    threads: int | None = setting(None, AT_LEAST_1)  # torch's threads on the CPU; null: torch's own choice
    workers: int | None = setting(None, NOT_NEGATIVE)  # processes that read images and texts ahead; null: by the cores
    runs_dir: str = "runs"
    artifacts_dir: str = "artifacts"
    # fetch what is missing before a stage starts; null: ask once at a terminal, elsewhere say the command
    download: bool | None = None
    mirror: str | None = setting(None, ("http://... or https://...", is_web_address))  # runtime/sources.py
    checkpoint: str | None = None  # evaluate, caption, serve: a checkpoint or a run folder; null: this run's own
    # evaluate: files in COCO's results format, scored instead of a checkpoint: a name or pattern, or a list of them
    captions: Any = None
    # caption, serve: a file, a folder or a list; -: standard input, one path per line; captions=FILE: their pictures
    images: Any = None
    # caption: a folder, null: captions/ in the run folder; captions=FILE: a folder, null: FILE_scores; report: a folder
    output: str | None = None
    runs: Any = None  # report: folders or glob patterns of the runs to compare, one or a list; null: this run alone
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    clip_backbone: ClipBackboneConfig = field(default_factory=ClipBackboneConfig)
    aggregation_t: AggregationConfig = field(default_factory=AggregationConfig)
    reward_weights: RewardWeightsConfig = field(default_factory=RewardWeightsConfig)
    gap: GapConfig = field(default_factory=GapConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    # set by the program: `decode` and its fields that the command line names; they win over a checkpoint's own
    typed_decode: list[str] = field(default_factory=list)
    several: bool = False  # set by the program: whether this is one run of a multirun, which prints no tables
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
    def caption_patterns(self) -> list[str]:
        """`captions` as a list."""
        return [self.captions] if isinstance(self.captions, str) else list(self.captions or [])

    @property
    def run_patterns(self) -> list[str]:
        """`runs`, or `report.runs`, as a list."""
        return [self.runs] if isinstance(self.runs, str) else list(self.runs or self.report.runs)


# ---------------------------------------------------------------------------------------------------------------- tools


def custom_parts(spec: str) -> tuple[str, str]:
    """(file or module, name) of a user's code, `path.py:name` or `package.module:name`. Else the name is empty.

    A Windows drive (`C:`) is no separator.
    """
    source, _, name = spec.rpartition(":")
    is_code = source and all(part.isidentifier() for part in name.split("."))
    return (source, name) if is_code else (spec, "")


def is_custom(spec: str) -> bool:
    """Whether `spec` names a user's code, `path.py:name` or `package.module:name`, and not something built in."""
    return bool(custom_parts(spec)[1])


def custom_name(spec: str) -> str:
    """The name behind the colon, which tables and curves show. The name of something built in stays as it is."""
    return custom_parts(spec)[1] or spec


def leaves(part: Any, path: str = "") -> Iterator[tuple[str, Any, Check | None]]:
    """(path, value, check or None) of every field that is not itself a dataclass."""
    for f in fields(part):
        value, name = getattr(part, f.name), f"{path}.{f.name}" if path else f.name
        if is_dataclass(value):
            yield from leaves(value, name)
        else:
            yield name, value, f.metadata.get("check")


def as_dict(value: Any) -> dict[str, Any]:
    """A plain dictionary of a config dataclass."""
    return asdict(value)
