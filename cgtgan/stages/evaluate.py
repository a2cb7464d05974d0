"""evaluate: a checkpoint and its baselines, or captions made elsewhere -> captions and scores of the same test images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.aggregated import aggregated_embeddings
from cgtgan.assets.backbone import open_backbone
from cgtgan.assets.checkpoints import find_checkpoint
from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.generators import initial_generator, supervised_generator
from cgtgan.assets.images import data_root, dataset_split, image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.captioning.decoding import Decoder, describe
from cgtgan.config import Config, as_dict
from cgtgan.data.annotations import as_number
from cgtgan.errors import InputError, UserError
from cgtgan.evaluation.clip_score import clip_scores, prompt, ref_clip_scores
from cgtgan.evaluation.coco_files import id_list, load_references, load_results, save_results
from cgtgan.evaluation.diversity import diversity, known_sentences, self_cider
from cgtgan.evaluation.java import find_java
from cgtgan.evaluation.metrics import Columns, score_many
from cgtgan.method.aggregation import nearest_texts
from cgtgan.method.batches import stable_seed
from cgtgan.models.generator_bundle import GeneratorBundle, load_generator
from cgtgan.reporting.methods import METHODS, Method
from cgtgan.reporting.tables import MethodRow, comparison_table
from cgtgan.runtime.artifacts import file_fingerprint, fingerprint, locked, read_json, write_json
from cgtgan.runtime.wandb_run import under_agent
from cgtgan.training.wandb_tables import send_scores


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    if ws.rank.number:  # scores are the first process's
        return
    if cfg.captions is not None:
        score_file(ws, Path(cfg.captions).expanduser())
        return
    with ws.hold_run():
        _show(ws, evaluate(ws), METHODS)


def evaluate(ws: Workspace) -> Path:
    """Caption the split with every method that is not scored yet, then score them together; returns the folder of the scores."""
    cfg = ws.cfg.evaluate
    checkpoint = find_checkpoint(ws)
    references = _references(ws)
    ws.check_same_settings()
    images = image_embeddings(ws, cfg.split)
    generators: dict[str, Callable[[], tuple[GeneratorBundle, Tensor]]] = {
        "cgtgan": lambda: (load_generator(checkpoint), images.vectors),
        "init": lambda: (initial_generator(ws), images.vectors),
        "mean_shift": lambda: (initial_generator(ws), mean_shifted(ws, cfg.split)),
        "projection": lambda: (initial_generator(ws), aggregated_embeddings(ws, cfg.split, cfg.projection_t).vectors),
        "supervised": lambda: (supervised_generator(ws), images.vectors),
    }
    sentences = {"nearest": lambda: _nearest(ws), "human": lambda: _human(ws)}
    folder = ws.run / "evaluation" / cfg.split
    corpus = _corpus(ws)
    made_from = {
        "checkpoint": file_fingerprint(checkpoint / "generator.safetensors"),
        "images": images.header.fingerprint,
        "references": fingerprint(list(references.items())),
        # a transfer row scores a checkpoint alone, where the corpus it was trained on need not be at hand
        "sentences": fingerprint(corpus_sentences(ws)[2]) if cfg.baselines else None,
        "decode": as_dict(ws.cfg.decode),
        "metrics": list(cfg.metrics),
        "java": find_java() is not None,  # once it is installed, what failed without it is scored again
        "novel_against": corpus.fingerprint,
        "self_cider_samples": cfg.self_cider_samples or None,
        "projection_t": cfg.projection_t,
    }
    captions: dict[str, dict[Any, str]] = {}
    samples: dict[str, dict[Any, list[str]]] = {}
    for name in ("cgtgan", *cfg.baselines):
        if _is_scored(folder / name, made_from):
            continue
        if "clipscore" in cfg.metrics:
            open_backbone(ws)  # weights that are missing are said before the captioning
        shutil.rmtree(folder / name, ignore_errors=True)
        if name in sentences:
            texts = sentences[name]()
        else:
            bundle, vectors = generators[name]()
            texts = _decoded(ws, name, bundle, vectors)
            if cfg.self_cider_samples:
                samples[name] = dict(zip(images.ids, _sampled(ws, name, bundle, vectors), strict=True))
        captions[name] = dict(zip(images.ids, texts, strict=True))
    if captions:
        about = {"decoding": describe(ws.cfg.decode), "made_from": made_from}
        _score(ws, ws.run, folder, captions, {i: references[i] for i in images.ids}, corpus, samples, about)
    if "cgtgan" in captions or under_agent():
        send_scores(ws, folder / "cgtgan", made_from)
    return folder


def score_file(ws: Workspace, file: Path) -> Path:
    """Captions in COCO's results format -> their scores, in a folder of their own: `output`, or <file>_scores beside the file.

    Needs no run, checkpoint, backbone or corpus, but for the metrics that are made of them.
    """
    captions = load_results(file)
    if not captions:
        raise InputError(f"captions={file}: the file is an empty list, so there is nothing to score")
    references = _references(ws)
    if ws.cfg.evaluate.references is not None and not captions.keys().isdisjoint(
        references
    ):  # as COCO's own program takes its results
        if silent := [i for i in references if i not in captions]:
            ws.tracker.say(f"{id_list(silent)} no caption in {file}: left out")
        references = {i: texts for i, texts in references.items() if i in captions}
    beside = file.with_name(file.name.removesuffix(".gz").removesuffix(".json") + "_scores")
    folder = (Path(ws.cfg.output).expanduser() if ws.cfg.output else beside).resolve()
    made_from = {
        "captions": file_fingerprint(file),
        "references": fingerprint(list(references.items())),
        "split": ws.cfg.evaluate.split,
    }
    about = {"decoding": f"captions of {file.name}", "made_from": made_from}
    with locked(
        folder / "captions.json", lambda: ws.tracker.say(f"waiting for another process that works in {folder}")
    ):
        _score(ws, folder, folder.parent, {folder.name: captions}, references, _corpus(ws), {}, about)
    _show(ws, folder.parent, {folder.name: Method(file.name, "")})
    return folder


def _references(ws: Workspace) -> dict[Any, list[str]]:
    """Of the split, or of `evaluate.references`; an image without any has an empty list."""
    split, given = ws.cfg.evaluate.split, ws.cfg.evaluate.references
    if given is not None:
        return dict(load_references(Path(given).expanduser()))
    found = dataset_split(ws, split)
    if not found.references:
        raise InputError(
            f"the {split} split has no references, so there is nothing to score against: set dataset.references"
        )
    numbered = all(
        isinstance(i, int) for i in found.references
    )  # a folder's pictures that its file does not know have names
    return found.references | {as_number(i) if numbered else i: [] for i in found.bare}


def _score(
    ws: Workspace,
    home: Path,
    folder: Path,
    captions: dict[str, dict[Any, str]],
    references: dict[Any, list[str]],
    corpus: Corpus,
    samples: dict[str, dict[Any, list[str]]],
    about: dict[str, Any],
) -> None:
    """Score the methods together, with temporary files in `home`; write captions.json, per_image.json and, last, scores.json of each."""
    for stale in home.glob(".scores*"):  # of a killed run: this process holds the folder
        shutil.rmtree(stale, ignore_errors=True)
    metrics = ws.cfg.evaluate.metrics
    own: dict[str, Callable[[str, list[Any]], Columns]] = {}
    if "clipscore" in metrics:
        own["clipscore"] = _clip_scorer(ws, captions, references)
    if "diversity" in metrics:
        own["diversity"] = _diversity_scorer(captions, references, corpus, samples)
    scratch = Path(tempfile.mkdtemp(prefix=".scores", dir=home))
    try:
        with ws.tracker.progress(f"scoring: {', '.join(metrics)}", len(captions) * len(metrics)) as bar:
            scored = score_many(captions, references, metrics, scratch=scratch, own=own, scored=bar.advance)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for name, scores in scored.items():
        failed = scores.failed | (
            {"Novel": corpus.problem} if corpus.problem and "diversity" not in scores.failed else {}
        )
        save_results(folder / name / "captions.json", captions[name])
        if name in samples:
            write_json(
                folder / name / "samples.json",
                [{"image_id": i, "captions": s} for i, s in samples[name].items()],
                indent=None,
            )
        write_json(
            folder / name / "per_image.json", [{"image_id": i, **s} for i, s in scores.per_image.items()], indent=None
        )
        summary = {
            "scores": scores.corpus,
            "failed": failed,
            "excluded": list(scores.excluded),
            "tokenizer": scores.tokenizer,
        }
        write_json(folder / name / "scores.json", summary | {"images": len(scores.per_image)} | about)
    if excluded := list(dict.fromkeys(i for scores in scored.values() for i in scores.excluded)):
        ws.tracker.say(f"{id_list(excluded)} no reference: left out of the scores")
    for why in sorted(
        {why for scores in scored.values() for why in [*scores.failed.values(), *filter(None, [corpus.problem])]}
    ):
        ws.tracker.say(why)


def _show(ws: Workspace, folder: Path, methods: Mapping[str, Method]) -> None:
    """What one run, or one file, scored; the report sets several runs side by side."""
    found = {name: path for name in methods if (path := folder / name / "scores.json").is_file()}
    scores = {name: read_json(path)["scores"] for name, path in found.items()}
    rows = [
        MethodRow(methods[name].title, "", {m: [v] for m, v in s.items()}, bound=methods[name].bound)
        for name, s in scores.items()
    ]
    ws.tracker.show(comparison_table(rows, list(dict.fromkeys(m for s in scores.values() for m in s))))
    ws.tracker.say(
        f"captions and scores, of the whole and of each image: {folder if len(found) > 1 else folder / next(iter(found))}"
    )


def _is_scored(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the scores there are of these inputs; a baseline does not hang on the checkpoint."""
    path = folder / "scores.json"
    if not path.is_file():
        return False
    ignored = {"checkpoint"} if folder.name != "cgtgan" else {"sentences"}
    ignored |= {"projection_t"} if folder.name != "projection" else set()
    found = read_json(path).get("made_from")
    return isinstance(found, dict) and all(
        found.get(key) == value for key, value in made_from.items() if key not in ignored
    )


