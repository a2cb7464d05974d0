"""The report and gallery pages, the console table and the choice of gallery pictures."""

import base64
import io
import itertools
import math
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cgtgan.errors import InputError
from cgtgan.evaluation.curves import draw, smooth
from cgtgan.evaluation.report import (
    Curve,
    GalleryItem,
    MethodRow,
    Plot,
    Report,
    comparison_table,
    markdown_table,
    pick_gallery,
    render_gallery,
    render_report,
)

HOSTILE = '</p><script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)> {{ 7*7 }} & "quoted"'
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Tags with attributes, the text of the page and every string a browser could load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.stack == [], f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.stack):
            self.rows[-1][-1] = (self.rows[-1][-1] + " " + data.strip()).strip()

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def embedded(html: str) -> list[Image.Image]:
    pictures = []
    for attributes in Page(html).all("img"):
        head, body = attributes["src"].split(",", 1)
        assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
        picture = Image.open(io.BytesIO(base64.b64decode(body, validate=True)))
        assert head == f"data:image/{(picture.format or '').lower()};base64"
        pictures.append(picture)
    return pictures


def save(path: Path, size: tuple[int, int] = (48, 48), mode: str = "RGB") -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path)
    return path


def item(path: Path, **changes: object) -> GalleryItem:
    return GalleryItem(**{"image_id": 7, "image": path, "caption": "a red ball", **changes})  # type: ignore[arg-type]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    picture = save(tmp_path / "scene.png")
    return Report(
        title="Demo <i>world</i>",
        subtitle=HOSTILE,
        warning="random-weight models: the scores are meaningless",
        facts={"Decoding": "greedy", HOSTILE: HOSTILE},
        metrics=["BLEU-4", "CIDEr", "mean length"],
        rows=[
            MethodRow("Supervised", "on pairs", {"CIDEr": [2.6], "BLEU-4": [0.5]}, bound=True),
            MethodRow("Projection", "no training", {"CIDEr": [2.0, 2.2, 2.1], "BLEU-4": [0.41], "mean length": [99.0]}),
            MethodRow("CgT-GAN (CLIP-agg)", HOSTILE, {"CIDEr": [2.3, 2.4, 2.5], "mean length": [9.25]}, ours=True),
        ],
        plots=[
            Plot("CIDEr by step", "CIDEr", [Curve(HOSTILE, [0, 100, 200], [0.1, 1.5, 2.4])], HOSTILE),
            Plot("Nothing yet", "loss", []),
        ],
        best=[item(picture, caption=HOSTILE, references=[HOSTILE, "a ball"], cider=2.39, extra={"Projection": HOSTILE})],
        worst=[item(tmp_path / "absent.png", image_id="no-such", cider=math.nan)],
        random=[item(picture, caption="")],
        config_yaml=f"seed: 0\nname: '{HOSTILE}'\n",
        notes=[HOSTILE],
    )


