"""What the documentation names exists: files of the repository, links, functions in a file, the version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cgtgan.run_identity import run_folder

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
FOLDERS = "cgtgan|conf|docs|sweeps|tests|benchmarks|hydra_plugins"


def prose(page: str) -> str:
    """The page without its code blocks, which may name a user's own files."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def place(name: str) -> Path:
    """A file as the pages name it: from the root of the repository, or from the package."""
    return ROOT / name if (ROOT / name).exists() else ROOT / "cgtgan" / name


@pytest.mark.parametrize("page", PAGES)
def test_every_path_in_backticks_exists(page):
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", prose(page)) + re.findall(r"`((?:\w+/)+\w+\.py)`", prose(page))
    assert not [path for path in paths if not place(path).exists()]


def test_paths_are_looked_for():
    found = {page: len(re.findall(r"`(?:\w+/)+\w+\.py`", prose(page))) for page in PAGES}
    assert found["README.md"] >= 3
    assert found["docs/method.md"] >= 20


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / name) if name else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_names_the_folder_that_make_demo_writes(typed):
    named = set(re.findall(r"runs/demo/\w[\w.]*/seed=\d+", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named == {str(run_folder(typed("experiment=demo")))}


def test_functions_named_with_a_file_are_in_that_file():
    missing = []
    for file, names in re.findall(r"`((?:\w+/)*\w+\.py)`((?:, `[\w.]+`)+)", prose("docs/method.md")):
        source = place(file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            last = name.rsplit(".", 1)[-1]
            if not re.search(rf"^\s*(?:(?:def|class) {last}\b|{last}\b.*[:=])", source, re.MULTILINE):
                missing.append(f"{file}: {name}")
    assert not missing


def test_the_citation_names_the_paper_and_a_version_of_the_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["references"][0]["doi"] == "10.1145/3581783.3611891"
    assert (ROOT / "LICENSE").read_text().startswith(f"{citation['license']} License")
    assert re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0] == str(
        citation["version"]
    )
