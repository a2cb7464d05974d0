"""Before a stage starts: all that is missing is said at once, or fetched (`download`), by one process of a job."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from cgtgan import cli
from cgtgan.assets.preflight import Missing, missing_inputs
from cgtgan.config import Config, as_dict
from cgtgan.errors import MissingFileError, UserError
from cgtgan.runtime.artifacts import fingerprint
from cgtgan.runtime.download import Fetcher
from cgtgan.runtime.shards import Rank
from cgtgan.runtime.tracking import Tracker

_PARTS = ("dataset", "corpus", "clip_backbone", "generator", "discriminator", "evaluate")
ASKED = "asked"  # in `seen`, where the question was answered


def make_ready(cfg: Config, seen: dict[str, str]) -> None:
    """Raise `MissingFileError` with everything that `cfg.stage` needs and that is not there.

    seen: what earlier runs of this process found, by what they read; it is added to. So a multirun looks once, asks
    once, and lists once. The first process of a job speaks for those on its machine, which only end.
    """
    if cfg.stage in ("check", "download"):  # they look themselves
        return
    key = fingerprint(
        [cfg.stage, str(Path.cwd()), [as_dict(getattr(cfg, part)) for part in _PARTS], cfg.train.init_from]
    )
    if key not in seen:
        seen[key] = _looked(cfg, seen)
        if not seen[key]:
            return
        message, seen[key] = seen[key], "what is missing for this run is listed above, with an earlier run"
    elif message := seen[key]:
        raise MissingFileError(message)
    else:
        return
    rank = Rank.here()
    if rank.number and rank.local:
        raise SystemExit(1)
    if rank.number:
        message = f"{platform.node()}: inputs are missing here too, first: {message.splitlines()[0]}"
    raise MissingFileError(message)


def _looked(cfg: Config, seen: dict[str, str]) -> str:
    """Look, and fetch where that is wanted; empty, or what stops the run."""
    tracker, missing = Tracker(), missing_inputs(cfg)
    if any(one.fetch for one in missing) and _fetch_is_wanted(cfg, missing, seen):
        missing = fetch_missing(cfg, tracker)
    for one in missing:
        if not one.stops:
            tracker.say(f"note: {one.sentence}")
    return listed(missing)


def fetch_missing(cfg: Config, tracker: Tracker) -> list[Missing]:
    """Fetch what can be fetched; returns what is missing then. What cannot be brought is said, and the rest goes on."""
    fetcher, tried = Fetcher(tracker, cfg.mirror), set[str]()
    while True:  # a second round: which pictures are missing is known once the captions are there
        missing = missing_inputs(cfg)
        todo = [(one.key, one.fetch) for one in missing if one.fetch and one.key not in tried]
        if not todo:
            return missing
        for key, fetch in todo:
            tried.add(key)
            try:
                fetch(fetcher)
            except UserError as error:
                tracker.say(f"not fetched: {error}")


def listed(missing: Sequence[Missing]) -> str:
    """What stops a run, one per line, and the command that fetches what can be fetched; empty where nothing does."""
    stops = [one for one in missing if one.stops]
    if not stops:
        return ""
    fetched = sum(one.fetch is not None for one in stops)
    several = len(stops) > 1
    text = "\n  ".join([f"{len(stops)} inputs are missing:"] * several + [one.sentence for one in stops])
    if fetched:
        how_many = f"{fetched} of them" if fetched < len(stops) else "all" if several else "it"
        text += ("\n" if several else "; ") + f"`{cli.typed_with_stage('download')}` fetches {how_many}"
    return text


def _fetch_is_wanted(cfg: Config, missing: Sequence[Missing], seen: dict[str, str]) -> bool:
    """`download`; where it is null a person at a terminal is asked, once."""
    if cfg.download is not None:
        return cfg.download
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or Rank.here().world > 1 or ASKED in seen:
        return seen.get(ASKED) == "yes"
    print("missing:", *(f"  {one.sentence}" for one in missing), sep="\n")
    count = sum(one.fetch is not None for one in missing)
    try:
        answer = input(f"fetch {count} of these {len(missing)} now? [y/N] ")
    except EOFError:
        answer = ""
    seen[ASKED] = "yes" if answer.strip().lower() in ("y", "yes") else "no"
    return seen[ASKED] == "yes"
