"""METEOR with a thousand of its millions of paraphrases: it starts within 0.3 s of CPU instead of 7.

For tests of everything but its scores; those of the whole table are compared in tests/unit/test_metrics.py and
tests/numerics.
"""

import gzip
import shutil
from itertools import islice
from pathlib import Path

from cgtgan.evaluation.java import package_folder

TABLE = "data/paraphrase-en.gz"


def make_small_meteor(folder: Path) -> None:
    """Lay it where `folder`, in front on sys.path, hides the installed one."""
    installed, small = package_folder("meteor"), folder / "pycocoevalcap/meteor"
    (small / TABLE).parent.mkdir(parents=True)
    shutil.copy(installed / "meteor-1.5.jar", small)  # no link: it reads the table beside the file that a link names
    with gzip.open(installed / TABLE) as table, gzip.open(small / TABLE, "w") as beginning:
        beginning.writelines(islice(table, 3 * 1000))  # a probability and two phrases, a line each
