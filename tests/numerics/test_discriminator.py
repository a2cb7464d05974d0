"""The discriminator: the released program's tokens, logits, losses, gradients, and the cut of long texts (slip 5)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from cgtgan.config import DiscriminatorConfig
from cgtgan.method.reinforce import advantages, policy_gradient_loss
from cgtgan.models.attention import NAME as FLOAT32_ATTENTION
from cgtgan.models.discriminator import Discriminator, discriminator_loss, make_discriminator
from cgtgan.models.tokenizers import TextTokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
BEGIN, PAD, END, STOP = 0, 1, 2, 4
POSITIONS = "text_encoder.embeddings.position_ids"  # a buffer that newer RoBERTa classes do not store


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(GOLDEN / "discriminator.npz")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return json.loads((GOLDEN / "discriminator_meta.json").read_text(encoding="utf-8"))


@pytest.fixture
def discriminator(golden: Any) -> Discriminator:
    vocabulary = {"<s>": BEGIN, "<pad>": PAD, "</s>": END, "<unk>": 3, ".": STOP} | {f"w{i}": i + 5 for i in range(65)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = RobertaConfig(
        vocab_size=70, max_position_embeddings=40, pad_token_id=PAD, type_vocab_size=1, layer_norm_eps=1e-5, **sizes
    )
    model = Discriminator(RobertaModel(config), TextTokenizer(words), 10)
    weights = {key[2:]: torch.tensor(golden[key]) for key in golden.files if key.startswith("w.")}
    del weights[POSITIONS]
    model.load_state_dict(weights, strict=True)
    return model.eval()


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(
        found.detach().flatten().double(), torch.as_tensor(expected).flatten().double(), rtol=1e-5, atol=1e-5
    )


def with_our_end(tokens: Tensor) -> Tensor:
    """Where the released program ends a cut text in `<s></s>`, ours ends it in `.</s>`."""
    out = tokens.clone()
    cut = (out[:, -1] == END) & (out[:, -2] == BEGIN)
    out[cut, -2] = STOP
    return out


@pytest.mark.parametrize(("name", "cut"), [("pad", 2), ("real", 6), ("fake", 0)])
def test_golden_tokens(
    discriminator: Discriminator, golden: Any, texts: dict[str, list[str]], name: str, cut: int
) -> None:
    released = torch.tensor(golden[f"{name}_tokens"])
    expected = with_our_end(released)
    assert int((expected != released).sum()) == cut
    tokens, mask = discriminator.tokenize(texts["pad_texts" if name == "pad" else name])
    width = tokens.shape[1]  # ours pads to the longest text of the batch
    assert tokens.tolist() == expected[:, :width].tolist()
    assert (expected[:, width:] == PAD).all()
    assert mask.tolist() == torch.tensor(golden[f"{name}_mask"])[:, :width].long().tolist()


def test_a_cut_text_ends_as_a_whole_one(discriminator: Discriminator) -> None:
    long = " ".join(f"w{i}" for i in range(20)) + "."
    tokens, mask = discriminator.tokenize([long, "w1 w2 w3 w4 w5 w6 w7.", "w1."])
    assert tokens.shape == (3, 10)
    assert tokens[:2, -2:].tolist() == [[STOP, END]] * 2
    assert mask.sum(dim=1).tolist() == [10, 10, 4]
    assert tokens[2].tolist() == [BEGIN, 6, STOP, END] + [PAD] * 6


def test_golden_loss_and_gradient(discriminator: Discriminator, golden: Any) -> None:
    real, fake = (
        discriminator(torch.tensor(golden[f"{n}_tokens"]), torch.tensor(golden[f"{n}_mask"]).long())
        for n in ("real", "fake")
    )
    close(torch.cat([real, fake]), golden["D_logits"])
    loss = discriminator_loss(real, fake)
    close(loss, golden["D_loss"])
    loss.backward()
    found = {name: p.grad for name, p in discriminator.named_parameters() if p.grad is not None}
    expected = {key[5:] for key in golden.files if key.startswith("grad.")}
    assert set(found) == expected
    for name, gradient in found.items():
        close(gradient, golden[f"grad.{name}"])


def test_golden_policy_gradient(discriminator: Discriminator, golden: Any, texts: dict[str, list[str]]) -> None:
    with torch.no_grad():
        fake, greedy = discriminator.score(texts["fake"]), discriminator.score(texts["greedy"])
    close(torch.cat([fake, greedy]), golden["PG_scores"])
    close(fake.mean(), golden["critic_score"])
    log_probs = torch.tensor(golden["PG_logprobs"]).requires_grad_()
    loss = policy_gradient_loss(advantages(fake.view(3, 4), greedy), log_probs.view(3, 4))
    close(loss, golden["PG_loss"])
    loss.backward()
    assert log_probs.grad is not None
    close(log_probs.grad, golden["PG_grad"])


def test_identical_texts_are_judged_once_and_alike(discriminator: Discriminator, texts: dict[str, list[str]]) -> None:
    sizes = []
    handle = discriminator.text_encoder.register_forward_hook(
        lambda _m, _i, kwargs, _o: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    several = [*texts["fake"], *reversed(texts["fake"]), *texts["fake"][:3]]
    found = discriminator.score(several)
    handle.remove()
    assert sizes == [len(set(texts["fake"]))]
    close(found, discriminator(*discriminator.tokenize(several)).detach())
    assert torch.equal(found[:12], found[12:24].flip(0))


def test_padding_does_not_change_a_logit(discriminator: Discriminator) -> None:
    alone = discriminator.score(["w1 w2."])
    close(discriminator.score(["w1 w2.", "w3 w4 w5 w6 w7 w8 w9."])[:1], alone.detach())


def test_loss_by_hand() -> None:
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 0.0])
    by_hand = -np.mean([np.log(0.5), np.log(1 / (1 + np.exp(-2))), np.log(1 - 1 / (1 + np.exp(1))), np.log(0.5)])
    assert discriminator_loss(real, fake).item() == pytest.approx(by_hand, rel=1e-6)


def test_the_longest_text_fits_the_positions_and_no_text_crashes() -> None:
    config = DiscriminatorConfig(encoder="scratch", tokenizer="corpus", vocab_size=300, layers=1, width=8, heads=2)
    model = make_discriminator(config, ["a dog runs.", "two cats sleep."], 6, seed=3).eval()
    assert model.max_tokens == 8
    found = model.score(["", ".", "z" * 500 + ".", "\U0001f415 über — 犬", "a dog runs."])
    assert torch.isfinite(found).all()
    again = make_discriminator(config, ["a dog runs.", "two cats sleep."], 6, seed=3).eval()
    assert torch.equal(again.score(["a dog runs."]), model.score(["a dog runs."]))
    other = make_discriminator(config, ["a dog runs.", "two cats sleep."], 6, seed=4).eval()
    assert not torch.equal(other.score(["a dog runs."]), model.score(["a dog runs."]))


def test_it_can_learn_to_tell_two_kinds_apart(discriminator: Discriminator) -> None:
    torch.manual_seed(0)
    real, fake = ["w1 w2 w3.", "w4 w5.", "w1 w5."], ["w30 w31.", "w32 w31 w30.", "w33."]
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        logits_real, logits_fake = (discriminator(*discriminator.tokenize(texts)) for texts in (real, fake))
        discriminator_loss(logits_real, logits_fake).backward()
        optimizer.step()
    assert discriminator.score(real).min() > 0 > discriminator.score(fake).max()


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLOAT32_ATTENTION])
def test_what_the_host_knows_of_the_padding_changes_no_logit(discriminator: Discriminator, attention: str) -> None:
    """Bit for bit: the mask is the one that transformers makes after it has asked the device."""
    discriminator.text_encoder.set_attn_implementation(attention)
    for several in (["w1 w2 w3.", "w4.", "w5 w6."], ["w1 w2.", "w3 w4."]):
        tokens, mask = discriminator.tokenize(several)
        padded = not bool(mask.all())
        assert torch.equal(discriminator(tokens, mask, padded=padded), discriminator(tokens, mask))
        if padded:
            assert not torch.allclose(discriminator(tokens, mask, padded=False), discriminator(tokens, mask))
