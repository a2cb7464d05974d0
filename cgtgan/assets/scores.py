"""Score files: what captions are scored against, which scores are there already, and writing new ones."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgtgan.assets.domains import domain_scores, domains_of, merged_domains
from cgtgan.assets.pictures import picture_embeddings, pictures_of
from cgtgan.assets.splits import dataset_split
from cgtgan.assets.workspace import Workspace
from cgtgan.config import COCO_METRICS, as_dict, custom_name
from cgtgan.data.annotations import as_number
from cgtgan.errors import InputError, UserError
from cgtgan.evaluation.coco_files import id_list, load_named_references, load_references, load_results, save_results
from cgtgan.evaluation.java import find_java
from cgtgan.evaluation.metrics import ExtraMetric, JavaSettings, Scores, score_many
from cgtgan.evaluation.own_metrics import own_metric_fingerprints
from cgtgan.evaluation.records import merged_counts, merged_inputs, merged_scores
from cgtgan.runtime.artifacts import Embeddings, file_fingerprint, fingerprint, read_json, write_json

if TYPE_CHECKING:  # the scorers of pycocoevalcap start without torch
    from torch import Tensor


@dataclass(frozen=True)
class ScoredCaptions:
    """Of each method: one caption per image, the samples of each image for self-CIDEr where some were drawn, and how
    its generator was trained where that is known.
    """

    captions: dict[str, dict[Any, str]]
    samples: dict[str, dict[Any, list[str]]]
    training: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, methods: Sequence[str]) -> ScoredCaptions:
        """Those of some methods."""
        drawn = {method: self.samples[method] for method in methods if method in self.samples}
        training = {method: self.training[method] for method in methods if method in self.training}
        return ScoredCaptions({method: self.captions[method] for method in methods}, drawn, training)


@dataclass(frozen=True)
class NoveltyCorpus:
    """Captions are novel if they are not among `sentences`; None, with the reason where they were needed, if these are
    not available.
    """

    sentences: Sequence[str] | None = None
    fingerprint: str | None = None
    problem: str | None = None


def references_of(ws: Workspace) -> dict[Any, list[str]]:
    """References of the split, or of `evaluate.references`; an image without any has an empty list.

    Empty for a split without any, if all metrics do without: else `InputError`.
    """
    split, given = ws.cfg.evaluate.split, ws.cfg.evaluate.references
    if given is not None:
        return dict(load_references(Path(given).expanduser()))
    images = dataset_split(ws, split)
    if not images.references:
        need = [metric for metric in ws.cfg.evaluate.metrics if metric in COCO_METRICS]
        need += ["self-CIDEr"] if ws.cfg.evaluate.self_cider_samples else []
        if not need:
            return {}
        raise InputError(
            f"the {split} split has no references to score {', '.join(need)} against: set dataset.references, or "
            "evaluate.metrics=[clipscore,diversity]"
        )
    # pictures of a folder that its reference file does not list have names for ids
    numbered = all(isinstance(i, int) for i in images.references)
    return images.references | {as_number(i) if numbered else i: [] for i in images.bare}


def image_names_of(ws: Workspace) -> dict[Any, str]:
    """File names of the images that `references_of` has, where they are known."""
    if ws.cfg.evaluate.references is not None:
        return dict(load_named_references(Path(ws.cfg.evaluate.references).expanduser())[1])
    return {image.image_id: str(image.path) for image in dataset_split(ws, ws.cfg.evaluate.split).images}


def named_pictures(ws: Workspace, ids: Iterable[Any]) -> dict[Any, Path]:
    """The pictures in `images` of these ids, which the references may give a file name."""
    names = image_names_of(ws) if ws.cfg.evaluate.references is not None else {}
    return pictures_of(ws, {i: dict.fromkeys((str(i), names.get(i, str(i)))) for i in ids})


def run_identity(
    ws: Workspace, checkpoint: Path, images: Embeddings, references: Mapping[Any, Sequence[str]]
) -> dict[str, Any]:
    """What the scores of a run are made from, as scores.json records it."""
    from cgtgan.assets.corpus import corpus_sentences

    cfg = ws.cfg.evaluate
    identity = {
        "checkpoint": file_fingerprint(checkpoint / "generator.safetensors"),
        "images": images.header.fingerprint,
        "references": fingerprint(list(references.items())) if references else None,
        # without baselines a checkpoint can be scored where the corpus it was trained on is not available
        "sentences": fingerprint(corpus_sentences(ws)[2]) if cfg.baselines else None,
        "decode": as_dict(ws.cfg.decode),
        "metrics": [custom_name(metric) for metric in cfg.metrics],
        "java": find_java() is not None,  # once it is installed, what failed without it is scored again
        "novel_against": novelty_corpus(ws).fingerprint,
        "self_cider_samples": cfg.self_cider_samples or None,
        "projection_t": None if cfg.projection_t in ws.cfg.aggregation_t.temperatures else cfg.projection_t,
        "supervised": {key: value for key, value in as_dict(cfg.supervised).items() if value is not None} or None,
    }
    return identity | own_metric_identity(ws)


def own_metric_identity(ws: Workspace) -> dict[str, Any]:
    """The content of the files with own metrics; empty without any."""
    fingerprints = own_metric_fingerprints(ws.cfg.evaluate.metrics)
    return {"own_metrics": fingerprints} if fingerprints else {}


def novelty_corpus(ws: Workspace) -> NoveltyCorpus:
    """The corpus, if `diversity` was asked for."""
    return ws.once("novelty corpus", lambda: _novelty_corpus(ws))


def _novelty_corpus(ws: Workspace) -> NoveltyCorpus:
    if "diversity" not in ws.cfg.evaluate.metrics:
        return NoveltyCorpus()
    from cgtgan.assets.corpus import corpus_sentences

    try:
        sentences, _, producer = corpus_sentences(ws)
    except UserError as error:  # captions made elsewhere, a transfer row: the other metrics come without it
        return NoveltyCorpus(problem=f"the share of novel captions needs the corpus: {error}")
    return NoveltyCorpus(sentences, fingerprint(producer))


def write_scores(
    ws: Workspace, home: Path, places: Mapping[str, Path], scored: ScoredCaptions,
    references: Mapping[Any, Sequence[str]] | None, metrics: Sequence[str], about: Mapping[str, Any],
) -> None:  # fmt: skip
    """Score the methods together, with temporary files in `home`, and add the scores to those in each one's place.

    Writes captions.json, per_image.json, counts.json and, last, scores.json there; `about` is written into scores.json.
    Says which images were left out and why a score is missing.
    """
    for stale in home.glob(".scores*"):  # of a killed run: this process holds the folder
        shutil.rmtree(stale, ignore_errors=True)
    extra = _extra_metrics(ws, scored, references or {}, metrics)
    home.mkdir(parents=True, exist_ok=True)  # scores that were there may have moved beside it
    scratch = Path(tempfile.mkdtemp(prefix=".scores", dir=home))
    names = ", ".join(map(custom_name, metrics))
    try:
        domains = domains_of(ws) if references else {}
        with ws.tracker.progress(f"scoring: {names}", len(scored.captions) * len(metrics) * (1 + len(domains))) as bar:
            java = JavaSettings(scratch=scratch)
            scores = score_many(
                scored.captions, references, metrics, java=java, extra_metrics=extra, on_metric=bar.advance
            )
            by_domain = domain_scores(
                scored.captions, references or {}, domains, metrics, java=java, on_metric=bar.advance
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    problem = novelty_corpus(ws).problem if "diversity" in metrics else None
    for method, result in scores.items():
        if problem and "diversity" not in result.failed:
            result.failed["Novel"] = problem
        record = record_in(places[method])
        more = {
            "domains": merged_domains(record, by_domain[method]),
            "training": scored.training.get(method) or record.get("training"),
        }
        listed = {**about, **{key: value for key, value in more.items() if value}}
        _write_record(places[method], scored.captions[method], scored.samples.get(method), result, listed)
    if excluded := list(dict.fromkeys(i for result in scores.values() for i in result.excluded)):
        ws.tracker.say(f"{id_list(excluded)} no reference: left out of the scores")
    reasons = {reason for result in scores.values() for reason in result.failed.values()}
    for reason in sorted(reasons | {problem or ""} - {""}):
        ws.tracker.say(reason)


def _write_record(
    folder: Path,
    captions: Mapping[Any, str],
    samples: Mapping[Any, list[str]] | None,
    result: Scores,
    about: Mapping[str, Any],
) -> None:
    record = record_in(folder)
    save_results(folder / "captions.json", captions)
    if samples is not None:
        rows = [{"image_id": i, "captions": texts} for i, texts in samples.items()]
        write_json(folder / "samples.json", rows, indent=None)
    elif not record:
        (folder / "samples.json").unlink(missing_ok=True)
    earlier = per_image_rows(folder) if record else {}
    summary, per_image = merged_scores(record, earlier, result)
    write_json(folder / "per_image.json", [{"image_id": i, **row} for i, row in per_image.items()], indent=None)
    counts = merged_counts(summary["scores"], per_image_rows(folder, "counts.json") if record else {}, result)
    if any(counts.values()):
        write_json(folder / "counts.json", [{"image_id": i, **row} for i, row in counts.items()], indent=None)
    else:
        (folder / "counts.json").unlink(missing_ok=True)
    made_from = merged_inputs(record, about["made_from"], result)
    write_json(folder / "scores.json", {**summary, **about, "made_from": made_from})


def record_in(folder: Path) -> dict[str, Any]:
    """scores.json of a record; empty without one."""
    path = folder / "scores.json"
    return read_json(path) if path.is_file() else {}


def per_image_rows(folder: Path, name: str = "per_image.json") -> dict[Any, dict[str, Any]]:
    """The scores, or in counts.json the counts, of a record by image; empty where the file is missing."""
    path = folder / name
    rows = read_json(path, list) if path.is_file() else []
    return {row["image_id"]: {name: value for name, value in row.items() if name != "image_id"} for row in rows}


def stored_captions(folder: Path, images: Sequence[Any]) -> dict[Any, str] | None:
    """captions.json of a record in the order of `images`; None where it has no captions of exactly these."""
    path = folder / "captions.json"
    captions = load_results(path) if path.is_file() else {}
    return {i: captions[i] for i in images} if captions.keys() == set(images) else None


def _extra_metrics(
    ws: Workspace, scored: ScoredCaptions, references: Mapping[Any, Sequence[str]], metrics: Sequence[str]
) -> dict[str, ExtraMetric]:
    """The metrics that pycocoevalcap does not have, and that need the backbone or the corpus."""
    extra: dict[str, ExtraMetric] = {}
    cfg = ws.cfg.evaluate
    if not {"clipscore", "diversity"}.intersection(metrics):
        return extra
    from cgtgan.assets.images import image_embeddings
    from cgtgan.evaluation.extra_metrics import clip_metric, diversity_metric

    if "clipscore" in metrics:
        if ws.cfg.captions is not None and ws.cfg.image_paths:
            ids = dict.fromkeys(i for captions in scored.captions.values() for i in captions)
            vectors, where = picture_embeddings(ws, named_pictures(ws, ids)), "among the pictures of `images`"
        else:
            images, where = image_embeddings(ws, cfg.split), f"in the {cfg.split} split"
            vectors = dict(zip(images.ids, images.vectors, strict=True))
        extra["clipscore"] = clip_metric(scored.captions, references, vectors, _text_encoder(ws), where)
    if "diversity" in metrics:
        sentences = novelty_corpus(ws).sentences
        extra["diversity"] = diversity_metric(scored.captions, references, sentences, scored.samples)
    return extra


def _text_encoder(ws: Workspace) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> their embeddings (N, D) on the CPU, with progress."""
    import torch

    from cgtgan.assets.backbone import open_backbone

    cfg = ws.cfg.clip_backbone

    def encode(texts: Sequence[str]) -> Tensor:
        backbone, parts = open_backbone(ws), []
        with ws.tracker.progress("embedding captions and references", len(texts)) as bar:
            for start in range(0, len(texts), cfg.text_shard):
                part = texts[start : start + cfg.text_shard]
                parts.append(backbone.encode_texts(part, cfg.text_batch_size).cpu())
                bar.advance(len(part))
        return torch.cat(parts)

    return encode
