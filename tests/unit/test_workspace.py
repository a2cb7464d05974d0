"""A run folder belongs to one set of settings; one made before a setting existed is still that run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, RewardTermConfig
from cgtgan.errors import InputError
from cgtgan.runtime.artifacts import read_json, write_json

REFUSED = "holds a run with other settings"


def workspace(tmp_path: Path) -> Workspace:
    return Workspace(Config(runs_dir=str(tmp_path), variant="one"))


def without(ws: Workspace, *settings: str) -> None:
    """Rewrite the settings of the run folder as a version wrote them that did not know these."""
    file = ws.run / "settings.json"
    write_json(file, {name: value for name, value in read_json(file).items() if name not in settings})


def test_the_same_settings_go_on_and_others_are_refused(tmp_path: Path) -> None:
    workspace(tmp_path).check_same_settings()
    workspace(tmp_path).check_same_settings()
    ws = workspace(tmp_path)
    ws.cfg.train.kl_weight = 0.1
    with pytest.raises(InputError, match=rf"{REFUSED} \(train.kl_weight was 0.0, is 0.1\): .*variant=NAME"):
        ws.check_same_settings()


def test_a_setting_that_an_older_run_folder_lacks_counts_as_its_default(tmp_path: Path) -> None:
    ws = workspace(tmp_path)
    ws.check_same_settings()
    without(ws, "train.kl_weight", "train.released", "reward_weights.max_weight")
    ws.check_same_settings()
    ws.cfg.train.kl_weight = 0.1
    with pytest.raises(InputError, match=rf"{REFUSED} \(train.kl_weight was 0.0, is 0.1\)"):
        ws.check_same_settings()


def test_a_setting_that_is_not_its_default_does_not_continue_a_run_without_it(tmp_path: Path) -> None:
    ws = workspace(tmp_path)
    ws.cfg.train.baseline = "leave_one_out"
    ws.check_same_settings()
    without(ws, "train.baseline")
    with pytest.raises(InputError, match=r"train.baseline was greedy, is leave_one_out"):
        ws.check_same_settings()


def test_a_reward_term_comes_and_goes_only_with_a_new_run(tmp_path: Path) -> None:
    plain = workspace(tmp_path)
    plain.check_same_settings()
    ws = workspace(tmp_path)
    ws.cfg.reward_weights.terms = {"clip": RewardTermConfig(weight=0.2)}
    with pytest.raises(InputError, match=r"reward_weights.terms.clip.weight was None, is 0.2"):
        ws.check_same_settings()
    (plain.run / "settings.json").unlink()
    ws.check_same_settings()
    with pytest.raises(InputError, match=r"reward_weights.terms.clip.weight was 0.2, is None"):
        plain.check_same_settings()


def test_inputs_have_no_defaults(tmp_path: Path) -> None:
    ws = workspace(tmp_path)
    ws.check_same_run("inputs", {"images": "abc"})
    with pytest.raises(InputError, match=r"other inputs \(reward term brevity was None, is 123\)"):
        ws.check_same_run("inputs", {"images": "abc", "reward term brevity": "123"})