def test_the_page_loads_nothing_from_elsewhere(report: Report) -> None:
    html = render_report(report)
    page = Page(html)
    loading = {"src", "srcset", "data", "action", "formaction", "poster", "background", "ping", "xlink:href"}
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form", "audio", "video"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in loading or value.startswith("#" if name == "xlink:href" else "data:image/")
            assert name != "href" or value.startswith("#") or value == "data:,"
            assert "url(" not in value or value.startswith("url(#")
    for style in re.findall(r"<style.*?</style>", html, flags=re.DOTALL):
        assert "url(" not in style
        assert "@import" not in style
    assert not {"<?xml", "<!DOCTYPE svg", "<metadata"} & set(re.findall(r"<\?xml|<!DOCTYPE svg|<metadata", html))
    policy = next(attributes["content"] for attributes in page.all("meta") if attributes.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert str(Path(report.best[0].image).parent) not in html  # no path of this machine
    assert all(attributes["href"][1:] in [a.get("id") for _, a in page.tags] for attributes in page.all("a"))


def test_hostile_text_is_shown_as_text(report: Report) -> None:
    for html in (render_report(report), render_gallery(HOSTILE, [*report.best, item(Path("<b>.png"))])):
        page = Page(html)
        assert HOSTILE in page.text
        assert "<script" not in html
        assert page.all("img")[0]["alt"] == f"Picture 7: {HOSTILE}"
        assert "<b>" not in html
    assert page.text.count("<b>.png") == 1


def test_lone_surrogates_and_controls_leave_a_writable_page(tmp_path: Path) -> None:
    html = render_gallery("t", [item(save(tmp_path / "a.png"), caption="a \ud800 ball\x00\u202e")])
    (tmp_path / "page.html").write_text(html, encoding="utf-8")


def test_small_picture_is_embedded_byte_for_byte(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        path = save(tmp_path / name)
        html = render_gallery("t", [item(path)])
        assert base64.b64encode(path.read_bytes()).decode() in html
        assert 'class="picture pixels"' in html


def test_large_picture_is_downscaled_and_looks_the_same(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.linspace(0, 255, 1000), np.linspace(0, 255, 600))
    original = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    original.save(tmp_path / "large.png")
    html = render_gallery("t", [item(tmp_path / "large.png")])
    (shown,) = embedded(html)
    assert shown.size == (320, 192)
    expected = np.asarray(original.resize(shown.size), dtype=float)
    assert np.abs(np.asarray(shown.convert("RGB"), dtype=float) - expected).mean() < 3
    assert 'class="picture pixels"' not in html


def test_odd_picture_kinds_look_right(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 120).astype(np.uint8), (80, 1))  # dark on the left, light on the right
    grey = Image.fromarray(ramp)
    colour = Image.merge("RGB", [grey, grey, grey])
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    grey.save(tmp_path / "grey.jpg", quality=95)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "sixteen.tif")
    Image.fromarray(ramp.astype(np.int32) * 1000).save(tmp_path / "int32.tif")
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "float.tif")
    colour.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    colour.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (120, 80), "red")])
    colour.save(tmp_path / "animated.png", save_all=True, append_images=[Image.new("RGB", (120, 80), "red")])
    colour.save(tmp_path / "picture.webp", lossless=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # shown upright after a quarter turn clockwise
    colour.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.jpg", exif=rotated, quality=95)
    paths = sorted(path for path in tmp_path.iterdir())
    assert len(paths) == 11
    for path, shown in zip(paths, embedded(render_gallery("t", [item(path) for path in paths])), strict=True):
        assert shown.size == (120, 80), path.name
        assert getattr(shown, "n_frames", 1) == 1, path.name
        difference = np.abs(np.asarray(shown.convert("L"), dtype=float) - ramp)
        assert difference.mean() < 4, path.name


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (400, 400), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    (shown,) = embedded(render_gallery("t", [item(tmp_path / "clear.png")]))
    assert min(shown.convert("RGB").getpixel((5, 5))) > 250  # type: ignore[arg-type]


def test_missing_and_broken_pictures_get_a_placeholder(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.png", (100, 100)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    names = ["absent.png", "cut.png", "text.jpg", "empty.png", "."]
    page = Page(render_gallery("t", [item(tmp_path / name) for name in names]))
    assert page.all("img") == []
    assert "The picture absent.png was not found." in page.text
    assert page.text.count("could not be read.") == 4
    assert page.text.count("a red ball") == 5


def test_means_and_spreads(report: Report) -> None:
    rows = {cells[0].split()[0]: cells for cells in Page(render_report(report)).rows}
    assert [cell.split() for cell in rows["Method"][2:]] == [["BLEU-4", "×100"], ["CIDEr", "×100"], ["mean", "length"]]
    spread = statistics.stdev([230, 240, 250])
    assert rows["CgT-GAN"][1:] == ["3", "-", f"240.0 ± {spread:.1f}", "9.25"]
    assert rows["Projection"][1:] == ["3", "41.0", "210.0 ± 10.0", "99.00"]
    assert rows["Supervised"][1:] == ["1", "50.0", "260.0", "-"]
    assert list(rows)[-1] == "Supervised"  # the bound stands last although it came first


def test_bold_is_the_best_unpaired_value_and_never_a_bound(report: Report) -> None:
    assert re.findall(r"<strong>(.*?)</strong>", render_report(report)) == ["41.0", "240.0"]


def test_summary_compares_with_the_best_other_and_the_bound(report: Report) -> None:
    text = Page(render_report(report)).text
    assert "reaches CIDEr 240.0 ± 10.0 (3 seeds): 30.0 above Projection (210.0)" in text
    assert "92% of Supervised (260.0)." in text
    assert "reaches" not in Page(render_report(Report("t", metrics=["CIDEr"]))).text


def test_scores_that_are_not_finite_are_counted_not_averaged() -> None:
    rows = [
        MethodRow("A", scores={"CIDEr": [1.0, math.nan, 2.0]}, ours=True),
        MethodRow("B", scores={"CIDEr": [math.nan]}),
        MethodRow("C", scores={"CIDEr": [math.inf, 0.5]}),
        MethodRow("D", scores={"CIDEr": []}),
    ]
    cells = [row[2] for row in Page(render_report(Report("t", metrics=["CIDEr"], rows=rows))).rows[1:]]
    assert cells == ["150.0 ± 70.7 2/3 seeds finite", "NaN", "50.0 1/2 seeds finite", "-"]


def test_empty_report_and_empty_gallery_are_pages() -> None:
    assert Page(render_report(Report("t"))).all("table") == []
    assert "No pictures to show." in Page(render_gallery("t", [])).text


def test_headers_have_a_scope_and_pictures_an_alt(report: Report) -> None:
    page = Page(render_report(report))
    assert {attributes["scope"] for attributes in page.all("th")} == {"col", "row", "rowgroup"}
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in page.all("svg"))


def paths(svg: str, width: float) -> list[list[tuple[float, float]]]:
    """The points of every unbroken stretch of the lines drawn with this stroke width, legend samples left out."""
    found = re.findall(rf'<path d="([^"]*)" style="fill: none; stroke: var[^"]*stroke-width: {width:g}[;"]', svg)
    stretches = [stretch.split() for path in found for stretch in path.split("M ")[1:]]
    points = [[(float(x), float(y)) for x, y in zip(s[0::3], s[1::3], strict=True)] for s in stretches]
    return [stretch for stretch in points if len({y for _, y in stretch}) > 1 or len(stretch) == 2]


def test_gaps_are_left_and_a_lone_point_is_a_dot() -> None:
    drawing = draw(Plot("t", "y", [Curve("a", [0, 1, 2, 3, 4], [1.0, math.nan, 2.0, 3.0, math.inf])], "note"))
    assert drawing.note == "note. 2 values are not finite and left out."
    assert [len(stretch) for stretch in paths(drawing.svg, 1.6)] == [2]
    assert len(re.findall('<use [^>]*style="fill: var', drawing.svg)) == 1


def test_plots_without_points_say_so(report: Report) -> None:
    assert Page(render_report(report)).text.count("No points were logged for this plot.") == 1
    assert draw(Plot("t", "y", [Curve("a", [0, 1], [math.nan, math.nan])])).svg == ""
    assert "b ends at no value" in draw(Plot("t", "y", [Curve("a", [0], [1.0]), Curve("b", [], [])])).svg
    with pytest.raises(InputError, match="'loss', curve 'D': 2 steps and 1 values"):
        draw(Plot("loss", "y", [Curve("D", [0, 1], [1.0])]))


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-12, 2e-12], [-1e299, 1e299], [1e308, 1.0], [1e17, 1e17]], ids=str)
def test_extreme_values_stay_in_the_picture(values: list[float]) -> None:
    svg = draw(Plot("t", "y", [Curve("a", list(range(len(values))), values)])).svg
    _, _, width, height = map(float, re.findall('viewBox="([^"]*)"', svg)[0].split())
    numbers = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", svg)]
    numbers += [(float(x), float(y)) for x, y in re.findall(r' x="([^"]*)" y="([^"]*)"', svg)]
    assert all(0 <= x <= width and -2 <= y <= height for x, y in numbers)
    assert 3 <= svg.count("<text") <= 18
    assert "nan" not in svg.lower().replace("nance", "")


