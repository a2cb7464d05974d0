"""Models of the Hugging Face hub: what its cache here has of one, its newest commit, and fetching it.

A network is asked once, and then it is said how to do without one. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from cgtgan.errors import MissingFileError

TIMEOUT_S = 10.0
WEIGHTS = (".safetensors", ".bin", ".pt")
DESCRIPTIONS = (".json", ".txt", ".model", ".gz")  # config, tokenizer, image processor
CONFIGS = ("config.json", "open_clip_config.json")
CHECKPOINT_FILES = (
    *("generator.json", "generator.safetensors", "tokenizer.json", "checkpoint.json", "model.pt"),
    *("gap.safetensors", "prompts.safetensors"),  # how the generator reads an image
)
TOKENIZERS = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "tokenizer_config.json"),
)


def cached_snapshot(name: str, files: Sequence[str] = (*CONFIGS, *TOKENIZERS)) -> Path | None:
    """The folder in the hub's cache with one of `files` of `owner/name` or `owner/name@commit`; None: nothing of it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    model, _, commit = name.partition("@")
    for file in files:
        try:
            cached = try_to_load_from_cache(model, file, revision=commit or None)
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


@cache
def newest_commit(name: str) -> tuple[str | None, str]:
    """(the hub's newest commit of `owner/name`, ""), or (None, why there is none). Asked once per process."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name, timeout=TIMEOUT_S).sha, ""
    except _hub_errors() as error:
        return None, _first_line(error)


def _hub_errors() -> tuple[type[BaseException], ...]:
    """What the hub's client raises: errors of its HTTP client, of the system, and for a name that is none."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def lacking(folder: Path, *, weights: bool = True, tokenizer: bool = True) -> str | None:
    """Which part of a model its folder does not have: config.json, weights or tokenizer; None: all are there."""
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if weights and not names.intersection(CONFIGS):
        return "config.json"
    if weights and not any(name.endswith(WEIGHTS) for name in names):
        return "the weights"
    for index in names if weights else ():
        if index.endswith(".index.json") and (shard := _absent_shard(folder / index, names)):
            return shard
    return "the tokenizer" if tokenizer and not names.intersection(TOKENIZERS) else None


def _absent_shard(index: Path, names: set[str]) -> str | None:
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # what loads the model says what is wrong with it
    other_kind = not shards & names and any(name.endswith(WEIGHTS) for name in names)
    return None if other_kind else min(shards - names, default=None)


def missing_model(name: str, field: str, *, weights: bool = True, tokenizer: bool = True) -> str | None:
    """One sentence where a model's folder, or the hub's cache for a name, lacks what is needed; None: it is there."""
    place = Path(name).expanduser()
    if place.is_dir():
        part = lacking(place, weights=weights, tokenizer=tokenizer)
        return part and f"{field}={name}: {part} is not in that folder: download it again, or name another folder"
    if not is_hub_name(name):
        return f"{field}={name}: no such folder: correct the path, or give a hub name"
    folder = cached_snapshot(name)
    if folder and not lacking(folder, weights=weights, tokenizer=tokenizer):
        return None
    return f"{field}={name} is not in the hub's cache here: {how_to_fetch(name)}"


def how_to_fetch(name: str) -> str:
    """The fix where a model of the hub is not in the cache."""
    model, _, commit = name.partition("@")
    command = f"hf download {model}" + (f" --revision {commit}" if commit else "")
    return (
        f"run `{command}` where there is a network and copy the cache (HF_HOME) here, or give a folder; with "
        "HF_HUB_OFFLINE=1 no hub is asked"
    )


def is_hub_name(name: str) -> bool:
    """Whether it may name a model of the hub, `name` or `owner/name`, and is no path."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def fetch_model(name: str, field: str, files: Sequence[str] | None = None) -> None:
    """Bring a model into the hub's cache, or only `files` of it.

    Else descriptions, tokenizer, and the weights, as safetensors where it has these. The hub's client continues what
    was broken off, and takes proxies from the environment. Raises `MissingFileError`.
    """
    from huggingface_hub import HfApi, snapshot_download

    model, _, commit = name.partition("@")
    try:
        info = HfApi().model_info(model, revision=commit or None, timeout=TIMEOUT_S)
        names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
        weights = [n for n in names if n.endswith(".safetensors")] or [n for n in names if n.endswith(".bin")]
        chosen = files or [*weights, *(n for n in names if n.endswith(DESCRIPTIONS))]
        snapshot_download(model, revision=commit or None, allow_patterns=list(chosen))
    except _hub_errors() as error:
        raise MissingFileError(
            f"{field}={name} cannot be fetched ({_first_line(error)}): {how_to_fetch(name)}"
        ) from None
