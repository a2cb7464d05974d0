"""Pickles of plain values and tensors, read without running anything that is in them.

A pickle is a program: it may ask for any function and call it. This reader allows four harmless names (what a pickled
tensor is made of) and refuses every other by name; lists, dicts, strings and numbers are built by the format itself.
What it builds is no larger than what the file holds.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import torch
from torch import Tensor

from cgtgan.data.user_files import open_bytes
from cgtgan.errors import InputError

_LOAD: dict[int, Any] = dict(pickle._Unpickler.dispatch)  # opcode -> what it does
# The opcodes of objects, of their attributes (an OrderedDict could hide its methods), and of sets.
_OBJECTS = b"".join(
    [
        *(pickle.BUILD, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID),
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
        *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    ]
)


class PlainTensors:
    """What stands in the place of torch's own functions. Together, tensors are no larger than the storages read."""

    def __init__(self) -> None:
        self.unused = 0  # bytes
        self.allowed: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch.storage", "_load_from_bytes"): self.storage,
            ("collections", "OrderedDict"): _no_hooks,
        }

    def storage(self, content: Any) -> Any:
        """In the place of `torch.storage._load_from_bytes`, which would unpickle anything."""
        if not isinstance(content, bytes) or content.startswith(b"PK"):  # an archive could unpack to any size
            raise InputError("a tensor in it is not stored as plain bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # TypedStorage is what the files hold
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if isinstance(storage, torch.storage.TypedStorage):
                self.unused += storage.nbytes()
        return storage

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Tensor:
        """In the place of `torch._utils._rebuild_tensor_v2`: a copy of elements that must lie within the storage."""
        if not isinstance(storage, torch.storage.TypedStorage):
            raise InputError("a tensor in it has no storage")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *size, *stride)):
            raise InputError("a tensor in it lies outside of its storage")
        whole = torch.empty(0, dtype=storage.dtype).set_(cast(Any, storage))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        self.unused -= math.prod(size) * whole.element_size()
        if 0 not in size and (last >= len(whole) or self.unused < 0):
            raise InputError("a tensor in it lies outside of its storage")
        return torch.as_strided(whole, tuple(size), tuple(stride), offset).clone()


def _no_hooks() -> dict[str, Any]:
    """In the place of `OrderedDict`: the hooks of a tensor, of which it has none."""
    return {}


def _bytes(text: str, encoding: str) -> bytes:
    """In the place of `_codecs.encode`, by which protocols below 3 write bytes."""
    if encoding != "latin1":
        raise InputError(f"it asks for the codec {str(encoding)[:80]}")
    return text.encode("latin1")


class _Whole:
    """A file whose `read` never allocates more than there is, whatever length the pickle asks for."""

    def __init__(self, stream: BinaryIO):
        self.readline = stream.readline
        self._read = stream.read

    def read(self, size: int) -> bytes:
        if size <= 1 << 24:
            return self._read(size)
        pieces: list[bytes] = []
        while size > 0 and (piece := self._read(min(size, 1 << 24))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


class _Unpickler(pickle._Unpickler):  # the one in Python: C's allocates its memo as large as any index in the file
    """Builds lists, tuples, dicts with plain keys, strings, numbers, and what `allowed` has."""

    stack: list[Any]  # of values, the opcodes' own

    def __init__(self, stream: BinaryIO, allowed: dict[tuple[str, str], Any] | None = None):
        super().__init__(cast(BinaryIO, _Whole(stream)), encoding="utf-8", errors="replace")
        self.allowed = {("_codecs", "encode"): _bytes, **(allowed or {})}

    def find_class(self, module: str, name: str) -> Any:  # called for every class or function the pickle asks for
        if (module, name) not in self.allowed:
            accepted = "only plain lists, dicts, strings, numbers and tensors are read"
            raise InputError(f"it asks for {module[:80]}.{name[:80]}; {accepted}")
        return self.allowed[module, name]

    def _refuse(self) -> None:
        raise InputError("it asks for objects that are no lists, dicts, strings, numbers or tensors")

    def _with_plain_keys(self, load: Callable[[Any], None], keys: Sequence[Any]) -> None:
        if not all(isinstance(key, str | int | float | bytes | None) for key in keys):  # hashing may go too deep
            raise InputError("a dict in it has keys that are neither names nor numbers")
        load(self)

    def _dict(self) -> None:
        self._with_plain_keys(_LOAD[pickle.DICT[0]], self.stack[::2])

    def _set_item(self) -> None:
        self._with_plain_keys(_LOAD[pickle.SETITEM[0]], self.stack[-2:-1])

    def _set_items(self) -> None:
        self._with_plain_keys(_LOAD[pickle.SETITEMS[0]], self.stack[::2])

    dispatch: ClassVar[dict[int, Any]] = {
        **_LOAD,
        **dict.fromkeys(_OBJECTS, _refuse),
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }


def load_plain_pickle(path: Path, field: str, where: str | None = None) -> Any:
    """The plain Python value in `path` (.pkl, may be gzipped); Python 2 strings are read as UTF-8.

    Raises `MissingFileError` if it is not there, `InputError` if it is damaged or asks for any class.
    """
    return load_pickle(path, field, where)


def load_pickle(
    path: Path, field: str, where: str | None = None, allowed: dict[tuple[str, str], Any] | None = None
) -> Any:
    with open_bytes(path, field, where) as stream:
        try:
            return _Unpickler(stream, allowed).load()
        except InputError as error:
            raise InputError(f"{path} ({field}) is refused: {error}") from error
        except Exception as error:  # every way in which foreign bytes can fail to be a pickle
            # torch's own allow-list, inside a tensor's bytes, answers like this too
            if "weights only" in str(error).lower().replace("_", " "):
                raise InputError(f"{path} ({field}) is refused: a tensor in it asks for {asked_for(error)}") from error
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{path} ({field}) is no whole pickle ({problem}): download it again") from error


def asked_for(error: Exception) -> str:
    """The name in torch's refusal of anything but weights; the rest of its message is about its own settings."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return name[1][:80] if name else "something that is no weights"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
