"""Which code this is, for pages and runs that must say what made them."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from cgtgan import __version__


@cache
def code_version() -> str:
    """Package version and, in a git checkout, the commit, with + when there are changes on top."""
    root = Path(__file__).parents[1]
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"cgtgan {__version__}"
    return f"cgtgan {__version__} ({commit}{'+' if changed else ''})"
