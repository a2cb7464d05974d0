"""What a terminal shows while something runs."""

import io
import re

import pytest
from rich.console import Console

from cgtgan.runtime.tracking import Tracker

LABELS = ("drawing the demo world", "scoring: bleu, meteor, rouge_l, cider", "sampling for self-CIDEr: Projection")


def terminal(width: int = 80) -> tuple[Tracker, io.StringIO]:
    printed = io.StringIO()
    return Tracker(Console(file=printed, width=width, force_terminal=True, color_system=None)), printed


def last_lines(printed: io.StringIO, count: int) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", printed.getvalue())
    return plain.rstrip("\n").split("\n")[-count:]


@pytest.mark.parametrize("width", [80, 120])
def test_bars_line_up_and_their_times_say_what_they_are(width: int) -> None:
    lines = []
    for label, total in zip(LABELS, (48, 566_747, 7), strict=True):
        made, printed = terminal(width)
        with made.progress(label, total) as bar:
            bar.advance(total)
        (line,) = last_lines(printed, 1)
        assert len(line) <= width
        assert f"{total:,}/{total:,} elapsed  0:00" in line
        lines.append(line)
    assert len({(line.index("━"), line.rindex("━"), line.index("elapsed")) for line in lines}) == 1
    assert (LABELS[1] in lines[1]) == (width == 120)  # cut where there is no room
    assert lines[0].startswith(LABELS[0])
    made, printed = terminal(width)
    with made.progress("stopped", 4) as bar:
        bar.advance(3)
    assert "3/4 elapsed  0:00  left  0:00" in last_lines(printed, 1)[0]


def test_an_outer_bar_is_hidden_while_an_inner_one_runs() -> None:
    made, printed = terminal()
    with made.progress("outer", 2) as outer:
        outer.advance()
        with made.progress("inner", 5) as inner:
            before = len(printed.getvalue())
            inner.advance(5)
            made.say("a line")
            during = printed.getvalue()[before:]
        outer.advance(note="loss 1.5")
    assert "inner" in during
    assert "outer" not in during
    last = last_lines(printed, 2)
    assert re.match(r"outer +━+ +2/2 elapsed  0:0\d", last[0])
    assert "left" not in last[0]
    assert last[1] == "  loss 1.5"


def test_without_a_terminal_there_is_a_line_every_quarter() -> None:
    printed = io.StringIO()
    with Tracker(Console(file=printed, width=80)).progress("encoding", 8, 2) as bar:
        for _ in range(6):
            bar.advance(note="x")
    assert printed.getvalue().splitlines() == [f"encoding {done}/8 x" for done in (4, 6, 8)]
