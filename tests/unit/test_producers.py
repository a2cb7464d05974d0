"""What artifacts record of settings: a younger setting and a first format change no name, all others do."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from cgtgan import config
from cgtgan.assets import aggregated, backbone, corpus, embedded, generators
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, GeneratorConfig, InitializeConfig, OptimizerConfig, as_dict
from cgtgan.data import demo_world
from cgtgan.models.demo_clip import DemoClip
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Config:
    cfg = Config(device="cpu", threads=1, workers=0, artifacts_dir=str(tmp_path_factory.mktemp("artifacts")))
    cfg.dataset.world = config.DemoWorldConfig(0, 4, 1, 1, 1, 8, 32)
    cfg.clip_backbone.demo = config.DemoClipConfig(dim=8, width=8, text_layers=1, pairs=4, batch_size=4, steps=1)
    cfg.generator = GeneratorConfig("demo", "scratch", "corpus", 262, 1, 4, 2, prefix_length=1)
    cfg.initialize = InitializeConfig(steps=1, batch_size=4)
    made(cfg)
    return cfg


def made(cfg: Config) -> dict[str, set[str]]:
    """Everything up to the initial generator and the targets: kind -> names of its artifacts."""
    ws = Workspace(cfg)
    aggregated.aggregated_embeddings(ws, "train")
    generators.initial_generator(ws)
    kinds = {kind.name: {p.name for p in kind.iterdir() if p.name[0] != "."} for kind in ws.store.root.iterdir()}
    return {kind: names for kind, names in kinds.items() if names}


@pytest.mark.parametrize(
    ("module", "name", "anew"),
    [
        (demo_world, "FORMAT_VERSION", "demo_world clip image_embeddings sentence_embeddings"),
        (backbone, "DEMO_CLIP_FORMAT", "clip image_embeddings sentence_embeddings"),
        (embedded, "IMAGE_EMBEDDINGS_FORMAT", "image_embeddings"),
        (corpus, "SENTENCES_FORMAT", "sentences sentence_embeddings"),
        (corpus, "SENTENCE_EMBEDDINGS_FORMAT", "sentence_embeddings"),
        (aggregated, "AGGREGATED_FORMAT", ""),
        (generators, "GENERATORS_FORMAT", "generator_initial"),
    ],
)
def test_a_raised_format_makes_the_artifact_and_what_is_built_on_it_anew(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, anew: str
) -> None:
    before = made(tiny)
    monkeypatch.setattr(module, name, 2)
    kinds = set(anew.split())
    kinds |= {"generator_initial"} if "sentence_embeddings" in kinds else set()
    kinds |= {"aggregated_embeddings"} if name != "GENERATORS_FORMAT" else set()
    after = made(tiny)
    assert {kind for kind in after if after[kind] != before[kind]} == kinds
    assert all(after[kind] > before[kind] for kind in kinds)
    assert made(tiny) == after


def with_precision(tiny: Config, clip: str = "float32", initialize: str = "float32", group: int = 1) -> Config:
    cfg = deepcopy(tiny)
    cfg.clip_backbone.demo.precision, cfg.clip_backbone.demo.group = clip, group
    cfg.initialize.precision = initialize
    return cfg


@pytest.mark.parametrize(
    ("part", "kind", "file"),
    [("initialize", "generator_initial", "generator.safetensors"), ("clip", "clip", "clip.safetensors")],
)
def test_bf16_makes_another_artifact_near_the_float32_one(
    tiny: Config, tmp_path: Path, part: str, kind: str, file: str
) -> None:
    cfg = deepcopy(tiny)
    cfg.artifacts_dir = str(tmp_path)
    cfg.clip_backbone.demo.steps = cfg.initialize.steps = 4
    cfg.initialize.optimizer = OptimizerConfig(lr=1e-3)
    (old,) = made(cfg)[kind]
    precisions = {"clip": "float32", "initialize": "float32", part: "bf16"}
    (new,) = made(with_precision(cfg, precisions["clip"], precisions["initialize"]))[kind] - {old}
    half, whole = (load_file(tmp_path / kind / name / file) for name in (new, old))
    assert {tensor.dtype for tensor in half.values()} <= {torch.float32, torch.int64}
    assert any(not half[key].equal(whole[key]) for key in whole)
    for key in whole:
        torch.testing.assert_close(half[key].float(), whole[key].float(), rtol=0.05, atol=0.01)


def test_the_clips_image_tower_is_trained_in_bf16_and_read_in_float32(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, seen = DemoClip.encode_image, list[torch.dtype]()

    def watched(model: DemoClip, pixels: torch.Tensor) -> torch.Tensor:
        image = encode(model, pixels)
        seen.append(image.dtype)
        return image

    monkeypatch.setattr(DemoClip, "encode_image", watched)
    cfg = with_precision(tiny, clip="bf16")
    cfg.artifacts_dir = str(tmp_path)
    made(cfg)
    assert seen[0] == torch.bfloat16
    assert set(seen[cfg.clip_backbone.demo.steps :]) == {torch.float32}


def test_another_way_to_draw_lookalikes_makes_a_clip_of_groups_anew(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, group = (backbone.backbone_producer(Workspace(with_precision(tiny, group=n))) for n in (1, 2))
    monkeypatch.setattr(demo_world, "LOOKALIKES_FORMAT", demo_world.LOOKALIKES_FORMAT + 1)
    assert backbone.backbone_producer(Workspace(with_precision(tiny))) == alone
    assert backbone.backbone_producer(Workspace(with_precision(tiny, group=2))) != group
