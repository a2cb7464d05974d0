"""The version of the package, and which code a page or a run was made with."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.2.0"


@cache
def code_version() -> str:
    """Package version and, in a git checkout, the commit, with + when there are changes on top."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: the git repository around site-packages is another project's
        return f"cgtgan {__version__}"
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return f"cgtgan {__version__}"
    return f"cgtgan {__version__} ({commit.stdout.strip()}{'+' if changed.stdout.strip() else ''})"
