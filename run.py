"""`python run.py` is the command `cgtgan` from a checkout: see `python run.py --help`."""

import sys

from cgtgan.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
