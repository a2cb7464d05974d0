"""`job.json` of a run folder: its job, the job's state, and what it made. The launcher and the job both write it.

Keys: cluster, job_id, name, overrides, log, wandb (id and url, or the command that sends it), settings and inputs
(fingerprints), submitted, state (submitted | running | queued again | done | failed | cancelled), starts, started,
ended, reason and code of a failure, follows (the failure follows from another process's), result, made.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cgtgan.config import Config, as_dict, custom_parts, leaves
from cgtgan.errors import InputError
from cgtgan.runtime.artifacts import fingerprint, read_json, write_json
from cgtgan.runtime.store import locked
from cgtgan.runtime.versions import __version__
from cgtgan.runtime.wandb_run import stored_wandb_id

NAME = "job.json"

# What a stage leaves in the run folder. A job is done while all of these that it left are there, with their sizes.
_MADE = ("settings.json", "checkpoints/last/*.*", "checkpoints/best/*.*", "evaluation/*/*/scores.json", "report.html")
# Settings that name files.
_INPUTS = (
    "dataset.",
    "corpus.path",
    "train.init_from",
    "evaluate.references",
    "evaluate.metrics",
    "clip_backbone.model",
    "checkpoint",
    "captions",
    "images",
)
# Stages that leave everything they make in the run folder. The others are quick where all is made: they start again.
_IN_THE_RUN_FOLDER = ("train", "pipeline")


# Keys that are used and what they hold; a file that holds something else is damaged.
_TYPES = {
    **dict.fromkeys(("cluster", "job_id", "log", "settings", "inputs", "state"), str),
    **{"starts": int, "code": int, "made": dict},
}


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def read(folder: Path) -> dict[str, Any]:
    """{} where there is none. Raises `InputError` for a damaged one."""
    path = folder / NAME
    record = read_json(path) if path.is_file() else {}
    for key, kind in _TYPES.items():
        if key in record and not isinstance(record[key], kind):
            raise InputError(f"{path} is damaged, {key} is {record[key]!r}: delete it and run the same command again")
    return record


def write(folder: Path, record: Mapping[str, Any]) -> None:
    with locked(folder / NAME, lambda: None):
        write_json(folder / NAME, record)


def update(folder: Path, **values: Any) -> None:
    """Set these keys and leave the others: launcher and job write at the same time."""
    with locked(folder / NAME, lambda: None):
        write_json(folder / NAME, read(folder) | values)


def update_failed(folder: Path, reason: str, code: int, *, follows: bool) -> None:
    """A process of a job failed. The first reason stays, unless it follows from another process's failure."""
    with locked(folder / NAME, lambda: None):
        record = read(folder)
        if record.get("state") != "failed" or (record.get("follows") and not follows):
            failure = {"state": "failed", "reason": reason, "code": code, "follows": follows, "ended": now()}
            write_json(folder / NAME, record | failure)


# ---------------------------------------------------------------------------------------------------------- done or not


def settings_fingerprint(cfg: Config) -> str:
    """Of every setting, and of the program's version."""
    return fingerprint(as_dict(cfg) | {"version": __version__})


def inputs_fingerprint(cfg: Config) -> str:
    """Of the size and time of every file that a setting names, and of the files in a named folder."""
    root = Path(cfg.dataset.root)
    named = [value for name, value, _ in leaves(cfg) if name.startswith(_INPUTS)]
    named += [term.function or key for key, term in cfg.reward_weights.terms.items()]
    words = [
        custom_parts(word)[0]  # of own code the file
        for value in named
        for word in (value if isinstance(value, list) else [value])
        if isinstance(word, str) and word
    ]
    stamps: dict[str, Any] = {}
    for path in [root, *map(Path, words), *(root / word for word in words)]:
        try:
            path = path.expanduser()
            files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
            stamps |= {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
        except (OSError, RuntimeError, ValueError):  # no such file, no such user's home, or no path at all
            continue
    return fingerprint(stamps)


def made(folder: Path) -> dict[str, int]:
    """Path in the run folder -> size, of what its stages leave there."""
    files = [file for pattern in _MADE for file in sorted(folder.glob(pattern)) if file.is_file()]
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def is_done(folder: Path, cfg: Config, record: Mapping[str, Any]) -> bool:
    """Whether a job ended well with these very settings and inputs, and all it made is still there."""
    if cfg.stage not in _IN_THE_RUN_FOLDER or record.get("state") != "done" or not record.get("made"):
        return False
    same = record.get("settings") == settings_fingerprint(cfg) and record.get("inputs") == inputs_fingerprint(cfg)
    there = made(folder)
    return same and all(there.get(name) == size for name, size in record["made"].items())


# ------------------------------------------------------------------------------------------------------------------ W&B


def wandb_place(cfg: Config, folder: Path) -> dict[str, str] | None:
    """The run's W&B id, made now if it has none, and its `url`, or `sync`: the command that uploads it later."""
    if cfg.wandb.mode == "disabled" or cfg.stage not in _IN_THE_RUN_FOLDER:
        return None
    wandb_id = stored_wandb_id(folder)
    entity = cfg.wandb.entity or os.environ.get("WANDB_ENTITY")
    if cfg.wandb.mode != "online":
        return {"id": wandb_id, "sync": f"wandb sync --include-online {shlex.quote(str(folder / 'wandb'))}"}
    if not entity:
        return {"id": wandb_id}
    server = os.environ.get("WANDB_BASE_URL", "").rstrip("/")
    server = "https://wandb.ai" if server in ("", "https://api.wandb.ai") else server
    return {"id": wandb_id, "url": f"{server}/{entity}/{cfg.wandb.project}/runs/{wandb_id}"}
