"""A step in micro-batches, in chunks, with checkpointing, in bf16, and with the errors of the released program."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from cgtgan.config import Config, DiscriminatorConfig, GeneratorConfig
from cgtgan.errors import InputError
from cgtgan.models.attention import use_float32_attention
from cgtgan.models.chunks import chunks_by_length
from cgtgan.models.discriminator import make_discriminator
from cgtgan.models.generator_bundle import load_generator, make_generator, make_tokenizer
from cgtgan.runtime.artifacts import Embeddings, Header
from cgtgan.runtime.devices import Devices, tokens_that_fit
from cgtgan.runtime.shards import Rank
from cgtgan.runtime.stopwatch import TRAINING_SECONDS
from cgtgan.stages.train import gan_step
from cgtgan.training.batches import Batches
from cgtgan.training.parts import TrainingParts
from tests.tiny_gan import SENTENCES, one_step, step_inputs, tiny_batch, tiny_parts, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def after(
    change: Callable[[Config, TrainingParts], object], steps: int = 3, **settings: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights of G and D after some steps of a tiny GAN that `change` has changed, and the metrics."""
    cfg, parts = tiny_parts(**settings)
    change(cfg, parts)
    rows = [one_step(cfg, parts, step) for step in range(1, steps + 1)]
    return {
        f"{name}.{key}": value for name, module in parts.modules.items() for key, value in weights(module).items()
    }, rows


def set_train(**values: Any) -> Callable[[Config, TrainingParts], None]:
    def change(cfg: Config, _parts: TrainingParts) -> None:
        for name, value in values.items():
            setattr(cfg.train, name, value)

    return change


def small_chunks(_cfg: Config, parts: TrainingParts) -> None:
    parts.g_chunk, parts.d_chunk = 7, 5


def checkpointing(_cfg: Config, parts: TrainingParts) -> None:
    parts.bundle.model.enable_gradient_checkpointing()
    parts.g_chunk = 20


def without_sharing(_cfg: Config, parts: TrainingParts) -> None:
    parts.bundle.model._shares_prefix = False


