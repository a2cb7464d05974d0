"""Captions made elsewhere: files in COCO's results format -> their scores, and of several files a comparison.

Needs no run, checkpoint, backbone or corpus, except for the metrics that are made of them; imports no torch.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cgtgan.assets.scores import (
    ScoredCaptions,
    image_names_of,
    named_pictures,
    own_metric_identity,
    record_in,
    references_of,
    write_scores,
)
from cgtgan.assets.workspace import Workspace
from cgtgan.config import custom_name
from cgtgan.data.datasets import ImageRecord, Split
from cgtgan.errors import InputError, MissingFileError, Stopped, UserError, program
from cgtgan.evaluation.coco_files import id_list, load_results, under_reference_ids
from cgtgan.evaluation.records import settle_record
from cgtgan.reporting.many_runs import compare
from cgtgan.reporting.methods import FROM_FILE
from cgtgan.reporting.score_folder import SCORES, ScoreFolder, without_parents
from cgtgan.reporting.tables import MethodRow, console_table, domain_rows, score_tables
from cgtgan.reporting.variants import Selection, natural
from cgtgan.runtime.artifacts import file_fingerprint, fingerprint
from cgtgan.runtime.store import locked

References = Mapping[Any, list[str]] | None  # None: pictures alone


def score_files(ws: Workspace) -> None:
    """Score every file that `captions` names, show the scores, and compare those of several files.

    Of several files a wrong one is named, the others are scored, and an `InputError` at the end counts what is wrong.
    """
    places = _places(_files(ws.cfg.caption_patterns), ws.cfg.output)
    by_pictures = bool(ws.cfg.image_paths) and ws.cfg.evaluate.references is None
    references, wrong = None if by_pictures else references_of(ws) or None, list[str]()
    for file, folder in places.items():
        try:
            _score_file(ws, file, folder, references)
        except Stopped:
            raise
        except UserError as error:
            if len(places) == 1:
                raise
            wrong.append(str(file))
            ws.tracker.say(str(error) if file.name in str(error) else f"{file}: {error}")
    scored = [folder for file, folder in places.items() if str(file) not in wrong]
    if len(scored) > 1:
        selection = Selection([ScoreFolder(folder, ws.cfg.evaluate.split) for folder in scored])
        compare(ws.cfg, selection, _shown_with(ws, selection, references))
    for folder in scored if len(scored) == 1 else ():
        _show(ws, folder)
    if wrong:
        kept = "; the scores of the others are kept" if scored else ""
        raise InputError(f"{len(wrong)} of {len(places)} files were not scored: {', '.join(wrong)}{kept}")


def _files(patterns: Sequence[str]) -> list[Path]:
    """The files that a list of names and patterns means, each once. A pattern may be the name of a file."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.exists() or not glob.has_magic(pattern):
            files[path] = None
            continue
        matches = sorted(glob.glob(str(path), recursive=True), key=natural)  # noqa: PTH207 (absolute patterns too)
        if not matches:
            raise MissingFileError(f"captions={pattern}: no file matches this pattern")
        files |= dict.fromkeys(map(Path, matches))
    return list(files)


def _places(files: Sequence[Path], output: str | None) -> dict[Path, Path]:
    """The folder for the scores of each file: beside it, or in `output`, which is the folder itself for one file."""
    stems = [file.with_name(file.name.removesuffix(".gz").removesuffix(".json")) for file in files]
    if output is None:
        return {f: stem.with_name(stem.name + SCORES).resolve() for f, stem in zip(files, stems, strict=True)}
    home = Path(output).expanduser().resolve()
    if len(files) == 1:
        return {files[0]: home}
    names = (name.replace("/", "_") + SCORES for name in without_parents(stems))
    return {file: home / name for file, name in zip(files, names, strict=True)}


def _score_file(ws: Workspace, file: Path, folder: Path, references: References) -> None:
    captions = load_results(file)
    if not captions:
        raise InputError(f"captions={file}: the file is an empty list, so there is nothing to score")
    if references is None and not ws.cfg.image_paths:
        names = image_names_of(ws)
        captions = under_reference_ids(captions, names, names, file)
    elif references is None:
        pictures = named_pictures(ws, captions)
        if missing := [i for i in captions if i not in pictures]:
            raise InputError(f"{file}: {id_list(missing)} no picture in images={','.join(ws.cfg.image_paths)}")
    elif not captions.keys() <= references.keys():
        captions = under_reference_ids(captions, references, image_names_of(ws), file)
    # as COCO's own program: a part of the images of a reference file may be scored
    if references is not None and ws.cfg.evaluate.references is not None and not captions.keys().isdisjoint(references):
        if without := [i for i in references if i not in captions]:
            ws.tracker.say(f"{id_list(without)} no caption in {file}: left out")
        references = {i: texts for i, texts in references.items() if i in captions}
    made_from = {
        "captions": file_fingerprint(file),
        # without references the pictures tell what may be compared
        "references": fingerprint(sorted(map(str, captions)) if references is None else list(references.items())),
        "split": ws.cfg.evaluate.split,
        "metrics": list(map(custom_name, ws.cfg.evaluate.metrics)),
    } | own_metric_identity(ws)
    about = {"decoding": f"captions of {file.name}", "against": _against(ws), "made_from": made_from}
    waiting, name = f"waiting for another process that works in {folder}", folder.name
    with locked(folder / "captions.json", lambda: ws.tracker.say(waiting)):
        # what is scored now has the folder's name; scores of other captions or references there move beside it
        settle_record(folder.parent, name, about, [about], foreign=False)
        scored, metrics = ScoredCaptions({name: captions}, {}), ws.cfg.evaluate.metrics
        write_scores(ws, folder, {name: folder}, scored, references, metrics, about)


def _shown_with(ws: Workspace, selection: Selection, references: References) -> Split:
    """The references, and where `images` are given the pictures, for the gallery of a comparison."""
    images: list[ImageRecord] = []
    if ws.cfg.image_paths:
        ids = dict.fromkeys(i for scores in selection.runs for i in scores.captions(FROM_FILE))
        images = [ImageRecord(i, path) for i, path in named_pictures(ws, ids).items()]
    return Split("", images, dict(references or {}))


def _against(ws: Workspace) -> str:
    """What the captions are scored against, in words."""
    given = ws.cfg.evaluate.references
    if given is None and ws.cfg.image_paths:
        return f"pictures of {', '.join(ws.cfg.image_paths)}"
    return f"{ws.cfg.dataset.name}, {ws.cfg.evaluate.split} split" if given is None else Path(given).name


def _show(ws: Workspace, folder: Path) -> None:
    record = record_in(folder)
    name = record["decoding"].removeprefix("captions of ")
    whole = MethodRow(name, "", {metric: [value] for metric, value in record["scores"].items()})
    for table in score_tables([whole, *domain_rows(name, record)]):
        ws.tracker.show(console_table(table))
    ws.tracker.say(f"captions and scores, of the whole and of each image: {folder}")
    ws.tracker.say(f"look at them: {folder.as_uri()}")
    ws.tracker.say(f"for a page beside other captions: {program()} stage=evaluate 'captions=[{name},OTHER]' ...")
