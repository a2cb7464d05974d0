"""The door: compose the settings, check them, run the stage. `cgtgan --help`; `python run.py` is the same from a checkout."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from cgtgan import cli
from cgtgan.config import Config
from cgtgan.errors import Stopped

if TYPE_CHECKING:  # Hydra and OmegaConf take a third of a second: `--help` does without
    from omegaconf import DictConfig

# Before numpy, torch or tokenizers are loaded: spinning OpenMP threads cost four times the time on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# ... but a spin of some microseconds is a third faster on a quiet one, and no slower on a busy one (docs/negative_results.md, 11).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault(
    "HF_HUB_ETAG_TIMEOUT", "5"
)  # without a network the local copy is used after this, not after minutes
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, and `cgtgan.cli` says it in a sentence


def sweep_name(cfg: Config) -> str | None:
    """What groups this job's runs in W&B: the name of its `sweep=`; of another multirun the experiment's; of a single run nothing."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_ = HydraConfig.get()
    return hydra_.runtime.choices.get("sweep") or (cfg.name if hydra_.mode == RunMode.MULTIRUN else None)


def run_stage(raw: DictConfig) -> float | None:
    """Settings as Hydra composed them -> typed, checked, run. A run that trains returns its best CIDEr on the validation images."""
    from omegaconf import OmegaConf

    cfg = OmegaConf.to_object(raw)
    assert isinstance(cfg, Config)
    cfg.wandb.group = cfg.wandb.group or sweep_name(cfg)
    cli.check(cfg)
    return importlib.import_module(f"cgtgan.stages.{cfg.stage}").run(cfg)


def job(raw: DictConfig) -> float | None:
    """One run, or one of a multirun: here a failure is kept for the end, so that the other jobs still run."""
    try:
        return run_stage(raw)
    except Exception as error:
        if cli.failures is None:  # a submitit worker: the scheduler must see it
            raise
        if isinstance(error, Stopped) and error.code > 128:  # a signal: whoever sent it did not mean this job alone
            raise SystemExit(cli.report_failure(error, sys.argv[1:])) from None
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        cli.failures.append((" ".join(map(str, overrides or ())), cli.report_failure(error, sys.argv[1:])))


def main() -> int:
    argv = sorted(
        cli.quote_paths(sys.argv[1:]), key=lambda word: word not in ("-m", "--multirun")
    )  # Hydra wants -m before or behind all
    sys.argv[1:] = argv
    if "--help" in argv or "-h" in argv:
        print(cli.help_text())
        return 0
    if (
        refused := cli.unknown_flag(argv)
        or cli.unknown_hydra_part(argv)
        or cli.expanded_pattern(argv)
        or cli.launcher_of_one(argv)
    ):
        print(f"error: {refused}", file=sys.stderr)
        return 2

    import hydra
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="cgtgan_schema", node=Config)
    cli.failures = []
    try:
        hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        return max(cli.report_failure(error, argv), cli.exit_code(argv))
    return cli.exit_code(argv)


if __name__ == "__main__":
    sys.exit(main())
