"""`run.py` as a process of its own, started in a tenth of a second: a fork of tests/program_server.py.

For tests of what a run does. Tests of how the program itself starts (its imports, an installed wheel, variables that
Python or a library reads while it is imported) start an interpreter with `subprocess`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from tests.small_meteor import make_small_meteor

RUN = Path(__file__).parents[1] / "run.py"
SERVER = Path(__file__).with_name("program_server.py")


@cache
def _home() -> Path:
    """The folder of all programs of this process, with a METEOR for them."""
    home = Path(tempfile.mkdtemp(prefix="programs"))
    make_small_meteor(home)
    return home


@cache
def _server() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(SERVER), str(_home())], stdin=subprocess.PIPE, text=True)


def end_server() -> None:
    """At the end of the tests: with the files of all programs."""
    if _server.cache_info().currsize:
        _server().kill()
        _server().wait()
        shutil.rmtree(_home(), ignore_errors=True)  # a program that a test has left at work may still write


OWN_DEFAULTS = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_ETAG_TIMEOUT")  # set by cgtgan/__main__.py


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    read = {name: value for name, value in environment.items() if name.startswith(("HF_", "PYTHON", "COVERAGE"))}
    return {name: value for name, value in read.items() if name not in OWN_DEFAULTS}


def is_forked(command: Sequence[str]) -> bool:
    return command[0] == sys.executable and command[1] in (str(RUN), "-c")


AT_START = _read_at_import(os.environ)


class Program:
    """A running `run.py`, as `subprocess.Popen` has it: in a session of its own, its streams in files."""

    def __init__(
        self, command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, input: str = ""
    ):
        assert is_forked(command), command
        self.args = list(command)
        code, words = (self.args[2], self.args[3:]) if self.args[1] == "-c" else ("", self.args[2:])
        self.files = Path(tempfile.mkdtemp(dir=_home()))
        for name, content in (("in", input), ("out", ""), ("err", "")):
            (self.files / name).write_text(content, encoding="utf-8")
        environment = dict(os.environ if env is None else env)
        place = str(cwd or Path.cwd())
        files = str(self.files)
        request = {"code": code, "words": words, "cwd": place, "environment": environment, "files": files}
        pipe = _server().stdin
        assert pipe is not None
        pipe.write(json.dumps(request) + "\n")
        pipe.flush()
        self.returncode: int | None = None
        self._wait_for("pid", 60)
        self.pid = int((self.files / "pid").read_text())

    @property
    def stdout(self) -> str:
        return (self.files / "out").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return (self.files / "err").read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        if self.returncode is None and (self.files / "ended").exists():
            self.returncode = int((self.files / "ended").read_text())
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        self._wait_for("ended", timeout)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """(what it printed on both streams, "") at its end."""
        self.wait(timeout)
        return self.stdout + self.stderr, ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait_for(self, name: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not (self.files / name).exists() or not (self.files / name).stat().st_size:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
            time.sleep(0.01)


def run_program(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text. What no fork can run is left to it: a command that is not
    [sys.executable, run.py or -c CODE, ...], and an environment that is read while Python or a library is imported.
    """
    if not is_forked(command) or _read_at_import(env or os.environ) != AT_START:
        return subprocess.run(command, cwd=cwd, env=env, input=input, timeout=timeout, capture_output=True, text=True)
    program = Program(command, cwd=cwd, env=env, input=input)
    code = program.wait(timeout)
    done = subprocess.CompletedProcess(program.args, code, program.stdout, program.stderr)
    shutil.rmtree(program.files)
    return done
