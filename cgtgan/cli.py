"""The command line: the help page, what is corrected or refused before Hydra reads it, and how a failure is reported.

Imports no torch. `setting_errors.py` has the sentences about settings.
"""

from __future__ import annotations

import errno
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from cgtgan.checks import validate
from cgtgan.config import Config
from cgtgan.errors import ConfigError, InputError, Stopped, UserError, program
from cgtgan.setting_errors import CONF, config_sentence, group_defaults, groups, unknown_hydra_part, unknown_setting

STAGE_HELP = {
    "preprocess": "images and sentences -> CLIP embeddings",
    "aggregate": "attention over the corpus: one text embedding per image",
    "initialize": "the generator learns to reconstruct a sentence from its own embedding",
    "train": "the GAN: naturalness (discriminator) and semantics (CLIP) as rewards",
    "evaluate": "scores a checkpoint and the baselines, or captions=FILE(S), against the references",
    "caption": "captions your own pictures: images=FOLDER -> captions.json and a gallery",
    "report": "one run -> one HTML page; runs=PATTERN: many runs compared",
    "serve": "a local web page to try a checkpoint",
    "pipeline": "all stages of a scored run, without those already done (the default)",
    "check": "is everything there that the run reads? lists all that is missing",
    "download": "fetches what is missing and public; says where to get the rest",
}
# (overrides, exit code) of the jobs that failed in this process. None in a worker of submitit: it imports anew.
failures: list[tuple[str, int]] | None = None


def help_text() -> str:
    """The page of --help: it fits on one screen."""
    name = program()
    lines = [
        "CgT-GAN: learns to caption from images without captions and sentences without images.",
        "",
        f"{name} [experiment=NAME] [stage=NAME] [GROUP=OPTION ...] [FIELD=VALUE ...]",
        "",
        "Stages (stage=...)",
        *(f"  {stage:<13} {text}" for stage, text in STAGE_HELP.items()),
        "",
        "Groups (* is the default)",
    ]
    options = {g: [f"{o}*" if o == group_defaults().get(g) else o for o in names] for g, names in groups().items()}
    options["hydra/launcher"] = ["basic*", *sorted(_launchers())]
    for group, names in options.items():
        lines += textwrap.wrap(" ".join(names), 98, initial_indent=f"  {group:<15} ", subsequent_indent=" " * 18)
    return "\n".join(
        [
            *lines,
            "",
            "Every number is a field: aggregation_t.t=150 train.batch_size=32. All fields with values: --cfg job",
            "The same command again continues where it stopped. Several runs: -m seed=0,1,2. Hydra: --hydra-help",
            "",
            f"  {name + ' experiment=demo':<55}  minutes on a laptop, no download",
            f"  {name} experiment=demo stage=caption images=photos",
            f"  {name + ' -m sweep=demo_table':<55}  one of sweeps/: several runs, one table",
        ]
    )


def _launchers() -> set[str]:
    return {p.stem for p in (CONF / "hydra/launcher").glob("*.yaml")}


# ---------------------------------------------------------------------------------------- the words of the command line

# Settings whose value is a path. A run folder contains '=' (seed=0), a folder of photographs has blanks, brackets and
# letters that are not ASCII, and a folder may be called 2014 or 1e3.
_PATHS = (
    *("checkpoint", "captions", "images", "output", "runs", "dataset.root", "dataset.reader", "dataset.released"),
    *("dataset.images", "dataset.references", "dataset.karpathy", "dataset.train_annotations"),
    *("dataset.image_column", "dataset.caption_column", "corpus.column"),
    *("dataset.val_annotations", "dataset.test_annotations", "corpus.path", "train.init_from", "clip_backbone.model"),
    *("clip_backbone.cache", "clip_backbone.tokenizer", "generator.language_model", "discriminator.encoder"),
    *("evaluate.references", "report.output", "report.baseline", "runs_dir", "artifacts_dir"),
)
# What Hydra's grammar reads as this very text.
_PLAIN_PATH = re.compile(r"null||(?!(?:true|false|inf|nan)$)(?:[./]*/)?[A-Za-z_][A-Za-z0-9_./:-]*", re.IGNORECASE)
_FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun"),
)


def _is_multirun(argv: Sequence[str]) -> bool:
    return "-m" in argv or "--multirun" in argv


def corrected(argv: Sequence[str]) -> list[str]:
    """The words as Hydra wants them: -m first, paths quoted for its grammar, new reward terms with `++`."""
    words = [_corrected(word, _is_multirun(argv)) for word in argv]
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # Hydra wants -m before or behind all


def _corrected(word: str, multirun: bool) -> str:
    field, _, value = word.partition("=")
    if field.startswith("reward_weights.terms."):  # a name that the settings do not know yet
        return f"++{word}"
    if field in ("captions", "runs", "report.runs") and re.fullmatch(r"\[[^'\"$]*\]", value):
        return f"{field}=[" + ",".join(f"'{pattern.strip()}'" for pattern in value[1:-1].split(",")) + "]"
    is_list = value[:1] in ("[", "'", '"') or (multirun and "," in value)
    if field in _PATHS and not is_list and "${" not in value and not _PLAIN_PATH.fullmatch(value):
        # a backslash is doubled before a quote alone
        escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (match[2] and "\\'"), value)
        return f"{field}='{escaped}'"
    return word