@pytest.mark.parametrize(
    "change",
    [
        set_train(accumulation=2),
        set_train(accumulation=3),
        set_train(accumulation=4),
        small_chunks,
        checkpointing,
        without_sharing,
    ],
)
@pytest.mark.parametrize(("kl_weight", "kl"), [(0.0, "k3"), (0.3, "k3"), (0.3, "k2"), (0.3, "k1_reward")])
def test_the_way_through_a_step_does_not_change_it(
    change: Callable[[Config, TrainingParts], object], kl_weight: float, kl: str
) -> None:
    expected, expected_rows = after(lambda *_: None, kl_weight=kl_weight, kl=kl)
    found, rows = after(change, kl_weight=kl_weight, kl=kl)
    for name, value in expected.items():
        # Adam's first steps move a weight by the rate whatever its gradient's size: where that is rounding, they differ
        assert float((found[name] - value).abs().mean()) < 2e-6, name
    for a, b in zip(rows, expected_rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_a_step_in_bf16_is_near_and_keeps_weights_losses_and_rewards_in_float32() -> None:
    def bf16(_cfg: Config, parts: TrainingParts) -> None:
        parts.devices = Devices(precision="bf16")
        assert parts.discriminator is not None
        use_float32_attention(parts.bundle.model.gpt, parts.discriminator.text_encoder)

    exact, exact_rows = after(lambda *_: None, steps=1)
    near, rows = after(bf16, steps=1)
    assert all(value.dtype == torch.float32 for value in near.values() if value.is_floating_point())
    assert rows[0]["train/d_loss"] == pytest.approx(exact_rows[0]["train/d_loss"], rel=0.02)
    assert rows[0]["train/d_loss"] != exact_rows[0]["train/d_loss"]
    assert max(float((near[name] - value).abs().max()) for name, value in exact.items()) < 5e-3


def test_sampling_with_dropout_carries_the_gradient_of_the_pass_that_drew() -> None:
    """At a dropout rate of 0 the step is the normal one. Above 0 each sample has its own masks, finite gradients."""

    def no_rate(_cfg: Config, parts: TrainingParts) -> None:
        for module in (m for part in parts.modules.values() for m in part.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "attn_pdrop", "dropout_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    expected, _ = after(no_rate, steps=2)
    found, _ = after(no_rate, steps=2, dropout=True)
    assert max(float((found[name] - value).abs().mean()) for name, value in expected.items()) < 2e-6
    other, rows = after(lambda *_: None, steps=2, dropout=True)
    assert max(float((other[name] - value).abs().mean()) for name, value in expected.items()) > 1e-5
    assert all(math.isfinite(v) for row in rows for v in row.values())
    _, parts = tiny_parts(dropout=True)
    image = step_inputs(parts, 1)[0][:1].repeat(2, 1)
    generator = parts.bundle.model.train()
    drawn = generator.sample_with_graph(image, [[7] * 3] * 2)  # one image twice, one seed: only the masks differ
    assert len(set(drawn.log_probs.flatten().tolist())) > 3


@pytest.mark.parametrize("kl", ["k1_reward", "k2", "k3"])
def test_the_kl_penalty_of_a_step_has_the_gradient_of_its_definition(kl: str) -> None:
    """With no other reward: w is 0 and there is no discriminator."""
    cfg, parts = tiny_parts(kl_weight=0.3, kl=kl, discriminator=False)
    cfg.reward_weights.max_weight = 0.0
    model, reference = parts.bundle.model.eval(), parts.reference
    assert reference is not None
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    batch = tiny_batch(cfg, parts, 1)
    drawn = model.sample_and_greedy(batch.image, batch.seeds)[0].drawn
    log_p, mask = model.token_log_probs(batch.image, drawn)
    log_q = reference.token_log_probs(batch.image, drawn)[0]
    if kl == "k1_reward":
        k1 = ((log_p - log_q).sum(-1) / mask.sum(-1)).detach()
        others = (k1.sum(1, keepdim=True) - k1) / (k1.shape[1] - 1)
        by_hand = ((k1 - others) * log_p.sum(-1) / mask.sum(-1)).mean()
    else:
        r = log_q.detach() - log_p
        by_hand = ((r**2 / 2 if kl == "k2" else r.exp() - 1 - r) * mask).sum(-1).div(mask.sum(-1)).mean()
    wanted = torch.autograd.grad(0.3 * by_hand, [*model.parameters()], allow_unused=True)
    metrics = one_step(cfg, parts, 1)
    assert metrics["train/g_loss"] == pytest.approx(0.3 * by_hand.item(), rel=1e-4)
    norm = torch.nn.utils.get_total_norm([g for g in wanted if g is not None])
    assert metrics["train/g_grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    clipped = min(1.0, cfg.train.generator_optimizer.grad_clip / norm.item())
    for p, g in zip(model.parameters(), wanted, strict=True):
        assert (p.grad is None) == (g is None)
        if p.grad is not None and g is not None:
            torch.testing.assert_close(p.grad, clipped * g, rtol=1e-3, atol=1e-6)
    assert ("train/kl_loss" in metrics) is (kl != "k3")


# ------------------------------------------------------------------------------------------------------ released slips


def test_released_accumulation_clips_after_each_part_and_uses_the_new_weight_in_the_last() -> None:
    def ramp(cfg: Config, _parts: TrainingParts) -> None:
        cfg.reward_weights.ramp_steps = 2
        cfg.train.accumulation, cfg.train.released = 2, ["accumulation"]

    def sound(cfg: Config, parts: TrainingParts) -> None:
        ramp(cfg, parts)
        cfg.train.released = []

    assert after(ramp, steps=2)[1][1] != after(sound, steps=2)[1][1]
    # nothing is above the limit and w stands still: then both are one
    still = [
        after(lambda cfg, parts, change=change: (change(cfg, parts), loose(cfg, parts)), steps=2)[0]
        for change in (ramp, sound)
    ]
    assert max(float((still[0][name] - value).abs().mean()) for name, value in still[1].items()) < 2e-6


def loose(cfg: Config, parts: TrainingParts) -> None:
    cfg.reward_weights.ramp_steps = 0
    for optimizer in parts.optimizers.values():
        optimizer.config.grad_clip = 1e6


def batches(rank: Rank, sentences: int = 7, **settings: Any) -> Batches:
    cfg = Config()
    cfg.train.batch_size, cfg.train.num_samples = 5, 2
    for name, value in settings.items():
        setattr(cfg.train, name, value)
    header = Header("x", "x", {}, 11, 3, "float16")
    vectors = torch.arange(33.0).view(11, 3).half()
    embeddings = Embeddings(vectors, [f"image {i}" for i in range(11)], header)
    devices = Devices.__new__(Devices)
    devices.device, devices.rank, devices.precision = torch.device("cpu"), rank, "float32"
    return Batches(cfg, devices, embeddings, embeddings, [f"Sentence {i}." for i in range(sentences)])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_a_batch_and_draw_what_one_would(world: int) -> None:
    for step in (1, 2, 3, 9):
        whole = batches(Rank()).batch(step)
        parts = [batches(Rank(i, world)).batch(step) for i in range(world)]
        assert [i for p in parts for i in p.ids] == whole.ids
        assert [s for p in parts for s in p.real] == whole.real
        assert [s for p in parts for s in p.seeds] == whole.seeds
        assert torch.equal(torch.cat([p.image for p in parts]), whole.image)
        assert {p.total for p in parts} == {5}
        again = [x for p in whole.split(3) for x in p.ids]
        assert again == whole.ids
        assert [s for p in whole.split(3) for s in p.real] == whole.real


def test_released_text_order_gives_an_image_its_own_sentences_in_every_epoch() -> None:
    found: dict[str, set[tuple[str, str]]] = {}
    for step in range(1, 12):
        batch = batches(Rank(), released=["text_order"]).batch(step)
        for i, image in enumerate(batch.ids):
            found.setdefault(image, set()).add((batch.real[2 * i], batch.real[2 * i + 1]))
    assert len(found) == 11
    for image, pairs in found.items():
        i = int(image.split()[1])
        assert pairs == {(f"Sentence {2 * i % 7}.", f"Sentence {(2 * i + 1) % 7}.")}


def test_released_l1_target_changes_the_l1_term_alone() -> None:
    def normalised(cfg: Config, parts: TrainingParts) -> None:
        parts.bundle.model.normalize_prefix = True
        cfg.train.released = ["l1_target"]

    def sound(cfg: Config, parts: TrainingParts) -> None:
        normalised(cfg, parts)
        cfg.train.released = []

    released, plain = after(normalised, steps=1)[1][0], after(sound, steps=1)[1][0]
    assert released["reward/cos"] == pytest.approx(plain["reward/cos"], rel=1e-5)
    assert abs(released["reward/l1"] - plain["reward/l1"]) > 0.1


# ----------------------------------------------------------------------------------------------------- other families

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 1, "intermediate_size": 32}
FAMILIES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "opt": lambda vocab: OPTConfig(**SIZES, vocab_size=vocab, ffn_dim=32, word_embed_proj_dim=16),
    "qwen": lambda vocab: Qwen2Config(**GROUPED, vocab_size=vocab),
    "smollm": lambda vocab: LlamaConfig(**GROUPED, vocab_size=vocab, tie_word_embeddings=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_language_model_learns_is_saved_and_captions_the_same(family: str, tmp_path: Path) -> None:
    cfg, parts = tiny_parts()
    tokenizer = parts.bundle.tokenizer
    torch.manual_seed(0)
    folder = tmp_path / "language_model"
    AutoModelForCausalLM.from_config(FAMILIES[family](len(tokenizer))).save_pretrained(folder)
    config = GeneratorConfig(
        language_model=str(folder), tokenizer="corpus", vocab_size=300, prefix_length=3, max_length=6
    )
    bundle = make_generator(config, make_tokenizer(config, SENTENCES), parts.backbone.dim, seed=1)
    parts.bundle, parts.g_optimizer = bundle, type(parts.g_optimizer)(bundle.model, parts.g_optimizer.config, 10)
    assert bundle.model.shares_prefix
    before = weights(bundle.model)
    one_step(cfg, parts, 1)
    still = [name for name, p in bundle.model.named_parameters() if torch.equal(p, before[name])]
    assert still == [
        name for name in still if "embed_positions" in name or "k_proj.bias" in name
    ]  # a key's bias has no gradient
    bundle.save(tmp_path / "saved")
    loaded = load_generator(tmp_path / "saved")
    x = torch.randn(4, parts.backbone.dim)
    assert torch.equal(bundle.model.eval().greedy(x).token_ids, loaded.model.eval().greedy(x).token_ids)


@pytest.mark.parametrize("wrong", ["scaled logits", "no cache"])
def test_a_language_model_of_another_kind_reads_its_prefix_with_each_caption(wrong: str) -> None:
    """Logits that are not the head of the last states, or a body without a cache: detected, and the plain pass runs."""
    _, parts = tiny_parts()
    model: Any = parts.bundle.model.eval()
    if wrong == "scaled logits":
        forward = model.gpt.forward

        def scaled(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out.logits = out.logits / 2
            return out

        model.gpt.forward = scaled
    else:
        body = model.gpt.base_model.forward
        model.gpt.base_model.forward = lambda *a, **k: body(*a, **(k | {"past_key_values": None, "use_cache": False}))
    assert not model.shares_prefix
    drawn = torch.randint(1, 200, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    image = step_inputs(parts, 1)[0][:2]
    logits = model.token_logits(model.prefix(image).repeat_interleave(3, dim=0), drawn.flatten(0, 1)).log_softmax(-1)
    by_hand = logits.gather(2, drawn.flatten(0, 1)[..., None])[..., 0].mean(-1)
    torch.testing.assert_close(model.log_probs(image, drawn).flatten(), by_hand)


def test_a_bert_judges_and_an_encoder_without_a_pooled_output_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertModel(BertConfig(**sizes, max_position_embeddings=32)).save_pretrained(tmp_path / "bert")
    DistilBertModel(DistilBertConfig(vocab_size=300, dim=16, n_layers=1, n_heads=2, hidden_dim=32)).save_pretrained(
        tmp_path / "distil"
    )
    cfg, parts = tiny_parts()
    config = DiscriminatorConfig(encoder=str(tmp_path / "bert"), tokenizer="corpus", vocab_size=300)
    discriminator = make_discriminator(config, SENTENCES, 6, seed=0)
    assert parts.d_optimizer is not None
    parts.discriminator = discriminator
    parts.d_optimizer = type(parts.d_optimizer)(discriminator, parts.d_optimizer.config, 10)
    before = weights(discriminator)
    assert math.isfinite(one_step(cfg, parts, 1)["train/d_loss"])
    assert not all(torch.equal(value, before[name]) for name, value in weights(discriminator).items())
    with pytest.raises(InputError, match="DistilBertModel without a pooled output"):
        make_discriminator(replace(config, encoder=str(tmp_path / "distil")), SENTENCES, 6, seed=0)


# -------------------------------------------------------------------------------------------------------- pieces of it


def test_chunks_hold_every_row_once_and_no_more_than_fits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = torch.from_numpy(rng.integers(1, 30, size=rng.integers(1, 60)))
        limit = int(rng.integers(1, 200))
        found = list(chunks_by_length(lengths, limit))
        assert sorted(torch.cat(found).tolist()) == list(range(len(lengths)))
        for rows in found:
            assert len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= limit
        widths = [int(lengths[rows].max()) for rows in found]
        assert widths == sorted(widths)
    assert list(chunks_by_length(torch.tensor([], dtype=torch.long), 10)) == []


def test_more_memory_is_more_tokens_and_one_always_fits() -> None:
    cpu = torch.device("cpu")
    assert tokens_that_fit(12, 768, 50257, 2.0, cpu) > 1.9 * tokens_that_fit(12, 768, 50257, 1.0, cpu) > 500
    assert tokens_that_fit(96, 20_000, 100_000, 0.001, cpu) == 1


def test_what_is_not_finite_is_said_saved_and_changes_nothing(tmp_path: Path) -> None:
    cfg, parts = tiny_parts()
    parts.run = tmp_path
    one_step(cfg, parts, 1)
    with torch.no_grad():
        parts.bundle.model.clip_project.model[0].weight[0, 0] = float("nan")  # pyright: ignore
    before = [weights(m) for m in parts.modules.values()]
    with pytest.raises(
        InputError, match=r"at step 2 is .*first in the gradient of .*train\.generator_optimizer\.lr.*batch is in"
    ) as error:
        one_step(cfg, parts, 2)
    for module, values in zip(parts.modules.values(), before, strict=True):
        assert all(torch.equal(v, values[k]) or bool(v.isnan().any()) for k, v in weights(module).items())
    file = tmp_path / "not_finite_step_000002_process_0.json"
    assert str(file) in str(error.value)
    saved = json.loads(file.read_text())
    assert len(saved["samples"]) == 12
    assert saved["ids"] == [0, 1, 2, 3]


def test_the_page_of_metrics_names_every_logged_key() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
    named: set[str] = set()
    for line in page.splitlines():
        if line.startswith("| `"):
            names = re.findall("`([^`]+)`", line.split("|")[1])
            named |= {name if not name.startswith("/") else names[0].split("/")[0] + name for name in names}
    cfg, parts = tiny_parts()
    logged = set(gan_step(cfg, parts, 1, tiny_batch(cfg, parts, 1))) | {"eval/CIDEr", "eval/epoch", TRAINING_SECONDS}
    assert logged <= named
    groups = {name.split("/")[0] for name in logged}
    assert {name for name in named if name.split("/")[0] in groups} <= logged | {
        "train/kl",
        "train/kl_loss",
        "train/ema_distance",
    }  # with a KL penalty, with a moving average
