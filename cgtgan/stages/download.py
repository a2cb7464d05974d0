"""download: what the run needs and what has a public address is fetched; for the rest it says where to get it."""

from __future__ import annotations

from cgtgan.assets.readiness import fetch_missing
from cgtgan.config import Config
from cgtgan.errors import MissingFileError
from cgtgan.runtime.shards import Rank
from cgtgan.runtime.tracking import Tracker


def run(cfg: Config) -> None:
    """Raises `MissingFileError` with what is still missing, whether a run could do without it or not."""
    if Rank.here().number:
        return
    tracker = Tracker()
    if missing := fetch_missing(cfg, tracker):
        still = [f"  {one.sentence}" for one in missing]
        raise MissingFileError("\n".join([f"{len(still)} inputs are still missing:", *still]))
    tracker.say("download: everything that the run reads is here")
