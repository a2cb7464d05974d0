"""Files of stage=caption: captions kept while it runs, so that a killed job continues, and its result."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cgtgan.data.picture_archives import picture_state
from cgtgan.data.user_files import printable
from cgtgan.errors import InputError
from cgtgan.runtime.artifacts import parse_json, write_json, write_text

# A picture and its captions, the best first: {"caption"}, and scores where caption.num asks for several.
CaptionedPicture: TypeAlias = tuple[Path, list[dict[str, Any]]]


class KeptCaptions:
    """`rows`: picture key -> its row, {"key", "captions": [...]} or {"key", "error"}.

    The file has one JSON object per line; the first says what the captions are made from (checkpoint, decoding, seed
    and number). Rows made from something else are dropped.
    """

    def __init__(self, path: Path, made_from: str):
        self.path = path
        head, *rows = _readable_lines(path) or [{}]
        if head.get("made_from") != made_from:
            rows = []
        # a picture that could not be read may be fixed by now, or Pillow may be
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in rows if {"key", "captions"} <= row.keys()}
        write_text(path, "".join(json.dumps(row) + "\n" for row in ({"made_from": made_from}, *self.rows.values())))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["key"]: row for row in rows}

    def remove(self) -> None:
        self.path.unlink()


def _readable_lines(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = parse_json(line, str(path))
        except InputError:  # the line that was being written when the job was killed
            break
        rows.append(row)
    return rows


def picture_key(path: Path) -> str:
    """A picture as it is now: another picture under the same name has another key."""
    state = picture_state(path)
    if state is None:  # opening it raises the error that names it
        return f"{path.absolute()}|"
    return f"{path.resolve()}|{state[0]}|{state[1]}"


def write_captions(target: Path, captions: Sequence[CaptionedPicture], *, several: bool) -> None:
    """A .csv has one line per caption, a .json is in COCO's results format: one entry per picture, its best caption.

    `several` adds the list of all captions to an entry.
    """
    if target.suffix == ".csv":
        text = io.StringIO()
        table = csv.DictWriter(text, ["image_id", *captions[0][1][0]], lineterminator="\n")
        table.writeheader()
        table.writerows({"image_id": printable(path)} | row for path, ranked in captions for row in ranked)
        write_text(target, text.getvalue())
    else:
        rows = [(printable(path), ranked) for path, ranked in captions]
        write_json(target, [{"image_id": name} | r[0] | ({"captions": r} if several else {}) for name, r in rows])
