"""What pyproject.toml cannot say: in a wheel, `conf/` and `sweeps/` lie inside the package; in a checkout beside it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("conf", "sweeps")


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the package is used from the checkout
            return
        for folder in FOLDERS:
            target = Path(self.build_lib, "cgtgan", folder)
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build left, and the checkout no longer has
            shutil.copytree(folder, target)


setup(cmdclass={"build_py": BuildWithConfigs})
