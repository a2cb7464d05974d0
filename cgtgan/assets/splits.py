"""Where a data set lies, and its splits. Imports no torch: scoring a file of captions needs the references alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cgtgan.assets.workspace import Workspace
from cgtgan.data.annotated_images import AbsentImages
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.data.datasets import Split, load_split
from cgtgan.data.demo_world import world_folder, write_demo_world


def data_root(ws: Workspace) -> Path:
    """The folder of the data set; the demo world is drawn there when first needed."""
    if not KINDS[ws.cfg.dataset.kind].drawn:
        return Path(ws.cfg.dataset.root).expanduser()
    return ws.once("data root", lambda: _demo_world(ws))


def _demo_world(ws: Workspace) -> Path:
    world = ws.cfg.dataset.world
    root = world_folder(ws.store.root, world)
    if not (root / "world.json").is_file():
        images = world.train_images + world.val_images + world.test_images
        with ws.store.lock(root), ws.tracker.progress("drawing the demo world", images) as bar:
            write_demo_world(world, root, lambda _done: bar.advance())
    return root


def dataset_split(ws: Workspace, name: str) -> Split:
    """Images and references of a split: of the authors' files where they are given, else of the data set.

    Pictures need not be on disk where the data set's ids name them and their embeddings are stored, nor to score
    captions made elsewhere: CLIPScore reads those in `images`.
    """
    return ws.once(("split", name), lambda: _split(ws, name))


def _split(ws: Workspace, name: str) -> Split:
    if ws.cfg.dataset.released:
        from cgtgan.assets.released import released_split  # torch

        if given := released_split(ws, name):
            return given
    root, dataset = data_root(ws), ws.cfg.dataset
    # of captions made elsewhere every listed image counts, on disk or not
    without_pictures = ws.cfg.captions is not None and KINDS[dataset.kind].listing == "annotations"
    if without_pictures:
        dataset = replace(dataset, max_bad_images=0)
    try:
        return load_split(dataset, name, root)
    except AbsentImages as absent:
        if without_pictures:
            return load_split(dataset, name, root, known=absent.ids)
        if not any((ws.store.root / "image_embeddings").glob("*.safetensors")):
            raise
        from cgtgan.assets.embedded import embedded_split  # torch

        return embedded_split(ws, name, root, absent)
