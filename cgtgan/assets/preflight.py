"""Everything that a run needs from outside, looked for before anything is made: all that is missing, at once.

Nothing is opened that takes long, and torch is imported only for the authors' files and for stored embeddings in the
place of pictures. What a file holds is checked by the stage that reads it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cgtgan.assets.fetching import fetch_captions, fetch_clip, fetch_gcc, fetch_images, fetch_spice
from cgtgan.assets.splits import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.config import SPLITS, Config
from cgtgan.data.annotated_images import image_folders, picture_names, split_files
from cgtgan.data.archive_listing import missing_pictures
from cgtgan.data.corpora import CORPUS_FROM, corpus_path, is_beside_its_images, read_raw
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.user_files import first_bytes, missing_file
from cgtgan.errors import UserError
from cgtgan.evaluation.java import NO_JAVA, find_java, missing_spice_jars
from cgtgan.models.backbone_identity import archive_path, missing_archive
from cgtgan.models.hub import CHECKPOINT_FILES, cached_snapshot, fetch_model, how_to_fetch, is_hub_name, missing_model
from cgtgan.models.weights import refuse_pointers
from cgtgan.runtime.download import Fetcher
from cgtgan.runtime.sources import CAPTION_FILES, CLIP_ARCHIVES, COCO_IMAGES

BYTES_PER_CAPTION = 500  # of a corpus file, or fewer: for the least room that its embeddings take
LEAST_DIM = 512  # numbers of an embedding
_WITH_GENERATOR = {"init", "mean_shift", "projection", "supervised"}
_BUILT_IN = ("scratch", "corpus", "pretrained")


@dataclass(frozen=True)
class Missing:
    """`fetch` brings it; None: by hand, as the sentence says. stops: the run cannot do without it.

    name: what it is where the sentence may change from one look to the next; empty: the sentence.
    """

    sentence: str
    fetch: Callable[[Fetcher], object] | None = None
    stops: bool = True
    name: str = ""

    @property
    def key(self) -> str:
        return self.name or self.sentence


@dataclass(frozen=True)
class Needs:
    """What the stages of a run read from outside."""

    splits: tuple[str, ...] = ()
    corpus: bool = False
    clip: bool = False
    language_model: bool = False
    discriminator: bool = False
    scores: bool = False

    @classmethod
    def of(cls, cfg: Config) -> Needs:
        """Of `cfg.stage`; of the stages check and download: of the pipeline, or of scoring a checkpoint."""
        stage, baselines = cfg.stage, set(cfg.evaluate.baselines)
        if stage in ("check", "download"):
            stage = "evaluate" if cfg.checkpoint else "pipeline"
        if stage in ("preprocess", "aggregate"):
            return cls(SPLITS, corpus=True, clip=True)
        if stage == "initialize":
            reads_images = cfg.initialize.pairs != "text" or cfg.gap.kind != "none"
            return cls(("train",) if reads_images else (), corpus=True, clip=True, language_model=True)
        if stage in ("train", "pipeline"):
            splits = SPLITS if stage == "pipeline" else ("train", "val")
            return cls(splits, True, True, True, cfg.train.use_discriminator, scores=stage == "pipeline")
        if stage == "evaluate" and cfg.captions:
            return cls(clip="clipscore" in cfg.evaluate.metrics)
        if stage == "evaluate":
            splits = {cfg.evaluate.split, *(["train"] if baselines & {"mean_shift", "consensus", "supervised"} else [])}
            if "supervised" in baselines and cfg.evaluate.supervised.validate_every:
                splits.add("val")
            # a generator that was made before holds its language model
            is_made = any(Path(cfg.artifacts_dir, "generator_initial").glob("*/generator.json"))
            language_model = bool(baselines & _WITH_GENERATOR) and not is_made
            return cls(tuple(sorted(splits)), bool(baselines), True, language_model, scores=True)
        return cls()


def missing_inputs(cfg: Config) -> list[Missing]:
    """What is not there for `cfg.stage`, each once; the authors' files count in the place of what they replace."""
    needs = Needs.of(cfg)
    if cfg.dataset.released:
        needs = _without_released(cfg, needs)
    parts = (_clip(cfg), _models(cfg, needs), _images(cfg, needs.splits), _corpus(cfg, needs), _room(cfg, needs))
    wanted = (needs.clip, True, needs.splits, needs.corpus, needs.clip)
    missing = [one for part, is_wanted in zip(parts, wanted, strict=True) if is_wanted for one in part]
    missing += [*_scored_checkpoint(cfg), *_java(cfg)] if needs.scores else []
    return list({one.sentence: one for one in missing}.values())


