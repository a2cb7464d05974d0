"""A program that trains a generator by cross-entropy and kills itself in the middle of it."""

from __future__ import annotations

PROGRAM = """
import os, signal, sys
from cgtgan.assets import generators

update = generators._update

def until_the_step(model, optimizer, devices, step, *rest):
    if step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(model, optimizer, devices, step, *rest)

generators._update = until_the_step
from cgtgan.__main__ import main

sys.exit(main())
"""


def killed_in_step(step: int) -> str:
    """The program, whose arguments are those of `run.py`; the last state it leaves is one of the steps before."""
    return PROGRAM.replace("STEP", str(step))