# ------------------------------------------------------------------------------------- metrics that pycocoevalcap does not have


@dataclass(frozen=True)
class Corpus:
    """What captions are new against: the sentences, or None and, where they were asked for, why they are not at hand."""

    sentences: Sequence[str] | None = None
    fingerprint: str | None = None
    problem: str | None = None


def _corpus(ws: Workspace) -> Corpus:
    if "diversity" not in ws.cfg.evaluate.metrics:
        return Corpus()
    try:
        sentences, _, producer = corpus_sentences(ws)
    except UserError as error:  # captions made elsewhere, a transfer row: the other metrics come without it
        return Corpus(problem=f"the share of novel captions needs the corpus: {error}")
    return Corpus(sentences, fingerprint(producer))


def _clip_scorer(
    ws: Workspace, captions: dict[str, dict[Any, str]], references: dict[Any, list[str]]
) -> Callable[[str, list[Any]], Columns]:
    """CLIPScore and RefCLIPScore with the run's backbone; every text is embedded once, whoever says it."""
    images = image_embeddings(ws, ws.cfg.evaluate.split)
    rows = {image_id: row for row, image_id in enumerate(images.ids)}
    every = [
        *(text for said in captions.values() for text in said.values()),
        *(text for texts in references.values() for text in texts),
    ]
    prompts = list(dict.fromkeys(map(prompt, every)))
    backbone, parts, size = open_backbone(ws), [], ws.cfg.clip_backbone.text_shard
    with ws.tracker.progress("embedding captions and references", len(prompts)) as bar:
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            parts.append(backbone.encode_texts(part, ws.cfg.clip_backbone.text_batch_size).cpu())
            bar.advance(len(part))
    vectors, places = torch.cat(parts), {text: place for place, text in enumerate(prompts)}

    def embedded(texts: Sequence[str]) -> Tensor:
        return vectors[[places[prompt(text)] for text in texts]]

    def score(method: str, ids: list[Any]) -> Columns:
        if unseen := [i for i in ids if i not in rows]:
            raise InputError(
                f"CLIPScore was not computed: {id_list(unseen)} no embedding in the {ws.cfg.evaluate.split} split"
            )
        said = embedded([captions[method][i] for i in ids])
        scores = clip_scores(images.vectors[[rows[i] for i in ids]], said)
        with_references = ref_clip_scores(scores, said, [embedded(references[i]) for i in ids])
        each = {"CLIPScore": scores.tolist(), "RefCLIPScore": with_references.tolist()}
        return {name: sum(column) / len(column) for name, column in each.items()}, each

    return score


