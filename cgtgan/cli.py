"""What the command line says: the help page, and one sentence for every setting that is not accepted. Imports no torch.

`run.py` composes and dispatches; this module turns Hydra's and OmegaConf's exceptions into the field, the value and the mend.
"""

from __future__ import annotations

import difflib
import errno
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from cgtgan.checks import accepted_values, validate
from cgtgan.config import Config
from cgtgan.errors import InputError, Stopped, UserError


def _beside_package(name: str) -> Path:
    """`conf` and `sweeps`: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


CONF, SWEEPS = _beside_package("conf"), _beside_package("sweeps")

STAGE_HELP = {
    "preprocess": "images and sentences -> CLIP embeddings",
    "aggregate": "attention over the corpus: one text embedding an image",
    "initialize": "the generator learns to rebuild a sentence from its own embedding",
    "train": "the GAN: a discriminator's naturalness and CLIP's semantics as rewards",
    "evaluate": "a checkpoint and the baselines, or captions=FILE, against the references",
    "caption": "your own pictures: images=FOLDER -> captions.json and a gallery",
    "report": "a run -> one HTML page; runs=PATTERN: many side by side",
    "serve": "a local page to try a checkpoint",
    "pipeline": "all that a scored run needs; skips what is made (the default)",
}
_FLAGS = (
    *(
        "--help",
        "--hydra-help",
        "--version",
        "--cfg",
        "--resolve",
        "--package",
        "--run",
        "--multirun",
        "--shell-completion",
    ),
    *("--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info"),
)


# (overrides, exit code) of the jobs that failed in this process; None in a submitit worker, which imports this module afresh.
failures: list[tuple[str, int]] | None = None
_HYDRA_USAGE = ("Only one of --run", "The --resolve flag")  # plain ValueErrors of Hydra's


class ConfigError(InputError):
    """The settings are wrong: nothing was started."""


# ------------------------------------------------------------------------------------------------------------------- help


@cache
def groups(conf: Path = CONF) -> dict[str, list[str]]:
    """Config group -> its options, as the folders of `conf/` have them, in the order of `config.yaml`."""
    found = {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in conf.iterdir() if folder.is_dir()}
    found.pop("hydra", None)
    found["sweep"] = sorted(p.stem for p in SWEEPS.glob("*.yaml"))
    order = list(group_defaults(conf))
    return {name: found[name] for name in sorted(found, key=lambda g: order.index(g) if g in order else len(order))}


@cache
def group_defaults(conf: Path = CONF) -> dict[str, str]:
    """Config group -> the option `config.yaml` chooses (`null` for none)."""
    return dict(re.findall(r"^  - (\w+): (\w+)", (conf / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE))


def help_text(conf: Path = CONF) -> str:
    """One screenful."""
    lines = [
        "CgT-GAN: learns to caption from images without captions and sentences without images.",
        "",
        "python run.py [experiment=NAME] [stage=NAME] [GROUP=OPTION ...] [FIELD=VALUE ...]",
        "",
        "Stages (stage=...)",
        *(f"  {name:<13} {text}" for name, text in STAGE_HELP.items()),
        "",
        "Groups (* is the default)",
    ]
    shown = {
        g: [f"{o}*" if o == group_defaults(conf).get(g) else o for o in options] for g, options in groups(conf).items()
    }
    shown["hydra/launcher"] = ["basic*", *(p.stem for p in sorted((conf / "hydra/launcher").glob("*.yaml")))]
    for group, options in shown.items():
        lines += textwrap.wrap(" ".join(options), 98, initial_indent=f"  {group:<15} ", subsequent_indent=" " * 18)
    lines += [
        "",
        "Every number is a field: aggregation_t.t=150 train.batch_size=32. All, with values: --cfg job",
        "The same command again goes on where it stopped. Several runs: -m seed=0,1,2. Hydra: --hydra-help",
        "",
        "  python run.py experiment=demo                        minutes on a laptop, no download",
        "  python run.py experiment=demo stage=caption images=photos",
        "  python run.py -m sweep=demo_table                    a question of sweeps/, as several runs",
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- overrides

# Settings whose value is one path: our own run folders hold a '=' (seed=0), and photographs lie in folders with blanks and brackets.
_PATHS = (
    "checkpoint",
    "captions",
    "images",
    "output",
    "runs",
    "dataset.root",
    "dataset.reader",
    "dataset.released",
    "corpus.path",
    "train.init_from",
    "clip_backbone.model",
    "evaluate.references",
    "report.output",
    "report.baseline",
    "runs_dir",
    "artifacts_dir",
)


def quote_paths(argv: Sequence[str]) -> list[str]:
    """Overrides with the value of a path quoted for Hydra's grammar, so that a person need not. Quoted values stay, and lists but runs'."""
    several = "-m" in argv or "--multirun" in argv
    quoted = []
    for word in argv:
        field, _, value = word.partition("=")
        plain = (
            bool(value)
            and value[0] not in "['\""
            and value != "null"
            and "${" not in value
            and not (several and "," in value)
        )
        if field.startswith("reward_weights.terms."):  # a name that the settings do not know yet
            word = f"++{word}"
        elif field in _PATHS and plain and not re.fullmatch(r"[\w./~:-]*", value):
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            word = f"{field}='{escaped}'"
        elif field in ("runs", "report.runs") and re.fullmatch(r"\[[^'\"$]*\]", value):
            word = f"{field}=[" + ",".join(f"'{pattern.strip()}'" for pattern in value[1:-1].split(",")) + "]"
        quoted.append(word)
    return quoted


def launcher_of_one(argv: Sequence[str]) -> str | None:
    """`hydra/launcher=slurm` without `-m`: Hydra would run it here, without a word."""
    shown_only = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
    several = any(a in ("-m", "--multirun") or a.startswith(("sweep=", "hydra.mode=", "+sweep=")) for a in argv)
    chosen = [a for a in argv if a in {f"hydra/launcher={p.stem}" for p in (CONF / "hydra/launcher").glob("*.yaml")}]
    if not chosen or several or any(a.startswith(shown_only) for a in argv):
        return None
    return f"{chosen[-1]} is for several runs, or for one as a job: add -m"


def expanded_pattern(argv: Sequence[str]) -> str | None:
    """`runs=` whose pattern the shell has made into several words."""
    given = [word for word in argv if word.startswith("runs=")]
    folders = [word for word in argv if "/" in word.partition("=")[0] and Path(word).exists()]
    if not given or (len(given) == 1 and not folders):
        return None
    extra = f"runs is given {len(given)} times" if len(given) > 1 else f"{folders[0]} is no setting"
    return f"{extra}: if the shell has made several words of a pattern, quote it: runs='runs/demo/*/seed=*'; or write a list, 'runs=[A,B]'"


# ----------------------------------------------------------------------------------------------------- unknown and mistyped


@cache
def settings() -> dict[str, Any]:
    """Path -> type of every setting; a part that holds settings has its dataclass as type."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, child in get_type_hints(kind).items():
            yield prefix + name, child
            if is_dataclass(child):
                yield from walk(child, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]

    return dict(walk(Config, ""))