def test_plots_follow_the_page_and_share_no_id() -> None:
    curves = [Curve("$a$ <b>\ud800_", [0, 5], [1.0, 2.0]), Curve("_b", [0, 5], [2.0, 1.0])]
    one, two = (str(draw(Plot(title, "y", curves)).svg) for title in ("one", "two"))
    assert one == str(draw(Plot("one", "y", curves)).svg)
    ids = [re.findall(' id="([^"]*)"', svg) for svg in (one, two)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    assert set(re.findall("#([mp][0-9a-f]{10})", one)) == set(ids[0])
    assert one.startswith("<svg")
    assert 'width="100%" role="img" aria-label="Line chart of y from step 0 to 5: $a$ &lt;b&gt;' in one
    assert ">$a$ &lt;b&gt;?_ (last 2)</text>" in one
    assert ">_b (last 1)</text>" in one
    assert "currentColor" in one
    assert not set(re.findall("(?:fill|stroke): (#[0-9a-f]+)", one))  # every colour comes from the page


def test_a_long_curve_stays_small_and_keeps_its_spike() -> None:
    values = [math.sin(i / 500) for i in range(20_000)]
    values[12_345] = 9.0
    drawing = draw(Plot("t", "y", [Curve("a", list(range(20_000)), values)]))
    assert len(drawing.svg) < 100_000
    assert "moving average" in drawing.note
    (raw,), (smoothed,) = paths(drawing.svg, 0.7), paths(drawing.svg, 1.6)
    tops = [sorted(y for _, y in line) for line in (raw, smoothed)]
    assert tops[0][0] < tops[1][0] / 2  # the spike, far above the average
    assert [x for x, _ in smoothed] == sorted(x for x, _ in smoothed)


def test_smooth() -> None:
    assert smooth([1, 2, 6, 4], 3) == pytest.approx([1.5, 3, 4, 5])
    assert smooth([1, math.nan, 3], 3) == pytest.approx([1, math.nan, 3], nan_ok=True)
    assert smooth([2.0], 9).tolist() == [2.0]
    assert smooth([], 3).tolist() == []


def test_pick_gallery_is_deterministic_and_disjoint() -> None:
    scores = {i: float((i * 37) % 100) for i in range(50)}
    best, worst, drawn = pick_gallery(scores, 8, seed=3)
    ranked = sorted(scores, key=lambda i: -scores[i])
    assert best == ranked[:8]
    assert worst == ranked[::-1][:8]
    assert len({*best, *worst, *drawn}) == 24
    shuffled = {i: scores[i] for i in sorted(scores, key=lambda i: (i * 13) % 50)}
    assert pick_gallery(shuffled, 8, seed=3) == (best, worst, drawn)
    assert pick_gallery(scores, 8, seed=4)[2] != drawn


def test_pick_gallery_with_few_equal_or_odd_images() -> None:
    mixed: dict[int | str, float] = {1: 0.5, "1": 0.5, "b": math.nan, 2: 0.5}
    for order in itertools.permutations(mixed):
        assert pick_gallery({i: mixed[i] for i in order}, 1, seed=0) == pick_gallery(mixed, 1, seed=0)
    best, worst, drawn = pick_gallery(mixed, 9, seed=0)
    assert "b" not in best + worst
    assert len(best) == len(worst) == 3
    assert set(drawn) == set(mixed)
    assert pick_gallery({}, 3, seed=0) == ([], [], [])
    assert pick_gallery(mixed, 0, seed=0) == ([], [], [])
    with pytest.raises(InputError, match="-1"):
        pick_gallery(mixed, -1, seed=0)


def test_console_table_fits_100_columns_with_every_column() -> None:
    metrics = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE"]
    rows = [
        MethodRow("Supervised on pairs", "upper bound", {metric: [3.01, 3.21] for metric in metrics}, bound=True),
        MethodRow("[red]markup[/red] " + "long name " * 4, "a note " * 8, {metric: [1.01, 1.31] for metric in metrics}),
        MethodRow("ours", "", {metric: [2.01, 2.21] for metric in metrics}, ours=True),
    ]
    console = Console(width=100, file=io.StringIO(), record=True, force_terminal=True)
    console.print(comparison_table(rows, metrics))
    text = console.export_text(clear=False)
    assert max(map(len, text.splitlines())) <= 100
    assert all(metric in text for metric in metrics)
    assert text.count("211.0") == text.count("116.0") == text.count("311.0") == 8
    assert "[red]markup[/red]" in text
    assert text.index("ours") < text.index("Supervised")
    styled = console.export_text(styles=True)
    assert len(re.findall(r"\x1b\[1m *211\.0", styled)) == 8
    assert not re.search(r"\x1b\[1m *(311|116)\.0", styled)


def test_markdown_table() -> None:
    rows = [
        MethodRow("Supervised", "on pairs", {"CIDEr": [2.6], "BLEU-4": [0.5]}, bound=True),
        MethodRow("a|b <i>", "two\nlines", {"CIDEr": [2.0, 2.2, 2.1], "BLEU-4": [0.41], "mean length": [99.0]}),
        MethodRow("ours", "", {"CIDEr": [2.3, 2.4, math.nan], "BLEU-4": [math.nan]}, ours=True),
    ]
    assert markdown_table(rows, ["BLEU-4", "CIDEr", "mean length"]).splitlines() == [
        "| method | note | BLEU-4 | CIDEr | mean length |",
        "| :-- | :-- | --: | --: | --: |",
        r"| a\|b &lt;i> | two lines | **41.0** | 210.0 ± 10.0 | 99.00 |",
        "| ours |  | NaN | **235.0** ± 7.1 (2/3 seeds finite) | - |",
        "| Supervised | on pairs | 50.0 | 260.0 | - |",
    ]


def test_neither_torch_nor_matplotlib_is_imported() -> None:
    code = "import sys, cgtgan.evaluation.report; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
