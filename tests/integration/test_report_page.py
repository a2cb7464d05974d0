"""The report as a reader meets it: opened from disk in a real headless Chromium, light, dark and narrow, offline."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import watch
from PIL import Image

from cgtgan.reporting.one_run import summary
from cgtgan.reporting.page import About, Change, Changes, GalleryItem, Pictures, Report, render_report
from cgtgan.reporting.pictures import thumbnails
from cgtgan.reporting.svg import Curve, Histogram, Plot
from cgtgan.reporting.tables import MethodRow

HOSTILE = '</script><script>window.hit = 1</script><img src="https://evil.example/a.png" onerror="window.hit = 1">'
METRICS = ["BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
MORE = ["CLIPScore", "RefCLIPScore", "Distinct-1", "Distinct-2", "Vocabulary", "Novel", "Mean length", "Self-CIDEr"]
OURS, INIT, NEAREST = "CgT-GAN (CLIP-agg)", "Initialisation only", "Nearest sentence"
PER_PICTURE = ["BLEU-4", "CIDEr", "CLIPScore", "Length"]  # Length: a column of no paper, not times 100
CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels(colour).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      const alpha = channels(colour)[3];
      if (alpha === undefined || alpha === 1) return colour;
      if (alpha) throw new Error(`a half transparent background: ${colour}`);
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  let seen = 0;
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text.length || !element.checkVisibility() || element.tagName === "OPTION") continue;
    seen += 1;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(element instanceof SVGElement ? style.fill : style.color), luminance(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = `${element.tagName}.${element.className} ${element.textContent.trim().slice(0, 40)}`;
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)}: ${name}`);
  }
  return { seen, faint };
}"""


def picture(folder: Path, i: int) -> Path:
    """A file like a photograph's: 40 of them stand for any number of pictures."""
    path = folder / f"{i % 40}.jpg"
    if not path.is_file():
        noise = Image.effect_noise((12, 9), 90).resize((240, 180), Image.Resampling.BICUBIC)
        Image.merge("RGB", (noise, noise.rotate(180), noise)).save(path, quality=80)
    return path


def items(folder: Path, n: int) -> list[GalleryItem]:
    draw = random.Random(0)

    def scores(i: int) -> dict[str, float]:
        found = {
            "BLEU-4": draw.random(),
            "CIDEr": draw.uniform(-1, 4),
            "CLIPScore": draw.random(),
            "Length": draw.randint(3, 120),
        }
        found |= {"BLEU-4": math.nan} if i % 7 == 3 else {}
        return {m: value for m, value in found.items() if i % 5 != 4 or m != "CLIPScore"}  # some pictures lack a score

    made = []
    for i in range(n):
        colour, thing = draw.choice(["red", "Blue", "grün"]), draw.choice(["dog", "boat", "cake"])
        caption = HOSTILE if i == 0 else f"a {colour} {thing} number {i}x"
        own, init = scores(i), scores(i)
        others = {INIT: (f"two {thing}s", init), NEAREST: ("a corpus sentence", {})} if i % 3 else {INIT: ("", init)}
        references = [f"reference {k} of {i} with a {thing} in {colour}" for k in range(5)]
        made.append(GalleryItem(1000 + i, picture(folder, i), caption, references, own, others))
    return made


