"""The authors' released files in the place of our artifacts: read once, kept as safetensors and JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgtgan.assets.backbone import backbone_description, backbone_producer
from cgtgan.assets.workspace import Workspace
from cgtgan.config import GeneratorConfig, as_dict
from cgtgan.data.datasets import Split
from cgtgan.data.released import ReleasedCorpus, ReleasedImages, ReleasedPairs, read_model, read_released
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.generator_bundle import generator_identity
from cgtgan.models.released_generator import load_released_generator
from cgtgan.runtime.artifacts import (
    Embeddings,
    atomic_path,
    file_fingerprint,
    load_embeddings,
    load_sentences,
    read_json,
    save_embeddings,
    save_sentences,
    write_json,
)
from cgtgan.runtime.producers import settings_of, with_format
from cgtgan.runtime.store import ArtifactStore

FIELD = "dataset.released"
RELEASED_FORMAT = 1  # raise it where the same file is read into something else (runtime/producers.py)


@dataclass(frozen=True)
class Imported:
    """One of their files: where it is, and the folder of what was read from it."""

    file: Path
    folder: Path
    kind: str  # images | corpus | pairs | sentences

    @property
    def split(self) -> str | None:
        """As the file's name says it."""
        found = re.search(r"(?:^|_)(train|val|test)(?:_|$)", self.file.stem)
        return found[1] if found else None


def released_split(ws: Workspace, name: str) -> Split | None:
    """A split without image files: its references by id (val, test)."""
    found = _images_of(ws, name)
    if found is None:
        return None
    references = [] if name == "train" or found.kind == "pairs" else read_json(found.folder / "references.json", list)
    return Split(name, [], dict(references))


def released_images(ws: Workspace, name: str) -> Embeddings | None:
    """(N, D) of a split; of the pairs, whose file names no image, row numbers are the ids."""
    found = _images_of(ws, name)
    return found and load_embeddings(found.folder / "images.safetensors", kind="image_embeddings")


def released_aggregated(ws: Workspace, name: str) -> Embeddings | None:
    """(N, D) of the train images, where the pairs are given, at the temperature that the file's name says."""
    pairs = _role(ws, "pairs", None) if name == "train" else None
    if pairs is None:
        return None
    named = re.search(r"_captions_.*_(\d+(?:\.\d+)?)$", pairs.file.stem)
    t = ws.cfg.aggregation_t.t
    if named and float(named[1]) != t:
        raise InputError(
            f"aggregation_t.t={t:g} and {FIELD}={pairs.file} contradict each other: that file was made with "
            f"t={named[1]}; set it so"
        )
    return load_embeddings(pairs.folder / "aggregated.safetensors", kind="aggregated_embeddings")


def released_corpus(ws: Workspace) -> tuple[Sequence[str], dict[str, int], dict[str, Any]] | None:
    """(sentences, counts, what they come from): rows as the released embeddings where these are given."""
    found = _role(ws, "corpus", None) or _role(ws, "sentences", None)
    if found is None:
        return None
    return *load_sentences(found.folder / "sentences.safetensors"), {"released": found.folder.name}


def released_sentence_embeddings(ws: Workspace) -> Embeddings | None:
    """(M, D), rows as `released_corpus`."""
    found = _role(ws, "corpus", None)
    return found and load_embeddings(found.folder / "texts.safetensors", kind="sentence_embeddings")


# ---------------------------------------------------------------------------------------------------------- their files


def _images_of(ws: Workspace, name: str) -> Imported | None:
    if name == "train" and (pairs := _role(ws, "pairs", None)):
        return pairs
    return _role(ws, "images", name)


def _role(ws: Workspace, kind: str, split: str | None) -> Imported | None:
    """The file of this kind (and split), None if there is none; two are an error."""
    candidates = [f for f in _files(ws) if f.kind == kind]
    if split is not None:
        named = [f for f in candidates if f.split == split]
        # one file whose name says nothing is the split that is evaluated
        nameless = [f for f in candidates if f.split is None] if split == ws.cfg.evaluate.split else []
        candidates = named or nameless
    if len(candidates) > 1:
        both = " and ".join(str(f.file) for f in candidates[:2])
        raise InputError(f"{FIELD} has two files of one kind ({split or kind}): {both}; name the one that is meant")
    return candidates[0] if candidates else None


def _files(ws: Workspace) -> list[Imported]:
    return ws.once(FIELD, lambda: [_imported(ws, path) for path in _paths(ws.cfg.dataset.released)])