def _or(words: Sequence[str]) -> str:
    return " or ".join(words)


def _unknown_setting(path: str) -> str:
    known = [*settings(), *groups()]
    last = path.rsplit(".", 1)[-1]
    near = [k for k in known if k.rsplit(".", 1)[-1] == last and "." in k]
    near += difflib.get_close_matches(path, known, 3, 0.75)
    if not near:  # a mistyped name without its parts: `num_sample`
        near = [k for k in known for close in difflib.get_close_matches(last, {n.rsplit(".", 1)[-1] for n in known}, 1, 0.75)
                if k.rsplit(".", 1)[-1] == close]  # fmt: skip
    parent = path.rpartition(".")[0]
    if parent in settings() and not is_dataclass(settings()[parent]):
        return f"no setting {path}; {parent} is one value"
    near = list(dict.fromkeys(k for k in near if k != parent))[:3]
    if not near and is_dataclass(settings().get(parent)):
        return f"no setting {path}; {parent} has {', '.join(f.name for f in fields(settings()[parent]))}"
    hint = (
        f"did you mean {_or(near)}?" if near else "`python run.py --help` lists the groups, `--cfg job` every setting"
    )
    return f"no setting {path}; {hint}"


def _unknown_hydra_setting(path: str, error: Exception | None = None) -> str:
    """One of Hydra's own, whose neighbours the exception carries: the launcher's are those of the one that was chosen."""
    from hydra.conf import HydraConf

    known = [f.name for f in fields(HydraConf)]
    if "/" in path:
        known = ["launcher", "sweeper", "job_logging", "hydra_logging", "help", "hydra_help", "output", "env"]
        near = difflib.get_close_matches(path.partition("/")[2], known, 1)
        return f"no setting {path}; " + (f"did you mean hydra/{near[0]}?" if near else f"hydra/ has {', '.join(known)}")
    for cause in _chain(error):
        if (parent := getattr(cause, "parent_node", None)) is not None:
            path, known = (
                str(getattr(cause, "full_key", path)),
                [str(key) for key in parent if not str(key).startswith("_")],
            )
    place, _, name = path.rpartition(".")
    if not known:
        return f"no setting {path}: hydra/launcher=basic has none; choose another first, hydra/launcher=slurm or submitit_local"
    near = difflib.get_close_matches(name, known, 2)
    return f"no setting {path}; " + (
        f"did you mean {_or([f'{place}.{n}' for n in near])}?" if near else f"{place} has {', '.join(known)}"
    )


