"""Training state: continuing is bit for bit the same as never stopping, and a checkpoint is whole or not there."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from cgtgan.assets.checkpoints import STATE, checkpoint_in
from cgtgan.assets.optimizer import Optimizer
from cgtgan.assets.training_state import load_state, read_meta, save_state, state_tensors
from cgtgan.config import Config, OptimizerConfig, RewardTermConfig
from cgtgan.errors import InputError, MissingFileError
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.models.generator_bundle import load_generator
from cgtgan.runtime.artifacts import write_json
from cgtgan.runtime.fingerprints import file_fingerprint
from cgtgan.training.checkpoints import write_checkpoint
from cgtgan.training.own_terms import load_own_terms
from cgtgan.training.parts import TrainingParts
from tests.tiny_gan import one_step, step_inputs, tiny_parts, weights

pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------------------------------------- a GAN step


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_everything_trainable_moves_and_everything_frozen_stays(mapper: str) -> None:
    cfg, parts = tiny_parts(mapper=mapper, kl_weight=0.1)
    assert parts.discriminator is not None
    assert parts.reference is not None
    assert isinstance(parts.backbone, DemoBackbone)
    learners = {"G": parts.bundle.model, "D": parts.discriminator}
    frozen = {"clip": parts.backbone.model, "reference": parts.reference}
    before = {name: weights(m) for name, m in (learners | frozen).items()}
    metrics = one_step(cfg, parts, 1)
    for name, module in learners.items():
        parameters = dict(module.named_parameters())
        assert len(parameters) > 10
        still = [key for key, p in parameters.items() if torch.equal(p, before[name][key])]
        assert still == [key for key, p in parameters.items() if not p.requires_grad], name
        assert all(key.endswith("attention.self.key.bias") for key in still), (
            name
        )  # their gradient is nothing but rounding
    for name, module in frozen.items():
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
        assert all(torch.equal(value, before[name][key]) for key, value in module.state_dict().items()), name
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["train/kl"] == 0  # the reference is where the generator was
    assert one_step(cfg, parts, 2)["train/kl"] > 0


def test_the_first_step_of_a_warm_up_moves_the_discriminator_alone() -> None:
    cfg, parts = tiny_parts()
    assert parts.discriminator is not None
    parts.g_optimizer.config = OptimizerConfig(warmup_steps=5)
    g, d = weights(parts.bundle.model), weights(parts.discriminator)
    one_step(cfg, parts, 1)
    assert all(torch.equal(value, g[key]) for key, value in parts.bundle.model.state_dict().items())
    assert not all(torch.equal(value, d[key]) for key, value in parts.discriminator.state_dict().items())


def test_naturalness_is_judged_without_dropout_and_before_the_update() -> None:
    cfg, parts = tiny_parts(dropout=True, lr=0.05)
    assert parts.discriminator is not None
    greedy = parts.bundle.model.eval().greedy(step_inputs(parts, 1)[0])
    texts = parts.bundle.texts(greedy.token_ids)
    with torch.no_grad():
        before = parts.discriminator.eval().score(texts).mean().item()
    assert one_step(cfg, parts, 1)["reward/naturalness_greedy"] == pytest.approx(before, rel=1e-5)
    with torch.no_grad():
        assert abs(parts.discriminator.eval().score(texts).mean().item() - before) > 1e-3


def test_a_step_without_a_discriminator() -> None:
    cfg, parts = tiny_parts(discriminator=False)
    before = weights(parts.bundle.model)
    metrics = one_step(cfg, parts, 1)
    assert metrics["train/naturalness_loss"] == 0
    assert not all(torch.equal(value, before[key]) for key, value in parts.bundle.model.state_dict().items())


# ------------------------------------------------------------------------------------------------------ save and load


def with_own_term(folder: Path, *, dropout: bool) -> tuple[Config, TrainingParts]:
    cfg, parts = tiny_parts(dropout=dropout)
    code = folder / "rewards.py"
    code.write_text("def first_number(inputs):\n    return 9 * inputs.text[:, 0]\n")
    cfg.reward_weights.terms = {"first_number": RewardTermConfig(weight=2.0, function=f"{code}:first_number")}
    parts.own_terms = load_own_terms(cfg.reward_weights)
    return cfg, parts


@pytest.mark.parametrize(("dropout", "own_term"), [(True, False), (False, False), (False, True)])
def test_stopped_and_continued_is_the_same_bit_for_bit(tmp_path: Path, dropout: bool, own_term: bool) -> None:
    def make() -> tuple[Config, TrainingParts]:
        return with_own_term(tmp_path, dropout=dropout) if own_term else tiny_parts(dropout=dropout)

    torch.manual_seed(3)
    cfg, straight = make()
    straight_metrics = [one_step(cfg, straight, step) for step in range(1, 7)]

    torch.manual_seed(3)
    cfg, first = make()
    metrics = [one_step(cfg, first, step) for step in range(1, 4)]
    save_state(tmp_path / "state", state_tensors(first.modules, first.optimizers), {"step": 3})
    torch.manual_seed(99)  # another process starts elsewhere
    cfg, second = make()
    assert load_state(tmp_path / "state", second.modules, second.optimizers) == {"step": 3}
    metrics += [one_step(cfg, second, step) for step in range(4, 7)]

    assert metrics == straight_metrics
    assert ("reward/first_number" in metrics[0]) is own_term
    for name, module in straight.modules.items():
        ours = second.modules[name].state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in module.state_dict().items())


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    module = tiny_gpt2()
    assert module.lm_head.weight is module.transformer.wte.weight
    save_state(tmp_path / "state", state_tensors({"g": module}, {}), {})
    fresh = tiny_gpt2()
    load_state(tmp_path / "state", {"g": fresh}, {})
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert torch.equal(fresh.lm_head.weight, module.lm_head.weight)


def test_every_random_generator_is_put_back(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(()).item(),
            torch.randn(()).item(),
        ]

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # leaves half a pair of normals in Python's and numpy's generators
    save_state(tmp_path / "state", state_tensors({}, {}), {})
    expected = [draw() for _ in range(3)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert draw() != expected[0]
    load_state(tmp_path / "state", {}, {})
    assert [draw() for _ in range(3)] == expected


def test_no_pickle_is_written(tmp_path: Path) -> None:
    cfg, parts = tiny_parts()
    one_step(cfg, parts, 1)
    parts.bundle.save(tmp_path)
    save_state(tmp_path / "training.safetensors", state_tensors(parts.modules, parts.optimizers), {"step": 1})
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    content = (tmp_path / "training.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert {value["dtype"] for key, value in header.items() if key != "__metadata__"} <= {"F32", "U8", "BOOL", "I64"}
    assert json.loads(header["__metadata__"]["meta"]) == {"step": 1}
    with safe_open(tmp_path / "training.safetensors", framework="pt") as f:
        moments = [key for key in f.keys() if key.endswith("/exp_avg_sq")]  # noqa: SIM118
    assert len(moments) == sum(p.requires_grad for m in parts.modules.values() for p in m.parameters())


def test_a_saved_generator_captions_the_same(tmp_path: Path) -> None:
    cfg, parts = tiny_parts(mapper="transformer")
    one_step(cfg, parts, 1)
    parts.bundle.save(tmp_path)
    loaded = load_generator(tmp_path)
    x = torch.randn(5, parts.backbone.dim)
    a, b = parts.bundle.model.eval().greedy(x), loaded.model.eval().greedy(x)
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(a.log_probs, b.log_probs)
    assert parts.bundle.texts(a.token_ids) == loaded.texts(b.token_ids)
    assert loaded.config == cfg.generator


@pytest.mark.parametrize("name", ["generator.json", "generator.safetensors", "tokenizer.json"])
def test_a_generator_with_a_file_missing_or_cut(tmp_path: Path, name: str) -> None:
    _, parts = tiny_parts()
    parts.bundle.save(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="cannot be read as a generator's checkpoint"):
        load_generator(tmp_path)
    path.unlink()
    with pytest.raises(MissingFileError, match=rf"{name} is missing"):
        load_generator(tmp_path)


@pytest.mark.parametrize("meta", ["[]", "3", "[" * 100_000])
def test_a_state_with_another_description_is_an_input_error(tmp_path: Path, meta: str) -> None:
    save_file({}, tmp_path / "state", {"meta": meta, "rng": "{}"})
    with pytest.raises(InputError, match="not a whole training state"):
        read_meta(tmp_path / "state")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_cut_state_is_an_input_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "state"
    save_state(path, state_tensors({"g": tiny_gpt2()}, {}), {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole training state"):
        read_meta(path)
    with pytest.raises(MissingFileError, match="no training state"):
        read_meta(tmp_path / "none")


# --------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_what_is_not_finite_stops_before_a_weight_changes(where: str, bad: float) -> None:
    module = nn.Linear(3, 2)
    optimizer = Optimizer(module, OptimizerConfig(lr=0.1), 10)
    optimizer.step(module(torch.ones(1, 3)).sum(), 1)
    before = weights(module)
    state = copy.deepcopy(optimizer.adamw.state_dict())
    loss = module(torch.ones(1, 3)).sum()
    with pytest.raises(InputError, match=r"step 2 is .*diverged, lower the rate"):
        optimizer.step(loss * bad if where == "gradient" else loss + bad, 2)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    for index, values in optimizer.adamw.state_dict()["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(state["state"][index][k])) for k, v in values.items()
        )


# -------------------------------------------------------------------------------------------------------------- folders


def checkpoint(folder: Path, step: int, best_step: int = 0) -> list[str]:
    """Write one, as training does whose best validation was at `best_step` (0: none); list the folder."""

    def write(path: Path) -> None:
        (path / "generator.json").write_text(str(step))
        meta = {"step": step, "best_step": best_step, "best": 0.5 if best_step else -1.0}
        save_state(path / STATE, state_tensors({}, {}), meta)

    write_checkpoint(folder, step, write)
    return names(folder)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_links_point_to_whole_folders_and_the_best_is_kept(tmp_path: Path) -> None:
    assert checkpoint(tmp_path, 10, 10) == ["best", "last", "step_000010"]
    assert checkpoint(tmp_path, 20, 10) == ["best", "last", "step_000010", "step_000020"]
    assert checkpoint(tmp_path, 30, 10) == ["best", "last", "step_000010", "step_000020", "step_000030"]
    assert (tmp_path / "best/generator.json").read_text() == "10"
    assert (tmp_path / "last/generator.json").read_text() == "30"
    # the last two, and the best
    assert checkpoint(tmp_path, 40, 10) == ["best", "last", "step_000010", "step_000030", "step_000040"]
    assert checkpoint(tmp_path, 50, 50) == ["best", "last", "step_000040", "step_000050"]
    assert not (tmp_path / "last").readlink().is_absolute()  # the run folder may be moved


def test_without_validation_the_last_is_the_best_and_a_million_comes_after_the_steps_before_it(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        checkpoint(tmp_path, step)
    assert [(tmp_path / link).readlink().name for link in ("best", "last")] == ["step_1000000"] * 2
    assert names(tmp_path) == ["best", "last", "step_1000000", "step_999999"]


@pytest.mark.parametrize("lost", [("last",), ("best",), ("best", "last"), ("stale",)])
@pytest.mark.parametrize("start", ["", "checkpoints", "checkpoints/best", "checkpoints/last"])
def test_who_looks_for_a_checkpoint_finds_the_newest_whatever_a_kill_left_of_the_links(
    tmp_path: Path, lost: tuple[str, ...], start: str
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint(folder, 10, 10)
    checkpoint(folder, 20, 10)
    checkpoint(folder, 30, 30)
    for link in ("best", "last") if lost == ("stale",) else lost:
        (folder / link).unlink()
        if lost == ("stale",):
            (folder / link).symlink_to("step_000020")
    assert checkpoint_in(tmp_path / start) == folder / "step_000030"
    assert [(folder / link).readlink().name for link in ("best", "last")] == ["step_000030"] * 2


def test_a_copy_that_followed_the_links_is_read_and_goes_on(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one", 10, 10)
    checkpoint(tmp_path / "one", 20, 10)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")  # folders in the place of links
    assert checkpoint_in(tmp_path / "copy", "last") == tmp_path / "copy" / "step_000020"
    assert checkpoint(tmp_path / "copy", 30, 10) == ["best", "last", "step_000010", "step_000020", "step_000030"]
    assert (tmp_path / "copy" / "last").readlink().name == "step_000030"


@pytest.mark.parametrize("name", ["generator.safetensors", "tokenizer.json", "clip/clip.safetensors"])
def test_a_flipped_bit_of_a_checkpoint_is_noticed_once_it_changed(tmp_path: Path, name: str) -> None:
    for file in ("generator.json", "generator.safetensors", "tokenizer.json", "clip/clip.safetensors", STATE):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(bytes(100))
    files = {str(p.relative_to(tmp_path)): file_fingerprint(p) for p in tmp_path.rglob("*") if p.is_file()}
    write_json(tmp_path / "checkpoint.json", {"files": files})
    assert checkpoint_in(tmp_path) == tmp_path
    (tmp_path / STATE).write_bytes(b"!" * 100)  # only training needs it
    assert checkpoint_in(tmp_path) == tmp_path
    (tmp_path / name).write_bytes(bytes(99) + b"\1")
    with pytest.raises(InputError, match=rf"{name} is not as it was written"):
        checkpoint_in(tmp_path)
