"""Errors a user can mend: one sentence with the field or file, the value, and the mend.

`run.py` prints these without a traceback and exits non-zero; every other exception is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Something outside the program is wrong and the message says how to mend it."""


class InputError(UserError, ValueError):
    """A setting or the content of a file is wrong."""


class MissingFileError(UserError, FileNotFoundError):
    """A file is not where the config says; the message says where to get it or which field moves it."""

    def __str__(self) -> str:  # FileNotFoundError would print an errno tuple
        return str(self.args[0]) if self.args else ""


class OtherProcessLost(UserError):
    """A process of a job ends because another one is gone: the reason is that one's."""


class Stopped(UserError):
    """A job that was asked to stop and did, with its state on disk; `code` is the process's exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
