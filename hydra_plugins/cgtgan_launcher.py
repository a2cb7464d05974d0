"""`hydra/launcher=slurm` and `submitit_local`: the fields and the plugin; cgtgan/launching does the work.

Hydra reads this file at every start, whichever launcher is chosen: nothing slow is imported here. It must lie in the
namespace package `hydra_plugins`, which other packages share: hence no `__init__.py`. Annotations are not postponed:
Hydra runs this file before it is in `sys.modules`, where dataclasses look them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


@dataclass
class LocalFields:
    """The fields of conf/hydra/launcher/submitit_local.yaml, and those that slurm.yaml shares with it."""

    _target_: str = "hydra_plugins.cgtgan_launcher.LocalLauncher"
    submitit_folder: str = "${hydra.sweep.dir}/.submitit/%j"
    name: str | None = None
    timeout_min: int = 60
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    signal_delay_s: int = 120
    max_num_timeout: int = 1000
    array_parallelism: int = 1


@dataclass
class SlurmFields(LocalFields):
    """The fields of conf/hydra/launcher/slurm.yaml; null: not passed to sbatch."""

    _target_: str = "hydra_plugins.cgtgan_launcher.SlurmLauncher"
    array_parallelism: int = 256
    nodes: int = 1
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    gpus_per_task: int | None = None
    cpus_per_gpu: int | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    comment: str | None = None
    stderr_to_stdout: bool = True
    setup: list[str] | None = None
    additional_parameters: dict[str, Any] = field(default_factory=dict)


for _name, _node in (("cgtgan_local", LocalFields), ("cgtgan_slurm", SlurmFields)):
    ConfigStore.instance().store(group="hydra/launcher", name=_name, node=_node, provider="cgtgan")


class _JobLauncher(Launcher):
    cluster = ""

    def __init__(self, **fields: Any) -> None:
        self.fields = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in fields.items()
        }
        self.config: Any = None
        self.context: Any = None
        self.function: Any = None

    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        self.context, self.function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence["JobReturn"]:
        try:
            import submitit  # noqa: F401
        except ImportError:
            from cgtgan.errors import ConfigError

            fix = "pip install -e '.[slurm]'"
            raise ConfigError(f"hydra/launcher needs the extra `slurm`, which is not installed: {fix}") from None
        from cgtgan.assets.readiness import make_ready
        from cgtgan.launching.sweep import launch

        config, loader = self.config, self.context.config_loader
        sweep = config.hydra.runtime.choices.get("sweep")

        def compose(words: list[str]) -> "DictConfig":
            return loader.load_sweep_config(config, words)

        ready = partial(make_ready, seen={})  # what is missing is looked for and said once for all points
        return launch(self.cluster, self.fields, compose, self.function, sweep, job_overrides, ready)


class SlurmLauncher(_JobLauncher):
    cluster = "slurm"


class LocalLauncher(_JobLauncher):
    cluster = "local"


class OwnName(SearchPathPlugin):
    """Where hydra-submitit-launcher is installed too, Hydra would take its `submitit_local` for the schema of ours."""

    def manipulate_search_path(self, search_path: "ConfigSearchPath") -> None:
        ConfigStore.instance().repo.get("hydra", {}).get("launcher", {}).pop("submitit_local.yaml", None)
