"""The entry point, `cgtgan` or `python run.py`: compose the settings, check them, run the stage."""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import TYPE_CHECKING

from cgtgan import cli
from cgtgan.config import Config
from cgtgan.errors import Stopped
from cgtgan.launching.points import Points, numbered
from cgtgan.runtime.shards import Rank
from cgtgan.runtime.versions import __version__
from cgtgan.setting_errors import CONF

if TYPE_CHECKING:  # Hydra and OmegaConf take a third of a second: `--help` does without
    from omegaconf import DictConfig

# Before numpy, torch or tokenizers load. On a busy machine, OpenMP threads that spin while they wait take four times as
# long; a spin of some microseconds is a third faster on a quiet one (docs/negative_results.md, 11).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")  # seconds without a network until the local copy is used
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, and `cgtgan.cli` prints a sentence

_points = Points()
_seen: dict[str, str] = {}  # what the runs of a multirun found missing (assets/readiness.py)


def sweep_name(cfg: Config) -> str | None:
    """The W&B group of this job's runs: the name of its `sweep=`, else of a multirun the experiment, else none."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    is_multirun = hydra_config.mode == RunMode.MULTIRUN
    return hydra_config.runtime.choices.get("sweep") or (cfg.name if is_multirun else None)


def typed_decode() -> list[str]:
    """`decode` and its fields, such as `decode.beam_size`, that this job's command line names."""
    from hydra.core.hydra_config import HydraConfig

    names = {word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task}
    return sorted(name for name in names if name.partition(".")[0] == "decode")


def run_stage(raw: DictConfig) -> float | None:
    """Composed settings -> typed, checked, run. A run that trains returns its best CIDEr on the validation images."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    cfg, started = OmegaConf.to_object(raw), time.perf_counter()
    assert isinstance(cfg, Config)
    # a job of a launcher is a process of its own, with a log of its own
    cfg.several = HydraConfig.get().mode == RunMode.MULTIRUN and cli.failures is not None
    cfg.wandb.group = cfg.wandb.group or sweep_name(cfg)
    cfg.typed_decode = typed_decode()
    cli.check(cfg)
    from cgtgan.assets.readiness import make_ready  # numpy, which an answer to a wrong setting does not wait for

    make_ready(cfg, _seen)
    result = importlib.import_module(f"cgtgan.stages.{cfg.stage}").run(cfg)
    if cfg.several and Rank.here().number == 0:
        hydra_config = HydraConfig.get()
        number = numbered(hydra_config.job.num + 1, hydra_config.sweeper, sys.argv[1:])
        overrides = hydra_config.overrides.task
        print(_points.done(cfg, number, overrides, time.perf_counter() - started), flush=True)
    return result


def job(raw: DictConfig) -> float | None:
    """One run, or one of a multirun: a failure is kept until the end, so that the other runs still start."""
    try:
        return run_stage(raw)
    except Exception as error:
        if cli.failures is None:  # a submitit worker: the scheduler must see it
            raise
        code = cli.report_failure(error, sys.argv[1:])
        if isinstance(error, Stopped) and error.code > 128:  # a signal is not meant for this run alone
            raise SystemExit(code) from None
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        cli.failures.append((" ".join(map(str, overrides or ())), code))


def main() -> int:
    argv = cli.corrected(sys.argv[1:])
    sys.argv[1:] = argv
    if "--help" in argv or "-h" in argv:
        print(cli.help_text())
        return 0
    if "--version" in argv:
        print(f"cgtgan {__version__}")
        return 0
    if refusal := cli.refused(argv):
        print(f"error: {refusal}", file=sys.stderr)
        return 2

    import hydra
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="cgtgan_schema", node=Config)
    cli.failures = []
    _seen.clear()
    _points.clear()
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        return max(cli.report_failure(error, argv), cli.exit_code(argv))
    for line in _points.last_words():
        print(line)
    return cli.exit_code(argv)


if __name__ == "__main__":
    sys.exit(main())
