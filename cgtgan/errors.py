"""Errors that a user can fix: one sentence with the field or file, the value, and the fix.

The command prints these without a traceback and ends with a code above 0. Every other exception is a bug of ours: it
keeps its traceback.
"""

import sys
from pathlib import Path


class UserError(Exception):
    """Something outside the program is wrong, and the message says how to fix it."""


class InputError(UserError, ValueError):
    """A setting or the content of a file is wrong."""


class ConfigError(InputError):
    """The settings are wrong: nothing was started."""


class MissingFileError(UserError, FileNotFoundError):
    """A file is not where the config says. The message says where to get it or which field moves it."""

    def __str__(self) -> str:  # FileNotFoundError would print an errno tuple
        return str(self.args[0]) if self.args else ""


class OtherProcessLost(UserError):
    """A process of a job ends because another one is gone. The reason is in the other's message."""


class Stopped(UserError):
    """A job was asked to stop and did, with its state on disk. `code` is the exit code of the process."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def program() -> str:
    """The program as it was called: `python run.py`, `python -m cgtgan` or `cgtgan`."""
    return {"run.py": "python run.py", "__main__.py": "python -m cgtgan"}.get(Path(sys.argv[0]).name, "cgtgan")