def _diversity_scorer(
    captions: dict[str, dict[Any, str]],
    references: dict[Any, list[str]],
    corpus: Corpus,
    samples: dict[str, dict[Any, list[str]]],
) -> Callable[[str, list[Any]], Columns]:
    every = (text for said in captions.values() for text in said.values())
    known = None if corpus.sentences is None else known_sentences(every, corpus.sentences)

    def score(method: str, ids: list[Any]) -> Columns:
        whole, each = diversity([captions[method][i] for i in ids], known)
        if method in samples:
            each["Self-CIDEr"] = self_cider([samples[method][i] for i in ids], [references[i] for i in ids])
            whole["Self-CIDEr"] = sum(each["Self-CIDEr"]) / len(ids)
        return whole, each

    return score


def _sampled(ws: Workspace, name: str, bundle: GeneratorBundle, vectors: Tensor) -> list[list[str]]:
    """`evaluate.self_cider_samples` captions a row, drawn at the decoding's temperature whatever the decoding is."""
    count, decode, seed = ws.cfg.evaluate.self_cider_samples, replace(ws.cfg.decode, name="sample"), ws.cfg.seed
    with ws.tracker.progress(f"sampling for self-CIDEr: {METHODS[name].title}", count * len(vectors)) as bar:
        seeds = [stable_seed(seed, "self-CIDEr", k) for k in range(count)]
        draws = [Decoder(bundle, decode, ws.device, s, on_batch=bar.advance).captions(vectors) for s in seeds]
    return [list(row) for row in zip(*draws, strict=True)]


