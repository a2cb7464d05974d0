"""The authors' files, read without running anything that is in them."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.data.annotations import CaptionsById, ImageId, checked_id
from cgtgan.data.plain_pickle import PlainTensors, asked_for, first_line, load_pickle
from cgtgan.data.user_files import foreign_content, quoted
from cgtgan.errors import InputError, MissingFileError


@dataclass(frozen=True)
class ReleasedImages:
    """`*_train_images.pkl`, `*_val.pkl`, `*_test.pkl`: vectors (N, D) float16, ids of the rows, captions by id."""

    vectors: Tensor
    ids: list[ImageId]
    references: CaptionsById


@dataclass(frozen=True)
class ReleasedCorpus:
    """`*_captions.pkl`: vectors (M, D) float16 and the sentence of each."""

    vectors: Tensor
    sentences: list[str]


@dataclass(frozen=True)
class ReleasedPairs:
    """`*_images_*_captions_*_<t>.pkl`: image and aggregated embeddings, (N, D) float16 each, rows as train's."""

    images: Tensor
    aggregated: Tensor


@dataclass(frozen=True)
class ReleasedSentences:
    """`*_sentences.pkl`: the clean corpus, shuffled."""

    sentences: list[str]


# -------------------------------------------------------------------------------------------------- their contents


def read_released(path: Path, field: str) -> ReleasedImages | ReleasedCorpus | ReleasedPairs | ReleasedSentences:
    """One of the authors' pickles, recognised by its content. Raises `MissingFileError` or `InputError`."""
    content = load_pickle(path, field, allowed=PlainTensors().allowed)
    try:
        if isinstance(content, dict) and {"clip_embedding", "captions"} <= content.keys():
            return _embedded(content["clip_embedding"], content["captions"])
        if isinstance(content, list) and content and isinstance(content[0], dict):
            images, aggregated = ([_entry(row, key) for row in content] for key in ("image", "caption"))
            return ReleasedPairs(_stacked(images, "image"), _stacked(aggregated, "caption"))
        if isinstance(content, list) and content and all(isinstance(sentence, str) for sentence in content):
            return ReleasedSentences(content)
    except InputError as error:
        raise InputError(f"{path} ({field}): {error}") from error
    layouts = "a dict with clip_embedding and captions, a list of image/caption tensors, a list of sentences"
    tokens = "; it seems to be their cache of tokens, which is not needed" if path.stem.endswith("_tokens") else ""
    raise InputError(f"{path} ({field}) holds none of the authors' layouts ({layouts}){tokens}")


def _entry(row: Any, key: str) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise InputError(f"an entry has no '{key}'")
    return row[key]


def _embedded(vectors: Any, entries: Any) -> ReleasedImages | ReleasedCorpus:
    _check_vectors(vectors, "clip_embedding")
    if not isinstance(entries, list) or not entries:
        raise InputError("'captions' is no list with entries")
    rows = [_entry(entry, "clip_embedding") for entry in entries]
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(vectors):
            raise InputError(f"the entry for row {quoted(row)} has no embedding: there are {len(vectors)}")
    vectors = vectors.half() if rows == list(range(len(vectors))) else vectors[rows].half()
    captions = [_entry(entry, "caption") for entry in entries]
    if all(isinstance(caption, str) for caption in captions):
        return ReleasedCorpus(vectors, captions)
    ids = [_entry(entry, "image_id") for entry in entries]
    for image_id, texts in zip(ids, captions, strict=True):
        checked_id(image_id, "an entry")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"the captions of image {image_id} are no list of strings")
    if len(set(ids)) < len(ids):
        raise InputError("an image id occurs twice")
    return ReleasedImages(vectors, ids, {i: texts for i, texts in zip(ids, captions, strict=True) if texts})


def _stacked(vectors: list[Any], name: str) -> Tensor:
    if not all(isinstance(v, Tensor) and v.dim() == 1 and v.shape == vectors[0].shape for v in vectors):
        raise InputError(f"the '{name}' tensors are not all of one length")
    if len({id(v) for v in vectors}) < len(vectors):
        raise InputError(f"one of the '{name}' tensors stands for several rows")
    stacked = torch.stack(vectors)
    _check_vectors(stacked, name)
    return stacked.half()


def _check_vectors(vectors: Any, name: str) -> None:
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
        raise InputError(f"'{name}' is no (N, D) tensor of floating-point numbers")
    if not vectors.numel():
        raise InputError(f"'{name}' has no number")
    bad = (~torch.isfinite(vectors).all(dim=1)).nonzero()
    if len(bad):
        raise InputError(f"row {int(bad[0])} of '{name}' is not finite")


# -------------------------------------------------------------------------------------------------------- model.pt


def read_model(path: Path, field: str) -> dict[str, Tensor]:
    """The weights of their `model.pt`, without the buffers that only transformers 4.27's attention has (slip 17).

    Raises `MissingFileError` or `InputError`; weights are all that is read.
    """
    given = f"{field}={path}"
    if not path.is_file():
        raise MissingFileError(
            f"{given} does not exist: name a checkpoint folder, a run folder or the authors' model.pt"
        )
    with path.open("rb") as file:
        head = file.read(256)
    if (kind := foreign_content(head)) and not head.startswith(b"PK"):
        raise InputError(f"{given} {kind}")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError as error:
        raise InputError(f"{given} is refused: {error}") from error
    except pickle.UnpicklingError as error:
        problem = f"it asks for {asked_for(error)}; only weights are read"
        raise InputError(f"{given} is refused or no whole file: {problem}") from error
    except Exception as error:  # every way in which foreign bytes can fail to be weights
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{given} cannot be read as weights ({problem})") from error
    state = _plain_weights(state, given)
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}


def _check_archive(path: Path) -> None:
    """torch stores weights uncompressed; what is packed could unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise InputError("its archive is compressed, and torch's own is not")


def _plain_weights(state: Any, given: str) -> dict[str, Tensor]:
    """`state` as a plain dict, checked: dense floating-point tensors on the CPU that lie within what the file holds."""
    # dict's own `items`: the file may give an OrderedDict attributes that hide its methods
    items = list(dict.items(state)) if isinstance(state, dict) else []
    if not items or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items):
        kind = "nothing" if state == {} else f"a {type(state).__name__}"
        raise InputError(f"{given} holds {kind}: the authors' model.pt is a state dict, name -> tensor")
    storages: dict[int, int] = {}
    total = 0
    for key, value in items:
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise InputError(f"{given}: {key:.80} is no plain tensor")
        size, storage = value.numel() * value.element_size(), value.untyped_storage()
        if size > storage.nbytes():
            raise InputError(f"{given}: {key:.80} is larger than what the file holds of it")
        storages[storage.data_ptr()] = storage.nbytes()
        total += size
    if total > 2 * sum(storages.values()):  # word embedding and output layer may be one
        raise InputError(f"{given}: its tensors are larger than what the file holds of them")
    return dict(items)
