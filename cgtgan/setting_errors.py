"""One sentence for every setting that does not exist or has the wrong type, with the nearest one that does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from cgtgan.checks import accepted_values
from cgtgan.config import Config
from cgtgan.errors import program


def _beside_package(name: str) -> Path:
    """`conf` and `sweeps`: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


CONF, SWEEPS = _beside_package("conf"), _beside_package("sweeps")
# the parts of Hydra that are config groups
_HYDRA_GROUPS = ["launcher", "sweeper", "job_logging", "hydra_logging", "help", "hydra_help", "output", "env"]


@cache
def groups() -> dict[str, list[str]]:
    """Config group -> its options (the files of `conf/` and `sweeps/`), in the order of `config.yaml`."""
    options = {
        folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()
    }
    options["sweep"] = sorted(p.stem for p in SWEEPS.glob("*.yaml"))
    del options["hydra"]
    order = list(group_defaults())
    return {name: options[name] for name in sorted(options, key=lambda g: order.index(g) if g in order else len(order))}


@cache
def group_defaults() -> dict[str, str]:
    """Config group -> the option that `config.yaml` chooses (`null` for none)."""
    return dict(re.findall(r"^  - (\w+): (\w+)", (CONF / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def settings() -> dict[str, Any]:
    """Path -> type of every setting. The type of a part that holds settings is its dataclass."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, child in get_type_hints(kind).items():
            yield prefix + name, child
            if is_dataclass(child):
                yield from walk(child, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]

    return dict(walk(Config, ""))


# --------------------------------------------------------------------------------------------------- unknown settings


def _did_you_mean(near: Sequence[str]) -> str:
    return f"did you mean {' or '.join(near)}?"


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _near_settings(path: str) -> list[str]:
    """Known settings of the same last name, else of a similar path, else of a similar last name."""
    known = [*settings(), *groups()]
    near = [k for k in known if _last(k) == _last(path) and "." in k] + difflib.get_close_matches(path, known, 3, 0.75)
    if not near:  # a mistyped name without its parts: `num_sample`
        close = difflib.get_close_matches(_last(path), {_last(k) for k in known}, 1, 0.75)
        near = [k for k in known if _last(k) in close]
    return list(dict.fromkeys(k for k in near if k != path.rpartition(".")[0]))[:3]


def unknown_setting(path: str) -> str:
    parent = path.rpartition(".")[0]
    for mapping in (path, parent):
        if get_origin(settings().get(mapping)) is dict:
            name = _last(path) if mapping == parent else "NAME"
            return f"{mapping} takes a new name with a plus: +{mapping}.{name}=VALUE, and one that it has without"
    kind = settings().get(parent)
    if kind and not is_dataclass(kind):
        return f"no setting {path}; {parent} is one value"
    if near := _near_settings(path):
        return f"no setting {path}; {_did_you_mean(near)}"
    if kind:
        return f"no setting {path}; {parent} has {', '.join(f.name for f in fields(kind))}"
    return f"no setting {path}; `{program()} --help` lists the groups, `--cfg job` every setting"


def _unknown_hydra_setting(path: str, error: Exception | None = None) -> str:
    """A setting of Hydra's own. The exception carries its neighbours: those of the launcher that was chosen."""
    from hydra.conf import HydraConf

    if "/" in path:
        near = difflib.get_close_matches(path.partition("/")[2], _HYDRA_GROUPS, 1)
        hint = _did_you_mean([f"hydra/{near[0]}"]) if near else f"hydra/ has {', '.join(_HYDRA_GROUPS)}"
        return f"no setting {path}; {hint}"
    known = [f.name for f in fields(HydraConf)]
    for cause in _chain(error):
        if (parent := getattr(cause, "parent_node", None)) is not None:
            path = str(getattr(cause, "full_key", path))
            known = [str(key) for key in parent if not str(key).startswith("_")]
    place, _, name = path.rpartition(".")
    if not known:
        choice = "hydra/launcher=basic has none; choose another first, hydra/launcher=slurm or submitit_local"
        return f"no setting {path}: {choice}"
    near = [f"{place}.{n}" for n in difflib.get_close_matches(name, known, 2)]
    return f"no setting {path}; {_did_you_mean(near) if near else f'{place} has ' + ', '.join(known)}"


def unknown_hydra_part(argv: Sequence[str]) -> str | None:
    """`+hydra.foo=1`, which Hydra accepts without an error."""
    for added in filter(None, (re.match(r"\+\+?(hydra\.(\w+))", arg) for arg in argv)):
        from hydra.conf import HydraConf

        if added[2] not in {f.name for f in fields(HydraConf)}:
            return _unknown_hydra_setting(added[1])
    return None


def _unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(option, options, 1, 0.6)
    hint = f" ({_did_you_mean(near)})" if near else ""
    field = "; any other temperature is aggregation_t.t=NUMBER" if group == "aggregation_t" else ""
    return f"{group}={option} is not accepted{hint}: it must be one of {', '.join(options)}{field}"


# ---------------------------------------------------------------------------------------------------------- wrong types


def _type_in_words(kind: Any) -> str:
    if NoneType in get_args(kind):
        return " or ".join([*(_type_in_words(k) for k in get_args(kind) if k is not NoneType), "null"])
    if get_origin(kind) is list:
        return "a list such as [a,b]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def _wrong_type(path: str, value: str) -> str:
    kind = settings()[path]
    if is_dataclass(kind):
        option = f"one of {', '.join(groups()[path])}, or " if path in groups() else ""
        several = ", ".join(f"{path}.{f.name}" for f in fields(kind)[:3])
        accepted = f"{option}settings given by their paths ({several}, ...)"
    else:
        accepted = _type_in_words(kind) + (f" ({accepted_values(path)})" if accepted_values(path) else "")
    return f"{path}={value} is not accepted: it must be {accepted}"


# --------------------------------------------------------------------------------------- exceptions of Hydra, OmegaConf


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def config_sentence(error: Exception, argv: Sequence[str]) -> str | None:
    """The sentence for an exception of Hydra or OmegaConf that the settings caused. None: it is a bug."""
    return (
        _unreadable_override(error)
        or _missing_option(error, argv)
        or _refused_override(error)
        or _refused_value(error)
        or _other_hydra_error(error)
    )


def _unreadable_override(error: Exception) -> str | None:
    from hydra.errors import OverrideParseException

    if isinstance(error, OverrideParseException):
        override = getattr(error, "override", "") or ""
        quoting = "quote a value with blanks, commas, = or brackets: 'name=\"a=b\"'"
        return f"{override} cannot be read: write FIELD=VALUE, and {quoting}"
    if several := re.match(r"Ambiguous value for argument '(.*?)'\n", str(error)):
        return f"{several[1]} has several values: add -m to run each, or write them as a list, [a,b]"
    return None


def _missing_option(error: Exception, argv: Sequence[str]) -> str | None:
    """A group without the option that was asked for."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if (group, option) == ("hydra/sweeper", "optuna"):
            return "hydra/sweeper=optuna needs the extra `optuna`, which is not installed: pip install -e '.[optuna]'"
        options = [
            o for o in error.options or [] if not o.startswith("cgtgan_")
        ]  # without the schemas of the launchers
        return _unknown_option(group, option, options) if group else str(error).splitlines()[0]
    if str(error).startswith("Config group override"):  # a bare number or null is refused before options are looked up
        for group, _, option in (arg.partition("=") for arg in argv):
            if group in groups():
                return _unknown_option(group, option, groups()[group])
    return None


def _refused_override(error: Exception) -> str | None:
    """An override of a setting that does not exist, or a deletion."""
    message = str(error)
    pattern = r"Could not (override|append to config|delete from config).*?'([\w./@]+)'"
    if refused := re.match(pattern, message, re.DOTALL):
        path = refused[2]
        if refused[1].startswith("delete"):
            return f"~{path} cannot be taken away: give it a value, or null where null is accepted"
        return _unknown_hydra_setting(path, error) if re.match(r"hydra\b", path) else unknown_setting(path)
    path, _ = _merged_override(message) or ("", "")
    if path and path not in settings() and not path.startswith("hydra"):
        return unknown_setting(path)
    return None


def _merged_override(message: str) -> tuple[str, str] | None:
    """(path, value) of the override that OmegaConf could not merge."""
    override = re.match(r"Error merging override (.*)", message, re.DOTALL)
    return (override[1].partition("=")[0].lstrip("+~"), override[1].partition("=")[2]) if override else None


def _refused_value(error: Exception) -> str | None:
    """A value of the wrong type, or an unknown key of a YAML file, whose name goes before the sentence."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

    message = str(error)
    file = re.match(r"In '(.*?)': ", message)
    prefix = f"{file[1]}.yaml: " if file else ""
    override = _merged_override(message)
    for cause in _chain(error):
        path = getattr(cause, "full_key", None)
        if not isinstance(cause, OmegaConfBaseException) or not path:
            continue
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and path not in settings():
            return prefix + unknown_setting(path)
        if isinstance(cause, ValidationError) and path in settings():
            value = override[1] if override else next(iter(re.findall(r"[Vv]alue:? '(.*?)'", str(cause))), "null")
            return prefix + _wrong_type(path, value)
        return f"{prefix}{path}: {str(cause).splitlines()[0]}"
    return None


def _other_hydra_error(error: Exception) -> str | None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    usage = ("Only one of --run", "The --resolve flag")  # plain ValueErrors of Hydra's
    if isinstance(error, (HydraException, OmegaConfBaseException)) or str(error).startswith(usage):
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return None
