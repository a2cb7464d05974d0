"""The Java programs inside pycocoevalcap (PTB tokeniser, METEOR, SPICE), each in a process we watch and always reap.

pycocoevalcap's own wrappers write inside site-packages, never drain stderr and wait for ever; this module runs the same
jars with the same arguments and gives every process a time limit. Nothing is written outside the scratch folder handed
in.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np

from cgtgan.evaluation.counts import meteor_counts
from cgtgan.runtime.sources import SPICE

HOW_TO_INSTALL = (
    "install a Java runtime, for example `apt-get install default-jre-headless` or `conda install -c "
    "conda-forge openjdk`"
)
NO_JAVA = f"no `java` program was found on PATH or under JAVA_HOME; {HOW_TO_INSTALL}"
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# SPICE's serialiser reaches into these packages by reflection, which Java 16 and later forbid by default.
_SPICE_OPENS = [
    f"--add-opens=java.base/java.{p}=ALL-UNNAMED" for p in ("lang", "math", "util", "util.concurrent", "net", "text")
]
_SERIAL = "-XX:+UseSerialGC"  # one collector thread: the other cores have work of their own
_QUICK = "-XX:TieredStopAtLevel=1"  # the first compiler alone
# METEOR's captions up to which Java's second compiler costs more than it saves (5,000: 11 s of CPU without, 15 with)
_SHORT_RUN = 10_000
_LINE_BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
Group: TypeAlias = tuple[list[str], list[list[str]]]  # captions and each one's references, tokenised


class MeteorScores(NamedTuple):
    """Of a group: the corpus score and n scores, fractions, and n lists of counts (evaluation/counts.py)."""

    corpus: float
    each: list[float]
    counts: list[list[int]]


@dataclass(frozen=True)
class JavaSettings:
    """scratch: an existing folder for temporary files; None: the system's.

    Timeouts in seconds, after which a Java program is stopped; None: 60, and more for many captions.
    """

    scratch: Path | None = None
    meteor_timeout_s: float | None = None
    ptb_timeout_s: float | None = None


DEFAULT_SETTINGS = JavaSettings()


class JavaError(RuntimeError):
    """A Java program did not give its result; the message is one sentence for the reader of the scores."""


def find_java() -> str | None:
    """The `java` program: `$JAVA_HOME/bin/java` where that exists, else the first on PATH, else None."""
    home = os.environ.get("JAVA_HOME")
    return (home and shutil.which(str(Path(home) / "bin" / "java"))) or shutil.which("java")


def package_folder(name: str) -> Path:
    """The folder `name` ("tokenizer", "meteor" or "spice") of the installed pycocoevalcap; JavaError if it is not
    there.
    """
    spec = importlib.util.find_spec("pycocoevalcap")  # a namespace package: it has folders but no __file__
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / name).is_dir():
            return Path(place) / name
    raise JavaError(
        f"the package pycocoevalcap has no folder {name!r} here: reinstall it with `pip install pycocoevalcap`"
    )


def clean_line(caption: str) -> str:
    """The caption on one line: runs of control characters, Unicode line breaks and lone surrogates become one space."""
    return _LINE_BREAKING.sub(" ", caption)


def _start(command: list[str], folder: Path, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start in a session of its own, so that the whole family can be killed and Ctrl-C reaches it through us alone."""
    # LC_ALL=C: METEOR prints and lower-cases by the locale ("0,195" in German, a dotless i in Turkish).
    environment = {**os.environ, "LC_ALL": "C"}
    pipe = subprocess.PIPE
    command = [command[0], "-XX:-UsePerfData", *command[1:]]  # no file in the system's temporary folder either
    return subprocess.Popen(
        command, cwd=folder, stdin=pipe, stdout=pipe, stderr=stderr, env=environment, start_new_session=True
    )  # fmt: skip