def _without_released(cfg: Config, needs: Needs) -> Needs:
    """The needs that `dataset.released` leaves: its files are read once, by content."""
    from cgtgan.assets.released import released_corpus, released_sentence_embeddings, released_split

    ws = Workspace(cfg)
    splits = tuple(name for name in needs.splits if released_split(ws, name) is None)
    corpus = needs.corpus and released_corpus(ws) is None
    texts = needs.corpus and released_sentence_embeddings(ws) is None
    trains = needs.discriminator or cfg.stage in ("train", "pipeline", "check", "download")
    clip = trains or bool(splits) or texts or "clipscore" in cfg.evaluate.metrics or cfg.decode.name == "best_of_n"
    return Needs(splits, corpus, needs.clip and clip, needs.language_model, needs.discriminator, needs.scores)


# --------------------------------------------------------------------------------------------------------------- models


def _clip(cfg: Config) -> Iterator[Missing]:
    config = cfg.clip_backbone
    if config.kind in ("openai", "random") and not _is_installed("clip"):
        yield Missing("clip_backbone: OpenAI's clip package is not installed; run: pip install 'cgtgan[clip]'")
    if config.kind == "openai" and (sentence := missing_archive(config)):
        source = CLIP_ARCHIVES.get(config.model)
        yield Missing(sentence, fetch_clip(source, archive_path(config)) if source else None)
    if config.kind == "huggingface":
        yield from _model(config.model, "clip_backbone.model")
    if config.kind == "open_clip" and not _is_installed("open_clip"):
        yield Missing("clip_backbone=open_clip needs the package open_clip_torch: pip install open_clip_torch")
    if config.tokenizer and not Path(config.tokenizer).expanduser().is_file():
        yield Missing(
            f"clip_backbone.tokenizer={config.tokenizer} is missing: it is OpenAI's bpe_simple_vocab_16e6.txt.gz"
        )


def _is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _models(cfg: Config, needs: Needs) -> Iterator[Missing]:
    g, d = cfg.generator, cfg.discriminator
    if needs.language_model and cfg.train.init_from:
        yield from _checkpoint(str(cfg.train.init_from))
    elif needs.language_model:
        yield from _language_model(g.language_model, "generator.language_model", g.tokenizer, "generator.tokenizer")
    if needs.discriminator:
        yield from _language_model(d.encoder, "discriminator.encoder", d.tokenizer, "discriminator.tokenizer")


def _language_model(model: str, field: str, tokenizer: str, tokenizer_field: str) -> Iterator[Missing]:
    if model not in _BUILT_IN:
        yield from _model(model, field, tokenizer=tokenizer == "pretrained")
    if tokenizer not in _BUILT_IN:
        yield from _model(tokenizer, tokenizer_field, weights=False)


def _model(name: str, field: str, *, weights: bool = True, tokenizer: bool = True) -> Iterator[Missing]:
    folder = Path(name).expanduser()
    sentence = missing_model(name, field, weights=weights, tokenizer=tokenizer)
    try:
        if folder.is_dir():
            refuse_pointers(folder, f"{field}={name}")
    except UserError as error:
        sentence = str(error)
    on_hub = is_hub_name(name) and not folder.exists()
    if sentence:
        yield Missing(sentence, (lambda _: fetch_model(name, field)) if on_hub else None)


