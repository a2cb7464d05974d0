"""Starts programs as forks of a process that has imported the package already. tests/program.py talks to it.

Python's imports are most of what a short run costs. Each program is a process of its own: its arguments, environment,
folder and streams are set after the fork, it runs run.py as `__main__`, or a piece of code as `python -c` does, and it
ends as any interpreter does.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STAGES = ("cgtgan.stages.pipeline", "cgtgan.stages.caption", "cgtgan.stages.report")
PRELOADED = ("cgtgan.cli", *STAGES, "hydra", "matplotlib.figure", "matplotlib.backends.backend_svg")


def next_program() -> dict[str, Any] | None:
    """In a fork: the program that it is to be. In the server: None, when nobody asks any more."""
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if pid := os.fork():  # this process waits for it and says how it ended
            Path(request["files"], "pid").write_text(str(pid))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            Path(request["files"], "ending").write_text(str(status))
            Path(request["files"], "ending").rename(Path(request["files"], "ended"))
            os._exit(0)
        return request
    return None


def become(request: dict[str, Any]) -> None:
    """Everything that tells one program from another."""
    os.setsid()
    folder = Path(request["files"])
    for stream, name, how in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        opened = os.open(folder / name, how | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (the server has read ahead in the old one)
    sys.argv = ["-c" if request["code"] else str(ROOT / "run.py"), *request["words"]]
    sys.path[0] = str(ROOT)


if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), sys.argv[1]]  # its only argument: a folder with packages that hide installed ones
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # a program's collections do not visit, and so copy, what it shares with this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if (program := next_program()) is not None:
        become(program)
        if program["code"]:
            exec(program["code"], {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
