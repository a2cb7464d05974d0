"""A page in the browser that is watched: what it logs, breaks or asks the network for is trouble."""

from pathlib import Path
from typing import Any


def watch(page: Any, file: Path, trouble: list[str]) -> None:
    page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "request", lambda r: trouble.append(r.url) if r.url != file.as_uri() and not r.url.startswith("data:") else None
    )
