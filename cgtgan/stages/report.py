"""report: a run folder -> one HTML page, its tables as Markdown and on the console; `runs`: a page of many runs."""

from __future__ import annotations

from pathlib import Path

from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.reporting.many_runs import compare
from cgtgan.reporting.one_run import make_report
from cgtgan.reporting.page import render_report
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.tables import console_table, markdown_table, score_tables
from cgtgan.reporting.variants import find_runs
from cgtgan.runtime.artifacts import write_text
from cgtgan.runtime.shards import Rank


def run(cfg: Config) -> None:
    if Rank.here().number:  # the page is the first process's
        return
    if cfg.run_patterns:
        compare(cfg, find_runs(cfg.run_patterns, cfg.evaluate.split))
        return
    ws = Workspace(cfg)
    with ws.hold_run():
        report(ws)


def report(ws: Workspace) -> None:
    given = ws.cfg.report
    page = make_report(ws, Run(ws.run, ws.cfg.evaluate.split))
    output = Path(given.output).expanduser() if given.output else ws.run / "report.html"
    write_text(output, render_report(page))
    tables = score_tables(page.rows)
    write_text(output.with_suffix(".md"), "\n".join(map(markdown_table, tables)))
    if given.warning:
        ws.tracker.say(given.warning)
    for table in tables if not ws.cfg.several else ():
        ws.tracker.show(console_table(table))
    ws.tracker.say(f"report: {output}")
    if not ws.cfg.several:
        ws.tracker.say(f"look at it: {output.resolve().as_uri()}")
