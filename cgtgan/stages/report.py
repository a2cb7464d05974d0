"""report: a run folder -> one self-contained HTML page, the same table as Markdown beside it, and on the console; or many runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from cgtgan.assets.corpus import corpus_sentences, demo_overlap
from cgtgan.assets.images import dataset_split
from cgtgan.assets.released import released_images
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, as_dict
from cgtgan.data.corpora import CleanedCorpus
from cgtgan.errors import MissingFileError, UserError
from cgtgan.reporting.methods import METHODS
from cgtgan.reporting.one_run import (
    CURVES,
    DISCRIMINATOR,
    Run,
    beside,
    between_validations,
    distributions,
    health,
    pictures,
    plots,
    published,
    since_initialisation,
)
from cgtgan.reporting.page import MethodRow, Report, comparison_table, markdown_table, render_report
from cgtgan.reporting.pictures import pick_gallery, thumbnails
from cgtgan.runtime.artifacts import write_text
from cgtgan.runtime.shards import Rank
from cgtgan.runtime.versions import code_version

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
LISTED = 10_000  # pictures that the page searches and sorts
THUMBNAIL_BYTES = 15_000_000  # 5,000 photographs of COCO with a side of 88 pixels take 12 MB


def run(cfg: Config) -> None:
    if cfg.run_patterns:
        from cgtgan.reporting.many_runs import compare

        if not Rank.here().number:
            compare(cfg)
        return
    ws = Workspace(cfg)
    if ws.rank.number:  # the page is the first process's
        return
    with ws.hold_run():
        report(ws)


def report(ws: Workspace) -> None:
    cfg = ws.cfg
    own = Run(ws.run, cfg.evaluate.split)
    if not own.scored:
        raise MissingFileError(f"{ws.run} holds no scores: run stage=evaluate there first")
    rows = method_rows([own])
    measured = list(dict.fromkeys(m for row in rows if not row.published for m in row.scores))
    metrics = [m for m in METRICS if m in measured]
    more = [m for m in measured if m not in METRICS]
    shown = pictures(ws, own)
    best, worst, drawn = pick_gallery(
        {i: item.cider for i, item in shown.items() if item.cider is not None}, cfg.report.gallery, cfg.seed
    )
    listed = (
        list(shown)
        if len(shown) <= LISTED
        else sorted(random.Random(cfg.seed).sample(list(shown), LISTED), key=list(shown).index)
    )
    files = {i: path for i in listed if (path := shown[i].image)}
    with ws.tracker.progress("thumbnails", len(files)) as bar:
        small = thumbnails(files, THUMBNAIL_BYTES, bar.advance)
    page = Report(
        title=f"cgtgan: {cfg.name}",
        subtitle="Unpaired image captioning: a captioner trained from images without captions and sentences without images.",
        warning=cfg.report.warning,
        facts=_facts(ws, own),
        metrics=metrics,
        more_metrics=more,
        rows=rows,
        plots=plots([own], CURVES),
        discriminator=plots([own], DISCRIMINATOR),
        health=health(own.history),
        distributions=distributions(own),
        changes=[*since_initialisation(own, shown, cfg.report.gallery), *between_validations(ws, own)],
        best=[beside(shown[i]) for i in best],
        worst=[beside(shown[i]) for i in worst],
        random=[beside(shown[i]) for i in drawn],
        method=own.title("cgtgan"),
        pictures=[shown[i] for i in listed],
        thumbnails=small,
        left_out=_left_out(len(shown), len(listed), len(files), len(small)),
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(as_dict(cfg))),
        notes=_notes(own),
    )
    output = Path(cfg.report.output).expanduser() if cfg.report.output else ws.run / "report.html"
    write_text(output, render_report(page))
    tables = [columns for columns in (metrics, more) if columns]
    write_text(output.with_suffix(".md"), "\n".join(markdown_table(rows, columns) for columns in tables))
    if cfg.report.warning:
        ws.tracker.say(cfg.report.warning)
    for columns in tables:
        ws.tracker.show(comparison_table(rows, columns))
    ws.tracker.say(f"report: {output}")


def method_rows(runs: Sequence[Run]) -> list[MethodRow]:
    """A row a method and decoding, its values are the seeds'; then the paper's row of every setting that is the paper's.

    A baseline that several variants of one experiment share counts once a seed.
    """
    corpora = {r.settings["corpus.name"] for r in runs}
    collected: dict[tuple[bool, str, str, str], dict[int, dict[str, float]]] = {}
    order: dict[tuple[bool, str, str, str], tuple[int, str, str, bool]] = {}
    paper: dict[str, MethodRow] = {}
    for r in runs:
        corpus = r.settings["corpus.name"]
        suffix = f" · {corpus}" if len(corpora) > 1 else ""
        for method in r.scored:
            known = METHODS[method]
            name = r.title(method) + (suffix if method != "human" else "")
            key = (known.bound, "" if method == "human" else corpus, name, r.decoding(method))
            order.setdefault(
                key, (list(METHODS).index(method), corpus, known.note, method == "cgtgan" and "no " not in name)
            )
            collected.setdefault(key, {}).setdefault(r.settings["seed"], r.scores(method)["scores"])
        if row := published(r, suffix):
            paper[row.name + row.note] = row
    rows = []
    for key in sorted(collected, key=lambda k: (k[0], order[k][1], order[k][0])):
        seeds = [scores for _, scores in sorted(collected[key].items())]
        metrics = {m: [s[m] for s in seeds if m in s] for m in dict.fromkeys(m for s in seeds for m in s)}
        rows.append(MethodRow(key[2], order[key][2], metrics, ours=order[key][3], bound=key[0], decoding=key[3]))
    return rows + list(paper.values())


def _left_out(pictures: int, listed: int, files: int, small: int) -> str:
    said = [f"{listed:,} of {pictures:,} pictures are listed, drawn at random."] if listed < pictures else []
    if not files:
        said.append("No pictures are shown: only their embeddings were given.")
    elif small < listed:
        megabytes = THUMBNAIL_BYTES // 1_000_000
        said.append(
            f"{small:,} of {listed:,} have a thumbnail; the others are text: beyond the {megabytes} MB that the page holds, or unreadable."
        )
    return " ".join(said)


def _facts(ws: Workspace, own: Run) -> dict[str, str]:
    try:
        sentences, counts, _ = corpus_sentences(ws)
        corpus = f"{len(sentences):,} sentences; {CleanedCorpus(sentences, counts).summary()}"
    except UserError:  # a transfer row: the checkpoint was trained elsewhere
        corpus = f"{ws.cfg.corpus.name}, not at hand here"
    facts = {
        "Images": ", ".join(f"{_images(ws, name)} {name}" for name in ("train", "val", "test")),
        "Corpus": corpus,
        "Backbone": ws.cfg.clip_backbone.name
        + (f" ({ws.cfg.clip_backbone.model})" if ws.cfg.clip_backbone.model else ""),
        "Aggregation temperature": f"{ws.cfg.aggregation_t.t:g}",
        "Decoding": ", ".join(sorted({own.decoding(m) for m in own.scored} - {"none"})),
        "Checkpoint": f"{ws.cfg.evaluate.which} step; nothing is picked on the test images",
        "Seeds": str(own.settings["seed"]),
        "Runs": "1",
        "Code": code_version(),
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
        return f"{len(given.ids if given else dataset_split(ws, name).images):,}"
    except MissingFileError:  # what is only evaluated needs no train images
        return "no"


def _notes(own: Run) -> list[str]:
    notes = sorted({why for m in own.scored for why in own.scores(m)["failed"].values()})
    excluded = own.scores(own.scored[0])["excluded"]
    if excluded:
        notes.append(f"{len(excluded)} images have no reference and are left out of the scores")
    return notes