def make_report(folder: Path, n: int, budget: int = 15_000_000) -> Report:
    made = items(folder, n)
    rows = [
        MethodRow(INIT, "text only; reads the image embedding", {m: [0.5] for m in METRICS}, decoding="greedy"),
        MethodRow(
            OURS,
            "images and sentences",
            {m: [0.6, 0.7] for m in METRICS + MORE},
            ours=True,
            decoding="beam 3 (length penalty 1)",
        ),
        MethodRow("Human", "", {m: [0.9] for m in METRICS}, part="bound", decoding="none"),
        MethodRow(
            "CgT-GAN as published", "the paper's figures", {"CIDEr": [1.081]}, part="published", decoding="greedy"
        ),
    ]
    changes = [Change(item, "a grey dog number", 0.5) for item in made[:4]]
    small = thumbnails({item.image_id: item.image for item in made if item.image}, budget)
    facts = {"Corpus": "8,000 sentences", "A path": "x" * 90}
    curve = Curve("seed 0", [1, 2, 3], [1.0, 3.0, 2.0])
    curves = [Plot("Validation CIDEr", "CIDEr x 100", [curve], "greedy", lines={"init": 1.0, "human": 3.5})]
    discriminator = [Plot("Accuracy", "share", [Curve("samples", [1, 2, 3], [0.5, 0.7, 0.6])], level=0.5)]
    histogram = Histogram("CIDEr of single images", "CIDEr x 100", {OURS: [1.0, 2.0, 2.0], INIT: [0.5, 1.0]})
    left_out = "" if len(small) == n else f"{len(small):,} of {n:,} have a thumbnail."
    about = About("cgtgan: a page", "Unpaired image captioning", "the scores are meaningless", summary(rows), facts)
    return Report(
        replace(about, notes=["a note"], made_by="seed: 0\n"),
        rows,
        {"curves": curves, "discriminator": discriminator, "distributions": [histogram]},
        {"Right on samples": "0.50 → 0.60"},
        [Changes("Before and after", "4 differ", INIT, OURS, changes)],
        {"best": made[:3], "worst": made[3:6], "random": made[6:9]},
        Pictures(made, OURS, small, left_out),
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report(tmp_path_factory.mktemp("pictures"), 60)


@pytest.fixture
def opened(browser: Any, report: Report, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page from disk with all network blocked; at the end nothing was asked for and nothing went wrong."""
    contexts, trouble = [], []

    def open_page(html: str | None = None, width: int = 1200, watched: bool = True, **options: Any) -> Any:
        file = tmp_path / f"report{len(contexts)}.html"
        file.write_text(render_report(report) if html is None else html, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        if watched:
            watch(page, file, trouble)
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def ids(page: Any) -> list[int]:
    return page.eval_on_selector_all("#found .card", "cards => cards.map((card) => Number(card.dataset.id))")


def ordered(report: Report, value: Callable[[GalleryItem], float | None], sign: int) -> list[int]:
    """Ids by value, those without one last; equal ones in the report's order."""
    found = [(value(item), item.image_id) for item in report.pictures.items]
    known = [(v, i) for v, i in found if v is not None and math.isfinite(v)]
    ranked = [i for _, i in sorted(known, key=lambda pair: sign * pair[0])]
    return [int(i) for i in [*ranked, *(i for v, i in found if v is None or not math.isfinite(v))]]


def test_every_score_sorts_the_cards(opened: Callable[..., Any], report: Report) -> None:
    page = opened()
    assert page.locator("#metric option").all_inner_texts() == [*PER_PICTURE, "Picture id"]
    gains = [f"gain over {INIT}", f"gain over {NEAREST}"]
    assert page.locator("#whose option").all_inner_texts() == [OURS, INIT, NEAREST, *gains]
    assert page.locator("#metric").evaluate("e => e.selectedOptions[0].textContent") == "CIDEr"
    assert (
        ids(page) == ordered(report, lambda item: item.scores.get("CIDEr"), 1)[:24]
    )  # the worst first, before anything is touched
    for metric in PER_PICTURE:
        page.get_by_label("Sort by").select_option(metric)
        for whose, value in {
            OURS: lambda item, m=metric: item.scores.get(m),
            INIT: lambda item, m=metric: item.others[INIT][1].get(m),
            gains[0]: lambda item, m=metric: item.scores.get(m, math.nan) - item.others[INIT][1].get(m, math.nan),
        }.items():
            page.get_by_label("Whose score").select_option(whose)
            for order, sign in (("Lowest first", 1), ("Highest first", -1)):
                page.get_by_label("Order").select_option(order)
                assert ids(page) == ordered(report, value, sign)[:24], (metric, whose, order)
    page.get_by_label("Whose score").select_option(NEAREST)  # without any score a picture
    assert ids(page) == [item.image_id for item in report.pictures.items[:24]]
    page.get_by_label("Sort by").select_option("Picture id")
    assert ids(page) == [1059 - i for i in range(24)]
    assert page.get_by_label("Whose score").is_disabled()


def test_searching_filters(opened: Callable[..., Any], report: Report) -> None:
    page = opened()
    status, search = page.get_by_role("status"), page.get_by_label("Search")
    for words in ("BLUE  boat", "1017", "reference 4 of 12 ", "GRÜN", "two dogs"):
        wanted = words.lower().split()
        texts = {
            i.image_id: "\n".join(
                [str(i.image_id), i.caption, *(text for text, _ in i.others.values()), *i.references]
            ).lower()
            for i in report.pictures.items
        }
        found = {image_id for image_id, text in texts.items() if all(word in text for word in wanted)}
        search.fill(words)
        assert 0 < len(found) < 60
        assert status.inner_text().startswith(f"{len(found)} of 60 pictures"), words
        assert set(ids(page)) <= found
        assert len(ids(page)) == min(len(found), 24)
    search.fill("no such words")
    assert ids(page) == []
    assert status.inner_text() == "0 of 60 pictures, 0 of them on the page."
    search.fill("")
    assert len(ids(page)) == 24


def test_more_cards_come_when_asked_for(opened: Callable[..., Any], report: Report) -> None:
    page = opened()
    more = page.locator("#more")
    assert more.inner_text() == "Show 24 more"
    more.click()
    assert len(ids(page)) == 48
    assert page.evaluate("document.activeElement.dataset.id") == str(ids(page)[24])
    assert more.inner_text() == "Show 12 more"
    more.press("Enter")
    assert sorted(ids(page)) == [item.image_id for item in report.pictures.items]
    assert more.is_hidden()


def test_a_card_tells_its_scores_and_alt_texts_are_the_captions(opened: Callable[..., Any], report: Report) -> None:
    page = opened()
    page.get_by_label("Search").fill("1017")
    item = report.pictures.items[17]
    card = page.locator("#found .card")
    assert card.locator("img").get_attribute("alt") == f"Picture 1017: {item.caption}"
    assert card.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 200
    assert (
        card.locator(".badge").inner_text()
        == f"CIDEr {'−' if item.scores['CIDEr'] < 0 else ''}{abs(item.scores['CIDEr'] * 100):.1f}"
    )
    card.locator("summary").click()
    assert card.locator(".references li").all_inner_texts() == list(item.references)
    assert [t.split("\n")[0] for t in card.locator(".scores div").all_inner_texts()] == [
        m for m in PER_PICTURE if math.isfinite(item.scores.get(m, math.nan))
    ]
    assert card.locator(".extra").all_inner_texts()[1].startswith(NEAREST)
    alts = page.eval_on_selector_all("img", "images => images.map((image) => image.alt)")
    assert len(alts) > 10
    assert all(alt.startswith("Picture 1") for alt in alts)


def test_nothing_in_the_data_runs_and_no_request_can_leave(opened: Callable[..., Any], report: Report) -> None:
    page = opened()
    page.get_by_label("Search").fill("evil.example")
    assert page.locator("#found .caption").inner_text() == HOSTILE
    assert page.evaluate("window.hit") is None
    foreign = render_report(report).replace("</body>", "<script>window.hit = 1</script></body>")
    other = opened(foreign, watched=False)
    assert other.evaluate("window.hit") is None
    other.evaluate(
        "document.addEventListener('securitypolicyviolation',"
        " (e) => (window.refused ??= []).push(e.effectiveDirective))"
    )
    events = "{ onload: end, onerror: () => end('refused'), src: 'https://example.org/a' }"
    image = f"new Promise((end) => Object.assign(new Image(), {events}))"
    for ask in ("fetch('https://example.org/').then(() => 'went', () => 'refused')", image):
        assert other.evaluate(ask) == "refused"
    assert other.evaluate("window.refused") == ["connect-src", "img-src"]  # by the policy, not for want of a network


def test_without_scripts_the_page_is_whole_but_for_the_search(opened: Callable[..., Any], report: Report) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator("#search").is_hidden()
    assert page.locator("nav a[href='#pictures']").is_hidden()
    assert page.get_by_text("With scripts this page also searches and sorts all 60 pictures").is_visible()
    for section in ("comparison", "curves", "discriminator", "distributions", "changes", "best", "worst", "random"):
        assert page.locator(f"#{section} h2").is_visible(), section
    assert page.locator("#worst .caption").first.inner_text() == report.galleries["worst"][0].caption


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened: Callable[..., Any], scheme: str) -> None:
    page = opened(color_scheme=scheme)
    page.eval_on_selector_all("details", "all => all.forEach((one) => (one.open = true))")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    found = page.evaluate(CONTRAST)
    assert found["seen"] > 300
    assert found["faint"] == []


def test_a_phone_shows_it_without_sideways_scrolling(opened: Callable[..., Any]) -> None:
    page = opened(width=375, is_mobile=True, has_touch=True)
    page.eval_on_selector_all("details", "all => all.forEach((one) => (one.open = true))")
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [375, 375]
    assert page.locator("#comparison .scroll").first.evaluate(
        "e => e.scrollWidth > e.clientWidth"
    )  # the table scrolls in itself
    assert page.locator("#worst .cards").evaluate("e => e.scrollWidth > e.clientWidth")
    page.get_by_label("Search").fill("cake")
    assert page.locator("#found .card").first.bounding_box()["width"] > 300


def test_five_thousand_pictures_stay_usable(opened: Callable[..., Any], tmp_path: Path) -> None:
    report = make_report(tmp_path, 5000)
    html = render_report(report)
    assert len(html) < 25_000_000
    assert sum(len(uri) for uri, _ in report.pictures.thumbnails.values()) <= 15_000_000
    assert len(report.pictures.thumbnails) > 2500
    page = opened(html)
    status, search = page.get_by_role("status"), page.get_by_label("Search")
    assert status.inner_text() == "5,000 of 5,000 pictures, 24 of them on the page."
    assert ids(page) == ordered(report, lambda item: item.scores.get("CIDEr"), 1)[:24]
    page.get_by_label("Sort by").select_option("Length")
    page.get_by_label("Order").select_option("Highest first")
    assert ids(page) == ordered(report, lambda item: item.scores.get("Length"), -1)[:24]
    search.fill("number 4321x")
    assert ids(page) == [5321]
    assert page.locator("#found .caption").inner_text().endswith("number 4321x")
    assert (
        page.evaluate("document.querySelectorAll('*').length") < 3000
    )  # cards exist only as far as they are looked at


def test_pictures_beyond_the_budget_are_text(opened: Callable[..., Any], tmp_path: Path) -> None:
    report = make_report(tmp_path, 60, budget=40_000)
    assert 0 < len(report.pictures.thumbnails) < 60
    page = opened(render_report(report))
    assert f"{len(report.pictures.thumbnails)} of 60 have a thumbnail." in page.locator("#pictures .lead").inner_text()
    page.locator("#more").click()
    page.locator("#more").click()
    assert len(ids(page)) == 60
    assert page.locator("#found img").count() == len(report.pictures.thumbnails)
