"""A file imports only from floors below its own; floor 2's folders do not import each other; the settings load without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cgtgan"
SIDE_BY_SIDE = {"data", "models", "method", "evaluation"}


def part(module: str) -> tuple[int, str]:
    """(floor, folder) of a module of ours."""
    name = module.split(".")[1] if "." in module else ""
    if name in ("stages", "captioner"):  # the captioner is for Python what a stage is for the command line
        return 3, name
    return (2, name) if name in SIDE_BY_SIDE else (1, name)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name == "cgtgan" or name.startswith("cgtgan.")}


def test_every_file_imports_from_below() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    assert len(files) > 25
    for path in files:
        own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imports(path):
            other = part(module)
            assert other[0] <= own[0], f"{path.name} (floor {own[0]}) imports {module} (floor {other[0]})"
            if own[0] == 2 and other[0] == 2:
                assert own[1] == other[1], f"{path} imports {module}, beside its own folder"


def test_settings_load_without_torch() -> None:
    code = "import sys, cgtgan, cgtgan.config, cgtgan.artifacts, cgtgan.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_file_is_longer_than_400_lines() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400 or path.name == "config.py", path
