"""The report and gallery pages, the console table and the choice of gallery pictures."""

import base64
import hashlib
import io
import itertools
import json
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
from cgtgan.reporting.methods import COLUMNS, FIGURES, published_scores
from cgtgan.reporting.one_run import summary
from cgtgan.reporting.page import About, Change, Changes, GalleryItem, Pictures, Report, render_gallery, render_report
from cgtgan.reporting.pictures import THUMBNAIL_PIXELS, pick_gallery, thumbnails
from cgtgan.reporting.svg import Curve, Histogram, Plot, draw, smooth
from cgtgan.reporting.tables import MethodRow, console_table, markdown_table, score_table

HOSTILE = '</p><script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)> {{ 7*7 }} & "quoted"'
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """Tags with attributes, the text of the page and every string a browser could load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        html = re.sub(r'<t[dh][^>]*class="phone".*?</t[dh]>', "", html, flags=re.DOTALL)  # shown on a phone alone
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
        if self.stack and self.stack[-1] == "script":
            self.scripts.append(data)
            return
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
    rows = [
        MethodRow("Supervised", "on pairs", {"CIDEr": [2.6], "BLEU-4": [0.5]}, part="bound"),
        MethodRow("Projection", "no training", {"CIDEr": [2.0, 2.2, 2.1], "BLEU-4": [0.41], "mean length": [99.0]}),
        MethodRow("CgT-GAN (CLIP-agg)", HOSTILE, {"CIDEr": [2.3, 2.4, 2.5], "mean length": [9.25]}, ours=True),
    ]
    about = About(
        title="Demo <i>world</i>",
        subtitle=HOSTILE,
        warning="random-weight models: the scores are meaningless",
        summary=summary(rows),
        facts={"Decoding": "greedy", HOSTILE: HOSTILE},
        notes=[HOSTILE],
        made_by=f"seed: 0\nname: '{HOSTILE}'\n",
    )
    plots = [
        Plot("CIDEr by step", "CIDEr", [Curve(HOSTILE, [0, 100, 200], [0.1, 1.5, 2.4])], HOSTILE),
        Plot("Nothing yet", "loss", []),
    ]
    histogram = Histogram("CIDEr of single images", "CIDEr", {HOSTILE: [0.1, 0.5, 0.6]})
    others = {HOSTILE: (HOSTILE, {})}
    best = item(picture, caption=HOSTILE, references=[HOSTILE, "a ball"], scores={"CIDEr": 2.39}, others=others)
    worst = item(tmp_path / "absent.png", image_id="no-such", scores={"CIDEr": math.nan})
    listed = item(picture, caption=HOSTILE, references=[HOSTILE], scores={"CIDEr": 1.5}, others=others)
    change = Change(item(picture, caption=HOSTILE), "a ball", 0.5)
    return Report(
        about,
        rows,
        plots={"curves": plots, "discriminator": plots[:1], "distributions": [histogram]},
        health={"Right on samples": HOSTILE},
        changes=[Changes("Before and after", HOSTILE, "init", HOSTILE, [change])],
        galleries={"best": [best], "worst": [worst], "random": [item(picture, caption="")]},
        pictures=Pictures([listed], HOSTILE, {7: ("data:image/png;base64,AAAA", True)}, HOSTILE),
    )


def test_a_gallery_of_the_first_pictures_says_how_many_there_are(tmp_path: Path) -> None:
    items = [item(tmp_path / "a.png"), item(tmp_path / "b.png")]
    assert "2 pictures" in Page(render_gallery("Captions", items, 2)).text
    assert "the first 2 of 1,200 pictures" in Page(render_gallery("Captions", items, 1200)).text


def test_the_page_loads_nothing_from_elsewhere(report: Report) -> None:
    html = render_report(report)
    page = Page(html)
    loading = {"src", "srcset", "data", "action", "formaction", "poster", "background", "ping", "xlink:href"}
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "base", "form", "audio", "video"}
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
    data, script = page.scripts
    assert [a.get("type") for a in page.all("script")] == ["application/json", None]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall("script-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert json.loads(data)["pictures"][0][1] == [HOSTILE, HOSTILE]
    gallery = Page(render_gallery("t", report.galleries["best"]))
    assert gallery.all("script") == []
    assert "script-src" not in next(
        attributes["content"] for attributes in gallery.all("meta") if attributes.get("http-equiv")
    )
    assert str(Path(report.galleries["best"][0].image).parent) not in html  # no path of this machine
    assert all(attributes["href"][1:] in [a.get("id") for _, a in page.tags] for attributes in page.all("a"))


def test_hostile_text_is_shown_as_text(report: Report) -> None:
    for html in (render_report(report), render_gallery(HOSTILE, [*report.galleries["best"], item(Path("<b>.png"))])):
        page = Page(html)
        assert HOSTILE in page.text
        assert len(page.all("script")) == html.count("<script") == html.count("</script") == len(page.scripts)
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
    lines = Page(render_report(report)).rows
    rows, others = ({cells[0].split()[0]: cells for cells in part} for part in (lines[:5], lines[5:]))
    assert [cell.split() for cell in rows["Method"][2:]] == [["BLEU-4", "×100"], ["CIDEr", "×100"]]
    spread = statistics.stdev([230, 240, 250])
    assert rows["CgT-GAN"][1:] == ["3", "-", f"240.0 ± {spread:.1f}"]
    assert rows["Projection"][1:] == ["3", "41.0", "210.0 ± 10.0"]
    assert rows["Supervised"][1:] == ["1", "50.0", "260.0"]
    assert list(rows)[-1] == "Supervised"  # the bound stands last although it came first
    assert others["Method"][-1].split() == ["mean", "length"]
    assert [others[name][-1] for name in ("CgT-GAN", "Projection")] == ["9.25", "99.00"]
    assert len(others) == 3  # the bound has no such score


def test_bold_is_the_best_unpaired_value_and_never_a_bound(report: Report) -> None:
    found = re.findall(r"<strong>(.*?)</strong>", render_report(report))
    assert found == ["41.0", "240.0", "240.0"]  # CIDEr stands twice in its row: on a phone it is the first column


def test_summary_compares_with_the_best_other_and_the_bound(report: Report) -> None:
    text = Page(render_report(report)).text
    assert "reaches CIDEr 240.0 ± 10.0 (3 seeds): 30.0 above Projection (210.0)" in text
    assert "92% of Supervised (260.0)." in text
    assert "reaches" not in Page(render_report(Report(About("t")))).text


def test_a_published_row_stands_apart_and_every_row_names_its_decoding() -> None:
    rows = [
        MethodRow("Paper", "as printed", {"CIDEr": [1.081]}, part="published", decoding="greedy"),
        MethodRow("Human", "", {"CIDEr": [1.2], "Vocabulary": [900]}, part="bound", decoding="none"),
        MethodRow("ours", "", {"CIDEr": [0.9, 0.92], "Vocabulary": [812, 814]}, ours=True, decoding="beam 3"),
    ]
    html = render_report(Report(About("t", summary=summary(rows)), rows))
    first, second = Page(html).rows[:6], Page(html).rows[6:]
    assert first[0] == ["Method", "Decoding", "Seeds", "CIDEr ×100"]
    assert [row[0].split()[0] for row in first[1:]] == ["ours", "For", "Human", "Published:", "Paper"]
    assert [row[1:] for row in (first[1], first[3], first[5])] == [
        ["beam 3", "2", "91.0 ± 1.4"],
        ["none", "1", "120.0"],
        ["greedy", "-", "108.1"],
    ]
    assert [row[0].split()[0] for row in second] == [
        "Method",
        "ours",
        "For",
        "Human",
    ]  # the paper has none of these columns
    assert second[1][-1] == "813 ± 1"
    assert re.findall(r"<strong>(.*?)</strong>", html) == ["91.0"]
    assert ": against 108.1 of Paper; 76% of Human (120.0)." in Page(html).text
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(console_table(score_table(rows, ["CIDEr"])))
    assert "decoding: beam 3" in console.export_text()


def test_the_published_figures_are_those_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs/reproduction.md").read_text(encoding="utf-8")
    lines = [
        re.split(r" \| ", line.strip("| "))
        for line in text.splitlines()
        if "`python run.py experiment=" in line and line[0] == "|"
    ]
    experiments = {line[1].strip("`").split("=")[1]: line[2:7] for line in lines}
    names = {
        ("coco", "coco"): "coco_coco",
        ("flickr30k", "flickr30k"): "flickr30k_flickr30k",
        ("flickr30k", "coco"): "coco_to_flickr30k",
        ("coco", "flickr30k"): "flickr30k_to_coco",
    }
    assert {key: [str(figure) for figure in figures] for key, figures in FIGURES.items()} == {
        k: experiments[n] for k, n in names.items()
    }


def test_a_published_row_is_only_for_the_papers_setting() -> None:
    coco = {
        "dataset.name": "coco",
        "corpus.name": "coco",
        "clip_backbone.kind": "openai",
        "clip_backbone.model": "ViT-L/14",
        "dataset.max_images": None,
    }
    scores = published_scores(coco, "test", trained_here=True)
    assert scores is not None
    assert [round(100 * scores[column], 6) for column in COLUMNS] == [30.3, 26.9, 54.5, 108.1, 20.5]
    assert published_scores(coco, "test", trained_here=False) == scores  # the authors' checkpoint
    assert published_scores(coco, "val", trained_here=True) is None
    others = {
        "corpus.name": "gcc",
        "clip_backbone.model": "ViT-B/32",
        "clip_backbone.kind": "random",
        "dataset.max_images": 100,
    }
    for key, value in others.items():
        assert published_scores(coco | {key: value}, "test", trained_here=True) is None, key
    transfer = coco | {"dataset.name": "flickr30k"}
    assert published_scores(transfer, "test", trained_here=True) is None
    assert (published_scores(transfer, "test", trained_here=False) or {})["CIDEr"] == pytest.approx(0.475)


def test_what_changed_is_marked_word_by_word(tmp_path: Path) -> None:
    changes = [
        Change(GalleryItem(1, None, "a large red ball"), "a red ball", -0.25),
        Change(GalleryItem(2, None, ""), "a dog", math.nan),
    ]
    html = render_report(
        Report(About("t"), changes=[Changes("one to two", "2 of 3 differ", "step 1", "step 2", changes)])
    )
    assert re.findall("<ins>(.*?)</ins>", html) == ["large"]
    assert re.findall("<del>(.*?)</del>", html) == ["a dog"]
    assert "CIDEr −25.0" in html
    assert html.count('class="badge loss"') == html.count('class="badge') == 1  # one that is not finite is not shown
    assert "(empty caption)" in html


def test_thumbnails_fit_the_budget_and_leave_out_what_cannot_be_read(tmp_path: Path) -> None:
    images = {i: save(tmp_path / f"{i}.jpg", (400, 300)) for i in range(30)}
    roomy = thumbnails(images, 10**9)
    assert roomy.keys() == images.keys()
    sides = {max(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size) for uri, _ in roomy.values()}
    assert sides == {THUMBNAIL_PIXELS[0]}
    assert not any(pixelated for _, pixelated in roomy.values())
    whole = sum(len(uri) for uri, _ in roomy.values())
    half = thumbnails(images, whole // 2)  # smaller, and all of them
    assert half.keys() == images.keys()
    assert sum(len(uri) for uri, _ in half.values()) <= whole // 2
    few = thumbnails(images, whole // 40)
    assert 0 < len(few) < 30
    assert sum(len(uri) for uri, _ in few.values()) <= whole // 40
    assert few == thumbnails(images, whole // 40)
    (tmp_path / "3.jpg").write_bytes(b"no picture")
    steps: list[int] = []
    kept = thumbnails(images | {"gone": tmp_path / "gone.png"}, 10**9, lambda: steps.append(1))
    assert kept.keys() == images.keys() - {3}
    assert len(steps) == 31
    assert thumbnails({"dot": save(tmp_path / "dot.png")}, 10**6)["dot"][1]
    assert thumbnails({}, 10) == {}


def test_scores_that_are_not_finite_are_counted_not_averaged() -> None:
    rows = [
        MethodRow("A", scores={"CIDEr": [1.0, math.nan, 2.0]}, ours=True),
        MethodRow("B", scores={"CIDEr": [math.nan]}),
        MethodRow("C", scores={"CIDEr": [math.inf, 0.5]}),
        MethodRow("D", scores={"CIDEr": []}),
    ]
    cells = [row[2] for row in Page(render_report(Report(About("t"), rows))).rows[1:]]
    assert cells == ["150.0 ± 70.7 2/3 seeds finite", "NaN", "50.0 1/2 seeds finite", "-"]


def test_empty_report_and_empty_gallery_are_pages() -> None:
    assert Page(render_report(Report(About("t")))).all("table") == []
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


@pytest.mark.parametrize(
    "values", [[5.0], [0.0, 0.0], [1e-12, 2e-12], [-1e299, 1e299], [1e308, 1.0], [1e17, 1e17]], ids=str
)
def test_extreme_values_stay_in_the_picture(values: list[float]) -> None:
    svg = draw(Plot("t", "y", [Curve("a", list(range(len(values))), values)])).svg
    _, _, width, height = map(float, re.findall('viewBox="([^"]*)"', svg)[0].split())
    numbers = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", svg)]
    numbers += [(float(x), float(y)) for x, y in re.findall(r' x="([^"]*)" y="([^"]*)"', svg)]
    assert all(0 <= x <= width and -2 <= y <= height for x, y in numbers)
    assert 3 <= svg.count("<text") <= 18
    assert "nan" not in svg.lower().replace("nance", "")


def test_bands_levels_and_histograms() -> None:
    steps, values = list(range(5)), [1.0, 2.0, 3.0, 4.0, 5.0]
    plain, level, band = (
        draw(Plot("t", "y", [Curve("a", steps, values, spread)], level=at)).svg
        for spread, at in (([], None), ([], 2.5), ([0.5, 0.5, math.nan, 1.0, 1.0], None))
    )
    assert (plain.count("stroke-dasharray"), level.count("stroke-dasharray")) == (0, 1)
    assert "fill-opacity" not in plain + level
    assert (
        band.count('style="fill: var(--c0, #1f5fa8); fill-opacity: 0.18"') == 2
    )  # a gap where the spread is not known
    with pytest.raises(InputError, match="2 steps and 2 values with 1 spreads"):
        draw(Plot("t", "y", [Curve("a", [0, 1], [1.0, 2.0], [0.5])]))
    drawing = draw(
        Histogram("t", "CIDEr x 100", {"ours": [1.0, 2.0, 3.0, math.nan], "init": [0.0], "none": []}, "note")
    )
    assert (
        'aria-label="Histogram of CIDEr x 100 over 3 images. '
        "ours: median 2, half of them from 1.5 to 2.5; init: median 0" in drawing.svg
    )
    assert drawing.note == "note. 1 value is not finite and left out."
    assert ">ours (median 2)</text>" in drawing.svg
    assert draw(Histogram("t", "y", {"a": [math.nan]})).svg == ""
    assert draw(Histogram("t", "y", {"a": [5.0, 5.0]})).svg
    words = draw(Histogram("t", "words", {"a": [3, 3, 4, 9]})).svg
    assert draw(Histogram("t", "words", {"a": [3, 3, 4, 9.5]})).svg != words
    assert [
        text for text in re.findall(">([0-9.]+)</text>", words) if "." in text
    ] == []  # no half images and no half words


LINES = {"init": 12.0, "projection": 201.0, "mean shift": 200.0, "supervised": 202.4, "nearest": 201.2, "human": 290.0}


def test_lines_to_compare_with_are_named_at_their_ends_and_no_name_hides_another() -> None:
    plain = draw(Plot("t", "y", [Curve("a", [0, 5], [10.0, 200.0])])).svg
    svg = draw(Plot("t", "y", [Curve("a", [0, 5], [10.0, 200.0])], lines=LINES)).svg
    names = {name: f"{name} {value:.3g}" for name, value in LINES.items()}
    assert f'a ends at 200. Dashed lines: {", ".join(names.values())}."' in str(svg)
    dashed = re.findall(r'd="M (\S+) (\S+)\s+L (\S+) (\S+)\s+" [^>]*stroke-dasharray: [^>]*currentColor', svg)
    assert "stroke-dasharray" not in plain
    assert len(dashed) == len(LINES)
    assert all(y == end for _, y, _, end in dashed)
    places = re.findall(r'<text style="[^"]*" x="[^"]*" y="([^"]*)"[^>]*>([^<]*)</text>', svg)
    heights = {text: float(y) for y, text in places if text in names.values()}
    assert heights.keys() == set(names.values())
    ordered = [heights[names[name]] for name in sorted(LINES, key=lambda name: -LINES[name])]
    _, _, _, height = map(float, re.findall('viewBox="([^"]*)"', svg)[0].split())
    assert all(lower - higher > 8 for higher, lower in itertools.pairwise(ordered))  # a line of text, in points
    assert 0 < ordered[0] < ordered[-1] < height
    left_out = draw(Plot("t", "y", [Curve("a", [0, 5], [1.0, 2.0])], lines={"init": math.nan})).svg
    assert left_out == draw(Plot("t", "y", [Curve("a", [0, 5], [1.0, 2.0])])).svg


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
        MethodRow("Supervised on pairs", "upper bound", {metric: [3.01, 3.21] for metric in metrics}, part="bound"),
        MethodRow("[red]markup[/red] " + "long name " * 4, "a note " * 8, {metric: [1.01, 1.31] for metric in metrics}),
        MethodRow("ours", "", {metric: [2.01, 2.21] for metric in metrics}, ours=True),
    ]
    console = Console(width=100, file=io.StringIO(), record=True, force_terminal=True)
    console.print(console_table(score_table(rows, metrics)))
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
        MethodRow("Paper", "", {"CIDEr": [3.0]}, part="published", decoding="greedy"),
        MethodRow("Supervised", "on pairs", {"CIDEr": [2.6], "BLEU-4": [0.5]}, part="bound"),
        MethodRow(
            "a|b <i>",
            "two\nlines",
            {"CIDEr": [2.0, 2.2, 2.1], "BLEU-4": [0.41], "mean length": [99.0]},
            decoding="beam 3",
        ),
        MethodRow("ours", "", {"CIDEr": [2.3, 2.4, math.nan], "BLEU-4": [math.nan]}, ours=True),
    ]
    assert markdown_table(score_table(rows, ["BLEU-4", "CIDEr", "mean length"])).splitlines() == [
        "| method | note | decoding | BLEU-4 | CIDEr | mean length |",
        "| :-- | :-- | :-- | --: | --: | --: |",
        r"| a\|b &lt;i> | two lines | beam 3 | **41.0** | 210.0 ± 10.0 | 99.00 |",
        "| ours |  |  | NaN | **235.0** ± 7.1 (2/3 seeds finite) | - |",
        "| Supervised | on pairs |  | 50.0 | 260.0 | - |",
        "| Paper |  | greedy | - | 300.0 | - |",
    ]


def test_neither_torch_nor_matplotlib_is_imported() -> None:
    code = "import sys, cgtgan.reporting.page; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
