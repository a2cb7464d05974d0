"""A user's own function or class, named by a setting: `path.py:name` or `package.module:name`.

Nothing is imported from a path that the command line or a config file did not name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from cgtgan.config import custom_parts
from cgtgan.errors import InputError, MissingFileError, UserError
from cgtgan.runtime.artifacts import file_fingerprint


def load_custom(spec: str, field: str) -> Any:
    """The function or class that the setting `field` names with `spec`.

    Raises `MissingFileError` where there is no such file or module, `InputError` where it has no such name or fails on
    import; both name the field and, for the latter, the file and line.
    """
    source, name = custom_parts(spec)
    if not name:
        raise InputError(f"{field}={spec} is not accepted: own code is named path.py:name or package.module:name")
    module = _module(source, spec, field)
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        names = [n for n, member in vars(module).items() if callable(member) and not n.startswith("_")]
        raise InputError(f"{field}={spec}: {source} has no {name}; it defines {', '.join(names) or 'nothing'}")
    return value


def custom_file(spec: str, field: str) -> Path:
    """The source file of own code. Raises as `load_custom` does."""
    source, _ = custom_parts(spec)
    file = getattr(_module(source, spec, field), "__file__", None)
    if file is None:
        raise InputError(f"{field}={spec}: {source} has no source file to fingerprint; name a .py file")
    return Path(file)


def custom_fingerprint(spec: str, field: str) -> str:
    """Fingerprint of the content of the source file: what is made with changed code is made again."""
    return file_fingerprint(custom_file(spec, field))


@contextmanager
def custom_errors(spec: str, field: str) -> Iterator[None]:
    """An exception of own code becomes an `InputError` that names the field, and the file and line that raised it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, for a batch that is tried again in halves
            raise
        place = _place(error, custom_file(spec, field))
        raise InputError(f"{field}={spec} failed{place}: {_first_line(error)}") from error


def call_custom(function: Callable[..., Any], spec: str, field: str, *arguments: Any, **named: Any) -> Any:
    """`function(*arguments, **named)` under `custom_errors`."""
    with custom_errors(spec, field):
        return function(*arguments, **named)


def _module(source: str, spec: str, field: str) -> ModuleType:
    if not source.endswith(".py"):
        try:
            with _import_errors(spec, field):
                return importlib.import_module(source)
        except ModuleNotFoundError as error:
            message = f"{field}={spec}: there is no module {error.name}; install it, or name a file, path.py:name"
            raise MissingFileError(message) from None
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise MissingFileError(f"{field}={spec}: {path} does not exist; paths are relative to the working directory")
    with _import_errors(spec, field):
        return _from_file(path, file_fingerprint(path))


@cache
def _from_file(path: Path, content: str) -> ModuleType:
    name = f"cgtgan_custom_{content}_{path.stem}"
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        loader.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _import_errors(spec: str, field: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if (error.name or "") and spec.startswith(str(error.name)):  # the module that `spec` itself names
            raise
        raise InputError(f"{field}={spec} cannot be imported{_place(error)}: {error}") from error
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise InputError(f"{field}={spec} cannot be imported: {place}: {error.msg}") from error
    except Exception as error:
        raise InputError(f"{field}={spec} cannot be imported{_place(error)}: {_first_line(error)}") from error


def _place(error: BaseException, file: Path | None = None) -> str:
    """' at FILE, line N': the last frame in `file`, or of all. ' in FILE' where the call did not get into it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if file is None or Path(f.filename) == file]
    if not frames:
        return f" in {file}" if file else ""
    return f" at {frames[-1].filename}, line {frames[-1].lineno}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