def unknown_hydra_part(argv: Sequence[str]) -> str | None:
    """`+hydra.foo=1`, which Hydra takes without a word."""
    for added in filter(None, (re.match(r"\+\+?(hydra\.(\w+))", arg) for arg in argv)):
        from hydra.conf import HydraConf

        if added[2] not in {f.name for f in fields(HydraConf)}:
            return _unknown_hydra_setting(added[1])
    return None


def _unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(option, options, 1, 0.6)
    field = {"aggregation_t": "; any other temperature is aggregation_t.t=NUMBER"}.get(group, "")
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{group}={option} is not accepted{hint}: it must be one of {', '.join(options)}{field}"


def _type_in_words(kind: Any) -> str:
    if NoneType in get_args(kind):
        return _or([*(_type_in_words(k) for k in get_args(kind) if k is not NoneType), "null"])
    if get_origin(kind) is list:
        return "a list such as [a,b]"
    if is_dataclass(kind):
        return "settings of its own, each given by its path"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def _wrong_type(path: str, value: str) -> str:
    kind = settings()[path]
    if is_dataclass(kind):
        several = ", ".join(f"{path}.{f.name}" for f in fields(kind)[:3])
        groups_hint = f"one of {', '.join(groups()[path])}, or " if path in groups() else ""
        return f"{path}={value} is not accepted: it must be {groups_hint}{_type_in_words(kind)} ({several}, ...)"
    values = f" ({accepted_values(path)})" if accepted_values(path) else ""
    return f"{path}={value} is not accepted: it must be {_type_in_words(kind)}{values}"


def unknown_flag(argv: Sequence[str]) -> str | None:
    """`--seed=1` and the like: Hydra would take `--experiment` for the start of another flag of its own."""
    for arg in argv:
        name, _, value = arg.partition("=")
        if name.startswith("--") and name not in _FLAGS and (value or not any(f.startswith(name) for f in _FLAGS)):
            return f"no option {name}; settings have no dashes: {name[2:]}={value or '...'}"
    return None


def check(cfg: Config) -> None:
    """Raise `ConfigError` for a setting that does not exist, is out of range or contradicts another."""
    _reject_unknown(cfg)
    try:
        validate(cfg)
    except InputError as error:
        raise ConfigError(str(error)) from None