# ------------------------------------------------------------------------------------------------------------ methods


def _decoded(ws: Workspace, name: str, bundle: GeneratorBundle, vectors: Tensor) -> list[str]:
    if vectors.shape[1] != bundle.clip_dim:
        raise InputError(
            f"the checkpoint reads embeddings of {bundle.clip_dim} numbers and clip_backbone={ws.cfg.clip_backbone.name} gives "
            f"{vectors.shape[1]}: use the backbone it was trained with"
        )
    with ws.tracker.progress(f"captioning: {METHODS[name].title}", len(vectors)) as bar:
        backbone = open_backbone(ws) if ws.cfg.decode.name == "best_of_n" else None
        images = image_embeddings(ws, ws.cfg.evaluate.split).vectors
        return Decoder(bundle, ws.cfg.decode, ws.device, ws.cfg.seed, backbone, bar.advance).captions(
            vectors, images=images
        )


def mean_shifted(ws: Workspace, split: str) -> Tensor:
    """Image embeddings moved by mean(sentences) - mean(train images): the modality gap closed to first order. (N, D) float32"""
    gap = sentence_embeddings(ws).vectors.float().mean(0) - image_embeddings(ws, "train").vectors.float().mean(0)
    return image_embeddings(ws, split).vectors.float() + gap


def _nearest(ws: Workspace) -> list[str]:
    """The corpus sentence with the highest cosine to the image."""
    images, texts = image_embeddings(ws, ws.cfg.evaluate.split), sentence_embeddings(ws)
    sentences = corpus_sentences(ws)[0]
    rows = nearest_texts(images.vectors, texts.vectors, 1, device=ws.device)[:, 0]
    return [sentences[int(i)] for i in rows]


def _human(ws: Workspace) -> list[str]:
    captions = load_results(data_root(ws) / f"human_{ws.cfg.evaluate.split}.json")
    return [captions[i] for i in image_embeddings(ws, ws.cfg.evaluate.split).ids]
