"""`job.json` of a run folder: which job works there, how it stands, and what it made. The launcher and the job both write it.

Keys: cluster, job_id, name, overrides, log, wandb (id and url, or the command that sends it), settings and inputs (fingerprints),
submitted, state (submitted | running | queued again | done | failed | cancelled), starts, reason and code of a failure, result, made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cgtgan.config import Config, as_dict, custom_parts, leaves
from cgtgan.runtime.artifacts import fingerprint, locked, write_json
from cgtgan.runtime.versions import __version__
from cgtgan.runtime.wandb_run import stored_wandb_id

NAME = "job.json"

# What says that a stage did its work; whichever of these is there when a job ends must still be there, and as long, for it to be done.
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
# Stages that leave everything they make in the run folder. The others are quick where all is made, and are started again.
_IN_THE_RUN_FOLDER = ("train", "pipeline")


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def read(folder: Path) -> dict[str, Any]:
    """{} where there is none, or one that cannot be read."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(folder: Path, record: Mapping[str, Any]) -> None:
    with locked(folder / NAME, lambda: None):
        write_json(folder / NAME, record)


def update(folder: Path, **values: Any) -> None:
    """Set these keys and leave the others: launcher and job write at the same time."""
    with locked(folder / NAME, lambda: None):
        write_json(folder / NAME, read(folder) | values)


def update_failed(folder: Path, reason: str, code: int, *, follows: bool) -> None:
    """One process of a job failed. The first reason stays, unless it only follows (`follows`) from another process's failure."""
    with locked(folder / NAME, lambda: None):
        found = read(folder)
        if found.get("state") != "failed" or (found.get("follows") and not follows):
            write_json(
                folder / NAME,
                found | {"state": "failed", "reason": reason, "code": code, "follows": follows, "ended": now()},
            )


# -------------------------------------------------------------------------------------------------------------- done or not


def settings_fingerprint(cfg: Config) -> str:
    """Of every setting, and of the program's version."""
    return fingerprint(as_dict(cfg) | {"version": __version__})


def inputs_fingerprint(cfg: Config) -> str:
    """Of the size and time of every file that a setting names; of a folder, of the files in it. Contents would take minutes."""
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
    return {
        str(p.relative_to(folder)): p.stat().st_size
        for pattern in _MADE
        for p in sorted(folder.glob(pattern))
        if p.is_file()
    }


def is_done(folder: Path, cfg: Config, record: Mapping[str, Any]) -> bool:
    """Whether a job ended well with these very settings and inputs, and all it made is still there."""
    if cfg.stage not in _IN_THE_RUN_FOLDER or record.get("state") != "done" or not record.get("made"):
        return False
    same = record.get("settings") == settings_fingerprint(cfg) and record.get("inputs") == inputs_fingerprint(cfg)
    there = made(folder)
    return same and all(there.get(name) == size for name, size in record["made"].items())


# --------------------------------------------------------------------------------------------------------------------- W&B


def wandb_place(cfg: Config, folder: Path) -> dict[str, str] | None:
    """The run's W&B id, made now if it has none, and where it will be seen: `url`, or `sync`, the command that sends it later."""
    if cfg.wandb.mode == "disabled" or cfg.stage not in _IN_THE_RUN_FOLDER:
        return None
    number = stored_wandb_id(folder)
    entity = cfg.wandb.entity or os.environ.get("WANDB_ENTITY")
    if cfg.wandb.mode != "online":
        return {"id": number, "sync": f"wandb sync --include-online {folder / 'wandb'}"}
    if not entity:
        return {"id": number}
    server = os.environ.get("WANDB_BASE_URL", "").rstrip("/")
    server = "https://wandb.ai" if server in ("", "https://api.wandb.ai") else server
    return {"id": number, "url": f"{server}/{entity}/{cfg.wandb.project}/runs/{number}"}
