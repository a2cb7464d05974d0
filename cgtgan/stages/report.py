"""report: run folders -> one self-contained HTML page, the same table as Markdown beside it, and on the console."""

from __future__ import annotations

import glob
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cgtgan import __version__
from cgtgan.artifacts import read_json, write_text
from cgtgan.config import Config, as_dict
from cgtgan.data.corpora import CleanedCorpus
from cgtgan.errors import MissingFileError, UserError
from cgtgan.evaluation.metrics import load_results
from cgtgan.evaluation.report import (
    Curve,
    GalleryItem,
    MethodRow,
    Plot,
    Report,
    comparison_table,
    markdown_table,
    pick_gallery,
    render_report,
)
from cgtgan.stages.evaluate import METHODS
from cgtgan.stages.preprocess import corpus_sentences, demo_overlap
from cgtgan.stages.released import released_images
from cgtgan.stages.workspace import Workspace
from cgtgan.tracking import read_metrics

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
REWARDS = {"clip_agg": "CLIP-agg", "clip_cos": "CLIP-cos", "mixed": "CLIP-agg and CLIP-cos", "naturalness_only": "no semantics"}
PLOTS = (  # title, y label, factor, {label: key in metrics.jsonl}, note
    ("Validation CIDEr", "CIDEr x 100", 100, {"": "eval/CIDEr"}, "greedy captions of the validation images"),
    ("Semantic reward", "reward", 1,
     {"cos(aggregated, caption)": "reward/cos", "1 - L1": "reward/l1", "cos(image, caption)": "reward/clip"},
     "raw means over the sampled captions, each in units of the reward's scale"),
    ("Naturalness", "logit", 1, {"samples": "reward/naturalness", "greedy": "reward/naturalness_greedy", "corpus": "reward/real_logit"},
     "the discriminator's raw logit; above 0 it says human"),
    ("Losses", "loss", 1, {"discriminator": "train/d_loss", "generator": "train/g_loss"}, ""),
)  # fmt: skip


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    if ws.rank.number:  # the page is the first process's
        return
    with ws.hold_run():
        report(ws)


@dataclass(frozen=True)
class Run:
    """One run folder as it lies on the disk."""

    folder: Path
    split: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_json(self.folder / "settings.json")

    @property
    def scored(self) -> list[str]:
        return [name for name in METHODS if (self.folder / "evaluation" / self.split / name / "scores.json").is_file()]

    def scores(self, method: str) -> dict[str, Any]:
        return read_json(self.folder / "evaluation" / self.split / method / "scores.json")

    def captions(self, method: str) -> Mapping[Any, str]:
        return load_results(self.folder / "evaluation" / self.split / method / "captions.json")

    def cider(self, method: str) -> dict[Any, float]:
        rows = read_json(self.folder / "evaluation" / self.split / method / "per_image.json")
        return {row["image_id"]: row["CIDEr"] for row in rows if "CIDEr" in row}

    def title(self, method: str) -> str:
        if method != "cgtgan":
            return METHODS[method].title
        reward, weight = str(self.settings["reward_weights.name"]), self.settings["reward_weights.max_weight"]
        how = "no semantics" if weight == 0 else REWARDS.get(reward, reward)
        extra = ["no naturalness"] if weight == 1 else []
        extra += [] if self.settings["train.use_initialization"] else ["no initialisation"]
        return f"CgT-GAN ({', '.join([how, *extra])})"


def report(ws: Workspace) -> None:
    cfg = ws.cfg
    runs = find_runs(ws)
    rows = method_rows(runs)
    metrics = [m for m in METRICS if m != "SPICE" or any(m in row.scores for row in rows)]  # asked for by few: its jars are extra
    own = next((r for r in runs if r.folder.resolve() == ws.run.resolve()), runs[0])
    best, worst, random = _gallery(ws, own)
    page = Report(
        title=f"cgtgan: {cfg.name}",
        subtitle="Unpaired image captioning: a captioner trained from images without captions and sentences without images.",
        warning=cfg.report.warning,
        facts=_facts(ws, runs, own),
        metrics=metrics,
        rows=rows,
        plots=_plots([r for r in runs if r.folder.parent == own.folder.parent]),
        best=best,
        worst=worst,
        random=random,
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(as_dict(cfg))),
        notes=_notes(runs, own),
    )
    output = (
        Path(cfg.report.output).expanduser() if cfg.report.output else (ws.run if len(runs) == 1 else Path(cfg.runs_dir)) / "report.html"
    )
    write_text(output, render_report(page))
    write_text(output.with_suffix(".md"), markdown_table(rows, metrics))
    if cfg.report.warning:
        ws.tracker.say(cfg.report.warning)
    ws.tracker.show(comparison_table(rows, metrics))
    ws.tracker.say(f"report: {output}")


def find_runs(ws: Workspace) -> list[Run]:
    """Scored runs that `report.runs` names, as folders or glob patterns, in name order; by default this run."""
    split, patterns = ws.cfg.evaluate.split, ws.cfg.report.runs
    found: dict[Path, Run] = {}
    for pattern in patterns or [glob.escape(str(ws.run))]:
        before = len(found)
        for match in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True)):  # noqa: PTH207 (absolute patterns too)
            folders = [Path(match), *sorted(p.parent for p in Path(match).rglob("settings.json"))] if Path(match).is_dir() else []
            found |= {f: r for f in folders if (f / "settings.json").is_file() and (r := Run(f, split)).scored}
        if len(found) == before:
            where = f"report.runs has {pattern}, where no scored run is found" if patterns else f"{ws.run} holds no scores"
            raise MissingFileError(f"{where}: run stage=evaluate there first")
    return list(found.values())


