"""`stage=report runs=PATTERN` over real runs, as typed; its page in a headless Chromium, light, dark and narrow."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import watch
from test_report_page import CONTRAST

from cgtgan.reporting.page import About, Comparison, GalleryItem, render_comparison
from cgtgan.reporting.tables import MethodRow, Origin
from tests.program import run_program

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
HOSTILE = '</style><script>window.hit = 1</script><img src="https://evil.example/a.png" onerror="window.hit = 1">'


def run_py(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *words]
    return run_program(command, cwd=home, env=ENVIRONMENT, timeout=300)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants with two seeds each, and their comparison, made by two lines."""
    folder = tmp_path_factory.mktemp("comparison")
    small = ["threads=1", "wandb=disabled", "evaluate.baselines=[init]", "evaluate.metrics=[bleu,rouge_l,cider]"]
    swept = run_py(folder, "-m", "experiment=demo_tiny", "reward_weights=clip_agg,clip_cos", "seed=0,1", *small)
    assert swept.returncode == 0, swept.stdout[-2000:] + swept.stderr[-2000:]
    (folder / "swept.txt").write_text(swept.stdout, encoding="utf-8")
    compared = run_py(folder, "stage=report", "runs=runs/demo_tiny/*/seed=*", "report.baseline=init")
    assert compared.returncode == 0, compared.stdout[-2000:] + compared.stderr[-2000:]
    (folder / "said.txt").write_text(compared.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page from disk with all network blocked; at the end nothing was asked for and nothing went wrong."""
    contexts, trouble = [], []

    def open_page(file: Path, width: int = 1200, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        watch(page, file, trouble)
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def test_the_curve_has_a_line_of_what_all_runs_share(home: Path) -> None:
    files = list((home / "runs/demo_tiny").glob("*/seed=*/validation/baselines.json"))
    ciders = {json.loads(file.read_text(encoding="utf-8"))["CIDEr"]["init"] for file in files}
    assert (len(files), len(ciders)) == (4, 2)  # the initial generator is another for each seed, the same in a variant
    page = (home / "runs/demo_tiny/comparison/report.html").read_text(encoding="utf-8")
    assert f">init {100 * statistics.fmean(ciders):.3g}</text>" in page
    assert "dashed: baselines that are the same in all variants, mean over seeds" in page


def test_the_table_holds_the_runs_own_scores(home: Path) -> None:
    folder = home / "runs/demo_tiny/comparison"
    assert sorted(p.name for p in folder.iterdir()) == [
        "comparison.csv",
        "comparison.md",
        "comparison.tex",
        "report.html",
    ]
    with (folder / "comparison.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    runs = sorted((home / "runs/demo_tiny").glob("*/seed=*"))
    assert len(runs) == 4

    def cider(variant: str, method: str) -> list[float]:
        files = [run / "evaluation/test" / method / "scores.json" for run in runs if run.parent.name == variant]
        return [json.loads(file.read_text(encoding="utf-8"))["scores"]["CIDEr"] for file in files]

    for variant in {run.parent.name for run in runs}:
        (line,) = [x for x in lines if (x["variant"], x["method"], x["metric"]) == (variant, "cgtgan", "CIDEr")]
        own = [
            json.loads((r / "evaluation/test/cgtgan/scores.json").read_text())["scores"]["CIDEr"]
            for r in runs
            if r.parent.name == variant
        ]
        assert (line["n"], line["seeds"]) == ("2", "0 1")
        assert [float(v) for v in line["values"].split()] == own
        assert float(line["std"]) == statistics.stdev(own)
        assert line["baseline"] == "Initialisation only"
        init = [
            json.loads((r / "evaluation/test/init/scores.json").read_text())["scores"]["CIDEr"]
            for r in runs
            if r.parent.name == variant
        ]
        assert float(line["diff"]) == pytest.approx(statistics.fmean(own) - statistics.fmean(init))
    assert len([x for x in lines if (x["method"], x["metric"]) == ("init", "CIDEr")]) == 1  # both variants share it
    for line in (x for x in lines if x["metric"].startswith("BLEU") and x["method"] == "cgtgan"):  # of summed counts
        (init,) = [x for x in lines if (x["method"], x["metric"]) == ("init", line["metric"])]
        assert float(line["diff"]) == pytest.approx(float(line["mean"]) - float(init["mean"]), abs=2e-5)
        assert float(line["ci_low"]) <= float(line["ci_high"])
    table = (folder / "comparison.md").read_text(encoding="utf-8")
    assert len(re.findall(r"6 updates in [\d.]+(?: to [\d.]+)? s after initialisation", table)) == 2
    assert re.search(r"20 updates in [\d.]+(?: to [\d.]+)? s", table)
    said = (home / "said.txt").read_text(encoding="utf-8")
    assert "report: runs/demo_tiny/comparison/report.html" in said
    assert f"look at it: {(folder / 'report.html').resolve().as_uri()}\n" in said
    assert "python run.py stage=report 'runs=runs/demo_tiny/*/seed=*'" in (folder / "comparison.tex").read_text(
        encoding="utf-8"
    )


def test_a_multirun_prints_a_line_per_run_and_the_command_of_the_comparison(home: Path) -> None:
    lines = (home / "swept.txt").read_text(encoding="utf-8").splitlines()
    ends = [line for line in lines if re.match(r"run \d+/4, ", line)]
    assert len(ends) == 4
    ciders: dict[float, str] = {}
    for number, end in enumerate(ends, 1):
        reward, seed = ("clip_agg", "clip_cos")[(number - 1) // 2], (number - 1) % 2
        (folder,) = (home / "runs/demo_tiny").glob(f"*{reward}*/seed={seed}")
        cider = json.loads((folder / "evaluation/test/cgtgan/scores.json").read_text())["scores"]["CIDEr"]
        overrides = rf"run {number}/4, experiment=demo_tiny reward_weights={reward} seed={seed} .*"
        assert re.fullmatch(rf"{overrides}: CIDEr {100 * cider:.1f} of the test images, \d+ s", end)
        ciders.setdefault(cider, f"{end.partition(': CIDEr')[0]}, {(folder.resolve() / 'report.html').as_uri()}")
    assert not [line for line in lines if "scores x 100" in line]  # the tables are in each run's report.md
    assert lines[-2] == f"highest CIDEr: {ciders[max(ciders)]}"
    assert lines[-1] == "compare them: python run.py stage=report runs=runs/demo_tiny"


def test_it_needs_nothing_but_the_run_folders(home: Path, tmp_path: Path) -> None:
    kept = tmp_path / "copies"
    for run in (home / "runs/demo_tiny").glob("*/seed=*"):
        to = kept / run.relative_to(home)
        for name in ("settings.json", "metrics.jsonl"):
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / name, to)
        shutil.copytree(run / "evaluation", to / "evaluation")
    (unscored := kept / "runs/demo_tiny/late/seed=0").mkdir(parents=True)
    shutil.copy(next(kept.rglob("settings.json")), unscored)
    done = run_py(
        tmp_path,
        "stage=report",
        "runs=[copies/runs/demo_tiny/*/seed=0,copies/**]",
        "output=out",
        "report.resamples=200",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "left out: copies/runs/demo_tiny/late/seed=0 (not trained yet)" in done.stdout
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "The pictures are not available here" in page
    assert "200 resampled test sets" in page
    assert not (tmp_path / "artifacts").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs=nowhere/*"], "runs=nowhere/*: no run with scores of the test split is found there"),
        (["runs=runs/*/*/*", "runs=runs"], "runs is given 2 times"),
        (["runs=runs/demo_tiny", "runs/multirun"], "runs/multirun is no setting: if the shell has made several words"),
        (["runs=runs", "report.runs=[runs]"], "they are one setting"),
        (["runs=runs", "stage=train"], "runs are compared with stage=report"),
        (["runs=5"], "runs=5: no run with scores of the test split is found there"),
        (["report.baseline=init"], "report.baseline=init needs runs=PATTERN"),
        (["runs=runs", "report.resamples=3"], "report.resamples=3 is not accepted: it must be 100 or more"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(home: Path, words: list[str], said: str) -> None:
    done = run_py(home, "stage=report", *words)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_page_fits_a_phone_and_its_tables_scroll(home: Path, opened: Callable[..., Any]) -> None:
    page = opened(home / "runs/demo_tiny/comparison/report.html", width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = page.eval_on_selector_all(
        ".scroll", "boxes => boxes.map((b) => [b.scrollWidth > b.clientWidth, b.getAttribute('tabindex')])"
    )
    assert [True, "0"] in wide
    assert page.locator("details[open]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_every_part(home: Path, opened: Callable[..., Any], scheme: str) -> None:
    page = opened(home / "runs/demo_tiny/comparison/report.html", color_scheme=scheme)
    assert page.locator("nav a").all_inner_texts() == [
        "Scores",
        "What differs",
        "Curves",
        "Where they differ most",
        "Runs",
    ]
    for link in page.locator("nav a").all():
        assert page.locator(str(link.get_attribute("href"))).count() == 1
    top = page.locator("main section").first
    assert (top.get_attribute("id"), top.locator(".card img").count()) == ("first", 6)
    assert page.locator("#scores tbody th").first.inner_text().startswith("clip_agg")
    assert page.locator("#settings thead th").all_inner_texts() == [
        "Variant",
        "reward_weights.name",
        "reward_weights.clip_weight",
    ]
    curves = page.locator("#curves svg[role=img]")
    assert curves.first.get_attribute("aria-label").startswith("Line chart of CIDEr x 100 from step 0 to 6")
    assert page.locator("#curves h3").first.inner_text() == "Validation CIDEr"
    assert page.locator(".card img").count() == page.locator(".card").count() > 5  # the demo's pictures are available
    assert all(
        page.locator(".card img").evaluate_all("images => images.map((i) => i.naturalWidth > 0 && i.alt.length > 8)")
    )
    page.locator("#runs summary").click()
    assert page.locator("#runs tbody tr").count() == 4
    found = page.evaluate(CONTRAST)
    assert found["seen"] > 100
    assert found["faint"] == []


def test_names_are_text_whatever_they_are(opened: Callable[..., Any], tmp_path: Path) -> None:
    row = MethodRow(HOSTILE, HOSTILE, {"CIDEr": [1.0]}, seeds={"CIDEr": [0]}, origin=Origin("cgtgan"))
    picture = GalleryItem(HOSTILE, None, HOSTILE, [HOSTILE]), [([HOSTILE], HOSTILE, [1.0])]
    page = Comparison(
        About(HOSTILE, warning=HOSTILE, summary=HOSTILE, facts={HOSTILE: HOSTILE}, notes=[HOSTILE], made_by=HOSTILE),
        sets={HOSTILE: [row]},
        settings={HOSTILE: {HOSTILE: HOSTILE}},
        galleries={HOSTILE: (HOSTILE, [picture])},
        runs=[(HOSTILE, 0, None, None, Path(HOSTILE))],
    )
    file = tmp_path / "page.html"
    file.write_text(render_comparison(page), encoding="utf-8")
    shown = opened(file, width=390)
    assert shown.evaluate("window.hit") is None
    assert shown.locator("script").count() == 0
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    assert shown.locator("h1").inner_text() == HOSTILE