def _reap(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent input of a process that has died
                pipe.close()


def _last_line(stderr: IO[bytes]) -> str:
    stderr.seek(0)
    lines = stderr.read()[-2000:].decode(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no message")


def _run(name: str, command: list[str], folder: Path, text: str, timeout_s: float, scratch: Path | None) -> str:
    """Run to the end with `text` on stdin and return stdout; JavaError on a failure or after `timeout_s` seconds."""
    with tempfile.TemporaryFile(dir=scratch) as stderr:
        process = _start(command, folder, stderr)
        try:
            output, _ = process.communicate(text.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise JavaError(f"{name} gave no result within {timeout_s:g} s and was stopped") from None
        finally:
            _reap(process)
        if process.returncode != 0:
            raise JavaError(f"{name} ended with exit status {process.returncode}: {_last_line(stderr)}")
    return output.decode(errors="replace")


def ptb_tokenize(java: str, captions: Sequence[str], *, timeout_s: float, scratch: Path | None = None) -> list[str]:
    """One tokenised, lower-cased, punctuation-free line a caption, as pycocoevalcap's PTBTokenizer gives.

    Args:
        captions: n captions, any string; each is put on one line first (`clean_line`).
    Returns: n strings, tokens joined by one space, in the order given.
    Raises: JavaError when the tokeniser does not run, fails or is not ready within `timeout_s` seconds.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    folder = package_folder("tokenizer")
    command = [java, _SERIAL, _QUICK, "-cp", STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]

    def split(lines: list[str]) -> list[str]:
        if not lines:
            return []
        out = _run("the PTB tokeniser", command, folder, "\n".join(lines), timeout_s, scratch).split("\n")
        if len(out) == len(lines):
            return out
        if len(lines) == 1:
            return [" ".join(out)]
        # A line break we do not know of: halving finds the caption and keeps every other one on its own line.
        return split(lines[: len(lines) // 2]) + split(lines[len(lines) // 2 :])

    tokens = split([clean_line(caption) for caption in captions])
    return [" ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATIONS) for line in tokens]


class MeteorRun:
    """METEOR 1.5 (Denkowski and Lavie, 2014) over groups of tokenised captions, in its own process from construction
    on.

    Use as a context manager: leaving it, by whatever way, ends and reaps the process. It loads its tables until `score`
    gives it the captions.

    Args:
        captions: how many there will be, about.
    Raises: JavaError, OSError when it cannot be started.
    """

    def __init__(self, java: str, captions: int, *, scratch: Path | None = None):
        self._timed_out = False
        self._outcome: list[MeteorScores] | JavaError = JavaError("METEOR was stopped before it was ready")
        self._talker: threading.Thread | None = None
        self._watchdog: threading.Timer | None = None
        folder = package_folder("meteor")
        command = [java, _SERIAL, "-Xmx2G", *([_QUICK] if captions <= _SHORT_RUN else [])]
        command += ["-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
        self._stderr = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (closed in __exit__; a file cannot fill up and block as a pipe)
        try:
            self._process = _start(command, folder, self._stderr)
        except OSError:
            self._stderr.close()
            raise

    def score(self, groups: Sequence[Group], *, timeout_s: float) -> None:
        """Start scoring; `result` has the outcome.

        Args:
            groups: of (hypotheses, references): n tokenised captions, n lists of at least one tokenised reference each.
            timeout_s: seconds for the whole run; then the process is killed and `result` raises.
        """
        requests = [[_score_request(h, r) for h, r in zip(*group, strict=True)] for group in groups]
        self._talker = threading.Thread(target=self._talk, args=(requests, timeout_s), name="meteor", daemon=True)
        self._watchdog = threading.Timer(timeout_s, self._expire)
        self._watchdog.daemon = True
        self._watchdog.start()
        self._talker.start()

    def __enter__(self) -> MeteorRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._kill()  # ends the talker's blocking read
        if self._talker is not None:
            self._talker.join()
        _reap(self._process)
        self._stderr.close()

    def result(self) -> list[MeteorScores]:
        """The scores of each group.

        Raises JavaError when METEOR failed or took longer than its limit.
        """
        if self._talker is not None:
            self._talker.join()
        if isinstance(self._outcome, JavaError):
            raise self._outcome
        return self._outcome

    def _expire(self) -> None:
        self._timed_out = True
        self._kill()

    def _kill(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _ask(self, *lines: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("".join(line + "\n" for line in lines).encode(errors="replace"))
        self._process.stdin.flush()

    def _send(self, lines: list[str]) -> None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # of a METEOR that ends early, whoever reads its answers says why
            self._ask(*lines)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        return line.decode().strip()

    def _talk(self, requests: list[list[str]], timeout_s: float) -> None:
        try:
            self._outcome = [self._score(group) for group in requests]
        except (OSError, EOFError, ValueError):
            if self._timed_out:
                why = f"METEOR gave no result within {timeout_s:g} s and was stopped: raise meteor_timeout_s"
            else:
                why = f"METEOR's Java program ended before it was ready: {_last_line(self._stderr)}"
            self._outcome = JavaError(why)

    def _score(self, requests: list[str]) -> MeteorScores:
        # all requests are sent ahead: an answer that Python's other threads keep waiting must not keep METEOR waiting
        # too
        sender = threading.Thread(target=self._send, args=(requests,), name="meteor requests", daemon=True)
        sender.start()
        statistics = [self._answer() for _ in requests]
        sender.join()
        self._ask(" ||| ".join(["EVAL", *statistics]))
        each = [float(self._answer()) for _ in statistics]
        return MeteorScores(float(self._answer()), each, [meteor_counts(line) for line in statistics])


def _score_request(hypothesis: str, references: list[str]) -> str:
    """One line of METEOR's protocol; `|||` is its separator, and double spaces go as in pycocoevalcap."""
    fields = [clean_line(text).replace("|||", "") for text in (*references, hypothesis)]
    fields[-1] = fields[-1].replace("  ", " ")
    return " ||| ".join(["SCORE", *fields])


def missing_spice_jars() -> str | None:
    """One sentence on the jars SPICE lacks and where they belong, or None when they are there."""
    library = package_folder("spice") / "lib"
    missing = [jar for jar in SPICE_JARS if not (library / jar).is_file()]
    if not missing:
        return None
    return (
        f"SPICE needs {' and '.join(missing)} in the folder {library}: take them from {SPICE.address} (384 MB) and put "
        "them there, or run stage=download with spice in evaluate.metrics"
    )


def spice(
    java: str, hypotheses: list[str], references: list[list[str]], *, timeout_s: float, scratch: Path | None = None
) -> tuple[float, list[float]]:
    """SPICE F-scores (Anderson et al., 2016): (mean, n scores), fractions.

    JavaError when it fails or runs out of time.
    """
    pairs = zip(hypotheses, references, strict=True)
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        source, target, cache = Path(work, "in.json"), Path(work, "out.json"), Path(work, "cache")
        cache.mkdir()
        source.write_text(json.dumps([{"image_id": i, "test": h, "refs": r} for i, (h, r) in enumerate(pairs)]))
        # its cache unpacks a native library where Java's temporary files go
        command = [
            java,
            *_SPICE_OPENS,
            f"-Djava.io.tmpdir={cache.resolve()}",
            "-Xmx8G",
            "-jar",
            "spice-1.0.jar",
            str(source.resolve()),
        ]
        command += ["-cache", str(cache.resolve()), "-out", str(target.resolve()), "-subset", "-silent"]
        _run("SPICE", command, package_folder("spice"), "", timeout_s, scratch)
        rows = json.loads(target.read_text())
        # An image without any tuple has no F-score; NaN, as pycocoevalcap.
        results = {row["image_id"]: row["scores"]["All"]["f"] for row in rows}
    each = [float("nan") if results[i] is None else float(results[i]) for i in range(len(hypotheses))]
    return float(np.mean(each)), each
