"""check: is everything there that a run will need? All that is missing is listed; nothing is made or fetched."""

from __future__ import annotations

from cgtgan.assets.preflight import missing_inputs
from cgtgan.assets.readiness import listed
from cgtgan.config import Config
from cgtgan.errors import MissingFileError
from cgtgan.runtime.shards import Rank
from cgtgan.runtime.tracking import Tracker


def run(cfg: Config) -> None:
    """Raises `MissingFileError` with what stops a run; what it can do without is a note."""
    if Rank.here().number:
        return
    missing, tracker = missing_inputs(cfg), Tracker()
    for one in missing:
        if not one.stops:
            tracker.say(f"note: {one.sentence}")
    if message := listed(missing):
        raise MissingFileError(message)
    tracker.say("check: everything that the run reads is here")
