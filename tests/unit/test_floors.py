"""The rooms of the package: a file imports only from rooms below its own, and imports form no circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cgtgan"
# room -> floor; rooms of one floor do not import each other
FLOORS = {
    "accepted_values": 0, "config": 0, "checks": 0, "run_identity": 0, "cli": 0, "setting_errors": 0, "errors": 0,
    "runtime": 1,
    "models": 2, "data": 2,
    "method": 3,
    "evaluation": 4, "launching": 4,
    "assets": 5,
    "captioning": 6, "reporting": 6,
    "training": 7,
    "stages": 8,
    "__init__": 9, "__main__": 9, "run": 9, "hydra_plugins": 9,
}  # fmt: skip
SETTINGS = {room for room, floor in FLOORS.items() if floor == 0}


def sources() -> dict[str, Path]:
    """Module name -> file, of the package, `run.py` and the Hydra plugins; a package's `__init__` has its own name."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "hydra_plugins").glob("*.py"), ROOT / "run.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def room(module: str) -> str:
    """`cgtgan.data.corpora` -> data; `cgtgan.config` -> config; `run` -> run."""
    first, *rest = module.split(".")
    return rest[0] if first == "cgtgan" else first


def imported(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            assert not getattr(node, "level", 0), f"{path}: relative imports are not followed here"
            continue
        for name in names:
            target = next((name for name in (name, name.rpartition(".")[0]) if name in known), None)
            if target is None and name.split(".")[0] in ("cgtgan", "hydra_plugins"):
                package = name if (PACKAGE.parent / Path(*name.split("."))).is_dir() else name.rpartition(".")[0]
                target = f"{package}.__init__"
            if target is not None and target != module:
                found.add(target)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = sources()
    assert len(known) > 60
    return {module: imported(module, path, known) for module, path in known.items()}


def test_every_folder_and_root_file_has_a_floor(graph) -> None:
    assert {room(module) for module in graph} <= FLOORS.keys()


def test_imports_run_down(graph) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if room(module) != room(target)
        and not (room(module) in SETTINGS and room(target) in SETTINGS)
        and FLOORS[room(target)] >= FLOORS[room(module)]
        and not (module == "run" and target == "cgtgan.__main__")
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle(graph) -> None:
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_stage_imports_a_stage_but_the_pipeline(graph) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if room(module) == room(target) == "stages" and module != "cgtgan.stages.pipeline"
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_method_knows_no_settings_and_no_files(graph) -> None:
    """Pure functions of the papers: tensors and numbers in, tensors and numbers out."""
    for module, targets in graph.items():
        if room(module) == "method":
            assert not {room(target) for target in targets} & {"config", "checks", "cli", "runtime", "data"}, module


def test_settings_load_without_torch() -> None:
    code = "import sys, cgtgan, cgtgan.config, cgtgan.runtime.artifacts, cgtgan.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("word", "slow"), [("--help", ("hydra", "omegaconf", "numpy")), ("seed=-3", ("numpy", "torch"))]
)
def test_help_and_an_error_wait_for_no_library(word: str, slow: tuple[str, ...]) -> None:
    code = f"import sys\nfrom cgtgan.__main__ import main\nsys.argv = ['run.py', {word!r}]\nmain()\n"
    code += f"sys.exit(str([name for name in {slow!r} if name in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout + done.stderr).strip().endswith(("one table", "2**31-1")), done.stderr


def test_no_file_is_longer_than_400_lines() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400 or path.name == "config.py", path
