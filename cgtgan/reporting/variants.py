"""Run folders that `runs` names, gathered into variants: runs whose settings differ in the seed alone.

A folder with the scores of captions made elsewhere is a variant by itself.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cgtgan.config import Config
from cgtgan.errors import InputError, MissingFileError, UserError
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.score_folder import SCORES, ScoreFolder, is_score_folder, without_parents
from cgtgan.run_identity import scientific_settings
from cgtgan.runtime.artifacts import canonical_json, read_json

NAMED = 6  # folders that a sentence names; it only counts the others
OUTPUT = "comparison"  # the folder that a comparison is written to


@dataclass(frozen=True)
class Variant:
    """Runs of one experiment and variant, a seed each and in their order; `settings` is what they share."""

    name: str
    experiment: str
    variant: str
    settings: Mapping[str, Any]
    runs: Sequence[Run]


@dataclass
class Selection:
    """Runs to compare; `left_out`: (folder, why) of what cannot be compared."""

    runs: list[Run] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def sentence(self) -> str:
        """'left out: 2 folders: a (no run), b (not scored yet, step 40)', or nothing."""
        if not self.left_out:
            return ""
        named = ", ".join(f"{folder} ({why})" for folder, why in self.left_out[:NAMED])
        more = f" and {len(self.left_out) - NAMED} more" if len(self.left_out) > NAMED else ""
        return f"left out: {named}{more}"


def find_runs(patterns: Sequence[str], split: str) -> Selection:
    """Scored runs, and scores of captions made elsewhere, in and below the folders that match, by pattern and then by
    name (t80 before t100).

    Raises MissingFileError when none is left.
    """
    selection, seen = Selection(), set()
    for pattern in patterns:
        _refuse_whole_disk(pattern)
        matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207 (absolute patterns too)
        if not matches:
            selection.left_out.append((pattern, "nothing is there"))
        for match in sorted(matches, key=natural):
            folders = list(_run_folders(Path(match)))
            if not folders and "**" not in pattern and should_report(Path(match)):
                selection.left_out.append((match, "no run"))
            for run in (_opened(folder, split) for folder in folders if folder.resolve() not in seen):
                seen.add(run.folder.resolve())
                if why := _why_left_out(run):
                    selection.left_out.append((str(run.folder), why))
                else:
                    selection.runs.append(run)
    if not selection.runs:
        missing = f"runs={','.join(patterns)}: no run with scores of the {split} split is found there"
        left_out = f"; {selection.sentence()}" if selection.left_out else ""
        raise MissingFileError(f"{missing}, run stage=evaluate first{left_out}")
    return selection


def _refuse_whole_disk(pattern: str) -> None:
    """Raise `InputError` for `**` directly below the root of the disk or a home folder: such a search takes hours."""
    start, wild, _ = pattern.partition("**")
    folder = Path(start).expanduser().resolve()
    if wild and folder in (Path(folder.anchor), Path.home()):
        raise InputError(f"runs={pattern} would search all of {folder}: name the folder of the runs, such as runs/**")


def natural(text: str) -> list[Any]:
    """Sorts numbers in a name by their size."""
    return [(0, float(part), "") if part.isdecimal() else (1, 0.0, part) for part in re.split(r"(\d+)", text) if part]


def _run_folders(match: Path) -> Iterator[Path]:
    if match.name == "settings.json":
        match = match.parent
    for folder, below, files in os.walk(match) if not _in_a_run(match) else ():
        if "settings.json" in files or is_score_folder(Path(folder)):
            below.clear()
            yield Path(folder)
        below.sort(key=natural)


def _opened(folder: Path, split: str) -> Run:
    return Run(folder, split) if (folder / "settings.json").is_file() else ScoreFolder(folder, split)


def _in_a_run(match: Path) -> bool:
    return any((parent / "settings.json").is_file() for parent in match.absolute().parents)


def should_report(match: Path) -> bool:
    """A folder without a run that is neither a part of one nor what a multirun or a comparison wrote."""
    return match.is_dir() and match.name != OUTPUT and "multirun" not in match.parts and not _in_a_run(match)


def _why_left_out(run: Run) -> str:
    try:
        identity = run.settings["seed"], run.settings["name"]
        scored = [run.scores(method)["scores"] for method in run.scored]
    except (KeyError, TypeError):
        return "its settings.json or scores.json is not one of a run"
    except UserError as error:
        return str(error)
    if scored and None not in identity:
        return ""
    others = sorted(p.parent.parent.name for p in run.folder.glob("evaluation/*/*/scores.json"))
    if others:
        return f"scored on {', '.join(dict.fromkeys(others))}, not on {run.split}"
    return f"not scored yet, last logged step {run.last_step:,}" if run.last_step else "not trained yet"


# ------------------------------------------------------------------------------------------------------------ variants


def gather(selection: Selection) -> list[Variant]:
    """Variants in the order of their first run. A second run of one seed, in another folder, is left out.

    Runs of one name whose settings differ in more than the seed become separate variants: their names say what differs.
    """
    defaults = scientific_settings(Config())
    gathered: dict[tuple[str, str], dict[str, dict[int, Run]]] = {}  # (experiment, variant) -> settings -> seed -> run
    shared: dict[str, dict[str, Any]] = {}
    files = [run for run in selection.runs if isinstance(run, ScoreFolder)]
    for run in (run for run in selection.runs if not isinstance(run, ScoreFolder)):
        path = run.folder / "inputs.json"  # it says what train.precision came to, which is part of what was trained
        inputs = read_json(path) if path.is_file() else {}
        given = defaults | run.settings | {k: v for k, v in inputs.items() if k == "precision"}
        settings = {k: v for k, v in given.items() if k not in ("seed", "name")}
        key = canonical_json(settings)
        shared[key] = settings
        variant = run.folder.parent.name if run.folder.name.startswith("seed=") else run.folder.name
        seeds = gathered.setdefault((run.settings["name"], variant), {}).setdefault(key, {})
        first = seeds.setdefault(run.settings["seed"], run)
        if first is not run:
            selection.left_out.append((str(run.folder), f"the same run as {first.folder}: a seed counts once"))
    experiments = {experiment for experiment, _ in gathered}
    several, alone = len(experiments) > 1, len(experiments) == len(gathered)
    variants = []
    for (experiment, variant), parts in gathered.items():
        name = experiment if several and alone else f"{experiment} / {variant}" if several else variant
        suffixes = distinguish([shared[key] for key in parts])
        for (key, seeds), suffix in zip(parts.items(), suffixes, strict=True):
            runs = [seeds[seed] for seed in sorted(seeds)]
            variants.append(Variant(f"{name} ({suffix})" if suffix else name, experiment, variant, shared[key], runs))
    names = without_parents([file.folder.with_name(file.folder.name.removesuffix(SCORES)) for file in files])
    variants += [Variant(name, "", name, {}, [file]) for name, file in zip(names, files, strict=True)]
    place = {run.folder: i for i, run in enumerate(selection.runs)}
    return sorted(variants, key=lambda each: min(place[run.folder] for run in each.runs)) if files else variants


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Field -> its value in each, of the fields that are not the same in all; a missing one is None."""
    fields = dict.fromkeys(field for each in settings for field in each)
    columns = {name: [each.get(name) for each in settings] for name in fields}
    return {name: column for name, column in columns.items() if len(set(map(canonical_json, column))) > 1}


def telling_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Field -> its value in each, of the fewest fields that tell each from all others; empty where there is one."""
    columns = differing(settings)
    chosen: list[str] = []

    def kinds(fields: Sequence[str]) -> int:
        return len({canonical_json([columns[name][i] for name in fields]) for i in range(len(settings))})

    wanted = kinds(list(columns))
    while kinds(chosen) < wanted:  # names such as corpus.name before the fields that go with them
        chosen.append(max(columns, key=lambda name: (kinds([*chosen, name]), name.endswith(".name"))))
    return {name: columns[name] for name in chosen}


def distinguish(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each the fewest settings that tell it from all others: 'train.steps=300'; nothing where there is one."""
    columns = telling_settings(settings).items()
    return [", ".join(f"{name}={as_typed(values[i])}" for name, values in columns) for i in range(len(settings))]


def as_typed(value: Any) -> str:
    """A setting's value as it is typed."""
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else json.dumps(value)
