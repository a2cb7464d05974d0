"""docs/papers.md: every line of the index composes, and its row is one that an evaluation has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cgtgan.config import BASELINE_ROWS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "papers.md"
# paper, settings, row; the header and the rule below it have no settings
LINES = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_no_line_is_left_out():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(LINES) == len(rows) - 1  # the header
    named = " ".join(paper for paper, _, _ in LINES)
    for paper in ("CgT-GAN", "CapDec", "DeCap", "ViECap", "TOMCap", "Collapse", "SynC", "GDPO", "Dr. GRPO", "GAD"):
        assert paper in named


@pytest.mark.parametrize(("paper", "settings", "row"), LINES, ids=[paper for paper, _, _ in LINES])
def test_the_settings_of_a_paper_compose(typed, paper, settings, row):
    words = shlex.split(settings)
    experiments = [[]] if words[0].startswith("experiment=") else [["experiment=demo"], ["experiment=coco_coco"]]
    for experiment in experiments:
        plain, cfg = typed(*experiment), typed(*experiment, *words)
        assert row == "cgtgan" or (row in BASELINE_ROWS and row in cfg.evaluate.baselines)
        assert cfg != plain or words == ["experiment=coco_coco"]  # the default experiment has its own name alone
