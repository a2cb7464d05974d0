"""evaluate: a checkpoint and its baselines, or captions made elsewhere -> captions and scores of the same images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cgtgan.assets.scores import record_in
from cgtgan.assets.workspace import Workspace
from cgtgan.cli import typed_with_stage
from cgtgan.config import Config
from cgtgan.evaluation.records import WITHOUT_GENERATOR, differences
from cgtgan.reporting.methods import METHODS, training_note
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.scored_files import score_files
from cgtgan.reporting.tables import MethodRow, console_table, domain_rows, score_tables


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    if ws.rank.number:  # only the first process scores
        return
    if cfg.captions is not None:
        score_files(ws)
        return
    from cgtgan.training.scored_run import score_run  # torch, which captions made elsewhere do without

    with ws.hold_run():
        _show(ws, score_run(ws))


def _show(ws: Workspace, places: Mapping[str, Path]) -> None:
    """The table of one run as scored now; the report compares several runs."""
    rows = []
    for method, place in places.items():
        run = Run(ws.run, ws.cfg.evaluate.split, place.name)
        record = run.scores(method)
        title, _, part = METHODS[method]
        decoding = "" if method in WITHOUT_GENERATOR else record["decoding"]
        scores = {metric: [value] for metric, value in record["scores"].items()}
        usual = {} if place.name == method else record_in(place.with_name(method))
        differs = ", ".join(differences(method, record, usual, skip=("decode",)).values()) if usual else ""
        differs = differs or (str(record.get("checkpoint", "")) if place.name != method and not usual else "")
        title = f"{title}, {differs}" if differs else title
        rows += [
            MethodRow(
                title, training_note(method, run.settings, [run.training(method)]), scores, part, decoding=decoding
            ),
            *domain_rows(title, record, decoding),
        ]
    for table in score_tables(rows) if not ws.cfg.several else ():
        ws.tracker.show(console_table(table))
    folders = {place.parent for place in places.values()} if len(places) > 1 else set(places.values())
    ws.tracker.say(f"captions and scores, of the whole and of each image: {', '.join(map(str, folders))}")
    if not ws.cfg.several:
        page = Path(ws.cfg.report.output or ws.run / "report.html").expanduser().resolve()
        ws.tracker.say(f"for the page {page.as_uri()}: {typed_with_stage('report')}")