def _paths(given: Any) -> list[Path]:
    paths: list[Path] = []
    for name in [given] if isinstance(given, str) else given or []:
        path = Path(name).expanduser()
        if path.is_dir():
            # the cache of tokens and ShutterStock's raw pickle lie beside what is meant
            below = sorted(
                p for p in path.glob("*.pkl") if not p.stem.endswith("_tokens") and p.name != "sentences.pkl"
            )
            if not below:
                raise MissingFileError(f"{FIELD}={name}: the folder holds none of the authors' *.pkl files")
            paths += below
        elif path.is_file():
            paths.append(path)
        else:
            raise MissingFileError(
                f"{FIELD}={name} does not exist: name the authors' *.pkl files, or the folder they are in"
            )
    return list(dict.fromkeys(paths))


def _imported(ws: Workspace, path: Path) -> Imported:
    producer = with_format({"file": file_fingerprint(path)}, RELEASED_FORMAT)
    folder = ws.store.path("released", producer, "")

    def write(folder: Path) -> None:
        ws.tracker.say(f"reading {path}")
        content = read_released(path, FIELD)
        with atomic_path(folder) as beside:
            beside.mkdir()
            if isinstance(content, ReleasedImages):
                kind, vectors, ids = "images", content.vectors, content.ids
                bare = len(ids) - len(content.references)
                if content.references and bare:  # as in our own splits: an image without a reference cannot be scored
                    keep = [i for i, image_id in enumerate(ids) if image_id in content.references]
                    vectors, ids = vectors[keep], [ids[i] for i in keep]
                    ws.tracker.say(f"{path}: {bare} images have no caption and are left out")
                save_embeddings(beside / "images.safetensors", vectors, ids, kind="image_embeddings", producer=producer)
                write_json(
                    beside / "references.json",
                    [[i, content.references[i]] for i in ids if i in content.references],
                    indent=0,
                )
            elif isinstance(content, ReleasedPairs):
                kind, rows = "pairs", range(len(content.images))
                save_embeddings(
                    beside / "images.safetensors", content.images, rows, kind="image_embeddings", producer=producer
                )
                aggregated = beside / "aggregated.safetensors"
                save_embeddings(aggregated, content.aggregated, rows, kind="aggregated_embeddings", producer=producer)
            else:
                kind, n = "sentences", len(content.sentences)
                if isinstance(content, ReleasedCorpus):
                    kind = "corpus"
                    save_embeddings(
                        beside / "texts.safetensors",
                        content.vectors,
                        range(n),
                        kind="sentence_embeddings",
                        producer=producer,
                    )
                save_sentences(
                    beside / "sentences.safetensors",
                    content.sentences,
                    producer=producer,
                    counts={"read": n, "kept": n},
                )
            write_json(beside / "released.json", {"kind": kind, "file": path.name})

    ws.store.make(folder, write)
    return Imported(path, folder, read_json(folder / "released.json")["kind"])


# ------------------------------------------------------------------------------------------------------------- model.pt


def generator_producer(config: GeneratorConfig, store: ArtifactStore) -> dict[str, Any]:
    """What an artifact records of a generator's settings; a local language model and tokenizer go by content."""
    settings, weights = settings_of(config), generator_identity(config, store.root / "fingerprints")
    for field in [field for field, identity in weights.items() if "files" in identity]:
        del settings[field]  # the folder's own place does not count
    return {"generator": settings} | ({"weights": weights} if weights else {})


def imported_checkpoint(ws: Workspace, path: Path, field: str) -> Path:
    """A checkpoint folder of ours made from their model.pt; the generator's config says what the weights do not."""
    described = backbone_description(ws.cfg.clip_backbone)
    producer = generator_producer(ws.cfg.generator, ws.store)
    producer |= {"file": file_fingerprint(path), "clip_backbone": settings_of(ws.cfg.clip_backbone)}
    producer = with_format(producer, RELEASED_FORMAT)
    folder = ws.store.path("released_generator", producer, "")

    def write(folder: Path) -> None:
        bundle = load_released_generator(read_model(path, field), ws.cfg.generator, f"{field}={path}")
        with atomic_path(folder) as beside:
            bundle.save(beside)
            clip = {"clip_backbone": described, "clip_made_from": backbone_producer(ws)}
            write_json(beside / "checkpoint.json", {"step": 0, **clip, "decode": as_dict(ws.cfg.decode)})

    ws.store.make(folder, write)
    return folder