def typed_with_stage(stage: str) -> str:
    """The command that was typed, with another stage, for a shell. It runs here, whatever launcher was named."""
    words = sys.argv[1:]
    if failures is None:  # in a job: the program's words are those of submitit
        from hydra.core.hydra_config import HydraConfig

        words = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    kept = [word for word in words if not word.startswith(("stage=", "download=", "hydra/launcher="))]
    return " ".join([program(), f"stage={stage}", *map(shlex.quote, kept)])


def refused(argv: Sequence[str]) -> str | None:
    """Why these words are not accepted; None: they are, as far as can be seen before Hydra reads them."""
    return _unknown_flag(argv) or unknown_hydra_part(argv) or _expanded_pattern(argv) or launcher_of_one(argv)


def _unknown_flag(argv: Sequence[str]) -> str | None:
    """`--seed=1` and the like. Hydra would take `--experiment` as short for a flag of its own."""
    for arg in argv:
        name, _, value = arg.partition("=")
        if name.startswith("--") and name not in _FLAGS and (value or not any(f.startswith(name) for f in _FLAGS)):
            return f"no option {name}; settings have no dashes: {name[2:]}={value or '...'}"
    return None


def launcher_of_one(argv: Sequence[str]) -> str | None:
    """`hydra/launcher=slurm` without `-m`: Hydra would run it here without a warning."""
    only_print = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
    several = _is_multirun(argv) or any(a.startswith(("sweep=", "hydra.mode=", "+sweep=")) for a in argv)
    launchers = [a for a in argv if a.startswith("hydra/launcher=") and a.partition("=")[2] in _launchers()]
    if not launchers or several or any(a.startswith(only_print) for a in argv):
        return None
    return f"{launchers[-1]} is for several runs, or for one as a job: add -m"


def _expanded_pattern(argv: Sequence[str]) -> str | None:
    """`runs=` or `captions=` whose pattern the shell has expanded to several words."""
    for name, example in (("runs", "runs/demo/*/seed=*"), ("captions", "results/*.json")):
        given = [word for word in argv if word.startswith(f"{name}=")]
        paths = [word for word in argv if "/" in word.partition("=")[0] and Path(word).exists()]
        if given and (len(given) > 1 or paths):
            problem = f"{name} is given {len(given)} times" if len(given) > 1 else f"{paths[0]} is no setting"
            fix = f"if the shell has made several words of a pattern, quote it: {name}='{example}'; or write a list"
            return f"{problem}: {fix}, '{name}=[A,B]'"
    return None


# --------------------------------------------------------------------------------------- the composed settings


def check(cfg: Config) -> None:
    """Raise `ConfigError` for a setting that does not exist, is out of range or contradicts another."""
    _reject_unknown(cfg)
    try:
        validate(cfg)
    except InputError as error:
        raise ConfigError(str(error)) from None


def _reject_unknown(part: Any, path: str = "") -> None:
    """`+train.foo=1` adds a key that nothing reads: OmegaConf sets it on the dataclass without an error."""
    for name, child in vars(part).items():
        if name not in {f.name for f in fields(part)}:
            raise ConfigError(unknown_setting(path + name))
        if is_dataclass(child):
            _reject_unknown(child, f"{path}{name}.")


# ---------------------------------------------------------------------------------------------------------- failures

# What a disk or a folder may do to any write. Other OSErrors (a missing file that nobody checked for) are bugs of ours.
_DISK = (
    *(errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.EEXIST),
)


def _disk_sentence(error: Exception) -> str | None:
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return None
    place = f"{error.filename}: " if error.filename else ""
    fix = "fix that place, or choose another with runs_dir, artifacts_dir or output; nothing is lost"
    return f"{place}{error.strerror}: {fix}"


def _for_the_user(error: Exception, argv: Sequence[str]) -> Exception:
    """What the settings or a disk caused, as a `UserError`; a bug as it is."""
    if isinstance(error, UserError):
        return error
    if sentence := config_sentence(error, argv):
        return ConfigError(sentence)
    if sentence := _disk_sentence(error):
        return UserError(sentence)
    if str(error) == "No trials are completed yet.":  # from Optuna
        return UserError("no run of the search has a score on the validation images, so there is no best run")
    return error


def in_a_sentence(error: Exception) -> str:
    """What `report_failure` prints, in one line. Of a bug: the kind and its first line."""
    error = _for_the_user(error, ())
    lines = str(error).splitlines() or [""]
    return " ".join(lines) if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"


def report_failure(error: Exception, argv: Sequence[str]) -> int:
    """Print on stderr what went wrong and return the exit code: 2 for settings, else 1. A bug keeps its traceback."""
    error = _for_the_user(error, argv)
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        return 1
    if isinstance(error, Stopped):
        print(error, file=sys.stderr)
        return error.code
    name = program()
    hint = f"\n`{name} experiment=demo` needs no download; `{name} --help` explains the rest"
    print(f"error: {error}{'' if argv else hint}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def exit_code(argv: Sequence[str]) -> int:
    """0, or the exit code of the job that failed. Of several runs the failed ones are listed once more."""
    if not failures:
        return 0
    if _is_multirun(argv) or any(a.startswith("sweep=") for a in argv):
        print(f"error: {len(failures)} failed:", *(f"  {words}" for words, _ in failures), sep="\n", file=sys.stderr)
    return max(code for _, code in failures)
