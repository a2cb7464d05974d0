"""Which run folders a pattern finds, which are left out and why, and which of them are one variant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_folders import make_run, write

from cgtgan.errors import InputError, MissingFileError
from cgtgan.reporting.variants import NAMED, Selection, differing, distinguish, find_runs, gather, natural

ONE = {"cgtgan": [1.0, 2.0]}


def folders(found: Selection, root: Path) -> list[str]:
    return [str(run.folder.relative_to(root)) for run in found.runs]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for variant in ("t80", "t100"):
        for seed in (0, 1):
            make_run(tmp_path, variant, seed, ONE)
    return tmp_path


@pytest.mark.parametrize(
    "pattern", ["exp/*/seed=*", "exp/*", "*", "**", "**/settings.json", "exp/*/seed=[01]", "*/t*0/*"]
)
def test_a_pattern_finds_every_run_once_in_the_order_of_the_numbers(root: Path, pattern: str) -> None:
    found = find_runs([f"{root}/{pattern}"], "test")
    assert folders(found, root) == ["exp/t80/seed=0", "exp/t80/seed=1", "exp/t100/seed=0", "exp/t100/seed=1"]
    assert found.left_out == []


def test_a_run_is_not_looked_into(root: Path) -> None:
    write(root / "exp/t80/seed=0/checkpoints/step_1/settings.json", {})
    for pattern in ("exp/*/seed=*", "**", "exp/t80/seed=0/*", "exp/*/*/**"):
        found = find_runs([f"{root}/{pattern}", f"{root}/exp"], "test")
        assert (len(found.runs), found.left_out) == (4, [])


def test_patterns_keep_their_order(root: Path) -> None:
    found = find_runs([f"{root}/exp/t100/seed=1", f"{root}/exp/*/*"], "test")
    assert folders(found, root) == ["exp/t100/seed=1", "exp/t80/seed=0", "exp/t80/seed=1", "exp/t100/seed=0"]


def test_what_cannot_be_compared_is_named_in_one_line(root: Path) -> None:
    (root / "exp/t80/notes").mkdir()
    (root / "exp/t80/file.txt").touch()
    shutil.rmtree(root / "exp/t80/seed=1/evaluation")  # trained, not scored
    shutil.rmtree(root / "exp/t100/seed=0/evaluation")
    (root / "exp/t100/seed=0/metrics.jsonl").unlink()  # only begun
    (root / "exp/t100/seed=1/evaluation/test/cgtgan/scores.json").write_text('{"sco')
    make_run(root, "val", 0, ONE, split="val")
    write(root / "exp/other/seed=0/settings.json", {"seed": 0})
    found = find_runs([f"{root}/exp/*/*", f"{root}/nowhere"], "test")
    assert folders(found, root) == ["exp/t80/seed=0"]
    why = {Path(folder).relative_to(root).as_posix(): reason for folder, reason in found.left_out}
    assert why.pop("exp/t100/seed=1").startswith(
        f"{root}/exp/t100/seed=1/evaluation/test/cgtgan/scores.json is not whole"
    )
    assert why == {
        "exp/t80/notes": "no run",
        "exp/t80/seed=1": "not scored yet, last logged step 30",
        "exp/t100/seed=0": "not trained yet",
        "exp/val/seed=0": "scored on val, not on test",
        "exp/other/seed=0": "its settings.json or scores.json is not one of a run",
        "nowhere": "nothing is there",
    }
    assert "\n" not in found.sentence()
    assert found.sentence().endswith(f"and {len(found.left_out) - NAMED} more")


def test_none_left_is_an_error_that_says_why(root: Path) -> None:
    with pytest.raises(
        MissingFileError,
        match=r"no run with scores of the val split is found there.*t80/seed=0 \(scored on test, not on val\)",
    ):
        find_runs([f"{root}/exp/t80/*"], "val")
    with pytest.raises(MissingFileError, match="nothing is there"):
        find_runs([f"{root}/no*where"], "test")


@pytest.mark.parametrize("pattern", ["/**", "/**/seed=*", "~/**", "/tmp/../**"])
def test_the_whole_disk_is_not_searched(pattern: str) -> None:
    with pytest.raises(InputError, match=r"would search all of .*: name the folder of the runs, such as runs/\*\*"):
        find_runs([pattern], "test")


def test_what_a_comparison_and_a_multirun_write_is_no_complaint(root: Path) -> None:
    (root / "exp/comparison").mkdir()
    (root / "multirun/2026-01-01").mkdir(parents=True)
    assert find_runs([f"{root}/*", f"{root}/exp/*", f"{root}/*/*"], "test").left_out == []


def test_seeds_of_one_setting_are_a_variant(root: Path) -> None:
    variants = gather(find_runs([f"{root}/**"], "test"))
    assert [(v.name, v.experiment, [r.settings["seed"] for r in v.runs]) for v in variants] == [
        ("t80", "exp", [0, 1]),
        ("t100", "exp", [0, 1]),
    ]
    assert "seed" not in variants[0].settings


def test_other_settings_under_one_name_are_never_averaged(root: Path) -> None:
    make_run(root / "later", "t80", 1, ONE, settings={"train.steps": 7, "generator.width": 32})
    make_run(root / "later", "t80", 2, ONE, settings={"train.steps": 7})
    variants = gather(find_runs([f"{root}/exp/t80", f"{root}/later"], "test"))
    assert [(v.name, [r.settings["seed"] for r in v.runs]) for v in variants] == [
        ("t80 (generator.width=768, train.steps=null)", [0, 1]),
        ("t80 (generator.width=32, train.steps=7)", [1]),
        ("t80 (generator.width=768, train.steps=7)", [2]),
    ]


def test_another_precision_is_another_variant(root: Path) -> None:
    write(root / "exp/t80/seed=0/inputs.json", {"images": "a", "precision": "float32"})
    write(root / "exp/t80/seed=1/inputs.json", {"images": "a", "precision": "bf16"})
    assert [v.name for v in gather(find_runs([f"{root}/exp/t80"], "test"))] == [
        "t80 (precision=float32)",
        "t80 (precision=bf16)",
    ]


def test_a_seed_counts_once(root: Path) -> None:
    shutil.copytree(root / "exp", root / "copy/exp")
    found = find_runs([f"{root}/exp", f"{root}/copy"], "test")
    assert [len(v.runs) for v in gather(found)] == [2, 2]
    assert len(found.left_out) == 4
    assert found.left_out[0][1] == f"the same run as {root}/exp/t80/seed=0: a seed counts once"


def test_a_setting_that_an_older_run_does_not_know_has_its_default(root: Path) -> None:
    path = root / "exp/t80/seed=0/settings.json"
    settings = json.loads(path.read_text())
    del settings["train.kl_weight"]
    path.write_text(json.dumps(settings))
    assert [len(v.runs) for v in gather(find_runs([f"{root}/exp/t80"], "test"))] == [2]


def test_names_have_what_it_takes_to_tell_them_apart(tmp_path: Path) -> None:
    make_run(tmp_path, "long_a", 0, ONE, experiment="first")
    make_run(tmp_path, "long_a", 0, ONE, experiment="second")
    assert [v.name for v in gather(find_runs([str(tmp_path)], "test"))] == ["first", "second"]
    make_run(tmp_path, "long_b", 0, ONE, experiment="second")
    assert [v.name for v in gather(find_runs([str(tmp_path)], "test"))] == [
        "first / long_a",
        "second / long_a",
        "second / long_b",
    ]


def test_what_differs() -> None:
    settings = [
        {"a": 1, "b": 0.5, "x.name": "p"},
        {"a": 1, "b": 0.5000001, "x.name": "q"},
        {"a": 1, "b": 0.5, "x.name": "q"},
    ]
    assert differing(settings) == {"b": [0.5, 0.5000001, 0.5], "x.name": ["p", "q", "q"]}
    assert distinguish(settings) == ["x.name=p, b=0.5", "x.name=q, b=0.5000001", "x.name=q, b=0.5"]
    assert distinguish(settings[:1]) == [""]
    assert sorted(["t100", "t80", "t80.5", "a"], key=natural) == ["a", "t80", "t80.5", "t100"]
