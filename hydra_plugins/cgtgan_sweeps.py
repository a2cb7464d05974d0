"""The group `sweep`: its options are the files of the folder `sweeps/`, which lies beside `conf/` and not in it.

Hydra reads this file at every start of any Hydra program in this environment: it imports nothing that takes time, and
leaves alone programs whose config folder is not ours.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

GROUP = "sweep"


class SweepSource(ConfigSource):
    """`sweeps://FOLDER`: the config `sweep/NAME` is the file FOLDER/NAME.yaml."""

    @staticmethod
    def scheme() -> str:
        return "sweeps"

    def _file(self, config_path: str) -> Path:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        is_sweep = group == GROUP and name and "/" not in name
        return Path(self.path) / (f"{name}.yaml" if is_sweep else "\0")

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {file}")
        text = file.read_text(encoding="utf-8")
        config = OmegaConf.create(text)
        header = ConfigSource._get_header_dict(text)
        return ConfigResult(provider=self.provider, path=self.full_path(), config=config, header=header)

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", GROUP)

    def is_config(self, config_path: str) -> bool:
        file = self._file(config_path)
        return "\0" not in str(file) and file.is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [GROUP] if results_filter in (None, ObjectType.GROUP) else []
        files = sorted(file.stem for file in Path(self.path).glob("*.yaml"))
        return files if config_path == GROUP and results_filter in (None, ObjectType.CONFIG) else []


class SweepSearchPath(SearchPathPlugin):
    """Puts `sweeps/` on the search path of `cgtgan`."""

    def manipulate_search_path(self, search_path: "ConfigSearchPath") -> None:
        main = next((element.path or "" for element in search_path.get_path() if element.provider == "main"), "")
        conf = Path(main.removeprefix("file://"))
        sweeps = conf.parent / "sweeps"
        if conf.name == "conf" and ((conf.parent / "cgtgan" / "cli.py").is_file() or conf.parent.name == "cgtgan"):
            search_path.append(provider="cgtgan", path=f"{SweepSource.scheme()}://{sweeps}")