def method_rows(runs: Sequence[Run]) -> list[MethodRow]:
    """A row a method; its values are the seeds'. A baseline that several variants of one experiment share counts once a seed."""
    corpora = {r.settings["corpus.name"] for r in runs}
    collected: dict[tuple[bool, str, str], dict[int, dict[str, float]]] = {}
    order: dict[tuple[bool, str, str], tuple[int, str, str, bool]] = {}
    for r in runs:
        corpus = r.settings["corpus.name"]
        for method in r.scored:
            known = METHODS[method]
            name = r.title(method) + (f" · {corpus}" if len(corpora) > 1 and method != "human" else "")
            key = (known.bound, "" if method == "human" else corpus, name)
            order.setdefault(key, (list(METHODS).index(method), corpus, known.note, method == "cgtgan" and "no " not in name))
            collected.setdefault(key, {}).setdefault(r.settings["seed"], r.scores(method)["scores"])
    ranked = sorted(collected, key=lambda k: (k[0], order[k][1], order[k][0]))
    rows = []
    for key in ranked:
        seeds = [scores for _, scores in sorted(collected[key].items())]
        metrics = {m: [s[m] for s in seeds if m in s] for m in METRICS}
        rows.append(MethodRow(key[2], order[key][2], {m: v for m, v in metrics.items() if v}, ours=order[key][3], bound=key[0]))
    return rows


def _plots(runs: Sequence[Run]) -> list[Plot]:
    """Curves of one variant's runs, a line a seed (and a term)."""
    histories = {r.settings["seed"]: read_metrics(r.folder / "metrics.jsonl") for r in runs}
    plots = []
    for title, label, factor, keys, note in PLOTS:
        curves = []
        for seed, history in histories.items():
            for name, key in keys.items():
                points = [(row["step"], factor * row[key]) for row in history if row.get(key) is not None]
                name = " ".join(part for part in (name, f"seed {seed}" if len(histories) > 1 or not name else "") if part)
                curves.append(Curve(name, [s for s, _ in points], [v for _, v in points]))
        plots.append(Plot(title, label, curves, note))
    return plots


def _gallery(ws: Workspace, own: Run) -> tuple[list[GalleryItem], list[GalleryItem], list[GalleryItem]]:
    if "cgtgan" not in own.scored:
        return [], [], []
    split = ws.split(own.split)
    paths = {record.image_id: record.path for record in split.images}
    captions, cider = own.captions("cgtgan"), own.cider("cgtgan")
    others = {METHODS[m].title: own.captions(m) for m in own.scored if m in ("init", "projection", "supervised")}

    def item(i: Any) -> GalleryItem:
        said = {title: texts[i] for title, texts in others.items() if i in texts}
        return GalleryItem(i, paths.get(i), captions[i], split.references.get(i, []), cider.get(i), said)

    chosen = pick_gallery({i: c for i, c in cider.items() if i in paths or not paths}, ws.cfg.report.gallery, ws.cfg.seed)
    return tuple([item(i) for i in ids] for ids in chosen)  # type: ignore[return-value]


def _facts(ws: Workspace, runs: Sequence[Run], own: Run) -> dict[str, str]:
    try:
        sentences, counts, _ = corpus_sentences(ws)
        corpus = f"{len(sentences):,} sentences; {CleanedCorpus(sentences, counts).summary()}"
    except UserError:  # a transfer row: the checkpoint was trained elsewhere
        corpus = f"{ws.cfg.corpus.name}, not at hand here"
    facts = {
        "Images": ", ".join(f"{_images(ws, name)} {name}" for name in ("train", "val", "test")),
        "Corpus": corpus,
        "Backbone": ws.cfg.clip_backbone.name + (f" ({ws.cfg.clip_backbone.model})" if ws.cfg.clip_backbone.model else ""),
        "Aggregation temperature": f"{ws.cfg.aggregation_t.t:g}",
        "Decoding": own.scores(own.scored[0])["decoding"],
        "Checkpoint": f"{ws.cfg.evaluate.which} step; nothing is picked on the test images",
        "Seeds": ", ".join(str(s) for s in sorted({r.settings["seed"] for r in runs})),
        "Runs": str(len(runs)),
        "Code": _code_version(),
    }
    if ws.cfg.dataset.kind == "demo":
        found = demo_overlap(ws)
        facts["Overlap"] = (
            f"{found['references_in_corpus']} of {found['references']} test references stand in the corpus word for word, "
            f"touching {found['scenes_in_corpus']} of {found['scenes']} test images"
        )
    return facts


def _images(ws: Workspace, name: str) -> str:
    """How many images a split has; of the authors' files the embeddings are counted."""
    try:
        given = released_images(ws, name)
        return f"{len(given.ids if given else ws.split(name).images):,}"
    except MissingFileError:  # what is only evaluated needs no train images
        return "no"


def _notes(runs: Sequence[Run], own: Run) -> list[str]:
    notes = sorted({why for r in runs for m in r.scored for why in r.scores(m)["failed"].values()})
    excluded = own.scores(own.scored[0])["excluded"]
    if excluded:
        notes.append(f"{len(excluded)} images have no reference and are left out of the scores")
    return notes


def _code_version() -> str:
    """Package version and, in a git checkout, the commit, with + when there are changes on top."""
    root = Path(__file__).parents[2]
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"cgtgan {__version__}"
    return f"cgtgan {__version__} ({commit}{'+' if changed else ''})"
