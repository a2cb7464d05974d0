"""The authors' files, read without running anything that is in them.

A pickle is a program: it may ask for any function and call it. This reader allows four harmless names (what a pickled
tensor is made of) and refuses every other by name; lists, dicts, strings and numbers are built by the format itself.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cgtgan.data.annotations import CaptionsById, ImageId
from cgtgan.data.user_files import open_bytes
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


# ------------------------------------------------------------------------------------------------------- pickles


def _storage(content: bytes) -> Any:
    """In the place of `torch.storage._load_from_bytes`, which would unpickle anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TypedStorage is what the files hold
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """In the place of `torch._utils._rebuild_tensor_v2`: a copy of elements that must lie within the storage."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise InputError("a tensor in it has no storage")
    whole = torch.empty(0, dtype=storage.dtype).set_(cast(Any, storage))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or min((*size, *stride), default=0) < 0 or (0 not in size and last >= len(whole)):
        raise InputError("a tensor in it lies outside of its storage")
    return torch.as_strided(whole, tuple(size), tuple(stride), offset).clone()


def _bytes(text: str, encoding: str) -> bytes:
    """In the place of `_codecs.encode`, by which protocols below 3 write bytes."""
    if encoding != "latin1":
        raise InputError(f"it asks for the codec {encoding}")
    return text.encode("latin1")


_TENSORS = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
}


# What the C unpickler and torch raise on bytes that are no pickle: it depends on the bytes.
_NO_PICKLE = (
    *(ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, zlib.error),
)


class _Unpickler(pickle.Unpickler):
    allowed: dict[tuple[str, str], Any] = {("_codecs", "encode"): _bytes}  # noqa: RUF012 (each kind of file has its own)

    def find_class(self, module: str, name: str) -> Any:  # called for every class or function the pickle asks for
        if (module, name) not in self.allowed:
            accepted = "only plain lists, dicts, strings, numbers and tensors are read"
            raise InputError(f"it asks for {module}.{name}; {accepted}")
        return self.allowed[module, name]


class _TensorUnpickler(_Unpickler):
    allowed = _TENSORS


def load_plain_pickle(path: Path, field: str, where: str | None = None) -> Any:
    """The plain Python value in `path` (.pkl, may be gzipped); Python 2 strings are read as UTF-8.

    Raises `MissingFileError` if it is not there, `InputError` if it is damaged or asks for any class.
    """
    return _load(_Unpickler, path, field, where)


def _load(unpickler: type[_Unpickler], path: Path, field: str, where: str | None = None) -> Any:
    with open_bytes(path, field, where) as stream:
        try:
            return unpickler(stream, encoding="utf-8", errors="replace").load()
        except InputError as error:
            raise InputError(f"{path} ({field}) is refused: {error}") from error
        except pickle.UnpicklingError as error:
            # torch's own allow-list, inside a tensor's bytes, answers like this too
            if "weights only" in str(error).lower().replace("_", " "):
                raise InputError(f"{path} ({field}) is refused: a tensor in it asks for {_asked(error)}") from error
            raise InputError(f"{path} ({field}) is no whole pickle ({error}): download it again") from error
        except _NO_PICKLE as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} ({field}) is no whole pickle ({problem}): download it again") from error


# -------------------------------------------------------------------------------------------------- their contents


def read_released(path: Path, field: str) -> ReleasedImages | ReleasedCorpus | ReleasedPairs | ReleasedSentences:
    """One of the authors' pickles, recognised by its content. Raises `MissingFileError` or `InputError`."""
    content = _load(_TensorUnpickler, path, field)
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
            raise InputError(f"the entry for row {row!r} has no embedding: there are {len(vectors)}")
    vectors = vectors.half() if rows == list(range(len(vectors))) else vectors[rows].half()
    captions = [_entry(entry, "caption") for entry in entries]
    if all(isinstance(caption, str) for caption in captions):
        return ReleasedCorpus(vectors, captions)
    ids = [_entry(entry, "image_id") for entry in entries]
    for image_id, texts in zip(ids, captions, strict=True):
        if isinstance(image_id, bool) or not isinstance(image_id, int | str):
            raise InputError(f"the image id {image_id!r} is neither a number nor a name")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"the captions of image {image_id} are no list of strings")
    if len(set(ids)) < len(ids):
        raise InputError("an image id occurs twice")
    return ReleasedImages(vectors, ids, {i: texts for i, texts in zip(ids, captions, strict=True) if texts})


def _stacked(vectors: list[Any], name: str) -> Tensor:
    if not all(isinstance(v, Tensor) and v.dim() == 1 and v.shape == vectors[0].shape for v in vectors):
        raise InputError(f"the '{name}' tensors are not all of one length")
    stacked = torch.stack(vectors)
    _check_vectors(stacked, name)
    return stacked.half()


def _check_vectors(vectors: Any, name: str) -> None:
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
        raise InputError(f"'{name}' is no (N, D) tensor of floating-point numbers")
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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        problem = f"it asks for {_asked(error)}; only weights are read"
        raise InputError(f"{given} is refused or no whole file: {problem}") from error
    except Exception as error:  # every way in which foreign bytes can fail to be weights
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(f"{given} cannot be read as weights ({problem})") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        kind = type(state).__name__
        raise InputError(f"{given} holds a {kind}: the authors' model.pt is a state dict, name -> tensor")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}


def _asked(error: Exception) -> str:
    """The name in torch's refusal of anything but weights; the rest of its message is about its own settings."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return name[1] if name else "something that is no weights"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