def _checkpoint(name: str) -> Iterator[Missing]:
    """`train.init_from`: a file, a folder, or a hub's owner/name."""
    if Path(name).expanduser().exists() or cached_snapshot(name, ("generator.json", "model.pt")):
        return
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        sentence = f"train.init_from={name} is neither a file or folder nor in the hub's cache: {how_to_fetch(name)}"
        yield Missing(sentence, lambda _: fetch_model(name, "train.init_from", files=CHECKPOINT_FILES))
    else:
        yield Missing(
            f"train.init_from={name} does not exist: name a run folder, a checkpoint or the authors' model.pt"
        )


def _scored_checkpoint(cfg: Config) -> Iterator[Missing]:
    if cfg.checkpoint and not Path(cfg.checkpoint).expanduser().exists():
        yield Missing(
            f"checkpoint={cfg.checkpoint}: no checkpoint is found there; name a run folder, a checkpoint or the "
            "authors' model.pt"
        )


# ----------------------------------------------------------------------------------------------------- images, captions


def _images(cfg: Config, splits: tuple[str, ...]) -> Iterator[Missing]:
    listing = KINDS[cfg.dataset.kind].listing
    if listing == "folder":
        yield from _folder(cfg)
    elif listing == "annotations" and not KINDS[cfg.dataset.kind].drawn:
        absent = list(_caption_files(cfg, splits))
        yield from absent
        yield from _pictures(cfg, splits, listed=not absent)


def _folder(cfg: Config) -> Iterator[Missing]:
    """A user's own pictures: there is a folder with some, and the files that go with it."""
    config, root = cfg.dataset, Path(cfg.dataset.root).expanduser()
    if problem := missing_pictures(root / (config.images or "")):
        yield Missing(problem)
    if config.karpathy is not None and not (root / config.karpathy).is_dir():
        yield Missing(str(missing_file(root / config.karpathy, "dataset.karpathy")))
    if config.references is not None and not (root / config.references).is_file():
        yield Missing(str(missing_file(root / config.references, "dataset.references")))


def _caption_files(cfg: Config, splits: tuple[str, ...]) -> Iterator[Missing]:
    config, root, kind = cfg.dataset, Path(cfg.dataset.root).expanduser(), KINDS[cfg.dataset.kind]
    absent: dict[Path, str] = {}
    for name in splits:
        try:
            absent |= {file: field for file, field in split_files(config, name, root) if not file.exists()}
        except UserError as error:
            yield Missing(str(error))
    own_places = (config.karpathy, config.train_annotations, config.val_annotations, config.test_annotations)
    usual = root / "annotations" / f"dataset_{config.kind}.json"  # Karpathy's, which has all splits
    has_usual = own_places == (None,) * 4 and usual.name in CAPTION_FILES
    if absent and has_usual and len(absent) == len(splits):  # one line for the files of one data set
        names = ", ".join(file.name for file in absent)
        no_captions = f"{next(iter(absent)).parent} has no captions and splits ({names})"
        sentence = f"{no_captions}: get them from {kind.annotations_from}, or set dataset.root"
        yield Missing(sentence, fetch_captions(usual))
        return
    for file, field in absent.items():
        target = file if file.name in CAPTION_FILES else usual if has_usual else None
        fetch = fetch_captions(target) if target else None
        yield Missing(str(missing_file(file, field, kind.annotations_from)), fetch)


