"""What artifacts record of settings: a younger setting and a first format change no name, all others do."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass, replace

import pytest

from cgtgan import config
from cgtgan.config import GeneratorConfig, InitializeConfig, OptimizerConfig, as_dict
from cgtgan.runtime.artifacts import fingerprint
from cgtgan.runtime.producers import settings_of, with_format


def test_what_0_1_knew_is_always_there() -> None:
    """The fingerprint is the one that commit a228a6e gives for these settings."""
    assert fingerprint(settings_of(GeneratorConfig())) == "a873ccf1bdcb"
    assert fingerprint(settings_of(InitializeConfig(noise_std=0.5))) == "0a3ce72bc5ec"


@pytest.mark.parametrize("name", ["GeneratorConfig", "InitializeConfig", "DemoClipConfig", "CorpusConfig"])
def test_a_younger_setting_counts_where_it_is_not_its_default(name: str) -> None:
    known = getattr(config, name)
    younger = make_dataclass(name, [("younger", int, field(default=3))], bases=(known,))
    assert settings_of(younger()) == settings_of(known())
    assert settings_of(younger(younger=4)) == settings_of(known()) | {"younger": 4}


def test_a_younger_setting_inside_another() -> None:
    @dataclass
    class Younger(OptimizerConfig):
        beta: float = 0.9

    Younger.__name__ = "OptimizerConfig"
    before = InitializeConfig()
    settings = {f.name: getattr(before.optimizer, f.name) for f in fields(OptimizerConfig)}
    after = replace(before, optimizer=Younger(**settings))
    different = replace(before, optimizer=Younger(**settings, beta=0.8))
    assert settings_of(after, replace(before, optimizer=Younger())) == settings_of(before)
    assert settings_of(different, replace(before, optimizer=Younger()))["optimizer"]["beta"] == 0.8


def test_old_settings_are_as_they_were() -> None:
    assert settings_of(OptimizerConfig()) == as_dict(OptimizerConfig())


def test_the_first_format_is_not_named() -> None:
    producer = {"t": 100.0}
    assert with_format(producer, 1) == producer
    assert with_format(producer, 2) == {"t": 100.0, "format": 2}
    assert producer == {"t": 100.0}