def _reject_unknown(part: Any, path: str = "") -> None:
    """`+train.foo=1` adds a key that nothing reads: OmegaConf sets it on the dataclass without a word."""
    for name, child in vars(part).items():
        if name not in {f.name for f in fields(part)}:
            raise ConfigError(_unknown_setting(path + name))
        if is_dataclass(child):
            _reject_unknown(child, f"{path}{name}.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def config_sentence(error: Exception, argv: Sequence[str]) -> str | None:
    """The sentence for an exception of Hydra or OmegaConf that the settings caused; None: it is a bug."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

    message = str(error)
    if isinstance(error, OverrideParseException):
        override = getattr(error, "override", "") or ""
        return f"{override} cannot be read: write FIELD=VALUE, and quote what holds blanks, commas, = or brackets: 'name=\"a=b\"'"
    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if (group, option) == ("hydra/sweeper", "optuna"):
            return "hydra/sweeper=optuna needs the extra `optuna`, which is not installed: pip install -e '.[optuna]'"
        options = [o for o in error.options or [] if not o.startswith("cgtgan_")]  # the launchers' schemas
        return _unknown_option(group, option, options) if group else message.splitlines()[0]
    for group, options in groups().items() if message.startswith("Config group override") else ():
        for arg in argv:  # a bare number or null is refused before the options are looked up
            if arg.startswith(f"{group}="):
                return _unknown_option(group, arg.partition("=")[2], options)
    if found := re.match(r"Ambiguous value for argument '(.*?)'\n", message):
        return f"{found[1]} has several values: add -m to run each, or write them as a list, [a,b]"
    if found := re.match(
        r"Could not (?:override|append to config|delete from config).*?'([\w./@]+)'", message, re.DOTALL
    ):
        if "delete" in found[0]:
            return f"~{found[1]} cannot be taken away: give it a value, or null where null is accepted"
        return _unknown_hydra_setting(found[1], error) if re.match(r"hydra\b", found[1]) else _unknown_setting(found[1])
    override = re.match(r"Error merging override (.*)", message, re.DOTALL)
    key, _, value = override[1].partition("=") if override else ("", "", "")
    if override and key.lstrip("+~") not in settings() and not key.startswith("hydra"):
        return _unknown_setting(key.lstrip("+~"))
    for cause in _chain(error):
        path = getattr(cause, "full_key", None)
        if not isinstance(cause, OmegaConfBaseException) or not path:
            continue
        where = re.match(r"In '(.*?)': ", message)
        where = f"{where[1]}.yaml: " if where else ""
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and path not in settings():
            return where + _unknown_setting(path)
        if isinstance(cause, ValidationError) and path in settings():
            given = value if override else next(iter(re.findall(r"[Vv]alue:? '(.*?)'", str(cause))), "null")
            return where + _wrong_type(path, given)
        return f"{where}{path}: {str(cause).splitlines()[0]}"
    if isinstance(error, (HydraException, OmegaConfBaseException)) or message.startswith(_HYDRA_USAGE):
        return " ".join(line.strip() for line in message.splitlines() if line.strip())
    return None


# ------------------------------------------------------------------------------------------------------ failures, exit codes


# What a disk or a folder may do to any write; other OSErrors (a missing file that we should have asked for) are bugs of ours.
_DISK = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
    errno.EEXIST,
)


def _disk_sentence(error: Exception) -> str | None:
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}: mend that place or choose another with runs_dir, artifacts_dir or output; nothing made is lost"


def _for_the_user(error: Exception, argv: Sequence[str]) -> Exception:
    """What the settings or a disk caused, as a `UserError`; a bug as it is."""
    if not isinstance(error, UserError) and (sentence := config_sentence(error, argv)):
        error = ConfigError(sentence)
    if not isinstance(error, UserError) and (sentence := _disk_sentence(error)):
        error = UserError(sentence)
    if str(error) == "No trials are completed yet.":  # Optuna's last word
        error = UserError("no run of the search came to a score on the validation images, so there is no best one")
    return error


def in_a_sentence(error: Exception) -> str:
    """What `report_failure` says, in one line; of a bug the kind and its first line."""
    error = _for_the_user(error, ())
    lines = str(error).splitlines() or [""]
    return " ".join(lines) if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"


def report_failure(error: Exception, argv: Sequence[str]) -> int:
    """Say on stderr what went wrong and return the exit code: 2 for settings, 1 else. A bug keeps its traceback."""
    error = _for_the_user(error, argv)
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        return 1
    if isinstance(error, Stopped):
        print(error, file=sys.stderr)
        return error.code
    newcomer = (
        "" if argv else "\n`python run.py experiment=demo` needs no download; `python run.py --help` explains the rest"
    )
    print(f"error: {error}{newcomer}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def exit_code(argv: Sequence[str]) -> int:
    """0, or the exit code of the job that failed; of several runs the failed ones are listed once more."""
    if not failures:
        return 0
    if {"-m", "--multirun"} & set(argv) or any(a.startswith("sweep=") for a in argv):
        print(
            f"error: {len(failures)} failed:",
            *(f"  {overrides}" for overrides, _ in failures),
            sep="\n",
            file=sys.stderr,
        )
    return max(code for _, code in failures)
