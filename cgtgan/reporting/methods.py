"""The rows of a comparison, by their name in run folders and settings: the captioner, its baselines, and the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from cgtgan.config import Config
from cgtgan.run_identity import scientific_settings


class Method(NamedTuple):
    """A row of the comparison: its name on the page, what it learns from, and its part of the table (tables.PARTS)."""

    title: str
    note: str
    part: str = ""


FROM_FILE = "captions"  # the method of captions made elsewhere
SYSTEMS = ("cgtgan", FROM_FILE)  # the rows that a comparison is about; the others are their baselines and bounds
# The order is the table's.
METHODS = {
    "init": Method("Initialisation only", "text only; reads the image embedding"),
    "mean_shift": Method("+ mean shift", "text only; image embedding moved by the mean modality gap"),
    "nearest": Method("Nearest sentence", "the corpus sentence nearest to the image"),
    "consensus": Method("Consensus sentence", "of the 200 nearest sentences, the one that agrees most with them"),
    "projection": Method("Projection (as DeCap)", "text only; reads the aggregated embedding"),
    "cgtgan": Method("CgT-GAN", "images and sentences, unpaired"),
    FROM_FILE: Method("Captions made elsewhere", ""),
    "supervised": Method("Supervised", "the same generator trained on pairs", "bound"),
    "human": Method("Human", "a fresh sentence of the grammar", "bound"),
}


def method_note(method: str, settings: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]) -> str:
    """What the row says of a method's source and training; `trainings`: as `Run.training` gives it, of every seed."""
    given, note = with_defaults(settings), METHODS[method].note
    if not given["train.use_initialization"]:
        note = note.replace("text only", "untrained")
    elif given["initialize.pairs"] != "text":
        note = note.replace("text only", "sentences and the images that CLIP finds for them")
    return ", ".join(filter(None, (note, training_note(method, settings, trainings))))


def training_note(method: str, settings: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]) -> str:
    """'3,000 updates in 45 s, step 1,200 kept', over the seeds from the lowest to the highest; empty where unknown."""
    trained = [training for training in trainings if training]
    if not trained:
        return ""
    updates, kept = ([each[key] for each in trained] for key in ("updates", "kept_step"))
    note = f"{_range([f'{n:,}' for n in sorted(updates)])} updates"
    if all(each.get("seconds") is not None for each in trained):
        note += f" in {_range([_seconds(each) for each in sorted(t['seconds'] for t in trained)])} s"
    if method == "cgtgan" and with_defaults(settings)["train.use_initialization"]:
        note += " after initialisation"
    return note + (f", step {_range([f'{n:,}' for n in sorted(kept)])} kept" if kept != updates else "")


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _range(texts: Sequence[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


# Scores of the paper (ViT-L/14, greedy, Karpathy's test images); docs/reproduction.md has the same table.
COLUMNS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
# (test images, corpus): figures as printed, x 100. Where they differ, the images for training were the corpus' own.
FIGURES = {
    ("coco", "coco"): (30.3, 26.9, 54.5, 108.1, 20.5),
    ("flickr30k", "flickr30k"): (24.1, 22.6, 48.2, 64.9, 16.1),
    ("flickr30k", "coco"): (17.3, 19.6, 43.9, 47.5, 12.9),
    ("coco", "flickr30k"): (15.2, 19.4, 40.9, 58.7, 13.4),
}


# Parts of the settings that must be the paper's where its row stands, and the fields among them that may differ:
# names, the size of a batch's parts, and the switches for habits of the released program (METHOD, slips).
_PAPERS = (
    "aggregation_t.",
    "reward_weights.",
    "generator.",
    "discriminator.",
    "initialize.",
    "train.",
    "gap.",
    "prompt.",
    "corpus.max_sentences",
)
_FREE = ("reward_weights.name", "train.validate_every", "train.dropout", "train.released")
_FREE_ENDS = (".name", ".released_adamw", ".released_decay")
_WEIGHTS = ("generator.language_model", "discriminator.encoder")  # a hub's name or a folder with such weights


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run folder; one that the version which wrote it did not have counts as its default."""
    return {**scientific_settings(Config()), **settings}


def has_papers_settings(settings: Mapping[str, Any]) -> bool:
    """Whether the reward, the models, the temperature and the training are those of the paper's rows."""
    paper, given = scientific_settings(Config()), with_defaults(settings)
    for field, value in given.items():
        if not field.startswith(_PAPERS) or field in _FREE or field.endswith(_FREE_ENDS):
            continue
        if field in _WEIGHTS:
            value = PurePath(str(value)).name
        if field not in paper or value != paper[field]:
            return False
    return True


def reward_title(settings: Mapping[str, Any]) -> list[str]:
    """What a run was rewarded with, from its numbers and not from its preset's name: ['CLIP-agg', 'no naturalness']."""
    given = with_defaults(settings)
    share = given["reward_weights.max_weight"]
    parts = [_semantics(given)] if share else ["no semantics"]
    if share == 1 or not given["train.use_discriminator"]:
        return [*parts, "no naturalness"]
    return parts if share in (0, 0.5) else [*parts, f"semantics {share:g}"]


def _semantics(settings: Mapping[str, Any]) -> str:
    from cgtgan.method.reward_terms import paper_weights  # torch, which a comparison of files does without

    weights = paper_weights(settings["reward_weights.cos_weight"], settings["reward_weights.clip_weight"])
    prefix, end = "reward_weights.terms.", ".weight"
    names = [f.removeprefix(prefix).removesuffix(end) for f in settings if f.startswith(prefix) and f.endswith(end)]
    weights |= {name: settings[f"{prefix}{name}{end}"] for name in names}
    scales = {name: settings.get(f"{prefix}{name}.scale") for name in names}
    weights = {name: round(weight, 6) for name, weight in weights.items()}
    cos, l1, clip = (weights.pop(name) if scales.get(name) is None else 0.0 for name in ("cos", "l1", "clip"))
    share = "" if cos == l1 else " cosine" if not l1 else " L1" if not cos else f" (cosine {cos / (cos + l1):.3g})"
    terms = {f"CLIP-agg{share}": round(cos + l1, 6), "CLIP-cos": clip}
    terms |= {name if scales[name] is None else f"{name} x{scales[name]:g}": weight for name, weight in weights.items()}
    terms = {name: weight for name, weight in terms.items() if weight}
    if terms == {"CLIP-agg": 0.5, "CLIP-cos": 0.5}:
        return "CLIP-agg and CLIP-cos"
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in terms.items()) or "no semantics"


def published_scores(settings: Mapping[str, Any], split: str, *, trained_here: bool) -> dict[str, float] | None:
    """The paper's scores, as fractions, for a run with these `settings`; None where they are not the paper's.

    Not the paper's: another reward, model, training or backbone, another split or a part of it, and a transfer row
    whose run was trained here.
    """
    dataset, corpus = settings["dataset.name"], settings["corpus.name"]
    figures = FIGURES.get((dataset, corpus))
    backbone = (settings["clip_backbone.kind"], settings["clip_backbone.model"])
    whole_test_split = split == "test" and settings["dataset.max_images"] is None
    transfer_trained_here = dataset != corpus and trained_here
    if not has_papers_settings(settings):
        return None
    if figures is None or backbone != ("openai", "ViT-L/14") or not whole_test_split or transfer_trained_here:
        return None
    return {column: figure / 100 for column, figure in zip(COLUMNS, figures, strict=True)}
