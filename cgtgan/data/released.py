"""The authors' pickles, read without running anything that is in them.

A pickle is a program. This reader gives it no class and no function to call: lists, tuples, dicts, sets, strings, bytes, numbers,
booleans and None are built by the format itself, anything else is an `InputError` that names the class.
"""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path
from typing import Any

from cgtgan.data.annotations import open_bytes
from cgtgan.errors import InputError


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # called for every class or function the pickle asks for
        raise InputError(f"it asks for {module}.{name}; only plain lists, tuples, dicts, strings and numbers are read")


def load_plain_pickle(path: Path, field: str, where: str | None = None) -> Any:
    """The plain Python value in `path` (.pkl, may be gzipped); Python 2 strings are read as UTF-8, bad bytes replaced.

    Raises `MissingFileError` if it is not there, `InputError` if it is damaged or asks for any class.
    """
    with open_bytes(path, field, where) as stream:
        try:
            return _PlainUnpickler(stream, encoding="utf-8", errors="replace").load()
        except InputError as error:
            raise InputError(f"{path} ({field}) is refused: {error}") from error
        # What the C unpickler raises on bytes that are no pickle depends on the bytes.
        except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError) as error:
            raise InputError(f"{path} ({field}) is no whole pickle ({type(error).__name__}: {error}): download it again") from error
        except (OSError, TypeError, ValueError, zlib.error) as error:
            raise InputError(f"{path} ({field}) is no whole pickle ({type(error).__name__}: {error}): download it again") from error
