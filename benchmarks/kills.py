"""What random kills change: runs of the small demo, killed again and again, against one that nobody disturbed.

Usage: python benchmarks/kills.py [--runs 10] [--kills 3] [--processes 1] [--seed 0] [override ...]
A run is started, gets SIGKILL, SIGTERM or SIGINT at a random moment, is started again with the same command, and so on;
after the last kill it runs to its end. A row per run: signal @ seconds -> exit code of each kill, then what differs
from the undisturbed run in weights (generators, discriminator, optimisers, links), scores, logged metrics, and files
(+ too many, - missing). `ignored` counts signals that a process survived. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SETTINGS = (
    *("experiment=demo_tiny", "threads=1", "wandb=disabled", "train.steps=30", "train.validate_every=5"),
    *("initialize.steps=40", "evaluate.metrics=[bleu,rouge_l,cider]"),
)
CLOCK = ("time/", "memory/", "train/seconds", "train/images_per_second")
OURS = (".lock", ".sha256")  # they stay beside what they belong to, whatever happened


def command(processes: int, overrides: list[str]) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(several if processes > 1 else []), str(ROOT / "run.py"), *SETTINGS, *overrides]


def start(words: list[str], home: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that SIGKILL reaches every process of the job."""
    with (home / "log.txt").open("ab") as log:
        return subprocess.Popen(words, cwd=home, stdout=log, stderr=log, start_new_session=True)


def killed(words: list[str], home: Path, number: signal.Signals, seconds: float) -> int | None:
    """The exit code after a signal at `seconds`; None if the job ended before."""
    job = start(words, home)
    try:
        job.wait(seconds)
    except subprocess.TimeoutExpired:
        if number == signal.SIGKILL:
            os.killpg(job.pid, number)
        else:
            job.send_signal(number)
        return job.wait()
    if job.returncode:
        sys.exit(f"a job ended with {job.returncode} by itself: {home / 'log.txt'}")
    return None


def results(home: Path) -> dict[str, dict[str, Any]]:
    """weights, scores, metrics and files of a home, each by its place."""
    home = home.resolve()
    (run,) = (home / "runs").glob("*/*/seed=*")
    weights: dict[str, Any] = {}
    linked = {name: (run / "checkpoints" / name).resolve() for name in ("best", "last")}
    places = [home / "artifacts", *linked.values()]
    for file in (f for place in places for f in place.rglob("*.safetensors")):
        tensors = {k: v.tolist() for k, v in load_file(file).items() if not k.startswith("rng/")}
        weights[str(file.relative_to(home))] = tensors
    weights |= {name: folder.name for name, folder in linked.items()}
    scores = {str(f.relative_to(run)): f.read_text() for f in sorted((run / "evaluation").rglob("*.json"))}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = {f"row {i}": {k: v for k, v in row.items() if not k.startswith(CLOCK)} for i, row in enumerate(rows)}
    # the checkpoint before the last is a spare: another one where a signal stopped the run
    spares = [f for f in (run / "checkpoints").glob("step_*") if f not in linked.values()][:1]
    kept = [f for f in home.rglob("*") if not f.is_dir() and not f.name.endswith(OURS) and f.name != "log.txt"]
    files = {str(f.relative_to(home)): "" for f in kept if not any(f.is_relative_to(spare) for spare in spares)}
    return {"weights": weights, "scores": scores, "metrics": metrics, "files": files}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    changed = [key for key in wanted if key in found and found[key] != wanted[key]]
    words = changed + [f"+{key}" for key in found.keys() - wanted.keys()]
    words += [f"-{key}" for key in wanted.keys() - found.keys()]
    return " ".join(sorted(words)[:6]) or "same"


def disturb(words: list[str], home: Path, chance: random.Random, seconds: float, kills: int) -> list[str]:
    """Kill the job up to `kills` times, each at a random moment of its first `seconds`; what was sent and came back."""
    home.mkdir()
    answers: list[str] = []
    while len(answers) < kills:
        number, at = chance.choice(SIGNALS), chance.uniform(0.1, 0.9) * seconds
        code = killed(words, home, number, at)
        if code is None:
            break
        answers.append(f"{number.name[3:]} @ {at:.1f} -> {code}")
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("runs", 10), ("kills", 3), ("processes", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it, and its children
    words, chance, sent, failed = command(args.processes, args.overrides), random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        started = time.perf_counter()
        if code := start(words, whole).wait():
            sys.exit(f"the undisturbed run ended with {code}:\n{(whole / 'log.txt').read_text()}")
        seconds, wanted = time.perf_counter() - started, results(whole)
        print(f"undisturbed: {seconds:.1f} s")
        print("| run | killed | weights | scores | metrics | files |\n|---|---|---|---|---|---|", flush=True)
        for run in range(1, args.runs + 1):
            home = Path(folder) / str(run)
            while not (kills := disturb(words, home, chance, seconds, args.kills)):
                shutil.rmtree(home)  # it ended before the first signal: the undisturbed run was slow
                seconds *= 0.7
            if code := start(words, home).wait():
                sys.exit(f"run {run} ended with {code}:\n{(home / 'log.txt').read_text()}")
            found = results(home)
            cells = [differences(found[what], wanted[what]) for what in wanted]
            failed, sent = failed + any(cell != "same" for cell in cells), sent + kills
            print(f"| {run} | {', '.join(kills)} | {' | '.join(cells)} |", flush=True)
    ignored = sum(answer.endswith("-> 0") for answer in sent)
    print(f"{len(sent)} signals, {ignored} ignored, {failed} of {args.runs} runs differ")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