def _pictures(cfg: Config, splits: tuple[str, ...], *, listed: bool) -> Iterator[Missing]:
    """Folders with fewer pictures than the data set has are compared with the split (listed), which takes seconds."""
    config, root, kind = cfg.dataset, Path(cfg.dataset.root).expanduser(), KINDS[cfg.dataset.kind]
    scarce: dict[str, Path] = {}
    for name in splits:
        for folder, place in zip(kind.image_folders[name], image_folders(config, name, root), strict=True):
            if folder not in scarce and len(picture_names(place)) < kind.pictures.get(folder, 1):
                scarce[folder] = place
    wanted, ws = [name for name in splits if scarce.keys() & set(kind.image_folders[name])], Workspace(cfg)
    absent = "" if listed else _empty_folders(list(scarce.values()), str(kind.images_from))
    for name in wanted if listed else ():
        try:
            dataset_split(ws, name)
        except UserError as error:
            absent = str(error)
            break
    if absent:
        archives = {COCO_IMAGES[folder]: place for folder, place in scarce.items() if folder in COCO_IMAGES}
        yield Missing(absent, fetch_images(archives, kind.pictures) if archives else None, name="images")


def _empty_folders(places: list[Path], where: str) -> str:
    empty = [str(place) for place in places if not picture_names(place)]
    return f"no picture is in {' and '.join(empty)}: get them from {where}, or set dataset.images" if empty else ""


def _corpus(cfg: Config, needs: Needs) -> Iterator[Missing]:
    config, root = cfg.corpus, Path(cfg.dataset.root).expanduser()
    if config.kind.startswith("demo"):
        return
    try:
        if is_beside_its_images(config, cfg.dataset):
            if "train" not in needs.splits:
                yield from _caption_files(cfg, ("train",))
            return
        path = corpus_path(config, root)
        if path.is_file():
            first_bytes(path, "corpus.path")  # a web page or an archive in its place
            if config.kind == "text_file" and config.column is None:
                next(read_raw(config.kind, path), None)  # a table whose column with sentences is not named
            return
    except UserError as error:
        yield Missing(str(error))
        return
    fetch = fetch_gcc(path) if config.kind == "gcc" else fetch_captions(path) if path.name in CAPTION_FILES else None
    yield Missing(str(missing_file(path, "corpus.path", CORPUS_FROM.get(config.kind))), fetch)


# ------------------------------------------------------------------------------------------------------- Java, the disk


def _java(cfg: Config) -> Iterator[Missing]:
    """The other metrics are computed without it: it stops nothing."""
    if KINDS[cfg.dataset.kind].listing == "folder" and cfg.dataset.references is None:
        return  # nothing to score against
    if {"bleu", "meteor", "rouge_l", "cider", "spice"}.intersection(cfg.evaluate.metrics) and find_java() is None:
        yield Missing(f"METEOR and the tokenizer of all metrics: {NO_JAVA}", stops=False)
    if "spice" in cfg.evaluate.metrics and (sentence := missing_spice_jars()):
        yield Missing(sentence, fetch_spice, stops=False)


def _room(cfg: Config, needs: Needs) -> Iterator[Missing]:
    """Less room than the embeddings take at least, without those that are there already."""
    kind, path = KINDS[cfg.dataset.kind], Path(cfg.corpus.path or "").expanduser()
    rows = sum(kind.pictures.values()) if needs.splits == SPLITS and cfg.dataset.max_images is None else 0
    if needs.corpus and cfg.corpus.path and path.is_file() and cfg.corpus.max_sentences is None:
        rows += path.stat().st_size // BYTES_PER_CAPTION
    store = Path(cfg.artifacts_dir)
    there = sum(
        file.stat().st_size
        for name in ("image_embeddings", "sentence_embeddings")
        for file in (store / name).rglob("*.safetensors")
    )
    above = next(place for place in (store.absolute(), *store.absolute().parents) if place.exists())
    free, takes = shutil.disk_usage(above).free, 2 * rows * LEAST_DIM - there  # float16
    if takes > free:
        yield Missing(
            f"artifacts_dir={cfg.artifacts_dir}: the embeddings take {takes / 1e9:,.1f} GB or more and its disk has "
            f"{free / 1e9:,.1f} GB free: make room, or set artifacts_dir to another disk"
        )
