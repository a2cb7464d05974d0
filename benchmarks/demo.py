"""Time and memory of the runs of `make demo` after installation, in a fresh folder, with their children (Java).

Usage: python benchmarks/demo.py [--experiment demo,demo_posterior] [override ...]
Prints the seconds of each stage, the total, and the highest sum of resident memory of the process tree. It is sampled
ten times per second; pages that processes share count once for each, so it is an upper bound.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tree_bytes(root: int) -> int:
    """Resident bytes of a process and all below it, from /proc (Linux)."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it ended while we looked
                continue
            parents[int(entry.name)], resident[int(entry.name)] = int(fields[1]), int(fields[21]) * 4096
    total, found = 0, {root}
    while found:
        total += sum(resident.get(p, 0) for p in found)
        found = {p for p, parent in parents.items() if parent in found}
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo,demo_posterior")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, str(ROOT / "run.py"), "-m", f"experiment={args.experiment}", *args.overrides]
        started, peak = time.perf_counter(), 0
        with subprocess.Popen(
            command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            log = Path(home) / "log.txt"

            def keep() -> None:
                assert process.stdout is not None
                log.write_text(process.stdout.read(), encoding="utf-8")

            reader = threading.Thread(target=keep)
            reader.start()
            while process.poll() is None:
                peak = max(peak, tree_bytes(process.pid))
                time.sleep(0.1)
            reader.join()
        seconds = time.perf_counter() - started
        text = log.read_text(encoding="utf-8")
        if process.returncode:
            sys.exit(text)
        print(text)
    print(f"{args.experiment}: {seconds:.0f} s, at most {peak / 1e9:.2f} GB resident")


if __name__ == "__main__":
    main()
